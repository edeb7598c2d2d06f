"""One place of the grid: an estimator fitted and scored by cross-validation, with its regularisation path and control task."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from sklearn.base import clone
from sklearn.metrics import check_scoring


class Fold(NamedTuple):
    """Samples of one split; `inner` are splits of `train`, by which a setting of the path is chosen."""

    train: NDArray[np.intp]
    test: NDArray[np.intp]
    inner: list[tuple[NDArray[np.intp], NDArray[np.intp]]]


class Cell(NamedTuple):
    """One place of the grid."""

    fitted: Any
    """On all samples."""
    scores: NDArray[np.float64]
    controls: NDArray[np.float64]
    path_scores: NDArray[np.float64]
    """[fold, setting], from the inner splits."""
    chosen: NDArray[np.int64]
    """Setting by fold."""


def scored(estimator: Any, x: NDArray[Any], y: NDArray[Any], train: NDArray[Any], test: NDArray[Any], scoring: Any) -> float:
    """Score on `test` of a clone fitted on `train`."""
    fitted = clone(estimator).fit(x[train], y[train])
    return float(check_scoring(fitted, scoring)(fitted, x[test], y[test]))


def best_setting(path_scores: NDArray[np.float64]) -> int:
    """The setting with the largest mean score; one without a score is never preferred."""
    return int(np.nan_to_num(path_scores, nan=-np.inf).argmax())


def score_place(
    estimator: Any, x: NDArray[Any], y: NDArray[Any], folds: Sequence[Fold], settings: Sequence[Mapping[str, Any]], scoring: Any,
    control: NDArray[Any] | None,
) -> Cell:  # fmt: skip
    """Score one place `x [sample, feature]` on all folds, then fit it on all samples with the setting that the path prefers.

    `control` are the labels of the control task, scored on the same folds with the setting chosen for the real ones.
    """
    n = max(len(folds), 1)
    each = [clone(estimator).set_params(**setting) for setting in settings]
    scores, controls, path_scores, chosen = np.full(n, np.nan), np.full(n, np.nan), np.full((n, len(each)), np.nan), np.zeros(n, np.int64)
    for j, (train, test, inner) in enumerate(folds):
        if inner:
            path_scores[j] = [np.mean([scored(e, x, y, *split, scoring) for split in inner]) for e in each]
            chosen[j] = best_setting(path_scores[j])
        scores[j] = scored(each[chosen[j]], x, y, train, test, scoring)
        if control is not None and len(np.unique(control[train])) > 1:
            controls[j] = scored(each[chosen[j]], x, control, train, test, scoring)
    return Cell(clone(each[best_setting(path_scores.mean(0))]).fit(x, y), scores, controls, path_scores, chosen)


def score_row(patience: int | None, cells: Sequence[Any], *arguments: Any) -> list[Any]:
    """The layers of one step in order; with patience, ends when that many in a row have not beaten the best."""
    out: list[Any] = []
    best, since = -np.inf, 0
    for x in cells:
        if patience is not None and since >= patience:
            out.append(None)
            continue
        found = score_place(arguments[0], x, *arguments[1:])
        out.append(found)
        score = float(found.scores.mean())
        best, since = (score, 0) if score > best else (best, since + 1)
    return out
