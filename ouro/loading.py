"""From a directory to a model in memory: a checkpoint is read once, piece by piece, by a few threads; a packed one mapped."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Literal, NamedTuple, cast, get_args

import numpy as np
from numpy.typing import NDArray

from ouro import _core
from ouro.checkpoint import LAYER_TENSORS, Checkpoint, TensorInfo, open_checkpoint
from ouro.checkpoint.schema import core_tensor
from ouro.config import ModelConfig
from ouro.errors import CheckpointError, MemoryLimitError
from ouro.packed import is_packed, open_packed

Compute = Literal["float32", "bfloat16", "int8", "int4"]
KVDtype = Literal["float32", "bfloat16", "int8"]
Part = Literal["o", "down", "head", "embed"]
Format = Literal["bfloat16", "int8", "int4"]
CHOICES: dict[str, tuple[Format, ...]] = {
    "o": ("int8", "int4"), "down": ("int8", "int4"), "head": ("bfloat16", "int8"), "embed": ("bfloat16", "int8"),
}  # fmt: skip
Quantiser = Callable[[Checkpoint, Sequence[str]], Iterable[tuple[str, NDArray[np.uint16], NDArray[np.int8]]]]
LAYER_MATRICES = [name for name in LAYER_TENSORS if name.endswith("_proj.weight")]
PIECE_BYTES = 4 << 20  # of a tensor, read and packed at a time
USUAL_HEAD = {"int8": "bfloat16", "int4": "int8"}  # weight_formats
PART_OF = {"embed_tokens": "embed", "lm_head": "head", "o_proj": "o", "down_proj": "down"}
DTYPE = {"BF16": 0, "F16": 1, "F32": 2}


def blas_library() -> Path | None:
    """The OpenBLAS that came with the package, or None."""
    folder = Path(__file__).parent / "_libs"
    found = sorted(folder.glob("libscipy_openblas*.so*")) if folder.is_dir() else []
    return found[0] if found else None


def part_of(name: str) -> str:
    """The part of `formats` that a tensor belongs to."""
    return next((part for key, part in PART_OF.items() if key in name), "layers")


def weight_formats(checkpoint: Checkpoint, compute: Compute, chosen: Mapping[Part, Format] | None = None) -> dict[str, str]:
    """How each part is stored: float32 keeps what the checkpoint has; head and embedding never below 8 bits."""
    exact16 = all(t.dtype == "BF16" for t in checkpoint.tensors.values())
    wide = "bfloat16" if exact16 or compute != "float32" else "float32"
    layers = {"float32": wide, "bfloat16": "bfloat16", "int8": "int8", "int4": "int4"}[compute]
    table = "int8" if compute == "int4" else wide
    formats: dict[str, str] = {"layers": layers, "o": layers, "down": layers, "head": table, "embed": table}
    if chosen:
        formats.update({str(part): str(name) for part, name in chosen.items()})
    if checkpoint.config.tie_word_embeddings:
        formats["embed"] = formats["head"]
    return formats


def _pieces(info: TensorInfo) -> Iterator[tuple[int, int, int]]:
    """(first row, start byte, bytes) of pieces of whole rows."""
    rows = info.shape[0] if len(info.shape) == 2 else 1
    row_bytes = info.nbytes // rows
    step = max(1, PIECE_BYTES // row_bytes)
    for row in range(0, rows, step):
        yield row, row * row_bytes, min(step, rows - row) * row_bytes


def _pack(checkpoint: Checkpoint, core: _core.Model, readers: int, skip: Collection[str] = ()) -> None:
    local = threading.local()

    def work(job: tuple[TensorInfo, int, int, int]) -> int:
        info, row, start, nbytes = job
        if not hasattr(local, "buffer") or len(local.buffer) < nbytes:
            local.buffer = bytearray(max(nbytes, PIECE_BYTES))
        view = memoryview(local.buffer)[:nbytes]
        checkpoint.read_into(info, start, view)
        tensor, layer = core_tensor(info.name)
        core.put(tensor, layer, DTYPE[info.dtype], row, view)
        return nbytes

    from tqdm.auto import tqdm  # a quarter of the time of `import ouro` otherwise

    jobs = [(info, *piece) for info in checkpoint.tensors.values() if info.name not in skip for piece in _pieces(info)]
    with ThreadPoolExecutor(readers) as crew, tqdm(
        total=sum(job[-1] for job in jobs), unit="B", unit_scale=True, desc="loading", delay=1.0, leave=False
    ) as bar:
        try:
            for nbytes in crew.map(work, jobs):
                bar.update(nbytes)
        except BaseException:
            crew.shutdown(wait=True, cancel_futures=True)
            raise


class Loaded(NamedTuple):
    """A model ready to run, what it is, how its products are done and the seconds that loading took."""

    core: _core.Model
    config: ModelConfig
    compute: Compute
    kv_dtype: KVDtype
    seconds: float


def _check_arguments(compute: str | None, exact: bool, threads: int | None, formats: Mapping[Part, Format] | None) -> None:
    if compute is not None and compute not in get_args(Compute):
        raise ValueError(f"compute is {compute!r}, expected one of {', '.join(get_args(Compute))}")
    if threads is not None and not 1 <= threads <= 1024:
        raise ValueError(f"threads is {threads}, expected 1 to 1024")
    if not exact and compute != "float32":
        raise ValueError(f"exact=False lets float32 products go through BLAS; it does nothing for compute={compute!r}")
    _check_formats(compute, formats)


def _check_formats(compute: str | None, formats: Mapping[Part, Format] | None) -> None:
    if not formats:
        return
    if compute not in ("int8", "int4"):
        raise ValueError(f"formats chooses how parts of an int8 or int4 model are stored; it does nothing for compute={compute!r}")
    for part, name in formats.items():
        if name not in CHOICES.get(part, ()):
            allowed = "; ".join(f"{p}: {' or '.join(f)}" for p, f in CHOICES.items())
            raise ValueError(f"formats has {part!r}: {name!r}, expected {allowed}")


def _check_kv_dtype(kv_dtype: str | None, compute: str) -> KVDtype:
    kv = kv_dtype or ("float32" if compute == "float32" else "bfloat16")
    if kv not in get_args(KVDtype) or (kv == "float32") != (compute == "float32"):
        raise ValueError(f"kv_dtype is {kv!r}, expected float32 with float32 compute, else bfloat16 or int8")
    return cast(KVDtype, kv)


def _from_checkpoint(
    directory: Path, compute: Compute, formats: Mapping[Part, Format] | None, threads: int | None, isa: str | None,
    quantiser: Quantiser | None,
) -> tuple[_core.Model, ModelConfig]:  # fmt: skip
    """Pack a directory in the released format; the core lacks finish()."""
    with open_checkpoint(directory) as checkpoint:
        checkpoint.check_small_tensors()
        c, stored = checkpoint.config, weight_formats(checkpoint, compute, formats)
        need = packed_bytes(checkpoint, stored)
        if need > _core.available_memory():
            raise MemoryLimitError(f"the packed weights need about {need} bytes, {_core.available_memory()} are available")
        core = _core.Model(
            c.n_layers, c.n_steps, c.n_heads, c.n_key_value_heads, c.d_model, c.d_head, c.d_mlp, c.d_vocab, c.n_ctx,
            c.eps, c.rope_theta, c.tie_word_embeddings, compute, **stored, isa=isa,
        )  # fmt: skip
        given = set()
        if quantiser is not None:
            for name, scales, q in quantiser(checkpoint, [n for n in LAYER_MATRICES if stored[part_of(n)] == "int4"]):
                core.put_int4(*core_tensor(name), scales, q)
                given.add(name)
        _pack(checkpoint, core, min(4, threads or _core.cpu_count()), given)
    return core, c


def load_core(
    directory: Path,
    *,
    compute: Compute | None,
    exact: bool,
    threads: int | None,
    kv_dtype: KVDtype | None,
    isa: str | None,
    formats: Mapping[Part, Format] | None,
    mmap: bool,
    verify: bool,
    quantiser: Quantiser | None = None,
) -> Loaded:
    """A model from a directory, packed or in the released format; arguments as in `ouro.load`.

    `quantiser(checkpoint, parts)` gives (tensor name, scales, q) for the int4 matrices `parts` of every layer, instead of the
    search while packing (ouro/calibration.py).
    """
    _check_arguments(compute, exact, threads, formats)
    if quantiser is not None and compute != "int4":
        raise ValueError(f"calibrate chooses int4 weights; it does nothing for compute={compute!r}")
    blas = None if exact else blas_library()
    if not exact and blas is None:
        raise OSError("exact=False needs the OpenBLAS that ships with the wheels; this installation has none")
    begin = time.perf_counter()
    if is_packed(directory):
        if formats or quantiser is not None:
            raise ValueError(f"formats and calibrate choose how weights are stored while packing; {directory} is packed already")
        core, config, packed_for = open_packed(directory, compute=compute, isa=isa, mmap=mmap, verify=verify, threads=threads)
        used = cast(Compute, packed_for)
        kv = _check_kv_dtype(kv_dtype, used)
    else:
        used = compute or "bfloat16"
        kv = _check_kv_dtype(kv_dtype, used)
        core, config = _from_checkpoint(directory, used, formats, threads, isa, quantiser)
    core.finish(threads or 0, kv, None if blas is None else str(blas))
    return Loaded(core, config, used, kv, time.perf_counter() - begin)


def packed_bytes(checkpoint: Checkpoint, formats: dict[str, str]) -> int:
    """About how many bytes the packed weights take."""
    size = {"float32": 4.0, "bfloat16": 2.0, "int8": 1.016, "int4": 0.532}
    total = 0.0
    for name, info in checkpoint.tensors.items():
        count = info.nbytes // (4 if info.dtype == "F32" else 2)
        total += count * size[formats[part_of(name)]]
    return int(total)


__all__ = ["CheckpointError", "Compute", "Format", "KVDtype", "Part", "blas_library", "load_core"]
