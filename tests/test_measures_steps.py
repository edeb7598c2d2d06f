"""Measures of states and readouts by step, against plain loops and on cases whose answer is known."""

import itertools
import math
from dataclasses import replace

import numpy as np
import pytest
from conftest import RAGGED, load, reference

from ouro import exits
from ouro.measures import (
    agreement,
    agreement_matrices,
    angle,
    answer_flips,
    cka,
    cka_matrix,
    commitment_step,
    count_flips,
    depth_sweep,
    divergence,
    exit_pareto,
    exit_report,
    exit_signals,
    exit_steps,
    linear_cka,
    loop_drift,
    loss_by_step,
    rank_of,
    rank_trajectory,
    state_changes,
    token_class,
    token_loss,
)


@pytest.fixture(scope="module")
def trace():
    return load("trained").trace(RAGGED, logits="all")


def probabilities(z):
    e = np.exp(np.asarray(z, np.float64) - np.max(z))
    return e / e.sum()


def real_places(trace):
    return [(b, i) for b, n in enumerate(trace.lengths) for i in range(n)]


# -- pure functions, known answers ---------------------------------------------------------------------------------


def test_changes_of_a_made_up_path():
    """A state that turns by a right angle and doubles, then stays."""
    states = np.array([[[1.0, 0.0]], [[0.0, 2.0]], [[0.0, 2.0]]])
    got = {n: a[:, 0] for n, a in state_changes(states).items()}
    assert np.allclose(got["norm"], [1, 2, 2])
    assert np.allclose(got["l2"], [np.nan, math.sqrt(5), 0], equal_nan=True)
    assert np.allclose(got["relative_l2"], [np.nan, math.sqrt(5), 0], equal_nan=True)
    assert np.allclose(got["cosine"], [np.nan, 0, 1], equal_nan=True)
    assert np.allclose(got["angle"], [np.nan, math.pi / 2, 0], equal_nan=True)
    assert np.allclose(got["acceleration"], [np.nan, np.nan, math.sqrt(5) / 2], equal_nan=True)


def test_small_angles_stay_exact():
    for true in (1e-9, 1e-4, 1.0, math.pi - 1e-9):
        assert angle(np.array([3.0, 0.0]), 2 * np.array([math.cos(true), math.sin(true)])) == pytest.approx(true, rel=1e-6)


def test_divergence_of_known_distributions():
    p, q = np.log([0.5, 0.5]), np.log([0.25, 0.75])
    assert divergence(p, q) == pytest.approx(0.5 * math.log(2) + 0.5 * math.log(2 / 3))
    assert divergence(p, p) == 0


def test_flips_and_commitment_of_known_answers():
    top = np.array([[1, 1, 5, 2], [2, 1, 6, 2], [1, 1, 5, 3], [1, 1, 7, 2]])  # [step, token]
    assert count_flips(top).tolist() == [2, 0, 3, 2]
    assert commitment_step(top).tolist() == [2, 0, 3, 3]
    assert commitment_step(top[:1]).tolist() == [0, 0, 0, 0]


def test_rank_counts_equal_logits_by_id():
    z = np.array([[3.0, 1.0, 3.0, 2.0]])
    assert [int(rank_of(z, t)[0]) for t in range(4)] == [0, 3, 1, 2]


def test_loss_of_known_distributions():
    """A step that knows nothing loses log of the vocabulary, one that is sure and right nothing; no target is no loss."""
    sure = np.log(np.array([0.0, 1.0, 0.0, 0.0]) + 1e-300)
    loss, right = token_loss(np.stack([[np.log(np.full(4, 0.25))] * 3, [sure] * 3]), np.array([1, 2, -1]))
    assert np.allclose(loss[0, :2], math.log(4)) and loss[1, 0] == 0 and loss[1, 1] == pytest.approx(300 * math.log(10))
    assert right[1, :2].tolist() == [1, 0] and np.isnan(loss[:, 2]).all() and np.isnan(right[:, 2]).all()


