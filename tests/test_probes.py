"""Probes over the grid: planted labels, groups, control tasks, scikit-learn's own checks, the faithfulness protocol."""

import numpy as np
import pytest
from conftest import load

pytest.importorskip("sklearn")

from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.model_selection import GridSearchCV
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.utils.estimator_checks import parametrize_with_checks

from ouro.probes import StepLayerProbe, control_labels, faithfulness, faithfulness_of, probe_data

EXPECTED: dict[str, str] = {}


@pytest.mark.slow
@parametrize_with_checks(
    [StepLayerProbe(LogisticRegression(), cv=2), StepLayerProbe(Ridge(), cv=2)], expected_failed_checks=lambda estimator: EXPECTED
)
def test_scikit_learn_checks(estimator, check):
    check(estimator)


@pytest.fixture
def planted():
    """60 samples of 15 prompts; the label can be read at (1, 2) only."""
    rng = np.random.default_rng(0)
    y = np.arange(60) % 2
    x = rng.normal(size=(60, 2, 3, 4))
    x[:, 1, 2, 0] += 4 * y
    return x, y, np.arange(60) // 4


def test_planted_label_is_found_where_it_is(planted):
    x, y, groups = planted
    probe = StepLayerProbe(cv=3, control=True).fit(x, y, groups=groups)
    mean = probe.scores_.mean("fold")
    assert probe.scores_.dims == ("step", "layer", "fold") and probe.scores_.shape == (2, 3, 3)
    assert mean.values[1, 2] > 0.9 and np.delete(mean.values.reshape(-1), 5).max() < 0.75
    assert probe.selectivity_.values[1, 2] > 0.2
    assert np.allclose(probe.selectivity_, mean.values - probe.control_scores_.mean("fold").values)
    predicted = probe.predict(x)
    assert predicted.dims == ("sample", "step", "layer") and (predicted.values[:, 1, 2] == y).mean() > 0.9
    assert probe.predict_proba(x).sel(**{"class": 1}).shape == (60, 2, 3)
    assert probe.score(x, y).sel(step=1, layer=2).values == (predicted.values[:, 1, 2] == y).mean()


def test_a_place_of_the_grid_is_the_estimator_alone(planted):
    x, y, _ = planted
    estimator = make_pipeline(StandardScaler(), LogisticRegression(C=0.1, max_iter=2000))
    grid, alone = StepLayerProbe().fit(x, y), estimator.fit(x[:, 1, 2], y)
    assert np.array_equal(grid.predict_proba(x).values[:, 1, 2], alone.predict_proba(x[:, 1, 2]))
    single = StepLayerProbe().fit(x[:, 1, 2], y)
    assert np.array_equal(single.predict(x[:, 1, 2]), alone.predict(x[:, 1, 2])) and isinstance(single.score(x[:, 1, 2], y), float)
    assert np.allclose(single.scores_.values[0, 0], grid.scores_.values[1, 2])


def test_groups_are_never_on_both_sides():
    """Labels that only the prompt tells: with samples of one prompt on both sides a probe is perfect, honestly it is at chance."""
    rng = np.random.default_rng(1)
    groups = np.repeat(np.arange(20), 6)
    y = rng.permutation(np.arange(20) % 2)[groups]
    x = np.eye(20)[groups] * 5 + 0.1 * rng.normal(size=(120, 20))
    assert StepLayerProbe().fit(x, y).scores_.mean().values > 0.95
    assert StepLayerProbe().fit(x, y, groups=groups).scores_.mean().values < 0.7
    probe = StepLayerProbe(cv=4)
    probe.fit(x, y)
    for train, test in probe._folds(y, groups):
        assert not set(groups[train]) & set(groups[test])
    with pytest.raises(ValueError, match="groups has shape"):
        probe.fit(x, y, groups=groups[:3])


def test_control_task_is_a_function_of_the_type():
    types = np.array(["a", "b", "c"] * 40)
    y = np.array([0, 1] * 60)
    labels = control_labels(y, types, seed=3)
    assert all(len(set(labels[types == t])) == 1 for t in "abc") and set(labels) <= {0, 1}
    assert sorted(control_labels(y)) == sorted(y), "without types: the same labels, shuffled"
    memory = np.eye(3)[np.array([0, 1, 2] * 40)]  # shows nothing but the type: solves the control task, if it has two labels
    seed = next(s for s in range(20) if len(set(control_labels(y, types, seed=s))) == 2)
    probe = StepLayerProbe(control=True, random_state=seed).fit(memory, y, types=types)
    assert probe.control_scores_.mean().values == 1 and probe.selectivity_.values[0, 0] < -0.3


def test_regularisation_path(planted):
    """A fold's setting is chosen inside its training part: as GridSearchCV does it on the same splits."""
    x, y, groups = planted
    values = [1e-6, 0.1]
    probe = StepLayerProbe(cv=3, path={"logisticregression__C": values}).fit(x, y, groups=groups)
    assert probe.path_scores_.dims == ("step", "layer", "setting") and probe.path_scores_.attrs["setting"] == "logisticregression__C"
    best = probe.path_scores_.values[1, 2].argmax()
    assert probe.estimators_[1][2].get_params()["logisticregression__C"] == values[best]
    cell = x[:, 1, 2]
    for fold, (train, test) in enumerate(probe._folds(y, groups)):
        inner = probe._folds(y[train], groups[train])
        search = GridSearchCV(probe.estimators_[0][0], {"logisticregression__C": values}, cv=inner).fit(cell[train], y[train])
        assert probe.path_choice_.values[1, 2, fold] == search.best_index_
        assert probe.scores_.values[1, 2, fold] == search.score(cell[test], y[test])
        assert all(not set(groups[train][a]) & set(groups[train][b]) for a, b in inner)
    with pytest.raises(ValueError, match="one parameter"):
        StepLayerProbe(path={}).fit(x, y)


