"""Changing: every kind of edit, hooks and loop surgery against the oracle; one answer; errors leave the model usable."""

import numpy as np
import pytest
from conftest import load, reference
from hook_oracle import HookOracle
from paths import FIXTURES

import ouro
from ouro.edits import Add, MeanAblate, Noise, ProjectOut, Scale, Set, Swap, ZeroHead
from ouro.hooks import POINTS

pytestmark = pytest.mark.core
NAME = "tiny-gqa-tied"  # 3 layers, 3 steps, 6 heads on 2, d_model 96
N = 13
RNG = np.random.default_rng(0)
VECTOR = RNG.normal(size=96).astype(np.float32)


@pytest.fixture(scope="module")
def oracle():
    return HookOracle(FIXTURES / NAME)


@pytest.fixture(scope="module")
def ids():
    return reference(NAME)["input_ids"][:2, :N]


def agrees(oracle, ids, change, **arguments):
    """Every point of the edited run is what the oracle says when `change(name, x)` edits it."""
    model, turns = load(NAME, "float32"), arguments.pop("turns", None)
    _, cache = model.run_with_cache(ids, "*", logits="all", **arguments)
    for row in range(len(ids)):
        for name, value in oracle(ids[row], edit=change, turns=turns).items():
            np.testing.assert_allclose(cache[name][row], value, rtol=1e-3, atol=1e-3, err_msg=name)
    return cache


def at(pattern):
    """Names that end so, at any step."""
    return lambda name: name.endswith(pattern)


def test_add_set_scale(oracle, ids):
    def change(name, x):
        if name.endswith("blocks.1.hook_resid_mid") and not name.startswith("steps.0"):
            x = x.copy()
            x[[2, N - 1]] += 0.5 * VECTOR
            return x
        if name == "steps.0.blocks.2.attn.hook_z":
            x = x.copy()
            x[:, [1, 5]] *= 3
            return x
        if name == "steps.2.hook_resid_pre":
            x = x.copy()
            x[4:] = VECTOR
            return x
        return 2 * x + 1 if name == "steps.1.exit_gate.hook_logit" else None

    agrees(oracle, ids, change, edits=[
        Add("resid_mid", VECTOR, 0.5, layers=[1], steps=[1, 2], pos=[2, -1]), Scale("z", 3.0, layers=[-1], heads=[1, -1], steps=[0]),
        Set("steps.2.hook_resid_pre", VECTOR, pos=slice(4, None)), Scale("gate_logit", 2.0, steps=[1]), Add("gate_logit", 1.0, steps=[1]),
    ])  # fmt: skip


def test_project_and_zero(oracle, ids):
    u = VECTOR / np.linalg.norm(VECTOR)

    def change(name, x):
        if name.endswith("hook_mlp_out"):
            return x - (x @ u)[:, None] * u
        if name.endswith("blocks.0.attn.hook_z"):
            x = x.copy()
            x[:, 3] = 0
            return x
        return None

    agrees(oracle, ids, change, edits=[ProjectOut("mlp_out", 7 * VECTOR), ZeroHead(layers=[0], heads=[3])])


INSIDE = [p for p in POINTS if p.core >= 0 and not p.square]


@pytest.mark.parametrize("p", INSIDE, ids=[p.short for p in INSIDE])
def test_every_point_can_be_edited(oracle, ids, p):
    """Scaled by 1.25 at step 1, layer 1 (or where it exists): everything behind follows."""
    name = p.name(1, 1)
    cache = agrees(oracle, ids, lambda n, x: 1.25 * x if n == name else None, edits=[Scale(name, 1.25)])
    assert name in cache


def test_scores_and_patterns(oracle, ids):
    def change(name, x):
        if name == "steps.1.blocks.1.attn.hook_attn_scores":
            return np.where(np.isfinite(x), x * 0.5, x)
        return x * np.array([1, 1, 0, 1, 2, 1])[:, None, None] if name == "steps.2.blocks.0.attn.hook_pattern" else None

    agrees(oracle, ids, change, edits=[
        Scale("attn_scores", 0.5, steps=[1], layers=[1]), Scale("pattern", 0.0, steps=[2], layers=[0], heads=[2]),
        Scale("pattern", 2.0, steps=[2], layers=[0], heads=[4]),
    ])  # fmt: skip


