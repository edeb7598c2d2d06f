"""How far the state moves from step to step."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ouro.labelled import LabelledSet
from ouro.measures.source import as_trace, by_slab, labelled, token_coords
from ouro.model import Batch, Model
from ouro.trace import Trace

FORMULAS = {
    "l2": "|h_t - h_{t-1}|",
    "relative_l2": "|h_t - h_{t-1}| / |h_{t-1}|",
    "cosine": "h_t . h_{t-1} / (|h_t| |h_{t-1}|)",
    "angle": "angle between h_t and h_{t-1}",
    "norm": "|h_t|",
    "acceleration": "|h_t - 2 h_{t-1} + h_{t-2}| / |h_t|",
    "kl": "KL(p_{t-1} || p_t)",
}
UNITS = {"angle": "rad", "kl": "nats"}


def angle(u: NDArray[Any], v: NDArray[Any]) -> NDArray[np.float64]:
    """Angle over the last axis, 0 to pi: `2 atan2(|u/|u| - v/|v||, |u/|u| + v/|v||)`, which stays exact near 0 and pi
    where arccos loses half the digits (Kahan)."""
    u, v = np.asarray(u, np.float64), np.asarray(v, np.float64)
    a, b = u / np.linalg.norm(u, axis=-1, keepdims=True), v / np.linalg.norm(v, axis=-1, keepdims=True)
    return np.asarray(2 * np.arctan2(np.linalg.norm(a - b, axis=-1), np.linalg.norm(a + b, axis=-1)), np.float64)


def state_changes(states: ArrayLike) -> dict[str, NDArray[np.float64]]:
    """The measures of `loop_drift` that need no readout.

    Parameters
    ----------
    states : array [step, ..., d_model]

    Returns
    -------
    dict of array [step, ...]
        l2, relative_l2, cosine, angle, norm, acceleration. NaN at step 0 (and 1 for the acceleration), and where states are.
    """
    h = np.asarray(states, np.float64)
    out = {name: np.full(h.shape[:-1], np.nan) for name in FORMULAS if name != "kl"}
    out["norm"][:] = np.linalg.norm(h, axis=-1)
    with np.errstate(invalid="ignore", divide="ignore"):
        for t in range(1, len(h)):
            out["l2"][t] = np.linalg.norm(h[t] - h[t - 1], axis=-1)
            out["relative_l2"][t] = out["l2"][t] / out["norm"][t - 1]
            out["cosine"][t] = (h[t] * h[t - 1]).sum(-1) / (out["norm"][t] * out["norm"][t - 1])
            out["angle"][t] = angle(h[t], h[t - 1])
            if t > 1:
                out["acceleration"][t] = np.linalg.norm(h[t] - 2 * h[t - 1] + h[t - 2], axis=-1) / out["norm"][t]
    return out


def divergence(log_p: NDArray[np.float64], log_q: NDArray[np.float64]) -> NDArray[np.float64]:
    """`KL(p || q) = sum p (log p - log q)` over the last axis, nats, of log probabilities."""
    return np.asarray((np.exp(log_p) * (log_p - log_q)).sum(-1), np.float64)


def loop_drift(source: Model | Trace, x: Batch | None = None, *, n_steps: int | None = None) -> LabelledSet:
    """How far the state moves from each step to the next: does the loop settle?

    Arrays `[step, batch, pos]`, h_t the normed state after step t, p_t its readout:

    | name | formula |
    |---|---|
    | l2, relative_l2 | `|h_t - h_{t-1}|`, divided by `|h_{t-1}|` |
    | cosine, angle | between h_t and h_{t-1}; the angle in radians |
    | norm | `|h_t|` |
    | acceleration | `|h_t - 2 h_{t-1} + h_{t-2}| / |h_t|` |
    | kl | `KL(p_{t-1} || p_t)`, nats |

    NaN where there is no step before, and beyond a sequence's length. These are also the signals of `ouro.exits`.

    Parameters
    ----------
    source, x
        A trace, or a model and texts or ids.
    n_steps
        Recurrent steps to run; more than trained shows whether the state comes to rest.

    Raises
    ------
    TypeError
        For a model without texts, a trace with texts, or something else.
    ValueError
        For texts without tokens, or a trace of another number of steps than `n_steps`.

    Source
    ------
    Latent trajectories of looped models: Geiping et al., arXiv 2502.05171; acceleration as exit rule: Pappone et
    al., arXiv 2509.23314. The model: arXiv 2510.25741.

    Examples
    --------
    >>> import ouro
    >>> from ouro.measures import loop_drift
    >>> drift = loop_drift(ouro.load("ouro-tiny"), ["One day Ann took", "Bob"])
    >>> drift["l2"].dims, drift["l2"].shape
    (('step', 'batch', 'pos'), (4, 2, 5))
    >>> by_step = drift["relative_l2"].mean("batch", "pos")
    >>> bool(by_step.sel(step=3).values < by_step.sel(step=1).values)
    True
    """
    trace = as_trace(source, x, n_steps=n_steps)
    found = state_changes(trace.states)
    if trace.n_steps > 1:
        kl = by_slab(trace, lambda log_p, at: {"kl": divergence(log_p[:-1], log_p[1:])})["kl"]
        found["kl"] = np.concatenate([np.full((1, *kl.shape[1:]), np.nan), kl])
    else:
        found["kl"] = np.full(trace.gate_logit.shape, np.nan)
    coords = token_coords(trace)
    arrays = {
        n: labelled(a, ("step", "batch", "pos"), coords, units=UNITS.get(n, ""), formula=FORMULAS[n], plotter="plot_by_step", name=n)
        for n, a in found.items()
    }
    return LabelledSet(arrays, title="drift of the state from step to step", plotter="plot_drift")
