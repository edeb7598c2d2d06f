"""Do the readouts of two steps say the same?"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from ouro.labelled import LabelledSet
from ouro.measures.source import as_trace, by_slab, labelled, token_coords
from ouro.model import Batch, Model
from ouro.trace import Trace


def agreement_matrices(log_p: NDArray[np.float64]) -> dict[str, NDArray[np.float64]]:
    """Every step against every other.

    Parameters
    ----------
    log_p : array [step, ..., d_vocab]
        Log probabilities.

    Returns
    -------
    dict of array [step, other_step, ...]
        `top1`: 1 where the most likely token is the same; `kl`: `KL(p_step || p_other)`, nats.
    """
    top = log_p.argmax(-1)
    p = np.exp(log_p)
    self_term = (p * log_p).sum(-1)  # [step, ...]
    cross = np.einsum("s...v,t...v->st...", p, log_p)
    return {"top1": (top[:, None] == top[None]).astype(np.float64), "kl": np.maximum(self_term[:, None] - cross, 0.0)}


def agreement(source: Model | Trace, x: Batch | None = None, *, n_steps: int | None = None) -> LabelledSet:
    """Step against step: how often the top token is the same, and how far the readouts are apart.

    Arrays `[step, other_step, batch, pos]`: `top1` (1 where `argmax p_step = argmax p_other`) and `kl`
    (`KL(p_step || p_other)`, nats). The mean over batch and pos is the matrix that the plot shows. `top1[0, -1]` is the p1
    of speculation over steps (docs/speed.md).

    Parameters
    ----------
    source, x, n_steps
        As for `loop_drift`, with the same errors.

    Source
    ------
    The agreement of answers between steps: arXiv 2510.25741, section on faithfulness.

    Examples
    --------
    >>> import ouro
    >>> from ouro.measures import agreement
    >>> same = agreement(ouro.load("ouro-tiny"), "One day Ann took the cup.")["top1"].mean("batch", "pos")
    >>> same.dims, [float(same.sel(step=t, other_step=t)) for t in range(4)]
    (('step', 'other_step'), [1.0, 1.0, 1.0, 1.0])
    """
    trace = as_trace(source, x, n_steps=n_steps)
    found = by_slab(trace, lambda log_p, at: agreement_matrices(log_p))
    dims, coords = ("step", "other_step", "batch", "pos"), token_coords(trace)
    arrays = {
        "top1": labelled(found["top1"], dims, coords, formula="argmax p_s = argmax p_t", plotter="plot_step_matrix", name="top1"),
        "kl": labelled(found["kl"], dims, coords, units="nats", formula="KL(p_s || p_t)", plotter="plot_step_matrix", name="kl"),
    }
    return LabelledSet(arrays, title="agreement of readouts", plotter="plot_step_matrix")
