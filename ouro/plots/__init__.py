"""Static pictures with matplotlib (the notebook extra).

Every `plot_*` takes `ax=` (a new figure otherwise) and returns the Axes. Colours of text, lines and background come from
matplotlib's rcParams, so that a dark style gives a dark picture; maps of colour are ones that colour-blind readers can tell
apart.
"""

from ouro.plots.array import plot_array
from ouro.plots.drift import plot_by_step, plot_depth, plot_drift, plot_flips, plot_rank, plot_step_matrix
from ouro.plots.exits import plot_exit_pdf, plot_pareto
from ouro.plots.steps import plot_steps

__all__ = [
    "plot_array", "plot_by_step", "plot_depth", "plot_drift", "plot_exit_pdf", "plot_flips", "plot_pareto", "plot_rank",
    "plot_step_matrix", "plot_steps",
]  # fmt: skip
