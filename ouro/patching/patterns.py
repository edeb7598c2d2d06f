"""Sweeps of attention patterns, by whole runs: rows of a pattern differ in length, so forks that share passes can not hold them."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ouro.cache import ActivationCache
from ouro.edits import Swap
from ouro.labelled import LabelledArray
from ouro.patching.metric import Metric, measure_of, metric_name
from ouro.patching.store import ValueStore
from ouro.patching.sweep import places_of, sweep_key

if TYPE_CHECKING:
    from ouro.model import Model, Tokens

AXES = ("step", "layer", "head", "dest_pos", "src_pos")


def _checked(axes: Sequence[str]) -> tuple[str, ...]:
    """The axes; "pos" is the attending position, as it is for other points."""
    named = tuple(axes)
    plain = ["dest_pos" if axis == "pos" else axis for axis in named]
    if isinstance(axes, str) or not set(plain) <= set(AXES) or len(set(plain)) != len(plain):
        raise ValueError(f"axes are {axes!r}, expected some of {AXES}, each once")
    if "src_pos" in plain and not {"step", "layer", "dest_pos"} <= set(plain):
        raise ValueError(f"axes are {named}: one cell of a pattern (src_pos) needs step, layer and dest_pos too, because a row "
                         "with one other cell is known only before anything has changed")  # fmt: skip
    return named


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
    sources: Sequence[int] | None = None,
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
    sources
        Only these attended positions, of an axis "src_pos".
    clean_cache
        Of a run of the same length that holds `pattern`.
    axes
        ("step", "layer", "head") for whole patterns; with "dest_pos" (or "pos") one attending position, a row of the pattern, at a
        time; with "src_pos" too one cell of a row, the rest of it as in the corrupted run (its sum is then not 1, as in
        TransformerLens). Where both runs have the same cell, as ahead of the position, nothing changes and nothing is run.

    Returns
    -------
    LabelledArray
        The metric, axes as in `axes`. `attrs["corrupted"]` is that of the unchanged run. Every value costs one forward.
    """
    named, tokens, measure = _checked(axes), model._one(corrupted), measure_of(model, metric)
    if not isinstance(clean_cache, ActivationCache):
        raise TypeError(f"clean_cache is a {type(clean_cache).__name__}, expected the ActivationCache of a run")
    n_steps = model.config.n_steps if n_steps is None else n_steps
    seen = places_of("position", len(tokens), [at] if isinstance(at, int) else at)
    if clean_cache.positions.shape != (1, len(tokens)):
        raise ValueError(f"the cache has (batch, pos) = {clean_cache.positions.shape}, expected (1, {len(tokens)})")
    n = len(tokens)
    sizes = {"step": n_steps, "layer": model.config.n_layers, "head": model.config.n_heads, "pos": n, "dest_pos": n, "src_pos": n}
    chosen = {"step": steps, "layer": layers, "head": heads, "pos": positions, "dest_pos": positions, "src_pos": sources}
    coords: dict[str, Any] = {axis: places_of(axis, sizes[axis], chosen[axis]) for axis in named}
    own = model.run_with_cache(tokens, "pattern", n_steps=n_steps, logits="none")[1] if "src_pos" in named else None

    def value(edits: list[Swap]) -> float:
        logits = model.trace(tokens, n_steps=n_steps, logits="last", edits=edits).logits
        assert logits is not None
        return float(measure(logits[-1][:, seen])[0])

    corrupted_value = value([])
    todo = list(itertools.product(*coords.values()))
    key = sweep_key(model, tokens, clean_cache.stack("pattern"), None, point="pattern", axes=list(named), coords=coords, at=seen,
                    metric=metric_name(metric), corrupted=corrupted_value, n_steps=n_steps)  # fmt: skip
    store = ValueStore(save_to, key, len(todo))

    def variant(place: tuple[int, ...]) -> float:
        where = {"dest_pos" if axis == "pos" else axis: [i] for axis, i in zip(named, place, strict=True)}
        if own is None:
            return value([_swap(clean_cache, where, n_steps)])
        (step,), (layer,), (src,) = where["step"], where["layer"], where["src_pos"]
        heads, dest = where.get("head", slice(None)), where["dest_pos"][0]
        mixed = own.raw(("pattern", layer, step))[..., src]  # a view: the cell is changed in place, and back
        before = mixed.copy()
        clean = clean_cache["pattern", layer, step][..., src]
        if (clean[:, heads, dest] == before[:, heads, dest]).all():  # also ahead of the position: 0 in both
            return corrupted_value
        mixed[...] = clean
        try:
            return value([_swap(own, where, n_steps)])
        finally:
            mixed[...] = before

    store.fill(todo, variant, desc="patching pattern", unit="run", progress=progress)
    attrs = {"corrupted": corrupted_value, "metric": metric_name(metric), "point": "pattern", "variants": len(todo)}
    values = store.values.reshape([len(c) for c in coords.values()])
    return LabelledArray(values, named, coords, name="patched", attrs=attrs, plotter="plot_patching")


def _swap(cache: ActivationCache, where: dict[str, list[int]], n_steps: int) -> Swap:
    """The rows of `cache` at a place, in place of a run's own."""
    return Swap("pattern", cache, steps=where.get("step", range(n_steps)), layers=where.get("layer"), heads=where.get("head"),
                pos=where.get("dest_pos"))  # fmt: skip
