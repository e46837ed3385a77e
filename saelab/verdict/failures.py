"""Failures on both sides: are k of n cells of an arm fewer than k of n of the baseline?

Boschloo's exact test: it is valid for every share of failures and more powerful than Fisher's. With
a positive correlation between cells of one seed it is conservative.

Source: Boschloo 1970; computed by scipy.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Failures:
    """Cells that failed, of those that were trained without a fault of the software."""

    arm: int
    of_arm: int
    baseline: int
    of_baseline: int

    @property
    def any(self) -> bool:
        return self.arm + self.baseline > 0

    @property
    def balance(self) -> int:
        """1 where a larger share of the arm's cells failed, -1 where a smaller one did, else 0."""
        more = self.arm * self.of_baseline - self.baseline * self.of_arm
        return (more > 0) - (more < 0)

    @property
    def p(self) -> float:
        """Two-sided p of equal shares; 1 where a side has no cells."""
        if not (self.any and self.of_arm and self.of_baseline):
            return 1.0
        return _boschloo_p(self.arm, self.of_arm, self.baseline, self.of_baseline)

    def __str__(self) -> str:
        return (
            f"{self.arm} of {self.of_arm} cells of the arm failed and {self.baseline} of "
            f"{self.of_baseline} of the baseline"
        )


@functools.cache
def _boschloo_p(k: int, n: int, other: int, of: int) -> float:
    from scipy.stats import boschloo_exact

    return min(1.0, float(boschloo_exact([[k, other], [n - k, of - other]], n=32).pvalue))
