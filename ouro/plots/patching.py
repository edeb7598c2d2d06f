"""What a replacement did, place by place."""

from __future__ import annotations

from typing import Any

import numpy as np

from ouro.labelled import LabelledArray, LabelledSet
from ouro.plots.canvas import DIVERGING, axes, heat_map, slant, with_units


def plot_patching(result: LabelledArray | LabelledSet, *, name: str | None = None, ax: Any = None, **style: Any) -> Any:
    """A patching sweep: rows step.layer (or what there is of them), columns positions with their tokens, or heads.

    Colours diverge from the value of the corrupted run (`attrs["corrupted"]`, else from 0): white is no effect. The largest
    distance from it sets both ends.

    Parameters
    ----------
    result
        Of `ouro.patching.sweep` and what builds on it: `[step, layer, pos | head]` or fewer axes. A leading `point` must be
        picked by `.sel`. Of a set the array `name`, the first one unless given.

    Returns
    -------
    matplotlib Axes
    """
    a = result[name or next(iter(result))] if isinstance(result, LabelledSet) else result
    if "point" in a.dims:
        raise ValueError(f"several points in one array: pick one by .sel(point=...), of {', '.join(map(str, a.coords['point']))}")
    down: list[str] = [d for d in ("step", "layer") if d in a.dims]
    across: list[str] = [d for d in a.dims if d not in down]
    if not across:  # a map of step by layer
        down, across = down[:1], down[1:]
    if len(across) > 1 or len(down) + len(across) != len(a.dims) or not across:
        raise ValueError(f"axes are {a.dims}, expected step and layer and at most one of pos and head")
    order = [a.dims.index(d) for d in (*down, *across)]
    values = np.transpose(a.values.astype(float), order).reshape(-1, a.sizes[across[0]])
    rows = np.array([""])
    for d in down:
        rows = np.array([f"{r}.{x}" if r else str(x) for r in rows for x in a.coords[d]])
    columns = a.coords["token"] if across == ["pos"] and "token" in a.coords else a.coords[across[0]]
    columns = np.array([repr(str(c))[1:-1] for c in columns])
    middle = float(a.attrs.get("corrupted", 0.0))
    most = float(np.nanmax(np.abs(values - middle))) or 1.0
    ax = axes(ax, (max(5.0, 0.5 * len(columns) + 1.6), 0.28 * len(rows) + 1.4))
    style = {"cmap": DIVERGING, "vmin": middle - most, "vmax": middle + most, "numbers": values.size <= 48, **style}
    label = a.attrs.get("units")
    heat_map(ax, values, (".".join(down) or "value", rows), (across[0], columns), label=with_units(a.name, label), **style)
    if across == ["pos"]:
        slant(ax)
    what = a.attrs.get("point")
    ax.set_title(f"{a.name}{f', {what}' if what else ''}" + (" (white: as corrupted)" if "corrupted" in a.attrs else ""), fontsize=10)
    return ax