def test_agreement_of_known_distributions():
    log_p = np.log(np.array([[[0.7, 0.3]], [[0.6, 0.4]], [[0.2, 0.8]]]))
    got = agreement_matrices(log_p)
    assert got["top1"][:, :, 0].tolist() == [[1, 1, 0], [1, 1, 0], [0, 0, 1]]
    assert got["kl"][0, 2, 0] == pytest.approx(0.7 * math.log(3.5) + 0.3 * math.log(0.375))
    assert np.all(np.diagonal(got["kl"][:, :, 0]) == 0)


def test_cka_known_cases():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(200, 5))
    turn = np.linalg.qr(rng.normal(size=(5, 5)))[0]
    assert linear_cka(x, 7 * x @ turn - 3) == pytest.approx(1)
    assert linear_cka(x, 7 * x @ turn - 3, debiased=True) == pytest.approx(1)
    a, b = np.array([1.0, -1, 0, 0]), np.array([0.0, 0, 1, -1])
    assert linear_cka(a[:, None], b[:, None]) == pytest.approx(0)
    assert linear_cka(np.c_[a, b], a[:, None]) == pytest.approx(1 / math.sqrt(2))  # one of two equal directions
    wide, other = rng.normal(size=(20, 300)), rng.normal(size=(20, 300))
    assert linear_cka(wide, other) > 0.9 and abs(linear_cka(wide, other, debiased=True)) < 0.15
    few = rng.normal(size=(6, 9)), rng.normal(size=(6, 11))
    centred = [m - m.mean(0) for m in few]
    direct = np.linalg.norm(centred[1].T @ centred[0]) ** 2
    direct /= np.linalg.norm(centred[0].T @ centred[0]) * np.linalg.norm(centred[1].T @ centred[1])
    assert linear_cka(*few) == pytest.approx(direct), "the Gram form gives the same"
    with pytest.raises(ValueError, match="same tokens"):
        linear_cka(x, x[1:])


def test_debiased_cka_against_the_definition():
    """Unbiased HSIC by its sum over all distinct i, j, q, r (Song et al. 2012, equation 4)."""
    rng = np.random.default_rng(1)
    x, y = rng.normal(size=(7, 2)), rng.normal(size=(7, 3))
    y[:, 0] += x[:, 0]

    def hsic(k, m):
        n = len(k)
        total = 0.0
        for i in range(n):
            for j in range(n):
                for q in range(n):
                    for r in range(n):
                        if len({i, j, q, r}) == 4:
                            total += k[i, j] * (m[i, j] + m[q, r] - 2 * m[i, q])
        return total / (n * (n - 1) * (n - 2) * (n - 3))

    k, m = x @ x.T, y @ y.T
    assert linear_cka(x, y, debiased=True) == pytest.approx(hsic(k, m) / math.sqrt(hsic(k, k) * hsic(m, m)))


def test_token_classes():
    expected = {"<|im_start|>": "special", " (": "mark", "\n": "mark", "7": "number", " the": "word", "Ann": "word", "ed": "rest", "": ""}
    assert {t: token_class(t) for t in expected} == expected


# -- on a model, against plain loops -------------------------------------------------------------------------------


def test_drift_against_loops(trace):
    got = loop_drift(trace)
    h, z = trace.states.astype(np.float64), trace.logits
    assert got.dims == ("step", "batch", "pos")
    for b, i in real_places(trace):
        for t in range(1, trace.n_steps):
            move = h[t, b, i] - h[t - 1, b, i]
            assert got["l2"][t, b, i] == pytest.approx(math.sqrt(sum(move * move)))
            assert got["cosine"][t, b, i] == pytest.approx(math.cos(got["angle"][t, b, i]), abs=1e-9)
            p, q = probabilities(z[t - 1, b, i]), probabilities(z[t, b, i])
            assert got["kl"][t, b, i] == pytest.approx(sum(p * np.log(p / q)), rel=1e-6, abs=1e-12)
    beyond = np.ones(trace.gate_logit.shape[1:], bool)
    for b, i in real_places(trace):
        beyond[b, i] = False
    assert all(np.isnan(a.values[:, beyond]).all() for a in got.values())


