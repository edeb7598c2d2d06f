"""Caches on disk: saved and mapped back, damaged files, shards that are killed and go on; sums over the residual stream."""

import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from conftest import load, reference
from paths import FIXTURES

import ouro

pytestmark = pytest.mark.core


@pytest.fixture(scope="module")
def model():
    return load("trained", "bfloat16")


def same(a, b):
    assert list(a) == list(b) and a.lengths == b.lengths and a.token_ids == b.token_ids and a.tokens == b.tokens
    np.testing.assert_array_equal(a.positions, b.positions)
    for name in a:
        np.testing.assert_array_equal(a[name], b[name], err_msg=name)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_save_and_load(model, tmp_path, dtype):
    cache = model.run_with_cache(["One day Ann", "Bob"], ["resid_post", "pattern", "gate_*", ("z", 1), ("z", 2, 0)], dtype=dtype)[1]
    cache.save(tmp_path / "a.safetensors")
    same(ouro.ActivationCache.load(tmp_path / "a.safetensors"), cache)
    tensors = pytest.importorskip("safetensors.numpy")
    if dtype == "float32":
        np.testing.assert_array_equal(tensors.load_file(tmp_path / "a.safetensors")["resid_post"], cache["resid_post"])
    assert [p.name for p in tmp_path.iterdir()] == ["a.safetensors"]


def test_damaged_files(model, tmp_path):
    path = tmp_path / "a.safetensors"
    model.run_with_cache("One day", ["state", "pattern"])[1].save(path)
    good = path.read_bytes()
    for damage in (good[:100], good[:-1], good.replace(b"ouro_cache", b"ouro_cahce"), good.replace(b'\\"state\\"', b'\\"stale\\"'),
                   good.replace(b'\\"version\\": 1', b'\\"version\\": 7'), b""):  # fmt: skip
        path.write_bytes(damage)
        with pytest.raises(ouro.CheckpointError):
            ouro.ActivationCache.load(path)
    with pytest.raises(ouro.CheckpointError):
        ouro.ActivationCache.load(FIXTURES / "tiny-mha" / "model.safetensors")


def test_shards(model, tmp_path):
    texts = [row[: 3 + 5 * i].tolist() for i, row in enumerate(reference("trained")["input_ids"])] * 3
    one = model.capture_to(tmp_path / "one", texts, ["state", "pattern"], progress=False)
    assert len(one) == 1 and one.missing == []
    many = model.capture_to(tmp_path / "many", texts, ["state", "pattern"], shard_bytes=80_000, progress=False)
    assert len(many) > 3 and [a for a, _ in many.spans] == [0, *[b for _, b in many.spans[:-1]]] and many.spans[-1][1] == len(texts)
    for (first, end), cache in zip(many.spans, many, strict=True):
        same(cache, model.run_with_cache(texts[first:end], ["state", "pattern"])[1])
    times = {p: p.stat().st_mtime_ns for p in (tmp_path / "many").glob("shard-*")}
    many.path(1).unlink()
    (tmp_path / "many" / ".shard-00001.safetensors.1.tmp").write_bytes(b"half")
    assert ouro.open_shards(tmp_path / "many").missing == [1]
    again = model.capture_to(tmp_path / "many", texts, ["state", "pattern"], shard_bytes=80_000, progress=False)
    assert again.missing == [] and not list((tmp_path / "many").glob("*.tmp")) and not list((tmp_path / "many").glob(".*.tmp"))
    assert all(p.stat().st_mtime_ns == t for p, t in times.items() if p != many.path(1))
    with pytest.raises(ValueError, match="another capture"):
        model.capture_to(tmp_path / "many", texts, ["state"], shard_bytes=80_000, progress=False)
    with pytest.raises(ouro.CheckpointError):
        ouro.open_shards(tmp_path)


