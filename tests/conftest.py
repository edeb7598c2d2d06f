"""Models are loaded once for all tests."""

import os
from functools import cache

import numpy as np
import pytest
from paths import FIXTURES, TINY

import ouro

os.environ["PYTHONSAFEPATH"] = "1"  # processes that tests start import what is installed, not the folder they start in

RAGGED = ["One day Ann took the cup to the cave.", "Bob is the boss of Cid.", "Dora"]
"""Texts of different lengths: what lies beyond the shorter ones must never count."""


@cache
def load(name: str, compute: str = "float32", **arguments):
    return ouro.load(TINY if name == "trained" else FIXTURES / name, compute=compute, **arguments)


@cache
def reference(name: str):
    return dict(np.load(FIXTURES / name / "reference.npz"))


@pytest.fixture(scope="session")
def tiny():
    return load("trained", "bfloat16")