def test_a_batch_counts_as_its_rows_alone(trace):
    """Ragged rows: what a sequence gives does not depend on what it is batched with, and the padding is not counted."""
    model = load("trained")
    for measure, name in ((loop_drift, "kl"), (agreement, "top1"), (exit_report, "pdf"), (loss_by_step, "loss")):
        together = measure(trace)[name]
        parts = [measure(model, text)[name].values for text in RAGGED[:2]]
        for b, part in enumerate(parts):
            assert np.array_equal(together.values[..., b : b + 1, : part.shape[-1]], part, equal_nan=True)
        if measure is not loss_by_step:
            parts.append(measure(model, RAGGED[2])[name].values)
        flat = np.concatenate([p.reshape(*p.shape[:-2], -1) for p in parts], axis=-1)
        counted = ~np.isnan(flat).all(-1)
        assert np.allclose(together.mean("batch", "pos").values[counted], np.nanmean(flat[counted], axis=-1))


def test_agreement_and_flips_against_loops(trace):
    same, flips, ranks = agreement(trace), answer_flips(trace), rank_trajectory(trace)
    for b, i in real_places(trace):
        top = [int(np.argmax(trace.logits[t, b, i])) for t in range(4)]
        assert flips["top"][:, b, i].tolist() == top
        assert flips["flips"][b, i] == sum(a != c for a, c in itertools.pairwise(top))
        assert flips["commitment"][b, i] == min(t for t in range(4) if all(a == top[-1] for a in top[t:]))
        assert [[same["top1"][s, t, b, i] for t in range(4)] for s in range(4)] == [[float(a == c) for c in top] for a in top]
        if i + 1 < trace.lengths[b]:
            target = trace.token_ids[b][i + 1]
            assert flips["right"][:, b, i].tolist() == [float(a == target) for a in top]
            order = [list(np.argsort(-trace.logits[t, b, i], kind="stable")).index(target) for t in range(4)]
            assert ranks["rank"][:, b, i].tolist() == order
            assert ranks["logprob"][:, b, i] == pytest.approx([math.log(probabilities(trace.logits[t, b, i])[target]) for t in range(4)])
        else:
            assert np.isnan(flips["right"][:, b, i]).all() and np.isnan(ranks["rank"][:, b, i]).all()
    change = np.diff(flips["right"].values, axis=0)
    assert np.array_equal(flips["gained"].values[1:] - flips["lost"].values[1:], change, equal_nan=True)
    assert np.all(flips["top"].values[:, 2, 2:] == -1) and np.isnan(flips["flips"].values[2, trace.lengths[2] :]).all()


@pytest.mark.parametrize("name", ["tiny-mha", "tiny-gqa-tied", "trained"])
def test_loss_by_step_is_that_of_the_released_code(name):
    r = reference(name)
    loss = loss_by_step(load(name), r["input_ids"])["loss"]
    assert np.allclose(loss.mean("batch", "pos"), r["step_loss"], rtol=2e-5)
    assert np.isnan(loss.values[:, :, -1]).all()


def test_depth_sweep_is_running_each_depth():
    model = load("trained")
    sweep = depth_sweep(model, RAGGED[:2], max_steps=6)
    for k in range(1, 7):
        alone = loss_by_step(model, RAGGED[:2], n_steps=k)
        for name in ("loss", "accuracy"):
            assert np.array_equal(sweep[name].sel(n_steps=k), alone[name].sel(step=k - 1), equal_nan=True)


def test_cka_counts_real_tokens_only(trace):
    tokens = np.stack([trace.states[:, b, i] for b, i in real_places(trace)], axis=1)
    assert np.allclose(cka(trace), cka_matrix(tokens))
    assert np.allclose(np.diagonal(cka(trace)), 1)


