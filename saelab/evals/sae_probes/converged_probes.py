"""Probes of definition 2: logistic regressions solved to convergence, many at once, in float64.

    z      columns at mean 0 and standard deviation 1 over the training rows
    order  by |mean z (positives) - mean z (negatives)| on the training rows
    probe  min over w, b of  1/(2 C) |w|^2 + sum_i log(1 + exp(-s_i (w z_i + b))),  s_i = +-1
    C      of 100, 10, 1, 0.1, 0.01, 0.001 the one with the least log-loss on the last fifth of the
           training rows, which are in random order; 1 where there are fewer than 50; then the
           probe is fitted to all training rows
    AUC    share of pairs of a positive and a negative test row in the right order, ties half

The log-loss varies smoothly with C, where the AUC of 100 rows has ties. With v = w / sqrt(C) the
penalty is that of `logistic_regressions`, on columns times sqrt(C).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import softplus

from saelab.evals.probing.logistic import logistic_regressions

STRENGTHS = (100.0, 10.0, 1.0, 0.1, 0.01, 0.001)
#: Training rows from which C is chosen, and the share that is held out for it. Our choice.
LEAST_ROWS, HELD_SHARE = 50, 0.2
#: Numbers of one batch of problems. Our choice: 128 MB in float64.
BATCH_NUMBERS = 2**24


@dataclass(frozen=True, eq=False)
class Problem:
    """One probe's rows, with as many columns as the largest probe uses, best first.

    Args:
        train: standardised, float32 [columns, training rows]; the rows are in random order.
        positive: bool [training rows].
        test: float32 [columns, test rows].
        test_positive: bool [test rows].
    """

    train: Tensor
    positive: Tensor
    test: Tensor
    test_positive: Tensor


@dataclass(frozen=True)
class Result:
    """Numbers of one probe on the test rows; `strength` is the chosen C."""

    accuracy: float
    auc: float
    strength: float


@dataclass(frozen=True, eq=False)
class Rows:
    """Rows of a code, and their labels.

    Args:
        code: float32 [texts, F].
        index: int64 [n], rows of the code.
        positive: bool [n].
    """

    code: Tensor
    index: Tensor
    positive: Tensor

    def standardised(self, columns: Tensor, mean: Tensor, scale: Tensor) -> Tensor:
        """Returns (code - mean) * scale of these columns, float32 [columns, n]."""
        chosen = self.code.index_select(1, columns).index_select(0, self.index)
        return ((chosen - mean[columns]) * scale[columns]).T.contiguous()


def build_problem(train: Rows, test: Rows, columns: int) -> Problem | str:
    """Chooses and standardises the columns of one problem.

    Args:
        train, test: its rows; those to train on are in random order.
        columns: most that a probe uses.

    Returns: the problem, or the reason why there is none.
    """
    x = train.code.index_select(0, train.index)
    deviation, mean = torch.std_mean(x, dim=0, correction=0)
    if not (deviation.isfinite().all() and test.code.sum(1)[test.index].isfinite().all()):
        return "the code is not finite"
    scale = 1 / torch.where(deviation > 0, deviation, 1)
    y = train.positive.to(x)
    weights = y / y.sum() - (1 - y) / (1 - y).sum()
    difference = ((weights @ x) * scale).abs()
    best = difference.argsort(descending=True, stable=True)[:columns]
    return Problem(
        train.standardised(best, mean, scale),
        train.positive,
        test.standardised(best, mean, scale),
        test.positive,
    )


def solve(problems: Sequence[Problem], k: int) -> list[Result]:
    """Fits the probes on the first k columns of each problem, in batches.

    Args:
        problems: each has at least k columns; large ones of the same size are fastest.
    """
    results: list[Result] = []
    for batch in _batches(problems, k):
        results += _solve_batch(batch, k)
    return results


def _batches(problems: Sequence[Problem], k: int) -> Iterable[Sequence[Problem]]:
    longest = max((len(problem.positive) for problem in problems), default=1)
    size = max(1, BATCH_NUMBERS // (k * longest))
    return (problems[start : start + size] for start in range(0, len(problems), size))


def _solve_batch(problems: Sequence[Problem], k: int) -> list[Result]:
    device = problems[0].train.device
    lengths = torch.tensor([len(p.positive) for p in problems], dtype=torch.int64)
    longest = int(lengths.max())
    z = torch.zeros(len(problems), k, longest, dtype=torch.float64, device=device)
    positive = torch.zeros(len(problems), longest, dtype=torch.bool, device=device)
    for i, problem in enumerate(problems):
        z[i, :, : lengths[i]] = problem.train[:k]
        positive[i, : lengths[i]] = problem.positive
    rows = torch.arange(longest)
    held = (lengths * HELD_SHARE).long() * (lengths >= LEAST_ROWS)
    present = (rows < lengths[:, None]).to(device)
    fitted = (rows < (lengths - held)[:, None]).to(device)
    strength, w, b = _choose_strengths(z, positive, (fitted, present & ~fitted))
    root = strength.sqrt()[:, None]
    w, b = logistic_regressions(z * root[:, :, None], positive, present, start=(w / root, b))
    w = w * root
    results = []
    for i, problem in enumerate(problems):
        log_odds = w[i] @ problem.test[:k].double() + b[i]
        accuracy = float(((log_odds > 0) == problem.test_positive).double().mean())
        results.append(Result(accuracy, area(log_odds, problem.test_positive), float(strength[i])))
    return results


def _choose_strengths(
    z: Tensor, positive: Tensor, rows: tuple[Tensor, Tensor]
) -> tuple[Tensor, Tensor, Tensor]:
    """Chooses C of each problem, by the log-loss on its held-out rows.

    Args:
        z: float64 [problems, k, n].
        positive: bool [problems, n].
        rows: the fitted and the held-out ones, bool [problems, n].

    Returns: C float64 [problems], and the solution at it on the fitted rows: coefficients
        [problems, k] and intercepts [problems]. Without held-out rows C is 1.
    """
    fitted, held = rows
    y = positive.to(z.dtype)
    strength = torch.ones(len(z), dtype=z.dtype, device=z.device)
    w, b = torch.zeros_like(z[:, :, 0]), torch.zeros_like(strength)
    if not held.any():
        return strength, w, b
    least = torch.full_like(strength, float("inf"))
    last: tuple[Tensor, Tensor] = (w, b)
    for candidate in sorted(STRENGTHS):
        root = candidate**0.5
        inner, intercept = logistic_regressions(
            z * root, positive, fitted, start=(last[0] / root, last[1])
        )
        last = inner * root, intercept
        eta = (last[0][:, None] @ z)[:, 0] + intercept[:, None]
        loss = ((softplus(eta) - y * eta) * held).sum(1)
        better = (loss < least) & held.any(1)
        least = torch.where(better, loss, least)
        strength = torch.where(better, candidate, strength)
        w = torch.where(better[:, None], last[0], w)
        b = torch.where(better, last[1], b)
    return strength, w, b


def area(scores: Tensor, positive: Tensor) -> float:
    """Returns the area under the ROC curve; NaN where all rows have one class.

    Args:
        scores: [n].
        positive: bool [n].
    """
    n = int(positive.sum())
    pairs = n * (len(scores) - n)
    if pairs == 0:
        return float("nan")
    _, inverse, counts = scores.unique(return_inverse=True, return_counts=True)
    ends = counts.cumsum(0).double()
    ranks = (ends - (counts - 1) / 2)[inverse]  # of ties the mean one
    return float(ranks[positive].sum() - n * (n + 1) / 2) / pairs
