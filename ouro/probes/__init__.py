"""Probes over the (step, layer) grid with any scikit-learn estimator (the probe extra), and the paper's faithfulness protocol."""

from ouro.probes.faithfulness import faithfulness, faithfulness_of
from ouro.probes.grid import StepLayerProbe
from ouro.probes.samples import control_labels, probe_data

__all__ = ["StepLayerProbe", "control_labels", "faithfulness", "faithfulness_of", "probe_data"]
