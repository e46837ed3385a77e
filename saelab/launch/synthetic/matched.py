"""Metrics of synthetic cells at the target L0, so that arms can be paired at exactly one L0."""

from __future__ import annotations

import math
from collections.abc import Sequence

from saelab import stats
from saelab.errors import SettingError, nearest
from saelab.evals.base import Row
from saelab.launch.synthetic.training import Outcome
from saelab.runs.schema import CellId


def at_target(
    outcomes: Sequence[Outcome], metric: str, target: float, tolerance: float = 0.0
) -> list[Row]:
    """Brings the metric of each arm and seed to L0 = target: a value, or missing with the reason.

    It is interpolated between the seed's own levels (`stats.at_l0`).

    Args:
        tolerance: relative distance from the target within which the cell next to it stands for
            it, where the seed has no cells on both sides.

    Returns: one row per arm and seed, in the order of the outcomes.
    """
    rows: list[Row] = []
    for arm, seed in dict.fromkeys((outcome.arm, outcome.seed) for outcome in outcomes):
        own = [outcome for outcome in outcomes if (outcome.arm, outcome.seed) == (arm, seed)]
        levels, values = [o.value("l0") for o in own], [o.value(metric) for o in own]
        found = stats.at_l0(levels, values, target)
        if found.value is None:
            found = _nearest(levels, values, target, tolerance) or found
        failed = "; ".join(str(o.failure) for o in own if o.failure) if found.reason else ""
        reason = "; ".join(part for part in (found.reason, failed) if part)
        definition = next((r.definition for o in own for r in o.rows if r.metric == metric), "")
        row = Row(metric, found.value, definition, slice="interpolated in log L0", reason=reason)
        rows.append(row.of_cell(CellId(arm, seed, target)))
    return rows


def _nearest(
    levels: Sequence[float | None], values: Sequence[float | None], target: float, tolerance: float
) -> stats.AtL0 | None:
    """Returns the value of the cell nearest to the target; None beyond the tolerance."""
    pairs = zip(levels, values, strict=True)
    distances = [
        (abs(level / target - 1), value)
        for level, value in pairs
        if level is not None and value is not None
    ]
    distance, value = min(distances, default=(math.inf, 0.0))
    return stats.AtL0(value) if distance <= tolerance else None


def differences(rows: Sequence[Row], arm: str, baseline: str) -> list[float]:
    """Differences for `stats.paired`: arm minus baseline of every seed that has a value of both.

    Args:
        rows: of one metric, as `at_target` gives them.

    Raises: SettingError for an arm that has no row.
    """
    values = {name: by_seed(rows, name) for name in (arm, baseline)}
    ours, theirs = values[arm], values[baseline]
    return [ours[seed] - theirs[seed] for seed in ours if seed in theirs]


def by_seed(rows: Sequence[Row], arm: str) -> dict[int, float]:
    """Returns the value of each seed of an arm that has one.

    Raises: SettingError for an arm that has no row.
    """
    own = [row for row in rows if row.arm == arm]
    if not own:
        names = dict.fromkeys(row.arm for row in rows)
        raise SettingError("arm", arm, f"has no rows{nearest(arm, names)}")
    return {row.seed: row.value for row in own if row.value is not None}
