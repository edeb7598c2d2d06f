"""The header of one safetensors file: a length, a JSON object, then bytes without gaps.

The format (huggingface.co/docs/safetensors): 8 bytes little-endian length n, n bytes of JSON that map names to dtype,
shape and [begin, end) offsets into what follows, in the order of the offsets as every writer of the format leaves them.
Everything is checked before any tensor byte is read. The header's length and punctuation bound what parsing it may
allocate: less than the file's own size, or a few MiB for a small file.
"""

from __future__ import annotations

import os
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ouro.errors import CheckpointError
from ouro.files import parse_json, read_exactly

MAX_HEADER_BYTES = 100 << 20  # of the format
SMALL_HEADER_BYTES = 1 << 20  # always allowed; beyond it a header may be an eighth of its file
DTYPE_BYTES = {"BF16": 2, "F16": 2, "F32": 4}


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """Where a tensor lies: `offset` and `nbytes` are bytes in `file`, `dtype` is BF16, F16 or F32."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: Path
    offset: int
    nbytes: int


def read_header(fd: int, path: Path) -> list[TensorInfo]:
    """Check the header of an open file and list its tensors in file order.

    Raises
    ------
    CheckpointError
        Naming the file, the tensor, what was found and what was expected.
    """
    size = os.fstat(fd).st_size
    if size < 8:
        raise CheckpointError("file is too short for a safetensors header", file=path, found=f"{size} bytes")
    (length,) = struct.unpack("<Q", read_exactly(fd, 0, 8, path))
    limit = min(MAX_HEADER_BYTES, size - 8, max(SMALL_HEADER_BYTES, size // 8))
    if length > limit:
        raise CheckpointError("header is longer than it may be", file=path, found=f"{length} bytes",
                              expected=f"at most {limit}")  # fmt: skip
    header = parse_json(read_exactly(fd, 8, length, path), path, what="JSON header", budget=max(4 << 20, size // 4))
    if not isinstance(header, dict):
        raise CheckpointError("header is not a JSON object", file=path, found=type(header).__name__)
    _check_metadata(header.pop("__metadata__", None), path)
    infos = [_tensor(name, entry, path, 8 + length) for name, entry in header.items()]
    _check_layout(infos, path, 8 + length, size)
    return infos


def _check_metadata(found: Any, path: Path) -> None:
    if found is None:
        return
    if not isinstance(found, dict) or not all(isinstance(v, str) for v in found.values()):
        raise CheckpointError("header: __metadata__ is not an object of strings", file=path)


def _natural(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 1 << 62


def _tensor(name: str, entry: Any, path: Path, base: int) -> TensorInfo:
    def fail(what: str, found: object = None, expected: object = None) -> CheckpointError:
        return CheckpointError(what, file=path, tensor=name, found=found, expected=expected)

    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise fail("header entry is malformed", str(entry)[:80], "dtype, shape and data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPE_BYTES:
        raise fail("unsupported dtype", str(dtype)[:40], ", ".join(DTYPE_BYTES))
    if not isinstance(shape, list) or len(shape) > 8 or not all(_natural(n) for n in shape):
        raise fail("malformed shape", str(shape)[:80], "a list of sizes")
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(_natural(n) for n in offsets):
        raise fail("malformed data_offsets", str(offsets)[:80], "[begin, end]")
    begin, end = offsets
    nbytes = DTYPE_BYTES[dtype]
    for n in shape:
        nbytes *= n
    if end < begin or end - begin != nbytes:
        raise fail("offsets do not fit dtype and shape", f"{end - begin} bytes", f"{nbytes} for {dtype} {shape}")
    return TensorInfo(name, dtype, tuple(shape), path, base + begin, nbytes)


def _check_layout(infos: list[TensorInfo], path: Path, base: int, size: int) -> None:
    """Tensors must tile the rest of the file in the order of the header: no overlap, no hole, nothing behind."""
    at = base
    for info in infos:
        if info.offset != at:
            what = "overlaps the one before or is out of order" if info.offset < at else "leaves a hole before it or is out of order"
            raise CheckpointError(f"tensor {what}", file=path, tensor=info.name,
                                  found=f"offset {info.offset - base}", expected=at - base)  # fmt: skip
        at += info.nbytes
        if at > size:
            raise CheckpointError("tensor reaches beyond the file (truncated?)", file=path, tensor=info.name,
                                  found=f"{size} bytes in the file", expected=f"at least {at}")  # fmt: skip
    if at != size:
        raise CheckpointError("bytes behind the last tensor", file=path, found=f"{size} bytes", expected=at)
