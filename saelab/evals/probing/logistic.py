"""Logistic regression with an L2 penalty and a free intercept, solved to its one minimum.

    L(w, b) = 1/2 |w|^2 + sum_i log(1 + exp(eta_i)) - y_i eta_i     eta_i = w z_i + b, y_i 0 or 1

Newton's method with a line search, in two forms that share nothing but the minimum:

    few columns    many problems at once, each step by a Cholesky factor of its own k x k Hessian
    many columns   one problem, each step by conjugate gradients: one read of z an iteration,
                   no matrix of columns x columns or texts x texts, float32

Where conjugate gradients are slow (columns of very different sizes), they continue with the
Hessian's diagonal as preconditioner, and where that is slow too, the first form takes over; with
more columns than texts it works on n columns with the same inner products.

Both measure their distance from the minimum by the gradient of L with b eliminated: the penalty
makes that function 1-strongly convex, so L - min L <= |gradient|^2 / 2.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import softplus

from saelab.kernels import kernels_for

#: The direct form stops after a step predicted to lower the loss by less than this share of it.
#: Our choice: it converges quadratically there, and accuracies no longer move.
TOLERANCE = 1e-5
#: Conjugate gradients stop where |gradient|^2 is below this share of the loss. Our choice: on codes
#: of a trained SAE all test texts keep the side that the exact minimum gives them.
SMALL_GRADIENT = 1e-6
#: Residual of a step, as a share of the gradient, unless half of SMALL_GRADIENT's gradient is more.
#: Our choice: takes little time in total.
FORCING = 0.2
#: Iterations of conjugate gradients in total, and those at first without a preconditioner. Our
#: choice: a trained SAE's codes take 40, where it would cost more than it gains, and the same codes
#: times 100 take 600; columns whose sizes differ by 1e5 take 3,000 without it and 300 with it.
MAX_PASSES, PLAIN_PASSES = 1000, 100
MAX_STEPS = 100
#: Weights p (1 - p) below this are raised to it: they only shape the step, never the solution.
LEAST_WEIGHT = 1e-8
#: A step is halved until it lowers the loss by this share of what its slope predicts.
DECREASE = 1e-4
LEAST_STEP = 1e-9
#: Added to the inner products of texts, as a share of their trace; no log-odds change by more than
#: it adds, since no text's coefficient exceeds 1.
RIDGE = 1e-13


def logistic_regression(z: Tensor, positive: Tensor) -> tuple[Tensor, Tensor]:
    """Finds the minimum of one problem of any size.

    Args:
        z: float32 or float64 [n, k]; columns near mean zero converge fastest.
        positive: bool [n].

    Returns: coefficients [k] and intercept [] in z's dtype.
    """
    solution = _solve_by_gradients(z, positive)
    if solution is None:
        w, b = _solve_directly(z.double(), positive)
        solution = w.to(z.dtype), b.to(z.dtype)
    return solution


def logistic_regressions(
    z: Tensor,
    positive: Tensor,
    counted: Tensor | None = None,
    start: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """Finds the minima of many problems with few columns together.

    Args:
        z: float64 [problems, k, n], columns first.
        positive: bool [problems, n].
        counted: bool [problems, n], False where a problem has fewer than n texts; None for all.
        start: solution for the first columns alone, to start from.

    Returns: coefficients float64 [problems, k] and intercepts float64 [problems].
    """
    y = positive.to(z.dtype)
    present = torch.ones_like(y) if counted is None else counted.to(z.dtype)
    w, b, eta = z.new_zeros(z.shape[:2]), z.new_zeros(len(z)), torch.zeros_like(y)
    if start is not None:
        w[:, : start[0].shape[1]], b = start
        eta = _products(z, w) + b[:, None]
    current = _losses(w, eta, y, present)
    open_ = torch.ones(len(z), dtype=torch.bool, device=z.device)
    for _ in range(MAX_STEPS):
        dw, db, deta, predicted = _newton_steps(z, w, eta, y, present)
        step = open_.to(z.dtype)
        while True:
            new = _losses(w + step[:, None] * dw, eta + step[:, None] * deta, y, present)
            short = (step > 0) & ~(new <= current - DECREASE * step * predicted)
            if not short.any():
                break
            step = torch.where(short, step / 2, step)
            step = torch.where(step < LEAST_STEP, 0, step)
        w, b, eta = w + step[:, None] * dw, b + step * db, eta + step[:, None] * deta
        current = torch.where(step > 0, new, current)
        open_ = open_ & (step > 0) & ~(predicted < TOLERANCE * current)
        if not open_.any():
            break
    return w, b


def _losses(w: Tensor, eta: Tensor, y: Tensor, present: Tensor) -> Tensor:
    """Loss of each problem, [problems]."""
    return 0.5 * w.square().sum(1) + ((softplus(eta) - y * eta) * present).sum(1)


def _products(z: Tensor, w: Tensor) -> Tensor:
    """Returns w z, [problems, n]."""
    return (w[:, None] @ z)[:, 0]


def _newton_steps(
    z: Tensor, w: Tensor, eta: Tensor, y: Tensor, present: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Steps of w [problems, k], b [problems] and eta [problems, n], and the predicted decrease."""
    p = torch.sigmoid(eta)
    weight = (p * (1 - p)).clamp_min(LEAST_WEIGHT) * present
    total = weight.sum(1)
    rest = (p - y) * present
    surplus = rest.sum(1) / total
    rest = rest - surplus[:, None] * weight
    sums, uphill = (torch.stack([weight, rest], dim=1) @ z.mT).unbind(1)
    centre, slope = sums / total[:, None], w + uphill
    system = torch.baddbmm(sums[:, :, None] * centre[:, None], z * weight[:, None], z.mT, beta=-1)
    system.diagonal(dim1=1, dim2=2).add_(1)
    dw = -torch.cholesky_solve(slope[:, :, None], torch.linalg.cholesky(system))[:, :, 0]
    db = -surplus - (centre * dw).sum(1)
    return dw, db, _products(z, dw) + db[:, None], surplus.square() * total - (slope * dw).sum(1)


