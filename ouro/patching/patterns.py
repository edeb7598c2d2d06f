"""Sweeps of attention patterns, by whole runs: rows of a pattern differ in length, so forks that share passes can not hold them."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ouro.edits import Swap
from ouro.labelled import LabelledArray
from ouro.patching.metric import Metric, measure_of, metric_name
from ouro.patching.store import ValueStore
from ouro.patching.sweep import places_of, sweep_key

if TYPE_CHECKING:
    from ouro.cache import ActivationCache
    from ouro.model import Model, Tokens


def pattern_sweep(
    model: Model,
    corrupted: Tokens,
    clean_cache: ActivationCache,
    metric: Metric,
    *,
    axes: Sequence[str] = ("step", "layer", "head"),
    n_steps: int | None = None,
    steps: Sequence[int] | None = None,
    layers: Sequence[int] | None = None,
    positions: Sequence[int] | None = None,
    heads: Sequence[int] | None = None,
    at: int | Sequence[int] = -1,
    save_to: str | Path | None = None,
    progress: bool = True,
) -> LabelledArray:
    """Run the corrupted prompt with the clean run's attention pattern, for every place of `axes` in turn.

    Parameters
    ----------
    model, corrupted, metric, n_steps, steps, layers, positions, heads, at, save_to, progress
        As for `sweep`.
    clean_cache
        Of a run of the same length that holds `pattern`.
    axes
        ("step", "layer", "head") for whole patterns; with "pos" one attending position (a row of the pattern) at a time.

    Returns
    -------
    LabelledArray
        The metric, axes as in `axes`. `attrs["corrupted"]` is that of the unchanged run. Every value costs one forward.
    """
    tokens, measure = model._one(corrupted), measure_of(model, metric)
    n_steps = model.config.n_steps if n_steps is None else n_steps
    seen = places_of("position", len(tokens), [at] if isinstance(at, int) else at)
    if clean_cache.positions.shape != (1, len(tokens)):
        raise ValueError(f"the cache has (batch, pos) = {clean_cache.positions.shape}, expected (1, {len(tokens)})")
    sizes = {"step": n_steps, "layer": model.config.n_layers, "pos": len(tokens), "head": model.config.n_heads}
    chosen = {"step": steps, "layer": layers, "pos": positions, "head": heads}
    coords: dict[str, Any] = {axis: places_of(axis, sizes[axis], chosen[axis]) for axis in axes}

    def value(edits: list[Swap]) -> float:
        logits = model.trace(tokens, n_steps=n_steps, logits="last", edits=edits).logits
        assert logits is not None
        return float(measure(logits[-1][:, seen])[0])

    corrupted_value = value([])
    todo = list(itertools.product(*coords.values()))
    key = sweep_key(model, tokens, clean_cache.stack("pattern"), None, point="pattern", axes=list(axes), coords=coords, at=seen,
                    metric=metric_name(metric), corrupted=corrupted_value, n_steps=n_steps)  # fmt: skip
    store = ValueStore(save_to, key, len(todo))

    def variant(place: tuple[int, ...]) -> float:
        where = {axis: [i] for axis, i in zip(axes, place, strict=True)}
        return value([Swap("pattern", clean_cache, steps=where.get("step", range(n_steps)), layers=where.get("layer"),
                           heads=where.get("head"), pos=where.get("pos"))])  # fmt: skip

    store.fill(todo, variant, desc="patching pattern", unit="run", progress=progress)
    attrs = {"corrupted": corrupted_value, "metric": metric_name(metric), "point": "pattern", "variants": len(todo)}
    values = store.values.reshape([len(c) for c in coords.values()])
    return LabelledArray(values, tuple(axes), coords, name="patched", attrs=attrs, plotter="plot_patching")