# -- leaving early -----------------------------------------------------------------------------------------------------


def test_exit_report_of_a_gate_that_never_changes():
    """All gate logits b: a geometric distribution with lambda = sigmoid(b), whatever the text."""
    made = load("trained").trace([[5, 6, 7]], n_steps=5, logits="none")
    made = replace(made, gate_logit=np.full_like(made.gate_logit, math.log(3)))  # lambda = 3/4
    report = exit_report(made, q=[0.7, 0.9, 0.99])
    assert np.allclose(report["pdf"].values[:, 0, 0], [3 / 4, 3 / 16, 3 / 64, 3 / 256, 1 / 256])
    assert report["exit_step"].values[:, 0, 0].tolist() == [0, 1, 3]


def test_exit_report(trace):
    report = exit_report(trace, q=[0.0, 0.5, 1.0])
    for b, i in real_places(trace):
        lam = 1 / (1 + np.exp(-trace.gate_logit[:, b, i].astype(np.float64)))
        pdf = [lam[0], lam[1] * (1 - lam[0]), lam[2] * (1 - lam[0]) * (1 - lam[1])]
        pdf.append(1 - sum(pdf))
        assert report["pdf"][:, b, i] == pytest.approx(pdf, abs=1e-6)
        assert report["expected_steps"][b, i] == pytest.approx(sum((t + 1) * p for t, p in enumerate(pdf)), abs=1e-5)
        cdf = np.cumsum(pdf)
        assert report["exit_step"][:, b, i].tolist() == [0, next(t for t in range(4) if cdf[t] >= 0.5), 3]
    by_class = report["pdf"].group_mean("token_class")
    assert "" not in by_class.coords["token_class"] and np.allclose(by_class.values.sum(0), 1, atol=1e-6)
    assert np.isnan(report["exit_step"].values[:, 2, trace.lengths[2] :]).all()


@pytest.mark.parametrize(
    "rule",
    [
        exits.QExit(0.6),
        exits.StateDelta(2.5),
        exits.StateRelative(0.15, delay=1),
        exits.Acceleration(0.12),
        exits.ReadoutKL(0.02, min_steps=3),
        exits.TopAgreement(),
        exits.ReadoutEntropy(0.5),
        exits.Confidence(0.7),
    ],
    ids=lambda r: type(r).__name__,
)
def test_rules_after_the_fact_are_the_engines(rule):
    """What `exit_steps` says of a finished text is where the engine left while it was written."""
    model = load("trained")
    made = model.generate(RAGGED[0], max_new_tokens=24, exit_rule=rule, eos_token_id=[])
    trace = model.trace(made.prompt_token_ids + made.token_ids)
    begin = len(made.prompt_token_ids) - 1
    found = exit_steps(rule, exit_signals(trace))
    assert found[0, begin:-1].tolist() == made.exit_steps and np.array_equal(found, trace.exit_step(rule))
    assert len(set(made.exit_steps)) > 1 or isinstance(rule, exits.TopAgreement), "the threshold parts the tokens"


def test_rules_on_made_up_signals():
    signals = {"entropy": np.array([[3.0, 0.5], [1.0, 2.0], [0.1, 2.0], [0.1, 2.0]])}
    assert exit_steps(exits.ReadoutEntropy(1.0), signals).tolist() == [2, 0]
    assert exit_steps(exits.ReadoutEntropy(1.0, delay=2), signals).tolist() == [3, 2]
    assert exit_steps(exits.ReadoutEntropy(1.0, min_steps=2), signals).tolist() == [2, 3]
    assert exit_steps(exits.NamedExit(1.0, rule="entropy"), signals).tolist() == [2, 0]
    assert exit_steps(exits.Confidence(0.5), signals).tolist() == [3, 3], "a number that was not measured says nothing"
    with pytest.raises(ValueError, match="no exit rule 'entropie', expected one of never, q"):
        exit_steps(exits.NamedExit(1.0, rule="entropie"), signals)
    with pytest.raises(ValueError, match=r"entropy has shape \(3, 2\), expected \(4, 2\)"):
        exit_steps(exits.ReadoutEntropy(1.0), {"kl": signals["entropy"], "entropy": signals["entropy"][:3]})
    with pytest.raises(ValueError, match="exit_threshold is 2"):
        exit_steps(exits.QExit(2.0), {"exit_cdf": signals["entropy"]})
    with pytest.raises(TypeError, match="that need no Python"):
        exit_steps(exits.CustomExit(rule=lambda s: True), signals)


