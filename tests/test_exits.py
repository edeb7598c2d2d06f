"""Every exit rule: what the core says about a trace, against plain NumPy on the trace's arrays, and against generation."""

import numpy as np
import pytest
from conftest import load, reference

import ouro
from ouro.exits import (
    Acceleration,
    Confidence,
    CustomExit,
    NamedExit,
    QExit,
    ReadoutEntropy,
    ReadoutKL,
    StateDelta,
    StateRelative,
    TopAgreement,
)

pytestmark = pytest.mark.core

RULES = [QExit(0.3), QExit(0.9), QExit(1.0), StateDelta(4.0), StateRelative(0.4), Acceleration(0.4), ReadoutKL(0.05), TopAgreement(),
         ReadoutEntropy(1.0), Confidence(0.8), QExit(0.5, min_steps=2), ReadoutEntropy(1.5, delay=1), TopAgreement(min_steps=3, delay=1),
         Confidence(0.0), ReadoutEntropy(-1.0)]  # fmt: skip


def signals(trace):
    """The numbers of each rule [step, ...] in float64, NaN where there is no step before."""
    h, z, pdf = (np.asarray(x, np.float64) for x in (trace.states, trace.logits, trace.exit_pdf))
    log_p = z - z.max(-1, keepdims=True)
    log_p -= np.log(np.exp(log_p).sum(-1, keepdims=True))
    p, gap, nothing = np.exp(log_p), np.diff(h, axis=0), np.full((1, *h.shape[1:-1]), np.nan)
    delta = np.linalg.norm(gap, axis=-1)
    cdf = pdf.cumsum(0)
    cdf[-1] = 1
    return {
        QExit: cdf,
        StateDelta: np.concatenate([nothing, delta]),
        StateRelative: np.concatenate([nothing, delta / np.linalg.norm(h[:-1], axis=-1)]),
        Acceleration: np.concatenate([nothing, nothing, np.linalg.norm(np.diff(gap, axis=0), axis=-1) / np.linalg.norm(h[2:], axis=-1)]),
        ReadoutKL: np.concatenate([nothing, (p[:-1] * (log_p[:-1] - log_p[1:])).sum(-1)]),
        TopAgreement: np.concatenate([nothing, np.diff(z.argmax(-1), axis=0) != 0]),
        ReadoutEntropy: -(p * log_p).sum(-1),
        Confidence: p.max(-1),
    }


def expected(rule, numbers):
    """Exit steps by the rule's words, and where a number is too near its threshold to tell."""
    x, steps = numbers[type(rule)], len(numbers[QExit])
    if isinstance(rule, QExit):
        fires = (x >= rule.threshold) & (rule.threshold < 1)
    elif isinstance(rule, TopAgreement):
        fires = x == 0
    else:
        fires = x > rule.threshold if isinstance(rule, Confidence) else x < rule.threshold
    fires[: max(rule.min_steps - 1, 0)] = False
    first = np.where(fires.any(0), fires.argmax(0), steps)
    near = (np.abs(x[:-1] - rule.threshold) < 1e-4).any(0)  # the last step leaves whatever its number is
    return np.minimum(first + rule.delay, steps - 1), near & (rule != QExit(1.0)) & (not isinstance(rule, TopAgreement))


@pytest.mark.parametrize("name", ["tiny-gqa-tied", "tiny-sharded", "trained"])
def test_rules_against_numpy(name):
    trace = load(name).trace(reference(name)["input_ids"], logits="all")
    numbers, seen = signals(trace), set()
    for rule in RULES:
        steps, near = expected(rule, numbers)
        found = trace.exit_step(rule)
        np.testing.assert_array_equal(found[~near], steps[~near], err_msg=str(rule))
        assert near.mean() < 0.1
        seen |= set(found.reshape(-1).tolist())
    assert seen == set(range(trace.n_steps))
    np.testing.assert_array_equal(trace.exit_step(0.3), trace.exit_step(QExit(0.3)))


@pytest.mark.parametrize("compute", ["float32", "bfloat16", "int8", "int4"])
def test_generation_leaves_where_the_trace_says(compute):
    model = load("trained", compute)
    prompt = reference("trained")["input_ids"][1][:20].tolist()
    for rule in [*RULES, CustomExit(rule=lambda s: s["exit_cdf"] > 0.6 and s["entropy"] < 1 and s["kl"] == s["kl"])]:
        made = model.generate(prompt, max_new_tokens=16, exit_rule=rule, eos_token_id=[])
        trace = model.trace(prompt + made.token_ids[:-1], logits="none")
        assert trace.exit_step(rule)[0, len(prompt) - 1 :].tolist() == made.exit_steps, rule


def test_ragged_batches_and_what_is_refused(tiny):
    trace = tiny.trace([[5, 6, 7, 8], [5, 6]], logits="none")
    for rule in RULES:
        steps = trace.exit_step(rule)
        assert steps[1, 2:].tolist() == [-1, -1] and (steps[0] >= 0).all() and steps[0, :2].tolist() == steps[1, :2].tolist()
    with pytest.raises(ValueError, match=r"q is 1\.5"):
        trace.exit_step(1.5)
    with pytest.raises(ValueError, match="exit_threshold is 2"):
        trace.exit_step(QExit(2.0))

    def broken(signal):
        raise KeyError(signal["previous_top_token"])

    with pytest.raises(KeyError, match="-1"):
        trace.exit_step(CustomExit(rule=broken))
    with pytest.raises(ValueError, match=r"gate logits \(4, 3\)"):
        tiny._core.exit_steps(trace.states[:, 0], trace.gate_logit[:, 0, :3], "q", 0.5, 0, 0, None)
    assert ouro.exits.QExit(0.5) == QExit(0.5)


def test_rules_over_measured_numbers(tiny):
    """`_core.exit_steps` says what NumPy says, for random numbers with gaps, and what a rule by its name says."""
    rng = np.random.default_rng(5)
    steps, n = 5, 40
    numbers = {name: rng.random((steps, n)).astype(np.float32) for name in ("exit_cdf", "state_delta", "kl", "entropy", "confidence")}
    numbers["state_delta"][0], numbers["top_token"] = np.nan, rng.integers(0, 3, (steps, n))
    named = {QExit: "exit_cdf", StateDelta: "state_delta", ReadoutKL: "kl", ReadoutEntropy: "entropy", Confidence: "confidence"}
    for kind, min_steps, delay in ((k, m, d) for k in [*named, TopAgreement] for m in (0, 2, 9) for d in (0, 1, 9)):
        rule = kind(0.4, min_steps, delay)
        x = numbers[named.get(kind, "top_token")]
        x = np.concatenate([np.full((1, n), np.nan), np.diff(x, axis=0) != 0]) if kind is TopAgreement else x
        steps_expected, _ = expected(rule, {QExit: numbers["exit_cdf"], kind: x})
        assert rule.signal == named.get(kind, "")
        for asked in (rule, NamedExit(0.4, min_steps, delay, rule=rule.kind)):
            found = ouro._core.exit_steps(numbers, asked.kind, asked.threshold, asked.min_steps, asked.delay)
            np.testing.assert_array_equal(found, steps_expected, err_msg=str(asked))
    with pytest.raises(ValueError, match="no signal"):
        ouro._core.exit_steps({}, "q", 0.5, 0, 0)
    with pytest.raises(ValueError, match="no exit rule 'r'"):
        tiny.generate([5], max_new_tokens=1, exit_rule=NamedExit(0.5, rule="r"))
