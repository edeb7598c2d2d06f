"""Edits, hooks and captures while tokens are generated: exact under speculation, exit and batching."""

import numpy as np
import pytest
from conftest import load, reference

import ouro
from ouro.edits import Add, Noise, ProjectOut, Scale, ZeroHead
from ouro.forward import Forward

pytestmark = pytest.mark.core
VECTOR = np.random.default_rng(1).normal(size=128)
EDITS = [
    Add("resid_post", VECTOR, 0.4, layers=[1, 2], steps=[1, 2, 3]),
    ProjectOut("mlp_out", VECTOR, steps=[0]),
    Noise("z", 0.05, 3, layers=[3]),
    ZeroHead(layers=[2], heads=[-1], pos=slice(-1, None)),
    Scale("logits", 1.5, pos=slice(0, None, 2)),
    Add("gate_logit", 0.5),
]
CONTROLS = {
    "plain": {},
    "sampled": {"temperature": 1.0, "top_p": 0.9, "seed": 7},
    "q-exit": {"exit_threshold": 0.6},
    "kl": {"exit_rule": ouro.exits.ReadoutKL(0.05)},
    "fixed step": {"exit_at_step": 1},
    "deeper": {"n_steps": 6},
    "weighted": {"weighted_exit": True},
}


@pytest.fixture(scope="module")
def prompts():
    return [row[:n].tolist() for row, n in zip(reference("trained")["input_ids"], (12, 30, 5), strict=False)]


@pytest.mark.parametrize("controls", CONTROLS.values(), ids=list(CONTROLS))
def test_schedules_agree(controls, prompts):
    model, more = load("trained", "bfloat16"), {"max_new_tokens": 24, "eos_token_id": [], "edits": EDITS, **controls}
    alone = [model.generate(p, speculate=False, **more) for p in prompts]
    assert alone[0].token_ids != model.generate(prompts[0], **{**more, "edits": ()}).token_ids
    for speculate in (True, "auto"):
        for a, b in zip(alone, model.generate(prompts, speculate=speculate, **more), strict=True):
            assert a.token_ids == b.token_ids and a.logprobs == b.logprobs and a.exit_steps == b.exit_steps


def test_decoding_agrees_with_recomputation(prompts):
    """Edits in generate are those of a trace over the final sequence; a capture is that trace."""
    model = load("trained", "bfloat16")
    made = model.generate(prompts[0], max_new_tokens=20, eos_token_id=[], edits=EDITS, capture=["logits", "resid_post", "gate_pdf"])
    cache, n = made.cache, len(prompts[0])
    assert cache.lengths == [n + 19] and cache["resid_post"].shape == (4, 4, 1, n + 19, 128)
    z = cache["logits"][-1, 0]
    assert [int(row.argmax()) for row in z[n - 1 :]] == made.token_ids
    np.testing.assert_array_equal(cache["gate_pdf"][:, 0, n - 1 :].T, made.exit_pdf)


@pytest.mark.parametrize("controls", [{"exit_threshold": 0.6}, {"exit_at_step": 1}, {"speculate": True}], ids=str)
def test_capture_under_exit_and_speculation(controls, prompts):
    model = load("trained", "bfloat16")
    made = model.generate(prompts[1], max_new_tokens=16, eos_token_id=[], capture=["logits", "state"], **controls)
    z = made.cache["logits"][:, 0, len(prompts[1]) - 1 :]
    assert [int(z[step, i].argmax()) for i, step in enumerate(made.exit_steps)] == made.token_ids
    assert made.cache.n_steps == (2 if "exit_at_step" in controls else 4)
    with pytest.raises(KeyError, match="near: state"):
        model.generate(prompts[0], capture="states")


@pytest.mark.parametrize("controls", [{}, {"exit_threshold": 0.6}, {"exit_at_step": 1}], ids=str)
def test_capture_with_hooks(controls, prompts):
    """The lanes that ran write; with a hook that is an edit these are the bits of a second run with the edit."""
    model, points = load("trained", "bfloat16"), ["resid_post", "pattern", "gate_pdf", "gate_logit", "state"]
    more = {"max_new_tokens": 9, "eos_token_id": [], "capture": points, **controls}
    with model.hooks([("blocks.2.hook_mlp_out", lambda x, hook: 2 * x)]):
        made = model.generate(prompts[:2], n=2, temperature=0.8, seed=3, **more)
    again = model.generate(prompts[:2], n=2, temperature=0.8, seed=3, edits=[Scale("mlp_out", 2.0, layers=[2])], **more)
    for a, b in zip([x for row in made for x in row], [x for row in again for x in row], strict=True):
        assert a.token_ids == b.token_ids and a.cache.token_ids == b.cache.token_ids and list(a.cache) == list(b.cache)
        n, last = len(a.prompt_token_ids), a.exit_steps[-1]
        for name in a.cache:
            x, y = a.cache[name], b.cache[name]
            assert x.shape == y.shape
            axis = 2 if "pattern" in name else 1
            np.testing.assert_array_equal(x.take(range(n), axis), y.take(range(n), axis), err_msg=name)
            if f"steps.{last}." in name:        # what never ran is NaN, all else is equal
                np.testing.assert_array_equal(x, y, err_msg=name)
            ran = ~np.isnan(x)
            np.testing.assert_array_equal(x[ran], y[ran], err_msg=name)


