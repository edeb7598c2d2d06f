"""`sweep`: replace activations of one run by those of another, everywhere in turn, and measure."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from tqdm.auto import tqdm

from ouro.cache import ActivationCache
from ouro.engine import MAX_LANES
from ouro.labelled import LabelledArray
from ouro.patching.forks import Fork, ForkSet, layer_point
from ouro.patching.metric import Metric, measure_of, metric_name
from ouro.patching.store import ValueStore

if TYPE_CHECKING:
    from ouro.model import Model, Tokens

AXES = ("step", "layer", "pos", "head")
CHUNK = 128  # forks between two looks at the progress bar and the file


def _source(model: Model, clean: Tokens | ActivationCache, point: str, n: int, n_steps: int) -> NDArray[np.float32]:
    """The clean run's rows `[step, layer, pos, (head,) d]`."""
    if not isinstance(clean, ActivationCache):
        _, clean = model.run_with_cache(clean, names_filter=point, n_steps=n_steps, logits="none")
    rows = np.asarray(clean.stack(point), np.float32)
    if rows.shape[1] != model.config.n_layers:
        raise ValueError(f"the clean run has {point!r} of layers {clean.layers(point)}, expected all {model.config.n_layers}: "
                         "capture it without a layer, and name layers= here")  # fmt: skip
    if rows.shape[2] != 1 or rows.shape[3] != n or rows.shape[0] < n_steps:
        raise ValueError(f"the clean run has {point!r} of shape {rows.shape} [step, layer, batch, pos, ...], expected {n_steps} steps, "
                         f"a batch of 1 and {n} positions: both runs must have the same length")  # fmt: skip
    if np.isnan(rows).any():
        raise ValueError(f"the clean run has no value (NaN) of {point!r} at some places: they never ran")
    return rows[:, :, 0]


def places_of(axis: str, size: int, chosen: Sequence[int] | None) -> list[int]:
    """Indices of an axis, counted from its beginning; all unless chosen."""
    if chosen is not None and not isinstance(chosen, Iterable):
        raise TypeError(f"{axis} is {chosen!r}, expected a list such as [{chosen!r}]")
    places = list(range(size)) if chosen is None else [int(i) for i in chosen]
    for i in places:
        if not -size <= i < size:
            raise IndexError(f"{axis} {i} is out of range, expected {-size} to {size - 1}")
    return [i % size for i in places]


