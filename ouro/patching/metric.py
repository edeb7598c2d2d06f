"""What a sweep measures: a number for each variant, from its logits."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from ouro.model import Model

Floats = NDArray[np.float32]
Metric = Callable[[Floats], Any] | tuple[str | int, str | int] | str | int
"""A function of logits [fork, pos, d_vocab] that returns a number for each fork; or a token, whose log probability at the last
of the positions counts; or a pair (answer, other), whose logits are subtracted there."""


def token_id(model: Model, token: str | int) -> int:
    """The id of one token; a text must be exactly one."""
    if isinstance(token, str):
        ids = model.to_tokens(token)
        if len(ids) != 1:
            raise ValueError(f"{token!r} is {len(ids)} tokens ({model.to_str_tokens(ids)}), expected one; a leading space may be missing")
        return ids[0]
    if not 0 <= token < model.config.d_vocab:
        raise ValueError(f"token {token} is outside of the vocabulary of {model.config.d_vocab}")
    return int(token)


def log_softmax(z: Floats) -> NDArray[np.float64]:
    """Log probabilities over the last axis, float64."""
    x = z.astype(np.float64) - z.max(-1, keepdims=True)
    return np.asarray(x - np.log(np.exp(x).sum(-1, keepdims=True)))


def measure_of(model: Model, metric: Metric) -> Callable[[Floats], NDArray[np.float64]]:
    """The metric as a function of logits [fork, pos, d_vocab] that is known to return [fork]."""
    if isinstance(metric, (str, int)):
        answer = token_id(model, metric)
        return lambda z: log_softmax(z[:, -1])[:, answer]
    if isinstance(metric, tuple):
        if len(metric) != 2:
            raise ValueError(f"metric is {metric!r}, expected a function, a token, or a pair of tokens (answer, other)")
        answer, other = (token_id(model, t) for t in metric)
        return lambda z: z[:, -1, answer].astype(np.float64) - z[:, -1, other]
    if not callable(metric):
        raise TypeError(f"metric is {metric!r}, expected a function, a token, or a pair of tokens")
    given = metric

    def checked(z: Floats) -> NDArray[np.float64]:
        values = np.asarray(given(z), np.float64)
        if values.ndim == 0 and len(z) == 1:
            values = values.reshape(1)
        if values.shape != (len(z),):
            raise ValueError(f"the metric returned shape {values.shape} for logits of {z.shape}, expected ({len(z)},)")
        return values

    return checked


def metric_name(metric: Metric) -> str:
    """For labels and for the identity of a saved sweep."""
    return getattr(metric, "__qualname__", None) or str(metric)
