"""ouro: run, probe, evaluate and train Ouro looped language models on CPUs.

>>> import ouro
>>> model = ouro.load("ouro-tiny")
>>> model.generate("One day Ann took", max_new_tokens=8).text
' a tiny boat to the forest. Ann'
"""

from ouro import exits
from ouro.config import ModelConfig
from ouro.errors import CheckpointError, ContextLengthError, MemoryLimitError, OuroError
from ouro.generation import Generation
from ouro.model import Model, load
from ouro.trace import Trace

__version__ = "0.1.0"
__all__ = [
    "CheckpointError", "ContextLengthError", "Generation", "MemoryLimitError", "Model", "ModelConfig", "OuroError",
    "Trace", "exits", "load",
]  # fmt: skip
