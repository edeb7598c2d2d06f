"""From a checkpoint directory to a packed model: each tensor is read once, piece by piece, by a few threads."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Literal, get_args

from ouro import _core
from ouro.checkpoint import Checkpoint, TensorInfo, open_checkpoint
from ouro.checkpoint.schema import core_tensor
from ouro.errors import CheckpointError, MemoryLimitError

Compute = Literal["float32", "bfloat16", "int8", "int4"]
KVDtype = Literal["float32", "bfloat16", "int8"]
PIECE_BYTES = 4 << 20  # of a tensor, read and packed at a time
DTYPE = {"BF16": 0, "F16": 1, "F32": 2}


def blas_library() -> Path | None:
    """The OpenBLAS that came with the package, or None."""
    folder = Path(__file__).parent / "_libs"
    found = sorted(folder.glob("libscipy_openblas*.so*")) if folder.is_dir() else []
    return found[0] if found else None


def weight_formats(checkpoint: Checkpoint, compute: Compute) -> dict[str, str]:
    """How each part is stored: float32 keeps what the checkpoint has; head and embedding never below 8 bits."""
    exact16 = all(t.dtype == "BF16" for t in checkpoint.tensors.values())
    wide = "bfloat16" if exact16 or compute != "float32" else "float32"
    layers = {"float32": wide, "bfloat16": "bfloat16", "int8": "int8", "int4": "int4"}[compute]
    head = "int8" if compute in ("int8", "int4") else layers
    embed = head if checkpoint.config.tie_word_embeddings else wide
    return {"layers": layers, "o": layers, "down": layers, "head": head, "embed": embed}


def _pieces(info: TensorInfo) -> Iterator[tuple[int, int, int]]:
    """(first row, start byte, bytes) of pieces of whole rows."""
    rows = info.shape[0] if len(info.shape) == 2 else 1
    row_bytes = info.nbytes // rows
    step = max(1, PIECE_BYTES // row_bytes)
    for row in range(0, rows, step):
        yield row, row * row_bytes, min(step, rows - row) * row_bytes


def _pack(checkpoint: Checkpoint, core: _core.Model, readers: int) -> None:
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

    jobs = [(info, *piece) for info in checkpoint.tensors.values() for piece in _pieces(info)]
    with ThreadPoolExecutor(readers) as crew, tqdm(
        total=checkpoint.total_bytes, unit="B", unit_scale=True, desc="loading", delay=1.0, leave=False
    ) as bar:
        try:
            for nbytes in crew.map(work, jobs):
                bar.update(nbytes)
        except BaseException:
            crew.shutdown(wait=True, cancel_futures=True)
            raise


def load_core(
    directory: Path, *, compute: Compute, exact: bool, threads: int | None, kv_dtype: KVDtype | None, isa: str | None
) -> tuple[_core.Model, Checkpoint, float]:
    """The packed model of a directory, the (closed) checkpoint it came from, and the seconds it took."""
    if compute not in get_args(Compute):
        raise ValueError(f"compute is {compute!r}, expected one of {', '.join(get_args(Compute))}")
    kv = kv_dtype or ("float32" if compute == "float32" else "bfloat16")
    if kv not in get_args(KVDtype) or (kv == "float32") != (compute == "float32"):
        raise ValueError(f"kv_dtype is {kv!r}, expected float32 with float32 compute, else bfloat16 or int8")
    if threads is not None and not 1 <= threads <= 1024:
        raise ValueError(f"threads is {threads}, expected 1 to 1024")
    if not exact and compute != "float32":
        raise ValueError(f"exact=False lets float32 products go through BLAS; it does nothing for compute={compute!r}")
    blas = None if exact else blas_library()
    if not exact and blas is None:
        raise OSError("exact=False needs the OpenBLAS that ships with the wheels; this installation has none")
    begin = time.perf_counter()
    with open_checkpoint(directory) as checkpoint:
        checkpoint.check_small_tensors()
        c, formats = checkpoint.config, weight_formats(checkpoint, compute)
        need = packed_bytes(checkpoint, formats)
        if need > _core.available_memory():
            raise MemoryLimitError(f"the packed weights need about {need} bytes, {_core.available_memory()} are available")
        core = _core.Model(
            c.n_layers, c.n_steps, c.n_heads, c.n_key_value_heads, c.d_model, c.d_head, c.d_mlp, c.d_vocab, c.n_ctx,
            c.eps, c.rope_theta, c.tie_word_embeddings, compute, **formats, isa=isa,
        )  # fmt: skip
        _pack(checkpoint, core, min(4, threads or _core.cpu_count()))
    core.finish(threads or 0, kv, None if blas is None else str(blas))
    return core, checkpoint, time.perf_counter() - begin


def packed_bytes(checkpoint: Checkpoint, formats: dict[str, str]) -> int:
    """About how many bytes the packed weights take."""
    size = {"float32": 4.0, "bfloat16": 2.0, "int8": 1.016, "int4": 0.532}
    total = 0.0
    for name, info in checkpoint.tensors.items():
        count = info.nbytes // (4 if info.dtype == "F32" else 2)
        part = "embed" if "embed_tokens" in name else "head" if "lm_head" in name else "layers"
        total += count * size[formats[part]]
    return int(total)


__all__ = ["CheckpointError", "Compute", "KVDtype", "blas_library", "load_core"]
