"""Solvers of sae_probes/1, against scikit-learn's and SciPy's."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from scipy.optimize._dcsrch import DCSRCH
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import accuracy_score, f1_score, roc_auc_score
from torch import Tensor

from saelab.evals.sae_probes.l1_regressions import fit_l1_regressions
from saelab.evals.sae_probes.lbfgs import Regressions, Solutions, fit_regressions
from saelab.evals.sae_probes.line_search import LineSearch
from saelab.evals.sae_probes.logistic_probes import LogisticProbe, probe_all
from saelab.evals.sae_probes.package_probes import STRENGTHS, Sides, probe_logistic
from saelab.evals.sae_probes.scores import area, weighted_f1
from saelab.seeding import numpy_stream, torch_stream


def rows(n: int, k: int, seed: int) -> tuple[Tensor, Tensor]:
    """Columns of unlike sizes, half of their entries 0, and labels that two of them decide."""
    draw = torch_stream(seed, "test", "rows")
    x = torch.randn(n, k, generator=draw, dtype=torch.float64)
    x = x * (torch.rand(n, k, generator=draw) < 0.5) * torch.logspace(-1, 1, k)
    noise = torch.randn(n, generator=draw, dtype=torch.float64)
    return x, x[:, 0] * 10 + x[:, -1] / 10 + noise > 0


def regressions(
    sets: Sequence[tuple[Tensor, Tensor]], strengths: Sequence[float], widths: Sequence[int]
) -> tuple[Regressions, list[tuple[int, float, int]]]:
    """Returns one problem for each set, width and C, and what each is."""
    longest, k = max(len(x) for x, _ in sets), sets[0][0].shape[1]
    columns, signs = torch.zeros(len(sets), k, longest).double(), torch.zeros(len(sets), longest)
    named = [(i, c, w) for i in range(len(sets)) for w in widths for c in strengths]
    weights = torch.zeros(len(named), longest, dtype=torch.float64)
    for i, (x, y) in enumerate(sets):
        columns[i, :, : len(x)], signs[i, : len(x)] = x.T, y * 2.0 - 1
    for place, (i, _, _) in enumerate(named):
        weights[place, : len(sets[i][0])] = 1 / len(sets[i][0])
    problems = Regressions(
        columns,
        signs.double(),
        torch.tensor([i for i, _, _ in named]),
        weights,
        torch.tensor([w for _, _, w in named]),
        torch.tensor([1 / (c * len(sets[i][0])) for i, c, _ in named], dtype=torch.float64),
    )
    return problems, named


def of_sklearn(x: Tensor, y: Tensor, c: float, **options: object) -> LogisticRegression:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return LogisticRegression(C=c, **{"max_iter": 1000, **options}).fit(x.numpy(), y.numpy())


def test_fits_take_the_steps_of_scikit_learn() -> None:
    sets = [rows(300, 12, 1), rows(150, 12, 2), rows(40, 12, 3)]
    problems, named = regressions(sets, STRENGTHS.tolist(), (1, 5, 12))
    solved = fit_regressions(problems)
    iterations: list[int] = []
    for place, (i, c, width) in enumerate(named):
        x, y = sets[i]
        theirs = of_sklearn(x[:, :width], y, c)
        steps = int(theirs.n_iter_[0])
        iterations.append(steps)
        own = solved.coefficients[place, :width].numpy()
        size = np.abs(theirs.coef_[0]).max()
        if steps < 40:  # rounding grows along the path
            assert solved.iterations[place] == steps, (i, c, width)
            assert own == pytest.approx(theirs.coef_[0], abs=1e-6 * size)
            assert float(solved.intercepts[place]) == pytest.approx(theirs.intercept_[0], abs=1e-6)
        ours, best = (
            l2_objective(x[:, :width], y, w, float(b), c)
            for w, b in ((own, solved.intercepts[place]), (theirs.coef_[0], theirs.intercept_[0]))
        )
        assert ours == pytest.approx(best, abs=1e-4)
        assert not solved.coefficients[place, width:].any()
    assert len(set(iterations)) > 10  # problems ended at different times
    assert sum(steps < 40 for steps in iterations) > 0.6 * len(iterations)


def test_a_fit_ends_at_the_limit_of_iterations() -> None:
    x, y = rows(400, 30, 5)
    x = x * torch.logspace(0, 4, 30)
    problems, _ = regressions([(x, y)], [1e5], (30,))
    solved = fit_regressions(problems)
    theirs = of_sklearn(x, y, 1e5)
    assert theirs.n_iter_[0] == solved.iterations[0] == 1000
    assert solved.stopped.all()


def l2_objective(x: Tensor, y: Tensor, w: np.ndarray, b: float, c: float) -> float:
    margins = (2.0 * y.numpy() - 1) * (x.numpy() @ w + b)
    return float(np.logaddexp(0, -margins).mean() + (w @ w) / (2 * c * len(x)))


def objective(x: Tensor, y: Tensor, w: np.ndarray, b: float, c: float) -> float:
    margins = (2.0 * y.numpy() - 1) * (x.numpy() @ w + b)
    return float(np.logaddexp(0, -margins).mean() + np.abs(w).sum() / (c * len(x)))


def test_l1_fits_are_minima() -> None:
    twin = rows(200, 12, 4)[0].clone()
    twin[:, 3] = twin[:, 2]  # a singular Hessian
    sets = [rows(300, 12, 1), rows(150, 12, 2), (twin, rows(200, 12, 4)[1])]
    problems, named = regressions(sets, [1e3, 10.0, 1.0, 0.1, 0.01, 1e-4], (1, 5, 12))
    solved = fit_l1_regressions(problems)
    assert_minima(sets, named, solved)
    some = solved.coefficients[[w == 12 and c == 0.1 for _, c, w in named]]
    assert 0 < (some == 0).sum() < some.numel()
    again = fit_l1_regressions(problems, (solved.coefficients, solved.intercepts))
    assert again.iterations.max() <= 2


def assert_minima(
    sets: Sequence[tuple[Tensor, Tensor]],
    named: Sequence[tuple[int, float, int]],
    solved: Solutions,
) -> None:
    for place, (i, c, width) in enumerate(named):
        x, y = sets[i]
        x, w = x[:, :width], solved.coefficients[place, :width]
        b = solved.intercepts[place]
        saga = of_sklearn(x, y, c, solver="saga", tol=1e-9, max_iter=5000, **absolute())
        ours = objective(x, y, w.numpy(), float(b), c)
        theirs = objective(x, y, saga.coef_[0], float(saga.intercept_[0]), c)
        assert ours <= theirs + 1e-9, (i, c, width)
        rest = (torch.sigmoid(x @ w + b) - y.double()) / len(x)
        slope, most = x.T @ rest, 1 / (c * len(x))
        assert abs(float(rest.sum())) < 1e-5
        assert (slope.abs() <= most + 1e-5).all()
        assert (slope + most * w.sign())[w != 0].abs().max() < 1e-5 if (w != 0).any() else True


def absolute() -> dict[str, object]:
    return {"l1_ratio": 1.0} if LogisticRegression().penalty != "l2" else {"penalty": "l1"}


def sides_of(n: int, seed: int, *, even: bool = False) -> Sides:
    """Returns n rows to train on and 200 to test on; `even` columns have the same size."""
    x, y = rows(n + 200, 9, seed)
    y[0], y[1] = True, False
    numbers, labels = x.numpy(), y.long().numpy()
    numbers = numbers / np.abs(numbers).max(0) if even else numbers
    return Sides(numbers[:n], labels[:n], numbers[n:], labels[n:])


@pytest.mark.parametrize(("n", "count"), [(2, 2), (3, 2), (9, 1), (60, 2), (300, 3)])
def test_l2_probes_are_those_of_scikit_learn(n: int, count: int) -> None:
    sides = [sides_of(n, 10 + seed) for seed in range(count)]
    results = probe_all([LogisticProbe(each, (1, 9)) for each in sides])
    for each, result in zip(sides, results, strict=True):
        for width, ours in result.items():
            assert ours == probe_logistic(each.first_columns(width)), width


def test_l1_probes_are_those_of_scikit_learn_where_it_converges() -> None:
    sides = [sides_of(300, 10 + seed, even=True) for seed in range(3)]
    results = probe_all([LogisticProbe(each, (1, 4, 9), absolute=True) for each in sides])
    for each, result in zip(sides, results, strict=True):
        for width, ours in result.items():
            theirs = probe_logistic(each.first_columns(width), kind="l1")
            assert not isinstance(ours, str)
            assert (ours.fits, ours.stopped, theirs.stopped) == (theirs.fits, 0, 0)
            assert ours.auc == pytest.approx(theirs.auc, abs=2e-3)
            assert ours.accuracy == pytest.approx(theirs.accuracy, abs=5.1e-3)  # one row


@pytest.mark.parametrize("absolute", [False, True])
def test_rows_that_are_equal_tie(absolute: bool) -> None:
    """A latent that is 0 on most rows, and says nothing on the others."""
    draw = numpy_stream(0, "test", "rare")
    for _ in range(5):
        x = (draw.random((723, 9)) < 0.1) * draw.integers(1, 9, (723, 9)).astype(float)
        y = draw.integers(0, 2, 723)
        sides = Sides(x[:523], y[:523], x[523:], y[523:])
        results = probe_all([LogisticProbe(sides, (1, 2, 9), absolute)])
        for width, ours in results[0].items():
            kind = "l1" if absolute else "l2"
            theirs = probe_logistic(sides.first_columns(width), kind=kind)
            assert not isinstance(ours, str)
            assert ours.auc == pytest.approx(theirs.auc, abs=1e-12)
            assert ours.validation_auc == pytest.approx(theirs.validation_auc, abs=1e-12)


def test_rows_that_cannot_be_probed_have_reasons() -> None:
    x, y = rows(60, 4, 1)
    one = Sides(x.numpy(), np.ones(60, dtype=np.int64), x.numpy(), y.long().numpy())
    wrong = Sides(x.numpy() * np.nan, y.long().numpy(), x.numpy(), y.long().numpy())
    results = probe_all([LogisticProbe(one, (1, 4)), LogisticProbe(wrong, (2,))])
    assert all("one class" in str(reason) for reason in results[0].values())
    assert "finite" in str(results[1][2])


def test_areas_tie_where_those_of_scikit_learn_tie() -> None:
    draw = numpy_stream(0, "test", "area")
    for n in (2, 3, 10, 100, 1000):
        for levels in (2, 7, 10**6):
            y = draw.permutation(np.arange(n) % 2)
            scores = draw.integers(0, levels, n) / levels
            assert area(y, scores) == roc_auc_score(y, scores)
            predicted = (scores > 0.5).astype(np.int64)
            expected = f1_score(y, predicted, average="weighted")
            assert weighted_f1(y, predicted) == pytest.approx(expected, abs=1e-12)
            assert float(np.mean(predicted == y)) == accuracy_score(y, predicted)
    assert math.isnan(area(np.ones(3, dtype=np.int64), np.arange(3.0)))


def test_line_searches_try_the_steps_of_scipy() -> None:
    draw, lengths = numpy_stream(0, "test", "lines"), []
    for _ in range(300):
        a, b, c, d = draw.normal(size=4) * [1, 2, 3, 1]
        w, first = draw.uniform(0.1, 5), 10 ** draw.uniform(-3, 2)

        def f(s: float, a=a, b=b, c=c, d=d, w=w) -> tuple[float, float]:
            value = np.cos(a * s * w) + b * np.sin(s) + 0.05 * (s - 4 * c) ** 2 + d * s
            slope = -a * w * np.sin(a * s * w) + b * np.cos(s) + 0.1 * (s - 4 * c) + d
            return float(value), float(slope)

        side = -np.sign(f(0.0)[1])
        value, slope = f(0.0)[0], float(side * f(0.0)[1])
        ours, theirs = LineSearch(value, slope, first), DCSRCH(None, None, 1e-3, 0.9, 0.1, 0, 1e10)
        step, _, _, task = theirs._iterate(first, value, slope, b"START")
        for trial in range(1, 50):
            assert ours.step == pytest.approx(step, rel=1e-9)
            value, slope = f(side * step)[0], float(side * f(side * step)[1])
            ended = ours.advance(value, slope)
            step, _, _, task = theirs._iterate(step, value, slope, task)
            assert ended == (task[:2] != b"FG")
            if ended:
                lengths.append(trial)
                break
    assert max(lengths) > 5
