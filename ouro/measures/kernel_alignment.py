"""Centered kernel alignment: are two representations the same up to rotation and scale?"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ouro.labelled import LabelledArray
from ouro.measures.source import as_trace, labelled, real
from ouro.model import Batch, Model
from ouro.trace import Trace


def _centred(x: ArrayLike) -> NDArray[np.float64]:
    a = np.asarray(x, np.float64)
    return np.asarray(a - a.mean(0))


def _hsic(k: NDArray[Any], m: NDArray[Any]) -> float:
    """Unbiased HSIC of two Gram matrices with zero diagonal (Song et al. 2012, equation 5)."""
    n = len(k)
    return float((k * m).sum() + k.sum() * m.sum() / ((n - 1) * (n - 2)) - 2 * (k.sum(0) @ m.sum(0)) / (n - 2)) / (n * (n - 3))


def linear_cka(x: ArrayLike, y: ArrayLike, *, debiased: bool = False) -> float:
    """`|Y'X|_F^2 / (|X'X|_F |Y'Y|_F)` of column-centred X `[sample, feature]` and Y `[sample, feature]`; 0 to 1.

    Invariant to rotation and to one scale, not to every invertible map. `debiased` uses the unbiased HSIC, which does not
    grow when there are fewer samples than features (it may then be a little below 0).

    Source
    ------
    Kornblith et al., arXiv 1905.00414, section 3; debiased: Nguyen et al., arXiv 2010.15327, equation 3.

    >>> import numpy as np
    >>> from ouro.measures import linear_cka
    >>> x = np.random.default_rng(0).normal(size=(50, 4))
    >>> rotation = np.linalg.qr(np.random.default_rng(1).normal(size=(4, 4)))[0]
    >>> round(linear_cka(x, 3 * x @ rotation + 1), 12)
    1.0
    """
    x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
    if len(x) != len(y):
        raise ValueError(f"{len(x)} samples against {len(y)}: expected the same tokens in both")
    if debiased:
        if len(x) < 4:
            raise ValueError(f"debiased CKA needs 4 samples or more, got {len(x)}")
        k, m = x @ x.T, y @ y.T
        np.fill_diagonal(k, 0)
        np.fill_diagonal(m, 0)
        return _hsic(k, m) / float(np.sqrt(_hsic(k, k) * _hsic(m, m)))
    x, y = _centred(x), _centred(y)
    if len(x) < max(x.shape[1], y.shape[1]):  # the same numbers from the smaller matrices
        k, m = x @ x.T, y @ y.T
        return float((k * m).sum() / (np.linalg.norm(k) * np.linalg.norm(m)))
    return float(np.linalg.norm(y.T @ x) ** 2 / (np.linalg.norm(x.T @ x) * np.linalg.norm(y.T @ y)))


def cka_matrix(states: ArrayLike, *, debiased: bool = False) -> NDArray[np.float64]:
    """`linear_cka` of every pair of `[step, sample, d_model]`."""
    h = np.asarray(states)
    out = np.eye(len(h))
    for s in range(len(h)):
        for t in range(s):
            out[s, t] = out[t, s] = linear_cka(h[s], h[t], debiased=debiased)
    return out


def cka(source: Model | Trace, x: Batch | None = None, *, n_steps: int | None = None, debiased: bool = False) -> LabelledArray:
    """Linear CKA of the states of every two steps, `[step, other_step]`; the samples are all tokens of the batch.

    `|Y'X|_F^2 / (|X'X|_F |Y'Y|_F)`, columns centred. With fewer tokens than d_model it is close to 1 for any two states:
    take more text, or `debiased=True`.

    Parameters
    ----------
    source, x, n_steps
        As for `loop_drift`, with the same errors.
    debiased
        Use the unbiased HSIC: see `linear_cka`.

    Raises
    ------
    ValueError
        For a single token (four or more are needed when debiased).

    Source
    ------
    Kornblith et al., arXiv 1905.00414; debiased: Nguyen et al., arXiv 2010.15327.

    Examples
    --------
    >>> import ouro
    >>> from ouro.measures import cka
    >>> cka(ouro.load("ouro-tiny"), ["One day Ann took the cup.", "Bob"]).shape
    (4, 4)
    """
    trace = as_trace(source, x, n_steps=n_steps)
    tokens = trace.states[:, real(trace)]
    if tokens.shape[1] < 2:
        raise ValueError("one token has no variance: CKA needs two or more")
    return labelled(cka_matrix(tokens, debiased=debiased), ("step", "other_step"), formula="|Y'X|_F^2 / (|X'X|_F |Y'Y|_F)",
                    plotter="plot_step_matrix", name="cka")  # fmt: skip
