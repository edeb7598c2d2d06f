"""Sweeps: each variant has the bits of a whole run with the same replacement, agrees with the oracle, and costs less."""

import itertools

import numpy as np
import pytest
from conftest import load, reference
from hook_oracle import HookOracle
from paths import FIXTURES

import ouro
from ouro import _core, patching
from ouro.hooks import point
from ouro.patching import ForkSet, sweep
from ouro.patching.forks import Fork
from ouro.patching.metric import log_softmax

pytestmark = pytest.mark.core
SET = 2  # csrc/tap/plan.h
POINTS = ["resid_pre", "ln1_normalized", "ln1_scale", "q", "k", "v", "rot_k", "z", "result", "attn_out", "resid_mid", "ln2_normalized",
          "pre", "post", "mlp_out", "resid_post"]  # fmt: skip


def pair(name, n=19):
    ids = reference(name)["input_ids"]
    return ids[0, :n].tolist(), ids[1, :n].tolist()


def source_of(model, tokens, short, n_steps=None):
    _, cache = model.run_with_cache(tokens, short, n_steps=n_steps, logits="none")
    return np.asarray(cache.stack(short))[:, :, 0]


def whole_run(model, tokens, short, fork, source, n_steps):
    """The last states of a whole run with an edit that sets the same rows."""
    p = point(short)
    rows = source.reshape(*source.shape[:3], p.heads(model.config), -1)
    steps, layers = list(range(fork.step0, fork.step1)), list(range(fork.layer0, fork.layer1))
    heads = None if fork.head < 0 else [fork.head]
    array = rows[np.ix_(steps, layers)][:, :, None]
    array = np.ascontiguousarray(array if heads is None else array[..., heads, :])
    positions = np.full((1, len(tokens)), -1, np.int32)
    positions[0, fork.pos0 : fork.pos1] = np.arange(fork.pos0, fork.pos1)
    plan = _core.Plan(model._core)
    plan.edit(SET, p.core, steps, layers, heads, positions, array, 1.0, 0)
    return model._core.trace([np.asarray(tokens, np.int32)], n_steps, 0, 256, plan, None)[0][-1, 0]


