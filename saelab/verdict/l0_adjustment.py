"""Adjustment of the primary metric to exactly the declared L0, before arms are paired.

Cells are calibrated to the target L0 and end near it, within the plan's tolerance. The remaining
distance changes the metric as much as small effects do, so each value is moved along a frontier:

    m_s(T) = m_s + b (log T - log L0_s)
    b = mean over seeds of (m_hi - m_lo) / (log L0_hi - log L0_lo)

T: the target; lo, hi: the seed's cells of further levels that are nearest to T on either side, so
that nothing is extrapolated. Few seeds have further levels, hence one b for all seeds: the arm's,
or the baseline's where the arm has none. The error of b is left out, since it is multiplied by the
small distance. Without such cells values stay as they were measured, as do those of cells outside
the tolerance, whose comparison is refused, and of cells that failed.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

from saelab.study.plan import BASELINE, PlanConfig
from saelab.verdict.judge import off_target

if TYPE_CHECKING:
    from saelab.verdict.arms import ArmResult

#: Arm -> seed -> summand that moves the primary metric to the target L0.
Moves = dict[str, dict[int, float]]


def value_moves(arms: Mapping[str, ArmResult], plan: PlanConfig) -> Moves:
    """Computes the summands that move each cell's primary metric to the target L0; {} for none."""
    target = plan.target_l0
    if target is None or plan.primary == "l0":
        return {}
    common = slope(arms[BASELINE], plan.primary, target)
    moves: Moves = {}
    for name, arm in arms.items():
        measured = slope(arm, plan.primary, target)
        b = common if measured is None else measured
        if b is not None:
            moves[name] = _moves_of_arm(arm, b, target, plan.tolerance)
    return moves


def slope(arm: ArmResult, metric: str, target: float) -> float | None:
    """Change of the metric with log L0 around the target; None without cells on both sides."""
    by_seed = [_slope_of_seed(cells.values(), metric, target) for cells in arm.levels.values()]
    slopes = [b for b in by_seed if b is not None]
    return sum(slopes) / len(slopes) if slopes else None


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


def _moves_of_arm(arm: ArmResult, b: float, target: float, tolerance: float) -> dict[int, float]:
    return {
        seed: b * math.log(target / l0)
        for seed, l0 in arm.metric("l0").items()
        if l0 is not None and not off_target(l0, target, tolerance) and seed not in arm.failed
    }


def move_values(
    values: Mapping[int, float | None], by: Mapping[int, float]
) -> dict[int, float | None]:
    """Moves the values of seeds to the target L0; a missing one stays None."""
    return {s: None if v is None else v + by.get(s, 0.0) for s, v in values.items()}
