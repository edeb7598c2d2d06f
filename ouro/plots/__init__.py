"""Static pictures with matplotlib (the notebook extra).

Every `plot_*` takes `ax=` (a new figure otherwise) and returns the Axes. Colours of text, lines and background come from
matplotlib's rcParams, so that a dark style gives a dark picture; maps of colour are ones that colour-blind readers can tell
apart.
"""

from ouro.plots.array import plot_array
from ouro.plots.attention import plot_attention_drift, plot_heads, plot_pattern
from ouro.plots.drift import plot_by_step, plot_depth, plot_drift, plot_flips, plot_rank, plot_step_matrix
from ouro.plots.exits import plot_exit_pdf, plot_pareto
from ouro.plots.layers import plot_fixed_point, plot_kv_similarity, plot_layers_by_step, plot_lens, plot_lens_grid, plot_perturbation
from ouro.plots.patching import plot_patching
from ouro.plots.probes import plot_faithfulness
from ouro.plots.steps import plot_steps

__all__ = [
    "plot_array", "plot_attention_drift", "plot_by_step", "plot_depth", "plot_drift", "plot_exit_pdf",
    "plot_faithfulness", "plot_fixed_point", "plot_flips", "plot_heads", "plot_kv_similarity", "plot_layers_by_step",
    "plot_lens", "plot_lens_grid", "plot_pareto", "plot_patching", "plot_pattern", "plot_perturbation", "plot_rank", "plot_step_matrix",
    "plot_steps",
]  # fmt: skip
