"""Probes as sae-probes fits them: definition 1, with scikit-learn's own solvers.

    logistic   1/(2 C) |w|^2 (or 1/C |w|_1) + log-loss; C from 10^5 ... 10^-5, 10 values, by the AUC
               on validation rows (the first of the best); then fitted to all training rows,
               permuted by RandomState(seed); at most 1,000 iterations; columns as they are
    pca        the same at C = 1 on the first c principal components of standardised columns, c from
               10 values up to 100 by the AUC on validation rows
    knn        k nearest neighbours of standardised columns, k from 10 values up to 100 likewise
    mlp        one network whose width, depth, rate and weight decay RandomState(seed) draws

    validation rows   n > 127: the last min(int(0.2 n), 100); fewer: 6 stratified folds; at most 12:
                      every pair of rows of both classes; at most 3: none, C = 1

The numbers depend on where the solvers stop, so that they are scikit-learn's in float64, to which
it converts the tensors that the package gives it (float32 arrays change accuracies by up to 0.05);
the share of fits that stop at the limit of iterations is reported (the package hides it).
Randomised principal components use `seed`, where the package draws from the global random state.
XGBoost, the package's fifth baseline, is not a dependency of saelab and is left out.

Source: sae-probes 0.4.2.
"""

from __future__ import annotations

import importlib
import random
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from saelab.evals.sae_probes.scores import Array, Scores, area, weighted_f1

#: The package's seed: of rows, folds and solvers.
SEED = 42
#: Values of C, and the limit of iterations.
STRENGTHS, MOST_ITERATIONS = np.logspace(5, -5, 10), 1000
#: Rows up to which no validation, pairs and folds are used; folds; validation rows at most.
NO_VALIDATION, PAIRS, FOLDED, FOLDS, MOST_VALIDATION = 3, 12, 127, 6, 100
#: Why there is no probe.
NO_FOLD = "no fold has both classes among its validation rows"
ONE_CLASS = "the training rows have one class, two are needed"
#: Principal components and neighbours at most, and how many numbers of them are tried.
MOST_TRIED, TRIED = 100, 10
#: Added to the divisors of columns, so that none is 0.
TINY = 1e-6
#: Widths of hidden layers, rates and weight decays of the network.
LAYERS = [(width,) * depth for depth in (1, 2, 3) for width in (16, 32, 64)]
RATES, DECAYS = np.logspace(-4, -2, 5), np.logspace(-5, -2, 5)

Folds = Sequence[tuple[Array, Array]]


@dataclass(frozen=True, eq=False)
class Sides:
    """Columns float64 [rows, k] and labels int64 [rows], 0 or 1, to train and to test on."""

    x: Array
    y: Array
    test_x: Array
    test_y: Array

    def first_columns(self, k: int) -> Sides:
        """Returns the first k columns alone."""
        x, test_x = (np.ascontiguousarray(part[:, :k]) for part in (self.x, self.test_x))
        return Sides(x, self.y, test_x, self.test_y)

    def standardised(self) -> Sides:
        """Returns the columns at mean 0 and standard deviation 1 over the training rows."""
        scaler = sklearn("preprocessing").StandardScaler().fit(self.x)
        return Sides(scaler.transform(self.x), self.y, scaler.transform(self.test_x), self.test_y)


def sklearn(module: str) -> Any:
    """Imports a module of scikit-learn; restores Python's global random state, from which the first
    import draws."""
    state = random.getstate()
    loaded = importlib.import_module(f"sklearn.{module}")
    random.setstate(state)
    return loaded


class Fits:
    """Fits models, and counts those that end at the limit of iterations."""

    def __init__(self) -> None:
        self.fits = self.stopped = 0

    def fit(self, model: Any, x: Array, y: Array) -> Any:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of convergence, which is counted
            model.fit(x, y)
        self.fits += 1
        self.stopped += int(np.max(model.n_iter_) >= MOST_ITERATIONS)
        return model

    def scores(self, model: Any, test_x: Array, test_y: Array, validation_auc: float) -> Scores:
        predicted = model.predict(test_x)
        return Scores(
            accuracy=float(np.mean(predicted == test_y)),
            f1=weighted_f1(test_y, predicted),
            auc=area(test_y, model.predict_proba(test_x)[:, 1]),
            validation_auc=float(validation_auc),
            fits=self.fits,
            stopped=self.stopped,
        )


