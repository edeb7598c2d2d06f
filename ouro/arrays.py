"""Memory that is kept for its next use: arrays of captures here, which begin on a cache line; key/value pages by each model.

New memory is dear: the system has to find and clear each page when it is first written, and a virtual machine may have to ask
its host for it. Memory that was written before costs a small part of that (docs/microscope.md has figures). So the memory of
captures that nobody refers to any more is kept, up to `KEPT_BYTES`, and used for captures of about the same size; a model keeps
its key/value pages in the same way (csrc/base/stock.h). All is given back when a capture would not fit otherwise, and by
`free_memory`.
"""

from __future__ import annotations

import threading
import weakref
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

KEPT_BYTES = 1 << 30  # most that is kept of freed captures
LEAST_BYTES = 1 << 20  # smaller arrays are left to NumPy
LINE = 64  # bytes of a cache line: whole lines can be written past the caches
_kept: list[NDArray[np.uint8]] = []  # the last freed at the end
_page_keepers: weakref.WeakSet[PageKeeper] = weakref.WeakSet()
_lock = threading.RLock()  # a finalizer may run anywhere, also inside of this module


class PageKeeper(Protocol):
    """What keeps key/value pages: a model."""

    def free_pages(self) -> int:
        """Give them back; their bytes."""


def keeps_pages(keeper: PageKeeper) -> None:
    """Let `free_memory` ask `keeper`, for as long as it lives."""
    with _lock:
        _page_keepers.add(keeper)


class _Lease:
    """Owner of the memory behind one array; when the last view of it is gone the memory is kept."""

    def __init__(self, raw: NDArray[np.uint8], size: int) -> None:
        begin = -raw.ctypes.data % LINE
        self._raw = raw
        self.__array_interface__ = raw[begin : begin + size].__array_interface__

    def __del__(self) -> None:
        if _lock is not None and self._raw.nbytes <= KEPT_BYTES:  # None: the interpreter is ending
            with _lock:
                _kept.append(self._raw)
                while sum(a.nbytes for a in _kept) > KEPT_BYTES:
                    del _kept[0]


def _take(size: int) -> NDArray[np.uint8]:
    """Kept memory of at least `size` bytes and at most a quarter more, or new memory."""
    with _lock:
        for i in range(len(_kept) - 1, -1, -1):
            if size <= _kept[i].nbytes <= size + size // 4:
                return _kept.pop(i)
    return np.empty(size, np.uint8)  # NumPy asks for huge pages from 4 MiB on


def empty(shape: tuple[int, ...], kind: type) -> NDArray[Any]:
    """As `numpy.empty`, beginning on a cache line, in memory that was used before where there is some."""
    size = int(np.prod(shape, dtype=np.int64)) * np.dtype(kind).itemsize
    if size < LEAST_BYTES:
        raw = np.empty(size + LINE, np.uint8)
        return raw[-raw.ctypes.data % LINE :][:size].view(kind).reshape(shape)
    return np.asarray(_Lease(_take(size + LINE), size)).view(kind).reshape(shape)


def kept_bytes() -> int:
    """Bytes kept of freed captures."""
    with _lock:
        return sum(a.nbytes for a in _kept)


def free_memory() -> int:
    """Give back what is kept for its next use, memory of freed captures and key/value pages of every model; the bytes that were.

    >>> import ouro
    >>> ouro.free_memory() >= 0, ouro.free_memory()
    (True, 0)
    """
    with _lock:
        freed = kept_bytes()
        _kept.clear()
        keepers = list(_page_keepers)
    return freed + sum(keeper.free_pages() for keeper in keepers)
