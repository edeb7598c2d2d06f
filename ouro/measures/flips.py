"""When does the answer change, and when is it settled?"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ouro.labelled import LabelledSet
from ouro.measures.source import as_trace, by_slab, labelled, next_tokens, real, token_coords
from ouro.model import Batch, Model
from ouro.trace import Trace


def count_flips(top: ArrayLike) -> NDArray[np.int64]:
    """How often the answer changes along the steps: `sum_t [a_t != a_{t-1}]`, of answers `[step, ...]`."""
    a = np.asarray(top)
    return np.asarray((a[1:] != a[:-1]).sum(0), np.int64)


def commitment_step(top: ArrayLike) -> NDArray[np.int64]:
    """The first step from which on the answer stays what it is at the last: `min{t : a_s = a_{T-1} for all s >= t}`."""
    a = np.asarray(top)
    settled = np.cumprod((a == a[-1])[::-1], axis=0)[::-1]  # 1 from the commitment on
    return np.asarray(len(a) - settled.sum(0), np.int64)


def answer_flips(source: Model | Trace, x: Batch | None = None, *, n_steps: int | None = None) -> LabelledSet:
    """How often the top token changes along the steps, when it is settled, and whether a change was for the better.

    | array | axes | meaning |
    |---|---|---|
    | top | step, batch, pos | id of the most likely next token, -1 beyond a sequence |
    | flips | batch, pos | `sum_t [top_t != top_{t-1}]` |
    | commitment | batch, pos | first step from which on the top token is the last step's |
    | right | step, batch, pos | 1 where it is the token that follows in the text, NaN where none follows |
    | gained, lost | step, batch, pos | 1 where this step turned wrong into right, right into wrong |

    Parameters
    ----------
    source, x, n_steps
        As for `loop_drift`, with the same errors.

    Source
    ------
    Answers that change between steps: arXiv 2510.25741, section on faithfulness; commitment as "prediction depth": Baldock
    et al., arXiv 2106.09647.

    Examples
    --------
    >>> import ouro
    >>> from ouro.measures import answer_flips
    >>> found = answer_flips(ouro.load("ouro-tiny"), "One day Ann took the cup.")
    >>> found["top"].shape, found["flips"].dims
    ((4, 1, 8), ('batch', 'pos'))
    """
    trace = as_trace(source, x, n_steps=n_steps)
    top = by_slab(trace, lambda log_p, at: {"top": log_p.argmax(-1)})["top"]
    here, target = real(trace), next_tokens(trace)
    flips, commitment = (np.where(here, f(top), np.nan) for f in (count_flips, commitment_step))
    right = np.where(target >= 0, (top == target).astype(float), np.nan)
    gained, lost = np.full_like(right, np.nan), np.full_like(right, np.nan)
    gained[1:] = np.where(target >= 0, (right[1:] == 1) & (right[:-1] == 0), np.nan)
    lost[1:] = np.where(target >= 0, (right[1:] == 0) & (right[:-1] == 1), np.nan)
    coords, each, token = token_coords(trace), ("step", "batch", "pos"), ("batch", "pos")
    arrays = {
        "top": labelled(np.where(here, top, -1).astype(np.int64), each, coords),
        "flips": labelled(flips, token, coords, formula="sum_t [a_t != a_{t-1}]"),
        "commitment": labelled(commitment, token, coords, units="step", formula="min{t : a_s = a_{T-1} for all s >= t}"),
        "right": labelled(right, each, coords, plotter="plot_by_step"),
        "gained": labelled(gained, each, coords, plotter="plot_by_step"),
        "lost": labelled(lost, each, coords, plotter="plot_by_step"),
    }
    return LabelledSet(arrays, title="answers that change along the steps", plotter="plot_flips")
