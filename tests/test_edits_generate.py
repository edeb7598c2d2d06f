"""Edits, hooks and captures while tokens are generated: exact under speculation, exit and batching."""

import numpy as np
import pytest
from conftest import load, reference

import ouro
from ouro.edits import Add, Noise, ProjectOut, Scale, ZeroHead

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
    with pytest.raises(ValueError, match="kv_policy"):
        model.generate(prompts[0], capture="state", kv_policy="last_step")
    with pytest.raises(KeyError, match="near: state"):
        model.generate(prompts[0], capture="states")


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
