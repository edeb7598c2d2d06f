"""What every measure starts from: a `Trace`, or a model and texts; readouts a slab of positions at a time."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ouro.cache import ActivationCache
from ouro.labelled import LabelledArray
from ouro.model import Batch, Model
from ouro.trace import Trace

Array = NDArray[Any]
SLAB = 2**22
"""Log probabilities held at a time (32 MiB as float64)."""


def as_trace(source: Model | Trace, x: Batch | None = None, *, n_steps: int | None = None) -> Trace:
    """The trace to measure: `source` itself, or `source.trace(x)` without keeping logits.

    Raises
    ------
    TypeError
        When a model comes without texts, or a trace with some.
    ValueError
        When a trace has another number of steps than asked for.
    """
    if isinstance(source, Trace):
        if x is not None:
            raise TypeError("a Trace was given and texts too: expected (trace) or (model, texts)")
        if n_steps not in (None, source.n_steps):
            raise ValueError(f"the trace has {source.n_steps} steps, n_steps is {n_steps}")
        return source
    if not isinstance(source, Model):
        raise TypeError(f"expected a Model or a Trace, got {type(source).__name__}")
    if x is None:
        raise TypeError("a Model was given without texts: expected (model, texts) or (trace)")
    return source.trace(x, n_steps=n_steps, logits="none")


def need_model(model: Any) -> Model:
    """The model, for measures that run the loop again from other states."""
    if not isinstance(model, Model):
        raise TypeError(f"expected a Model, got {type(model).__name__}: the loop is run again from other states")
    return model


def real(trace: Trace) -> NDArray[np.bool_]:
    """Which `[batch, pos]` hold a token."""
    return np.asarray(~np.isnan(trace.gate_logit[0]))


def next_tokens(trace: Trace) -> NDArray[np.int64]:
    """The token that follows each position `[batch, pos]`; -1 at the last one of a sequence and beyond."""
    out = np.full(trace.gate_logit.shape[1:], -1, np.int64)
    for row, ids in enumerate(trace.token_ids):
        out[row, : len(ids) - 1] = ids[1:]
    return out


def token_strings(trace: Trace) -> Array:
    """Each token as text `[batch, pos]`; empty beyond a sequence, the id where there is no tokenizer."""
    out = np.full(trace.gate_logit.shape[1:], "", object)
    for row, ids in enumerate(trace.token_ids):
        out[row, : len(ids)] = trace._model.token_names(ids)
    return out.astype(str)


def token_coords(trace: Trace) -> dict[str, Any]:
    """The coordinate `token` over (batch, pos)."""
    return {"token": (("batch", "pos"), token_strings(trace))}


def log_softmax(logits: Array) -> NDArray[np.float64]:
    """`z - log sum exp z` over the last axis, in float64."""
    z = np.asarray(logits, np.float64)
    z = z - z.max(-1, keepdims=True)
    return np.asarray(z - np.log(np.exp(z).sum(-1, keepdims=True)), np.float64)


def by_slab(trace: Trace, take: Callable[[NDArray[np.float64], NDArray[np.intp]], Mapping[str, Array]]) -> dict[str, Array]:
    """Read out every real position at all steps, a slab at a time, and collect what `take` makes of it.

    Parameters
    ----------
    take
        `take(log_p [step, rows, d_vocab], at)` gives arrays `[..., rows]`; `at` are the rows' places in the flattened
        `[batch * pos]`.

    Returns
    -------
    dict of array [..., batch, pos]
        float64, NaN where there is no token.
    """
    steps, batch, pos, d = trace.states.shape
    flat = trace.states.reshape(steps, batch * pos, d)
    places = np.flatnonzero(real(trace).reshape(-1))
    slab = max(1, SLAB // (steps * trace._model.config.d_vocab))
    out: dict[str, Array] = {}
    for begin in range(0, len(places), slab):
        at = places[begin : begin + slab]
        logits = trace._model._core.readout(np.ascontiguousarray(flat[:, at].reshape(-1, d)), True)[0]
        for name, got in take(log_softmax(logits).reshape(steps, len(at), -1), at).items():
            if name not in out:
                out[name] = np.full((*got.shape[:-1], batch * pos), np.nan)
            out[name][..., at] = got
    return {name: a.reshape(*a.shape[:-1], batch, pos) for name, a in out.items()}


def labelled(values: Array, dims: tuple[str, ...], coords: Mapping[str, Any] | None = None, *, units: str = "", formula: str = "",
             plotter: str = "plot_array", name: str = "value") -> LabelledArray:  # fmt: skip
    """A `LabelledArray` with its units and formula; coordinates over axes that it does not have are left out."""
    coords = {n: c for n, c in (coords or {}).items() if set(c[0] if isinstance(c, tuple) else (n,)) <= set(dims)}
    attrs = {k: v for k, v in (("units", units), ("formula", formula)) if v}
    return LabelledArray(values, dims, coords, name=name, attrs=attrs, plotter=plotter)


def captured(source: Any, x: Any, names: Sequence[str], *, n_steps: int | None = None) -> Any:
    """A cache that holds `names`: the one that was given (as `source` or as `x`), or `model.run_with_cache(x, names)`.

    Raises
    ------
    TypeError
        When a model comes without texts, or a cache with some.
    KeyError
        When the cache lacks one of the names.
    """
    cache = source if isinstance(source, ActivationCache) else x if isinstance(x, ActivationCache) else None
    if cache is None:
        if not isinstance(source, Model):
            raise TypeError(f"expected a Model or an ActivationCache, got {type(source).__name__}")
        if x is None:
            raise TypeError("a Model was given without texts: expected (model, texts) or a cache")
        return source.run_with_cache(x, list(names), n_steps=n_steps, logits="none")[1]
    if cache is source and x is not None:
        raise TypeError("a cache was given and texts too: expected (cache) or (model, texts)")
    if n_steps not in (None, cache.n_steps):
        raise ValueError(f"the cache has {cache.n_steps} steps, n_steps is {n_steps}")
    for name in names:
        cache.dims(name) if name in cache.points else cache[name]  # the cache's own error names what there is
    return cache


def seen_coords(cache: Any, point: str, *, layers: bool = True) -> dict[str, Any]:
    """Steps, layers and tokens of a captured point as coordinates."""
    coords: dict[str, Any] = {"step": np.asarray(cache.steps(point))}
    if layers:
        coords["layer"] = np.asarray(cache.layers(point))
    if cache.tokens is not None:
        words = [[row[i] if i >= 0 else "" for i in places] for row, places in zip(cache.tokens, cache.positions, strict=True)]
        coords["token"] = (("batch", "pos"), np.array(words))
    return coords