def test_resuming_with_other_edits_is_refused(model, tmp_path):
    """Also where only a number or one element of a vector differs."""
    vector = np.ones(model.config.d_model, np.float32)
    first = ouro.edits.Add("resid_post", vector, scale=0.5, layers=[0])
    model.capture_to(tmp_path, ["One day"], names_filter="state", edits=[first], progress=False)
    model.capture_to(tmp_path, ["One day"], names_filter="state", edits=[first], progress=False)
    other = vector.copy()
    other[3] = 2
    for edit in (ouro.edits.Add("resid_post", other, scale=0.5, layers=[0]), ouro.edits.Add("resid_post", vector, scale=0.25, layers=[0])):
        with pytest.raises(ValueError, match="holds another capture"):
            model.capture_to(tmp_path, ["One day"], names_filter="state", edits=[edit], progress=False)


def test_killed_and_resumed(tmp_path):
    code = (
        "import ouro, sys; m = ouro.load(sys.argv[1]);"
        "m.capture_to(sys.argv[2], ['One day Ann took a boat to the lake. ' * 3] * 200, 'resid_post', shard_bytes=100_000, progress=False)"
    )
    job = subprocess.Popen([sys.executable, "-c", code, "ouro-tiny", str(tmp_path)])
    while job.poll() is None and len(list(tmp_path.glob("shard-*"))) < 3:
        time.sleep(0.01)
    job.send_signal(signal.SIGKILL) if os.name == "posix" else job.kill()
    job.wait()
    shards = ouro.open_shards(tmp_path)
    done = [i for i in range(len(shards)) if i not in shards.missing]
    assert len(done) >= 3
    for i in done:
        assert np.isfinite(shards[i]["resid_post"]).all()


def test_sums_of_the_residual_stream(model):
    cache = model.run_with_cache("One day Ann took a boat", "*")[1]
    for step in (0, 3):
        whole = cache.decompose_resid(step)
        assert whole.coords["component"].tolist()[:3] == ["start", "0_attn_out", "0_mlp_out"]
        np.testing.assert_allclose(whole.values.sum(0), cache[f"steps.{step}.hook_resid_post"], rtol=1e-4, atol=1e-4)
        np.testing.assert_allclose(cache.decompose_resid(step, 2).values.sum(0), cache["resid_pre", 2, step], rtol=1e-4, atol=1e-4)
        assert len(cache.decompose_resid(step, mode="mlp").values) == 4
    grown = cache.accumulated_resid(incl_mid=True)
    assert len(grown.values) == 4 * (2 * 4 + 1) and grown.coords["component"][9] == "1.0_pre"
    np.testing.assert_array_equal(grown.sel(component="2.3_mid").values, cache["resid_mid", 3, 2])
    heads = cache.stack_head_results(step=1)
    a = heads.values[[i for i, c in enumerate(heads.coords["component"]) if c.startswith("1.2.")]].sum(0)
    weight = model.weight("model.layers.2.input_layernorm_2.weight")
    np.testing.assert_allclose(a / cache["ln1_post_scale", 2, 1][..., None] * weight, cache["attn_out", 2, 1], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("compute", ["float32", "bfloat16", "int8"])
def test_heads_add_up_to_what_attention_adds(compute):
    model = ouro.load("ouro-tiny" if compute != "float32" else FIXTURES / "tiny-gqa-tied", compute=compute)
    cache = model.run_with_cache([5, 9, 11, 2, 7], "*")[1]
    n, steps, layers = model.config.n_heads, model.config.n_steps, model.config.n_layers
    shares = cache.stack_head_results(apply_norm=model).values.reshape(steps, layers, n, *cache["attn_out"].shape[2:])
    np.testing.assert_allclose(shares.sum(2), cache["attn_out"], rtol=1e-5, atol=1e-5 * np.abs(cache["attn_out"]).max())
    np.testing.assert_array_equal(cache.stack_head_results(-1, apply_norm=model).values.reshape(shares[-1].shape), shares[-1])
    parts = cache.decompose_resid(1, heads=model)
    assert parts.coords["component"].tolist()[: n + 2] == ["start", *(f"0_attn_out.{h}" for h in range(n)), "0_mlp_out"]
    whole = cache["steps.1.hook_resid_post"]
    np.testing.assert_allclose(parts.values.sum(0), whole, rtol=1e-5, atol=1e-5 * np.abs(whole).max())
    with pytest.raises(ValueError, match="the cache is of a model with"):
        cache.stack_head_results(apply_norm=load("tiny-one-step", "bfloat16"))
