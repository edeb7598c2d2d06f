"""Random schedules: arrivals, cancels, exits, branches, chunks, reuse. Every sequence is the same bits as alone and plain."""

from functools import cache

import numpy as np
import pytest
from conftest import load
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import ouro
from ouro import _core, schedule

MODELS = [("tiny-gqa-tied", "float32", None), ("tiny-mha", "bfloat16", "int8"), ("tiny-sharded", "int8", None), ("trained", "int4", None),
          ("trained", "bfloat16", None), ("tiny-one-step", "bfloat16", None)]  # fmt: skip
CONTROLS = (
    {},
    {"exit_threshold": 0.5},
    {"exit_at_step": 0},
    {"n_steps": 5},
    {"weighted_exit": True},
    {"temperature": 1.0, "seed": 1, "top_p": 0.9},
    {"temperature": 0.8, "seed": 2, "repetition_penalty": 1.3, "exit_threshold": 0.4},
    {"exit_rule": ouro.exits.ReadoutKL(0.1), "logprobs": 3},
    {"exit_rule": ouro.exits.StateRelative(0.6, delay=1), "repetition_penalty": 1.2},
    {"exit_rule": ouro.exits.CustomExit(rule=lambda s: s["confidence"] > 0.3), "temperature": 0.5, "seed": 9, "top_k": 20},
    {"exit_rule": ouro.exits.NamedExit(0.5, delay=1, rule="confidence"), "logprobs": 2},
    {"exit_rule": ouro.exits.TopAgreement(min_steps=2), "eos_token_id": [7, 11]},
    {"kv_policy": "last_step"},
    {"kv_policy": "average", "exit_threshold": 0.5},
    {"kv_policy": "first_step", "temperature": 1.0, "seed": 4},
    {"kv_policy": "last_exited", "exit_threshold": 0.4},
)

requests = st.fixed_dictionaries({
    "length": st.one_of(st.integers(1, 20), st.sampled_from([63, 64, 65, 66, 127, 128, 129, 140])),
    "text": st.integers(0, 2),  # which beginning
    "control": st.integers(0, len(CONTROLS) - 1),
    "new": st.integers(1, 12),
    "sample": st.integers(0, 1),
})  # fmt: skip
actions = st.lists(
    st.one_of(
        st.tuples(st.just("submit"), requests, st.sampled_from([False, True, "auto"])),
        st.tuples(st.just("follow"), st.integers(0, 20), st.integers(1, 70)),
        st.tuples(st.just("cancel"), st.integers(0, 20), st.none()),
        st.tuples(st.just("step"), st.integers(1, 9), st.none()),
    ),
    min_size=3, max_size=24,
)  # fmt: skip
options = st.fixed_dictionaries({
    "max_lanes": st.sampled_from([1, 3, 8, 30, 256]),
    "prefill_lanes": st.sampled_from([1, 5, 32]),
    "prefix_cache_bytes": st.sampled_from([0, 1 << 20, 64 << 20]),
    "max_cache_bytes": st.sampled_from([36, 5000]),  # pages: hardly more than the largest request, or plenty
})  # fmt: skip


def tokens(model, text, length):
    """Three texts with 0, 64 or 100 tokens in common with the first."""
    shared = (0, 64, 100)[text]
    base = (np.arange(length) * 31 + 5) % (model.config.d_vocab - 20) + 12
    return [int(t) if i < shared or not text else int(t) % 40 + 12 for i, t in enumerate(base)]


def outcome(g):
    return g.token_ids, g.logprobs, g.exit_steps, np.nan_to_num(g.exit_pdf, nan=-1).tolist(), g.top_logprobs


@cache
def alone(name, compute, kv, prompt, control, new, sample):
    """Plain decoding by the core, nothing else in the engine."""
    model = load(name, compute, kv_dtype=kv)
    log = []
    with ouro.Engine(model, background=False, prefix_cache_bytes=0, log=log) as engine:
        arguments = {"eos_token_id": [], **CONTROLS[control]}
        g = engine.submit(list(prompt), max_new_tokens=new, sample=sample, speculate=False, **arguments).result()
    return outcome(g), {at: state for at, ((_, state),) in states_of(log, 1).items()}


def states_of(log, request):
    """Checksums of states, with the kind of lane, by (position, step, token)."""
    found = {}
    for entry in log:
        for number, kind, pos, step, token, state in entry.get("lanes", ()):
            if number == request:
                found.setdefault((pos, step, token), []).append((kind, state))
    return found


def check_states(log, request, g, plain):
    """What was computed for real has the bits of plain decoding, step by step; and all that a readout rests on was computed: of
    guesses at the right token one has them."""
    found = states_of(log, request)
    for at, lanes in found.items():
        real = [state for kind, state in lanes if kind != "guess"]
        assert len(real) <= 1 and (not real or plain.get(at, real[0]) == real[0])
    sequence = g.prompt_token_ids + g.token_ids
    for pos in range(g.stats.prefix_tokens, 0 if g.finish_reason == "cancelled" else len(sequence) - 1):
        for step in range(g.exit_steps[max(0, pos - len(g.prompt_token_ids) + 1)] + 1):
            at = (pos, step, sequence[pos])
            assert plain[at] in [state for _, state in found[at]]


