"""Probes over the (step, layer) grid with any scikit-learn estimator."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sklearn.base import BaseEstimator, MetaEstimatorMixin, clone, is_classifier
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import check_scoring
from sklearn.model_selection import GroupKFold, KFold, StratifiedGroupKFold, StratifiedKFold
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.utils import check_array, check_X_y, get_tags
from sklearn.utils.metaestimators import available_if
from sklearn.utils.multiclass import check_classification_targets
from sklearn.utils.parallel import Parallel, delayed
from sklearn.utils.validation import check_is_fitted, validate_data

from ouro.labelled import LabelledArray
from ouro.probes.place import Fold, score_row
from ouro.probes.samples import control_labels


def _default_estimator() -> Any:
    return make_pipeline(StandardScaler(), LogisticRegression(C=0.1, max_iter=2000))


def _has(method: str) -> Any:
    def check(self: StepLayerProbe) -> bool:
        found = self.estimator if self.estimator is not None else _default_estimator()
        getattr(found, method)  # its AttributeError is the message
        return True

    return available_if(check)


class StepLayerProbe(MetaEstimatorMixin, BaseEstimator):  # type: ignore[misc]
    """One estimator for each (step, layer), scored by cross-validation that keeps prompts together.

    Parameters
    ----------
    estimator
        Any scikit-learn classifier or regressor; a standardised logistic regression (C = 0.1) unless given. It is cloned.
    cv : int
        Folds; fewer where there are fewer groups or members of a class, none below two (scores are NaN then).
    scoring
        As in scikit-learn; the estimator's own `score` unless given.
    path : dict of str to list, optional
        Regularisation path: one parameter and its values, e.g. `{"logisticregression__C": [0.01, 0.1, 1]}`. At each place and fold
        the value is chosen by cross-validation inside the fold's training part (groups kept together there too), so that
        `scores_` are of samples which neither the probe nor the choice has seen. The first value where a training part
        can not be split.
    control : bool
        Also score the control task (Hewitt and Liang), and the selectivity `score - control`.
    patience : int, optional
        Within a step, stop after this many layers in a row without a better score; what follows is NaN.
    n_jobs : int, optional
        Steps (with patience) or places that run at once, by joblib.
    random_state : int, optional
        Of the folds and the control labels.
    verbose : bool
        Show progress.

    Attributes
    ----------
    scores_ : LabelledArray [step, layer, fold]
        `scores_.mean("fold")` is the picture's matrix.
    path_scores_ : LabelledArray [step, layer, setting]
        Mean score by setting of the path, on the inner splits; its best setting is that of `estimators_`. NaN without a path.
    path_choice_ : LabelledArray [step, layer, fold]
        Which setting of the path each fold chose, 0-based.
    control_scores_ : LabelledArray [step, layer, fold]; NaN without control
    selectivity_ : LabelledArray [step, layer]
    estimators_ : list of list
        Fitted on all samples, `[step][layer]`; None where patience ended.
    classes_ : array
        Of a classifier.
    n_features_in_, n_steps_, n_layers_ : int

    Examples
    --------
    >>> import numpy as np
    >>> from ouro.probes import StepLayerProbe
    >>> rng = np.random.default_rng(0)
    >>> y = np.arange(60) % 2
    >>> X = rng.normal(size=(60, 2, 3, 4))            # [sample, step, layer, feature]
    >>> X[:, 1, 2, 0] += 4 * y                        # only there the label can be read
    >>> probe = StepLayerProbe(cv=3).fit(X, y, groups=np.arange(60) // 4)
    >>> mean = probe.scores_.mean("fold")
    >>> np.unravel_index(mean.values.argmax(), mean.shape) == (1, 2)
    True
    """

    def __init__(
        self,
        estimator: Any = None,
        *,
        cv: int = 5,
        scoring: Any = None,
        path: Mapping[str, Sequence[Any]] | None = None,
        control: bool = False,
        patience: int | None = None,
        n_jobs: int | None = None,
        random_state: int | None = 0,
        verbose: bool = False,
    ) -> None:
        self.estimator = estimator
        self.cv = cv
        self.scoring = scoring
        self.path = path
        self.control = control
        self.patience = patience
        self.n_jobs = n_jobs
        self.random_state = random_state
        self.verbose = verbose

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        inner = get_tags(self.estimator if self.estimator is not None else _default_estimator())
        tags.estimator_type, tags.classifier_tags, tags.regressor_tags = inner.estimator_type, inner.classifier_tags, inner.regressor_tags
        tags.target_tags, tags.input_tags.sparse = inner.target_tags, False
        tags.target_tags.multi_output = False
        return tags

    # -- data --------------------------------------------------------------------------------------------------------

    def _grid(self, X: Any, *, reset: bool, y: Any = None) -> tuple[NDArray[Any], Any, bool]:
        """X as [sample, step, layer, feature], y checked, and whether X was a plain matrix (a grid of one place)."""
        shaped = np.asarray(X) if getattr(X, "ndim", 2) == 4 else None
        numeric = y is not None and not is_classifier(self)
        if shaped is not None:
            flat = shaped.reshape(len(shaped), -1)
            flat, y = (check_array(flat), None) if y is None else check_X_y(flat, y, y_numeric=numeric)
        elif y is None:
            flat = validate_data(self, X, reset=reset)
        else:
            flat, y = validate_data(self, X, y, reset=reset, y_numeric=numeric)
        grid = flat[:, None, None, :] if shaped is None else flat.reshape(shaped.shape)
        found = grid.shape[1:]
        if reset:
            self.n_steps_, self.n_layers_, self.n_features_in_ = found
        elif found != (self.n_steps_, self.n_layers_, self.n_features_in_):
            raise ValueError(f"X has (step, layer, feature) = {found}, expected {(self.n_steps_, self.n_layers_, self.n_features_in_)}")
        return grid, y, shaped is None

    def _folds(self, y: NDArray[Any], groups: Any) -> list[Any]:
        if not isinstance(self.cv, (int, np.integer)) or self.cv < 2:
            raise ValueError(f"cv is {self.cv!r}, expected an int of 2 or more")
        classes = is_classifier(self)
        n = min(self.cv, len(y))
        if classes:
            n = min(n, int(np.unique(y, return_counts=True)[1].min()))
        if groups is not None:
            groups = np.asarray(groups)
            if groups.shape != y.shape:
                raise ValueError(f"groups has shape {groups.shape}, expected {y.shape}")
            n = min(n, len(np.unique(groups)))
        if n < 2:
            return []
        if groups is None:
            split = (StratifiedKFold if classes else KFold)(n, shuffle=True, random_state=self.random_state)
            return list(split.split(y, y))
        split = StratifiedGroupKFold(n) if classes else GroupKFold(n)
        folds = [(train, test) for train, test in split.split(y, y, groups) if len(test)]
        return [f for f in folds if not classes or len(np.unique(y[f[0]])) > 1]

    def _nested(self, y: NDArray[Any], groups: Any, train: NDArray[np.intp], test: NDArray[np.intp], *, deep: bool) -> Fold:
        """A split with the splits of its training part, where they are wanted."""
        inner = self._folds(y[train], None if groups is None else np.asarray(groups)[train]) if deep else []
        return Fold(train, test, [(train[a], train[b]) for a, b in inner])

    def _settings(self) -> tuple[str, list[Any]]:
        if self.path is None:
            return "", [None]
        if len(self.path) != 1 or not len(next(iter(self.path.values()))):
            raise ValueError(f"path is {self.path!r}, expected one parameter and its values")
        name, values = next(iter(self.path.items()))
        return name, list(values)

    # -- learning ----------------------------------------------------------------------------------------------------

    def fit(self, X: Any, y: Any, groups: Any = None, types: Any = None) -> StepLayerProbe:
        """Score every place by cross-validation, then fit it on all samples.

        Parameters
        ----------
        X : array [sample, step, layer, feature], or [sample, feature] (a grid of one place)
        y : array [sample]
        groups : array [sample], optional
            Samples of one group (a prompt) never stand on both sides of a split.
        types : array [sample], optional
            For the control task: samples of one type (a token id) share a control label.

        Returns
        -------
        self
        """
        if y is None:
            raise ValueError("StepLayerProbe requires y to be passed, but the target y is None")
        grid, y, _ = self._grid(X, reset=True, y=y)
        if is_classifier(self):
            check_classification_targets(y)
            self.classes_ = np.unique(y)
        estimator = clone(self.estimator) if self.estimator is not None else _default_estimator()
        name, values = self._settings()
        settings = [{name: v} if name else {} for v in values]
        folds = [self._nested(y, groups, *split, deep=len(settings) > 1) for split in self._folds(y, groups)]
        control = control_labels(y, types, seed=self.random_state) if self.control else None
        rest = (y, folds, settings, self.scoring, control)
        every = [[grid[:, t, layer] for layer in range(self.n_layers_)] for t in range(self.n_steps_)]
        jobs = every if self.patience is not None else [[x] for row in every for x in row]
        bar: Any = jobs
        if self.verbose:
            from tqdm.auto import tqdm

            bar = tqdm(jobs, desc="probes", unit="steps" if self.patience is not None else "places")
        done = Parallel(n_jobs=self.n_jobs)(delayed(score_row)(self.patience, cells, estimator, *rest) for cells in bar)
        self._collect([cell for row in done for cell in row], name, values, len(folds))
        return self

    def _collect(self, cells: list[Any], name: str, values: list[Any], n_folds: int) -> None:
        shape = (self.n_steps_, self.n_layers_)
        scores, controls, choice = (np.full((*shape, max(n_folds, 1)), np.nan) for _ in range(3))
        by_setting = np.full((*shape, len(values)), np.nan)
        self.estimators_: list[list[Any]] = [[None] * shape[1] for _ in range(shape[0])]
        for i, cell in enumerate(cells):
            if cell is None:
                continue
            at = divmod(i, shape[1])
            self.estimators_[at[0]][at[1]] = cell.fitted
            scores[at], controls[at], by_setting[at], choice[at] = cell.scores, cell.controls, cell.path_scores.mean(0), cell.chosen
        grid, plotter = ("step", "layer"), "plot_layers_by_step"
        self.scores_ = LabelledArray(scores, (*grid, "fold"), name="score", plotter=plotter)
        self.control_scores_ = LabelledArray(controls, (*grid, "fold"), name="control score", plotter=plotter)
        means = self.scores_.mean("fold").values - self.control_scores_.mean("fold").values
        self.selectivity_ = LabelledArray(means, grid, name="selectivity", attrs={"formula": "score - control score"}, plotter=plotter)
        self.path_choice_ = LabelledArray(choice, (*grid, "fold"), name="setting", attrs={"setting": name})
        coords = {"setting": np.array(values)} if name else {}
        self.path_scores_ = LabelledArray(by_setting, (*grid, "setting"), coords, name="score", attrs={"setting": name})

    # -- using -------------------------------------------------------------------------------------------------------

    def _apply(self, method: str, X: Any, dims: tuple[str, ...] = ("sample",), coords: Mapping[str, Any] | None = None) -> Any:
        check_is_fitted(self, "estimators_")
        grid, _, plain = self._grid(X, reset=False)
        if plain:
            return getattr(self.estimators_[0][0], method)(grid[:, 0, 0])
        out: NDArray[Any] | None = None
        for t in range(self.n_steps_):
            for layer in range(self.n_layers_):
                if self.estimators_[t][layer] is None:
                    continue
                got = np.asarray(getattr(self.estimators_[t][layer], method)(grid[:, t, layer]))
                if out is None:
                    text = got.dtype.kind in "UO"
                    whole = all(e is not None for row in self.estimators_ for e in row)
                    shape = (len(grid), self.n_steps_, self.n_layers_, *got.shape[1:])
                    out = np.full(shape, "", object) if text else np.full(shape, 0 if whole else np.nan, got.dtype if whole else float)
                out[:, t, layer] = got
        assert out is not None  # patience never leaves out the first layer
        return LabelledArray(out, (dims[0], "step", "layer", *dims[1:]), coords, name=method)

    def predict(self, X: Any) -> Any:
        """Prediction of every place: `[sample]` for a matrix, labelled `[sample, step, layer]` for a grid.

        Places that patience left out are NaN (or the empty text)."""
        return self._apply("predict", X)

    @_has("predict_proba")  # type: ignore[untyped-decorator]
    def predict_proba(self, X: Any) -> Any:
        """Class probabilities: `[sample, class]` for a matrix, labelled `[sample, step, layer, class]` for a grid."""
        return self._apply("predict_proba", X, ("sample", "class"), {"class": getattr(self, "classes_", None)})

    @_has("decision_function")  # type: ignore[untyped-decorator]
    def decision_function(self, X: Any) -> Any:
        """The estimators' decision function: as they give it for a matrix, labelled for a grid."""
        check_is_fitted(self, "estimators_")
        binary = len(getattr(self, "classes_", ())) == 2
        return self._apply("decision_function", X, ("sample",) if binary else ("sample", "class"))

    def score(self, X: Any, y: Any) -> Any:
        """Score of the fitted estimators on other samples: a float for a matrix, labelled `[step, layer]` for a grid."""
        check_is_fitted(self, "estimators_")
        grid, _, plain = self._grid(X, reset=False)
        out = np.full((self.n_steps_, self.n_layers_), np.nan)
        for t, row in enumerate(self.estimators_):
            for layer, fitted in enumerate(row):
                if fitted is not None:
                    out[t, layer] = check_scoring(fitted, self.scoring)(fitted, grid[:, t, layer], y)
        return float(out[0, 0]) if plain else LabelledArray(out, ("step", "layer"), name="score", plotter="plot_layers_by_step")
