"""Heads by step."""

from __future__ import annotations

from typing import Any

import numpy as np

from ouro.labelled import LabelledArray, LabelledSet
from ouro.plots.canvas import axes, colour, heat_map, slant, with_units


def plot_heads(result: LabelledArray, *, ax: Any = None, **style: Any) -> Any:
    """A score of every head (layer.head) by step, as colours.

    Parameters
    ----------
    result
        `[step, layer, head]`, of `attention_drift`.

    Returns
    -------
    matplotlib Axes
    """
    steps, layers, heads = result.shape
    names = np.array([f"{layer}.{head}" for layer in result.coords["layer"] for head in range(heads)])
    ax = axes(ax, (max(5.0, 0.34 * len(names) + 1.6), 0.34 * steps + 1.4))
    values = result.values.reshape(steps, layers * heads)
    heat_map(ax, values, ("step", result.coords["step"]), ("layer.head", names),
             label=with_units(result.name, result.attrs.get("units")), **{"numbers": False, **style})  # fmt: skip
    slant(ax)
    ax.set_title(result.name.replace("_", " "), fontsize=10)
    return ax


def plot_attention_drift(
    result: LabelledSet, *, names: tuple[str, ...] = ("stability", "first_token", "previous_token", "induction"), ax: Any = None
) -> Any:
    """Scores of `attention_drift` along the steps: the mean over heads as a line, the strongest head as a dotted one.

    Parameters
    ----------
    result
        Of `attention_drift`.
    names
        Which of its arrays.

    Returns
    -------
    matplotlib Axes
    """
    ax = axes(ax)
    for i, name in enumerate(names):
        a = result[name]
        flat = a.values.reshape(len(a), -1)
        known = ~np.isnan(flat).all(1)
        steps = a.coords["step"][known]
        ax.plot(steps, np.nanmean(flat[known], 1), color=colour(i), marker="o", label=name.replace("_", " "))
        if name != "stability":
            ax.plot(steps, np.nanmax(flat[known], 1), color=colour(i), linestyle=":", linewidth=1.2)
    ax.set(xlabel="step", ylabel="mean of heads (dotted: strongest head)", ylim=(0, 1.02))
    ax.xaxis.get_major_locator().set_params(integer=True)
    ax.legend(frameon=False, fontsize=8, ncols=2)
    ax.set_title("heads by step", fontsize=10)
    return ax


def plot_pattern(pattern: Any, *, tokens: list[str] | None = None, ax: Any = None, **style: Any) -> Any:
    """One attention pattern, from (rows) to (columns).

    Parameters
    ----------
    pattern : array [dest_pos, src_pos]
    tokens
        Labels of the positions.

    Returns
    -------
    matplotlib Axes
    """
    values = np.asarray(pattern, float)
    if values.ndim != 2:
        raise ValueError(f"pattern has shape {values.shape}, expected [dest_pos, src_pos]: pick one step, layer, batch and head")
    labels = np.array([repr(t)[1:-1] for t in tokens] if tokens is not None else [str(i) for i in range(len(values))])
    ax = axes(ax, (4.8, 4.2))
    upper = np.triu(np.ones(values.shape, bool), 1)
    heat_map(ax, np.where(upper, np.nan, values), ("dest_pos", labels), ("src_pos", labels), label="attention",
             **{"numbers": False, "vmin": 0.0, **style})  # fmt: skip
    slant(ax)
    return ax
