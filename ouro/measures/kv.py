"""Are the keys and values of different steps the same? What sharing them would lose."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ouro.labelled import LabelledSet
from ouro.measures.source import captured, labelled
from ouro.model import Batch, Model

POLICIES = ("last_step", "average", "first_step")


def step_cosines(a: ArrayLike) -> NDArray[np.float64]:
    """Mean cosine of the vectors of every two steps `[step, step]`, of `[step, sample, d]`."""
    v = np.asarray(a, np.float64)
    unit = v / np.linalg.norm(v, axis=-1, keepdims=True)
    return np.asarray(np.einsum("snd,tnd->st", unit, unit) / v.shape[1])


def sharing_residuals(a: ArrayLike) -> NDArray[np.float64]:
    """`|x_t - s|^2 / |x_t|^2` where s stands in for every step's x_t: last, mean and first step. `[policy, step]`, of `[step, ...]`."""
    v = np.asarray(a, np.float64).reshape(len(np.asarray(a)), -1)
    shared = np.stack([v[-1], v.mean(0), v[0]])
    return np.asarray(((v[None] - shared[:, None]) ** 2).sum(-1) / (v**2).sum(-1))


def rank_energy(a: ArrayLike) -> NDArray[np.float64]:
    """Part of the energy that r directions over the steps keep, r = 1 .. T: `sum_{i<r} s_i^2 / sum s_i^2`, of `[step, ...]`.

    s_i are the singular values of the matrix with a row for each step. 1 at r = 1: all steps are multiples of one another.
    """
    v = np.asarray(a, np.float64).reshape(len(np.asarray(a)), -1)
    energy = np.clip(np.linalg.eigvalsh(v @ v.T)[::-1], 0, None)
    return np.asarray(np.cumsum(energy) / energy.sum())


def kv_similarity(source: Model | Any, x: Batch | Any = None, *, n_steps: int | None = None) -> LabelledSet:
    """How alike the keys and values of the steps are, and what a cache that shares them would lose.

    For `key` and `value` (rotated keys; the rotation is the same at every step):

    | array | axes | formula |
    |---|---|---|
    | key_cosine | layer, step, other_step | mean over tokens and heads of `cos(k_s, k_t)` |
    | key_residual | layer, policy, step | `|k_t - s|^2 / |k_t|^2`, s what the policy keeps (last_step, average, first_step) |
    | key_energy | layer, rank | part of the energy in the best `rank` directions over the steps (singular values squared) |

    Parameters
    ----------
    source, x
        A model and texts or ids, or a cache with `rot_k` and `v`.
    n_steps
        Recurrent steps to run.

    Raises
    ------
    TypeError, KeyError
        As `angular_distance`, of `rot_k` or `v`.

    Source
    ------
    Sharing of keys and values between steps: arXiv 2510.25741, section 5.4.2.

    Examples
    --------
    >>> import ouro
    >>> from ouro.measures import kv_similarity
    >>> found = kv_similarity(ouro.load("ouro-tiny"), "One day Ann took")
    >>> found["key_cosine"].shape, found["value_residual"].sel(policy="last_step", step=3).values
    ((4, 4, 4), array([0., 0., 0., 0.]))
    """
    cache = captured(source, x, ["rot_k", "v"], n_steps=n_steps)
    arrays = {}
    for name, point in (("key", "rot_k"), ("value", "v")):
        a = cache.stack(point)  # [step, layer, batch, pos, kv_head, d_head]
        tokens = a[:, :, ~np.isnan(a[0, 0, ..., 0, 0])]  # [step, layer, token, kv_head, d_head]
        layers = [tokens[:, layer] for layer in range(a.shape[1])]
        steps = cache.steps(point)
        coords = {"layer": cache.layers(point), "step": steps, "other_step": steps, "policy": list(POLICIES),
                  "rank": np.arange(1, len(steps) + 1)}  # fmt: skip
        coords = {n: np.asarray(c) for n, c in coords.items()}
        cosine = np.stack([step_cosines(v.reshape(len(v), -1, v.shape[-1])) for v in layers])
        arrays[f"{name}_cosine"] = labelled(cosine, ("layer", "step", "other_step"), coords, formula="cos(k_s, k_t)")
        residual = np.stack([sharing_residuals(v) for v in layers])
        arrays[f"{name}_residual"] = labelled(residual, ("layer", "policy", "step"), coords, formula="|k_t - s|^2 / |k_t|^2")
        energy = np.stack([rank_energy(v) for v in layers])
        arrays[f"{name}_energy"] = labelled(energy, ("layer", "rank"), coords, formula="sum_{i<r} s_i^2 / sum s_i^2")
    return LabelledSet(arrays, title="keys and values across steps", plotter="plot_kv_similarity")
