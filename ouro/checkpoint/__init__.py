"""Checkpoint directories in the released format, opened safely: nothing is trusted that has not been checked."""

from ouro.checkpoint.header import TensorInfo
from ouro.checkpoint.reader import Checkpoint, open_checkpoint
from ouro.checkpoint.schema import LAYER_TENSORS, MODEL_TENSORS, expected_shapes

__all__ = ["LAYER_TENSORS", "MODEL_TENSORS", "Checkpoint", "TensorInfo", "expected_shapes", "open_checkpoint"]
