"""Capture: a filter becomes a plan of arrays whose size is known before the run, and the core fills them in place."""

from __future__ import annotations

import html
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from ouro import _core
from ouro.arrays import empty, free_memory
from ouro.config import ModelConfig
from ouro.errors import MemoryLimitError
from ouro.hooks import BY_SHORT, Filter, Place, Point, names_of, rectangles

Positions = int | slice | Sequence[int] | None
CaptureDtype = Literal["float32", "bfloat16"]
StopAt = tuple[int, int]
_DTYPES = {"float32": "float32", "uint16": "bfloat16"}
ATTENTION_BUFFER = 256 << 20  # bytes of scores and patterns that one pass may hold


def positions_of(pos: Positions, length: int) -> list[int]:
    """Positions of a sequence that `pos` means, ascending; negative ones count from its end.

    >>> positions_of(-1, 5), positions_of(slice(-2, None), 5), positions_of([0, -1], 5)
    ([4], [3, 4], [0, 4])
    """
    if pos is None:
        return list(range(length))
    if isinstance(pos, slice):
        return list(range(length))[pos]
    return sorted({i % length for i in numbers_of(pos) if -length <= i < length})


def numbers_of(pos: int | Sequence[int]) -> list[int]:
    """The numbers of a `pos` that is no slice; what is not a whole number is refused."""
    if isinstance(pos, str) or not isinstance(pos, (int, np.integer, Iterable)):
        raise TypeError(f"pos is {pos!r}, expected an int, a slice or a list of ints")
    wanted = [pos] if isinstance(pos, (int, np.integer)) else list(pos)
    for i in wanted:
        if not isinstance(i, (int, np.integer)) or isinstance(i, bool):
            raise TypeError(f"pos has {i!r}, expected an int, a slice or a list of ints")
    return [int(i) for i in wanted]


def no_such_position(pos: Positions, lengths: Sequence[int]) -> IndexError:
    """The error for positions that no sequence has."""
    return IndexError(f"pos is {pos!r}: no sequence has such a position (lengths {list(lengths)[:8]})")


def position_map(pos: Positions, lengths: Sequence[int]) -> tuple[NDArray[np.int32], NDArray[np.int64]]:
    """Where each position goes: map [batch, longest] (-1: nowhere), and the positions kept [batch, P] (-1: none). Each number of
    `pos` must be a position of some sequence."""
    kept = [positions_of(pos, n) for n in lengths]
    most, longest = max(len(k) for k in kept), max(lengths)
    beyond = [i for i in ([] if pos is None or isinstance(pos, slice) else numbers_of(pos)) if not -longest <= i < longest]
    if most == 0 or beyond:
        raise no_such_position(beyond[0] if beyond else pos, lengths)
    to = np.full((len(lengths), max(lengths)), -1, np.int32)
    back = np.full((len(lengths), most), -1, np.int64)
    for row, ps in enumerate(kept):
        to[row, ps] = np.arange(len(ps), dtype=np.int32)
        back[row, : len(ps)] = ps
    return to, back


@dataclass(frozen=True)
class Block:
    """One array of a capture: a point at all of some steps and layers."""

    point: Point
    steps: tuple[int, ...]
    layers: tuple[int, ...]
    shape: tuple[int, ...]

    @property
    def dims(self) -> tuple[str, ...]:
        """Names of its axes."""
        lead = {"run": (), "step": ("step",), "layer": ("step", "layer")}[self.point.of]
        if self.point.square:
            return (*lead, "batch", *self.point.dims)
        return (*lead, "batch", "pos", *self.point.dims)

    @property
    def size(self) -> int:
        """Numbers in it."""
        return int(np.prod(self.shape, dtype=np.int64))


def core_view(array: NDArray[Any], p: Point) -> NDArray[Any]:
    """The same memory as [step, layer, batch, pos, head, columns]."""
    if p.of == "run":
        array = array[None]
    if p.of != "layer":
        array = array[:, None]
    if p.square:
        return np.moveaxis(array, 3, 4)
    if not p.dims:
        array = array[..., None]
    return array if p.by_head else array[..., None, :]