def test_swap_and_mean(oracle, ids):
    model = load(NAME, "float32")
    other = model.run_with_cache(ids[::-1].copy(), ["resid_post", "pattern", "mlp_out"])[1]
    whole = model.run_with_cache(ids, "*", edits=[Swap("resid_post", other, layers=[1], steps=[1], pos=[3, 4])])[1]
    np.testing.assert_array_equal(whole["resid_post", 1, 1][:, 3:5], other["resid_post", 1, 1][:, 3:5])
    mean = other["mlp_out"].mean((2, 3))

    def change(name, x):
        for step in range(3):
            if name == f"steps.{step}.blocks.2.hook_mlp_out":
                return np.broadcast_to(mean[step, 2], x.shape)
        return None

    agrees(oracle, ids, change, edits=[MeanAblate("mlp_out", other, layers=[2])])
    frozen = model.run_with_cache(ids, ["pattern"], edits=[Swap("pattern", other)])[1]
    np.testing.assert_array_equal(frozen["pattern"], other["pattern"])


@pytest.mark.parametrize("compute", ["float32", "bfloat16", "int8", "int4"])
def test_own_values_change_nothing(compute):
    """Swapping in what was there keeps every bit; so does a hook that returns its array."""
    model, ids = load("trained", compute), reference("trained")["input_ids"][:2, :20]
    plain, cache = model.trace(ids, logits="all"), model.run_with_cache(ids, "*")[1]
    edits = [Swap(p.short, cache) for p in POINTS if p.core >= 0 and p.short != "result"]
    edited = model.trace(ids, logits="all", edits=edits)
    if compute == "float32":  # a swapped pattern is used as it is, the softmax's own is rounded relative to a running maximum
        np.testing.assert_allclose(edited.states, plain.states, rtol=1e-4, atol=1e-4)
    edits = [e for e in edits if e.where != "pattern"]
    edited = model.trace(ids, logits="all", edits=edits)
    np.testing.assert_array_equal(edited.states, plain.states)
    np.testing.assert_array_equal(edited.logits, plain.logits)
    seen = []
    z = model.run_with_hooks(ids, [("*", lambda x, hook: seen.append(hook.name))], logits="all")
    np.testing.assert_array_equal(z, plain.logits)
    assert len(seen) == len(set(seen)) == 4 * 4 * 25 + 4 * 6 + 1


def test_one_answer_with_edits():
    """The same bits in any batch, chunk and number of threads."""
    ids = reference("trained")["input_ids"]
    edits = [Noise("resid_pre", 0.1, 3, layers=[1]), Add("z", 0.3, heads=[2], steps=[1]), Scale("pattern", 0.5, layers=[2], pos=-1)]
    whole = load("trained", "bfloat16").trace(ids, edits=edits, logits="all")
    for lanes, threads in ((1, 1), (7, 3)):
        other = load("trained", "bfloat16", threads=threads).trace(ids, edits=edits, logits="all", max_lanes=lanes)
        np.testing.assert_array_equal(other.states, whole.states)
    alone = load("trained", "bfloat16").trace(ids[2], edits=edits, logits="all")
    np.testing.assert_array_equal(alone.logits[:, 0], whole.logits[:, 2])


def test_noise_is_normal_and_has_a_seed():
    model, ids = load("trained", "bfloat16"), reference("trained")["input_ids"]
    plain = model.run_with_cache(ids, "resid_pre")[1]["resid_pre", 1, 0]
    added = [model.run_with_cache(ids, "resid_pre", edits=[Noise("resid_pre", 2.0, s, layers=[1], steps=[0])])[1]["resid_pre", 1, 0] - plain
             for s in (0, 0, 1)]  # fmt: skip
    np.testing.assert_array_equal(added[0], added[1])
    first, other = added[0][0], added[2][0]
    assert abs(first.mean()) < 0.1 and abs(first.std() - 2) < 0.1 and abs(np.corrcoef(first.ravel(), other.ravel())[0, 1]) < 0.1
    np.testing.assert_allclose(added[0][0], added[0][1], atol=1e-5)  # the same in every row


