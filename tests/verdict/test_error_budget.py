"""Levels of the study's error budget, against an independent LORD++ and by their sums."""

from __future__ import annotations

import numpy as np
import pytest

from saelab.verdict.error_budget.levels import ErrorBudget, confirming_level, look_share

RULE = ErrorBudget(alpha=0.05, planned=12)


class LordPlusPlus:
    """LORD++ as the package online-fdr (1.0.0) computes it: wealth that is spent and earned, one
    hypothesis after another."""

    def __init__(self, alpha: float, wealth: float, gamma: np.ndarray) -> None:
        self.alpha, self.start, self.wealth, self.gamma = alpha, wealth, wealth, gamma
        self.t, self.rejected = 0, []

    def test_one(self, p: float) -> float:
        self.t += 1
        level = self.start * self.gamma[self.t - 1]
        for k, when in enumerate(self.rejected):
            earned = self.alpha - self.start if k == 0 else self.alpha
            level += earned * self.gamma[self.t - when - 1]
        level = min(level, self.wealth)
        self.wealth -= level
        if p <= level:
            self.wealth += self.alpha
            self.rejected.append(self.t)
        return level


@pytest.mark.parametrize("seed", range(5))
def test_one_by_one_the_levels_are_those_of_lord_plus_plus(seed: int) -> None:
    stream = np.random.default_rng(seed)
    p = np.where(stream.random(60) < 0.3, 1e-9, stream.random(60))
    other = LordPlusPlus(0.05, 0.05, np.asarray(RULE.gamma(np.arange(1, 61))))
    known: list[int] = []
    for t, each in enumerate(p, start=1):
        level = RULE.level(t, known)
        assert level == pytest.approx(other.test_one(each), rel=1e-12)
        if each <= level:
            known.append(t)
    assert len(known) > 5


def test_gamma_falls_and_sums_to_one() -> None:
    gamma = np.asarray(RULE.gamma(np.arange(1, 100_000)))
    assert (np.diff(gamma) <= 1e-15).all() and (gamma > 0).all()
    assert gamma[:12].sum() == pytest.approx(0.8)
    assert 0.99 < gamma.sum() < 1
    assert gamma[11] == pytest.approx(0.8 / 12)


@pytest.mark.parametrize("discoveries", [0, 1, 2, 7])
def test_all_levels_ever_sum_to_alpha_for_each_discovery(discoveries: int) -> None:
    """Which is what bounds the false discovery rate."""
    known = [3 * k for k in range(1, discoveries + 1)]
    spent = sum(RULE.level(t, [k for k in known if k < t]) for t in range(1, 4000))
    assert 0.9 < spent / (0.05 * max(1, discoveries)) < 1


def test_what_is_left_is_what_later_levels_may_spend() -> None:
    known = [4, 9]
    later = sum(RULE.level(t, known) for t in range(16, 4000))
    unspent = RULE.left(15, known) - RULE.left(3999, known)
    assert unspent * 0.05 * 2 == pytest.approx(later)
    assert RULE.left(0, []) == 1


def test_looks_at_a_confirmation_stay_within_alpha() -> None:
    levels = [confirming_level(0.05, look, 4) for look in range(1, 40)]
    assert levels[0] == pytest.approx(0.8 * 0.05 / 4)
    assert sum(levels) * 4 == pytest.approx(0.05)
    assert [look_share(k) for k in (1, 2, 3)] == [1, 0.5, 0.25]
