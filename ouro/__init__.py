"""ouro: run, probe, evaluate and train Ouro looped language models on CPUs.

>>> import ouro
>>> model = ouro.load("ouro-tiny")
>>> model.generate("One day Ann took", max_new_tokens=8).text
' a tiny boat to the forest. Ann'
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from ouro import edits, exits
from ouro.arrays import free_memory
from ouro.cache import ActivationCache
from ouro.cache_files import open_shards
from ouro.config import ModelConfig
from ouro.engine import Engine, EngineStats, Handle
from ouro.errors import (
    CheckpointError,
    ContextLengthError,
    MemoryLimitError,
    OuroError,
    QueueFullError,
    ReplayError,
    UnsupportedError,
)
from ouro.generation import Generation
from ouro.labelled import LabelledArray, LabelledSet
from ouro.loop import LoopProgram
from ouro.model import Model, load
from ouro.trace import Trace

if TYPE_CHECKING:
    from ouro import measures, patching, plots, probes, views

__version__ = "0.1.0"
__all__ = [
    "ActivationCache", "CheckpointError", "ContextLengthError", "Engine", "EngineStats", "Generation", "Handle", "LabelledArray",
    "LabelledSet", "LoopProgram", "MemoryLimitError", "Model", "ModelConfig", "OuroError", "QueueFullError", "ReplayError", "Trace",
    "UnsupportedError", "edits", "exits", "free_memory", "load", "measures", "open_shards", "patching", "plots", "probes",
    "views",
]  # fmt: skip

_ON_DEMAND = frozenset({"measures", "patching", "plots", "probes", "views"})  # imported when first asked for: `import ouro` stays light


def __getattr__(name: str) -> Any:
    if name in _ON_DEMAND:
        return import_module(f"ouro.{name}")
    raise AttributeError(f"module 'ouro' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_ON_DEMAND})
