"""Measures inside the steps: layers, heads, keys and values, the step map; against loops and on known cases."""

import math

import numpy as np
import pytest
from conftest import RAGGED, load

import ouro
from ouro.measures import (
    StepMap,
    TunedLens,
    angular_distance,
    angular_distances,
    attention_drift,
    fixed_point,
    head_scores,
    induction_mask,
    jacobian_product,
    knee,
    kv_similarity,
    logit_lens,
    perturbation_decay,
    power_iteration,
    rank_energy,
    repeated_tokens,
    rest_distances,
    ridge,
    rms_norm,
    sharing_residuals,
    step_cosines,
)


@pytest.fixture(scope="module")
def cache():
    names = ["resid_pre", "resid_post", "state", "pattern", "rot_k", "v"]
    return load("trained").run_with_cache(RAGGED, names)[1]


# -- known answers -----------------------------------------------------------------------------------------------------


def test_turns_of_a_known_stream():
    """Three layers that turn by 0, 90 and 45 degrees; norms do not matter."""
    directions = np.deg2rad([0, 0, 90, 135])
    stream = np.stack([np.cos(directions), np.sin(directions)], -1)[None, :, None] * np.array([1, 5, 2, 3.0])[None, :, None, None]
    assert np.allclose(angular_distances(stream)[0, :, 0], [0, 0.5, 0.25])
    assert np.allclose(angular_distances(stream, 2)[0, :, 0], [0.5, 0.75])
    with pytest.raises(ValueError, match="expected 1 to 3"):
        angular_distances(stream, 4)


@pytest.mark.parametrize("curve, at", [([10, 6, 2, 1.9, 1.8], 2), ([0, 0, 0, 1, 5], 3), ([1, 2, 3, 4], -1), ([2, 2, 2], -1), ([1, 2], -1)])
def test_knee(curve, at):
    assert knee(curve) == at


def test_planted_patterns():
    """Heads that do exactly one thing each score 1 there."""
    tokens = [4, 9, 2, 4, 9, 2]
    n = len(tokens)
    previous, sink, induct, same = (np.zeros((n, n)) for _ in range(4))
    for i in range(n):
        previous[i, max(i - 1, 0)] = sink[i, 0] = 1
        induct[i, i - 2 if i >= 3 else i] = 1  # three back is the token before; what followed it is two back
        same[i, i - 3 if i >= 3 else i] = 1
    uniform = np.tril(np.ones((n, n))) / np.arange(1, n + 1)[:, None]
    heads = np.stack([previous, sink, induct, same, uniform])
    got = head_scores(np.stack([heads, heads, heads[::-1]]), tokens)
    assert got["previous_token"][0, 0] == 1 and got["first_token"][0, 1] == 1
    assert got["induction"][0].tolist()[2] == 1 and got["induction"][0, 1] == pytest.approx(0)
    assert got["duplicate_token"][0, 3] == 1 and got["duplicate_token"][0, 2] == 0
    assert got["entropy"][0, :4].tolist() == [0, 0, 0, 0]
    assert got["entropy"][0, 4] == pytest.approx(np.mean([math.log(i + 1) for i in range(n)]))
    assert np.isnan(got["stability"][0]).all() and got["stability"][1].tolist() == [1] * 5
    moved = 1 - np.abs(heads[::-1] - heads).sum(-1).mean(-1) / 2
    assert np.allclose(got["stability"][2], moved)


def test_induction_mask_by_loops():
    x = [3, 1, 3, 3, 1]
    expected = [[j >= 1 and j <= i and x[j - 1] == x[i] for j in range(5)] for i in range(5)]
    assert induction_mask(x).tolist() == expected
    assert np.isnan(head_scores(np.eye(3)[None], [1, 2, 3])["induction"]).all(), "nothing is repeated"


def test_sharing_known_cases():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(5, 7))
    alike, opposite = np.stack([x, x, x]), np.stack([x, -x])
    assert np.allclose(step_cosines(alike), 1) and np.allclose(sharing_residuals(alike), 0) and np.allclose(rank_energy(alike), 1)
    assert np.allclose(step_cosines(opposite), [[1, -1], [-1, 1]])
    assert np.allclose(sharing_residuals(opposite), [[4, 0], [1, 1], [0, 4]]), "last, mean (0), first"
    assert np.allclose(rank_energy(opposite), [1, 1]), "multiples of one another"
    three = np.zeros((3, 1, 3))
    three[0, 0, 0], three[1, 0, 1], three[2, 0, 2] = 3, 2, 1
    assert np.allclose(rank_energy(three), [9 / 14, 13 / 14, 1])


