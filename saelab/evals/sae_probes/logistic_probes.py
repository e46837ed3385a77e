"""The package's logistic probes, those of many data sets and numbers of columns together.

Rows, folds, values of C and the choice among them are those of `package_probes`. With an L2 penalty
the fits are those of scikit-learn's lbfgs (`lbfgs`), all values of C and folds of a group of data
sets at once, then the fits to all training rows. With an L1 penalty they are the minima that its
saga approaches (`l1_regressions`), one value of C after the other from the smallest.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from saelab.evals.sae_probes.l1_regressions import fit_l1_regressions
from saelab.evals.sae_probes.lbfgs import (
    MEMORY,
    Regressions,
    Solutions,
    fit_regressions,
)
from saelab.evals.sae_probes.package_probes import (
    NO_FOLD,
    NO_VALIDATION,
    ONE_CLASS,
    SEED,
    STRENGTHS,
    Folds,
    Sides,
    folds,
)
from saelab.evals.sae_probes.scores import Array, Scores, area, weighted_f1

#: Probes of at most so many columns are solved in one group, padded with zeros. Our choice: their
#: exponentials take longer than their products.
NARROW = 16
#: Numbers of the solvers of one batch. Our choice: 256 MB in float64.
BATCH_NUMBERS = 2**25


@dataclass(frozen=True, eq=False)
class LogisticProbe:
    """Probes on the first columns of the same rows, one for each of `widths`.

    `absolute` is True for an L1 penalty, False for an L2 penalty.
    """

    sides: Sides
    widths: tuple[int, ...]
    absolute: bool = False


@dataclass(frozen=True, eq=False)
class _Task:
    """One probe: its place in the results, its rows, and how many columns it uses."""

    place: int
    sides: Sides
    width: int
    absolute: bool
    splits: Folds


@dataclass(frozen=True, eq=False)
class _Fit:
    """One regression of a task; `rows` are indices of training rows, None for all of them."""

    task: int
    strength: float
    rows: Array | None


def probe_all(probes: Sequence[LogisticProbe], seed: int = SEED) -> list[dict[int, Scores | str]]:
    """Fits the probes; `seed` is of the folds.

    Returns: for each, width -> numbers, or the reason why scikit-learn would refuse the rows.
    """
    results: list[dict[int, Scores | str]] = [{} for _ in probes]
    splits: list[Folds] = []
    for probe, result in zip(probes, results, strict=True):
        reason = _refusal(probe.sides)
        validated = not reason and len(probe.sides.y) > NO_VALIDATION
        splits.append(folds(probe.sides.y, seed) if validated else [])
        if validated and not splits[-1]:
            reason = NO_FOLD
        if reason:
            result |= dict.fromkeys(probe.widths, reason)
    tasks = [
        _Task(
            place=place,
            sides=probe.sides,
            width=width,
            absolute=probe.absolute,
            splits=splits[place],
        )
        for place, probe in enumerate(probes)
        for width in probe.widths
        if width not in results[place]
    ]
    for batch in _batches(tasks):
        for task, scores in zip(batch, _solve(batch), strict=True):
            results[task.place][task.width] = scores
    return results


def _refusal(sides: Sides) -> str:
    """Returns why no probe can be fitted; '' if one can."""
    if not (np.isfinite(sides.x).all() and np.isfinite(sides.test_x).all()):
        return "the code is not finite"
    return ONE_CLASS if len(np.unique(sides.y)) < 2 else ""


def _batches(tasks: Sequence[_Task]) -> Iterator[list[_Task]]:
    """Splits tasks into batches of like sizes, those of the same rows next to each other."""

    def group(task: _Task) -> tuple[bool, int, int]:
        return task.absolute, max(task.width, NARROW), len(task.sides.y).bit_length()

    batch: list[_Task] = []
    numbers = 0
    for task in sorted(tasks, key=lambda t: (group(t), t.place)):
        fits = 1 + len(STRENGTHS) * len(task.splits)
        size = fits * (2 * (MEMORY + 4) * max(task.width, NARROW) + 6 * len(task.sides.y))
        if batch and (group(batch[0]) != group(task) or numbers + size > BATCH_NUMBERS):
            yield batch
            batch, numbers = [], 0
        batch.append(task)
        numbers += size
    if batch:
        yield batch


def _solve(tasks: Sequence[_Task]) -> list[Scores]:
    rows = _Rows(tasks)
    fits = [
        _Fit(i, float(strength), train)
        for i, task in enumerate(tasks)
        for strength in STRENGTHS
        for train, _ in task.splits
        if len(np.unique(task.sides.y[train])) == 2
    ]
    absolute = tasks[0].absolute
    solved = _fit_path(rows, fits) if absolute else fit_regressions(rows.regressions(fits))
    chosen, validation = _choose(tasks, fits, solved)
    finals = [_Fit(i, strength, None) for i, strength in enumerate(chosen)]
    final = (fit_l1_regressions if absolute else fit_regressions)(rows.regressions(finals))
    counts = np.zeros((2, len(tasks)), dtype=np.int64)
    for group, solutions in ((fits, solved), (finals, final)):
        of = [fit.task for fit in group]
        np.add.at(counts[0], of, 1)
        np.add.at(counts[1], of, solutions.stopped.numpy())
    results = []
    for i, task in enumerate(tasks):
        sides, solution = task.sides, (final.coefficients[i], final.intercepts[i])
        margins = _margins(sides.test_x, solution, task.width)
        of_training = validation[i]
        if of_training is None:
            of_training = area(sides.y, _odds(_margins(sides.x, solution, task.width)))
        results.append(
            Scores(
                accuracy=float(np.mean((margins > 0) == (sides.test_y == 1))),
                f1=weighted_f1(sides.test_y, (margins > 0).astype(np.int64)),
                auc=area(sides.test_y, _odds(margins)),
                validation_auc=of_training,
                fits=int(counts[0, i]),
                stopped=int(counts[1, i]),
            )
        )
    return results


def _fit_path(rows: _Rows, fits: Sequence[_Fit]) -> Solutions:
    """Fits with an L1 penalty, each from the solution at the next smaller C."""
    width, count = rows.columns.shape[1], len(fits)
    w, b = torch.zeros(count, width, dtype=torch.float64), torch.zeros(count, dtype=torch.float64)
    iterations = torch.zeros(count, dtype=torch.int64)
    stopped = torch.zeros(count, dtype=torch.bool)
    last: tuple[Tensor, Tensor] | None = None
    for strength in sorted({fit.strength for fit in fits}):
        index = [i for i, fit in enumerate(fits) if fit.strength == strength]
        solved = fit_l1_regressions(rows.regressions([fits[i] for i in index]), last)
        last = solved.coefficients, solved.intercepts
        w[index], b[index] = last
        iterations[index], stopped[index] = solved.iterations, solved.stopped
    return Solutions(w, b, iterations, stopped)


class _Rows:
    """Training rows of tasks, padded to the longest; tasks of the same rows share them."""

    def __init__(self, tasks: Sequence[_Task]) -> None:
        self.tasks = tasks
        places = list(dict.fromkeys(task.place for task in tasks))
        self.of = [places.index(task.place) for task in tasks]
        longest = max(len(task.sides.y) for task in tasks)
        width = max(task.width for task in tasks)
        self.columns = torch.zeros(len(places), width, longest, dtype=torch.float64)
        self.signs = torch.zeros(len(places), longest, dtype=torch.float64)
        for place, task in zip(self.of, tasks, strict=True):
            n, k = task.sides.x.shape[0], min(width, task.sides.x.shape[1])
            self.columns[place, :k, :n] = torch.from_numpy(task.sides.x[:, :k].T)
            self.signs[place, :n] = torch.from_numpy(2.0 * task.sides.y - 1)

    def regressions(self, fits: Sequence[_Fit]) -> Regressions:
        weights = torch.zeros(len(fits), self.signs.shape[1], dtype=torch.float64)
        penalties = torch.zeros(len(fits), dtype=torch.float64)
        for i, fit in enumerate(fits):
            n = len(self.tasks[fit.task].sides.y) if fit.rows is None else len(fit.rows)
            rows = slice(n) if fit.rows is None else torch.from_numpy(fit.rows)
            weights[i, rows] = 1 / n
            penalties[i] = 1 / (fit.strength * n)
        return Regressions(
            columns=self.columns,
            signs=self.signs,
            of=torch.tensor([self.of[fit.task] for fit in fits], dtype=torch.int64),
            weights=weights,
            widths=torch.tensor([self.tasks[fit.task].width for fit in fits], dtype=torch.int64),
            penalties=penalties,
        )


def _choose(
    tasks: Sequence[_Task], fits: Sequence[_Fit], solved: Solutions
) -> tuple[list[float], list[float | None]]:
    """Returns C and the validation area of each task; C is 1 and the area None without folds."""
    solutions = iter(zip(fits, solved.coefficients, solved.intercepts, strict=True))
    chosen: list[float] = []
    validation: list[float | None] = []
    for task in tasks:
        means = []
        for _ in STRENGTHS if task.splits else ():
            areas = []
            for train, held in task.splits:
                if len(np.unique(task.sides.y[train])) < 2:
                    areas.append(0.5)
                    continue
                _, *solution = next(solutions)
                margins = _margins(task.sides.x[held], solution, task.width)
                areas.append(area(task.sides.y[held], _odds(margins)))
            means.append(float(np.mean(areas)))
        best = int(np.argmax(means)) if means else -1
        chosen.append(float(STRENGTHS[best]) if means else 1.0)
        validation.append(means[best] if means else None)
    return chosen, validation


def _margins(x: Array, solution: Sequence[Tensor], width: int) -> Array:
    """Returns the margins by scikit-learn's product: equal rows must tie as they do there."""
    coefficients, intercept = solution
    columns = np.ascontiguousarray(x[:, :width])
    return (columns @ coefficients[None, :width].numpy().T)[:, 0] + float(intercept)


def _odds(margins: Array) -> Array:
    """Returns probabilities by scikit-learn's function.

    Equal margins have equal ones, which torch's sigmoid does not promise: it computes the last rows
    of an array in another way than the others.
    """
    return importlib.import_module("scipy.special").expit(margins)
