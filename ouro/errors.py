"""Exceptions. Everything that ouro raises on purpose and that is not a plain ValueError or TypeError is here."""

from __future__ import annotations

from os import PathLike

LONGEST = 200  # characters of a value out of a file that a message repeats


def _short(value: object) -> str:
    text = value if isinstance(value, str) else str(value)
    return text if len(text) <= LONGEST else f"{text[:LONGEST]}..."


class OuroError(Exception):
    """Base of all exceptions of this package."""


class CheckpointError(OuroError, ValueError):
    """A checkpoint is not what it should be.

    Parameters
    ----------
    what
        One sentence on what is wrong.
    file, tensor
        Where, as far as it is known.
    found, expected
        What stands there and what should.
    """

    def __init__(
        self,
        what: str,
        *,
        file: str | PathLike[str] | None = None,
        tensor: str | None = None,
        found: object = None,
        expected: object = None,
    ) -> None:
        self.what = what
        self.file = None if file is None else str(file)
        self.tensor = tensor
        self.found = found
        self.expected = expected
        parts = [what]
        if found is not None:
            parts.append(f"found {_short(found)!r}" if isinstance(found, str) else f"found {_short(found)}")
        if expected is not None:
            parts.append(f"expected {expected}")
        where = [f"tensor {_short(tensor)}"] if tensor is not None else []
        where += [f"file {self.file}"] if self.file is not None else []
        super().__init__("; ".join(parts) + (f" ({', '.join(where)})" if where else ""))


class MemoryLimitError(OuroError, MemoryError):
    """Something would need more memory than there is, or than was allowed; the message has the numbers."""


class ContextLengthError(OuroError, ValueError):
    """A sequence would be longer than the model's context; the message has the numbers."""


class UnsupportedError(OuroError, RuntimeError):
    """This machine or build can not do it, such as an instruction set it does not have; the message says what it can."""


class QueueFullError(OuroError, RuntimeError):
    """An engine has as many requests waiting as it was told to hold; try again when some have ended."""


class ReplayError(OuroError, ValueError):
    """A recorded schedule went another way when it was replayed, or belongs to another model; the message has the pass."""
