"""Does the loop come to rest? Distances, and how much the step map shrinks a small change."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ouro.labelled import LabelledSet
from ouro.measures.drift import state_changes
from ouro.measures.source import as_trace, labelled, need_model, real, token_coords
from ouro.measures.step_map import StepMap
from ouro.model import Batch, Model

Floats = NDArray[Any]


def rest_distances(states: ArrayLike) -> dict[str, NDArray[np.float64]]:
    """How a path comes to rest.

    Parameters
    ----------
    states : array [step, ..., d_model]

    Returns
    -------
    dict of array [step, ...]
        `move = |h_t - h_{t-1}| / |h_t|`; `to_last = |h_t - h_{T-1}| / |h_{T-1}|`; `ratio = |h_t - h_{t-1}| / |h_{t-1} - h_{t-2}|`,
        below 1 where the path contracts. NaN where there is no step before.
    """
    h = np.asarray(states, np.float64)
    changes = state_changes(h)
    length, norm = changes["l2"], changes["norm"]
    with np.errstate(invalid="ignore", divide="ignore"):
        ratio = np.full(norm.shape, np.nan)
        ratio[2:] = length[2:] / length[1:-1]
        return {"move": length / norm, "to_last": np.linalg.norm(h - h[-1], axis=-1) / norm[-1], "ratio": ratio}


def power_iteration(
    apply: Callable[[Floats], Floats], start: ArrayLike, *, iterations: int = 20, seed: int = 0
) -> tuple[float, NDArray[np.float64]]:
    """Spectral radius of a linear map by power iteration.

    `v <- A v / |A v|`; the growth `|A v|` of each iteration tends to `|lambda_1|`. A complex pair makes it swing around that
    value, so the estimate is the geometric mean over the second half.

    Parameters
    ----------
    apply
        `v -> A v`, any shape.
    start : array
        A point of the shape of v; the first v is random and independent of its values.

    Returns
    -------
    radius : float
    growth : array [iteration]
    """
    if iterations < 2:
        raise ValueError(f"iterations is {iterations}, expected 2 or more")
    v = np.random.default_rng(seed).normal(size=np.shape(start))
    v /= np.linalg.norm(v)
    growth = np.zeros(iterations)
    for i in range(iterations):
        w = np.asarray(apply(v), np.float64)
        growth[i] = np.linalg.norm(w)
        if growth[i] == 0:
            return 0.0, growth
        v = w / growth[i]
    return float(np.exp(np.log(growth[iterations // 2 :]).mean())), growth


def jacobian_product(step: Callable[[Floats], Floats], at: ArrayLike, *, size: float = 1e-3) -> Callable[[Floats], Floats]:
    """`v -> J(at) v` of a map by central differences: `(F(h + e v) - F(h - e v)) / 2e`, with `e |v| = size |h|`.

    Parameters
    ----------
    step
        F.
    at : array
        h.
    size
        Length of the step relative to h: small enough for the curvature, large enough for float32.
    """
    h = np.asarray(at, np.float64)
    scale = size * np.linalg.norm(h)

    def product(v: Floats) -> Floats:
        norm = np.linalg.norm(v)
        if norm == 0:
            return np.zeros_like(h)
        e = scale / norm
        return (np.asarray(step(h + e * v), np.float64) - np.asarray(step(h - e * v), np.float64)) / (2 * e)

    return product


def fixed_point(
    model: Model,
    x: Batch,
    *,
    n_steps: int | None = None,
    iterations: int = 20,
    size: float = 1e-3,
    seed: int = 0,
) -> LabelledSet:
    """Does the state come to rest when the loop runs on, and does the step map shrink small changes there?

    | array | axes | formula |
    |---|---|---|
    | move | step, batch, pos | `|h_t - h_{t-1}| / |h_t|` |
    | to_last | step, batch, pos | `|h_t - h_{T-1}| / |h_{T-1}|`, the distance to where the run ends |
    | ratio | step, batch, pos | `|h_t - h_{t-1}| / |h_{t-1} - h_{t-2}|`: below 1 the path contracts |
    | contraction | batch | spectral radius of the Jacobian of the step map at the last state, by power iteration |
    | growth | iteration, batch | `|J v|` of each iteration, v of length 1: has it settled? |

    The step map takes the states of a whole sequence to those one step on. Its Jacobian is applied by central differences, so
    use `compute="float32"`: in bfloat16 rounding hides small changes. A radius below 1 means that the loop returns to its
    fixed point from nearby; the estimate is of the state where the run ended, which need not be a fixed point (`move` says).

    Parameters
    ----------
    model, x
        A model and texts or ids.
    n_steps
        Steps to run; four times the trained number unless given.
    iterations, size, seed
        Of the power iteration: see `power_iteration`, `jacobian_product`. Each costs two runs of one step for each sequence.

    Raises
    ------
    TypeError
        For something else than a model: a trace can not be run on.
    ValueError
        For fewer than two iterations, or texts without tokens.

    Source
    ------
    Fixed points of looped models: Bai et al., "Deep equilibrium models", arXiv 1909.01377; of a recurrent-depth transformer:
    Geiping et al., arXiv 2502.05171. The power method is standard (Golub and Van Loan, section 7.3).

    Examples
    --------
    >>> import ouro
    >>> from ouro.measures import fixed_point
    >>> found = fixed_point(ouro.load("ouro-tiny", compute="float32"), "One day Ann took", n_steps=8, iterations=4)
    >>> found["to_last"].shape, found["growth"].dims
    ((8, 1, 5), ('iteration', 'batch'))
    """
    trace = as_trace(need_model(model), x, n_steps=n_steps or 4 * model.config.n_steps)
    here = real(trace)
    radius, growth = np.zeros(len(trace.token_ids)), np.zeros((iterations, len(trace.token_ids)))
    for row, ids in enumerate(trace.token_ids):
        step, last = StepMap(model, ids), trace.states[-1, row, here[row]]
        radius[row], growth[:, row] = power_iteration(jacobian_product(step, last, size=size), last, iterations=iterations, seed=seed)
    coords, each = token_coords(trace), ("step", "batch", "pos")
    formulas = {"move": "|h_t - h_{t-1}| / |h_t|", "to_last": "|h_t - h_{T-1}| / |h_{T-1}|",
                "ratio": "|h_t - h_{t-1}| / |h_{t-1} - h_{t-2}|"}  # fmt: skip
    found = rest_distances(trace.states)
    arrays = {n: labelled(a, each, coords, formula=formulas[n], plotter="plot_by_step") for n, a in found.items()}
    arrays["contraction"] = labelled(radius, ("batch",), formula="spectral radius of dF/dh")
    arrays["growth"] = labelled(growth, ("iteration", "batch"), formula="|J v|")
    return LabelledSet(arrays, title="does the loop come to rest?", plotter="plot_fixed_point")


def perturbation_decay(
    model: Model, x: Batch, *, step: int = 0, size: float = 0.01, pos: int | None = None, n_steps: int | None = None, seed: int = 0
) -> LabelledSet:
    """What becomes of a small random change of the state after one step.

    `h'_step = h_step + delta`, delta random with `|delta| = size |h_step|` at each changed position; then both run on.

    | array | axes | formula |
    |---|---|---|
    | distance | step, batch, pos | `|h'_t - h_t| / |h_t|`; NaN before the change |
    | gain | step, batch | `|H'_t - H_t| / |delta|` over all positions: 1 at the change, below 1 where it dies out |

    Parameters
    ----------
    model, x
        A model and texts or ids.
    step
        After which the state is changed.
    size
        Relative length of the change.
    pos
        Change this position only (negative from the end of each sequence); all unless given. Later positions then show how far
        it spreads.
    n_steps
        Steps to run.
    seed
        Of the change.

    Raises
    ------
    TypeError
        For something else than a model.
    ValueError
        For a step that is not run.
    IndexError
        For a position that a sequence does not have.

    Source
    ------
    Sensitivity of iterated maps to small changes (finite-time Lyapunov exponent: `log gain / steps`), e.g. Strogatz,
    "Nonlinear dynamics and chaos", section 10.5.

    Examples
    --------
    >>> import ouro
    >>> from ouro.measures import perturbation_decay
    >>> found = perturbation_decay(ouro.load("ouro-tiny", compute="float32"), "One day Ann took", pos=-1)
    >>> found["gain"].sel(batch=0).values.shape, bool((found["distance"].sel(step=3).isel(pos=0).values == 0).all())
    ((4,), True)
    """
    trace = as_trace(need_model(model), x, n_steps=n_steps)
    if not 0 <= step < trace.n_steps:
        raise ValueError(f"step is {step}, expected 0 to {trace.n_steps - 1}")
    rng = np.random.default_rng(seed)
    distance = np.full(trace.gate_logit.shape, np.nan)
    gain = np.full(trace.gate_logit.shape[:2], np.nan)
    for row, ids in enumerate(trace.token_ids):
        n = len(ids)
        path = trace.states[:, row, :n].astype(np.float64)
        delta = rng.normal(size=path[step].shape)
        delta *= size * np.linalg.norm(path[step], axis=-1, keepdims=True) / np.linalg.norm(delta, axis=-1, keepdims=True)
        if pos is not None:
            if not -n <= pos < n:
                raise IndexError(f"pos is {pos}, sequence {row} has {n} tokens")
            delta[np.arange(n) != pos % n] = 0
        moved = [path[step] + delta, *StepMap(model, ids).iterate(path[step] + delta, trace.n_steps - 1 - step)]
        apart = np.stack(moved) - path[step:]
        distance[step:, row, :n] = np.linalg.norm(apart, axis=-1) / np.linalg.norm(path[step:], axis=-1)
        gain[step:, row] = np.linalg.norm(apart.reshape(len(apart), -1), axis=-1) / np.linalg.norm(delta)
    coords = token_coords(trace)
    return LabelledSet(
        {
            "distance": labelled(distance, ("step", "batch", "pos"), coords, formula="|h'_t - h_t| / |h_t|", plotter="plot_by_step"),
            "gain": labelled(gain, ("step", "batch"), formula="|H'_t - H_t| / |delta|"),
        },
        title=f"a change of the state after step {step}",
        plotter="plot_perturbation",
    )