def order_columns(x: Tensor, y: Array, normalised: bool) -> Tensor:
    """Orders columns by the size of their mean difference between the classes, largest first.

    Args:
        x: float32 [n, F].
        y: int64 [n], 0 or 1.
        normalised: each column is first divided by its mean non-zero size.

    Returns: int64 [F].
    """
    columns, positive = x, torch.from_numpy(y == 1).to(x.device)
    if normalised:
        sizes = columns.abs().sum(0) / ((columns != 0).sum(0) + TINY)
        columns = columns / (sizes + TINY)
    difference = columns[positive].mean(0) - columns[~positive].mean(0)
    return difference.abs().argsort(descending=True)


def folds(y: Array, seed: int) -> Folds:
    """Returns training and validation rows; validation rows of folds have both classes."""
    n, selection = len(y), sklearn("model_selection")
    if n > FOLDED:
        rows, first = np.arange(n), n - min(int(0.2 * n), MOST_VALIDATION)
        return [(rows[:first], rows[first:])]
    if n <= PAIRS:
        splits = selection.LeavePOut(2).split(y)
    else:
        folded = selection.StratifiedKFold(n_splits=FOLDS, shuffle=True, random_state=seed)
        splits = folded.split(y, y)
    return [(train, held) for train, held in splits if len(np.unique(y[held])) == 2]


def _regression(strength: float, kind: str, seed: int) -> Any:
    """Builds scikit-learn's regression; since version 1.8 the kind of penalty is a ratio."""
    model = sklearn("linear_model").LogisticRegression
    by_ratio = model().penalty != "l2"
    absolute = {"l1_ratio": 1.0} if by_ratio else {"penalty": "l1"}
    options: dict[str, dict[str, Any]] = {"l2": {}, "l1": {"solver": "saga", **absolute}}
    fixed = {"C": strength, "random_state": seed, "max_iter": MOST_ITERATIONS}
    return model(**fixed, **options[kind])


def probe_logistic(sides: Sides, seed: int = SEED, kind: str = "l2") -> Scores:
    """Fits the logistic probe; `kind` is 'l2' or 'l1'.

    Raises: ValueError when scikit-learn refuses the rows.
    """
    x, y, fits = sides.x, sides.y, Fits()
    order = np.random.RandomState(seed).permutation(len(y))
    if len(y) <= NO_VALIDATION:
        model = fits.fit(_regression(1.0, kind, seed), x[order], y[order])
        validation = area(y[order], model.predict_proba(x[order])[:, 1])
        return fits.scores(model, sides.test_x, sides.test_y, validation)
    splits, means = folds(y, seed), []
    for strength in STRENGTHS:
        areas = []
        for train, held in splits:
            if len(np.unique(y[train])) < 2:
                areas.append(0.5)
                continue
            model = fits.fit(_regression(strength, kind, seed), x[train], y[train])
            areas.append(area(y[held], model.predict_proba(x[held])[:, 1]))
        means.append(mean_of_areas(areas))
    best = int(np.argmax(means))
    model = fits.fit(_regression(STRENGTHS[best], kind, seed), x[order], y[order])
    return fits.scores(model, sides.test_x, sides.test_y, np.max(means))


def mean_of_areas(areas: Sequence[float]) -> float:
    """Returns the mean.

    Raises: ValueError when there is none.
    """
    if not areas:
        raise ValueError(NO_FOLD)
    return float(np.mean(areas))


