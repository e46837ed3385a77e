"""Simulated comparisons in which cells fail.

Studies with equal numbers of healthy cells are judged together, by the functions that judge a real
one (`effect`, `failures`, `judge.words_with_failures`).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.special import ndtri

from saelab.runtime.counting import count
from saelab.seeding import numpy_stream
from saelab.stats import Array
from saelab.verdict.effect import estimate
from saelab.verdict.failures import Failures
from saelab.verdict.judge import words_with_failures
from saelab.verdict.simulation.cells import CORRELATIONS, FVU, SD, Kind, draw_two
from saelab.verdict.simulation.comparisons import has_direction
from saelab.verdict.simulation.rows import Row, share_row

Flags = NDArray[np.bool_]


@dataclass(frozen=True, eq=False, kw_only=True)
class Side:
    """Cells of one side, [studies, n]: values, and whether they failed."""

    values: Array
    failed: Flags

    def healthy_first(self, other: Side) -> Array:
        """The values of each study in another order: healthy cells whose seed is healthy on both
        sides, then other healthy cells, then failed ones."""
        place = np.where(self.failed, 2, np.where(other.failed, 1, 0))
        order = place.argsort(axis=-1, kind="stable")
        return np.take_along_axis(self.values, order, axis=-1)


def judge_together(arm: Side, baseline: Side, sesoi: float, level: float) -> np.ndarray:
    """Words [studies] of many comparisons in which lower is better, as `judge` gives them."""
    healthy = (~arm.failed, ~baseline.failed)
    counts = [side.sum(axis=-1) for side in (*healthy, healthy[0] & healthy[1])]
    groups, group_of = np.unique(np.stack(counts, axis=-1), axis=0, return_inverse=True)
    sides = arm.healthy_first(baseline), baseline.healthy_first(arm)
    cells = arm.values.shape[-1], baseline.values.shape[-1]
    words = np.full(len(arm.values), "cannot tell yet")
    for i, (n_arm, n_base, shared) in enumerate(groups.tolist()):
        studies = group_of.ravel() == i
        failures = Failures(
            arm=cells[0] - n_arm,
            of_arm=cells[0],
            baseline=cells[1] - n_base,
            of_baseline=cells[1],
        )
        one, other = sides[0][studies, :n_arm], sides[1][studies, :n_base]
        words[studies] = _judge_group(one, other, shared, failures, (sesoi, level))
    return words


def _judge_group(
    arm: Array, baseline: Array, shared: int, failures: Failures, rules: tuple[float, float]
) -> np.ndarray:
    """Words of studies with equal numbers of healthy cells.

    Args:
        rules: smallest effect of interest and level.
    """
    sesoi, level = rules
    level = level / 2 if failures.any else level
    if min(arm.shape[-1], baseline.shape[-1]) < 2:
        if failures.p > level:
            return np.full(len(arm), "refused")
        unknown = np.full(len(arm), np.nan)
        return words_with_failures((unknown, unknown, unknown), sesoi, failures, level)
    effect = estimate(arm, baseline, shared)
    low, high = effect.interval(level)
    return words_with_failures((-effect.mean, -high, -low), sesoi, failures, level)


def draw_failing(
    n: int, shares: tuple[float, float], kind: Kind, r: float, studies: int, seed: int
) -> tuple[Side, Side]:
    """Draws arm and baseline without a difference between healthy cells.

    Args:
        shares: of the arm's and of the baseline's cells that fail; failures of one seed are
            correlated as its values are, by normal numbers below a limit.
        r: correlation within a seed.
    """
    stream = numpy_stream(seed, "simulation", f"failures {kind} {n} {shares} {r:g}")
    values = draw_two(n, kind, r, studies, stream)
    causes = draw_two(n, "normal", r, studies, stream)
    arm, base = (
        Side(values=FVU + SD * value, failed=cause < ndtri(share))
        for value, cause, share in zip(values, causes, shares, strict=True)
    )
    return arm, base


def failure_rows(studies: int, seed: int, kind: Kind) -> Iterator[Row]:
    """Cells that fail count on both sides."""
    for r in CORRELATIONS:
        for n in (8, 12):
            for q in (0.05, 0.1, 0.2, 0.3):
                words = judge_together(*draw_failing(n, (q, q), kind, r, studies, seed), 0.0, 0.05)
                cells = f"{kind}, {n} and {count(n, 'cell')}, all fail with probability {q:g}"
                yield from _null_rows(words, f"{cells}, r = {r:g}")
        words = judge_together(*draw_failing(8, (0.0, 0.75), kind, r, studies, seed), 0.0, 0.05)
        yield share_row(
            "the arm never fails: helps",
            f"{kind}, 8 and 8 cells, baseline's fail with probability 0.75, r = {r:g}",
            words == "helps",
            (0.8, 1.0),
        )


def _null_rows(words: np.ndarray, cells: str) -> Iterator[Row]:
    wrong = has_direction(words)
    yield share_row("no effect, cells fail: helps or hurts", cells, wrong, (0.0, 0.05))
    yield Row(
        promise="no effect, cells fail: hurts - helps",
        cells=cells,
        studies=len(words),
        observed=float((words == "hurts").mean() - (words == "helps").mean()),
        low=-0.01,
        high=0.01,
        variance=float(wrong.mean()),  # a study adds 1, -1 or 0
    )