def _fork(where: dict[str, int], sizes: dict[str, int], window: int) -> Fork:
    """The ranges of one variant: an axis that is not swept is replaced as a whole."""

    def ends(axis: str) -> tuple[int, int]:
        return (where[axis], where[axis] + 1) if axis in where else (0, sizes[axis])

    layer0, layer1 = ends("layer")
    if "layer" in where:
        layer0, layer1 = max(0, layer0 - (window - 1) // 2), min(sizes["layer"], layer1 + window // 2)
    return Fork(*ends("step"), layer0, layer1, *ends("pos"), where.get("head", -1))


def sweep_key(
    model: Model, tokens: list[int], source: NDArray[np.float32], embeddings: NDArray[np.float32] | None, **rest: Any
) -> dict[str, Any]:
    """What a saved sweep is a sweep of."""
    digest = hashlib.sha256(np.asarray(tokens, np.int64).tobytes() + np.ascontiguousarray(source).tobytes())
    if embeddings is not None:
        digest.update(np.ascontiguousarray(embeddings).tobytes())
    return {"format": 1, "compute": model.compute, "inputs": digest.hexdigest(), **rest}


def sweep(
    model: Model,
    clean: Tokens | ActivationCache,
    corrupted: Tokens,
    metric: Metric,
    *,
    points: str | Sequence[str] = "resid_pre",
    axes: Sequence[str] = ("step", "layer", "pos"),
    n_steps: int | None = None,
    steps: Sequence[int] | None = None,
    layers: Sequence[int] | None = None,
    positions: Sequence[int] | None = None,
    heads: Sequence[int] | None = None,
    window: int = 1,
    at: int | Sequence[int] = -1,
    embeddings: ArrayLike | None = None,
    save_to: str | Path | None = None,
    max_lanes: int = MAX_LANES,
    max_bytes: int | None = None,
    progress: bool = True,
) -> LabelledArray:
    """Run the corrupted prompt with activations of the clean one put in, at every place of `axes` in turn.

    A variant is exact: it has the bits of a whole run with the same replacement. It costs less, because it starts at the
    replaced (step, layer), runs the positions from the replaced one on, and shares its passes with other variants.

    Parameters
    ----------
    model : Model
    clean
        Text, token ids, or the ActivationCache of a run that holds the points.
    corrupted
        Text or token ids of the same length.
    metric
        A function of logits `[fork, pos, d_vocab]` float32 that returns `[fork]`; or a token (its log probability, nats); or a
        pair (answer, other): the difference of their logits. `pos` runs over `at`.
    points
        Short names of points of a layer: "resid_pre", "resid_mid", "resid_post", "attn_out", "mlp_out", "z", "q", "k", "v", ...
        Several give a leading axis `point`.
    axes
        Any of "step", "layer", "pos", "head". Along an axis that is not named everything is replaced at once.
    n_steps
        Recurrent steps of both runs; the trained number unless given.
    steps, layers, positions, heads
        Only these places of an axis; negative ones count from the end.
    window
        Layers that are replaced together, centred on the named one (as in causal tracing).
    at
        Positions whose logits the metric sees.
    embeddings : array [pos, d_model], optional
        In place of the corrupted tokens' embeddings.
    save_to
        A file that keeps the values as they come; a sweep that was stopped goes on from it.
    max_lanes, max_bytes
        Rows that share a pass, and bytes of keys and values at once; never change a result.
    progress
        Show a progress bar.

    Returns
    -------
    LabelledArray
        The metric, axes as in `axes`. `attrs`: `clean` and `corrupted` (the metric of the unchanged runs), `forwards` (work done, in
        whole forwards of the prompt), `variants`.

    Raises
    ------
    ValueError
        Prompts of unequal length, an unknown axis or point, a metric of the wrong shape, a file of another sweep.
    """
    names = [points] if isinstance(points, str) else list(points)
    unknown = set(axes) - set(AXES)
    if unknown or len(set(axes)) != len(axes):
        raise ValueError(f"axes are {tuple(axes)}, expected some of {AXES}, each once")
    if not names:
        raise ValueError("points is empty, expected short names of points of a layer such as 'resid_pre'")
    if window < 1:
        raise ValueError(f"window is {window}, expected 1 or more")
    tokens, measure = model._one(corrupted), measure_of(model, metric)
    n_steps = model.config.n_steps if n_steps is None else n_steps
    seen = places_of("position", len(tokens), [at] if isinstance(at, int) else at)
    given = None if embeddings is None else np.asarray(embeddings, np.float32)
    forks = ForkSet(model, tokens, n_steps=n_steps, embeddings=given, max_lanes=max_lanes)
    corrupted_value = float(measure(forks.logits(forks.states()[-1:, seen]))[0])  # in the key: two functions may share a name
    results = []
    for name in names:
        headed = layer_point(name).by_head
        source = _source(model, clean, name, len(tokens), n_steps)
        if "head" in axes and not headed:
            raise ValueError(f"{name!r} has no axis 'head'; points that have: z, q, k, v, rot_q, rot_k, result")
        sizes = {"step": n_steps, "layer": model.config.n_layers, "pos": len(tokens), "head": source.shape[3] if headed else 1}
        chosen = {"step": steps, "layer": layers, "pos": positions, "head": heads}
        coords = {axis: places_of(axis, sizes[axis], chosen[axis]) for axis in axes}
        todo = [_fork(dict(zip(axes, place, strict=True)), sizes, window) for place in itertools.product(*coords.values())]
        key = sweep_key(model, tokens, source, given, point=name, axes=list(axes), coords=coords, window=window, at=seen,
                        metric=metric_name(metric), corrupted=corrupted_value, n_steps=n_steps)  # fmt: skip
        path = None if save_to is None else Path(save_to) if len(names) == 1 else Path(save_to).with_suffix(f".{name}.npz")
        store = ValueStore(path, key, len(todo))
        _run(forks, name, todo, source, seen, measure, store, max_bytes, progress)
        results.append(store.values.reshape([len(c) for c in coords.values()]))
    attrs = {
        "clean": _clean_value(model, clean, seen, n_steps, measure),
        "corrupted": corrupted_value,
        "metric": metric_name(metric), "point": names[0] if len(names) == 1 else names, "variants": len(todo) * len(names),
        "forwards": forks.lane_layers / forks.forward_lane_layers,
    }  # fmt: skip
    labels: dict[str, Any] = dict(coords)
    if "pos" in axes and model.tokenizer:
        strings = model.to_str_tokens(tokens)
        labels["token"] = (("pos",), [strings[i] for i in coords["pos"]])
    kind: dict[str, Any] = {"name": "patched", "attrs": attrs, "plotter": "plot_patching"}
    if isinstance(points, str):
        return LabelledArray(results[0], tuple(axes), labels, **kind)
    return LabelledArray(np.stack(results), ("point", *axes), {"point": names, **labels}, **kind)


def _clean_value(model: Model, clean: Any, at: list[int], n_steps: int, measure: Any) -> float:
    """The metric of the clean run; NaN when only its cache was given."""
    if isinstance(clean, ActivationCache):
        return float("nan")
    trace = model.trace(clean, n_steps=n_steps, logits="none")
    logits = model._core.readout(np.ascontiguousarray(trace.states[-1, 0, at]), True)[0]
    return float(measure(np.asarray(logits)[None])[0])


def _run(
    forks: ForkSet, point: str, todo: list[Fork], source: NDArray[np.float32], at: list[int], measure: Any, store: ValueStore,
    max_bytes: int | None, progress: bool,
) -> None:  # fmt: skip
    """Fills the store, a chunk at a time."""
    left = np.flatnonzero(~store.done)
    bar = tqdm(total=len(todo), initial=len(todo) - len(left), desc=f"patching {point}", unit="run", disable=not progress, delay=1.0,
               leave=False)  # fmt: skip
    try:
        with bar:
            for begin in range(0, len(left), CHUNK):
                part = left[begin : begin + CHUNK]
                states = forks.run(point, [todo[i] for i in part], source, at, max_bytes=max_bytes)
                store.put(part, measure(forks.logits(states)))
                bar.update(len(part))
    finally:
        store.write()