def test_ridge_recovers_a_planted_map():
    rng = np.random.default_rng(0)
    x, a, b = rng.normal(size=(60, 4)), rng.normal(size=(4, 3)), rng.normal(size=3)
    got = ridge(x, x @ a + b, 0.0)
    assert np.allclose(got[0], a) and np.allclose(got[1], b)
    weak, offset = ridge(x, x @ a + b, 1e9)
    assert np.abs(weak).max() < 1e-6 and np.allclose(offset, (x @ a + b).mean(0), atol=1e-5)


def test_tuned_lens_of_planted_maps():
    """Streams that are a known affine map away from the final state are read without error; a strong ridge is the plain lens."""
    rng = np.random.default_rng(1)
    final = rng.normal(size=(50, 5))
    maps = rng.normal(size=(2, 3, 5, 5)) + 3 * np.eye(5)
    streams = np.einsum("nd,tlde->tlne", final, maps) + 1
    assert np.allclose(TunedLens(alpha=0).fit_arrays(streams, final).apply(streams), final, atol=1e-4)
    plain = TunedLens(alpha=1e9).fit_arrays(streams, final).apply(streams)
    offset = (final - streams).mean(2, keepdims=True)
    assert np.allclose(plain, streams + offset, atol=1e-4)
    with pytest.raises(ValueError, match="not fitted"):
        TunedLens().apply(streams)


def test_power_iteration_on_known_maps():
    rng = np.random.default_rng(2)
    basis = np.linalg.qr(rng.normal(size=(6, 6)))[0]
    real = basis @ np.diag([0.8, 0.5, 0.3, -0.2, 0.1, 0]) @ basis.T
    radius, growth = power_iteration(lambda v: real @ v, np.zeros(6), iterations=30)
    assert radius == pytest.approx(0.8, rel=1e-5) and len(growth) == 30
    turn = 0.9 * np.array([[math.cos(1), -math.sin(1)], [math.sin(1), math.cos(1)]])
    pair = np.zeros((4, 4))
    pair[:2, :2], pair[2, 2], pair[3, 3] = turn, 0.4, 0.3
    assert power_iteration(lambda v: pair @ v, np.zeros(4), iterations=40)[0] == pytest.approx(0.9, rel=1e-3)
    assert power_iteration(lambda v: 0 * v, np.zeros(3))[0] == 0


def test_jacobian_product_of_a_known_map():
    a = np.random.default_rng(3).normal(size=(4, 4))
    h, v = np.array([0.3, -0.2, 0.5, 0.1]), np.array([1.0, 2.0, -1.0, 0.5])
    exact = (1 - np.tanh(a @ h) ** 2) * (a @ v)
    assert np.allclose(jacobian_product(lambda x: np.tanh(a @ x), h, size=1e-4)(v), exact, rtol=1e-6)
    assert not jacobian_product(lambda x: x, h)(np.zeros(4)).any()


def test_rest_of_a_geometric_path():
    """h_t = h* + c 0.5^t d: moves halve."""
    rest, way = np.array([3.0, 4.0]), np.array([1.0, 0.0])
    states = np.stack([rest + 0.5**t * way for t in range(6)])
    got = rest_distances(states)
    assert np.allclose(got["ratio"][2:], 0.5) and np.isnan(got["ratio"][:2]).all()
    assert np.allclose(got["to_last"], [(0.5**t - 0.5**5) / np.linalg.norm(states[-1]) for t in range(6)])
    assert got["move"][1] == pytest.approx(0.5 / np.linalg.norm(states[1]))


# -- on a model --------------------------------------------------------------------------------------------------------


