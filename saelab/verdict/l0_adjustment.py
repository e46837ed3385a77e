"""Values of a metric at exactly the declared L0, before arms are compared.

Cells are calibrated to the target L0 and end near it. The remaining distance changes the metric as
much as small effects do, so each value is moved along a frontier:

    m_s(T) = m_s + b x_s,   x_s = log T - log L0_s
    b = mean over seeds of (m_hi - m_lo) / (log L0_hi - log L0_lo)

T: the target; lo, hi: the seed's cells of further levels that are nearest to T on either side, so
that nothing is extrapolated. What is not known of b is a variance E of the comparison (`effect`):

    own levels        b of the arm; its error is the spread over the seeds that have levels
    none of its own   b of the baseline; the arm's own may differ from it, with a relative standard
                      deviation of SLOPE_SPREAD or, if larger, of the slopes of this run's arms
    none in the run   b = 0; the metric may change by UNKNOWN_SLOPE of its value when L0 changes by
                      a factor of e

A cell whose L0 is off the target by more than the plan's tolerance is moved where its arm's own
levels lie on both sides of it; otherwise the comparison is refused.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np

from saelab.study.checks import off_target
from saelab.study.plan import PlanConfig

if TYPE_CHECKING:
    from saelab.verdict.arms import ArmResult

#: Relative standard deviation of the slopes of arms about the baseline's. Our choice: those of the
#: shipped study lie between 0.7 and 1.3 of the baseline's.
SLOPE_SPREAD = 0.3
#: Standard deviation of an unknown slope, as a share of the metric's value. Our choice: FVU of the
#: shipped study changes by 0.39 of its value per unit of log L0.
UNKNOWN_SLOPE = 0.5

#: Where an arm's slope is from.
Origin = Literal["not needed", "own", "baseline", "unknown"]


@dataclass(frozen=True, kw_only=True)
class Matched:
    """A metric of the cells of one arm at the declared L0.

    Args:
        values: seed -> value; None where it is missing.
        distance: mean of log target - log L0 over the cells that count.
        slope: change of the metric with log L0.
        slope_variance: of the slope, about the arm's own.
        origin: where the slope is from.
        refusal: why the cells can't be compared at the declared L0; '' where they can.
    """

    values: Mapping[int, float | None]
    distance: float = 0.0
    slope: float = 0.0
    slope_variance: float = 0.0
    origin: Origin = "not needed"
    refusal: str = ""


def match(
    arms: Mapping[str, ArmResult], baseline: str, metric: str, plan: PlanConfig
) -> dict[str, Matched]:
    """Moves a metric of every arm to the declared L0.

    Args:
        baseline: the arm whose slope arms without levels take.
    """
    target = plan.target_l0
    if target is None or metric == "l0":
        return {name: Matched(values=arm.replicates(metric)) for name, arm in arms.items()}
    slopes = {name: _slopes(arm, metric, target) for name, arm in arms.items()}
    means = [float(np.mean(b)) for b in slopes.values() if b]
    spread = SLOPE_SPREAD
    if len(means) > 1 and np.mean(means):
        spread = max(spread, float(np.std(means, ddof=1) / abs(np.mean(means))))
    return {
        name: _matched(arm, metric, plan, slopes[name], slopes[baseline], spread)
        for name, arm in arms.items()
    }


def _matched(
    arm: ArmResult,
    metric: str,
    plan: PlanConfig,
    own: list[float],
    common: list[float],
    spread: float,
) -> Matched:
    values, l0 = arm.replicates(metric), arm.metric("l0")
    target = plan.target_l0
    assert target is not None
    counted = [s for s, v in values.items() if v is not None and s not in arm.failed]
    bounds = _bounds(arm) if own else None
    for seed in counted:
        if text := _complaint(arm.name, seed, l0.get(seed), plan, bounds):
            return Matched(values=values, refusal=text)
    x = {s: math.log(target / l0[s]) for s in counted if l0[s]}  # type: ignore[operator]
    distance = float(np.mean(list(x.values()))) if x else 0.0
    slope = variance = 0.0
    origin: Origin = "unknown"
    if own:
        numbers = [v for s in counted if (v := values[s]) is not None]
        slope, variance, origin = float(np.mean(own)), _error(own, numbers, bounds), "own"
    elif common:
        slope, origin = float(np.mean(common)), "baseline"
        variance = (spread * slope) ** 2
    else:
        numbers = [v for s in counted if (v := values[s]) is not None]
        variance = (UNKNOWN_SLOPE * float(np.mean(numbers))) ** 2 if numbers else 0.0
    moved = {s: v if v is None else v + slope * x.get(s, 0.0) for s, v in values.items()}
    return Matched(
        values=moved,
        distance=distance,
        slope=slope,
        slope_variance=variance,
        origin=origin,
    )


def slope_variance(arm: Matched, baseline: Matched) -> float:
    """Variance of arm - baseline that comes from what is not known of their slopes; 0 for the same
    cells under two names.

    Where both have no slope of their own, they share the part of it that is unknown, so that only
    the difference of their distances counts, and the spread of arms about it.
    """
    if arm.values == baseline.values and arm.distance == baseline.distance:
        return 0.0  # the same cells, which have one frontier
    if arm.origin == baseline.origin == "unknown":
        apart = (arm.distance - baseline.distance) ** 2
        return arm.slope_variance * (apart + (SLOPE_SPREAD * arm.distance) ** 2)
    return arm.slope_variance * arm.distance**2 + baseline.slope_variance * baseline.distance**2


def slope(arm: ArmResult, metric: str, target: float) -> float | None:
    """Change of the metric with log L0 around the target; None without cells on both sides."""
    slopes = _slopes(arm, metric, target)
    return float(np.mean(slopes)) if slopes else None


def _complaint(
    arm: str, seed: int, l0: float | None, plan: PlanConfig, bounds: tuple[float, float] | None
) -> str:
    """Says why a cell can't be moved to the declared L0; '' where it can."""
    assert plan.target_l0 is not None
    if not l0:
        return f"the L0 of {arm!r} at seed {seed} is missing: measure it"
    if bounds and bounds[0] <= l0 <= bounds[1]:
        return ""
    off = off_target(l0, plan.target_l0, plan.tolerance)
    if not off:
        return ""
    remedy = "calibrate it, or give the arm levels on both sides to interpolate between"
    return f"the L0 of {arm!r} at seed {seed} is {off}: {remedy}"


