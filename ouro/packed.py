"""Packed models: a directory with `model.ouro` (weights as they stand in memory, docs/format.md), config and tokenizer.

Written once, opened in well under a second by mapping the file. A directory appears whole or not at all.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from ouro import _core
from ouro.config import ModelConfig, load_config
from ouro.errors import CheckpointError, MemoryLimitError

WEIGHTS = "model.ouro"
BESIDE = (
    "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja",
)  # fmt: skip
SIZES = ("n_layers", "n_steps", "n_heads", "n_key_value_heads", "d_model", "d_head", "d_mlp", "d_vocab", "n_ctx", "rope_theta",
         "tie_word_embeddings")  # fmt: skip


def is_packed(directory: Path) -> bool:
    """Whether a directory holds packed weights; they are used in preference to others."""
    return os.path.lexists(directory / WEIGHTS)


def _look(path: Path) -> dict[str, Any]:
    """The checked header of a packed file."""
    try:
        return _core.look_packed(path)
    except CheckpointError as error:
        raise CheckpointError(error.what, file=path) from None
    except (OSError, ValueError) as error:  # a name with a NUL byte is a ValueError
        raise CheckpointError(str(error), file=path) from None


def _choose_compute(found: dict[str, Any], wanted: str | None, path: Path) -> str:
    """Packed weights serve the compute they were packed for; bf16 weights also serve float32."""
    if wanted is None or wanted == found["compute"]:
        return str(found["compute"])
    if {wanted, found["compute"]} <= {"float32", "bfloat16"} and found["layers"] == found["head"] == "bfloat16":
        return wanted
    raise ValueError(
        f"{path} holds weights packed for compute={found['compute']!r}, not {wanted!r}: leave compute out, or load the checkpoint"
        " they were made from"
    )


def _check_config(found: dict[str, Any], config: ModelConfig, path: Path) -> None:
    """The sizes of config.json and of the weights beside it are the same."""
    pairs = [(name, found[name], getattr(config, name)) for name in SIZES]
    pairs.append(("eps", np.float32(found["eps"]), np.float32(config.eps)))
    for name, packed, configured in pairs:
        if packed != configured:
            raise CheckpointError(f"packed weights do not fit config.json: {name} differs", file=path, found=packed, expected=configured)


def open_packed(
    directory: Path, *, compute: str | None, isa: str | None, mmap: bool, verify: bool, threads: int | None
) -> tuple[_core.Model, ModelConfig, str]:
    """Open a packed model.

    Parameters
    ----------
    directory
        As `save_packed` leaves it.
    compute
        None for what the weights were packed for. bfloat16 weights also serve float32.
    mmap
        Use the file's pages where they are, shared with other processes; False reads them into memory of our own, which
        the file can not change any more and which has huge pages.
    verify
        Check the checksum of the weights (all of them are read). Header, sizes, length and norms are always checked.

    Returns
    -------
    core, config, compute

    Raises
    ------
    CheckpointError
        When the file is damaged, of another format version, or does not fit config.json.
    """
    path = directory / WEIGHTS
    config, found = load_config(directory), _look(path)
    _check_config(found, config, path)
    chosen = _choose_compute(found, compute, path)
    if not mmap and found["weight_bytes"] > _core.available_memory():
        raise MemoryLimitError(f"the packed weights need {found['weight_bytes']} bytes, {_core.available_memory()} are available")
    try:
        core = _core.open_packed(path, chosen, isa, not mmap, verify, threads or 0)
    except CheckpointError as error:
        raise CheckpointError(error.what, file=path) from None
    return core, config, chosen


def _write_into(target: Path, core: _core.Model, source: Path) -> None:
    from tqdm.auto import tqdm

    for name in BESIDE:
        if (source / name).is_file():
            shutil.copyfile(source / name, target / name)
    with tqdm(total=core.info()["weight_bytes"], unit="B", unit_scale=True, desc="writing", delay=1.0, leave=False) as bar:
        core.save(target / WEIGHTS, lambda done, total: bar.update(done - bar.n))


def save_packed(core: _core.Model, source: Path, directory: Path) -> None:
    """Write packed weights and copies of the small files of `source` as a new directory.

    Everything is written into a directory of another name beside it, which is renamed when it is complete and on the disk;
    when the process is killed before, that one (`.NAME.*.partial`) is left and can be deleted.

    Raises
    ------
    FileExistsError
        When there is something of that name that is not an empty directory.
    OSError
        When it can not be written.
    """
    if os.path.lexists(directory) and not (directory.is_dir() and not any(directory.iterdir())):
        raise FileExistsError(f"{directory} exists already: choose another name or remove it first")
    parent = directory.absolute().parent
    if not parent.is_dir():
        raise FileNotFoundError(f"no such directory: {parent}")
    made = Path(tempfile.mkdtemp(prefix=f".{directory.name}.", suffix=".partial", dir=parent))
    try:
        _write_into(made, core, source)
        mask = os.umask(0)
        os.umask(mask)
        made.chmod(0o777 & ~mask)
        made.rename(directory)
    except BaseException:
        shutil.rmtree(made, ignore_errors=True)
        raise