def test_wrong_edits():
    model = load("trained", "bfloat16")
    for edit, message in (
        (Add("resid_pots", 1.0), "near: resid_post"), (Add("resid_post", np.ones(5)), "expected"),
        (Scale("gate_pdf", 2), "edit gate_logit"),
        (Scale("z", 2, heads=[9]), "head is 9"), (Scale("resid_post", 2, heads=[0]), "no heads"), (Scale("state", 2, layers=[0]), "layer"),
        (ProjectOut("resid_post", np.zeros(128)), "direction"), (Scale("z", 2, steps=[7]), "step is 7"), ("scale", "class of ouro.edits"),
        (ZeroHead(layers=[0]), "heads"),
    ):  # fmt: skip
        with pytest.raises((KeyError, ValueError, IndexError, TypeError), match=message):
            model.trace([1, 2, 3], edits=[edit])


def test_wrong_types_are_named():
    model, ids, program = load("trained", "bfloat16"), [1, 2, 3], ouro.LoopProgram()
    wrong = [
        (lambda: Add("resid_post", 1.0, layers=1), "layers of Add is 1, expected a list"),
        (lambda: ZeroHead(heads=1), "heads of ZeroHead is 1"),
        (lambda: Swap("resid_post", {}), "ActivationCache of a run, got a dict"),
        (lambda: MeanAblate("resid_post", None), "ActivationCache of a run, got a NoneType"),
        (lambda: Noise("resid_post", float("nan")), "std of noise is nan"),
        (lambda: program.noise(1, -0.1), "std of noise is -0.1"),
        (lambda: program.steps_per_position(3), "depth is 3, expected"),
        (lambda: program.steps_per_position({0: 1.5}), "expected whole numbers"),
        (lambda: model.trace(ids, edits=Scale("z", 0.0)), "edits are a list"),
        (lambda: model.generate(ids, edits=Scale("z", 0.0)), "edits are a list"),
        (lambda: model.trace(ids, program="skip"), "expected an ouro.LoopProgram"),
        (lambda: model.generate(ids, program="skip"), "expected an ouro.LoopProgram"),
        (lambda: model.run_with_hooks(ids, ("z", print)), "hooks are a list"),
        (lambda: model.run_with_hooks(ids, [("z",)]), "a hook is"),
        (lambda: model.run_with_cache(ids, 3), "a filter is a name"),
        (lambda: model.run_with_cache(ids, "z", steps=1), "steps is 1, expected a list"),
        (lambda: model.run_with_cache(ids, "z", pos="last"), "pos is 'last'"),
        (lambda: model.run_with_cache(ids, "z", stop_at=3), r"expected \(step, layer\)"),
        (lambda: model.run_with_cache(ids, "z")[1]["z", 0, 0, 0], "has 4 parts"),
        (lambda: model.run_with_cache(ids, "z")[1].sel("z", head=9), "head is 9, expected -4 to 3"),
    ]
    for call, message in wrong:
        with pytest.raises((KeyError, ValueError, IndexError, TypeError), match=message):
            call()


NAN, INF = float("nan"), float("inf")


def test_values_that_are_no_numbers_are_refused():
    """When an edit is made, before it reaches a model; and places of a cache that never ran."""
    model, ids, program = load("trained", "bfloat16"), list(range(6)), ouro.LoopProgram()
    wide = np.array([0.0] * 127 + [NAN])
    for call, message in (
        (lambda: Add("resid_post", NAN), "vector of Add is nan, expected finite"),
        (lambda: Add("resid_post", wide), r"vector of Add is nan in an array of shape \(128,\)"),
        (lambda: Add("attn_scores", -INF), "vector of Add is -inf"),
        (lambda: Add("resid_post", 1.0, scale=INF), "scale of Add is inf"),
        (lambda: Add("resid_post", 1e30, scale=1e30), "scale . vector of Add is inf"),
        (lambda: Add("resid_post", 1e39), "float32 can hold"),
        (lambda: Add("resid_post", "up"), "vector of Add is 'up', expected numbers"),
        (lambda: Set("attn_scores", -INF), "value of Set is -inf"),
        (lambda: Scale("z", NAN), "scale of Scale is nan"),
        (lambda: Scale("z", None), "scale of Scale is None, expected numbers"),
        (lambda: ProjectOut("state", wide), "direction of ProjectOut is nan"),
        (lambda: ProjectOut("state", np.ones(128), scale=-INF), "scale of ProjectOut is -inf"),
        (lambda: Noise("z", 1e39), "std of noise is inf"),
        (lambda: program.noise(0, INF), "std of noise is inf"),
    ):
        with pytest.raises((ValueError, TypeError), match=message):
            call()
    skipped = model.run_with_cache(ids, "resid_post", program=program.layers(1, [0, 1]))[1]  # layers 2 and 3 of step 1 never ran
    ragged = model.run_with_cache([ids, ids[:3]], "resid_post")[1]
    for edit, x, message in (
        (Swap("resid_post", skipped), ids, r"no value \(NaN\) of steps.1.blocks.2.hook_resid_post"),
        (MeanAblate("resid_post", skipped), ids, r"no value \(NaN\) of steps.1.blocks.2.hook_resid_post"),
        (Swap("resid_post", skipped, steps=[1], layers=[3]), ids, "steps.1.blocks.3"),
    ):
        with pytest.raises(ValueError, match=message):
            model.trace(x, edits=[edit])
    model.trace(ids, edits=[Swap("resid_post", skipped, steps=[1], layers=[0, 1]), MeanAblate("resid_post", ragged)])
    model.trace([ids, ids[:3]], edits=[Swap("resid_post", ragged)])
    with pytest.raises(ValueError, match="no value"):
        ouro.patching.sweep(model, skipped, ids, 5, points="resid_post", progress=False)
    with pytest.raises(ValueError, match="embeddings is nan"):
        ouro.patching.ForkSet(model, ids, embeddings=np.full((6, 128), NAN))
    with pytest.raises(ValueError, match="noise inf"):
        ouro.patching.causal_trace(model, ids, 5, subject=[0], noise=INF)


