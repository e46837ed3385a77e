"""Simulated comparisons of arms that lie on frontiers and end at an L0 other than the target's.

Many studies are moved to the target at once, by the rules of `l0_adjustment`, and judged by the
functions that judge a real one; a test holds the words against `judge_run`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from saelab.runs.schema import CellId
from saelab.runtime.counting import count
from saelab.seeding import numpy_stream
from saelab.stats import Array
from saelab.study.plan import PlanConfig
from saelab.verdict.arms import CellGate
from saelab.verdict.effect import estimate
from saelab.verdict.judge import choose_words
from saelab.verdict.l0_adjustment import SLOPE_SPREAD, UNKNOWN_SLOPE
from saelab.verdict.simulation.cells import (
    CORRELATIONS,
    FVU,
    SD,
    SLOPE,
    TARGET,
    Kind,
    draw_two,
)
from saelab.verdict.simulation.comparisons import has_direction
from saelab.verdict.simulation.rows import Row, share_row

#: With next to no smallest effect of interest, every interval that excludes 0 is a word.
PLAN = PlanConfig(study="simulated", target_l0=TARGET, seeds=8, sesoi=1e-9)
#: Further levels and the L0 of their cells, and number of seeds that have them.
LEVELS, WITH_LEVELS = {level: 1.01 * level for level in (TARGET / 2, TARGET * 2)}, 2
LOW, HIGH = LEVELS.values()


@dataclass(frozen=True)
class Frontier:
    """An arm on a frontier.

    Args:
        off: distance of its L0 from the target, as a share.
        slope: of FVU with log L0.
        levels: whether two of its seeds have cells at `LEVELS`.
        effect: on FVU at the target.
        spread: standard deviation of log L0 over its cells.
        sd: standard deviation of a cell.
    """

    off: float
    slope: float = SLOPE
    levels: bool = False
    effect: float = 0.0
    spread: float = 0.003
    sd: float = SD

    def at(self, l0: float) -> float:
        return float(self.at_many(np.array(l0)))

    def at_many(self, l0: Array) -> Array:
        """FVU of cells without noise, of the shape of their L0."""
        return FVU + self.effect + self.slope * np.log(l0 / TARGET)

    def cell(
        self, seed: int, level: float, l0: float, noise: float
    ) -> tuple[CellGate, list[dict[str, object]]]:
        """Builds one cell.

        Args:
            level: that it was trained for.
            l0: where it ended.
            noise: of its FVU, in standard deviations of a cell.
        """
        values = {"fvu": self.at(l0) + self.sd * noise, "l0": l0}
        rows: list[dict[str, object]] = [
            {"metric": metric, "value": value, "slice": "", "definition": "core/1"}
            for metric, value in values.items()
        ]
        id = CellId("simulated", seed, level)
        return CellGate(id=id, expected=(), facts={"l0": l0, "target_l0": level}), rows


@dataclass(frozen=True, eq=False, kw_only=True)
class Measured:
    """Cells of one side of many studies: FVU and L0 [studies, n], and FVU of the cells at `LEVELS`
    [studies, WITH_LEVELS, 2], None without them."""

    fvu: Array
    l0: Array
    at_levels: Array | None

    @property
    def slopes(self) -> Array | None:
        """Slopes of the seeds that have further levels, [studies, WITH_LEVELS]."""
        if self.at_levels is None:
            return None
        return (self.at_levels[..., 1] - self.at_levels[..., 0]) / math.log(HIGH / LOW)


def draw_measured(
    arm: Frontier, base: Frontier, n: int, cells: tuple[Kind, float], studies: int, seed: int
) -> tuple[Measured, Measured]:
    """Draws the cells of arm and baseline at n seeds.

    Args:
        cells: kind of the noise of FVU, and its correlation between cells of one seed and level.
    """
    kind, r = cells
    stream = numpy_stream(seed, "simulation", f"{kind} {r:g} {n} {base} {arm}")
    noise = draw_two(n, kind, r, studies, stream)
    further = draw_two(2 * WITH_LEVELS, kind, r, studies, stream)
    one, other = (
        _measure(side, stream.normal(size=(studies, n)), own, at_levels)
        for side, own, at_levels in zip((arm, base), noise, further, strict=True)
    )
    return one, other


def _measure(side: Frontier, off: Array, noise: Array, at_levels: Array) -> Measured:
    l0 = TARGET * (1 + side.off) * np.exp(side.spread * off)
    fvu = side.at_many(l0) + side.sd * noise
    if not side.levels:
        return Measured(fvu=fvu, l0=l0, at_levels=None)
    further = side.sd * at_levels.reshape(-1, WITH_LEVELS, 2)
    return Measured(fvu=fvu, l0=l0, at_levels=side.at_many(np.array([LOW, HIGH])) + further)


@dataclass(frozen=True, eq=False, kw_only=True)
class _Moved:
    """One side at the target: values [studies, n]; distance, variance of the slope and whether the
    comparison is refused [studies]; whether nothing at all is measured of the slope."""

    values: Array
    distance: Array
    variance: Array
    refused: NDArray[np.bool_]
    unknown: bool


def _move(side: Measured, common: Array | None) -> _Moved:
    """Moves one side.

    Args:
        common: slopes of the baseline, as `Measured.slopes`.
    """
    x = np.log(TARGET / side.l0)
    inside = np.abs(side.l0 / TARGET - 1) <= PLAN.tolerance + 1e-9
    slope = np.zeros(len(x))
    own = side.slopes
    if own is not None:
        inside |= (side.l0 >= LOW) & (side.l0 <= HIGH)
        slope, variance = own.mean(axis=-1), own.var(axis=-1, ddof=1) / own.shape[-1]
    elif common is not None:
        slope = common.mean(axis=-1)
        variance = (SLOPE_SPREAD * slope) ** 2
    else:
        variance = (UNKNOWN_SLOPE * side.fvu.mean(axis=-1)) ** 2
    return _Moved(
        values=side.fvu + slope[:, None] * x,
        distance=x.mean(axis=-1),
        variance=variance,
        refused=np.asarray(~inside.all(axis=-1)),
        unknown=own is None and common is None,
    )


def judge_measured(arm: Measured, base: Measured) -> np.ndarray:
    """Words [studies] by the rules of `PLAN`, as `judge_run` gives them."""
    common = base.slopes
    one, other = _move(arm, common), _move(base, common)
    if one.unknown and other.unknown:
        apart = (one.distance - other.distance) ** 2
        extra = one.variance * (apart + (SLOPE_SPREAD * one.distance) ** 2)
    else:
        extra = one.variance * one.distance**2 + other.variance * other.distance**2
    effect = estimate(one.values, other.values, one.values.shape[-1], extra)
    low, high = effect.interval(PLAN.alpha)
    words = choose_words(-effect.mean, -high, -low, PLAN.sesoi)
    return np.where(one.refused | other.refused, "refused", words)


def l0_cases() -> list[tuple[int, Frontier, Frontier, str]]:
    """Numbers of seeds, baseline, arm without an effect at the target, and what is special."""
    one = Frontier(0.0, levels=True)
    no_levels = [(Frontier(0.016), Frontier(0.0)), (Frontier(0.0), Frontier(0.03))]
    cases = [(n, base, arm, "no levels") for n in (3, 8) for base, arm in no_levels]
    cases += [
        (n, one, Frontier(0.031, SLOPE * share), f"slope {share:g} of the baseline's")
        for n in (3, 8)
        for share in (0.7, 0.86, 1.3)
    ]
    return [*cases, (8, one, Frontier(0.03, SLOPE * 0.7, levels=True), "own levels")]


#: An arm whose cells miss the tolerance in part, and whose levels lie on both sides.
WIDE = Frontier(0.04, levels=True, effect=0.015, spread=0.015)


def l0_rows(studies: int, seed: int, kind: Kind) -> Iterator[Row]:
    """An L0 that is not the target's gives no word; levels on both sides give the right one."""
    for r in CORRELATIONS:
        for n, base, arm, how in l0_cases():
            sides = draw_measured(arm, base, n, (kind, r), studies, seed)
            off = f"L0 off by {base.off:.1%} and {arm.off:.1%}"
            yield share_row(
                "no effect at the target, L0 off: helps or hurts",
                f"{kind}, {n} and {count(n, 'cell')}, {off}, {how}, r = {r:g}",
                has_direction(judge_measured(*sides)),
                (0.0, 0.05),
            )
        for n in (3, 8):
            base = Frontier(0.0, levels=True)
            sides = draw_measured(WIDE, base, n, (kind, r), studies, seed)
            yield share_row(
                "cells off the tolerance, levels: refused",
                f"{kind}, {n} and {count(n, 'cell')}, L0 off by 4.0%, spread 1.5%, r = {r:g}",
                judge_measured(*sides) == "refused",
                (0.0, 0.02),
            )
