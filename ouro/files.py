"""Reading files that nobody has vouched for, and writing files that appear whole or not at all.

Only regular files are opened (a pipe would hang, a device never ends), with a limit on their size, and JSON is parsed
only after a count of its punctuation has shown that the objects it makes will fit a budget: `[[],[],...` takes thirty
times its own length in memory.
"""

from __future__ import annotations

import errno
import json
import os
import re
import stat
from collections import Counter
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any, NoReturn

from ouro.errors import CheckpointError

MAX_JSON_BYTES = 8 << 20  # of config.json and its like; a shard index of 4096 layers takes half of it
BYTES_PER_MARK = 96  # memory of a parsed container, key or value for each punctuation mark of JSON, at most about this
PARSED_BYTES = 64 << 20  # what a small JSON file may grow to


def is_directory(path: Path) -> bool:
    """Whether there is such a directory; a name that no file system takes, or that we may not look at, is none."""
    try:
        return path.is_dir()
    except OSError:
        return False


def open_regular(path: Path) -> int:
    """A read-only descriptor of a regular file; symbolic links are followed, all else is refused."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError as error:
        raise CheckpointError(f"cannot open: {error.strerror or error}", file=path) from None
    except ValueError as error:  # a NUL or a lone surrogate in the name
        raise CheckpointError(f"cannot open: {error}", file=path) from None
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        os.close(fd)
        raise CheckpointError("not a regular file", file=path)
    return fd


def read_exactly(fd: int, offset: int, n: int, path: Path) -> bytes:
    """`n` bytes at `offset`; a file that ends before them is a CheckpointError."""
    parts, at = [], offset
    while at < offset + n:
        try:
            part = os.pread(fd, offset + n - at, at)
        except OSError as error:
            raise CheckpointError(f"cannot read: {error.strerror or error}", file=path) from None
        if not part:
            raise CheckpointError("file ended early (did it shrink?)", file=path, found=f"{at} bytes",
                                  expected=f"at least {offset + n}")  # fmt: skip
        parts.append(part)
        at += len(part)
    return parts[0] if len(parts) == 1 else b"".join(parts)


def read_small(path: Path, limit: int = MAX_JSON_BYTES) -> bytes:
    """All of a regular file of at most `limit` bytes."""
    fd = open_regular(path)
    try:
        size = os.fstat(fd).st_size
        if size > limit:
            raise CheckpointError("file is too long", file=path, found=f"{size} bytes", expected=f"at most {limit}")
        return read_exactly(fd, 0, size, path)
    finally:
        os.close(fd)


def read_text(path: Path, limit: int = MAX_JSON_BYTES) -> str:
    """The same as text, which must be UTF-8."""
    try:
        return read_small(path, limit).decode("utf-8")
    except UnicodeDecodeError as error:
        raise CheckpointError(f"not UTF-8: {error}", file=path) from None


def replace_file(path: Path, chunks: Iterable[bytes | memoryview]) -> None:
    """Write a file that appears whole or not at all. Behind a symbolic link the file is replaced, not the link; a device or a pipe is
    written to, never replaced."""
    try:
        special = not stat.S_ISREG(path.stat().st_mode) and not path.is_dir()
    except FileNotFoundError:
        special = False
    if special:
        with open(path, "wb") as f:
            f.writelines(chunks)
        return
    path = Path(os.path.realpath(path))
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as f:
            f.writelines(chunks)
            f.flush()
            os.fsync(f.fileno())
        os.replace(temporary, path)
    finally:
        with suppress(OSError):
            temporary.unlink()


def check_output(path: Path | None) -> None:
    """OSError now, for a file that could not be written after long work."""
    if path is None:
        return
    if is_directory(path):
        raise IsADirectoryError(errno.EISDIR, "is a directory, expected a file to write", str(path))
    if not is_directory(path.parent):
        raise FileNotFoundError(errno.ENOENT, "no such directory", str(path.parent))
    if not os.access(path if path.exists() else path.parent, os.W_OK):
        raise PermissionError(errno.EACCES, "can not be written", str(path))


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        counts = Counter(name for name, _ in pairs)
        raise ValueError(f"duplicate key {counts.most_common(1)[0][0][:80]!r}")
    return found


def _constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON")


def parse_json(data: bytes, file: Path, *, what: str = "JSON", budget: int = PARSED_BYTES) -> Any:
    """Parse strict JSON.

    Parameters
    ----------
    data
        UTF-8.
    budget
        Bytes of memory the parsed objects may take, by an estimate from above.

    Raises
    ------
    CheckpointError
        When the bytes are not UTF-8 or not JSON, are nested too deeply, hold a key twice, NaN or an infinity, or would
        take more than the budget.
    """
    marks = sum(data.count(mark) for mark in (b"[", b"{", b",", b":"))
    if marks * BYTES_PER_MARK > budget:
        raise CheckpointError(f"{what} would take too much memory", file=file, found=f"{marks} punctuation marks",
                              expected=f"at most {budget // BYTES_PER_MARK}")  # fmt: skip
    try:
        return json.loads(data.decode("utf-8"), object_pairs_hook=_object, parse_constant=_constant)
    except RecursionError:
        raise CheckpointError(f"not valid {what}: nested too deeply", file=file) from None
    except ValueError as error:  # of decoding, of JSON, of the two hooks, or a number of too many digits
        reason = re.sub(r"\s+", " ", str(error))[:200]
        raise CheckpointError(f"not valid {what}: {reason}", file=file) from None


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a small file."""
    found = parse_json(read_small(path), path)
    if not isinstance(found, dict):
        raise CheckpointError("not a JSON object", file=path, found=type(found).__name__)
    return found