def test_patience_ends_a_step(planted):
    x, y, groups = planted
    x = x.copy()
    x[:, 0, 0, 0] += 6 * y  # nothing after layer 0 of step 0 can be better
    probe = StepLayerProbe(cv=3, patience=1).fit(x, y, groups=groups)
    assert probe.estimators_[0][0] is not None and probe.estimators_[0][2] is None
    assert np.isnan(probe.scores_.values[0, 2]).all() and np.isnan(probe.predict(x).values[:, 0, 2]).all()
    assert np.isnan(probe.score(x, y).values[0, 2])
    full = StepLayerProbe(cv=3).fit(x, y, groups=groups)
    ran = ~np.isnan(probe.scores_.values)
    assert np.array_equal(probe.scores_.values[ran], full.scores_.values[ran])


def test_regression(planted):
    x, _, groups = planted
    y = 2.0 * x[:, 0, 1, 3] + 1
    one = StepLayerProbe(Ridge(alpha=1e-3), cv=3).fit(x, y, groups=groups)
    assert one.scores_.mean("fold").values[0, 1] > 0.999
    assert np.allclose(one.predict(x).values[:, 0, 1], y, atol=1e-2) and not hasattr(one, "predict_proba")


@pytest.mark.slow
def test_jobs_side_by_side_give_the_same(planted):
    x, y, groups = planted
    one, two = (StepLayerProbe(cv=3, n_jobs=n, verbose=n > 1).fit(x, y, groups=groups) for n in (1, 2))
    assert np.array_equal(one.scores_, two.scores_)


def test_shapes_are_checked(planted):
    x, y, _ = planted
    probe = StepLayerProbe(cv=2).fit(x, y)
    with pytest.raises(ValueError, match="expected"):
        probe.predict(x[:, :1])
    with pytest.raises(ValueError, match="cv is 1"):
        StepLayerProbe(cv=1).fit(x, y)


def test_probe_on_a_model():
    """The last layer of the last step knows the token it will say: the same readout made it."""
    model = load("trained")
    texts = ["One day Ann took the cup to the cave.", "Bob is the boss of Cid. Who is the boss of Cid?", "Dora ran back to the hill."]
    _, cache = model.run_with_cache(texts, ["resid_post"])
    x, prompts, tokens = probe_data(cache)
    assert x.shape == (sum(cache.lengths), 4, 4, 128) and np.isfinite(x).all()
    assert [cache.token_ids[b] for b in range(3)] == [tokens[prompts == b].tolist() for b in range(3)]
    last, which, _ = probe_data(cache, pos=-1)
    assert np.array_equal(last[1], cache.stack("resid_post")[:, :, 1, cache.lengths[1] - 1]) and which.tolist() == [0, 1, 2]
    with pytest.raises(IndexError, match="shortest"):
        probe_data(cache, pos=200)


def test_faithfulness_of_made_up_answers():
    """The answer of step 0 stands in the first feature everywhere; that of step 1 appears at (1, 1) only."""
    rng = np.random.default_rng(0)
    first, second = rng.integers(0, 2, 80), rng.integers(0, 2, 80)
    x = rng.normal(size=(80, 2, 2, 6))
    x[..., 0] += 6 * first[:, None, None]
    x[:, 1, 1, 1] += 6 * second
    found = faithfulness_of(x, np.stack([first, second], 1), cv=4)
    assert np.allclose(found["agreement"], [[1, (first == second).mean()], [(first == second).mean(), 1]])
    assert found["probe"].values[0].min() > 0.95
    assert found["probe"].sel(answer_step=1, step=1, layer=1).values > 0.95 and found["probe"].values[1].reshape(-1)[:3].max() < 0.75
    assert found["majority"].values[0] == max(first.mean(), 1 - first.mean())
    constant = faithfulness_of(x, np.stack([first, 0 * second], 1), cv=4)
    assert np.isnan(constant["probe"].values[1]).all() and constant["majority"].values[1] == 1


def test_faithfulness_of_a_model():
    model = load("trained")
    names = ["Ann", "Bob", "Cid", "Dora", "Leo", "Zoe"]
    prompts = [f"{a} is the boss of {b}. Who is the boss of {b}?" for a in names for b in names if a != b]
    trace = model.trace(prompts, logits="all")
    ids = np.unique(trace.logits[-1, np.arange(30), trace.lengths - 1].argmax(-1))[:3].tolist()
    ids = [*ids, 5, 6]
    found = faithfulness(model, prompts, ids[:3], cv=2, groups=np.arange(30) // 5)
    z = trace.logits[:, np.arange(30), trace.lengths - 1][..., ids[:3]]
    assert np.array_equal(found["answer"], z.argmax(-1).T)
    assert found["probe"].shape == (4, 4, 4)
    plt = pytest.importorskip("matplotlib.pyplot")
    for style in ("default", "dark_background"):
        with plt.style.context(style):
            ax = found.plot()
            ax.figure.canvas.draw()
            plt.close(ax.figure)
    with pytest.raises(ValueError, match="two or more"):
        faithfulness(model, prompts, ids[:1])