def test_angular_distance_against_loops(cache):
    got = angular_distance(cache)
    pre, post = cache.stack("resid_pre").astype(float), cache.stack("resid_post").astype(float)
    for b, n in enumerate(cache.lengths):
        for t, layer, i in ((0, 0, 0), (1, 3, n - 1), (3, 2, n - 1)):
            u, v = pre[t, layer, b, i], post[t, layer, b, i]
            cosine = sum(u * v) / math.sqrt(sum(u * u) * sum(v * v))
            assert got["distance"][t, layer, b, i] == pytest.approx(math.acos(cosine) / math.pi, rel=1e-6)
        assert np.isnan(got["distance"].values[:, :, b, n:]).all()
    curve = got["distance"].mean("batch", "pos").values
    assert got["knee"].values.tolist() == [knee(row) for row in curve]
    assert np.array_equal(angular_distance(load("trained"), RAGGED)["distance"], got["distance"], equal_nan=True)


def test_attention_against_loops(cache):
    got, pattern = attention_drift(cache), cache.stack("pattern").astype(float)
    t, layer, head = 2, 1, 3
    rows = [(b, i) for b, n in enumerate(cache.lengths) for i in range(n)]
    p = {(b, i): pattern[t, layer, b, head, i, : i + 1] for b, i in rows}
    later = [(b, i) for b, i in rows if i > 0]
    assert got["first_token"][t, layer, head] == pytest.approx(np.mean([p[r][0] for r in later]))
    assert got["previous_token"][t, layer, head] == pytest.approx(np.mean([p[r][r[1] - 1] for r in later]))
    assert got["entropy"][t, layer, head] == pytest.approx(np.mean([-sum(x * math.log(x) for x in p[r] if x > 0) for r in rows]))
    before = {(b, i): pattern[t - 1, layer, b, head, i, : i + 1] for b, i in rows}
    assert got["stability"][t, layer, head] == pytest.approx(1 - np.mean([abs(p[r] - before[r]).sum() / 2 for r in rows]))
    scores = []
    for b, i in rows:
        x = cache.token_ids[b]
        hits = [j for j in range(1, i + 1) if x[j - 1] == x[i]]
        if hits:
            scores.append(sum(p[b, i][j] for j in hits))
    assert got["induction"][t, layer, head] == pytest.approx(np.mean(scores))


def test_repeated_tokens_leave_out_what_is_no_text():
    model = load("trained")
    ids = repeated_tokens(model, 16, batch=3, seed=5)
    assert ids.shape == (3, 32) and np.array_equal(ids[:, :16], ids[:, 16:])
    texts = model.to_str_tokens(ids.reshape(-1))
    assert not any(t.startswith("<|") for t in texts)
    assert np.array_equal(ids, repeated_tokens(model, 16, batch=3, seed=5)) and not np.array_equal(ids, repeated_tokens(model, 16, batch=3))


def test_kv_similarity_against_loops(cache):
    got = kv_similarity(cache)
    assert got["key_cosine"].dims == ("layer", "step", "other_step")
    k = cache.stack("rot_k").astype(float)
    vectors = [(b, i, h) for b, n in enumerate(cache.lengths) for i in range(n) for h in range(k.shape[-2])]
    cosines = []
    for b, i, h in vectors:
        u, v = k[1, 2, b, i, h], k[3, 2, b, i, h]
        cosines.append(u @ v / math.sqrt((u @ u) * (v @ v)))
    assert got["key_cosine"].sel(layer=2, step=1, other_step=3).values == pytest.approx(np.mean(cosines))
    top = sum(((k[1, 2, b, i, h] - k[3, 2, b, i, h]) ** 2).sum() for b, i, h in vectors)
    assert got["key_residual"].sel(layer=2, step=1, policy="last_step").values == pytest.approx(
        top / sum((k[1, 2, b, i, h] ** 2).sum() for b, i, h in vectors)
    )
    assert np.allclose(got["value_energy"].values[:, -1], 1) and np.all(np.diff(got["value_energy"].values) >= -1e-12)


