"""Changes to a run. Declarative edits are carried out by the core; Python hooks see the arrays themselves.

An edit says where (a filter of `ouro.hooks`, then steps, layers, heads, positions) and what. Edits combine: they are applied at
each point in the order of the list. An edit is a function of the row it changes and of where that row is, so the result has one
answer as everything else: the same bits in any batch, chunk, schedule, or under speculation.

>>> import numpy as np, ouro
>>> model = ouro.load("ouro-tiny")
>>> steer = ouro.edits.Add("resid_post", np.ones(128), scale=0.5, layers=[2], steps=[1, 2, 3], pos=-1)
>>> plain, steered = model.trace("One day"), model.trace("One day", edits=[steer])
>>> (plain.states[0] == steered.states[0]).all(), (plain.states[1, 0, -1] == steered.states[1, 0, -1]).all()
(np.True_, np.False_)
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ouro import _core
from ouro.cache import ActivationCache
from ouro.capture import Positions, core_view, no_such_position, numbers_of
from ouro.hooks import Filter, HookNames, Point, rectangles

ADD, SET, SCALE, PROJECT, NOISE = 1, 2, 3, 4, 5  # csrc/tap/plan.h


@dataclass(frozen=True)
class Target:
    """What edits are compiled for: the names of a run, and its sequences.

    `lengths` are what negative positions count from; `room` how long each sequence may become (the same for a trace).
    """

    names: HookNames
    lengths: list[int]
    room: list[int]

    def positions(self, pos: Positions, *, passing: bool = False) -> NDArray[np.int32] | None:
        """Map [batch, longest]: 0 where an edit applies, -1 elsewhere; None when everywhere.

        Every sequence must have a position that is given by its number, unless `passing` says to pass over those that have not. A
        slice ends where a sequence does, but must pick something.
        """
        if pos is None:
            return None
        to = np.full((len(self.lengths), max(self.room)), -1, np.int32)
        for row in range(len(to)):
            to[row, self._of_slice(pos, row) if isinstance(pos, slice) else self._of_numbers(pos, row, passing)] = 0
        if not passing and (to < 0).all():
            raise no_such_position(pos, self.room)
        return to

    def _of_slice(self, pos: slice, row: int) -> list[int]:
        start, stop = (None if i is None else max(i + self.lengths[row], 0) if i < 0 else i for i in (pos.start, pos.stop))
        return list(range(self.room[row]))[start : stop : pos.step]

    def _of_numbers(self, pos: int | Sequence[int], row: int, passing: bool) -> list[int]:
        n, room, wanted = self.lengths[row], self.room[row], numbers_of(pos)
        beyond = [i for i in wanted if not -n <= i < room]
        if beyond and not passing:
            raise IndexError(f"position {beyond[0]} is out of range: {self.described(row)}, expected {-n} to {room - 1}")
        return [i + n if i < 0 else i for i in wanted if -n <= i < room]

    def described(self, row: int) -> str:
        """How long a sequence is, in words."""
        n, more = self.lengths[row], self.room[row] - self.lengths[row]
        which = f"sequence {row} of the batch" if len(self.lengths) > 1 else "the sequence"
        return f"the prompt has {n} tokens and {more} more may come" if more else f"{which} has {n} tokens"


def finite(value: ArrayLike, what: str) -> NDArray[np.float32]:
    """Numbers as float32; TypeError when they are none, ValueError for NaN, infinities and what float32 can not hold."""
    if value is None:  # which NumPy takes for NaN
        raise TypeError(f"{what} is None, expected numbers")
    try:
        with np.errstate(over="ignore"):
            a = np.asarray(value, np.float32)
    except (TypeError, ValueError):
        raise TypeError(f"{what} is {value!r}, expected numbers") from None
    if not np.isfinite(a).all():
        wrong = a if a.ndim == 0 else f"{a[~np.isfinite(a)][0]} in an array of shape {a.shape}"
        raise ValueError(f"{what} is {wrong}, expected finite numbers that float32 can hold")
    return a


def _rows(value: ArrayLike, p: Point, names: HookNames, heads: Sequence[int] | None) -> NDArray[np.float32]:
    """A value as [1, 1, 1, 1, heads or 1, columns or 1]."""
    a = np.ascontiguousarray(value, np.float32)
    columns, n_heads = p.columns(names.config, 0), p.heads(names.config) if heads is None else len(heads)
    allowed: list[tuple[int, ...]] = [(), (1,)]
    if not p.square:
        allowed += [(columns,)] + ([(n_heads, columns)] if p.by_head else [])
    if a.shape not in allowed:
        raise ValueError(f"value for {p.short} has shape {a.shape}, expected {' or '.join(map(str, allowed))}")
    return a.reshape((1, 1, 1, 1, a.shape[0] if a.ndim == 2 else 1, a.shape[-1] if a.ndim else 1))


@dataclass(frozen=True, kw_only=True)
class Edit:
    """Where an edit applies: all steps, layers, heads and positions unless told otherwise; negative numbers count from the end.

    `pos` is a position, a list of them, or a slice. A position is one that every sequence has, or the run is refused (IndexError); a
    slice ends where a sequence does. In `generate` negative positions count from the end of the prompt, an open slice goes on with the
    new tokens, and positions go up to the prompt and `max_new_tokens`.
    """

    steps: Iterable[int] | None = None
    layers: Iterable[int] | None = None
    heads: Sequence[int] | None = None
    pos: Positions = None

    def __post_init__(self) -> None:
        for name in ("steps", "layers", "heads"):
            value = getattr(self, name)
            if value is not None and (isinstance(value, str) or not isinstance(value, Iterable)):
                raise TypeError(f"{name} of {type(self).__name__} is {value!r}, expected a list such as [0, -1]")

    def _where(self) -> Filter:
        raise NotImplementedError

    def _places(self, target: Target) -> Iterator[tuple[Point, tuple[int, ...], tuple[int, ...]]]:
        """The points, and for each the steps and layers, that the edit is for."""
        names, keep = target.names, None
        if self.layers is not None:
            n = names.config.n_layers
            for layer in self.layers:
                if not -n <= layer < n:
                    raise IndexError(f"layer is {layer}, expected {-n} to {n - 1}")
            keep = {layer % n for layer in self.layers}
        for p, places in names.select(self._where(), self.steps).items():
            if p.core < 0:
                raise ValueError(f"{p.short} follows from the gate's logits and can not be changed: edit gate_logit")
            if keep is not None and p.of != "layer":
                raise ValueError(f"{p.short} is not of a layer")
            if self.heads is not None and not p.by_head:
                raise ValueError(f"{p.short} has no heads")
            chosen = {at for at in places if keep is None or at[1] in keep}
            for steps, layers in rectangles(chosen):
                yield p, (0,) if p.of == "run" else steps, layers if p.of == "layer" else ()

    def _heads(self, p: Point, names: HookNames) -> list[int] | None:
        if self.heads is None:
            return None
        n = p.heads(names.config)
        for h in self.heads:
            if not -n <= h < n:
                raise IndexError(f"head is {h}, expected {-n} to {n - 1}")
        return [h % n for h in self.heads]

    def _set(
        self, plan: _core.Plan, p: Point, steps: tuple[int, ...], layers: tuple[int, ...], positions: NDArray[np.int32] | None,
        rows: NDArray[np.float32], target: Target,
    ) -> None:  # fmt: skip
        """Rows [step, layer, batch, pos, head, columns] in place of what is there; refused where a cache has no value."""
        heads = self._heads(p, target.names)
        chosen = rows if heads is None else np.ascontiguousarray(rows[:, :, :, :, heads])
        for row in range(chosen.shape[2]):
            to = None if positions is None else positions[row] if len(chosen[0, 0]) > 1 else positions
            at = slice(None) if to is None else np.unique(to[to >= 0])
            lost = np.isnan(chosen[:, :, row, at]).any((2, 3, 4))
            if lost.any():
                step, layer = (int(i) for i in np.argwhere(lost)[0])
                name = p.name(steps[step], layers[layer] if layers else 0)
                raise ValueError(f"the cache has no value (NaN) of {name} here: it never ran, or the sequence is shorter")
        plan.edit(SET, p.core, steps, layers, heads, positions, chosen, 1.0, 0)

    def _change(self, p: Point, target: Target) -> tuple[int, NDArray[np.float32] | None, float, int]:
        """Kind, rows, scale and seed."""
        raise NotImplementedError

    def add_to(self, plan: _core.Plan, target: Target) -> None:
        """Compile into a plan."""
        positions = target.positions(self.pos)
        for p, steps, layers in self._places(target):
            kind, rows, scale, seed = self._change(p, target)
            plan.edit(kind, p.core, steps, layers, self._heads(p, target.names), positions, rows, scale, seed)


@dataclass(frozen=True)
class _AtPoints(Edit):
    """An edit of the points that a filter names."""

    where: Filter

    def _where(self) -> Filter:
        return self.where


@dataclass(frozen=True)
class Add(_AtPoints):
    """`x + scale * vector`; the vector is a number, [columns] or, for points with heads, [heads, columns]."""

    vector: ArrayLike
    scale: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        finite(finite(self.vector, "vector of Add").astype(np.float64) * finite(self.scale, "scale of Add"), "scale * vector of Add")

    def _change(self, p: Point, target: Target) -> tuple[int, NDArray[np.float32] | None, float, int]:
        return ADD, _rows(self.vector, p, target.names, self.heads), self.scale, 0


@dataclass(frozen=True)
class Set(_AtPoints):
    """`value` in place of x; shapes as for `Add`."""

    value: ArrayLike

    def __post_init__(self) -> None:
        super().__post_init__()
        finite(self.value, "value of Set")

    def _change(self, p: Point, target: Target) -> tuple[int, NDArray[np.float32] | None, float, int]:
        return SET, _rows(self.value, p, target.names, self.heads), 1.0, 0


@dataclass(frozen=True)
class Scale(_AtPoints):
    """`scale * x`."""

    scale: float

    def __post_init__(self) -> None:
        super().__post_init__()
        finite(self.scale, "scale of Scale")

    def _change(self, p: Point, target: Target) -> tuple[int, NDArray[np.float32] | None, float, int]:
        return SCALE, None, self.scale, 0


@dataclass(frozen=True)
class ProjectOut(_AtPoints):
    """`x - scale * (x . u) u` with u the direction at length 1: what x has along the direction is removed."""

    direction: ArrayLike
    scale: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        finite(self.direction, "direction of ProjectOut")
        finite(self.scale, "scale of ProjectOut")

    def _change(self, p: Point, target: Target) -> tuple[int, NDArray[np.float32] | None, float, int]:
        u = np.asarray(self.direction, np.float64)
        length = np.linalg.norm(u, axis=-1, keepdims=True)
        if p.square or u.ndim < 1 or not (length > 0).all():
            raise ValueError(f"a direction at {p.short} must be a vector of a length above 0")
        return PROJECT, _rows((u / length).astype(np.float32), p, target.names, self.heads), self.scale, 0


@dataclass(frozen=True)
class Noise(_AtPoints):
    """`x + std * n`, n standard normal: a function of (seed, point, step, layer, pos, head, column), the same in every row of a
    batch."""

    std: float
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if finite(self.std, "std of noise") < 0:
            raise ValueError(f"std of noise is {self.std}, expected 0 or more")

    def _change(self, p: Point, target: Target) -> tuple[int, NDArray[np.float32] | None, float, int]:
        return NOISE, None, self.std, self.seed


@dataclass(frozen=True)
class ZeroHead(Edit):
    """What the heads read is zero: `attn.hook_z` of the heads times 0."""

    def _where(self) -> Filter:
        return "z"

    def _change(self, p: Point, target: Target) -> tuple[int, NDArray[np.float32] | None, float, int]:
        if self.heads is None:
            raise ValueError("ZeroHead needs heads=[...]")
        return SCALE, None, 0.0, 0


def _need_cache(edit: Swap | MeanAblate) -> None:
    if not isinstance(edit.cache, ActivationCache):
        raise TypeError(f"{type(edit).__name__} takes from the ActivationCache of a run, got a {type(edit.cache).__name__}")


def _from_cache(cache: ActivationCache, p: Point, steps: tuple[int, ...], layers: tuple[int, ...]) -> NDArray[np.float32]:
    """Rows of a cache as [step, layer, batch, pos, head, columns]."""
    if p.of == "run":
        return core_view(np.ascontiguousarray(cache[p.short]), p)
    a = cache.sel(p.short, step=list(steps), layer=list(layers) if p.of == "layer" else None)
    return core_view(np.ascontiguousarray(a), p)


@dataclass(frozen=True)
class Swap(_AtPoints):
    """What another run had at the same places, from its cache.

    Positions are those of the cache, or those of `pos`: numbers that the cache must have, or a slice of what it has. A cache of one
    sequence serves every row of a batch. Places that the cache or the run lacks are an error.
    """

    cache: ActivationCache

    def __post_init__(self) -> None:
        super().__post_init__()
        _need_cache(self)

    def add_to(self, plan: _core.Plan, target: Target) -> None:
        """Compile into a plan."""
        to = self._rows_of_cache(target)
        for p, steps, layers in self._places(target):
            rows = _from_cache(self.cache, p, steps, layers)
            self._set(plan, p, steps, layers, to, rows, target)

    def _rows_of_cache(self, target: Target) -> NDArray[np.int32]:
        """Map [batch, longest] to places along the cache's pos axis, -1 where nothing is swapped."""
        have, allowed = self.cache.positions, target.positions(self.pos)
        if len(have) not in (1, len(target.lengths)):
            raise ValueError(f"the cache has {len(have)} sequences, expected 1 or {len(target.lengths)}")
        to = np.full((len(target.lengths), max(target.room)), -1, np.int32)
        for row, room in enumerate(target.room):
            places = {int(q): i for i, q in enumerate(have[row if len(have) > 1 else 0]) if q >= 0}
            wanted: Collection[int] = places if allowed is None else np.flatnonzero(allowed[row] >= 0).tolist()
            if isinstance(self.pos, slice):
                wanted = places.keys() & set(wanted)
            for q in wanted:
                if q not in places:
                    raise IndexError(f"the cache has no position {q}, it holds {_few(list(places))}")
                if q >= room:
                    raise IndexError(f"the cache has position {q}, but {target.described(row)}: choose with pos=")
                to[row, q] = places[q]
        if (to < 0).all():
            raise IndexError(f"pos is {self.pos!r}, and the cache has none of these positions")
        return to


