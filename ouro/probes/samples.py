"""What probes learn from: samples out of a cache, and labels that only memory can learn."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

Samples = tuple[NDArray[np.float32], NDArray[np.int64], NDArray[np.int64]]


def control_labels(y: ArrayLike, types: ArrayLike | None = None, *, seed: int | None = 0) -> NDArray[Any]:
    """Labels of the control task: every type (such as a token id) gets one random label, drawn as often as y has it.

    Without types every sample is a type of its own. Only memory can solve this task, so what a probe scores on it is what it
    scores without the representation's help.

    Source
    ------
    Hewitt and Liang, "Designing and interpreting probes with control tasks", arXiv 1909.03368, section 2.

    >>> from ouro.probes import control_labels
    >>> labels = control_labels([0, 1, 0, 1], ["a", "b", "a", "c"])
    >>> bool(labels[0] == labels[2])
    True
    """
    y = np.asarray(y)
    rng = np.random.default_rng(seed)
    if types is None:
        return np.asarray(rng.permutation(y))
    _, of = np.unique(np.asarray(types), return_inverse=True)
    return np.asarray(rng.choice(y, of.max() + 1)[of.reshape(-1)])


def probe_data(cache: Any, point: str = "resid_post", *, pos: int | None = None) -> Samples:
    """Samples for a probe out of a cache.

    Parameters
    ----------
    cache
        With `point`, captured at all positions or at some (`pos` of `run_with_cache`).
    pos
        Take the last captured position of each sequence (-1), another one, or all (None).

    Returns
    -------
    X : array [sample, step, layer, d]
    prompts : int array [sample]
        The sequence each sample is from: the `groups` of `fit`.
    tokens : int array [sample]
        Its token id: `types` of the control task.
    """
    a = cache.stack(point)  # [step, layer, batch, pos, d]
    prompts, places = np.nonzero(cache.positions >= 0)
    if pos is not None:
        counts = (cache.positions >= 0).sum(1)
        if not ((-counts <= pos) & (pos < counts)).all():
            raise IndexError(f"pos is {pos}, the shortest sequence has {counts.min()} captured positions")
        prompts, places = np.arange(len(counts)), np.where(pos < 0, counts + pos, pos)
    tokens = np.array([cache.token_ids[b][cache.positions[b, i]] for b, i in zip(prompts, places, strict=True)], np.int64)
    return np.moveaxis(a[:, :, prompts, places], 2, 0), prompts.astype(np.int64), tokens
