"""Loss by depth: of each step's readout, and of models run at other depths."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from ouro.labelled import LabelledSet
from ouro.measures.source import as_trace, by_slab, labelled, next_tokens, token_coords
from ouro.model import Batch, Model
from ouro.trace import Trace


def token_loss(log_p: NDArray[np.float64], targets: NDArray[np.int64]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """`-log p(target)` and whether the target is the top token.

    Parameters
    ----------
    log_p : array [step, rows, d_vocab]
    targets : int array [rows]
        -1 where there is none: NaN in both results.

    Returns
    -------
    loss, right : array [step, rows]
    """
    ids = np.maximum(targets, 0)
    loss = -np.take_along_axis(log_p, np.broadcast_to(ids, log_p.shape[:-1])[..., None], -1)[..., 0]
    none = targets < 0
    return np.where(none, np.nan, loss), np.where(none, np.nan, log_p.argmax(-1) == ids)


def losses(trace: Trace) -> dict[str, NDArray[np.float64]]:
    """Loss and accuracy `[step, batch, pos]` of every step's readout at predicting the next token of the text."""
    targets = next_tokens(trace)
    if not (targets >= 0).any():
        raise ValueError("no sequence has a second token: there is nothing to predict")
    flat = targets.reshape(-1)
    return by_slab(trace, lambda log_p, at: dict(zip(("loss", "accuracy"), token_loss(log_p, flat[at]), strict=True)))


def _set(trace: Trace, axis: str, title: str) -> LabelledSet:
    dims = (axis, "batch", "pos")
    coords = token_coords(trace) | ({"n_steps": np.arange(1, trace.n_steps + 1)} if axis == "n_steps" else {})
    found = losses(trace)
    return LabelledSet(
        {
            "loss": labelled(found["loss"], dims, coords, units="nats", formula="-log p_t(next token)", plotter="plot_by_step"),
            "accuracy": labelled(found["accuracy"], dims, coords, formula="argmax p_t = next token", plotter="plot_by_step"),
        },
        title=title,
        plotter="plot_depth",
    )


def loss_by_step(source: Model | Trace, x: Batch | None = None, *, n_steps: int | None = None) -> LabelledSet:
    """Next-token loss and accuracy of each step's readout.

    `loss [step, batch, pos]`: cross-entropy of the readout of step t with the token that follows in the text, nats;
    `accuracy`: 1 where that token is the top one. NaN where none follows. The mean over batch and pos is `step_loss`, the
    `CE_t` of the training objective.

    Parameters
    ----------
    source, x, n_steps
        As for `loop_drift`, with the same errors.

    Raises
    ------
    ValueError
        Where no sequence has a second token: there is nothing to predict.

    Source
    ------
    Cross-entropy of each step: arXiv 2510.25741, section 3.

    Examples
    --------
    >>> import ouro
    >>> from ouro.measures import loss_by_step
    >>> loss = loss_by_step(ouro.load("ouro-tiny"), ["One day Ann took the cup.", "Bob is the boss of Ann."])["loss"]
    >>> loss.mean("batch", "pos").shape
    (4,)
    """
    return _set(as_trace(source, x, n_steps=n_steps), "step", "loss by step")


def depth_sweep(model: Model | Trace, x: Batch | None = None, *, max_steps: int | None = None) -> LabelledSet:
    """Next-token loss and accuracy of the model run with `n_steps` = 1, 2, ... `max_steps` (8 or twice the trained number).

    `loss, accuracy [n_steps, batch, pos]`. One pass does it: the steps share their weights and no step looks ahead, so a run
    of `n_steps = k` ends in the very bits that step k - 1 of a longer run has.

    Parameters
    ----------
    model, x
        A model and texts or ids, or a trace, whose steps are then the depths.
    max_steps
        The greatest depth.

    Raises
    ------
    ValueError
        Where no sequence has a second token; else as `loop_drift`.

    Source
    ------
    Depth extrapolation: arXiv 2510.25741, tables of performance by recurrent step (1 to 8).

    Examples
    --------
    >>> import ouro
    >>> from ouro.measures import depth_sweep
    >>> depth_sweep(ouro.load("ouro-tiny"), "One day Ann took the cup.")["loss"].coords["n_steps"]
    array([1, 2, 3, 4, 5, 6, 7, 8])
    """
    steps = max_steps if max_steps is not None or isinstance(model, Trace) else max(8, 2 * model.config.n_steps)
    return _set(as_trace(model, x, n_steps=steps), "n_steps", "loss by number of steps run")