def _few(positions: list[int]) -> str:
    return ", ".join(map(str, positions[:8])) + (f" and {len(positions) - 8} more" if len(positions) > 8 else "")


@dataclass(frozen=True)
class MeanAblate(_AtPoints):
    """The mean over sequences and positions of a cache, in place of x, at each step, layer and head."""

    cache: ActivationCache

    def __post_init__(self) -> None:
        super().__post_init__()
        _need_cache(self)

    def add_to(self, plan: _core.Plan, target: Target) -> None:
        """Compile into a plan."""
        positions = target.positions(self.pos)
        for p, steps, layers in self._places(target):
            if p.square:
                raise ValueError(f"{p.short} has no mean over positions: rows differ in length")
            rows = _from_cache(self.cache, p, steps, layers)
            n = np.count_nonzero(~np.isnan(rows), axis=(2, 3), keepdims=True)
            mean = (np.nansum(rows, axis=(2, 3), keepdims=True, dtype=np.float64) / np.where(n, n, np.nan)).astype(np.float32)
            self._set(plan, p, steps, layers, positions, mean, target)


def checked(edits: Sequence[Edit]) -> list[Edit]:
    """A list of edits; anything else is refused."""
    if isinstance(edits, (Edit, str)) or not isinstance(edits, Iterable):
        raise TypeError(f"edits are a list of what the classes of ouro.edits make, got {edits!r}")
    for edit in edits:
        if not isinstance(edit, Edit):
            raise TypeError(f"an edit is made by a class of ouro.edits, got {edit!r}")
    return list(edits)


