"""A result has the same bits in any batch, chunk, schedule, thread count and instruction set."""

import numpy as np
import pytest
from conftest import load, reference
from paths import FIXTURES, TINY

import ouro

pytestmark = pytest.mark.core
COMPUTE = ("float32", "bfloat16", "int8", "int4")
NAMES = ("tiny-gqa-tied", "trained")


def kernels_here():
    found = []
    for isa in ("scalar", "avx2", "avx_vnni", "avx_vnni_vl", "avx512", "neon", "neon_dot", "neon_i8mm"):
        try:
            ouro.load(FIXTURES / "tiny-one-step", isa=isa)
            found.append(isa)
        except (RuntimeError, ValueError):
            continue
    return found


def same(a, b):
    np.testing.assert_array_equal(a.states, b.states)
    np.testing.assert_array_equal(a.gate_logit, b.gate_logit)
    np.testing.assert_array_equal(a.logits, b.logits)


@pytest.mark.parametrize("compute", COMPUTE)
@pytest.mark.parametrize("name", NAMES)
def test_chunks(name, compute):
    model, ids = load(name, compute), reference(name)["input_ids"]
    whole = model.trace(ids, logits="all")
    for lanes in (1, 7, 64):
        same(model.trace(ids, logits="all", max_lanes=lanes), whole)


@pytest.mark.parametrize("compute", COMPUTE)
@pytest.mark.parametrize("name", NAMES)
def test_alone_against_batch(name, compute):
    model, ids = load(name, compute), reference(name)["input_ids"]
    ragged = [ids[0].tolist(), ids[1][:5].tolist(), ids[2][:17].tolist(), ids[0][:1].tolist()]
    batch = model.trace(ragged, logits="all")
    for row, sequence in enumerate(ragged):
        alone, n = model.trace(sequence, logits="all"), len(sequence)
        np.testing.assert_array_equal(batch.states[:, row, :n], alone.states[:, 0])
        np.testing.assert_array_equal(batch.logits[:, row, :n], alone.logits[:, 0])
        assert np.isnan(batch.states[:, row, n:]).all()
        assert (batch.exit_step(0.5)[row, n:] == -1).all()


@pytest.mark.parametrize("compute", COMPUTE)
def test_threads(compute):
    ids = reference("trained")["input_ids"]
    one = load("trained", compute, threads=1).trace(ids, logits="all")
    for threads in (2, 3, 5):
        same(load("trained", compute, threads=threads).trace(ids, logits="all"), one)


@pytest.mark.parametrize("compute", COMPUTE)
@pytest.mark.parametrize("name", ("tiny-gqa-tied", "tiny-one-step", "trained"))
def test_instruction_sets(name, compute):
    ids = reference(name)["input_ids"][:, :20]
    directory = TINY if name == "trained" else FIXTURES / name
    traces = [ouro.load(directory, compute=compute, isa=isa).trace(ids, logits="all") for isa in kernels_here()]
    for other in traces[1:]:
        same(other, traces[0])


@pytest.mark.parametrize("compute", COMPUTE)
def test_cached_decode_against_recomputation(compute):
    """Across a block boundary: states of a long trace are what decoding saw, token by token."""
    model = load("trained", compute)
    prompt = reference("trained")["input_ids"][0].tolist()
    made = model.generate(prompt, max_new_tokens=40, eos_token_id=[], speculate=False)
    logits = model.trace(prompt + made.token_ids, logits="last").logits[0, 0]
    for i, (token, logprob) in enumerate(zip(made.token_ids, made.logprobs, strict=True)):
        z = logits[len(prompt) - 1 + i]
        assert int(z.argmax()) == token
        log_z = model._core.readout(model.trace(prompt + made.token_ids[:i]).states[-1, 0, -1:], False)[2] if i == 20 else None
        if log_z is not None:
            assert np.float32(np.float64(z[token]) - np.float64(log_z[0])) == np.float32(logprob)


@pytest.mark.parametrize("kv", ["bfloat16", "int8"])
def test_depth_is_a_prefix(kv):
    """n_steps=k and exit_at_step=k are the bits of step k of a full run; more steps than trained work."""
    model, ids = load("trained", "bfloat16", kv_dtype=kv), reference("trained")["input_ids"][:2]
    deep = model.trace(ids, n_steps=8, logits="all")
    for k in (1, 2, 4):
        shallow = model.trace(ids, n_steps=k, logits="all")
        np.testing.assert_array_equal(shallow.states, deep.states[:k])
        np.testing.assert_array_equal(shallow.logits, deep.logits[:k])
    a = model.generate(ids[0], max_new_tokens=12, exit_at_step=1, eos_token_id=[])
    b = model.generate(ids[0], max_new_tokens=12, n_steps=2, eos_token_id=[])
    assert a.token_ids == b.token_ids and a.logprobs == b.logprobs
    assert model.generate(ids[0], max_new_tokens=3, n_steps=8, eos_token_id=[]).exit_steps == [7, 7, 7]


