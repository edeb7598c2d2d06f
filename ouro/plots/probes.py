"""Probes over the grid."""

from __future__ import annotations

from typing import Any

import numpy as np

from ouro.labelled import LabelledSet
from ouro.plots.canvas import axes, step_colours


def plot_faithfulness(result: LabelledSet, *, ax: Any = None) -> Any:
    """Accuracy of probes along the unrolled depth, a line for the answer of each step; dotted: the most frequent answer.

    Parameters
    ----------
    result
        Of `ouro.probes.faithfulness`.

    Returns
    -------
    matplotlib Axes
    """
    probe, majority = result["probe"].values, result["majority"].values
    answers, steps, layers = probe.shape
    ax = axes(ax, (7.2, 3.4))
    x = np.arange(steps * layers)
    for i, shade in enumerate(step_colours(answers)):
        ax.plot(x, probe[i].reshape(-1), color=shade, marker="o", markersize=3, label=f"answer of step {i}")
        ax.axhline(majority[i], color=shade, linestyle=":", linewidth=1, label="most frequent answer" if i == answers - 1 else None)
    for t in range(1, steps):
        ax.axvline(t * layers - 0.5, color=ax.spines["left"].get_edgecolor(), linewidth=0.5, linestyle=":")
    ax.set_xticks((np.arange(steps) + 0.5) * layers - 0.5, [f"step {t}" for t in range(steps)])
    ax.tick_params(axis="x", length=0)
    ax.set(xlabel="layers of each step", ylabel="accuracy of the probe")
    ax.legend(frameon=False, fontsize=8)
    ax.set_title(result.title, fontsize=10)
    return ax