def probe_pca(sides: Sides, seed: int = SEED) -> Scores:
    """Fits the logistic probe on principal components.

    Raises: as `probe_logistic`.
    """
    sides, fits = sides.standardised(), Fits()
    y, most = sides.y, min(*sides.x.shape, MOST_TRIED)
    pca = sklearn("decomposition").PCA(n_components=most, random_state=seed)
    x, test_x = pca.fit_transform(sides.x), pca.transform(sides.test_x)
    if len(y) <= NO_VALIDATION:
        model = fits.fit(_regression(1.0, "l2", seed), x, y)
        validation = area(y, model.predict_proba(x)[:, 1])
        return fits.scores(model, test_x, sides.test_y, validation)

    def mean_area(components: int) -> float:
        areas = []
        for train, held in folds(y, seed):
            columns = x[:, :components]
            model = fits.fit(_regression(1.0, "l2", seed), columns[train], y[train])
            areas.append(area(y[held], model.predict_proba(columns[held])[:, 1]))
        return mean_of_areas(areas)

    components, validation = _best(_tried(most), mean_area)
    model = fits.fit(_regression(1.0, "l2", seed), x[:, :components], y)
    return fits.scores(model, test_x[:, :components], sides.test_y, validation)


def probe_knn(sides: Sides, seed: int = SEED) -> Scores:
    """Classifies by nearest neighbours.

    Raises: as `probe_logistic`.
    """
    sides = sides.standardised()
    x, y, fits = sides.x, sides.y, Fits()
    nearest = sklearn("neighbors").KNeighborsClassifier
    if len(y) <= NO_VALIDATION:
        model = nearest(n_neighbors=1).fit(x, y)
        validation = area(y, model.predict_proba(x)[:, 1])
        return fits.scores(model, sides.test_x, sides.test_y, validation)
    splits = folds(y, seed)
    fewest = min((len(train) for train, _ in splits), default=1)

    def mean_area(neighbours: int) -> float:
        areas = []
        for train, held in splits:
            model = nearest(n_neighbors=neighbours).fit(x[train], y[train])
            areas.append(area(y[held], model.predict_proba(x[held])[:, -1]))
        return mean_of_areas(areas)

    neighbours, validation = _best(_tried(min(len(y) - 1, MOST_TRIED, fewest)), mean_area)
    model = nearest(n_neighbors=neighbours).fit(x, y)
    return fits.scores(model, sides.test_x, sides.test_y, validation)


def probe_mlp(sides: Sides, seed: int = SEED) -> Scores:
    """Fits a small network.

    Raises: as `probe_logistic`.
    """
    sides, fits = sides.standardised(), Fits()
    x, y = sides.x, sides.y
    network = sklearn("neural_network").MLPClassifier
    fixed: dict[str, Any] = {"max_iter": MOST_ITERATIONS, "random_state": seed}
    if len(y) <= NO_VALIDATION:
        model = fits.fit(network(hidden_layer_sizes=(32,), **fixed), x, y)
        validation = area(y, model.predict_proba(x)[:, 1])
        return fits.scores(model, sides.test_x, sides.test_y, validation)
    rng = np.random.RandomState(seed)
    fixed["hidden_layer_sizes"] = LAYERS[rng.randint(len(LAYERS))]
    fixed["learning_rate_init"] = RATES[rng.randint(len(RATES))]
    fixed["alpha"] = rng.choice(DECAYS)
    areas = []
    for train, held in folds(y, seed):
        model = fits.fit(network(**fixed), x[train], y[train])
        areas.append(area(y[held], model.predict_proba(x[held])[:, 1]))
    validation = mean_of_areas(areas)
    model = fits.fit(network(**fixed), x, y)
    return fits.scores(model, sides.test_x, sides.test_y, validation)


def _tried(most: int) -> list[int]:
    """Returns up to `TRIED` numbers from 1 to `most`, evenly spaced in their logarithms."""
    return np.unique(np.logspace(0, np.log2(most), num=TRIED, base=2, dtype=int)).tolist()


def _best(tried: Sequence[int], mean_area: Callable[[int], float]) -> tuple[int, float]:
    """Returns the first of the numbers with the largest area, and that area."""
    areas = [mean_area(number) for number in tried]
    best = int(np.argmax(areas))
    return tried[best], areas[best]


#: Baselines of the package by their names in the settings.
BASELINES: dict[str, Callable[[Sides, int], Scores]] = {
    "logistic": probe_logistic,
    "pca": probe_pca,
    "knn": probe_knn,
    "mlp": probe_mlp,
}
