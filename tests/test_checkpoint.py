"""Loading what is out there, and refusing what is not right: one clear CheckpointError, never anything else."""

import json
import os
import struct
import tracemalloc

import numpy as np
import pytest
from builders import copy_fixture, edit_config, read_parts, write_parts
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from paths import FIXTURES, RANDOM, TINY

import ouro
from ouro.checkpoint import open_checkpoint
from ouro.config import load_config


@pytest.mark.parametrize("name", RANDOM)
def test_fixtures_open(name):
    with open_checkpoint(FIXTURES / name) as c:
        c.check_small_tensors()
        assert sum(int(np.prod(t.shape)) for t in c.tensors.values()) == c.config.n_params


def test_official_configs():
    for size, params, layers in (("1.4b", 1_434_652_673, 24), ("2.6b", 2_667_974_657, 48)):
        found = json.loads((FIXTURES / "official" / f"config-{size}.json").read_text())
        config = ouro.ModelConfig.from_dict(found, FIXTURES / "official")
        assert (config.n_params, config.n_layers, config.n_steps) == (params, layers, 4)
        assert config.kv_bytes_per_token() == layers * 4 * 2 * 2048 * 2


CONFIG_CHANGES = [
    ({"model_type": "llama"}, "not an Ouro"), ({"model_type": ...}, "no 'model_type'"), ({"hidden_size": ...}, "no 'hidden_size'"),
    ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope scaling"), ({"use_sliding_window": True}, "sliding"),
    ({"layer_types": ["sliding_attention", "full_attention"]}, "layer_types"), ({"hidden_act": "gelu"}, "activation"),
    ({"num_attention_heads": 3}, "fit"), ({"head_dim": 15}, "head_dim"), ({"hidden_size": True}, "hidden_size"),
    ({"hidden_size": 64.0}, "hidden_size"), ({"hidden_size": -1}, "hidden_size"), ({"rms_norm_eps": "x"}, "rms_norm_eps"),
    ({"total_ut_steps": 0}, "total_ut_steps"), ({"tie_word_embeddings": "no"}, "tie_word"), ({"vocab_size": 10**12}, "vocab_size"),
    ({"rope_theta": ..., "rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4}}, "rope scaling"),
    ({"rope_theta": ...}, "rope_theta"), ({"attention_bias": True}, "attention_bias"), ({"num_hidden_layers": 3}, "layer_types"),
]  # fmt: skip


@pytest.mark.parametrize(("changes", "words"), CONFIG_CHANGES, ids=str)
def test_config_refused(tmp_path, changes, words):
    d = copy_fixture("tiny-mha", tmp_path)
    edit_config(d, **changes)
    with pytest.raises(ouro.CheckpointError, match=words) as caught:
        load_config(d)
    assert "config.json" in str(caught.value)


def test_config_accepts_newer_names_and_extras(tmp_path):
    d = copy_fixture("tiny-mha", tmp_path)
    theta = json.loads((d / "config.json").read_text())["rope_theta"]
    edit_config(d, rope_theta=..., rope_parameters={"rope_type": "default", "rope_theta": theta}, torch_dtype=..., dtype="bfloat16",
                head_dim=..., something_new={"a": [1]})  # fmt: skip
    assert load_config(d) == load_config(FIXTURES / "tiny-mha")


@pytest.mark.parametrize("text", ['{"a": 1, "a": 2}', '{"a": NaN}', "[]", "{", "", "\xff", "[" * 100_000])
def test_config_not_json(tmp_path, text):
    (tmp_path / "config.json").write_text(text, encoding="latin-1")
    with pytest.raises(ouro.CheckpointError):
        load_config(tmp_path)


def damaged(header, data, kind):
    """A header or data with one thing wrong."""
    h, first = json.loads(json.dumps(header)), next(n for n in header if n != "__metadata__")
    names = [n for n in h if n != "__metadata__"]
    if kind == "missing":
        last = max(names, key=lambda n: h[n]["data_offsets"][1])
        begin = h.pop(last)["data_offsets"][0]
        return h, data[:begin]
    if kind == "surplus":
        h["extra"] = {"dtype": "F32", "shape": [1], "data_offsets": [len(data), len(data) + 4]}
        return h, data + b"\0\0\0\0"
    if kind == "truncated":
        return h, data[:-3]
    if kind == "trailing":
        return h, data + b"x"
    entry = h[first]
    match kind:
        case "dtype":
            entry["dtype"] = "I64"
        case "size":
            entry["shape"] = [*entry["shape"], 2]
        case "negative":
            entry["data_offsets"][0] = -4
        case "bool":
            entry["data_offsets"] = [False, True]
        case "huge":
            entry["data_offsets"][1] = 1 << 70
        case "overlap":
            sizes = [h[n]["data_offsets"][1] - h[n]["data_offsets"][0] for n in names]
            at = next(i for i in range(1, len(names)) if sizes[i] == sizes[i - 1])
            h[names[at]]["data_offsets"] = h[names[at - 1]]["data_offsets"]
        case "overflow":
            entry["shape"] = [1 << 40, 1 << 40]
        case "keys":
            entry["more"] = 1
        case "entry":
            h[first] = 7
        case "metadata":
            h["__metadata__"] = {"a": 1}
        case "transposed":
            entry["shape"] = entry["shape"][::-1]
        case "renamed":
            h["x" + first] = h.pop(first)
    return h, data


# kind of damage: words of the message, and which of tensor, found and expected it must give beside the file
KINDS = {
    "missing": ("is missing", "tensor expected"), "surplus": ("surplus", "tensor expected"),
    "truncated": ("truncated", "tensor found expected"),
    "trailing": ("behind the last", "found expected"), "dtype": ("unsupported dtype", "tensor found expected"),
    "size": ("do not fit dtype and shape", "tensor found expected"), "negative": ("malformed data_offsets", "tensor found expected"),
    "bool": ("malformed data_offsets", "tensor found expected"), "huge": ("malformed data_offsets", "tensor found expected"),
    "overlap": ("overlaps", "tensor found expected"), "overflow": ("do not fit dtype and shape", "tensor found expected"),
    "keys": ("malformed", "tensor found expected"), "entry": ("malformed", "tensor found expected"), "metadata": ("__metadata__", ""),
    "transposed": ("wrong shape", "tensor found expected"), "renamed": ("out of order", "tensor found expected"),
}  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_damaged_files_refused(tmp_path, kind):
    d = copy_fixture("tiny-mha", tmp_path)
    header, data = read_parts(d / "model.safetensors")
    write_parts(d / "model.safetensors", *damaged(header, data, kind))
    words, named = KINDS[kind]
    with pytest.raises(ouro.CheckpointError, match=words) as caught:
        ouro.load(d)
    assert caught.value.file in (str(d / "model.safetensors"), str(d))
    assert all(getattr(caught.value, name) is not None for name in named.split())


@pytest.mark.parametrize("raw", [b"", b"1234567", struct.pack("<Q", 1 << 63), struct.pack("<Q", 5) + b"{", struct.pack("<Q", 2) + b"[]",
                                 struct.pack("<Q", 20) + b'{"a": 1, "a": 2}    ', struct.pack("<Q", 2) + b"\xff\xff"])  # fmt: skip
def test_not_a_header(tmp_path, raw):
    d = copy_fixture("tiny-mha", tmp_path)
    (d / "model.safetensors").write_bytes(raw)
    with pytest.raises(ouro.CheckpointError):
        open_checkpoint(d)


def test_error_names_what_was_found(tmp_path):
    d = copy_fixture("tiny-mha", tmp_path)
    edit_config(d, intermediate_size=177)
    with pytest.raises(ouro.CheckpointError) as caught:
        open_checkpoint(d)
    error = caught.value
    assert (error.found, error.expected) == ((176, 64), (177, 64)) and "mlp" in error.tensor and "model.safetensors" in error.file


def test_nan_in_norm_refused(tmp_path):
    d = copy_fixture("tiny-one-step", tmp_path)
    header, data = read_parts(d / "model.safetensors")
    at = header["model.norm.weight"]["data_offsets"][0]
    write_parts(d / "model.safetensors", header, data[:at] + struct.pack("<f", float("nan")) + data[at + 4 :])
    with pytest.raises(ouro.CheckpointError, match=r"not finite.*model\.norm\.weight"):
        ouro.load(d)


@pytest.mark.parametrize("name", ["../model.safetensors", "/etc/passwd", "a/b.safetensors", "", "model.bin", 7, "..", "a\0.safetensors"])
def test_index_pointing_elsewhere(tmp_path, name):
    d = copy_fixture("tiny-sharded", tmp_path)
    path = d / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["weight_map"][next(iter(index["weight_map"]))] = name
    path.write_text(json.dumps(index))
    with pytest.raises(ouro.CheckpointError):
        open_checkpoint(d)


def test_index_and_shards_disagree(tmp_path):
    d = copy_fixture("tiny-sharded", tmp_path)
    path = d / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["weight_map"].pop("model.norm.weight")
    path.write_text(json.dumps(index))
    with pytest.raises(ouro.CheckpointError, match="does not name"):
        open_checkpoint(d)


def test_special_files_refused(tmp_path):
    for kind in ("loop", "folder", "pipe"):
        d = copy_fixture("tiny-mha", tmp_path / kind)
        path = d / "model.safetensors"
        path.unlink()
        if kind == "loop":
            path.symlink_to(path)
        elif kind == "folder":
            path.mkdir()
        else:
            os.mkfifo(path)
        with pytest.raises(ouro.CheckpointError):
            open_checkpoint(d)


def test_symlinked_files_work(tmp_path):
    d = tmp_path / "snapshot"
    d.mkdir()
    for file in TINY.iterdir():
        (d / file.name).symlink_to(file)
    assert ouro.load(d).generate("One", max_new_tokens=1).token_ids


def test_file_that_shrinks(tmp_path):
    d = copy_fixture("tiny-mha", tmp_path)
    with open_checkpoint(d) as c:
        os.truncate(d / "model.safetensors", 20_000)
        with pytest.raises(ouro.CheckpointError, match="shrink"):
            for name in c.tensors:
                c.read_f32(name)


def test_dtypes_give_the_same_model(tmp_path):
    """The same values stored as f32, or as f16 where exact, trace alike."""
    d = copy_fixture("tiny-mha", tmp_path)
    with open_checkpoint(d) as c:
        arrays = {n: c.read_f32(n) for n in c.tensors}
    header, data = {}, b""
    for i, (n, a) in enumerate(arrays.items()):
        raw = a.astype("<f2") if i % 2 and np.array_equal(a.astype("<f2").astype(np.float32), a) else a.astype("<f4")
        header[n] = {
            "dtype": "F16" if raw.itemsize == 2 else "F32",
            "shape": list(a.shape),
            "data_offsets": [len(data), len(data) + raw.nbytes],
        }
        data += raw.tobytes()
    write_parts(d / "model.safetensors", header, data)
    ids = list(range(20))
    for compute in ("float32", "bfloat16"):
        a, b = (ouro.load(x, compute=compute).trace(ids) for x in (d, FIXTURES / "tiny-mha"))
        np.testing.assert_array_equal(a.states, b.states)


FUZZ = settings(max_examples=250, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def try_open(directory):
    """Opens and loads; a CheckpointError is the only way to fail."""
    try:
        with open_checkpoint(directory) as c:
            c.check_small_tensors()
            for name in c.tensors:
                c.read_f32(name)
        return True
    except ouro.CheckpointError:
        return False


@FUZZ
@given(st.integers(0, 4000), st.binary(min_size=1, max_size=12), st.sampled_from(["model.safetensors", "config.json"]))
def test_mutated_bytes(tmp_path_factory, at, junk, name):
    d = copy_fixture("tiny-one-step", tmp_path_factory.mktemp("fuzz"))
    blob = bytearray((d / name).read_bytes())
    at %= len(blob)
    blob[at : at + len(junk)] = junk
    (d / name).write_bytes(blob)
    try_open(d)


JSON = st.recursive(st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
                    lambda x: st.lists(x, max_size=4) | st.dictionaries(st.text(max_size=8), x, max_size=4), max_leaves=12)  # fmt: skip


@FUZZ
@given(JSON | st.fixed_dictionaries({"model.norm.weight": st.fixed_dictionaries({
    "dtype": st.sampled_from(["F32", "BF16", "F64"]), "shape": st.lists(st.integers(-2, 1 << 66), max_size=3),
    "data_offsets": st.lists(st.integers(-2, 1 << 66), max_size=3)})}))  # fmt: skip
def test_made_up_headers(tmp_path_factory, header):
    d = copy_fixture("tiny-one-step", tmp_path_factory.mktemp("fuzz"))
    write_parts(d / "model.safetensors", header, b"\0" * 192)
    assert not try_open(d)


def test_hostile_header_takes_little_memory(tmp_path):
    d = copy_fixture("tiny-one-step", tmp_path)
    write_parts(d / "model.safetensors", b"{}", b"", length=(1 << 63) - 1)
    tracemalloc.start()
    assert not try_open(d)
    assert tracemalloc.get_traced_memory()[1] < 1 << 20
    tracemalloc.stop()