class CapturePlan:
    """What a run will keep, and what it takes: known before anything is computed.

    Attributes
    ----------
    blocks : list of Block
        The arrays.
    nbytes : int
        All of them together.
    by_part : dict of str to int
        Bytes by short name.
    """

    def __init__(
        self, config: ModelConfig, n_steps: int, lengths: Sequence[int], names_filter: Filter | None, *, pos: Positions = None,
        steps: Iterable[int] | None = None, dtype: CaptureDtype = "float32", stop_at: StopAt | None = None,
    ) -> None:  # fmt: skip
        if dtype not in ("float32", "bfloat16"):
            raise ValueError(f"dtype is {dtype!r}, expected 'float32' or 'bfloat16'")
        self.config, self.n_steps, self.lengths, self.dtype = config, n_steps, list(lengths), dtype
        self.position_map, self.positions = position_map(pos, lengths)
        found = names_of(config, n_steps).select(names_filter, steps)
        reached = {p: {at for at in places if _reached(p, at, stop_at)} for p, places in found.items()}
        self.blocks = [self._block(p, *r) for p, places in reached.items() for r in rectangles(places)]
        if not self.blocks:
            raise ValueError(f"the filter {names_filter!r} picks nothing" + (f" before {stop_at}" if stop_at else ""))

    def _block(self, p: Point, steps: tuple[int, ...], layers: tuple[int, ...]) -> Block:
        lead = {"run": (), "step": (len(steps),), "layer": (len(steps), len(layers))}[p.of]
        batch, kept = self.positions.shape
        columns = p.columns(self.config, max(self.lengths))
        if p.square:
            return Block(p, steps, layers, (*lead, batch, p.heads(self.config), kept, columns))
        heads = (p.heads(self.config),) if p.by_head else ()
        return Block(p, steps, layers, (*lead, batch, kept, *heads, *((columns,) if p.dims else ())))

    @property
    def itemsize(self) -> int:
        """Bytes of one number."""
        return 4 if self.dtype == "float32" else 2

    @cached_property
    def by_part(self) -> dict[str, int]:
        """Bytes by short name, the largest first."""
        parts: dict[str, int] = {}
        for b in self.blocks:
            parts[b.point.short] = parts.get(b.point.short, 0) + b.size * self.itemsize
        return dict(sorted(parts.items(), key=lambda part: -part[1]))

    @property
    def nbytes(self) -> int:
        """Bytes of all arrays."""
        return sum(self.by_part.values())

    def check(self, max_bytes: int | None = None) -> None:
        """Refuse when the arrays exceed `max_bytes` (half of the free memory unless given), naming the sizes by part."""
        limit = _core.available_memory() // 2 if max_bytes is None else max_bytes
        if max_bytes is None and self.nbytes > limit and free_memory():
            limit = _core.available_memory() // 2
        if self.nbytes > limit:
            parts = ", ".join(f"{name} {_size(n)}" for name, n in list(self.by_part.items())[:8])
            more = f" and {len(self.by_part) - 8} more" if len(self.by_part) > 8 else ""
            raise MemoryLimitError(
                f"this capture needs {_size(self.nbytes)} ({self.nbytes} bytes), {_size(limit)} are allowed: {parts}{more}; "
                "name fewer points, steps or positions, take dtype='bfloat16', or raise max_bytes"
            )

    def allocate(self, *, blank: bool, out: Sequence[tuple[Block, NDArray[Any]]] | None = None) -> list[NDArray[Any]]:
        """The arrays, new or those of an earlier capture of this plan.

        With `blank` they hold NaN (patterns 0, scores -inf) where nothing will be written; else every number is written.
        """
        kind = np.float32 if self.dtype == "float32" else np.uint16
        arrays = [empty(b.shape, kind) for b in self.blocks] if out is None else self._taken(out, kind)
        for b, a in zip(self.blocks, arrays, strict=True) if blank else ():
            a[...] = _fill(b.point, kind)
            if b.point.square and (self.positions < 0).any():
                for row in range(a.shape[2]):
                    a[:, :, row, :, self.positions[row] < 0] = _fill(BY_SHORT["state"], kind)
        return arrays

    def _taken(self, out: Sequence[tuple[Block, NDArray[Any]]], kind: type) -> list[NDArray[Any]]:
        """The arrays of an earlier capture, refused when they are not of this plan."""
        for i in range(max(len(out), len(self.blocks))):
            have = f"{_block(out[i][0])} as {_DTYPES.get(out[i][1].dtype.name)}" if i < len(out) else "nothing"
            want = f"{_block(self.blocks[i])} as {self.dtype}" if i < len(self.blocks) else "nothing"
            if have != want:
                raise ValueError(f"out holds another capture: {have} where this one keeps {want}")
            if not out[i][1].flags.writeable:
                raise ValueError("out can not be written: it is a file that was loaded")
        return [np.asarray(a) for _, a in out]

    def add_to(self, plan: _core.Plan, arrays: Sequence[NDArray[Any]]) -> None:
        """Tell the core where to write."""
        for b, a in zip(self.blocks, arrays, strict=True):
            if b.point.core >= 0:
                steps = (0,) if b.point.of == "run" else b.steps
                plan.capture(b.point.core, steps, b.layers if b.point.of == "layer" else (), self.position_map, core_view(a, b.point))

    def encode(self, x: NDArray[np.float32]) -> NDArray[Any]:
        """Values in the type of the arrays."""
        return x if self.dtype == "float32" else to_bfloat16(x)

    @property
    def looks_at_attention(self) -> bool:
        """Whether scores or patterns are wanted."""
        return any(b.point.square for b in self.blocks)

    def __repr__(self) -> str:
        batch, kept = self.positions.shape
        head = f"CapturePlan({_size(self.nbytes)} as {self.dtype}: batch={batch}, pos={kept})"
        return "\n".join([head, *(f"  {_size(n):>10}  {name}" for name, n in self.by_part.items())])

    def _repr_html_(self) -> str:
        rows = "".join(f"<tr><td>{html.escape(name)}</td><td>{_size(n)}</td></tr>" for name, n in self.by_part.items())
        return f"<table><caption>capture: {_size(self.nbytes)} as {self.dtype}</caption>{rows}</table>"