def check_schedule(which, options, actions):
    model = load(which[0], which[1], kv_dtype=which[2])
    log, made = [], []
    options = {**options, "max_cache_bytes": options["max_cache_bytes"] * model.info()["kv_page_bytes"]}
    with ouro.Engine(model, background=False, log=log, **options) as engine:

        def submit(prompt, control, new, sample, speculate):
            if CONTROLS[control].get("kv_policy") in ("last_step", "average"):
                speculate = False
            arguments = {"eos_token_id": [], **CONTROLS[control]}
            handle = engine.submit(prompt, max_new_tokens=new, sample=sample, speculate=speculate, **arguments)
            made.append((handle, (tuple(prompt), control, new, sample)))

        for kind, a, b in actions:
            if kind == "submit":
                submit(tokens(model, a["text"], a["length"]), a["control"], a["new"], a["sample"], b)
            elif kind == "follow" and made:  # a later turn: begins with what an earlier request read and wrote
                earlier = made[a % len(made)][0].generation
                submit((earlier.prompt_token_ids + earlier.token_ids + tokens(model, 0, b))[:200], 0, 4, 0, True)
            elif kind == "cancel" and made:
                made[a % len(made)][0].cancel()
            elif kind == "step":
                for _ in range(a):
                    engine.step()
        while engine.step():
            pass
        results = [handle.result() for handle, _ in made]
        assert engine.stats.cache_bytes == engine.stats.prefix_bytes <= options["prefix_cache_bytes"]
    for found, (handle, asked) in zip(results, made, strict=True):
        expected, plain = alone(*which, *asked)
        check_states(log, handle.number, found, plain)
        if found.finish_reason == "cancelled":
            n = len(found.token_ids)
            expected = tuple(None if part is None else part[:n] for part in expected)
        assert outcome(found) == expected
    rules = {handle.number: CONTROLS[asked[1]].get("exit_rule") for handle, asked in made}
    again = schedule.replay(model, log, exit_rules={n: r.rule for n, r in rules.items() if isinstance(r, ouro.exits.CustomExit)})
    assert [outcome(g) for g in again.values()] == [outcome(g) for g in results]


@pytest.mark.core
@settings(max_examples=15, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
@given(st.sampled_from(MODELS), options, actions)
def test_random_schedules(which, options, actions):
    check_schedule(which, options, actions)


@pytest.mark.slow
@settings(max_examples=300, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.sampled_from(MODELS), options, actions)
def test_many_random_schedules(which, options, actions):
    check_schedule(which, options, actions)


@pytest.mark.parametrize("which", MODELS, ids=lambda m: f"{m[0]}-{m[1]}")
def test_states_by_way_of_a_trace(which):
    """Positions read from shared blocks, beside others at other steps, leave the states that a trace has: the log
    probabilities of a request are those of the readouts of one forward over everything it read and wrote."""
    model = load(which[0], which[1], kv_dtype=which[2])
    prompt = tokens(model, 0, 130)
    with ouro.Engine(model, background=False, max_lanes=24) as engine:
        first = engine.submit(prompt, max_new_tokens=4, eos_token_id=[])
        second = engine.submit([*prompt, 13, 14], max_new_tokens=10, eos_token_id=[], speculate=True)
        second.result(), first.result()
    g = second.result()
    assert g.stats.prefix_tokens == 128
    trace = model.trace([*prompt, 13, 14, *g.token_ids[:-1]], logits="last")
    z = trace.logits[-1, 0, 131:]
    assert z.argmax(-1).tolist() == g.token_ids
    log_z = model._core.readout(trace.states[-1, 0, 131:], False)[2]
    found = np.array([np.float64(row[t]) - np.float64(lz) for row, t, lz in zip(z, g.token_ids, log_z, strict=True)])
    np.testing.assert_array_equal(found.astype(np.float32), np.float32(g.logprobs))
    pdf = trace.exit_pdf[:, 0, 131:]
    np.testing.assert_array_equal(np.array(g.exit_pdf).T, pdf)


LOOPED = ({}, {"speculate": True}, {"exit_threshold": 0.5}, {"exit_threshold": 0.4, "speculate": True, "logprobs": 2},
          {"kv_policy": "last_step"}, {"kv_policy": "first_step", "speculate": True}, {"n_steps": 2})  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize(("name", "kinds"), [("tiny-one-step", ({},)), ("tiny-mha", LOOPED)])
def test_soak(name, kinds):
    """10 000 short requests with random cancels: what the core holds is what it held before, and so does the process."""
    model = load(name)
    rng = np.random.default_rng(3)
    with ouro.Engine(model, max_lanes=32, prefix_cache_bytes=1 << 20) as engine:

        def crowd(n):
            handles = []
            for _ in range(n):
                length = int(rng.integers(1, 90))
                prompt = (np.arange(length) * int(rng.integers(1, 4)) % 90 + 3).tolist()
                sampled = {"temperature": 1.0, "seed": int(rng.integers(9))} if rng.random() < 0.5 else {}
                sampled |= kinds[int(rng.integers(len(kinds)))]
                handles.append(engine.submit(prompt, max_new_tokens=int(rng.integers(1, 8)), eos_token_id=[], **sampled))
                if rng.random() < 0.3:
                    handles[int(rng.integers(len(handles)))].cancel()
            return {h.result().finish_reason for h in handles}

        for _ in range(4):
            crowd(500)
        before, core = _core.resident_memory(), engine.stats
        for _ in range(16):
            assert crowd(500) == {"length", "cancelled"}
        after, s = _core.resident_memory(), engine.stats
        assert s.running == s.waiting == 0 and s.cache_bytes == s.prefix_bytes <= 1 << 20
        assert s.cache_peak <= core.cache_peak + (1 << 20)
        assert after - before < 8 << 20
