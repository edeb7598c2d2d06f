"""Caches on disk: one file, or a directory of shards that survives being killed.

A file is safetensors: an array per block, named by its point, and under the metadata key "ouro_cache" one JSON object with
the names, axes, tokens and positions. A directory of shards has `index.json`, which says what every shard will hold, and
`shard-00000.safetensors` and so on, each written under another name and renamed when it is whole: what has its final name
is complete, whatever happened.
"""

from __future__ import annotations

import hashlib
import json
import os
import struct
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ouro.cache import ActivationCache
from ouro.capture import Block, CaptureDtype, CapturePlan, Positions, position_map
from ouro.checkpoint.header import read_header
from ouro.config import ModelConfig
from ouro.edits import Edit, Target
from ouro.errors import CheckpointError
from ouro.files import open_regular, parse_json, read_exactly, read_json, replace_file
from ouro.forward import Forward
from ouro.hooks import BY_SHORT, Filter, names_of

if TYPE_CHECKING:
    from ouro.model import Model

KEY, VERSION = "ouro_cache", 1
INDEX = "index.json"


def _names(blocks: Sequence[tuple[Block, NDArray[Any]]]) -> list[str]:
    """One name for each array: its point, numbered when a point has several."""
    seen: dict[str, int] = {}
    out = []
    for b, _ in blocks:
        n = seen[b.point.short] = seen.get(b.point.short, 0) + 1
        out.append(b.point.short if n == 1 else f"{b.point.short}.{n}")
    return out


def write_cache(cache: ActivationCache, path: Path) -> None:
    """See `ActivationCache.save`."""
    names = _names(cache.blocks)
    about = {
        "version": VERSION, "config": asdict(cache.config), "n_steps": cache.n_steps, "lengths": cache.lengths,
        "token_ids": cache.token_ids, "positions": cache.positions.tolist(), "tokens": cache.tokens,
        "blocks": [{"array": name, "point": b.point.short, "steps": b.steps, "layers": b.layers, "dims": b.dims}
                   for name, (b, _) in zip(names, cache.blocks, strict=True)],
    }  # fmt: skip
    header: dict[str, Any] = {"__metadata__": {KEY: json.dumps(about)}}
    at = 0
    for name, (_, a) in zip(names, cache.blocks, strict=True):
        header[name] = {"dtype": "BF16" if a.dtype == np.uint16 else "F32", "shape": list(a.shape), "data_offsets": [at, at + a.nbytes]}
        at += a.nbytes
    text = json.dumps(header).encode()
    text += b" " * (-(len(text) + 8) % 64)
    arrays = (memoryview(np.ascontiguousarray(a).reshape(-1).view(np.uint8).data) for _, a in cache.blocks)
    replace_file(path, [struct.pack("<Q", len(text)), text, *arrays])


def _about(path: Path, fd: int) -> dict[str, Any]:
    (length,) = struct.unpack("<Q", read_exactly(fd, 0, 8, path))
    header = parse_json(read_exactly(fd, 8, length, path), path, what="JSON header", budget=max(4 << 20, os.fstat(fd).st_size))
    text = (header.get("__metadata__") or {}).get(KEY)
    about = parse_json(text.encode(), path, what="metadata", budget=max(4 << 20, 64 * len(text))) if isinstance(text, str) else None
    if not isinstance(about, dict) or about.get("version") != VERSION:
        raise CheckpointError("file is not a saved cache", file=path, expected=f"metadata '{KEY}' of version {VERSION}")
    return about


def read_cache(path: Path) -> ActivationCache:
    """See `ActivationCache.load`."""
    fd = open_regular(path)
    try:
        infos = {info.name: info for info in read_header(fd, path)}
        about = _about(path, fd)
    finally:
        os.close(fd)
    try:
        config = ModelConfig(**{f.name: about["config"][f.name] for f in fields(ModelConfig)})
        positions = np.array(about["positions"], np.int64)
        blocks: list[tuple[Block, NDArray[Any]]] = []
        for entry in about["blocks"]:
            info = infos[entry["array"]]
            block = Block(BY_SHORT[entry["point"]], tuple(entry["steps"]), tuple(entry["layers"]), info.shape)
            if len(block.dims) != len(info.shape) or positions.ndim != 2 or info.dtype not in ("F32", "BF16"):
                raise ValueError("shapes and names do not agree")
            kind = np.dtype("<u2") if info.dtype == "BF16" else np.dtype("<f4")
            blocks.append((block, np.memmap(path, kind, "r", info.offset, info.shape)))
        return ActivationCache(blocks, config, int(about["n_steps"]), about["lengths"], about["token_ids"], positions, about["tokens"])
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"metadata of a saved cache are damaged: {error}", file=path) from None


# -- shards ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Shards(Sequence[ActivationCache]):
    """Captures in a directory: a sequence of caches, mapped when asked for.

    Attributes
    ----------
    directory : Path
    spans : list of (int, int)
        Which texts each shard holds, [first, end).
    """

    directory: Path
    spans: list[tuple[int, int]]

    def path(self, i: int) -> Path:
        """File of a shard."""
        return self.directory / f"shard-{i:05d}.safetensors"

    @property
    def missing(self) -> list[int]:
        """Shards that are not there yet."""
        return [i for i in range(len(self)) if not self.path(i).exists()]

    def __len__(self) -> int:
        return len(self.spans)

    def __getitem__(self, i: Any) -> Any:
        if isinstance(i, slice):
            return [self[k] for k in range(len(self))[i]]
        if not -len(self) <= i < len(self):
            raise IndexError(f"shard is {i}, there are {len(self)}")
        return ActivationCache.load(self.path(i % len(self)))

    def __iter__(self) -> Iterator[ActivationCache]:
        return (self[i] for i in range(len(self)))


