"""Libraries that only some calls need: imported when used, and named with the extra that installs them when absent."""

from __future__ import annotations

import importlib
from difflib import get_close_matches
from types import ModuleType


def need(module: str, extra: str) -> ModuleType:
    """Import `module`, or say how to get it.

    Raises
    ------
    ImportError
        When it is not installed, with the pip command.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name != module.partition(".")[0]:
            raise  # it is there, and something that it needs is not
        raise ImportError(f"{error.name} is not installed; it comes with: pip install 'ouro-lm[{extra}]'", name=error.name) from None


def did_you_mean(name: str, known: list[str]) -> str:
    """`"; did you mean 'x'?"` when a known name is near, else nothing."""
    near = get_close_matches(name, known, n=1, cutoff=0.6)
    return f"; did you mean '{near[0]}'?" if near else ""
