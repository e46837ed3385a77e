"""Many logistic regressions with an L1 penalty at once, solved to their minimum.

    F(w, b) = mean over the n fitted rows of log(1 + exp(-s_i (w x_i + b)))  +  |w|_1 / (C n)

Newton steps on the columns that are in use or whose gradient exceeds the penalty, in the orthant of
their signs: a column that would change sign is set to 0, and comes back with the other sign in a
later step. A step is halved until F falls; where that does not help, a proximal gradient step is
taken, which always lowers F. Problems start from the solution at a smaller C.

The minimum is the one that scikit-learn's `saga` approaches; it stops where an epoch changes no
coefficient by more than 1e-4 of the largest one, or after 1,000 epochs.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import softplus

from saelab.evals.sae_probes.lbfgs import LINEAR, Regressions, Solutions

#: A problem has ended where Newton's step is predicted to lower F by less than this. Our choice:
#: the mean log-loss then agrees in its first 10 digits.
TOLERANCE = 1e-11
MOST_STEPS = 100
#: A step is halved so often at most, and must lower F by this share of what its slope predicts.
HALVINGS, DECREASE = 12, 1e-4
#: Added to the Hessian's diagonal, as a share of its largest entry: columns may be the same.
RIDGE = 1e-10
#: Weights p (1 - p) below this are raised to it: they only shape the step.
LEAST_WEIGHT = 1e-10


def fit_l1_regressions(
    problems: Regressions, start: tuple[Tensor, Tensor] | None = None
) -> Solutions:
    """Fits all problems.

    Args:
        start: coefficients [P, k] and intercepts [P] to start from; None for zeros.
    """
    count, width = len(problems.of), problems.columns.shape[1]
    device = problems.columns.device
    w = torch.zeros(count, width, dtype=torch.float64, device=device)
    b = torch.zeros(count, dtype=torch.float64, device=device)
    if start is not None:
        w[:, : start[0].shape[1]], b = start
        b = b.clone()
    solver = _Newton(problems)
    iterations = torch.zeros(count, dtype=torch.int64, device=device)
    open_ = torch.arange(count, device=device)
    for _ in range(MOST_STEPS):
        if not len(open_):
            break
        iterations[open_] += 1
        new_w, new_b, ended = solver.step(open_, w[open_], b[open_])
        w[open_], b[open_] = new_w, new_b
        open_ = open_[~ended]
    stopped = torch.zeros(count, dtype=torch.bool, device=device)
    stopped[open_] = True
    return Solutions(w, b, iterations, stopped)


class _Newton:
    """Steps of problems, which are named by their indices."""

    def __init__(self, problems: Regressions) -> None:
        self.problems = problems
        columns = torch.arange(problems.columns.shape[1], device=problems.columns.device)
        self.used = columns < problems.widths[:, None]

    def step(self, index: Tensor, w: Tensor, b: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Returns the next coefficients and intercepts, and which problems have ended."""
        problems = self.problems
        x, signs = problems.columns[problems.of[index]], problems.signs[problems.of[index]]
        weights, penalty = problems.weights[index], problems.penalties[index, None]
        margins = -signs * (_products(x, w) + b[:, None])
        value = _values(margins, weights, w, penalty)
        share = margins.sigmoid()
        rest = -signs * share * weights
        gradient, of_intercept = (x @ rest[:, :, None])[:, :, 0], rest.sum(1)
        curvature = (share * (1 - share)).clamp_min(LEAST_WEIGHT) * weights
        free = ((w != 0) | (gradient.abs() > penalty)) & self.used[index]
        orthant = torch.where(w != 0, w.sign(), -gradient.sign())
        slope = (gradient + penalty * orthant) * free
        dw, db = _newton_step(x, curvature, (slope, of_intercept), free)
        wrong = (w == 0) & (dw * orthant < 0)
        if bool(wrong.any()):
            free &= ~wrong
            slope = slope * free
            dw, db = _newton_step(x, curvature, (slope, of_intercept), free)
            dw = torch.where((w == 0) & (dw * orthant < 0), 0.0, dw)
        predicted = -(slope * dw).sum(1) - of_intercept * db
        ended = predicted <= TOLERANCE

        def moved(length: Tensor) -> tuple[Tensor, Tensor]:
            new = w + length[:, None] * dw
            return torch.where(new * orthant > 0, new, 0.0), b + length * db

        length = torch.ones_like(b)
        good = ended.clone()
        new_w, new_b = w.clone(), b.clone()
        for _ in range(HALVINGS):
            next_w, next_b = moved(length)
            new = _values(
                -signs * (_products(x, next_w) + next_b[:, None]), weights, next_w, penalty
            )
            fall = -(slope * (next_w - w)).sum(1) - of_intercept * (next_b - b)
            take = ~good & (fall > 0) & (new <= value - DECREASE * fall)
            new_w = torch.where(take[:, None], next_w, new_w)
            new_b = torch.where(take, next_b, new_b)
            good |= take
            if bool(good.all()):
                break
            length = length / 2
        if not bool(good.all()):
            near_w, near_b = _proximal(x, weights, (w, b), (gradient, of_intercept), penalty)
            near_w = near_w * self.used[index]
            new_w = torch.where(good[:, None], new_w, near_w)
            new_b = torch.where(good, new_b, near_b)
        return new_w, new_b, ended


def _values(margins: Tensor, weights: Tensor, w: Tensor, penalty: Tensor) -> Tensor:
    """Returns F, [A]."""
    losses = torch.linalg.vecdot(softplus(margins, threshold=LINEAR), weights)
    return losses + penalty[:, 0] * w.abs().sum(1)


def _products(x: Tensor, w: Tensor) -> Tensor:
    """Returns w x, [A, n]."""
    return (w[:, None] @ x)[:, 0]


def _newton_step(
    x: Tensor, curvature: Tensor, slopes: tuple[Tensor, Tensor], free: Tensor
) -> tuple[Tensor, Tensor]:
    """Returns the steps of w, 0 where it is not free, and b.

    Args:
        x: [A, k, n]; curvature: [A, n]; slopes: of w [A, k] and of b [A]; free: bool [A, k].
    """
    slope, of_intercept = slopes
    total = curvature.sum(1)
    sums = (x @ curvature[:, :, None])[:, :, 0]
    centre = sums / total[:, None]
    hessian = torch.baddbmm(
        sums[:, :, None] * centre[:, None], x * curvature[:, None], x.mT, beta=-1
    )
    hessian = hessian * (free[:, :, None] & free[:, None])
    diagonal = hessian.diagonal(dim1=1, dim2=2)
    diagonal.add_(RIDGE * diagonal.amax(1, keepdim=True) + (~free).to(x))
    right = slope - free * centre * of_intercept[:, None]
    factor, failed = torch.linalg.cholesky_ex(hessian)
    dw = -torch.cholesky_solve(right[:, :, None], factor)[:, :, 0]
    dw = torch.where((failed == 0)[:, None], dw, -right / diagonal)
    return dw, -of_intercept / total - (centre * dw).sum(1)


def _proximal(
    x: Tensor,
    weights: Tensor,
    point: tuple[Tensor, Tensor],
    gradient: tuple[Tensor, Tensor],
    penalty: Tensor,
) -> tuple[Tensor, Tensor]:
    """Takes a proximal gradient step, whose length is from a bound of the Hessian."""
    squares = (x.square().sum(1) + 1) * weights
    length = 4 / squares.sum(1)
    w = point[0] - length[:, None] * gradient[0]
    w = w.sign() * (w.abs() - length[:, None] * penalty).clamp_min(0)
    return w, point[1] - length * gradient[1]