OUTSIDE = [
    (9, "position 9 is out of range: the sequence has 9 tokens, expected -9 to 8"),
    (-10, "position -10 is out of range"),
    ([0, 8, 50], "position 50"),
    (slice(9, None), "no sequence has such a position"),
    (slice(0, -9), "no sequence has such a position"),
    ([], "no sequence has such a position"),
    ("last", "pos is 'last', expected an int"),
    (1.5, "pos is 1.5"),
    ([True], "pos has True"),
]


@pytest.mark.parametrize(("pos", "message"), OUTSIDE, ids=[str(pos) for pos, _ in OUTSIDE])
def test_positions_beyond_the_sequence_are_refused(pos, message):
    """By every kind of edit that takes positions, in every kind of run over a fixed sequence; nothing is passed over in silence."""
    model, ids, program = load("trained", "bfloat16"), list(range(9)), ouro.LoopProgram()
    cache = model.run_with_cache(ids, ["resid_post"])[1]
    edits = [Add("resid_post", 1.0, pos=pos), ZeroHead(heads=[0], pos=pos), Noise("z", 0.1, pos=pos), Swap("resid_post", cache, pos=pos),
             ProjectOut("state", np.ones(128), pos=pos), MeanAblate("resid_post", cache, pos=pos)]  # fmt: skip
    for edit in edits:
        with pytest.raises((IndexError, TypeError), match=message):
            model.trace(ids, edits=[edit])
    for run in (
        lambda: model.run_with_cache(ids, "state", edits=edits[:1]),
        lambda: model.run_with_hooks(ids, [], edits=edits[:1]),
        lambda: model.trace(ids, program=program.skip_step(1, pos=pos)),
        lambda: model.trace(ids, program=program.replace_state(0, 2, pos=pos)),
        lambda: model.trace(ids, program=program.noise(1, 0.1, pos=pos)),
    ):
        with pytest.raises((IndexError, TypeError), match=message):
            run()
    with pytest.raises((IndexError, TypeError), match=r"pos (is|has)"):
        model.run_with_cache(ids, "state", pos=pos)


def test_positions_of_a_batch():
    """A number is a position of every sequence; a slice ends where a sequence does. A run alone and in a batch refuses the same."""
    model, ragged = load("trained", "bfloat16"), [[1, 2, 3, 4, 5, 6], [7, 8, 9]]
    plain = model.trace(ragged)
    with pytest.raises(IndexError, match="position 4 is out of range: sequence 1 of the batch has 3 tokens, expected -3 to 2"):
        model.trace(ragged, edits=[Add("resid_post", 1.0, pos=[4])])
    some = model.trace(ragged, edits=[Add("state", 1.0, pos=slice(4, 5), steps=[0])])
    changed = (some.states[0] != plain.states[0]).any(-1)
    assert changed[0].tolist() == [False] * 4 + [True, False] and not changed[1, :3].any()
    ends = model.trace(ragged, edits=[Add("state", 1.0, pos=[-1], steps=[0])])
    assert [np.flatnonzero((ends.states[0] != plain.states[0])[row, :n].any(-1)).tolist() for row, n in enumerate((6, 3))] == [[5], [2]]
    deep = model.trace(ragged, program=ouro.LoopProgram().steps_per_position([1] * 6))  # a table for the longest serves all
    np.testing.assert_array_equal(deep.states[3, 1, :3], plain.states[0, 1, :3])


