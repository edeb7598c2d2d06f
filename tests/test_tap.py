"""Looking: every hook point against the oracle and the reference, the same bits with any capture, plans and names."""

import itertools

import numpy as np
import pytest
from conftest import load, reference
from hook_oracle import HookOracle
from paths import FIXTURES
from test_one_answer import kernels_here

import ouro
from ouro import arrays
from ouro.hooks import POINTS, HookNames

pytestmark = pytest.mark.core
COMPUTE = ("float32", "bfloat16", "int8", "int4")
EVERYTHING = "*"


def same(trace, logits, cache):
    np.testing.assert_array_equal(trace.states, cache["state"])
    np.testing.assert_array_equal(trace.gate_logit, cache["gate_logit"])
    np.testing.assert_array_equal(trace.logits, logits)


@pytest.mark.parametrize("name", ["tiny-mha", "tiny-gqa-tied", "tiny-sharded", "tiny-one-step"])
def test_every_point_against_the_oracle(name):
    model, ids = load(name, "float32"), reference(name)["input_ids"]
    _, cache = model.run_with_cache(ids[:2, :23], EVERYTHING, logits="all")
    oracle = HookOracle(FIXTURES / name)
    for row in range(2):
        expected = oracle(ids[row, :23])
        assert set(expected) == {n for n in cache if n.rpartition("_")[2] not in ("lambda", "pdf", "cdf")}
        for full, value in expected.items():
            found = cache[full][row]
            assert found.shape == value.shape, full
            np.testing.assert_allclose(found, value, rtol=2e-4, atol=2e-4, err_msg=full)