def _reached(p: Point, at: Place, stop_at: StopAt | None) -> bool:
    if stop_at is None or p.of == "run":
        return True
    if p.of == "layer":
        return at <= stop_at
    return at[0] < stop_at[0] if p.short != "step_resid_pre" else at[0] <= stop_at[0]


def _block(b: Block) -> str:
    layers = f", layers {list(b.layers)}" if b.point.of == "layer" else ""
    return f"{b.point.short} {list(b.shape)} (steps {list(b.steps)}{layers})"


def _fill(p: Point, kind: type) -> Any:
    value = 0.0 if p.short == "pattern" else -np.inf if p.short == "attn_scores" else np.nan
    return np.float32(value) if kind is np.float32 else to_bfloat16(np.array([value], np.float32))[0]


def to_bfloat16(x: NDArray[np.float32]) -> NDArray[np.uint16]:
    """Rounded to nearest even, as the bits of bfloat16."""
    u = np.ascontiguousarray(x, np.float32).view(np.uint32)
    rounded = ((u + (0x7FFF + ((u >> 16) & 1))) >> 16).astype(np.uint16)
    return np.where(np.isnan(x), np.uint16(0x7FC0), rounded)


def from_bfloat16(x: NDArray[np.uint16]) -> NDArray[np.float32]:
    """Bits of bfloat16 as float32, exactly."""
    return (x.astype(np.uint32) << 16).view(np.float32)


def _size(n: int) -> str:
    value = float(n)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if value < 1024 or unit == "GiB":
            break
        value /= 1024
    return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