def open_shards(directory: str | Path) -> Shards:
    """Shards written by `Model.capture_to`, finished or not.

    Raises
    ------
    CheckpointError
        When the directory has no index or a damaged one.
    """
    path = Path(directory) / INDEX
    index = read_json(path)
    try:
        if index["version"] != VERSION:
            raise ValueError(f"version {index['version']}")
        return Shards(Path(directory), [(int(a), int(b)) for a, b in index["spans"]])
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"index of shards is damaged: {error}", file=path) from None


def _digest(edit: Edit) -> list[str]:
    """What an edit is: its kind and every field, arrays and caches by their bytes."""

    def of(value: Any) -> str:
        if isinstance(value, ActivationCache):
            parts = [np.ascontiguousarray(a).view(np.uint8).tobytes() for _, a in value.blocks]
            return hashlib.sha256(b"".join([repr(value.token_ids).encode(), *parts])).hexdigest()
        if isinstance(value, np.ndarray):
            return f"{value.dtype}{value.shape}" + hashlib.sha256(np.ascontiguousarray(value).tobytes()).hexdigest()
        if callable(value):
            return str(getattr(value, "__qualname__", type(value).__name__))
        return repr(value)

    return [type(edit).__name__, *(f"{f.name}={of(getattr(edit, f.name))}" for f in fields(edit))]


@dataclass(frozen=True)
class ShardJob:
    """A capture of many texts, cut into shards before it begins."""

    model: Model
    sequences: list[list[int]]
    names_filter: Filter | None
    pos: Positions
    steps: Sequence[int] | None
    dtype: CaptureDtype
    n_steps: int
    edits: Sequence[Edit]
    shard_bytes: int

    def plan(self, lengths: Sequence[int]) -> CapturePlan:
        """What sequences of these lengths need together."""
        return CapturePlan(self.model.config, self.n_steps, lengths, self.names_filter, pos=self.pos, steps=self.steps, dtype=self.dtype)

    def spans(self) -> list[tuple[int, int]]:
        """Runs of texts whose padded arrays stay within the size of a shard; at least one text each."""
        size_of: dict[int, int] = {}
        out, first, longest = [], 0, 0
        for i, ids in enumerate(self.sequences):
            most = max(longest, len(ids))
            if most not in size_of:
                size_of[most] = self.plan([most]).nbytes
            if i > first and (i - first + 1) * size_of[most] > self.shard_bytes:
                out.append((first, i))
                first, most = i, len(ids)
            longest = most
        return [*out, (first, len(self.sequences))]

    def fingerprint(self) -> str:
        """Of everything that the shards depend on, except the weights' values."""
        plan = self.plan([max(map(len, self.sequences))])
        what = [VERSION, str(self.model.config), self.model.compute, self.model.kv_dtype, self.sequences, repr(self.pos), self.dtype,
                self.n_steps, self.shard_bytes, [(b.point.short, b.steps, b.layers) for b in plan.blocks],
                [_digest(e) for e in self.edits]]  # fmt: skip
        return hashlib.sha256(json.dumps(what).encode()).hexdigest()

    def check_positions(self, spans: Sequence[tuple[int, int]]) -> None:
        """Refuse positions that some shard lacks before the first is computed."""
        lengths = [len(ids) for ids in self.sequences]
        every = Target(names_of(self.model.config, self.n_steps), sorted(set(lengths)), sorted(set(lengths)))
        for edit in self.edits:
            every.positions(edit.pos)
        for first, end in spans:
            position_map(self.pos, lengths[first:end])

    def run(self, directory: Path, *, resume: bool, progress: bool) -> Shards:
        """Write the shards that are not there."""
        from tqdm.auto import tqdm

        spans = self.spans()
        self.check_positions(spans)
        directory.mkdir(parents=True, exist_ok=True)
        shards, mark, index = Shards(directory, spans), self.fingerprint(), directory / INDEX
        if index.exists() and resume and read_json(index).get("fingerprint") != mark:
            raise ValueError(f"{directory} holds another capture (other texts, points or settings): take another directory or resume=False")
        for leftover in [*directory.glob(".*.tmp"), *([] if resume else directory.glob("shard-*.safetensors"))]:
            leftover.unlink()
        replace_file(index, [json.dumps({"version": VERSION, "fingerprint": mark, "spans": shards.spans}).encode()])
        for i in tqdm(shards.missing, desc="shards", disable=not progress):
            first, end = shards.spans[i]
            self._shard(first, end).save(shards.path(i))
        return shards

    def _shard(self, first: int, end: int) -> ActivationCache:
        run = Forward(self.model, self.sequences[first:end], self.n_steps, "none", edits=self.edits)
        run.capture = self.plan(run.lengths)
        run.capture.check()
        return run.cache(run.run())
