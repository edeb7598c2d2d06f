"""A picture of any labelled result that has none of its own."""

from __future__ import annotations

from typing import Any

from ouro.labelled import LabelledArray, LabelledSet
from ouro.plots.canvas import axes, colour, heat_map, with_units, word

AVERAGED = ("batch", "pos", "dest_pos", "src_pos", "d_model", "d_head", "head")
"""Axes that are averaged away, in this order, until two are left."""


def plot_array(result: LabelledArray | LabelledSet, *, name: str | None = None, ax: Any = None, **style: Any) -> Any:
    """A line for one axis, a map of colours for two; further axes are averaged (NaN is not counted), tokens first.

    Parameters
    ----------
    result
        A set is drawn by its array `name`, the first one unless given.
    ax : matplotlib Axes, optional
    **style
        For the line or the map.

    Returns
    -------
    matplotlib Axes
    """
    a = result[name or next(iter(result))] if isinstance(result, LabelledSet) else result
    over = [d for d in AVERAGED if d in a.dims and a.sizes[d] == 1]
    over += [d for d in (*AVERAGED, *a.dims) if d in a.dims and d not in over]
    over = over[: max(len(a.dims) - 2, 0)]
    averaged = ", ".join(over)
    if over:
        a = a.mean(*over)
    label = with_units(a.name, a.attrs.get("units"))
    if not a.dims:
        raise ValueError(f"{a.name!r} is a single number, {float(a):g}: there is nothing to draw")
    if len(a.dims) == 1:
        ax = axes(ax)
        x = a.coords[a.dims[0]]
        ax.plot(x, a.values, **{"marker": "o", "color": colour(0), **style})
        ax.set_xlabel(word(a.dims[0]))
        ax.set_ylabel(label)
        if x.dtype.kind in "iu":
            ax.xaxis.get_major_locator().set_params(integer=True)
    else:
        ax = axes(ax, (7.0, 1.4 + 0.3 * min(a.shape[0], 16)))
        rows, columns = a.dims
        heat_map(ax, a.values, (rows, a.coords[rows]), (columns, a.coords[columns]), label=label, **style)
    ax.set_title(f"{a.name.replace('_', ' ')}{f' (mean over {averaged})' if averaged else ''}", fontsize=10)
    return ax