CONTROLS = {
    "plain": {},
    "sampled": {"temperature": 0.9, "top_p": 0.9, "top_k": 50, "min_p": 0.01, "seed": 7},
    "penalty": {"repetition_penalty": 1.3, "temperature": 0.7, "seed": 3},
    "q-exit": {"exit_threshold": 0.6},
    "q-exit sampled": {"exit_threshold": 0.7, "temperature": 1.0, "seed": 11},
    "fixed step": {"exit_at_step": 1},
    "deeper": {"n_steps": 6},
    "weighted": {"weighted_exit": True},
    "kl": {"exit_rule": ouro.exits.ReadoutKL(0.05)},
    "top1": {"exit_rule": ouro.exits.TopAgreement()},
    "entropy": {"exit_rule": ouro.exits.ReadoutEntropy(1.0, min_steps=2)},
    "confidence": {"exit_rule": ouro.exits.Confidence(0.9, delay=1)},
    "delta": {"exit_rule": ouro.exits.StateDelta(4.0)},
    "relative": {"exit_rule": ouro.exits.StateRelative(0.5)},
    "acceleration": {"exit_rule": ouro.exits.Acceleration(0.5)},
}


def outcome(g):
    return g.token_ids, g.logprobs, g.exit_steps, np.nan_to_num(g.exit_pdf, nan=-1).tolist(), g.text, g.finish_reason


@pytest.mark.parametrize("control", CONTROLS, ids=str)
@pytest.mark.parametrize("compute", COMPUTE)
def test_speculation_and_batches_change_nothing(compute, control):
    model, arguments = load("trained", compute), CONTROLS[control]
    ids = reference("trained")["input_ids"]
    prompts = [ids[0][:20].tolist(), ids[1][:33].tolist(), ids[2][:5].tolist()]
    plain = [outcome(model.generate(p, max_new_tokens=24, speculate=False, logprobs=3, **arguments)) for p in prompts]
    for speculate in (True, "auto"):
        assert [outcome(model.generate(p, max_new_tokens=24, speculate=speculate, logprobs=3, **arguments)) for p in prompts] == plain
        batch = model.generate(prompts, max_new_tokens=24, speculate=speculate, logprobs=3, **arguments)
        assert [outcome(g) for g in batch] == plain


def test_exit_rules_agree_with_a_trace():
    """What the engine decides step by step is what the trace's arrays say."""
    model = load("trained")
    prompt = reference("trained")["input_ids"][0][:24].tolist()
    made = model.generate(prompt, max_new_tokens=20, exit_threshold=0.6, eos_token_id=[])
    trace = model.trace(prompt + made.token_ids[:-1])
    np.testing.assert_array_equal(trace.exit_step(0.6)[0, len(prompt) - 1 :], made.exit_steps)
    for i, step in enumerate(made.exit_steps):
        np.testing.assert_array_equal(made.exit_pdf[i][: step + 1], trace.exit_pdf[: step + 1, 0, len(prompt) - 1 + i])


def test_custom_rule_and_its_errors():
    model, ids = load("trained"), reference("trained")["input_ids"][0][:10]
    ruled = model.generate(ids, max_new_tokens=8, exit_rule=ouro.exits.CustomExit(rule=lambda s: s["exit_cdf"] >= 0.6), eos_token_id=[])
    assert ruled.token_ids == model.generate(ids, max_new_tokens=8, exit_threshold=0.6, eos_token_id=[]).token_ids

    def broken(signal):
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        model.generate(ids, max_new_tokens=8, exit_rule=ouro.exits.CustomExit(rule=broken))
    assert model.generate(ids, max_new_tokens=1, eos_token_id=[]).token_ids


def test_blas_agrees_to_rounding():
    from ouro.loading import blas_library

    if blas_library() is None:
        pytest.skip("this installation carries no OpenBLAS")
    r = reference("trained")
    model = load("trained", "float32", exact=False)
    assert "BLAS" in model.compute and model.info()["blas"]
    found = model.trace(r["input_ids"], logits="all")
    assert np.abs(found.logits - r["logits"]).max() < 2e-5 * np.abs(r["logits"]).max()
