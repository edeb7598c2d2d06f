"""The rank of a token along the steps."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ouro.labelled import LabelledSet
from ouro.measures.source import as_trace, by_slab, labelled, next_tokens, token_coords
from ouro.model import Batch, Model
from ouro.tokenizer import check_ids
from ouro.trace import Trace


def rank_of(log_p: ArrayLike, token: ArrayLike) -> NDArray[np.int64]:
    """How many tokens are more likely than `token`; 0 is the top.

    Parameters
    ----------
    log_p : array [..., d_vocab]
        Logits or log probabilities.
    token : int array, broadcastable to [...]

    Returns
    -------
    int array [...]
        Equal values are ordered by id, as in greedy decoding.
    """
    z = np.asarray(log_p)
    token = np.broadcast_to(np.asarray(token), z.shape[:-1])[..., None]
    own = np.take_along_axis(z, token, -1)
    return np.asarray(((z > own) | ((z == own) & (np.arange(z.shape[-1]) < token))).sum(-1), np.int64)


def single_token(model: Model, token: int | str) -> int:
    """A token's id, checked; a text must be exactly one token."""
    if isinstance(token, str):
        ids = model.to_tokens(token)
        if len(ids) != 1:
            parts = model.to_str_tokens(ids)
            raise ValueError(f"{token!r} is {len(ids)} tokens {parts}, expected one: choose one of them by id or by its text")
        return ids[0]
    check_ids([token], model.config.d_vocab)
    return int(token)


def rank_trajectory(
    source: Model | Trace, x: Batch | None = None, *, token: int | str | None = None, n_steps: int | None = None
) -> LabelledSet:
    """Rank and log probability of a token in each step's readout.

    Arrays `[step, batch, pos]`: `rank` (0 is the most likely; `#{v : z_v > z_token}`, equal logits by id) and `logprob`
    (nats). NaN where there is no token to follow. For ranks inside the steps see `logit_lens(..., token=)`.

    Parameters
    ----------
    source, x, n_steps
        As for `loop_drift`.
    token
        An id, or a text that is one token; the token that follows in the text unless given.

    Raises
    ------
    TypeError
        As `loop_drift`.
    ValueError
        For a text that is several tokens or an id that does not exist; else as `loop_drift`.

    Source
    ------
    nostalgebraist, "interpreting GPT: the logit lens" (2020), ranks by depth.

    Examples
    --------
    >>> import ouro
    >>> from ouro.measures import rank_trajectory
    >>> found = rank_trajectory(ouro.load("ouro-tiny"), "One day Ann took", token=" the")
    >>> found["rank"].isel(batch=0, pos=-1).values
    array([3., 1., 1., 1.])
    """
    trace = as_trace(source, x, n_steps=n_steps)
    shape = trace.gate_logit.shape[1:]
    wanted = next_tokens(trace) if token is None else np.full(shape, single_token(trace._model, token), np.int64)
    flat = wanted.reshape(-1)

    def take(log_p: NDArray[np.float64], at: NDArray[np.intp]) -> dict[str, NDArray[np.float64]]:
        ids = np.maximum(flat[at], 0)
        logprob = np.take_along_axis(log_p, np.broadcast_to(ids, log_p.shape[:-1])[..., None], -1)[..., 0]
        rank = rank_of(log_p, ids).astype(np.float64)
        return {"rank": np.where(flat[at] >= 0, rank, np.nan), "logprob": np.where(flat[at] >= 0, logprob, np.nan)}

    found = by_slab(trace, take)
    coords = token_coords(trace)
    dims = ("step", "batch", "pos")
    return LabelledSet(
        {
            "rank": labelled(found["rank"], dims, coords, formula="#{v : z_v > z_token}", plotter="plot_rank"),
            "logprob": labelled(found["logprob"], dims, coords, units="nats", plotter="plot_by_step"),
        },
        title="rank of a token along the steps",
        plotter="plot_rank",
    )