@pytest.mark.parametrize("policy", ["last_step", "average", "first_step", "last_exited"])
def test_capture_under_a_cache_policy(policy, prompts):
    model, n = load("trained", "bfloat16"), len(prompts[1])
    more = {"max_new_tokens": 12, "eos_token_id": [], "kv_policy": policy, "exit_threshold": 0.6}
    plain = model.generate(prompts[1], **more)
    made = model.generate(prompts[1], capture=["state", "logits", "gate_logit"], **more)
    assert made.token_ids == plain.token_ids and made.logprobs == plain.logprobs and made.exit_steps == plain.exit_steps
    assert made.cache["state"].shape == (4, 1, n + 11, 128)
    for i, step in enumerate(made.exit_steps):
        assert int(made.cache["logits"][step, 0, n - 1 + i].argmax()) == made.token_ids[i]
        assert np.isnan(made.cache["state"][:, 0, n - 1 + i]).any(-1).tolist() == [i > 0 and t > step for t in range(4)]
    full = model.run_with_cache(prompts[1], "state")[1]
    np.testing.assert_array_equal(made.cache["state"][:, :, :n], full["state"])


PROGRAMS = {
    "skip": ouro.LoopProgram().skip_step(1),
    "skip some": ouro.LoopProgram().skip_step(2, pos=slice(-2, None)),
    "freeze": ouro.LoopProgram().freeze_attention(0, steps=[1, 3]),
    "replace": ouro.LoopProgram().replace_state(0, 3).noise(2, 0.1, seed=4),
    "depth": ouro.LoopProgram().steps_per_position({0: 1, 2: 3, 14: 2}),
    "repeat": ouro.LoopProgram().repeat_step(2, 2),
    "swap": ouro.LoopProgram().swap_steps(1, 2).skip_step(0, pos=[3]),
    "layers": ouro.LoopProgram().layers(2, [0, 1, 1, 2, 3]).noise(1, 0.05),
}


@pytest.mark.parametrize("program", PROGRAMS.values(), ids=list(PROGRAMS))
def test_programs_in_generate(program, prompts):
    model, steer = load("trained", "bfloat16"), [Add("resid_post", VECTOR, 0.3, layers=[2], steps=[1])]
    more = {"max_new_tokens": 7, "eos_token_id": [], "program": program, "edits": steer, "logprobs": 2}
    made, n = model.generate(prompts[0], capture=["state", "logits"], **more), len(prompts[0])
    assert made.cache["state"].shape == (4, 1, n + 6, 128) and made.stats.tokens == 7
    assert [int(z.argmax()) for z in made.cache["logits"][-1, 0, n - 1 :]] == made.token_ids
    for top, token, p in zip(made.top_logprobs, made.token_ids, made.logprobs, strict=True):
        assert next(iter(top)) == token and abs(top[token] - p) < 1e-6
    again = model.generate(prompts[0], speculate=False, **more)
    assert again.token_ids == made.token_ids and again.exit_steps == made.exit_steps == [3] * 7