@pytest.mark.parametrize("name", ["trained", "tiny-gqa-tied"])
def test_lens_is_exact_at_the_end_of_a_step(name):
    model = load(name)
    ids = [[5, 9, 30, 2, 11], [7, 8]]
    trace = model.trace(ids, logits="all")
    found = logit_lens(model, ids)
    assert found["kl"].coords["approximate"].tolist() == [True] * (model.config.n_layers - 1) + [False]
    for b, n in enumerate(trace.lengths):
        assert found["top"].values[:, -1, b, :n].tolist() == trace.logits[:, b, :n].argmax(-1).tolist()
        assert np.allclose(found["entropy"].values[:, -1, b, :n], trace.entropy[:, b, :n], atol=1e-5)
    assert np.all(np.abs(found["kl"].values[-1, -1][~np.isnan(trace.gate_logit[0])]) < 1e-12)
    _, cache = model.run_with_cache(ids, ["resid_post", "state"])
    normed = rms_norm(cache.stack("resid_post"), model.weight("model.norm.weight"), model.config.eps)
    assert np.allclose(normed[:, -1], cache["state"], atol=1e-5, equal_nan=True)
    head = model.weight("lm_head.weight").astype(float)
    z = head @ normed[1, 0, 0, 3].astype(float)
    p = np.exp(z - z.max())
    p /= p.sum()
    assert found["probability"][1, 0, 0, 3] == pytest.approx(p.max(), rel=1e-4)
    assert found["logprob"][1, 0, 0, 3] == pytest.approx(math.log(p[11]), abs=1e-4)
    assert found["rank"][1, 0, 0, 3] == (p > p[11]).sum()
    assert np.isnan(found["rank"].values[:, :, 0, 4]).all() and np.isnan(found["kl"].values[:, :, 1, 2:]).all()


def test_tuned_lens_reads_better_than_the_plain_one(cache):
    model = load("trained")
    train = ["One day Bob took the map to the hill.", "Ann is the boss of Cid. Who is the boss of Cid?", "Dora ran back to the cave."] * 2
    lens = TunedLens(alpha=0.3).fit(model, train)
    plain, tuned = logit_lens(model, cache), logit_lens(model, cache, tuned=lens)
    inside = dict(layer=[0, 1, 2])
    assert float(tuned["kl"].sel(**inside).mean()) < float(plain["kl"].sel(**inside).mean())
    assert tuned["kl"].coords["approximate"].all()


@pytest.mark.parametrize("name", ["trained", "tiny-gqa-tied", "tiny-sharded"])
def test_step_map_is_a_step_of_the_loop(name):
    model = load(name)
    trace = model.trace([[3, 50, 7, 7, 20]], logits="none")
    step = StepMap(model, trace.token_ids[0])
    for t in range(trace.n_steps - 1):
        assert np.array_equal(step(trace.states[t, 0]), trace.states[t + 1, 0])
    assert np.array_equal(step.iterate(trace.states[0, 0], trace.n_steps - 1), trace.states[1:, 0])
    with pytest.raises(ValueError, match="expected"):
        step(np.zeros((2, 3)))


def test_fixed_point_and_its_jacobian():
    """The power iteration finds what the whole Jacobian, built column by column, says."""
    model = load("tiny-one-step")
    found = fixed_point(model, [[5], [9, 2]], n_steps=12, iterations=30)
    assert found["move"].shape == (12, 2, 2) and found["growth"].shape == (30, 2)
    states = model.trace([[5]], n_steps=12, logits="none").states[:, 0]
    for name, values in rest_distances(states).items():
        assert np.allclose(found[name].values[:, 0, :1], values, equal_nan=True)
    product = jacobian_product(StepMap(model, [5]), states[-1])
    columns = [product(e[None])[0] for e in np.eye(states.shape[-1])]
    exact = np.abs(np.linalg.eigvals(np.stack(columns, 1))).max()
    assert found["contraction"].values[0] == pytest.approx(exact, rel=0.02)


def test_perturbation(cache):
    model = load("trained")
    found = perturbation_decay(model, RAGGED[:2], step=1, pos=-2, n_steps=6)  # the last but one
    n = cache.lengths[0]
    d = found["distance"].values
    assert np.isnan(d[0]).all() and np.isnan(found["gain"].values[0]).all() and np.allclose(found["gain"].values[1], 1)
    assert d[1, 0, n - 2] == pytest.approx(0.01, rel=1e-4) and d[1, 0, n - 1] == 0 and d[2, 0, n - 1] > 0
    assert not d[1:, 0, : n - 2].any(), "causal: what comes before the change never moves"
    with pytest.raises(ValueError, match="expected 0 to 3"):
        perturbation_decay(model, RAGGED, step=4)
    with pytest.raises(IndexError, match="sequence 0 has"):
        perturbation_decay(model, RAGGED, pos=99)


