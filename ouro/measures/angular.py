"""How far each layer turns the residual stream."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ouro.labelled import LabelledSet
from ouro.measures.drift import angle
from ouro.measures.source import captured, labelled, seen_coords
from ouro.model import Batch, Model


def angular_distances(stream: ArrayLike, n: int = 1) -> NDArray[np.float64]:
    """`arccos(cos(x_l, x_{l+n})) / pi` between the stream before layer l and n layers on.

    Parameters
    ----------
    stream : array [step, layer + 1, ..., d_model]
        What each layer reads, and behind the last one what it leaves.
    n
        Layers between the two.

    Returns
    -------
    array [step, layer - n + 1, ...]
        0 (same direction) to 1 (opposite).
    """
    r = np.asarray(stream)
    if not 1 <= n < r.shape[1]:
        raise ValueError(f"n is {n}, expected 1 to {r.shape[1] - 1} layers")
    return np.stack([np.stack([angle(step[i], step[i + n]) for i in range(len(step) - n)]) for step in r]) / np.pi


def knee(curve: ArrayLike) -> int:
    """Where a curve bends most: the index farthest from the straight line between its ends; -1 when nothing bends.

    Both axes are scaled to 0..1 first (Satopaa et al. 2011, "Finding a kneedle in a haystack", without smoothing).

    >>> from ouro.measures import knee
    >>> knee([5, 3, 1, 0.9, 0.8, 0.7])
    2
    """
    y = np.asarray(curve, np.float64)
    if y.size < 3 or not np.isfinite(y).all() or np.ptp(y) == 0:
        return -1
    x = np.linspace(0, 1, y.size)
    off = np.abs((y - y.min()) / np.ptp(y) - (y[0] - y.min() + x * (y[-1] - y[0])) / np.ptp(y))
    return int(off.argmax()) if off.max() > 1e-9 else -1


def angular_distance(source: Model | Any, x: Batch | Any = None, *, n: int = 1, n_steps: int | None = None) -> LabelledSet:
    """How far n layers turn the residual stream, by step and layer: which layers do little, at which step?

    | array | axes | formula |
    |---|---|---|
    | distance | step, layer, batch, pos | `arccos(cos(x_l, x_{l+n})) / pi`, x_l the stream before layer l; 0 to 1 |
    | knee | step | the layer where the mean curve bends most (farthest from the line between its ends); -1: nowhere |

    Parameters
    ----------
    source, x
        A model and texts or ids, or a cache with `resid_pre` and `resid_post`.
    n
        Layers between the two; the paper removes the n layers of the smallest distance.
    n_steps
        Recurrent steps to run.

    Raises
    ------
    TypeError
        For a model without texts, a cache with texts, or something else.
    KeyError
        For a cache that lacks `resid_pre` or `resid_post`, naming what it has.
    ValueError
        For an n that is not 1 to the number of layers.

    Source
    ------
    Gromov et al., "The unreasonable ineffectiveness of the deeper layers", arXiv 2403.17887, equation 3 (they take the last
    token: `.isel(pos=-1)`).

    Examples
    --------
    >>> import ouro
    >>> from ouro.measures import angular_distance
    >>> found = angular_distance(ouro.load("ouro-tiny"), "One day Ann took")
    >>> found["distance"].shape, found["knee"].dims
    ((4, 4, 1, 5), ('step',))
    """
    cache = captured(source, x, ["resid_pre", "resid_post"], n_steps=n_steps)
    stream = np.concatenate([cache.stack("resid_pre"), cache.stack("resid_post")[:, -1:]], axis=1)
    distance = labelled(
        angular_distances(stream, n), ("step", "layer", "batch", "pos"), seen_coords(cache, "resid_pre", layers=False),
        formula="arccos(cos(x_l, x_{l+n})) / pi", plotter="plot_layers_by_step", name="distance",
    )  # fmt: skip
    knees = np.array([knee(row) for row in distance.mean("batch", "pos").values])
    return LabelledSet(
        {"distance": distance, "knee": labelled(knees, ("step",), units="layer")},
        title=f"turn of the residual stream by {n} layer{'s' if n > 1 else ''}",
        plotter="plot_layers_by_step",
    )
