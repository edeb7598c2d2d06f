"""`Model.weight` gives back what the checkpoint holds, as it is stored."""

import numpy as np
import pytest
from conftest import load
from paths import FIXTURES, RANDOM

from ouro.checkpoint import open_checkpoint

pytestmark = pytest.mark.core


@pytest.mark.parametrize("name", RANDOM)
def test_every_tensor_comes_back(name):
    model = load(name, "float32")
    with open_checkpoint(FIXTURES / name) as checkpoint:
        for tensor in checkpoint.tensors:
            np.testing.assert_array_equal(model.weight(tensor), checkpoint.read_f32(tensor), err_msg=tensor)


def test_rows_and_a_tied_head():
    model = load("tiny-gqa-tied", "float32")
    embed = model.weight("model.embed_tokens.weight")
    np.testing.assert_array_equal(model.weight("lm_head.weight", rows=slice(3, 7)), embed[3:7])
    np.testing.assert_array_equal(model.weight("lm_head.weight", rows=slice(-2, None)), embed[-2:])


@pytest.mark.parametrize("compute", ["int8", "int4"])
def test_quantised_rows_are_near(compute):
    name = "model.layers.1.mlp.down_proj.weight"
    exact, stored = load("tiny-mha", "float32").weight(name), load("tiny-mha", compute).weight(name)
    assert 0 < np.abs(stored - exact).max() < np.abs(exact).max() * (0.01 if compute == "int8" else 0.15)


def test_wrong_names_and_rows():
    model = load("tiny-mha", "float32")
    with pytest.raises(KeyError, match=r"near.*model\.norm\.weight"):
        model.weight("model.norm.wait")
    with pytest.raises(ValueError, match="step 1"):
        model.weight("lm_head.weight", rows=slice(0, 8, 2))
    with pytest.raises(ValueError, match="outside of"):
        model._core.weight(0, 0, 300, 100)
    with pytest.raises(ValueError, match="no such tensor"):
        model._core.weight(99, 0, 0, 1)
