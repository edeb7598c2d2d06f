"""A checkpoint directory: config, one file or shards, every tensor checked against the config before it is read."""

from __future__ import annotations

import os
from pathlib import Path
from types import TracebackType
from typing import Self

import numpy as np
from numpy.typing import NDArray

from ouro.checkpoint.header import TensorInfo, read_header
from ouro.checkpoint.schema import expected_shapes
from ouro.config import ModelConfig, load_config
from ouro.errors import CheckpointError
from ouro.files import is_directory, open_regular, read_json

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"


class Checkpoint:
    """An open checkpoint. Use as a context manager, or call `close`.

    Attributes
    ----------
    directory : Path
    config : ModelConfig
    tensors : dict of str to TensorInfo
        Exactly the tensors the config asks for, in file order.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.config: ModelConfig = load_config(directory)
        self.tensors: dict[str, TensorInfo] = {}
        self._fds: dict[Path, int] = {}
        try:
            self._open_files()
            self._check_schema()
        except BaseException:
            self.close()
            raise

    # -- opening ---------------------------------------------------------------------------------------------------

    def _open_files(self) -> None:
        index = self.directory / INDEX
        if os.path.lexists(self.directory / SINGLE) or not os.path.lexists(index):
            self._add_file(self.directory / SINGLE)
            return
        where = self._read_index(index)
        for name in sorted(set(where.values())):
            self._add_file(self.directory / name)
        for tensor, name in where.items():
            info = self.tensors.get(tensor)
            if info is None or info.file.name != name:
                raise CheckpointError("index names a tensor that its shard does not hold", file=index, tensor=tensor,
                                      found=None if info is None else info.file.name, expected=name)  # fmt: skip
        for tensor in self.tensors:
            if tensor not in where:
                raise CheckpointError("shard holds a tensor that the index does not name", file=index, tensor=tensor)

    def _read_index(self, path: Path) -> dict[str, str]:
        where = read_json(path).get("weight_map")
        if not isinstance(where, dict) or not where:
            raise CheckpointError("index has no weight_map", file=path)
        for tensor, name in where.items():
            plain = isinstance(name, str) and name == os.path.basename(name) and name.endswith(".safetensors")
            if not plain or "\0" in name:
                raise CheckpointError("index names something that is not a file of this directory", file=path,
                                      tensor=tensor, found=str(name)[:80], expected="a plain .safetensors file name")  # fmt: skip
        return where

    def _add_file(self, path: Path) -> None:
        fd = open_regular(path)
        self._fds[path] = fd
        for info in read_header(fd, path):
            if info.name in self.tensors:
                raise CheckpointError("tensor stands in two shards", file=path, tensor=info.name,
                                      found=self.tensors[info.name].file.name)  # fmt: skip
            self.tensors[info.name] = info

    def _check_schema(self) -> None:
        shapes = expected_shapes(self.config)
        for name, shape in shapes.items():
            info = self.tensors.get(name)
            if info is None:
                raise CheckpointError("tensor is missing", file=self.directory, tensor=name, expected=f"shape {shape}")
            if info.shape != shape:
                raise CheckpointError("tensor has the wrong shape", file=info.file, tensor=name,
                                      found=info.shape, expected=shape)  # fmt: skip
        for name, info in self.tensors.items():
            if name not in shapes:
                hint = "no lm_head with tied embeddings" if name == "lm_head.weight" else "no such tensor"
                raise CheckpointError("surplus tensor", file=info.file, tensor=name[:120], expected=hint)

    # -- reading ---------------------------------------------------------------------------------------------------

    def read_into(self, info: TensorInfo, start: int, buffer: memoryview) -> None:
        """Fill a writable buffer with bytes [start, start + len) of a tensor. Safe from several threads.

        Raises
        ------
        CheckpointError
            When the file has become shorter since it was opened, or cannot be read.
        """
        if start < 0 or start + buffer.nbytes > info.nbytes:
            raise ValueError(f"bytes {start}..{start + buffer.nbytes} are outside of {info.name} ({info.nbytes} bytes)")
        if info.file not in self._fds:
            raise ValueError(f"{info.file} is not open (any more)")
        view, at = buffer.cast("B"), 0
        while at < view.nbytes:
            try:
                n = os.preadv(self._fds[info.file], [view[at:]], info.offset + start + at)
            except OSError as error:
                raise CheckpointError(f"cannot read: {error.strerror or error}", file=info.file, tensor=info.name) from None
            if n == 0:
                raise CheckpointError("file ended early (did it shrink?)", file=info.file, tensor=info.name,
                                      found=f"{os.fstat(self._fds[info.file]).st_size} bytes",
                                      expected=f"at least {info.offset + info.nbytes}")  # fmt: skip
            at += n

    def read_f32(self, name: str) -> NDArray[np.float32]:
        """One tensor as float32, widened exactly. Meant for small ones."""
        info = self.tensors[name]
        raw = np.empty(info.nbytes, np.uint8)
        self.read_into(info, 0, memoryview(raw.data))
        if info.dtype == "BF16":
            flat = (raw.view("<u2").astype(np.uint32) << 16).view(np.float32)
        else:
            flat = raw.view("<f2" if info.dtype == "F16" else "<f4").astype(np.float32)
        return flat.reshape(info.shape)

    def check_small_tensors(self) -> None:
        """Refuse NaN and infinity in norm and gate weights: one of them would poison every token silently."""
        for name, info in self.tensors.items():
            if ("norm" in name or "gate.weight" in name or "gate.bias" in name) and "mlp" not in name:
                bad = np.count_nonzero(~np.isfinite(self.read_f32(name)))
                if bad:
                    raise CheckpointError("weights are not finite", file=info.file, tensor=name, found=f"{bad} values",
                                          expected="none")  # fmt: skip

    def close(self) -> None:
        """Close the files; reading afterwards is an error."""
        for fd in self._fds.values():
            os.close(fd)
        self._fds.clear()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()


def open_checkpoint(directory: str | Path) -> Checkpoint:
    """Open a directory in the released format and check all of it but the values.

    Raises
    ------
    CheckpointError
        When anything is missing, surplus, damaged or of another model.
    """
    path = Path(directory)
    if not is_directory(path):
        raise CheckpointError("no such directory", file=path)
    return Checkpoint(path)
