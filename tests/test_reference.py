"""Against the released modeling code: every array of every reference file."""

import json

import numpy as np
import pytest
from conftest import load, reference
from paths import FIXTURES, RANDOM

pytestmark = pytest.mark.core
ALL = (*RANDOM, "trained")


def relative(found, expected):
    """Largest error on the scale of the expected array."""
    return np.abs(found - expected).max() / np.abs(expected).max()


@pytest.fixture(scope="module", params=ALL)
def traced(request):
    model, r = load(request.param), reference(request.param)
    return model.trace(r["input_ids"], logits="all"), r


@pytest.mark.parametrize(("ours", "theirs"), [("states", "state"), ("gate_logit", "gate_logit"), ("logits", "logits"),
                                              ("exit_pdf", "exit_pdf")])  # fmt: skip
def test_float32_arrays(traced, ours, theirs):
    trace, r = traced
    found = getattr(trace, ours)
    assert found.shape == r[theirs].shape
    assert relative(found, r[theirs]) < 2e-5


def test_weighted_logits(traced):
    trace, r = traced
    if "weighted_logits" in r:
        assert relative(trace.weighted_logits(), r["weighted_logits"]) < 2e-5


def test_q_exit_steps(traced):
    trace, r = traced
    names = [name for name in r if name.startswith("qexit_step_")]
    for name in names:
        q = float(name.removeprefix("qexit_step_"))
        near = (np.abs(trace.exit_cdf[:-1] - q) < 1e-5).any(0)  # within rounding of the threshold either may win
        np.testing.assert_array_equal(trace.exit_step(q)[~near], r[name][~near])
        assert near.mean() < 0.1


def test_step_loss(traced):
    trace, r = traced
    ids = np.asarray(r["input_ids"])
    z = trace.logits[:, :, :-1].astype(np.float64)
    z = z - z.max(-1, keepdims=True)
    log_p = z - np.log(np.exp(z).sum(-1, keepdims=True))
    loss = -np.take_along_axis(log_p, ids[None, :, 1:, None], -1).mean((1, 2, 3))
    np.testing.assert_allclose(loss, r["step_loss"], rtol=2e-5)


@pytest.mark.parametrize("name", RANDOM)
def test_bfloat16_is_nearer_than_the_released_code(name):
    r = reference(name)
    ours = load(name, "bfloat16").trace(r["input_ids"]).logits[0]
    exact, theirs = r["logits"][-1], r["last_logits_released_bf16"]
    assert np.abs(ours - exact).max() < np.abs(theirs - exact).max()
    assert np.abs(ours - exact).mean() < np.abs(theirs - exact).mean()


@pytest.mark.parametrize("speculate", [False, True])
@pytest.mark.parametrize("name", RANDOM)
def test_greedy_continuations(name, speculate):
    model, r = load(name), reference(name)
    for row in (0, 1):
        for key, control in (("last", {}), ("step0", {"exit_at_step": 0}), ("q0.5", {"exit_threshold": 0.5})):
            expected, margin = r[f"greedy_{key}_{row}"].tolist(), r[f"greedy_margin_{key}_{row}"]
            found = model.generate(r["input_ids"][row][:17], max_new_tokens=32, eos_token_id=[], speculate=speculate, **control)
            until = next((i for i, m in enumerate(margin) if m < 1e-4), 32)  # behind a tie anything may follow
            assert found.token_ids[:until] == expected[:until]
            assert until > 5


def test_trained_greedy():
    model = load("trained")
    cases = json.loads((FIXTURES / "trained" / "greedy.json").read_text())
    for case in cases if isinstance(cases, list) else cases.values():
        ids = case.get("ids") or case.get("prompt_ids")
        expected = case.get("greedy") or case.get("tokens") or case.get("greedy_ids")
        assert model.generate(ids, max_new_tokens=len(expected), eos_token_id=[]).token_ids == expected
