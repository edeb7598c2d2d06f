"""Packed files made to harm: the outcome is a model or a CheckpointError, never a crash or much memory."""

import os
import struct

import numpy as np
import pytest
from conftest import load
from hypothesis import example, given, settings
from hypothesis import strategies as st
from paths import FIXTURES

import ouro
from ouro import _core

pytestmark = pytest.mark.core
MASK = (1 << 64) - 1


def stir(h, word):
    h ^= word
    return (h << 29 | h >> 35) * 0x9E3779B97F4A7C15 & MASK


def ouro_hash(data, seed=0):
    """csrc/base/mapping.c in Python."""
    h = stir(14695981039346656037, seed)
    lanes = [stir(h, i) for i in range(8)]
    padded = data + bytes(-len(data) % 64)
    for at in range(0, len(padded), 64):
        lanes = [stir(lane, word) for lane, word in zip(lanes, struct.unpack_from("<8Q", padded, at), strict=True)]
    h = stir(h, len(data))
    for lane in lanes:
        h = stir(h, lane)
    return h ^ h >> 32


def signed(header):
    """The first 4096 bytes with a checksum that fits them."""
    return header[:112] + struct.pack("<Q", ouro_hash(header[:112])) + header[120:4096]


@pytest.fixture(scope="module")
def packed(tmp_path_factory):
    """A small packed model of every kind: name -> bytes of its weights file."""
    found = {}
    for compute in ("float32", "bfloat16", "int8", "int4"):
        path = tmp_path_factory.mktemp("packed") / "w"
        load("tiny-gqa-tied", compute)._core.save(path)
        found[compute] = path.read_bytes()
    return found


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    """config.json of that model, for weights to be put beside."""
    d = tmp_path_factory.mktemp("hostile")
    (d / "config.json").write_bytes((FIXTURES / "tiny-gqa-tied" / "config.json").read_bytes())
    return d


def put(directory, data):
    (directory / "model.ouro").unlink(missing_ok=True)
    (directory / "model.ouro").write_bytes(data)
    return directory


def test_python_hash_is_the_core_one(packed):
    for data in packed.values():
        assert struct.unpack_from("<Q", data, 112)[0] == ouro_hash(data[:112])


NAMED = {
    "empty": (lambda w: b"", "too short"),
    "short": (lambda w: w[:4095], "too short"),
    "magic": (lambda w: b"X" + w[1:], "not a packed model"),
    "older": (lambda w: w[:8] + b"\1" + w[9:], "version 1, expected 2"),
    "newer": (lambda w: w[:8] + b"\3" + w[9:], "version 3, expected 2"),
    "header": (lambda w: w[:20] + b"\7" + w[21:], "header is damaged"),
    "beyond the header": (lambda w: w[:4000] + b"\7" + w[4001:], "header is damaged"),
    "cut": (lambda w: w[:-1], "bytes, expected"),
    "longer": (lambda w: w + b"\0", "bytes, expected"),
    "weights": (lambda w: w[:-9] + bytes([w[-9] ^ 1]) + w[-8:], "weights are damaged"),
    "first weight": (lambda w: w[:4096] + bytes([w[4096] ^ 128]) + w[4097:], "weights are damaged"),
}


@pytest.mark.parametrize("compute", ["bfloat16", "int8"])
@pytest.mark.parametrize("kind", NAMED)
def test_named_damage(packed, directory, kind, compute):
    change, words = NAMED[kind]
    with pytest.raises(ouro.CheckpointError, match=words) as caught:
        ouro.load(put(directory, change(packed[compute])))
    assert caught.value.file == str(directory / "model.ouro")


@pytest.mark.parametrize("kind", ["loop", "folder", "pipe", "dangling"])
def test_nothing_but_regular_files(tmp_path, kind):
    (tmp_path / "config.json").write_bytes((FIXTURES / "tiny-gqa-tied" / "config.json").read_bytes())
    path = tmp_path / "model.ouro"
    if kind == "folder":
        path.mkdir()
    elif kind == "pipe":
        os.mkfifo(path)
    else:
        path.symlink_to(path if kind == "loop" else tmp_path / "nowhere")
    with pytest.raises(ouro.CheckpointError) as caught:
        ouro.load(tmp_path)
    assert caught.value.file == str(path)


