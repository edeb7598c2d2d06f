"""Values of a sweep on disk: written as they come, so that a sweep that was stopped goes on where it was."""

from __future__ import annotations

import io
import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tqdm.auto import tqdm

from ouro.files import replace_file

WRITE_SECONDS = 5.0  # between two writes while values come; a kill loses what came since, and the chunk under way


class ValueStore:
    """An array that fills up, NaN where nothing is known yet.

    Parameters
    ----------
    path
        An .npz file, or None: then nothing is kept.
    key
        What the values are values of. A file with another key is refused.
    size
        Number of values.
    """

    def __init__(self, path: str | Path | None, key: dict[str, Any], size: int) -> None:
        self.path = None if path is None else Path(path)
        self._key = json.dumps(key, sort_keys=True)
        self.values: NDArray[np.float64] = np.full(size, np.nan)
        self.done: NDArray[np.bool_] = np.zeros(size, bool)
        self._written = time.monotonic()
        if self.path is not None and self.path.exists():
            self._read(self.path)

    def _read(self, path: Path) -> None:
        try:
            with np.load(path, allow_pickle=False) as saved:
                key, values, done = str(saved["key"]), saved["values"], saved["done"]
        except (OSError, ValueError, KeyError, EOFError) as error:
            raise ValueError(f"{path} is not a saved sweep: {error}") from None
        if key != self._key:
            raise ValueError(f"{path} holds another sweep: {key[:300]}; expected {self._key[:300]}")
        if values.shape != self.values.shape or done.shape != self.done.shape:
            raise ValueError(f"{path} holds {values.size} values, expected {self.values.size}")
        self.values, self.done = values.astype(np.float64), done.astype(bool)

    def put(self, at: NDArray[np.int64], values: NDArray[np.float64]) -> None:
        """Record values; written to disk now and then."""
        self.values[at] = values
        self.done[at] = True
        if time.monotonic() - self._written > WRITE_SECONDS:
            self.write()

    def fill(self, todo: Sequence[Any], value: Callable[[Any], float], *, desc: str, unit: str, progress: bool) -> None:
        """Compute what is missing, one by one, with a progress bar; written at the end, after an error and after Ctrl-C too."""
        left = np.flatnonzero(~self.done)
        bar = tqdm(total=len(todo), initial=len(todo) - len(left), desc=desc, unit=unit, disable=not progress, delay=1.0, leave=False)
        try:
            with bar:
                for i in left.tolist():
                    self.put(np.array([i]), np.array([value(todo[i])]))
                    bar.update()
        finally:
            self.write()

    def write(self) -> None:
        """Write the file; what stood there is replaced only when all of it is written."""
        self._written = time.monotonic()
        if self.path is None:
            return
        out = io.BytesIO()
        np.savez(out, key=self._key, values=self.values, done=self.done)
        replace_file(self.path, [out.getbuffer()])