def test_positions_that_a_cache_lacks():
    model = load("trained", "bfloat16")
    long, short = list(range(9)), list(range(5))
    cache, last = model.run_with_cache(long, "resid_post")[1], model.run_with_cache(long, "resid_post", pos=[-1])[1]
    for ids, swap, message in (
        (long, Swap("resid_post", last, pos=[3, 8]), "the cache has no position 3, it holds 8"),
        (long, Swap("resid_post", last, pos=slice(0, 4)), "the cache has none of these positions"),
        (short, Swap("resid_post", cache), "the cache has position 5, but the sequence has 5 tokens: choose with pos="),
        (short, Swap("resid_post", last), "the cache has position 8"),
    ):
        with pytest.raises(IndexError, match=message):
            model.trace(ids, edits=[swap])
    part = model.run_with_cache(short, "resid_post", edits=[Swap("resid_post", cache, pos=slice(None), steps=[2], layers=[1])])[1]
    np.testing.assert_array_equal(part["resid_post", 1, 2][0], cache["resid_post", 1, 2][0, :5])


# -- Python hooks ------------------------------------------------------------------------------------------------------


def test_hooks_see_what_is_captured():
    model, ids = load("trained", "bfloat16"), reference("trained")["input_ids"]
    ragged = [ids[0, :9].tolist(), ids[1, :4].tolist()]
    cache, seen = model.run_with_cache(ragged, "*")[1], {}

    def note(x, hook):
        seen[hook.name] = x.copy()
        assert (hook.pos.tolist() == list(range(9)) and f"steps.{hook.step}" in hook.name) or hook.name == "hook_embed"

    model.run_with_hooks(ragged, [("*", note)])
    for name, x in seen.items():
        np.testing.assert_array_equal(x, cache[name], err_msg=name)


def test_scores_that_a_hook_hides():
    """Cells at -inf have weight 0; a row of nothing else comes out even, as docs/microscope.md says."""
    model, seen = load("trained", "bfloat16"), []

    def hide(x, hook):
        x[0, 1, 4, 2] = x[0, 1, 3] = -np.inf

    def look(x, hook):
        seen.append(x[0, 1].copy())

    model.run_with_hooks(list(range(6)), [("steps.0.blocks.1.attn.hook_attn_scores", hide), ("steps.0.blocks.1.attn.hook_pattern", look)])
    assert seen[0][4, 2] == 0 and seen[0][4].sum() == pytest.approx(1) and seen[0][3].tolist() == [0.25] * 4 + [0.0] * 2


def test_hooks_change(oracle, ids):
    model = load(NAME, "float32")

    def double(x, hook):
        return 2 * x

    def in_place(x, hook):
        x[:, :, 1] = 0

    def change(name, x):
        if name == "steps.1.blocks.1.hook_mlp_out":
            return 2 * x
        if name.endswith("blocks.2.attn.hook_k"):
            x = x.copy()
            x[:, 1] = 0
            return x
        return None

    with model.hooks([("steps.1.blocks.1.hook_mlp_out", double), ("blocks.2.attn.hook_k", in_place)]):
        agrees(oracle, ids, change)
    plain = model.trace(ids)
    with model.hooks([("state", double)]):
        assert not np.array_equal(model.trace(ids).states, plain.states)
    np.testing.assert_array_equal(model.trace(ids).states, plain.states)


def test_a_hook_that_raises_leaves_the_model_usable():
    model, ids = load("trained", "bfloat16", threads=3), reference("trained")["input_ids"]
    plain = model.trace(ids)

    class Own(Exception):
        pass

    def fail(x, hook):
        raise Own(hook.name)

    for where in ("steps.1.blocks.2.attn.hook_pattern", "steps.3.exit_gate.hook_logit", "hook_embed", "steps.3.unembed.hook_out"):
        with pytest.raises(Own, match=where):
            model.run_with_hooks(ids, [(where, fail)])
    with pytest.raises(ValueError, match="returned shape"):
        model.run_with_hooks(ids, [("z", lambda x, hook: x[..., 0])])
    with pytest.raises(RuntimeError, match="middle of a call"):
        model.run_with_hooks(ids, [("state", lambda x, hook: model.trace([1]).states and None)])
    np.testing.assert_array_equal(model.trace(ids).states, plain.states)