def some_forks(model, n, n_steps, head):
    """Single places at the corners, windows, ranges of positions."""
    layers, found = model.config.n_layers, []
    for step, layer, pos in itertools.product({0, n_steps - 1}, {0, layers - 1}, (0, n // 2, n - 1)):
        found.append(Fork(step, step + 1, layer, layer + 1, pos, pos + 1, head))
    found.append(Fork(0, n_steps, 0, layers, 1, 3, head))
    found.append(Fork(0, 1, 0, layers, 0, n, head))
    found.append(Fork(n_steps - 1, n_steps, layers - 1, layers, 0, n, head))
    return found


CASES = [("tiny-gqa-tied", "bfloat16", short) for short in POINTS] + [
    (name, compute, short)
    for name, compute in (("tiny-gqa-tied", "float32"), ("trained", "int8"))
    for short in ("resid_pre", "v", "mlp_out")
]


@pytest.mark.parametrize(("name", "compute", "short"), CASES)
def test_a_fork_has_the_bits_of_a_whole_run(name, compute, short):
    model = load(name, compute)
    clean, corrupted = pair(name)
    steps = model.config.n_steps
    source = source_of(model, clean, short)
    for head in (-1, 1) if point(short).by_head else (-1,):
        forks = some_forks(model, len(clean), steps, head)
        found = ForkSet(model, corrupted).run(short, forks, source, list(range(len(clean))))
        for fork, states in zip(forks, found, strict=True):
            np.testing.assert_array_equal(states, whole_run(model, corrupted, short, fork, source, steps), err_msg=str(fork))


@pytest.mark.parametrize("short", ["resid_pre", "z", "mlp_out"])
def test_company_never_shows(short):
    """Any number of lanes, any bound of memory, other threads, more than one block of positions, more steps than trained."""
    clean, corrupted = (np.tile(ids, 4)[:70].tolist() for ids in pair("tiny-mha", 40))
    model, steps = load("tiny-mha", "bfloat16"), 6
    source = source_of(model, clean, short, steps)
    forks = [Fork(s, s + 1, layer, layer + 1, p, p + 1) for s in (0, 3, 5) for layer in (0, 1) for p in (0, 63, 64, 69)]
    at = [0, 63, 69]
    whole = ForkSet(model, corrupted, n_steps=steps).run(short, forks, source, at)
    alone = ForkSet(model, corrupted, n_steps=steps, max_lanes=1).run(short, forks, source, at)
    other = load("tiny-mha", "bfloat16", threads=3)
    tight = ForkSet(other, corrupted, n_steps=steps, max_lanes=100).run(short, forks, source, at, max_bytes=0)
    np.testing.assert_array_equal(alone, whole)
    np.testing.assert_array_equal(tight, whole)
    again = ForkSet(model, corrupted, n_steps=steps)
    np.testing.assert_array_equal(np.concatenate([again.run(short, [f], source, at) for f in forks[::-1]])[::-1], whole)


def test_kernels_agree():
    clean, corrupted = pair("tiny-gqa-tied")
    found = []
    for isa in ("scalar", "avx2", "avx512", "neon"):
        try:
            model = load("tiny-gqa-tied", "bfloat16", isa=isa)
        except (RuntimeError, ValueError):
            continue
        forks = some_forks(model, len(clean), model.config.n_steps, -1)
        found.append(ForkSet(model, corrupted).run("attn_out", forks, source_of(model, clean, "attn_out"), [-1 % len(clean)]))
    for other in found[1:]:
        np.testing.assert_array_equal(other, found[0])


def test_sweep_against_the_oracle():
    model, oracle = load("tiny-mha", "float32"), HookOracle(FIXTURES / "tiny-mha")
    clean, corrupted = pair("tiny-mha", 7)
    saved = oracle(clean)
    found = sweep(model, clean, corrupted, lambda z: z[:, -1, 3] - z[:, -1, 9], points=["resid_pre", "attn_out"], progress=False)
    assert found.dims == ("point", "step", "layer", "pos") and found.attrs["variants"] == 2 * 4 * 2 * 7
    for name, step, layer, pos in [("resid_pre", 0, 0, 6), ("resid_pre", 2, 1, 3), ("attn_out", 1, 0, 2), ("attn_out", 3, 1, 6)]:
        place = f"steps.{step}.blocks.{layer}.hook_{name}"

        def edit(at, x, place=place, pos=pos):
            if at != place:
                return None
            x = x.copy()
            x[pos] = saved[place][pos]
            return x

        z = oracle(corrupted, edit=edit)["steps.3.unembed.hook_out"][-1]
        assert abs(float(found.sel(point=name, step=step, layer=layer, pos=pos)) - (z[3] - z[9])) < 2e-3
    assert abs(found.attrs["clean"] - np.subtract(*saved["steps.3.unembed.hook_out"][-1][[3, 9]])) < 2e-3
    assert abs(found.attrs["corrupted"] - np.subtract(*oracle(corrupted)["steps.3.unembed.hook_out"][-1][[3, 9]])) < 2e-3


def test_work_is_counted_and_small(tiny):
    clean, corrupted = pair("trained", 32)
    found = sweep(tiny, clean, corrupted, 5, progress=False)
    steps, layers, n = found.shape
    lane_layers = sum((n - p) * (steps * layers - (s * layers + i)) for s, i, p in itertools.product(*map(range, found.shape)))
    assert found.attrs["forwards"] == pytest.approx(1 + lane_layers / (steps * layers * n))
    assert found.attrs["forwards"] < 0.3 * found.attrs["variants"]


def test_axes_windows_and_choices(tiny):
    clean, corrupted = pair("trained", 12)
    whole = sweep(tiny, clean, corrupted, (5, 6), progress=False)
    some = sweep(tiny, clean, corrupted, (5, 6), axes=("pos", "step"), layers=None, steps=[-1, 0], positions=[3, -1], progress=False)
    assert some.dims == ("pos", "step") and some.coords["step"].tolist() == [3, 0] and some.coords["pos"].tolist() == [3, 11]
    one = sweep(tiny, clean, corrupted, (5, 6), layers=[2], positions=[3], steps=[1], progress=False)
    np.testing.assert_array_equal(one.values, whole.values[1:2, 2:3, 3:4])
    assert whole.coords["token"].tolist() == tiny.to_str_tokens(corrupted)
    every = sweep(tiny, clean, corrupted, (5, 6), axes=("layer",), points="mlp_out", window=99, progress=False)
    assert len(set(every.values.tolist())) == 1
    heads = sweep(tiny, clean, corrupted, (5, 6), axes=("head", "step"), points="z", heads=[1, 3], progress=False)
    assert heads.shape == (2, 4)


def test_a_clean_first_input_gives_the_clean_run(tiny):
    clean, corrupted = pair("trained", 12)
    found = sweep(tiny, clean, corrupted, 5, axes=("step", "layer"), progress=False)
    assert found.values[0, 0] == found.attrs["clean"] and found.values[-1, -1] == found.attrs["clean"]
    itself = sweep(tiny, corrupted, corrupted, 5, progress=False)
    assert (itself.values == itself.attrs["corrupted"]).all()


def test_names_of_transformer_lens(tiny):
    clean, corrupted = pair("trained", 9)
    _, cache = tiny.run_with_cache(clean, ["resid_pre", "attn_out", "mlp_out", "z", "q", "k", "v"])
    seen = []

    def metric(logits):
        seen.append(logits.shape)
        return logits[0, -1, 5]

    every = patching.get_act_patch_block_every(tiny, corrupted, cache, metric, progress=False)
    assert every.dims == ("point", "step", "layer", "pos") and set(seen) == {(1, 1, tiny.config.d_vocab)}
    one = patching.get_act_patch_mlp_out(tiny, corrupted, cache, metric, progress=False)
    np.testing.assert_array_equal(every.sel(point="mlp_out").values, one.values)
    heads = patching.get_act_patch_attn_head_all_pos_every(tiny, corrupted, cache, metric, progress=False)
    values = patching.get_act_patch_attn_head_v_all_pos(tiny, corrupted, cache, metric, progress=False)
    np.testing.assert_array_equal(heads.sel(point="v").values, values.values)
    by_pos = patching.get_act_patch_attn_head_out_by_pos(tiny, corrupted, cache, metric, steps=[0], layers=[1], progress=False)
    assert by_pos.shape == (1, 1, 9, 4)
    some = {"steps": [1], "layers": [2], "progress": False}
    every = patching.get_act_patch_attn_head_by_pos_every(tiny, corrupted, cache, metric, **some)
    for name, short in (("out", "z"), ("q", "q"), ("k", "k"), ("v", "v")):
        one = getattr(patching, f"get_act_patch_attn_head_{name}_by_pos")(tiny, corrupted, cache, metric, **some)
        np.testing.assert_array_equal(every.sel(point=short).values, one.values)
    assert patching.get_act_patch_attn_head_v_by_pos.__name__ == "get_act_patch_attn_head_v_by_pos"


BY_POS, BY_HEAD = ("step", "layer", "pos"), ("step", "layer", "head")
BY_BOTH, ROWS, CELLS = (*BY_POS, "head"), (*BY_HEAD, "dest_pos"), (*BY_HEAD, "dest_pos", "src_pos")
HEADS = {"out": "z", "q": "q", "k": "k", "v": "v"}
WRAPPERS = {
    "resid_pre": (["resid_pre"], BY_POS), "resid_mid": (["resid_mid"], BY_POS), "attn_out": (["attn_out"], BY_POS),
    "mlp_out": (["mlp_out"], BY_POS), "block_every": (["resid_pre", "attn_out", "mlp_out"], BY_POS),
    **{f"attn_head_{name}_all_pos": ([p], BY_HEAD) for name, p in HEADS.items()},
    **{f"attn_head_{name}_by_pos": ([p], BY_BOTH) for name, p in HEADS.items()},
    "attn_head_pattern_all_pos": (["pattern"], BY_HEAD), "attn_head_pattern_by_pos": (["pattern"], ROWS),
    "attn_head_pattern_dest_src_pos": (["pattern"], CELLS),
    "attn_head_all_pos_every": ([*HEADS.values(), "pattern"], BY_HEAD), "attn_head_by_pos_every": ([*HEADS.values(), "pattern"], BY_BOTH),
}  # fmt: skip


def naive(model, ids, short, clean, where):
    """The logits of one run in which a Python hook puts what `clean` has at one place."""
    chosen = [where.get(axis, slice(None)) for axis in ("pos", "head")]
    if short == "pattern":
        chosen = [where.get("head", slice(None)), where.get("dest_pos", where.get("pos", slice(None))), where.get("src_pos", slice(None))]
    elif not point(short).by_head:
        chosen = chosen[:1]

    def put(x, hook):
        x[0][tuple(chosen)] = clean[short, where["layer"], where["step"]][0][tuple(chosen)]

    return model.run_with_hooks(ids, [(point(short).name(where["step"], where["layer"]), put)])[0, -1]


@pytest.mark.parametrize("name", WRAPPERS)
def test_every_wrapper_against_the_naive_loop(name):
    """Each value has the bits of a whole run with a Python hook at its place."""
    model, (clean, corrupted) = load("tiny-mha", "bfloat16"), pair("tiny-mha", 5)
    (points, axes), function = WRAPPERS[name], getattr(patching, f"get_act_patch_{name}")
    _, cache = model.run_with_cache(clean, points)
    place = {"steps": [0, 3], "layers": [1], **({"heads": [2]} if "head" in axes else {})}
    found = function(model, corrupted, cache, lambda z: z[0, -1, 3] - z[0, -1, 9], **place, progress=False)
    every = name.endswith("_every")
    assert found.dims == (("point",) if every else ()) + axes
    assert (found.values != found.attrs["corrupted"]).any()
    for at in itertools.product(points, *(found.coords[axis].tolist() for axis in axes)):
        where = dict(zip(("point", *axes), at, strict=True))
        z = naive(model, corrupted, where["point"], cache, where)
        value = found.sel(**(where if every else {axis: where[axis] for axis in axes})).values.item()
        assert value == z[3] - z[9], where


def test_the_wrappers_are_all_of_them():
    assert {f"get_act_patch_{name}" for name in WRAPPERS} == {name for name in patching.__all__ if name.startswith("get_act_patch_")}


@pytest.mark.parametrize("through_mlp", [True, False])
def test_path_patching_against_the_naive_loop(through_mlp):
    """Two runs with Python hooks for each sender: the same bits."""
    model, (clean, corrupted) = load("tiny-mha", "bfloat16"), pair("tiny-mha", 6)
    held = ["z"] if through_mlp else ["z", "mlp_out"]
    good, bad = (model.run_with_cache(ids, held)[1] for ids in (clean, corrupted))
    receivers = [patching.Receiver("q", 2, 1, heads=[0, 3]), patching.Receiver("resid_pre", 3, 0)]
    ends = [point(r.point).name(r.step, r.layer) for r in receivers]
    place, metric = {"steps": [1, 2], "layers": [0], "heads": [1, 2]}, (3, 9)
    found = patching.path_patching(model, clean, corrupted, metric, receivers=receivers, through_mlp=through_mlp, **place, progress=False)
    for step, head in itertools.product((1, 2), (1, 2)):
        received = {}

        def hold(x, hook, step=step, head=head):
            x[...] = bad[hook.name]
            if hook.name == f"steps.{step}.blocks.0.attn.hook_z":
                x[:, :, head] = good[hook.name][:, :, head]

        def note(x, hook, received=received):
            received[hook.name] = x.copy()

        def put(x, hook, received=received):
            heads = [0, 3] if hook.name.endswith("hook_q") else slice(None)
            x[:, :, heads] = received[hook.name][:, :, heads]

        model.run_with_hooks(corrupted, [*((p, hold) for p in held), *((end, note) for end in ends)])
        z = model.run_with_hooks(corrupted, [(end, put) for end in ends])[0, -1].astype(np.float64)
        assert found.sel(step=step, layer=0, head=head).values.item() == z[3] - z[9]


def test_patterns_are_patched_by_whole_runs(tiny, tmp_path):
    clean, corrupted = pair("trained", 9)
    _, cache = tiny.run_with_cache(clean, "pattern")
    places = {"steps": [0, 3], "layers": [0, 2], "progress": False, "save_to": tmp_path / "p.npz"}
    found = patching.get_act_patch_attn_head_pattern_all_pos(tiny, corrupted, cache, 5, heads=[1, 3], **places)
    rows = patching.get_act_patch_attn_head_pattern_by_pos(tiny, corrupted, cache, 5, steps=[3], layers=[2], heads=[3], progress=False)
    assert found.dims == ("step", "layer", "head") and found.shape == (2, 2, 2)
    assert rows.dims == ("step", "layer", "head", "dest_pos") and rows.shape == (1, 1, 1, 9)
    edit = ouro.edits.Swap("pattern", cache, steps=[3], layers=[2], heads=[3])
    z = tiny.trace(corrupted, edits=[edit], logits="last").logits[-1, 0, -1].astype(np.float64)
    assert found.sel(step=3, layer=2, head=3).values == pytest.approx(z[5] - np.log(np.exp(z - z.max()).sum()) - z.max(), abs=1e-9)
    assert found.sel(step=0, layer=0, head=1).values != found.attrs["corrupted"]
    again = patching.get_act_patch_attn_head_pattern_all_pos(tiny, corrupted, cache, 5, heads=[1, 3], **places)
    np.testing.assert_array_equal(again.values, found.values)
    with pytest.raises(ValueError, match=r"expected \(1, 8\)"):
        patching.get_act_patch_attn_head_pattern_all_pos(tiny, corrupted[:8], cache, 5)


def test_one_cell_of_a_pattern_against_the_naive_loop(tiny):
    """A hook that changes the cell in a whole run: the same bits; cells ahead of the position change nothing."""
    clean, corrupted = pair("trained", 6)
    _, cache = tiny.run_with_cache(clean, "pattern")
    place = {"steps": [1, -1], "layers": [2], "heads": [3], "progress": False}
    found = patching.get_act_patch_attn_head_pattern_dest_src_pos(tiny, corrupted, cache, lambda z: z[0, -1, 5], **place)
    assert found.dims == ("step", "layer", "head", "dest_pos", "src_pos") and found.shape == (2, 1, 1, 6, 6)
    for step, dest, src in itertools.product((1, 3), range(6), range(6)):

        def cell(x, hook, step=step, dest=dest, src=src):
            if hook.step == step and src <= dest:
                x[:, 3, dest, src] = cache["pattern", 2, step][:, 3, dest, src]

        z = tiny.run_with_hooks(corrupted, [("blocks.2.attn.hook_pattern", cell)])[0, -1, 5]
        assert found.sel(step=step, layer=2, head=3, dest_pos=dest, src_pos=src).values.item() == z
    some = patching.pattern_sweep(tiny, corrupted, cache, 5, axes=("step", "layer", "dest_pos", "src_pos"), steps=[1], layers=[2],
                                  positions=[-1], sources=[0], progress=False)  # fmt: skip
    assert some.shape == (1, 1, 1, 1) and some.values.item() != some.attrs["corrupted"]


def test_patterns_are_the_fifth_point_of_every(tiny):
    clean, corrupted = pair("trained", 6)
    _, cache = tiny.run_with_cache(clean)
    place = {"steps": [1], "layers": [2], "progress": False}
    points = ["z", "q", "k", "v", "pattern"]
    for name, rows in (("all_pos", "all_pos"), ("by_pos", "by_pos")):
        every = getattr(patching, f"get_act_patch_attn_head_{name}_every")(tiny, corrupted, cache, 5, **place)
        one = getattr(patching, f"get_act_patch_attn_head_pattern_{rows}")(tiny, corrupted, cache, 5, **place)
        values = one.values if name == "all_pos" else one.values.swapaxes(2, 3)
        assert every.coords["point"].tolist() == points == every.attrs["point"]
        np.testing.assert_array_equal(every.sel(point="pattern").values, values)


def test_a_sweep_goes_on_where_it_was(tiny, tmp_path):
    clean, corrupted, path = *pair("trained", 12), tmp_path / "sweep.npz"
    whole, calls = sweep(tiny, clean, corrupted, lambda z: z[:, -1, 5], progress=False), []

    def metric(z):
        if len(calls) == 2:  # the first call is for the unchanged run
            raise KeyboardInterrupt
        calls.append(len(z))
        return z[:, -1, 5]

    with pytest.raises(KeyboardInterrupt):
        sweep(tiny, clean, corrupted, metric, save_to=path, progress=False)
    done = np.load(path)["done"].sum()
    assert done == sum(calls[1:]) == 128
    calls[:] = [0, 0, 0]
    found = sweep(tiny, clean, corrupted, metric, save_to=path, progress=False)
    np.testing.assert_array_equal(found.values, whole.values)
    assert list(tmp_path.iterdir()) == [path]
    with pytest.raises(ValueError, match="holds another sweep"):
        sweep(tiny, clean, corrupted, metric, points="attn_out", save_to=path, progress=False)
    with pytest.raises(ValueError, match="holds another sweep"):  # a function of the same name that measures something else
        metric_of = {"z": lambda z: z[:, -1, 6]}["z"]
        metric_of.__qualname__ = metric.__qualname__
        sweep(tiny, clean, corrupted, metric_of, save_to=path, progress=False)
    path.write_bytes(b"damaged")
    with pytest.raises(ValueError, match="not a saved sweep"):
        sweep(tiny, clean, corrupted, metric, save_to=path, progress=False)


def test_attribution_adds_up():
    for name in ("tiny-mha", "tiny-gqa-tied"):
        model = load(name, "float32")
        parts = patching.logit_attribution(model, pair(name)[0], 3, 9)
        assert parts.attrs["total"] == pytest.approx(parts.attrs["logit"], abs=2e-4)
        np.testing.assert_allclose(parts["head"].values.sum(-1), parts["attn"].values, atol=1e-4)
        early = patching.logit_attribution(model, pair(name)[0], 3, at=4, n_steps=2)
        assert early.attrs["total"] == pytest.approx(early.attrs["logit"], abs=2e-4) and early["head"].shape[0] == 2


def test_causal_tracing(tiny, tmp_path):
    prompt = "Ann is the boss of Bob. Who is the boss of Bob?"
    found = patching.causal_trace(tiny, prompt, " Ann", subject="Ann", samples=3, positions=[0, -1], progress=False)
    assert found["restored"].dims == ("step", "layer", "pos") and found.attrs["subject"] == [0]
    # clean states of the only noised position, put back before anything else has read them, give the clean run
    place = {"positions": [0], "steps": [0], "layers": [0]}
    first = patching.causal_trace(tiny, prompt, " Ann", subject=[0], samples=2, point="resid_pre", **place, progress=False)
    assert float(first["restored"].values[0, 0, 0]) == pytest.approx(first.attrs["clean"])
    again = patching.causal_trace(tiny, prompt, " Ann", subject="Ann", samples=3, positions=[0, -1], progress=False)
    np.testing.assert_array_equal(found["effect"].values, again["effect"].values)
    kept = {"samples": 2, "positions": [0], "progress": False, "save_to": tmp_path / "trace.npz"}
    one, two = (patching.causal_trace(tiny, prompt, " Ann", subject="Ann", **kept) for _ in range(2))
    np.testing.assert_array_equal(one["effect"].values, two["effect"].values)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["trace.0.npz", "trace.1.npz"]
    with pytest.raises(ValueError, match="does not stand in the prompt"):
        patching.causal_trace(tiny, prompt, " Ann", subject="Zed")


def test_causal_tracing_against_the_naive_loop(tiny):
    """Noised embeddings by a hook and one clean state by an edit, in a whole run for each place: the same bits."""
    ids = pair("trained", 6)[0]
    place = {"steps": [1], "layers": [2], "positions": [0, 3], "progress": False}
    found = patching.causal_trace(tiny, ids, 5, subject=[0, 1], samples=1, noise=2.0, seed=3, **place)
    _, cache = tiny.run_with_cache(ids, ["hook_embed", "resid_post"])
    noised = cache["hook_embed"][0].copy()
    draw = np.random.default_rng(3).normal(0, 2.0 * float(noised.std()), (2, noised.shape[1]))
    noised[:2] += draw.astype(np.float32)
    for pos in (0, 3):
        back = ouro.edits.Swap("resid_post", cache, steps=[1], layers=[2], pos=[pos])
        z = tiny.run_with_hooks(ids, [("hook_embed", lambda x, hook: noised[None])], edits=[back])[:, -1]
        assert found["restored"].sel(step=1, layer=2, pos=pos).values.item() == np.exp(log_softmax(z))[0, 5]


def test_wrong_arguments(tiny):
    clean, corrupted = pair("trained", 8)
    with pytest.raises(ValueError, match="same length"):
        sweep(tiny, clean[:-1], corrupted, 5)
    with pytest.raises(ValueError, match="axes are"):
        sweep(tiny, clean, corrupted, 5, axes=("step", "stop"))
    with pytest.raises(ValueError, match="no axis 'head'"):
        sweep(tiny, clean, corrupted, 5, axes=("head",))
    with pytest.raises(ValueError, match="square"):
        sweep(tiny, clean, corrupted, 5, points="pattern")
    with pytest.raises(KeyError, match="resid_pre"):
        sweep(tiny, clean, corrupted, 5, points="resid_pro")
    with pytest.raises(IndexError, match="layer 4"):
        sweep(tiny, clean, corrupted, 5, layers=[4])
    with pytest.raises(ValueError, match="metric returned shape"):
        sweep(tiny, clean, corrupted, lambda z: z, progress=False)
    with pytest.raises(ValueError, match="expected one; a leading space"):
        sweep(tiny, clean, corrupted, "two words here", progress=False)
    with pytest.raises(ValueError, match="a pair of tokens"):
        sweep(tiny, clean, corrupted, (1, 2, 3))
    with pytest.raises(ValueError, match="points is empty"):
        sweep(tiny, clean, corrupted, 5, points=[])
    with pytest.raises(TypeError, match="pos is 3, expected a list"):
        sweep(tiny, clean, corrupted, 5, positions=3)
    _, part = tiny.run_with_cache(clean, [("resid_pre", 1), ("resid_pre", 2), ("pattern", 0)])
    with pytest.raises(ValueError, match=r"of layers \[1, 2\], expected all 4"):
        sweep(tiny, part, corrupted, 5)
    with pytest.raises(ValueError, match=r"returned shape \(1, 1, 896\) .* expected one number"):
        patching.get_act_patch_resid_pre(tiny, corrupted, tiny.run_with_cache(clean, "resid_pre")[1], lambda z: z)
    with pytest.raises(ValueError, match="expected some of"):
        patching.pattern_sweep(tiny, corrupted, part, 5, axes=("step", "source"))
    with pytest.raises(ValueError, match="needs step, layer and dest_pos"):
        patching.pattern_sweep(tiny, corrupted, part, 5, axes=("layer", "src_pos"))
    with pytest.raises(TypeError, match="clean_cache is a dict"):
        patching.pattern_sweep(tiny, corrupted, {}, 5)
    with pytest.raises(IndexError, match="position of the subject 99"):
        patching.causal_trace(tiny, clean, 5, subject=[99])
    with pytest.raises(TypeError, match="a receiver is Receiver"):
        patching.path_patching(tiny, clean, corrupted, 5, receivers=[("q", 1, 1)])
    forks = ForkSet(tiny, corrupted)
    source = source_of(tiny, clean, "resid_pre")
    with pytest.raises(ValueError, match=r"fork 0: steps 0\.\.9"):
        forks.run("resid_pre", [Fork(0, 9, 0, 1, 0, 1)], source, [0])
    with pytest.raises(ValueError, match="position 8"):
        forks.run("resid_pre", [Fork(0, 1, 0, 1, 0, 1)], source, [8])
    with pytest.raises(ValueError, match="the source is"):
        forks.run("resid_pre", [Fork(0, 1, 0, 1, 0, 1)], source[:2], [0])
    with pytest.raises(ValueError, match="embeddings have shape"):
        ForkSet(tiny, corrupted, embeddings=np.zeros((3, 3)))
    with pytest.raises(ouro.ContextLengthError):
        ForkSet(load("tiny-one-step"), [1] * 100_000)


def test_path_patching_against_the_oracle(tmp_path):
    """One sender, two receivers: the oracle with the same two runs."""
    model, oracle = load("tiny-gqa-tied", "float32"), HookOracle(FIXTURES / "tiny-gqa-tied")
    clean, corrupted = pair("tiny-gqa-tied", 7)
    good, bad = oracle(clean), oracle(corrupted)
    last = f"steps.{model.config.n_steps - 1}.unembed.hook_out"
    ends = {"steps.1.blocks.2.attn.hook_q", "steps.2.blocks.0.hook_resid_pre"}

    def sent(name, x):
        if not name.endswith("hook_z"):
            return None
        frozen = bad[name].copy()
        if name == "steps.0.blocks.1.attn.hook_z":
            frozen[:, 4] = good[name][:, 4]
        return frozen

    received = oracle(corrupted, edit=sent)
    direct = received[last][-1]
    patched = oracle(corrupted, edit=lambda name, x: received[name] if name in ends else None)[last][-1]
    place, metric = {"steps": [0], "layers": [1], "heads": [4]}, (3, 9)
    receivers = [patching.Receiver("q", 1, 2), patching.Receiver("resid_pre", -1, 0)]
    more = {"progress": False, "save_to": tmp_path / "paths.npz"}
    found = patching.path_patching(model, clean, corrupted, metric, receivers=receivers, **place, **more)
    again = patching.path_patching(model, clean, corrupted, metric, receivers=receivers, **place, **more)
    assert found.values.item() == again.values.item()
    with pytest.raises(ValueError, match="holds another sweep"):
        patching.path_patching(model, clean, corrupted, metric, **place, **more)
    assert found.values.item() == pytest.approx(patched[3] - patched[9], abs=2e-3)
    found = patching.path_patching(model, clean, corrupted, metric, **place, progress=False)
    assert found.values.item() == pytest.approx(direct[3] - direct[9], abs=2e-3)
    assert found.attrs["clean"] == pytest.approx(np.subtract(*good[last][-1][[3, 9]]), abs=2e-3)


def test_paths_that_end_before_they_begin(tiny):
    clean, corrupted = pair("trained", 8)
    place = {"steps": [2], "layers": [1], "heads": [0]}
    found = patching.path_patching(tiny, clean, corrupted, 5, receivers=[patching.Receiver("q", 2, 1)], **place, progress=False)
    assert found.values.item() == found.attrs["corrupted"]
    with pytest.raises(ValueError, match="no input of a layer"):
        patching.path_patching(tiny, clean, corrupted, 5, receivers=[patching.Receiver("mlp_out", 2, 1)])
    with pytest.raises(ValueError, match="same length"):
        patching.path_patching(tiny, clean[:-1], corrupted, 5)
