"""Logistic regression: both forms find the one minimum, and scikit-learn agrees."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from torch import Tensor

from saelab.evals.probing import logistic
from saelab.evals.probing.logistic import logistic_regression, logistic_regressions
from saelab.seeding import numpy_stream


def examples(n: int, k: int, scale: float, seed: int) -> tuple[Tensor, Tensor]:
    """Sparse non-negative columns of very different sizes, and labels that a few of them shift."""
    rng = numpy_stream(seed, "test", n, k)
    size = (n, max(k, 3))
    z = rng.exponential(size=size) * (rng.random(size) < 0.3) * rng.lognormal(size=size[1]) * scale
    eta = z[:, :3] @ np.array([1.0, -1.0, 0.5]) / scale + rng.normal(size=n)
    return torch.from_numpy(z[:, :k]), torch.from_numpy(eta > np.median(eta))


def loss(z: Tensor, positive: Tensor, w: Tensor, b: Tensor | float) -> float:
    eta = z @ w + b
    signed = torch.where(positive, eta, -eta)
    return float(w @ w / 2 + torch.nn.functional.softplus(-signed).sum())


def one(z: Tensor, positive: Tensor) -> tuple[Tensor, Tensor]:
    """One problem by the form for many."""
    w, b = logistic_regressions(z.T[None].contiguous(), positive[None])
    return w[0], b[0]


def single(z: Tensor, positive: Tensor) -> tuple[Tensor, Tensor]:
    w, b = logistic_regression(z.float(), positive)
    assert w.dtype == b.dtype == torch.float32
    return w.double(), b.double()


@pytest.mark.parametrize("solve", [one, logistic_regression, single])
def test_two_texts_by_hand(solve: Any) -> None:
    # z = +-1: d/dw of w^2 / 2 + 2 log(1 + exp(-w)) is w - 2 / (1 + exp(w))
    w, b = solve(torch.tensor([[1.0], [-1.0]]).double(), torch.tensor([True, False]))
    assert float(w) * (1 + math.exp(float(w))) == pytest.approx(2, abs=1e-3)
    assert float(b) == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize(
    ("solve", "n", "k"),
    [
        *((one, 400, k) for k in (1, 5, 50)),
        (logistic_regression, 400, 50),
        (logistic_regression, 200, 600),
        (single, 400, 50),
        (single, 200, 600),
    ],
)
@pytest.mark.parametrize("scale", [0.05, 1.0, 300.0])
def test_agrees_with_scikit_learn(
    solve: Any, n: int, k: int, scale: float, global_random_seed: int
) -> None:
    z, positive = examples(n + 2000, k, scale, global_random_seed)
    w, b = solve(z[:n], positive[:n])
    # its default solver stops short of the minimum, which Newton's method reaches
    solver: Any = "newton-cholesky" if k <= n else "lbfgs"
    reference = LogisticRegression(C=1.0, solver=solver, max_iter=5000, tol=1e-9)
    reference.fit(z[:n].numpy(), positive[:n].numpy())
    w_ref, b_ref = torch.from_numpy(reference.coef_[0]), float(np.ravel(reference.intercept_)[0])
    assert loss(z[:n], positive[:n], w, b) <= loss(z[:n], positive[:n], w_ref, b_ref) * 1.0001
    if scale <= 1:  # beyond, lbfgs doesn't arrive
        torch.testing.assert_close(w, w_ref, atol=2e-3, rtol=2e-3)
        right = (z[n:] @ w + b > 0) == positive[n:]
        theirs = reference.score(z[n:].numpy(), positive[n:].numpy())
        assert abs(float(right.double().mean()) - theirs) <= 0.002


def test_problems_solved_together_are_those_solved_alone(global_random_seed: int) -> None:
    z, positive = examples(300, 12, 1.0, global_random_seed)
    sizes, scales = (300, 180, 240), (1.0, 30.0, 0.01)  # of which some need more steps than others
    together = torch.stack([scale * z.T for scale in scales])
    labels = positive.expand(3, -1).clone()
    counted = torch.stack([torch.arange(300) < size for size in sizes])
    w, b = logistic_regressions(together, labels, counted)
    for i, (size, scale) in enumerate(zip(sizes, scales, strict=True)):
        w_one, b_one = one(scale * z[:size], positive[:size])
        torch.testing.assert_close(w[i], w_one, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(b[i], b_one, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(("n", "k"), [(150, 100), (100, 150)])
@pytest.mark.parametrize("scale", [0.1, 1.0, 100.0])
def test_conjugate_gradients_and_the_direct_form_agree(
    n: int, k: int, scale: float, global_random_seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    z, positive = examples(n, k, scale, global_random_seed)
    direct = logistic._solve_directly(z, positive)
    least = loss(z, positive, *direct)
    for found in (logistic_regression(z, positive), single(z, positive)):
        assert loss(z, positive, *found) <= least * (1 + logistic.SMALL_GRADIENT) + 1e-9
    monkeypatch.setattr(logistic, "MAX_PASSES", 3)  # too few: the direct form takes over
    torch.testing.assert_close(logistic_regression(z, positive), direct, rtol=0, atol=0)


def test_columns_of_very_different_sizes_need_no_direct_form(global_random_seed: int) -> None:
    z, positive = examples(300, 400, 1.0, global_random_seed)
    z = (z - z.mean(0)) * torch.logspace(-3, 1.5, 400).flip(0)
    found = logistic._solve_by_gradients(z.float(), positive)
    assert found is not None
    least = loss(z, positive, *logistic._solve_directly(z, positive))
    assert loss(z, positive, found[0].double(), found[1].double()) <= least * (1 + 1e-6) + 1e-9


def test_columns_of_zeros_change_nothing(global_random_seed: int) -> None:
    z, positive = examples(150, 100, 1.0, global_random_seed)
    wide = torch.cat([z, torch.zeros(150, 100).double()], dim=1)
    w, b = logistic_regression(z, positive)
    w_wide, b_wide = logistic_regression(wide, positive)
    torch.testing.assert_close(w_wide[:100], w, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(b_wide, b, rtol=1e-3, atol=1e-3)
    assert not w_wide[100:].any()


@pytest.mark.parametrize("solve", [one, logistic_regression, single])
@pytest.mark.parametrize("k", [2, 300])
def test_the_gradient_is_zero_at_the_solution_of_separable_texts(solve: Any, k: int) -> None:
    z, _ = examples(100, k, 1.0, 0)
    positive = z[:, 0] > z[:, 0].median()
    z[:, 0] += 50 * positive
    w, b = solve(z, positive)
    residual = positive.double() - torch.sigmoid(z @ w + b)
    assert float((w - z.T @ residual).abs().max()) < 0.02
    assert abs(float(residual.sum())) < 1e-3


@pytest.mark.parametrize("k", [1, 40])
def test_texts_without_any_code_are_undecided(k: int) -> None:
    w, b = logistic_regression(torch.zeros(20, k), torch.arange(20) < 10)
    assert not w.any() and float(b) == 0
