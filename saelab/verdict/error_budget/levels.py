"""Error budget of a study: the level of each comparison, in the order in which they are made.

LORD++ in its form for tests that run at the same time, which keeps the false discovery rate of all
words of a study at alpha. With gamma_1 >= gamma_2 >= ... of sum 1, the t-th comparison has

    level_t = alpha gamma_t + alpha sum over k >= 2 of gamma_(t - r_k)

where r_k is the number of comparisons whose level was given before the k-th discovery was reported.
All arms of a run get their levels together, so from discoveries of earlier runs alone.

    gamma_j = 0.8 / N                                     j <= N, the planned comparisons
    gamma_j = 0.2 (sqrt(N / (j - 1)) - sqrt(N / j))       j > N, so that a study never runs out

The initial wealth is alpha, the most that LORD++ allows: the first discovery then earns nothing,
and until the second one the levels sum to alpha at most. A study without any effect so has a false
word with probability alpha at most, however its comparisons depend on each other; all of them share
the baseline's cells.

A discovery is a hypothesis that was called "helps" for the first time. "hurts" earns nothing, or
arms that are made to be worse would buy high levels for the others. Since the levels sum to at most
alpha max(1, discoveries), the rate of false words is kept for "helps" alone and for both words.

Further looks at one hypothesis (added or changed seeds) are comparisons of their own, and look k
has the level divided by 2^(k - 1) besides: its cells are those that earlier looks have selected.

The confirming run keeps the family-wise error instead: its first look has 0.8 alpha over the
comparisons of its family, look k > 1 has 0.2 alpha / 2^(k - 1) over them.

Source: Ramdas, Yang, Wainwright and Jordan 2017, "Online control of the false discovery rate with
decaying memory"; Zrnic, Ramdas and Jordan 2021, "Asynchronous online testing of multiple
hypotheses". gamma, the rule for discoveries and for looks are our choices (docs/decisions/0015).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from saelab.stats import Array

#: Share of the budget for the planned comparisons (or the first look); the rest is for all others.
HEAD = 0.8


@dataclass(frozen=True, kw_only=True)
class ErrorBudget:
    """Rule that gives the level of a comparison.

    Args:
        alpha: false discovery rate of the study.
        planned: number of comparisons that share the larger part of the budget.
    """

    alpha: float
    planned: int

    def cumulative(self, j: ArrayLike) -> Array:
        """Sum of gamma_1 to gamma_j; 0 for j <= 0."""
        j = np.asarray(j, dtype=np.float64)
        tail = 1 - (1 - HEAD) * np.sqrt(self.planned / np.maximum(j, self.planned))
        return np.where(j <= self.planned, HEAD * np.maximum(j, 0) / self.planned, tail)

    def gamma(self, j: ArrayLike) -> Array:
        """Share of a pot of wealth that the j-th comparison after it was earned gets."""
        j = np.asarray(j)
        tail = self.cumulative(j) - self.cumulative(j - 1)
        return np.where((j > 0) & (j <= self.planned), HEAD / self.planned, tail)

    def level(self, t: int, known: Sequence[int]) -> float:
        """Level of the t-th comparison, from 1.

        Args:
            known: for each discovery, in order, the number of comparisons whose level was given
                before it was reported.
        """
        starts = np.array([0, *known[1:]], dtype=np.float64)
        return float(self.alpha * self.gamma(t - starts).sum())

    def left(self, t: int, known: Sequence[int]) -> float:
        """Share of all wealth of the study so far that t comparisons have not spent."""
        starts = np.array([0, *known[1:]], dtype=np.float64)
        return float(1 - self.cumulative(t - starts).mean())


def look_share(look: int) -> float:
    """Factor of the level of the k-th look at one hypothesis."""
    return 2.0 ** (1 - look)


def confirming_level(alpha: float, look: int, family: int) -> float:
    """Level of each comparison of a confirming run: the sum over all looks is alpha at most."""
    share = HEAD if look == 1 else (1 - HEAD) * look_share(look)
    return alpha * share / max(1, family)