def _solve_directly(z: Tensor, positive: Tensor) -> tuple[Tensor, Tensor]:
    """Solves one problem of any size by the direct form, on at most as many columns as texts."""
    n, k = z.shape
    if k <= n:
        w, b = logistic_regressions(z.T[None].contiguous(), positive[None])
        return w[0], b[0]
    gram = z @ z.T
    gram.diagonal().add_(RIDGE * gram.trace() + torch.finfo(z.dtype).tiny)
    root = torch.linalg.cholesky(gram)
    w, b = logistic_regressions(root.T[None].contiguous(), positive[None])
    return torch.linalg.solve_triangular(root.T, w.T, upper=True)[:, 0] @ z, b[0]


# ---------------------------------------------------------------- many columns


def _solve_by_gradients(z: Tensor, positive: Tensor) -> tuple[Tensor, Tensor] | None:
    """Minimises by Newton's method with conjugate gradients; None when it takes too long."""
    y, used = positive.to(z.dtype), 0
    w, b, eta = z.new_zeros(z.shape[1]), z.new_zeros(()), torch.zeros_like(y)
    loss = _loss(w, eta, y)
    squares: Tensor | None = None
    for _ in range(MAX_STEPS):
        p = torch.sigmoid(eta)
        weight = (p * (1 - p)).clamp_min(LEAST_WEIGHT)
        rest, total = p - y, weight.sum()
        surplus = rest.sum() / total
        slope = torch.addmv(w, z.T, rest - surplus * weight)
        off = float(slope @ slope + surplus.square() * total)
        if off <= SMALL_GRADIENT * loss:
            return w, b
        if used >= MAX_PASSES or not off < float("inf"):
            return None
        scale, most = None, PLAIN_PASSES - used
        if most <= 0:
            squares = z.square() if squares is None else squares
            scale, most = 1 / (1 + weight @ squares), MAX_PASSES - used
        enough = max(FORCING**2 * off, SMALL_GRADIENT * loss / 4)
        dw, fit, taken = _conjugate_gradients(z, weight, -slope, scale, enough, most)
        used += taken
        db = -surplus - weight @ fit / total
        deta = fit + db
        predicted = float(surplus.square() * total - slope @ dw)
        step = 1.0
        while not (
            (new := _loss(w + step * dw, eta + step * deta, y))
            <= loss - DECREASE * step * predicted
        ):
            step /= 2
            if step < LEAST_STEP:
                return None
        w, b, eta, loss = w + step * dw, b + step * db, eta + step * deta, new
    return None


def _loss(w: Tensor, eta: Tensor, y: Tensor) -> float:
    eta = eta.double()
    return float((softplus(eta) - y * eta).sum()) + 0.5 * float(w.double().square().sum())


def _conjugate_gradients(
    z: Tensor, weight: Tensor, right: Tensor, scale: Tensor | None, enough: float, most: int
) -> tuple[Tensor, Tensor, int]:
    """Solves (1 + Z^T (D - d d^T / sum d) Z) x = right for x, where D = diag(d).

    Args:
        scale: about the inverse of the matrix's diagonal, [k]; None for ones.
        enough: |residual|^2 at which it stops.
        most: iterations; x is a descent direction after any number of them.

    Returns: x [k], Z x [n] and the number of iterations.
    """
    product = kernels_for(z.device).gram_product
    share, centre = weight / weight.sum(), weight @ z
    x, fit = torch.zeros_like(right), torch.zeros_like(weight)
    residual = right.clone()
    direction = right.clone() if scale is None else scale * right
    power, size, taken = float(residual @ direction), float(residual @ residual), 0
    while size > enough and taken < most:
        along, image = product(z, weight, direction)
        image.add_(direction).sub_((share @ along) * centre)
        length = power / float(direction @ image)
        x.add_(direction, alpha=length)
        fit.add_(along, alpha=length)
        residual.sub_(image, alpha=length)
        scaled = residual if scale is None else scale * residual
        power, before = float(residual @ scaled), power
        size = power if scale is None else float(residual @ residual)
        direction.mul_(power / before).add_(scaled)
        taken += 1
    return x, fit, taken