def test_perturbation_is_an_edit_of_the_loop():
    """The same change made by an edit while the loop runs gives the same path, up to where float32 adds it."""
    model, ids, step = load("trained"), [3, 50, 7, 7, 20], 1
    found = perturbation_decay(model, [ids], step=step, n_steps=5, size=0.05, seed=3)
    plain = model.trace([ids], n_steps=5, logits="none").states[:, 0]
    delta = np.random.default_rng(3).normal(size=plain[step].shape)
    delta *= 0.05 * np.linalg.norm(plain[step], axis=-1, keepdims=True) / np.linalg.norm(delta, axis=-1, keepdims=True)
    edits = [ouro.edits.Add("resid_pre", delta[i].astype(np.float32), steps=[step + 1], layers=[0], pos=[i]) for i in range(len(ids))]
    moved = model.trace([ids], n_steps=5, logits="none", edits=edits).states[:, 0]
    after = slice(step + 1, None)
    apart = np.linalg.norm((moved - plain).astype(float), axis=-1)[after]
    assert np.allclose(found["distance"].values[after, 0], apart / np.linalg.norm(plain, axis=-1)[after], rtol=1e-3)
    assert np.allclose(found["gain"].values[after, 0], np.linalg.norm(apart, axis=-1) / np.linalg.norm(delta), rtol=1e-3)


@pytest.mark.parametrize("style", ["default", "dark_background"])
def test_every_result_draws_itself(style, cache):
    plt = pytest.importorskip("matplotlib.pyplot")
    from ouro.plots import plot_pattern

    model = load("trained")
    lens = logit_lens(model, cache)
    results = [
        angular_distance(cache), attention_drift(cache), attention_drift(cache)["induction"], kv_similarity(cache), lens, lens["top"],
        lens["kl"], fixed_point(model, "Dora", n_steps=5, iterations=2), perturbation_decay(model, RAGGED[:2]),
        fixed_point(model, "Dora", n_steps=1, iterations=2),
    ]  # fmt: skip
    with plt.style.context(style):
        for result in results:
            figure, ax = plt.subplots()
            assert result.plot(ax=ax) is ax and ax.get_xlabel() and ax.get_ylabel()
            figure.canvas.draw()
            plt.close(figure)
        plt.close(plot_pattern(cache.sel("pattern", step=0, layer=1, batch=0, head=2)).figure)


def test_what_is_missing_is_said(cache):
    model = load("trained")
    with pytest.raises(TypeError, match="without texts"):
        angular_distance(model)
    with pytest.raises(TypeError, match="texts too"):
        angular_distance(cache, RAGGED)
    with pytest.raises(KeyError, match="captured"):
        angular_distance(model.run_with_cache(RAGGED, ["pattern"])[1])
    with pytest.raises(TypeError, match="expected a Model, got Trace"):
        fixed_point(model.trace("Bob"), None)
    with pytest.raises(ValueError, match="expected one"):
        logit_lens(model, cache, token=" took the cup")


@pytest.mark.parametrize("style", ["default", "dark_background"])
def test_sweeps_draw_themselves(style):
    plt = pytest.importorskip("matplotlib.pyplot")
    from ouro.labelled import LabelledArray

    rng = np.random.default_rng(0)
    coords = {"token": (("pos",), ["a", "b", "c"])}
    whole = LabelledArray(rng.normal(size=(2, 4, 3)), ("step", "layer", "pos"), coords, name="patched", attrs={"corrupted": -1.0})
    whole.plotter = "plot_patching"
    by_head = LabelledArray(rng.normal(size=(2, 4, 4)), ("step", "layer", "head"), plotter="plot_patching")
    with plt.style.context(style):
        for a, rows, columns in ((whole, 8, 3), (whole.sel(step=1), 4, 3), (whole.mean("pos"), 2, 4), (by_head, 8, 4)):
            ax = a.plot()
            image = ax.images[0]
            assert image.get_array().shape == (rows, columns)
            assert image.norm.vmax + image.norm.vmin == pytest.approx(2 * a.attrs.get("corrupted", 0))
            plt.close(ax.figure)
    with pytest.raises(ValueError, match="pick one"):
        LabelledArray(np.zeros((2, 3)), ("point", "pos"), {"point": ["q", "k"]}, plotter="plot_patching").plot()
