"""Speculation over steps never shows: random settings give the same tokens, log probabilities and exit steps with and without."""

import random

import numpy as np
import pytest
from conftest import load, reference

import ouro

pytestmark = pytest.mark.core

RULES = [
    {}, {}, {"exit_threshold": 0.5}, {"exit_threshold": 0.8}, {"exit_at_step": 0}, {"weighted_exit": True},
    {"exit_rule": ouro.exits.ReadoutKL(0.1, delay=1)}, {"exit_rule": ouro.exits.TopAgreement(min_steps=2)},
    {"exit_rule": ouro.exits.StateRelative(0.5)}, {"exit_rule": ouro.exits.CustomExit(rule=lambda s: s["exit_pdf"] > 0.4)},
]  # fmt: skip
SAMPLING = [{}, {}, {"temperature": 0.9, "top_p": 0.9}, {"temperature": 1.3, "top_k": 20, "min_p": 0.02}, {"repetition_penalty": 1.4},
            {"temperature": 0.6, "repetition_penalty": 1.2}]  # fmt: skip
FORMS = [("float32", None), ("bfloat16", None), ("bfloat16", "int8"), ("int8", None), ("int4", "int8")]


def outcome(g):
    return g.token_ids, g.logprobs, g.exit_steps, np.nan_to_num(g.exit_pdf, nan=-1).tolist(), g.top_logprobs, g.text, g.finish_reason


@pytest.mark.parametrize("draw", range(14))
def test_random_settings(draw):
    dice = random.Random(draw)
    name = dice.choice(["trained", "trained", "tiny-gqa-tied"])
    compute, kv = FORMS[draw % len(FORMS)]
    model = load(name, compute, threads=dice.choice([1, 2]), **({"kv_dtype": kv} if kv else {}))
    rows = reference(name)["input_ids"]
    prompts = [dice.choice(rows)[: dice.choice([1, 6, 30])].tolist() for _ in range(dice.choice([1, 3]))]
    prompts[0] *= dice.choice([1, 4])  # repeats
    settings = {"max_new_tokens": dice.choice([1, 14, 40]), "n_steps": dice.choice([1, 2, 4, 8]), "seed": draw,
                "logprobs": dice.choice([0, 3]), "kv_policy": dice.choice(["full", "full", "first_step", "last_exited"])}  # fmt: skip
    settings |= dice.choice(RULES) | dice.choice(SAMPLING) | ({"stop": ["th", "."]} if name == "trained" and dice.random() < 0.3 else {})
    plain = [outcome(model.generate(p, speculate=False, **settings)) for p in prompts]
    for speculate in (True, "auto"):
        assert [outcome(g) for g in model.generate(prompts, speculate=speculate, **settings)] == plain
        assert outcome(model.generate(prompts[-1], speculate=speculate, **settings)) == plain[-1]


def test_statistics_add_up(tiny):
    """Every guess is kept, dropped or still there at the end; lanes are at least one a pass."""
    for prompt in ("One day Ann took", "Bob"):
        plain = tiny.generate(prompt, max_new_tokens=40, eos_token_id=[], speculate=False).stats
        s = tiny.generate(prompt, max_new_tokens=40, eos_token_id=[], speculate=True).stats
        n = len(tiny.to_tokens(prompt))
        assert plain.passes == 4 * 40 and plain.lanes == 4 * (n + 39) and plain.guesses == plain.kept == plain.dropped == 0
        assert s.passes < plain.passes and s.lanes >= plain.lanes and 0 <= s.guesses - s.kept - s.dropped <= 6
        assert 0 <= s.p1 <= 1 and s.kept > 20


def test_speculation_starts_during_prefill(tiny):
    """The first new token does not wait four passes for a guess: successors ride with the prompt."""
    s = tiny.generate("One day Ann took", max_new_tokens=3, eos_token_id=[], speculate=True).stats
    assert s.guesses >= 1 and s.kept == 2 and s.passes < 12


@pytest.mark.parametrize("settings", [{}, {"temperature": 0.3, "seed": 3}, {"exit_threshold": 0.6}, {"kv_policy": "first_step"}])
def test_repeats_are_guessed_ahead(tiny, settings):
    """In a text that repeats itself tokens are guessed before any readout: less than one pass for each."""
    settings = {"max_new_tokens": 80, "eos_token_id": [], **settings}
    prompt = "Count: 2 7 7 2 7 7 2 7 7 2 7 7 2 7 7 2 7 7 2 7 7 2 7 7 2 7 7"
    plain, ahead = (tiny.generate(prompt, speculate=speculate, **settings) for speculate in (False, True))
    assert outcome(ahead) == outcome(plain)
    assert 20 < ahead.stats.lookups_kept <= ahead.stats.lookups and ahead.stats.passes < 80
