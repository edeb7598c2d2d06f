"""Cache policies against a plain NumPy model; the same bits alone and in company; memory that really goes."""

import functools

import numpy as np
import pytest
from conftest import load, reference
from oracle import Oracle
from paths import FIXTURES, TINY

import ouro
from ouro import _core
from ouro.generation import KV_POLICIES

pytestmark = pytest.mark.core
OTHERS = KV_POLICIES[1:]
CONTROLS = [{}, {"q": 0.5}, {"exit_at_step": 1}, {"n_steps": 5, "q": 0.6}, {"exit_at_step": 0}]


@functools.cache
def oracle(name):
    return Oracle(TINY if name == "trained" else FIXTURES / name)


def ours(model, prompt, new, policy, control, **more):
    arguments = {("exit_threshold" if k == "q" else k): v for k, v in control.items()}
    return model.generate(prompt, max_new_tokens=new, eos_token_id=[], kv_policy=policy, **arguments, **more)


@pytest.mark.parametrize("control", CONTROLS, ids=str)
@pytest.mark.parametrize("policy", KV_POLICIES)
@pytest.mark.parametrize("name", ["tiny-gqa-tied", "tiny-mha"])
def test_against_numpy(name, policy, control):
    prompt = reference(name)["input_ids"][0][:7].tolist()
    made = ours(load(name), prompt, 6, policy, control)
    expected = oracle(name).greedy(prompt, 6, policy=policy, given=made.token_ids, **control)
    np.testing.assert_allclose(made.logprobs, expected["logprobs"], rtol=0, atol=3e-4)
    assert made.exit_steps == expected["exit_steps"]
    free = oracle(name).greedy(prompt, 6, policy=policy, **control)
    until = next((i for i, m in enumerate(free["margins"]) if m < 1e-3), 6)
    assert made.token_ids[:until] == free["tokens"][:until]


@pytest.mark.parametrize("policy", OTHERS)
def test_a_prompt_of_one_token_and_a_block_boundary(policy):
    """The fold takes a prompt of one token, and one that ends inside a block; new tokens cross the next boundary."""
    model = load("trained")
    text = reference("trained")["input_ids"][0]
    for n, new in ((1, 4), (61, 6)):
        prompt = np.resize(text, n).tolist()
        made = ours(model, prompt, new, policy, {"q": 0.7})
        expected = oracle("trained").greedy(prompt, new, policy=policy, q=0.7, given=made.token_ids)
        np.testing.assert_allclose(made.logprobs, expected["logprobs"], rtol=0, atol=1e-3)
        assert made.exit_steps == expected["exit_steps"]


def outcome(g):
    return g.token_ids, g.logprobs, g.exit_steps, g.top_logprobs


@pytest.mark.parametrize("kv", ["bfloat16", "int8"])
@pytest.mark.parametrize("policy", OTHERS)
def test_alone_and_in_company(policy, kv):
    """Bits do not depend on batch, chunks, threads or (where it is possible) speculation."""
    ids = reference("trained")["input_ids"]
    prompts = [ids[0][:20].tolist(), ids[1][:40].tolist(), ids[2][:1].tolist()]
    model, other = load("trained", "bfloat16", kv_dtype=kv), load("trained", "bfloat16", kv_dtype=kv, threads=3)
    for control in ({}, {"exit_threshold": 0.6}, {"exit_rule": ouro.exits.TopAgreement(), "temperature": 0.8, "seed": 3}, {"n_steps": 6},
                    {"weighted_exit": True}):  # fmt: skip
        arguments = {"max_new_tokens": 30, "kv_policy": policy, "logprobs": 2, "eos_token_id": [], **control}
        alone = [outcome(model.generate(p, speculate=False, **arguments)) for p in prompts]
        assert [outcome(g) for g in other.generate(prompts, **arguments)] == alone
        if policy in ("first_step", "last_exited"):
            assert [outcome(model.generate(p, speculate=True, **arguments)) for p in prompts] == alone


