"""Where tokens leave, and what it costs."""

from __future__ import annotations

from typing import Any

import numpy as np

from ouro.labelled import LabelledArray, LabelledSet
from ouro.plots.canvas import axes, colour, step_colours

MARKS = "osD^vP*Xd<>"


def plot_exit_pdf(result: LabelledArray | LabelledSet, *, by: str = "token_class", ax: Any = None) -> Any:
    """Mean exit distribution as stacked bars, one for each class of tokens and one for all.

    Parameters
    ----------
    result
        Of `exit_report`, or its `pdf`.
    by
        The coordinate to part tokens by.

    Returns
    -------
    matplotlib Axes
    """
    pdf = result["pdf"] if isinstance(result, LabelledSet) else result
    kinds = pdf.group_mean(by)
    names = ["all", *kinds.coords[by]]
    values = np.column_stack([pdf.mean("batch", "pos").values, kinds.values])
    ax = axes(ax, (6.4, 1.2 + 0.36 * len(names)))
    left = np.zeros(len(names))
    for t, (row, shade) in enumerate(zip(values, step_colours(len(values)), strict=True)):
        ax.barh(names, row, left=left, color=shade, label=f"step {t}", height=0.72)
        left += row
    ax.invert_yaxis()
    ax.set(xlim=(0, 1), xlabel="probability of leaving")
    ax.legend(ncols=min(len(values), 8), loc="lower center", bbox_to_anchor=(0.5, 1.0), frameon=False, fontsize=8)
    return ax


def plot_pareto(result: LabelledSet, *, y: str = "loss", ax: Any = None) -> Any:
    """Loss (or `y="accuracy"`) against mean steps, a line for each exit rule.

    Parameters
    ----------
    result
        Of `exit_pareto`.

    Returns
    -------
    matplotlib Axes
    """
    ax = axes(ax, (6.8, 4.2))
    units = result[y].attrs.get("units")
    for i, rule in enumerate(result["loss"].coords["rule"]):
        steps, cost = result["mean_steps"].sel(rule=rule).values, result[y].sel(rule=rule).values
        order = np.argsort(steps[~np.isnan(steps)], kind="stable")
        fixed = rule == "fixed"
        ax.plot(
            steps[order], cost[order], marker=MARKS[i % len(MARKS)], markersize=8 if fixed else 4, linewidth=1.8 if fixed else 1.1,
            linestyle="--" if fixed else "-", color=ax.spines["left"].get_edgecolor() if fixed else colour(i - 1), label=rule,
            zorder=3 if fixed else 2,
        )  # fmt: skip
    ax.set(xlabel="mean steps of a token", ylabel=f"{y} [{units}]" if units else y)
    ax.legend(frameon=False, fontsize=8, ncols=2)
    ax.set_title("what leaving early costs", fontsize=10)
    return ax