# -- loop surgery ------------------------------------------------------------------------------------------------------


def test_layer_programs(oracle, ids):
    program = ouro.LoopProgram().layers(1, [2, 0]).layers(2, [0, 1, 1, 2, 0]).repeat_step(0, 2)
    turns = [(0, (0, 1, 2), True), (0, (0, 1, 2), True), (1, (2, 0), True), (2, (0, 1, 1), False), (2, (2, 0), True)]
    assert program.turns(3, 3) == turns
    model = load(NAME, "float32")
    _, cache = model.run_with_cache(ids, ["state", "resid_post", "logits"], program=program)
    for row in range(2):
        expected = oracle(ids[row], turns=turns)
        for t in range(3):
            np.testing.assert_allclose(cache["state"][t, row], expected[f"steps.{t}.ln_final.hook_normalized"], atol=1e-3)
    assert np.isnan(cache["resid_post", 1, 1]).all()
    chunked = model.run_with_cache(ids, ["state"], program=program, max_lanes=5)[1]
    np.testing.assert_array_equal(chunked["state"], cache["state"])


def test_skip_swap_and_depth():
    model, ids = load("trained", "bfloat16"), reference("trained")["input_ids"][:2]
    plain, program = model.trace(ids, logits="all"), ouro.LoopProgram()
    skipped = model.trace(ids, program=program.skip_step(1), logits="all")
    np.testing.assert_array_equal(skipped.states, plain.states[[0, 0, 1, 2]])
    swapped = model.trace(ids, program=program.swap_steps(1, 2), logits="all")
    np.testing.assert_array_equal(swapped.states, plain.states[[0, 2, 1, 3]])
    repeated = model.trace(ids, program=program.repeat_step(3, 3))
    np.testing.assert_array_equal(repeated.states[3], model.trace(ids, n_steps=6).states[5])
    depth = [1 + i % 4 for i in range(ids.shape[1])]
    early = model.trace(ids, program=program.steps_per_position(depth), logits="all")
    for pos, k in enumerate(depth):
        for t in range(k, 4):
            np.testing.assert_array_equal(early.logits[t, :, pos], early.logits[k - 1, :, pos])
    np.testing.assert_array_equal(early.states[0], plain.states[0])
    some = model.trace(ids, program=program.skip_step(2, pos=-1))
    np.testing.assert_array_equal(some.states[2, :, -1], plain.states[1, :, -1])
    np.testing.assert_array_equal(some.states[:, :, :-1], plain.states[:, :, :-1])


def test_freeze_replace_and_noise(oracle, ids):
    kept = {}

    def change(name, x):
        step, _, rest = name.removeprefix("steps.").partition(".")
        if rest.endswith("hook_pattern"):
            return kept.setdefault(rest, x) if step == "0" else kept[rest]
        return None

    for row in range(2):
        kept.clear()
        agrees(oracle, ids[row : row + 1], change, program=ouro.LoopProgram().freeze_attention(0))
    model = load(NAME, "float32")
    plain = model.run_with_cache(ids, "state")[1]
    moved = model.run_with_cache(ids, ["state", "step_resid_pre"], program=ouro.LoopProgram().replace_state(0, 2))[1]
    np.testing.assert_array_equal(moved["step_resid_pre"][2], plain["state"][0])
    np.testing.assert_array_equal(moved["state"][:2], plain["state"][:2])
    noisy = model.run_with_cache(ids, "step_resid_pre", program=ouro.LoopProgram().noise(1, 0.3, seed=5))[1]
    edited = model.run_with_cache(ids, "step_resid_pre", edits=[Noise("step_resid_pre", 0.3, 5, steps=[1])])[1]
    np.testing.assert_array_equal(noisy["step_resid_pre"], edited["step_resid_pre"])
    with pytest.raises(ValueError, match="does not come after"):
        model.trace(ids, program=ouro.LoopProgram().replace_state(2, 1))
    with pytest.raises(IndexError, match="layer of step 0"):
        model.trace(ids, program=ouro.LoopProgram().layers(0, [3]))