def test_programs_and_their_limits(prompts):
    model = load("trained", "bfloat16")
    skip, swap = PROGRAMS["skip"], PROGRAMS["swap"]
    fewer = model.generate(prompts, max_new_tokens=12, eos_token_id=[], n_steps=3)
    skipped = model.generate(prompts, max_new_tokens=12, eos_token_id=[], program=skip)
    assert [g.token_ids for g in skipped] == [g.token_ids for g in fewer]
    with ouro.Engine(model) as engine:
        assert engine.submit(prompts[0], max_new_tokens=12, eos_token_id=[], program=skip).result().token_ids == fewer[0].token_ids
        with pytest.raises(ValueError, match="lanes of an engine's pass"):
            engine.submit(prompts[0], program=swap)
    for wrong in ({"weighted_exit": True}, {"exit_threshold": 0.5}, {"kv_policy": "last_step"}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            model.generate(prompts[0], program=swap, **wrong)
    text = model.generate("One day", max_new_tokens=20, program=swap)
    stop = text.text[4:7]
    assert stop and model.generate("One day", max_new_tokens=20, program=swap, stop=stop).text == text.text[: text.text.index(stop)]


@pytest.mark.parametrize("steer", [(), (Add("resid_post", VECTOR, 0.3, layers=[2], steps=[1]),)], ids=["", "steered"])
def test_a_program_that_changes_nothing_generates_as_the_engine(prompts, steer):
    """Layers in their own order, each token through its own passes: the engine's tokens, sampled, penalised or given, and its numbers."""
    model, same = load("trained", "bfloat16"), ouro.LoopProgram().layers(1, [0, 1, 2, 3])
    assert same.reorders
    sampled = {"temperature": 1.1, "seed": 5, "top_k": 40, "top_p": 0.95, "min_p": 0.01, "n": 2}
    for more in (sampled, {"repetition_penalty": 1.4}, {"follow": [9, 8, 7], "temperature": 0.7, "seed": 2}):
        more = {"max_new_tokens": 6, "eos_token_id": [], "logprobs": 3, "edits": steer, **more}
        expected, made = (np.atleast_1d(model.generate(prompts[1], program=p, **more)) for p in (None, same))
        for a, b in zip(expected, made, strict=True):
            assert a.token_ids == b.token_ids and a.exit_pdf == b.exit_pdf
            np.testing.assert_allclose(a.logprobs, b.logprobs, atol=2e-6)
            assert [list(t) for t in a.top_logprobs] == [list(t) for t in b.top_logprobs]


ANEW = {name: PROGRAMS[name] for name in ("repeat", "swap", "layers")} | {
    "all": ouro.LoopProgram().layers(1, [3, 0, 0, 2, 1, 1]).repeat_step(0, 2).swap_steps(2, 3).freeze_attention(0, steps=[1])
    .skip_step(3, pos=70),
}


@pytest.mark.parametrize("compute", ["bfloat16", "float32", "int8", "int4"])
@pytest.mark.parametrize("program", ANEW.values(), ids=list(ANEW))
def test_kept_pages_have_the_bits_of_a_forward_for_each_token(program, compute):
    """Keys and values stay from token to token, across the end of a block of 64 positions; any number of threads."""
    prompt, model = np.tile(reference("trained")["input_ids"][0], 2)[:61].tolist(), load("trained", compute)
    edits = [Add("resid_post", VECTOR, 0.3, layers=[2], steps=[1]), Scale("attn_scores", 0.7, layers=[1], steps=[0])]
    more = {"max_new_tokens": 10, "eos_token_id": [], "program": program, "edits": edits}
    made, ids = model.generate(prompt, **more), list(prompt)
    for i, token in enumerate(made.token_ids):
        run = Forward(model, [ids], 4, edits=edits, span=(61, 71))
        run.follow(program)
        whole = run.run()
        z = whole.logits[0, 0, -1]
        x = z.astype(np.float64) - z.max()
        assert int(z.argmax()) == token and made.logprobs[i] == (x - np.log(np.exp(x).sum()))[token]
        assert made.exit_pdf[i] == whole.exit_pdf[:, 0, -1].tolist()
        ids.append(token)
    other = load("trained", compute, threads=3).generate(prompt, **more)
    assert other.token_ids == made.token_ids and other.logprobs == made.logprobs
    assert made.stats.lanes == 70 * len(run.turns) and made.stats.passes == 10 * len(run.turns)


def test_hooks_and_captures_under_a_program_see_each_position_once(prompts):
    model, program, seen = load("trained", "bfloat16"), ANEW["layers"], []
    more = {"max_new_tokens": 5, "eos_token_id": [], "program": program}

    def double(x, hook):
        seen.append(hook.pos.tolist())
        return 2 * x

    n = len(prompts[2])
    expected = model.generate(prompts[2], edits=[Scale("mlp_out", 2.0, layers=[2], steps=[1])], capture=["state"], **more)
    with model.hooks([("steps.1.blocks.2.hook_mlp_out", double)]):
        made = model.generate(prompts[2], capture=["state"], **more)
    assert seen == [list(range(n)), *([p] for p in range(n, n + 4))]
    assert made.token_ids == expected.token_ids and made.logprobs == expected.logprobs
    np.testing.assert_array_equal(made.cache["state"], expected.cache["state"])
    for wrong in ({"max_new_tokens": 0}, {"logprobs": 65}, {"follow": [896]}):
        with pytest.raises(ValueError, match=f"{next(iter(wrong))} is|token 896 at place 0 of follow"):
            model.generate(prompts[2], **{**more, **wrong})


def test_hooks_in_an_engine(prompts):
    """Each request has its own, and what one raises ends that request only."""
    model, more = load("trained", "bfloat16"), {"max_new_tokens": 10, "eos_token_id": []}
    plain, doubled = model.generate(prompts[0], **more), model.generate(prompts[0], edits=[Scale("mlp_out", 2.0, layers=[2])], **more)

    def double(x, hook):
        return 2 * x

    def fail(x, hook):
        if hook.pos[-1] > len(prompts[0]) + 2:
            raise ArithmeticError(hook.name)

    where = "blocks.2.hook_mlp_out"
    with ouro.Engine(model) as engine:
        good, bad, other = (engine.submit(prompts[0], fwd_hooks=h, **more) for h in ([(where, double)], [(where, fail)], ()))
        assert good.result().token_ids == doubled.token_ids and other.result().token_ids == plain.token_ids
        with pytest.raises(ArithmeticError, match=where):
            bad.result()
        assert bad.generation.token_ids == plain.token_ids[: len(bad.generation.token_ids)]
        assert engine.submit(prompts[0], **more).result().token_ids == plain.token_ids
        for _ in range(20):  # it may raise before submit has returned
            with pytest.raises(ZeroDivisionError):
                engine.submit([1], fwd_hooks=[(where, lambda x, hook: 1 // 0)], max_new_tokens=1).result()


def test_engine_takes_edits(prompts):
    model = load("trained", "bfloat16")
    alone = model.generate(prompts[1], max_new_tokens=12, eos_token_id=[], edits=EDITS)
    plain = model.generate(prompts[1], max_new_tokens=12, eos_token_id=[])
    with ouro.Engine(model) as engine:
        handles = [engine.submit(prompts[1], max_new_tokens=12, eos_token_id=[], edits=e) for e in (EDITS, (), EDITS, ())]
        assert [h.result().token_ids for h in handles] == [alone.token_ids, plain.token_ids] * 2
        with pytest.raises(KeyError, match="near"):
            engine.submit(prompts[1], edits=[Scale("resid_pots", 2)])


def test_hooks_in_generate(prompts):
    model, seen = load("trained", "bfloat16"), []

    def double(x, hook):
        seen.append((hook.step, x.shape, hook.pos.tolist()))
        return 2 * x

    more = {"max_new_tokens": 6, "eos_token_id": []}
    with model.hooks([("blocks.2.hook_mlp_out", double)]):
        made = model.generate(prompts[0], **more)
    n = len(prompts[0])
    assert made.token_ids == model.generate(prompts[0], edits=[Scale("mlp_out", 2.0, layers=[2])], **more).token_ids
    places = [(step, p) for step, shape, pos in seen for p in pos if shape == (1, len(pos), 128)]
    assert len(places) == len(set(places)) == 4 * (n + 5)

    class Own(Exception):
        pass

    def fail(x, hook):
        if hook.pos[-1] == n + 2:
            raise Own(hook.name)

    for where in ("blocks.1.attn.hook_pattern", "unembed.hook_out"):
        with model.hooks([(where, fail)]), pytest.raises(Own, match=where):
            model.generate(prompts[0], **more)
    assert model.generate(prompts[0], **more).token_ids == model.generate(prompts[0], speculate=False, **more).token_ids


def test_positions_reach_what_a_generation_may_become(prompts):
    """Up to the prompt and max_new_tokens, however few come; beyond that a request is refused when it is submitted."""
    model, prompt = load("trained", "bfloat16"), prompts[2]
    n, more = len(prompt), {"max_new_tokens": 4, "eos_token_id": []}
    plain, edit = model.generate(prompt, **more), lambda pos: [Add("logits", VECTOR[:1].repeat(896) * np.arange(896), pos=pos)]
    for pos in (n + 2, [-1, n + 3], slice(n, None)):
        assert model.generate(prompt, edits=edit(pos), **more).token_ids != plain.token_ids
        assert model.generate(prompt, edits=edit(pos), program=ouro.LoopProgram().layers(0, [0, 1, 2, 3]), **more).token_ids
    made = model.generate(prompt, edits=edit(n + 3), max_new_tokens=4, eos_token_id=[plain.token_ids[0]], capture="state")
    assert len(made.token_ids) == 1 and made.cache.lengths == [n]
    message = f"out of range: the prompt has {n} tokens and 4 more may come, expected -{n} to {n + 3}"
    for pos in (n + 4, -n - 1):
        with pytest.raises(IndexError, match=message):
            model.generate([prompt, prompts[0]], edits=edit(pos), **more)
        with pytest.raises(IndexError, match=message):
            model.generate(prompt, edits=edit(pos), program=ouro.LoopProgram().layers(0, [0]), **more)
        with ouro.Engine(model) as engine:
            going = engine.submit(prompts[1], **more)
            with pytest.raises(IndexError, match=message):
                engine.submit(prompt, edits=edit(pos), **more)
            assert going.result().token_ids == model.generate(prompts[1], **more).token_ids