@pytest.mark.parametrize("name", ["tiny-mha", "tiny-gqa-tied"])
def test_released_code_agrees(name):
    model, ref = load(name, "float32"), reference(name)
    _, cache = model.run_with_cache(ref["input_ids"], ["resid_post", "pattern", "exit_gate.*"])
    np.testing.assert_allclose(cache["resid_post"][:, :, 0], ref["resid_post"], rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(cache["pattern"][:, :, 0], ref["pattern"], atol=1e-5)
    np.testing.assert_allclose(cache["gate_pdf"], ref["exit_pdf"], atol=1e-5)
    assert (cache["gate_cdf"][-1] == 1).all()


@pytest.mark.parametrize("compute", COMPUTE)
@pytest.mark.parametrize("name", ["tiny-gqa-tied", "trained"])
def test_looking_changes_nothing(name, compute):
    model, ids = load(name, compute), reference(name)["input_ids"][:2, :40]
    plain = model.trace(ids, logits="all")
    logits, cache = model.run_with_cache(ids, EVERYTHING, logits="all")
    same(plain, logits, cache)
    for lanes, threads in ((1, 1), (7, 3)):
        other = load(name, compute, threads=threads)
        part, kept = other.run_with_cache(ids, EVERYTHING, logits="all", max_lanes=lanes)
        same(plain, part, kept)
        for full in cache:
            np.testing.assert_array_equal(cache[full], kept[full], err_msg=full)


@pytest.mark.parametrize("compute", COMPUTE)
def test_each_point_alone_changes_nothing(compute):
    model, ids = load("tiny-gqa-tied", compute), reference("tiny-gqa-tied")["input_ids"][:1, :9]
    plain = model.trace(ids, logits="all")
    everything = model.run_with_cache(ids, EVERYTHING)[1]
    for p in POINTS:
        logits, cache = model.run_with_cache(ids, [p.short, "state", "gate_logit"], logits="all")
        same(plain, logits, cache)
        np.testing.assert_array_equal(cache[p.short], everything[p.short], err_msg=p.short)


@pytest.mark.parametrize("compute", ["bfloat16", "int8"])
def test_instruction_sets_show_the_same(compute):
    ids = reference("tiny-gqa-tied")["input_ids"][:1, :17]
    seen = [ouro.load(FIXTURES / "tiny-gqa-tied", compute=compute, isa=isa).run_with_cache(ids, EVERYTHING)[1] for isa in kernels_here()]
    for other in seen[1:]:
        for full in seen[0]:
            np.testing.assert_array_equal(other[full], seen[0][full], err_msg=full)


def test_across_blocks_and_keys_in_int8():
    """Attention over several blocks of 64, whole and looked at."""
    ids = np.tile(reference("trained")["input_ids"][:1], 4)[:, :150]
    for kv in ("bfloat16", "int8"):
        model = load("trained", "bfloat16", kv_dtype=kv)
        plain = model.trace(ids, logits="all")
        logits, cache = model.run_with_cache(ids, ["pattern", "attn_scores", "state", "gate_logit"], logits="all")
        same(plain, logits, cache)
        np.testing.assert_allclose(cache["pattern"].sum(-1), 1, rtol=1e-5)
        assert (cache["pattern"][..., 3, 4:] == 0).all() and np.isneginf(cache["attn_scores"][..., 3, 4:]).all()


def test_ragged_batches_and_positions():
    model, ids = load("trained", "bfloat16"), reference("trained")["input_ids"]
    ragged = [ids[0, :11].tolist(), ids[1, :4].tolist(), ids[2, :1].tolist()]
    whole = model.run_with_cache(ragged, EVERYTHING)[1]
    for row, sequence in enumerate(ragged):
        alone, n = model.run_with_cache(sequence, EVERYTHING)[1], len(sequence)
        for p in POINTS:
            a, b = whole[p.short], alone[p.short]
            if p.square:
                np.testing.assert_array_equal(a[:, :, row, :, :n, :n], b[:, :, 0])
                assert np.isnan(a[:, :, row, :, n:]).all()
            else:
                axis = {"run": 0, "step": 1, "layer": 2}[p.of]
                a = np.moveaxis(a, axis, 0)[row]
                np.testing.assert_array_equal(np.moveaxis(a, axis, 0)[:n], np.moveaxis(np.moveaxis(b, axis, 0)[0], axis, 0))
    last = model.run_with_cache(ragged, ["resid_post", "pattern"], pos=[-1, -2])[1]
    assert last.positions.tolist() == [[9, 10], [2, 3], [0, -1]]
    np.testing.assert_array_equal(last["resid_post"][:, :, 0, 1], whole["resid_post"][:, :, 0, 10])
    np.testing.assert_array_equal(last["resid_post"][:, :, 2, 0], whole["resid_post"][:, :, 2, 0])
    assert np.isnan(last["resid_post"][:, :, 2, 1]).all()
    np.testing.assert_array_equal(last["pattern"][:, :, 1, :, 1], whole["pattern"][:, :, 1, :, 3])
    with pytest.raises(IndexError, match="no sequence has such a position"):
        model.run_with_cache(ragged, "state", pos=99)


def test_bfloat16_is_the_rounded_float32():
    model, ids = load("trained", "bfloat16"), reference("trained")["input_ids"][:2]
    full = model.run_with_cache(ids, ["resid_post", "pattern", "gate_pdf"])[1]
    half = model.run_with_cache(ids, ["resid_post", "pattern", "gate_pdf"], dtype="bfloat16")[1]
    assert half.nbytes * 2 == full.nbytes and half.raw("resid_post").dtype == np.uint16
    for short in full.points:
        rounded = ouro.capture.from_bfloat16(ouro.capture.to_bfloat16(full[short]))
        np.testing.assert_array_equal(half[short], rounded)


def test_stop_at():
    model, ids = load("trained", "bfloat16"), reference("trained")["input_ids"][:2]
    whole = model.run_with_cache(ids)[1]
    logits, cache = model.run_with_cache(ids, stop_at=(1, 2))
    assert logits is None and "steps.1.blocks.2.hook_resid_post" in cache
    assert "steps.1.blocks.3.hook_resid_pre" not in cache and "steps.2.blocks.0.hook_q" not in cache
    for full in cache:
        if "pdf" not in full and "cdf" not in full:
            np.testing.assert_array_equal(cache[full], whole[full], err_msg=full)
    with pytest.raises(IndexError, match="stop_at"):
        model.run_with_cache(ids, stop_at=(4, 0))


def test_more_steps_than_trained():
    model, ids = load("trained", "bfloat16"), reference("trained")["input_ids"][:1]
    deep = model.run_with_cache(ids, ["resid_post", "state"], n_steps=7)[1]
    np.testing.assert_array_equal(deep["state"], model.trace(ids, n_steps=7).states)
    assert deep["resid_post", -1].shape[0] == 7


def test_names():
    model = load("trained", "bfloat16")
    names = HookNames(model.config, 4)

    def picks(*filters, **more):
        found = names.select(filters[0] if len(filters) == 1 else list(filters), **more)
        return {p.name(*at) for p, places in found.items() for at in places}

    assert picks("steps.1.blocks.2.attn.hook_z") == {"steps.1.blocks.2.attn.hook_z"}
    assert picks("blocks.2.attn.hook_z") == {f"steps.{t}.blocks.2.attn.hook_z" for t in range(4)}
    assert picks("z") == {f"steps.{t}.blocks.{x}.attn.hook_z" for t, x in itertools.product(range(4), range(4))}
    assert picks(("z", -1)) == picks("blocks.3.attn.hook_z") and picks(("z", 1, -1)) == {"steps.3.blocks.1.attn.hook_z"}
    assert picks("steps.*.blocks.3.*") == {n for n in names if ".blocks.3." in n}
    assert picks("blocks.*.attn.*", steps=[-1]) == {n for n in names if ".attn." in n and n.startswith("steps.3.")}
    assert picks(lambda n: n.endswith("embed")) == {"hook_embed"} == picks("hook_embed")
    assert picks("state", ("embed",)) == {"hook_embed", *(f"steps.{t}.ln_final.hook_normalized" for t in range(4))}
    assert set(names) - picks(None) == {n for n in names if n.endswith("hook_result")}
    for wrong, near in {"resid_pots": "resid_post", "blocks.2.hook_z": "blocks.2.attn.hook_z", "blocks.*.hook_zz": "z",
                        "steps.1.blocks.2.attn.hook_patern": "steps.1.blocks.2.attn.hook_pattern"}.items():  # fmt: skip
        with pytest.raises(KeyError, match=f"near: .*{near}"):
            names.select(wrong)
    with pytest.raises(IndexError, match="layer"):
        names.select(("z", 4))
    with pytest.raises(IndexError, match="step is 4"):
        names.select("z", steps=[4])
    with pytest.raises(ValueError, match="picks nothing"):
        model.run_with_cache([1, 2], lambda name: False)


def test_sizes_are_known_and_refused():
    model = load("trained", "bfloat16")
    plan = model.plan([[1] * 30, [2] * 7], EVERYTHING)
    cache = model.run_with_cache([[1] * 30, [2] * 7], EVERYTHING)[1]
    assert plan.nbytes == cache.nbytes == sum(plan.by_part.values())
    assert "logits" in repr(plan) and "<table>" in plan._repr_html_() and "<script" not in cache._repr_html_()
    with pytest.raises(ouro.MemoryLimitError, match=r"needs .* \(\d+ bytes\), 1\.0 KiB are allowed: result"):
        model.run_with_cache([1] * 30, EVERYTHING, max_bytes=1024)


def test_out_takes_over_the_arrays():
    model, ids = load("trained", "bfloat16"), reference("trained")["input_ids"]
    for dtype, batch in (("float32", ids[:2, :9]), ("bfloat16", [ids[0, :11].tolist(), ids[1, :4].tolist()])):
        fresh = model.run_with_cache(batch, EVERYTHING, dtype=dtype)[1]
        used = model.run_with_cache(batch, EVERYTHING, dtype=dtype)[1]
        for _, a in used.blocks:
            a.view(np.uint8)[...] = 0x5A
        again = model.run_with_cache(batch, EVERYTHING, dtype=dtype, out=used)[1]
        for (_, a), (_, b), (_, c) in zip(fresh.blocks, again.blocks, used.blocks, strict=True):
            np.testing.assert_array_equal(a, b)
            assert np.shares_memory(b, c) and b.ctypes.data % 64 == 0
    cache = model.run_with_cache(ids[:1], ["z", "state"])[1]
    for changed, more in ((["z"], {}), (["z", "state"], {"steps": [1]}), (["z", "state"], {"dtype": "bfloat16"}), (["z", "logits"], {})):
        with pytest.raises(ValueError, match=r"out holds another capture: .* where this one keeps"):
            model.run_with_cache(ids[:1], changed, out=cache, **more)
    with pytest.raises(ValueError, match=r"out holds another capture: z \[4, 4, 1"):
        model.run_with_cache(ids[:1, :5], ["z", "state"], out=cache)
    with pytest.raises(ouro.MemoryLimitError):
        model.run_with_cache(ids[:1], ["z", "state"], out=cache, max_bytes=1024)


def test_freed_captures_are_kept_within_a_limit(monkeypatch):
    model, ids = load("trained", "bfloat16"), list(range(100, 228))
    ouro.free_memory()
    cache = model.run_with_cache(ids, ["resid_post"])[1]
    expected, at = cache.stack("resid_post").copy(), cache.stack("resid_post").ctypes.data
    part = cache["resid_post", 1, 2]
    del cache
    assert arrays.kept_bytes() == 0         # a view of it lives
    part[...] = 7
    del part
    assert 1 << 20 <= arrays.kept_bytes() <= (1 << 20) + 64
    cache = model.run_with_cache(ids, ["resid_post"])[1]
    assert cache.stack("resid_post").ctypes.data == at and arrays.kept_bytes() == 0
    np.testing.assert_array_equal(cache.stack("resid_post"), expected)
    del cache
    assert ouro.free_memory() >= 1 << 20 and arrays.kept_bytes() == 0
    monkeypatch.setattr(arrays, "KEPT_BYTES", 3 << 20)
    several = [model.run_with_cache(ids, ["resid_post"])[1] for _ in range(4)]
    del several
    assert 2 << 20 <= arrays.kept_bytes() <= 3 << 20
    ouro.free_memory()


def test_cache_as_a_mapping():
    model, ids = load("trained", "bfloat16"), reference("trained")["input_ids"][:2, :9]
    cache = model.run_with_cache(ids, ["resid_post", "pattern", "k", "state", ("z", 1, 2), ("z", 3), "embed"])[1]
    assert len(cache) == len(list(cache)) == 16 * 3 + 4 + 1 + 4 + 1
    assert cache["resid_post", 3].shape == (4, 2, 9, 128) and cache["resid_post", -1, 2].shape == (2, 9, 128)
    assert np.shares_memory(cache["resid_post", 3], cache.stack("resid_post"))
    np.testing.assert_array_equal(cache["blocks.3.hook_resid_post"], cache["resid_post", 3])
    np.testing.assert_array_equal(cache["z", 1], cache["steps.2.blocks.1.attn.hook_z"][None])
    with pytest.raises(KeyError, match="different steps"):
        cache["z"]
    with pytest.raises(KeyError, match="was not captured"):
        cache["q", 1]
    assert ("q", 1) not in cache and ("k", 1) in cache and "nothing" not in cache
    np.testing.assert_array_equal(cache.sel("resid_post", step=2, layer=-1, pos=slice(3, 5)), cache["resid_post", 3, 2][:, 3:5])
    np.testing.assert_array_equal(cache.sel("pattern", step=[0, -1], layer=1, head=2, pos=-1, src_pos=0),
                                  cache["pattern", 1][[0, 3], :, 2, -1, 0])  # fmt: skip
    np.testing.assert_array_equal(cache.sel("k", head=1, batch=0), cache["k"][:, :, 0, :, 1])
    for wrong in ({"step": 4}, {"head": 0}, {"layer": 9}):
        with pytest.raises(IndexError):
            cache.sel("resid_post", **wrong)
    flat = cache.to_transformer_lens()
    np.testing.assert_array_equal(flat["blocks.6.hook_resid_post"], cache["resid_post", 2, 1])
    np.testing.assert_array_equal(flat["ln_final.hook_normalized"], cache["state"][-1])
    np.testing.assert_array_equal(np.from_dlpack(cache["state"]), cache["state"])


def test_labels():
    model = load("trained", "bfloat16")
    cache = model.run_with_cache(["One day Ann", "Bob"], ["resid_post", "pattern"], steps=[1, 3])[1]
    a = cache.labelled("resid_post")
    assert a.dims == ("step", "layer", "batch", "pos", "d_model") and a.coords["step"].tolist() == [1, 3]
    assert a.coords["token"][0, 0] == "O" and a.coords["token"][1, -1] == ""
    assert cache.to_xarray()["pattern"].dims == ("step", "layer", "batch", "head", "dest_pos", "src_pos")
    table = cache.to_dataframe("resid_post")
    assert len(table) == a.values.size and {"step", "layer", "pos", "token", "resid_post"} <= set(table.columns)
    with pytest.raises(ValueError, match="which point"):
        cache.to_dataframe()