@settings(max_examples=150, deadline=None)
@given(st.sampled_from(["float32", "bfloat16", "int8", "int4"]), st.integers(0, 1 << 30), st.binary(min_size=1, max_size=9),
       st.sampled_from(["over", "into", "cut"]), st.booleans())  # fmt: skip
def test_any_damage_is_found(packed, directory, compute, at, junk, how, header):
    """Every changed byte of the file is noticed."""
    whole = packed[compute]
    at %= 4096 if header else len(whole)
    rest = {"over": whole[at + len(junk) :], "into": whole[at:], "cut": b""}[how]
    data = whole[:at] + (b"" if how == "cut" else junk) + rest
    put(directory, data)
    if data == whole:
        assert ouro.load(directory, threads=1)
        return
    with pytest.raises(ouro.CheckpointError):
        ouro.load(directory, threads=1)


WORD = st.one_of(st.integers(0, 5), st.integers(-(1 << 31), (1 << 31) - 1), st.sampled_from([1 << 20, 1 << 24, 4096, -1, 1 << 30]))


@settings(max_examples=300, deadline=None)
@given(st.sampled_from(["bfloat16", "int8", "int4"]), st.dictionaries(st.integers(0, 27), WORD, min_size=1, max_size=6))
@example("bfloat16", {12: 1})  # a context of one position is a model too
def test_forged_headers(packed, directory, compute, words):
    """Any value in any field, with a checksum that fits: refused, or the sizes are those of the file."""
    whole = packed[compute]
    header = bytearray(whole[:4096])
    for place, value in words.items():
        struct.pack_into("<i", header, 4 * place, value)
    put(directory, signed(bytes(header)) + whole[4096:])
    try:
        found = _core.look_packed(directory / "model.ouro")
    except ouro.CheckpointError:
        return
    assert found["weight_bytes"] == len(whole) - 4096
    try:
        core = _core.open_packed(directory / "model.ouro", found["compute"], None, False, True, 1)
        core.finish(1, "bfloat16")
    except ValueError:  # a CheckpointError is one
        return
    n = min(2, found["n_ctx"])
    core.trace([np.zeros(n, np.int32)], 1, 0, 4)
    if n < 2:
        with pytest.raises(ouro.ContextLengthError, match=f"2 tokens, the context is {n}"):
            core.trace([np.zeros(2, np.int32)], 1, 0, 4)


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(["bfloat16", "int8", "int4"]), st.integers(0, 1 << 30), st.binary(min_size=1, max_size=4000), st.booleans())
def test_garbage_that_nobody_checked(packed, directory, compute, at, junk, sample):
    """verify=False trusts the weights: garbage gives garbage, but nothing outside of the model is touched."""
    whole = packed[compute]
    at = 4096 + at % (len(whole) - 4096)
    put(directory, (whole[:at] + junk + whole[at + len(junk) :])[: len(whole)])
    try:
        model = ouro.load(directory, threads=1, verify=False)
    except ouro.CheckpointError as error:
        assert "finite" in error.what
        return
    arguments = {"temperature": 1.0, "seed": 1, "top_p": 0.9} if sample else {"exit_threshold": 0.5}
    model.generate([1, 2, 3], max_new_tokens=3, eos_token_id=[], **arguments)


def test_huge_claims_take_no_memory(packed, directory):
    header = bytearray(packed["int8"][:4096])
    struct.pack_into("<10i", header, 16, 4096, 4, 4096, 4096, 1 << 20, 256, 1 << 22, 1 << 24, 1 << 24, 0)
    struct.pack_into("<Q", header, 96, 1 << 62)
    with pytest.raises(ouro.CheckpointError, match="bytes, expected"):
        ouro.load(put(directory, signed(bytes(header))))
    with pytest.raises(ouro.CheckpointError, match="bytes, expected"):
        struct.pack_into("<Q", header, 96, MASK)
        ouro.load(put(directory, signed(bytes(header))))
    path = directory / "model.ouro"
    struct.pack_into("<Q", header, 96, 1 << 40)
    put(directory, signed(bytes(header)))
    os.truncate(path, 4096 + (1 << 40))  # a hole: the length fits, the sizes do not
    with pytest.raises(ouro.CheckpointError, match="sizes make"):
        _core.open_packed(path, "int8", None, False, True, 1)
    path.unlink()
