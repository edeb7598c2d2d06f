"""Checkpoints made to harm: what would hang, take much memory, or slip through as something else."""

import json
import os
import struct
import time
import tracemalloc

import pytest
from builders import copy_fixture, edit_config, read_parts, write_parts
from hypothesis import given, settings
from hypothesis import strategies as st
from paths import FIXTURES, TINY

import ouro
from ouro.chat import ChatTemplate
from ouro.checkpoint import open_checkpoint
from ouro.checkpoint.header import read_header
from ouro.config import ModelConfig, load_config
from ouro.files import BYTES_PER_MARK, open_regular, parse_json
from ouro.tokenizer import Tokenizer


def header_of(path):
    fd = open_regular(path)
    try:
        return read_header(fd, path)
    finally:
        os.close(fd)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"])
@pytest.mark.parametrize("kind", ["loop", "folder", "pipe", "dangling"])
def test_nothing_but_regular_files(tmp_path, name, kind):
    """Also a pipe that nobody writes to must not hang, and a broken link is not a missing file."""
    path = tmp_path / name
    for other in ("config.json", "model.safetensors"):
        if other != name:
            (tmp_path / other).symlink_to(TINY / other)
    if kind == "folder":
        path.mkdir()
    elif kind == "pipe":
        os.mkfifo(path)
    else:
        path.symlink_to(path if kind == "loop" else tmp_path / "nowhere")
    opener = {"tokenizer.json": Tokenizer.from_directory, "config.json": load_config, "model.safetensors": open_checkpoint}
    with pytest.raises(ouro.CheckpointError) as caught:
        opener.get(name, ChatTemplate.from_directory)(tmp_path)
    assert caught.value.file == str(path)


def test_device_refused(tmp_path):
    (tmp_path / "config.json").symlink_to("/dev/zero")
    with pytest.raises(ouro.CheckpointError, match="not a regular file"):
        load_config(tmp_path)


BULKY = {
    "lists": b"[" + b"[]," * 300_000 + b"[]]",
    "numbers": b"[" + b"1.5," * 250_000 + b"1]",
    "deep": b"[" * 900_000,
    "keys": b"{" + b",".join(b'"%d":{}' % i for i in range(80_000)) + b"}",
    "wide characters": b'{"' + b"a" * 900_000 + "🦜".encode() + b'":1}',
    "digits": b'{"a":' + b"9" * 900_000 + b"}",
}


@pytest.mark.parametrize("kind", BULKY)
def test_bulky_header_stays_small_in_memory(tmp_path, kind):
    """A megabyte of header in a file of that size: refused within a few MiB, where `json.loads` alone takes up to 60."""
    path = tmp_path / "model.safetensors"
    write_parts(path, BULKY[kind], b"")
    tracemalloc.start()
    try:
        with pytest.raises(ouro.CheckpointError):
            header_of(path)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 16 << 20


