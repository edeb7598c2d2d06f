"""Sampling: noise from a counter, filters against NumPy, frequencies against the filtered softmax."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from ouro import _core

pytestmark = pytest.mark.core


def softmax(x):
    e = np.exp(x - x.max())
    return e / e.sum()


def oracle(z, history, temperature, top_k, top_p, min_p, penalty):
    """The filters, written plainly."""
    x = z.astype(np.float32).copy()
    for t in set(history):
        x[t] = x[t] / np.float32(penalty) if x[t] > 0 else x[t] * np.float32(penalty)
    x = x / np.float32(temperature)
    order = sorted(range(len(x)), key=lambda i: (-x[i], i))
    if top_k:
        x[order[top_k:]] = -np.inf
    if top_p < 1:
        p = softmax(x.astype(np.float64))[order]
        cut = int(np.searchsorted(np.cumsum(p), np.float32(top_p))) + 1
        x[order[max(cut, 1) :]] = -np.inf
    if np.float32(min_p) > 0:  # what the core sees
        x[x < x.max() + np.float32(np.log(np.float64(np.float32(min_p))))] = -np.inf
    return x


@settings(max_examples=200, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 200), st.floats(0.1, 3), st.integers(0, 220), st.floats(0.05, 1), st.floats(0, 0.5),
       st.floats(0.5, 2))  # fmt: skip
def test_filters_against_numpy(seed, n, temperature, top_k, top_p, min_p, penalty):
    rng = np.random.default_rng(seed)
    z, history = (rng.standard_normal(n) * 3).astype(np.float32), rng.integers(0, n, 5)
    found = _core.filter_logits(z, history, temperature, top_k, top_p, min_p, penalty)
    expected = oracle(z, history.tolist(), temperature, top_k, top_p, min_p, penalty)
    both = np.isfinite(found) & np.isfinite(expected)
    np.testing.assert_allclose(found[both], expected[both], rtol=1e-6)
    assert np.isfinite(found).any() and found.argmax() == expected.argmax()
    # where the cumulative sum meets top_p within rounding, one token more or less may pass
    assert abs(int(np.isfinite(found).sum()) - int(np.isfinite(expected).sum())) <= (1 if top_p < 1 else 0)


@pytest.mark.parametrize(
    "filters", [{}, {"top_k": 8}, {"top_p": 0.8}, {"min_p": 0.1}, {"temperature": 0.6, "top_p": 0.95, "top_k": 15}], ids=str
)
def test_frequencies(filters):
    """20 000 draws against the filtered softmax, chi-square."""
    z = (np.random.default_rng(0).standard_normal(24) * 1.5).astype(np.float32)
    p = softmax(_core.filter_logits(z, [], **filters).astype(np.float64))
    draws = [_core.sample(z, [], seed=42, position=i, **filters) for i in range(20_000)]
    counts = np.bincount(draws, minlength=24)
    assert (counts[p == 0] == 0).all()
    assert stats.chisquare(counts[p > 0], 20_000 * p[p > 0]).pvalue > 0.001


def test_sample_is_the_argmax_of_the_noisy_logits():
    """The shortcuts of the C loop never change the winner."""
    rng = np.random.default_rng(1)
    for position in range(200):
        z = (rng.standard_normal(97) * rng.uniform(0.1, 12)).astype(np.float32)
        noise = np.array([_core.gumbel(9, 4, position, i) for i in range(97)])
        assert _core.sample(z, [], seed=9, stream=4, position=position) == int((z.astype(np.float64) + noise).argmax())


def test_noise_depends_on_everything_and_is_gumbel():
    draws = [_core.gumbel(3, 0, position, token) for position in range(100) for token in range(100)]
    assert stats.kstest(draws, "gumbel_r").pvalue > 0.001
    one = _core.gumbel(3, 0, 5, 6)
    assert one == _core.gumbel(3, 0, 5, 6)
    assert len({one, _core.gumbel(4, 0, 5, 6), _core.gumbel(3, 1, 5, 6), _core.gumbel(3, 0, 6, 6), _core.gumbel(3, 0, 5, 7)}) == 5


@pytest.mark.parametrize("bad", [{"temperature": -1}, {"temperature": float("nan")}, {"top_p": 0}, {"top_p": 1.5}, {"min_p": -0.1},
                                 {"repetition_penalty": 0}, {"top_k": -1}], ids=str)  # fmt: skip
def test_bad_settings(bad):
    with pytest.raises(ValueError):
        _core.filter_logits([1.0, 2.0], [], **bad)
    with pytest.raises(ValueError):
        _core.filter_logits([1.0, 2.0], [5])