def test_policies_in_one_batch():
    """Requests of different policies share passes and stay themselves."""
    model = load("trained", "bfloat16")
    prompt = reference("trained")["input_ids"][0][:20].astype(np.int32)
    alone = {p: model.generate(prompt, max_new_tokens=20, kv_policy=p, eos_token_id=[]).token_ids for p in KV_POLICIES}
    engine = _core.Engine(model._core, 64)
    plain = dict(n_steps=4, exit_at_step=-1, weighted_exit=False, exit_kind="never", exit_threshold=0.0, exit_min_steps=0, exit_delay=0,
                 exit_rule=None, temperature=0.0, top_k=0, top_p=1.0, min_p=0.0, repetition_penalty=1.0, seed=0, stream=0, stop_ids=[],
                 n_top=0, speculate=2)  # fmt: skip
    found = {engine.submit(prompt, max_new_tokens=20, kv_policy=i, **plain): [] for i in range(len(KV_POLICIES))}
    while engine.pending():
        for event in engine.step():
            found[event[0]].append(event[1])
    assert list(found.values()) == [alone[p] for p in KV_POLICIES]
    assert engine.stats()["cache_bytes"] == 0


@pytest.mark.parametrize("policy", ["last_step", "average", "first_step"])
def test_memory_is_given_back(policy):
    """One row of pages of four is left after the prompt, and what is set aside shrinks with it."""
    model = load("trained", "bfloat16")
    page = model.info()["kv_page_bytes"]
    prompt = np.resize(reference("trained")["input_ids"][0], 300).tolist()
    full, folded = (model.generate(prompt, max_new_tokens=8, kv_policy=p, eos_token_id=[]).stats.cache_bytes for p in ("full", policy))
    assert full == 4 * folded == 4 * 5 * page
    engine = _core.Engine(model._core, 512, 24 * page, prefill_lanes=512)  # a full request needs 4 rows of 6 pages: only one fits
    arguments = {"exit_kind": "never", "exit_threshold": 0.0, "exit_min_steps": 0, "exit_delay": 0, "exit_rule": None, "temperature": 0.0}
    more = {"top_k": 0, "top_p": 1.0, "min_p": 0.0, "repetition_penalty": 1.0, "seed": 0, "stream": 0, "stop_ids": [], "n_top": 0}
    for _ in range(2):
        engine.submit(np.array(prompt[:200], np.int32), max_new_tokens=180, n_steps=4, exit_at_step=-1, weighted_exit=False,
                      speculate=0, kv_policy=KV_POLICIES.index(policy), **arguments, **more)  # fmt: skip
    first = [engine.step() for _ in range(12)]
    assert engine.stats()["cache_bytes"] > 4 * page and {event[0] for events in first for event in events} == {1, 2}  # both are under way


def test_refusals(tiny):
    with pytest.raises(ValueError, match=r"kv_policy is 'half', expected one of full, last_step"):
        tiny.generate("One", max_new_tokens=2, kv_policy="half")
    for policy in ("last_step", "average"):
        with pytest.raises(ValueError, match="speculation is not possible"):
            tiny.generate("One", max_new_tokens=2, kv_policy=policy, speculate=True)


def test_without_exits_last_exited_is_full(tiny):
    full, same = (tiny.generate("One day Ann took", max_new_tokens=30, kv_policy=p) for p in ("full", "last_exited"))
    assert outcome(full) == outcome(same)


@pytest.mark.parametrize("policy", KV_POLICIES)
def test_a_given_text_is_followed(policy):
    """`follow` gives the log probabilities of its tokens, and the greedy choice again behind its end."""
    model, prompt = load("tiny-gqa-tied"), reference("tiny-gqa-tied")["input_ids"][1][:5].tolist()
    given = reference("tiny-gqa-tied")["input_ids"][2][:6].tolist()
    made = ours(model, prompt, 8, policy, {"q": 0.5}, follow=given)
    expected = oracle("tiny-gqa-tied").greedy(prompt, 8, policy=policy, q=0.5, given=made.token_ids)
    np.testing.assert_allclose(made.logprobs, expected["logprobs"], rtol=0, atol=3e-4)
    assert made.token_ids[:6] == given and made.exit_steps == expected["exit_steps"]
    with pytest.raises(ValueError, match="outside of the vocabulary"):
        ours(model, prompt, 8, policy, {}, follow=[100000])