@pytest.mark.parametrize("item", [b"[]", b'{"a":1}', b'{"a":[]}', b"1.5", b'"abc"'])
def test_budget_is_an_estimate_from_above(tmp_path, item):
    """JSON that just keeps the budget takes less than that, its text aside."""
    marks = sum(item.count(m) for m in (b"[", b"{", b",", b":")) + 1
    budget = 4 << 20
    data = b"[" + b",".join([item] * (budget // BYTES_PER_MARK // marks)) + b"]"
    tracemalloc.start()
    try:
        parse_json(data, tmp_path, budget=budget)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < budget + 2 * len(data)


def test_header_that_is_most_of_a_large_file(tmp_path):
    path = tmp_path / "model.safetensors"
    write_parts(path, b" " * (3 << 20) + b"{}", b"")
    with pytest.raises(ouro.CheckpointError, match="longer than it may be"):
        header_of(path)


def test_duplicate_among_many_keys_is_found_quickly(tmp_path):
    data = b"{" + b",".join(b'"%d":0' % i for i in range(150_000)) + b',"7":0}'
    begin = time.perf_counter()
    with pytest.raises(ouro.CheckpointError, match="duplicate key '7'"):
        parse_json(data, tmp_path)
    assert time.perf_counter() - begin < 10  # counting each key in a list would take minutes


def test_header_out_of_order(tmp_path):
    d = copy_fixture("tiny-one-step", tmp_path)
    header, data = read_parts(d / "model.safetensors")
    write_parts(d / "model.safetensors", dict(reversed(header.items())), data)
    with pytest.raises(ouro.CheckpointError, match="order"):
        open_checkpoint(d)


def test_hole(tmp_path):
    d = copy_fixture("tiny-one-step", tmp_path)
    header, data = read_parts(d / "model.safetensors")
    last = [n for n in header if n != "__metadata__"][-1]
    at = header[last]["data_offsets"][0]
    header[last]["data_offsets"] = [n + 4 for n in header[last]["data_offsets"]]
    write_parts(d / "model.safetensors", header, data[:at] + b"\0" * 4 + data[at:])
    with pytest.raises(ouro.CheckpointError, match="hole"):
        open_checkpoint(d)


def test_head_beside_tied_embeddings(tmp_path):
    d = copy_fixture("tiny-one-step", tmp_path)
    tied = load_config(d).tie_word_embeddings
    edit_config(d, tie_word_embeddings=not tied)
    with pytest.raises(ouro.CheckpointError) as caught:
        open_checkpoint(d)
    assert caught.value.tensor == "lm_head.weight"


def test_tensor_in_two_shards(tmp_path):
    d = copy_fixture("tiny-sharded", tmp_path)
    one, two = (d / f"model-0000{i}-of-00003.safetensors" for i in (1, 2))
    two.write_bytes(one.read_bytes())
    with pytest.raises(ouro.CheckpointError, match="two shards"):
        open_checkpoint(d)


@pytest.mark.parametrize("name", ["\ud800.safetensors", "missing.safetensors", "a" * 300 + ".safetensors"])
def test_index_with_names_no_file_has(tmp_path, name):
    d = copy_fixture("tiny-sharded", tmp_path)
    path = d / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["weight_map"]["model.norm.weight"] = name
    path.write_text(json.dumps(index))
    with pytest.raises(ouro.CheckpointError):
        open_checkpoint(d)


def test_long_names_make_short_messages(tmp_path):
    d = copy_fixture("tiny-one-step", tmp_path)
    write_parts(d / "model.safetensors", {"x" * 500_000: {"dtype": "I8", "shape": [1], "data_offsets": [0, 1]}}, b"\0")
    with pytest.raises(ouro.CheckpointError) as caught:
        open_checkpoint(d)
    assert len(str(caught.value)) < 1000


@pytest.mark.parametrize("value", ["y" * 10**6, ["y"] * 10**6, {"a": ["y"] * 10**6}], ids=["text", "list", "object"])
def test_long_values_make_short_messages(value):
    with pytest.raises(ouro.CheckpointError) as caught:
        ModelConfig.from_dict(GOOD | {"hidden_size": value}, TINY)
    assert len(str(caught.value)) < 1000 and caught.value.found == value


def test_directory_name_that_no_file_system_takes():
    with pytest.raises(ouro.CheckpointError, match="no such directory"):
        open_checkpoint("x" * 300)


def test_closed_checkpoint_does_not_read():
    with open_checkpoint(TINY) as c:
        pass
    with pytest.raises(ValueError, match="not open"):
        c.read_f32("model.norm.weight")


def test_no_descriptor_is_left_open(tmp_path):
    d = copy_fixture("tiny-sharded", tmp_path)
    edit_config(d, vocab_size=255)
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(5):
        with pytest.raises(ouro.CheckpointError):
            open_checkpoint(d)
    assert len(os.listdir("/proc/self/fd")) == before


@pytest.mark.parametrize(("tensor", "value"), [("model.early_exit_gate.bias", "nan"), ("model.early_exit_gate.weight", "inf"),
                                               ("model.layers.0.post_attention_layernorm_2.weight", "-inf")])  # fmt: skip
def test_values_not_finite(tmp_path, tensor, value):
    d = copy_fixture("tiny-one-step", tmp_path)
    header, data = read_parts(d / "model.safetensors")
    at = header[tensor]["data_offsets"][1] - 4
    write_parts(d / "model.safetensors", header, data[:at] + struct.pack("<f", float(value)) + data[at + 4 :])
    with open_checkpoint(d) as c, pytest.raises(ouro.CheckpointError) as caught:
        c.check_small_tensors()
    assert caught.value.tensor == tensor


# Fuzz of the config and of the shard index: the outcome is a value or a CheckpointError.

GOOD = json.loads((FIXTURES / "official" / "config-1.4b.json").read_text())
VALUE = st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=5), st.lists(st.integers(), max_size=2),
                  st.dictionaries(st.sampled_from(["rope_type", "rope_theta", "factor"]), st.integers() | st.text(max_size=4)),
                  st.integers(10**300, 10**320))  # fmt: skip


@settings(max_examples=400, deadline=None)
@given(st.dictionaries(st.sampled_from([*GOOD, "rope_parameters", "mlp_bias", "dtype"]), VALUE, max_size=4),
       st.sets(st.sampled_from([*GOOD])))  # fmt: skip
def test_config_of_any_values(changes, gone):
    found = {k: v for k, v in (GOOD | changes).items() if k not in gone or k in changes}
    try:
        config = ModelConfig.from_dict(found, TINY)
    except ouro.CheckpointError as error:
        assert error.file == str(TINY)
        return
    assert 0 < config.rope_theta < 1e12 and config.d_head % 2 == 0 and config.n_heads % config.n_key_value_heads == 0
    assert all(type(n) is int and n > 0 for n in (config.n_layers, config.n_steps, config.d_model, config.d_mlp, config.n_ctx))


SHARDED = {p.name: p.read_bytes() for p in (FIXTURES / "tiny-sharded").iterdir() if p.suffix != ".npz"}


@settings(max_examples=150, deadline=None)
@given(st.sampled_from(sorted(SHARDED)), st.integers(0, 3000), st.binary(min_size=1, max_size=9), st.sampled_from(["over", "into", "cut"]))
def test_mutated_shards_and_index(tmp_path_factory, name, at, junk, how):
    d = tmp_path_factory.mktemp("fuzz")
    for other, blob in SHARDED.items():
        (d / other).write_bytes(blob)
    blob = SHARDED[name]
    at %= len(blob)
    rest = {"over": blob[at + len(junk) :], "into": blob[at:], "cut": b""}[how]
    (d / name).write_bytes(blob[:at] + (b"" if how == "cut" else junk) + rest)
    try:
        with open_checkpoint(d) as c:
            c.check_small_tensors()
            assert set(c.tensors) == set(json.loads(SHARDED["model.safetensors.index.json"])["weight_map"])
    except ouro.CheckpointError as error:
        assert str(error)
