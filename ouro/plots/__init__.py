"""Static pictures with matplotlib (the notebook extra).

Every `plot_*` takes `ax=` (a new figure otherwise) and returns the Axes. Colours of text, lines and background come from
matplotlib's rcParams, so that a dark style gives a dark picture; maps of colour are ones that colour-blind readers can tell
apart.
"""

from ouro.plots.array import plot_array
from ouro.plots.steps import plot_steps

__all__ = ["plot_array", "plot_steps"]