# -- Python hooks ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class HookPoint:
    """Where a hook is called.

    Attributes
    ----------
    name : str
        Full name.
    step, layer : int
        -1 where the point has none.
    pos : array [pos]
        Positions along the array's pos axis (of the longest sequence).
    """

    name: str
    step: int
    layer: int
    pos: NDArray[np.int64] = field(repr=False)


HookFunction = Callable[[NDArray[np.float32], HookPoint], ArrayLike | None]
FwdHooks = Sequence[tuple[Filter, HookFunction]]


def _bridge(p: Point, fn: HookFunction) -> Callable[[NDArray[np.float32], int, int, int, NDArray[np.int64]], NDArray[np.float32] | None]:
    """A hook as the core calls it: [row, pos, head, columns] there, the point's own axes here."""

    def call(rows: NDArray[np.float32], _: int, step: int, layer: int, pos: NDArray[np.int64]) -> NDArray[np.float32] | None:
        view = rows.transpose(0, 2, 1, 3) if p.square else rows if p.by_head else rows[:, :, 0] if p.dims else rows[:, :, 0, 0]
        at = HookPoint(p.name(step, layer), -1 if p.of == "run" else step, layer, pos)
        result = fn(view, at)
        if result is None:
            return None
        new = np.asarray(result, np.float32)
        if new.shape != view.shape:
            raise ValueError(f"the hook at {at.name} returned shape {new.shape}, expected {view.shape}")
        return np.ascontiguousarray(new.transpose(0, 2, 1, 3)) if p.square else new.reshape(rows.shape)

    return call


def add_hooks(plan: _core.Plan, names: HookNames, fwd_hooks: FwdHooks) -> None:
    """Compile Python hooks into a plan."""
    for hook in fwd_hooks:
        if not isinstance(hook, (tuple, list)) or len(hook) != 2 or not callable(hook[1]):
            raise TypeError(f"a hook is (filter, function) and hooks are a list of them, got {hook!r}")
        where, fn = hook
        for p, places in names.select(where).items():
            if p.core < 0:
                if callable(where) or any(c in str(where) for c in "*?["):
                    continue
                raise ValueError(f"{p.short} follows from the gate's logits and is not hooked: hook gate_logit")
            for steps, layers in rectangles(places):
                plan.call(p.core, (0,) if p.of == "run" else steps, layers if p.of == "layer" else (), _bridge(p, fn))