def _bounds(arm: ArmResult) -> tuple[float, float]:
    """Lowest and highest L0 at which the arm's further levels were measured."""
    levels = [
        cell["l0"] for cells in arm.levels.values() for cell in cells.values() if cell.get("l0")
    ]
    return min(levels), max(levels)


def _error(slopes: list[float], values: list[float], bounds: tuple[float, float] | None) -> float:
    """Variance of the mean of an arm's slopes; of a single one, from the spread of cells."""
    if len(slopes) > 1:
        return float(np.var(slopes, ddof=1)) / len(slopes)
    if len(values) < 2 or bounds is None:
        return (SLOPE_SPREAD * slopes[0]) ** 2
    return 2 * float(np.var(values, ddof=1)) / math.log(bounds[1] / bounds[0]) ** 2


def _slopes(arm: ArmResult, metric: str, target: float) -> list[float]:
    """Slopes of the seeds that have cells on both sides of the target."""
    by_seed = (_slope_of_seed(cells.values(), metric, target) for cells in arm.levels.values())
    return [b for b in by_seed if b is not None]


def _slope_of_seed(
    cells: Iterable[Mapping[str, float]], metric: str, target: float
) -> float | None:
    points = sorted((c["l0"], c[metric]) for c in cells if c.get("l0", 0.0) > 0 and metric in c)
    below = [point for point in points if point[0] < target]
    above = [point for point in points if point[0] > target]
    if not (below and above):
        return None
    (low, at_low), (high, at_high) = below[-1], above[0]
    return (at_high - at_low) / math.log(high / low)