def test_pareto(trace):
    found = exit_pareto(trace)
    loss = loss_by_step(trace)["loss"].mean("batch", "pos").values
    fixed = found.sel(rule="fixed")
    assert fixed["mean_steps"].values[:4].tolist() == [1, 2, 3, 4] and np.isnan(fixed["loss"].values[4:]).all()
    assert np.allclose(fixed["loss"].values[:4], loss)
    assert set(found["loss"].coords["rule"]) == {"fixed", "QExit", "StateDelta", "StateRelative", "Acceleration", "ReadoutKL",
                                                 "ReadoutEntropy", "Confidence", "TopAgreement"}  # fmt: skip
    assert found["loss"].sel(rule="QExit").values[-1] == pytest.approx(loss[-1]), "q = 1 is all steps"
    steps, quantile = found["mean_steps"].sel(rule="QExit").values, found["threshold"].sel(rule="QExit").values
    assert np.all(np.diff(steps) >= 0) and np.all(np.diff(quantile) >= 0)
    one = exit_pareto(trace, rules={"mine": [exits.QExit(0.5), 2], "custom": [exits.CustomExit(rule=lambda s: s["exit_cdf"] >= 0.5)]})
    assert one["loss"].values[1, 0] == one["loss"].values[0, 0] and np.isnan(one["loss"].values[1, 1])
    at = trace.exit_step(0.5)
    counted = [(b, i) for b, i in real_places(trace) if i + 1 < trace.lengths[b]]
    by_step = loss_by_step(trace)["loss"].values
    assert one["loss"].values[0] == pytest.approx([np.mean([by_step[at[p], p[0], p[1]] for p in counted]), loss[2]])
    assert one["mean_steps"].values[0, 0] == pytest.approx(np.mean([at[p] + 1 for p in counted]))


# -- arguments and pictures --------------------------------------------------------------------------------------------


def test_what_is_missing_is_said(trace):
    model = load("trained")
    with pytest.raises(TypeError, match="without texts"):
        loop_drift(model)
    with pytest.raises(TypeError, match="texts too"):
        loop_drift(trace, "Bob")
    with pytest.raises(ValueError, match="has 4 steps, n_steps is 5"):
        agreement(trace, n_steps=5)
    with pytest.raises(ValueError, match="nothing to predict"):
        loss_by_step(model, [[5]])
    with pytest.raises(ValueError, match="expected one"):
        rank_trajectory(trace, token=" took the")
    with pytest.raises(ValueError, match="fixed exit step is 7"):
        exit_pareto(trace, rules={"mine": [7]})


@pytest.mark.parametrize("style", ["default", "dark_background"])
@pytest.mark.parametrize("measure", [loop_drift, agreement, answer_flips, rank_trajectory, loss_by_step, exit_report, exit_pareto, cka])
def test_every_result_draws_itself(measure, style, trace):
    plt = pytest.importorskip("matplotlib.pyplot")
    pytest.importorskip("pandas")
    result = measure(trace)
    with plt.style.context(style):
        figure, ax = plt.subplots()
        assert result.plot(ax=ax) is ax and ax.get_xlabel() and (ax.get_ylabel() or measure is exit_report)
        figure.canvas.draw()
        plt.close(figure)
    assert len(result.to_dataframe()) > 0
    for array in result.values() if hasattr(result, "title") else [result]:
        assert array.plotter.startswith("plot_")
