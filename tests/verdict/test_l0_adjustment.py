"""Values are brought to the declared L0 along the frontier before arms are paired."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from saelab.runs.schema import CellId
from saelab.study.plan import PlanConfig
from saelab.verdict.arms import ArmResult, CellGate
from saelab.verdict.final_info import judge_run
from saelab.verdict.l0_adjustment import SLOPE_SPREAD, UNKNOWN_SLOPE, match, slope

PLAN = PlanConfig(study="matching", target_l0=32, seeds=4, family=1)
NOISE = (0.0004, -0.0003, 0.0002, -0.0001)


@dataclass(frozen=True)
class Made:
    """An arm whose FVU falls by `b` per log L0: `at` is its FVU at L0 32."""

    at: float
    b: float
    l0: tuple[float, ...]
    levels: tuple[float, ...] = (16.0, 64.0)

    def arm(self, name: str, **facts: Any) -> ArmResult:
        arm = ArmResult(name)
        for seed, l0 in enumerate(self.l0):
            arm.add(*self._cell(seed, 32.0, l0, facts))
        for level in self.levels:
            arm.add_level(*self._cell(0, level, level * 1.03, {}))
        return arm

    def _cell(
        self, seed: int, level: float, l0: float, facts: dict[str, Any]
    ) -> tuple[CellGate, list[dict[str, Any]]]:
        fvu = self.at + self.b * math.log(l0 / 32) + NOISE[seed]
        rows = [
            {"metric": name, "value": value, "slice": "", "definition": "core/1"}
            for name, value in (("fvu", fvu), ("l0", l0))
        ]
        id = CellId("arm", seed, level)
        return CellGate(id=id, expected=(), facts={"l0": l0, **facts}), rows


BASE = Made(0.18, -0.07, (32.5, 32.6, 32.4, 32.5))
BETTER = Made(0.17, -0.07, (31.0, 31.2, 31.1, 31.3), levels=())


def judged(base: ArmResult, arm: ArmResult, plan: PlanConfig = PLAN) -> Any:
    (found,) = judge_run({"baseline": base, "arm": arm}, plan, True)[0]
    return found


def test_an_effect_is_found_whatever_l0_the_cells_ended_at() -> None:
    found = judged(BASE.arm("baseline"), BETTER.arm("arm"))
    assert found.mean_diff == pytest.approx(-0.01, abs=1e-9)
    # noise is the pair's; what is left is that the arm's slope may differ from the baseline's
    distance = sum(math.log(32 / l0) for l0 in BETTER.l0) / 4
    half = 1.96 * SLOPE_SPREAD * 0.07 * distance
    assert found.high - found.low == pytest.approx(2 * half, rel=0.01)


def test_an_arm_with_levels_has_a_slope_of_its_own() -> None:
    steep = Made(0.17, -0.2, BETTER.l0)
    arms = {"baseline": BASE.arm("baseline"), "arm": steep.arm("arm")}
    assert slope(arms["arm"], "fvu", 32) == pytest.approx(-0.2)
    moved = match(arms, "baseline", "fvu", PLAN)["arm"]
    assert moved.origin == "own" and moved.values[0] == pytest.approx(0.17 + NOISE[0])
    found = judged(arms["baseline"], arms["arm"])
    assert found.mean_diff == pytest.approx(-0.01, abs=1e-9)
    assert found.high - found.low < 2e-4


@given(st.sampled_from([(), (16.0,), (64.0,), (64.0, 128.0), (4.0, 16.0)]))
def test_nothing_is_extrapolated_and_an_unknown_slope_widens_the_interval(
    levels: tuple[float, ...],
) -> None:
    base = Made(0.18, -0.07, BASE.l0, levels).arm("baseline")
    arms = {"baseline": base, "arm": BETTER.arm("arm")}
    matched = match(arms, "baseline", "fvu", PLAN)
    assert slope(base, "fvu", 32) is None
    assert all(m.origin == "unknown" and m.slope == 0 for m in matched.values())
    found = judged(base, arms["arm"])
    plain = [arms["arm"].metric("fvu")[s] - base.metric("fvu")[s] for s in range(4)]  # type: ignore[operator]
    assert found.mean_diff == pytest.approx(sum(plain) / 4) and "no further levels" in found.reason
    apart = abs(matched["arm"].distance - matched["baseline"].distance)
    assert found.high - found.low > 2 * 1.9 * UNKNOWN_SLOPE * 0.17 * apart


def test_cells_at_one_l0_need_no_slope() -> None:
    sides = (("baseline", 0.18), ("arm", 0.17))
    base, arm = (Made(at, -0.07, (32.0,) * 4, levels=()).arm(name) for name, at in sides)
    found = judged(base, arm)
    matched = match({"baseline": BASE.arm("baseline")}, "baseline", "fvu", PLAN)["baseline"]
    assert found.mean_diff == pytest.approx(-0.01) and matched.distance != 0
    assert (found.low, found.high) == pytest.approx((-0.01, 0))  # four equal pairs: p = 1/8
    assert "no further levels" not in found.reason


def test_the_nearest_levels_count() -> None:
    arm = ArmResult("baseline")
    for level in (8.0, 24.0, 40.0, 100.0):
        curve = Made(0.18, -0.07 if 20 < level < 50 else -0.3, BASE.l0)
        arm.add_level(*curve._cell(0, level, level, {}))
    assert slope(arm, "fvu", 32) == pytest.approx(-0.07)


def test_a_cell_off_the_tolerance_is_refused_unless_its_arm_has_levels_around_it() -> None:
    l0 = (36.0, 31.2, 31.1, 31.3)
    base = BASE.arm("baseline")
    without = judged(base, Made(0.17, -0.07, l0, levels=()).arm("arm"))
    assert without.word == "refused" and "36, 12.5% from the target 32" in without.reason
    assert "levels on both sides" in without.reason
    inside = judged(base, Made(0.17, -0.07, l0).arm("arm"))
    assert inside.word == "helps" and inside.mean_diff == pytest.approx(-0.01, abs=1e-9)
    beyond = judged(base, Made(0.17, -0.07, (90.0, *l0[1:])).arm("arm"))
    assert beyond.word == "refused"


def test_cells_that_failed_are_no_reason_to_refuse_and_dead_levels_give_no_slope() -> None:
    arm = Made(0.17, -0.07, (36.0, 31.2, 31.1, 31.3), levels=()).arm("arm")
    gate = arm.gates[0]
    arm.gates[0] = dataclasses.replace(gate, outcome="failed")
    assert match({"arm": arm}, "arm", "fvu", PLAN)["arm"].refusal == ""
    dead = ArmResult("baseline")
    dead.add_level(*BASE._cell(0, 64.0, 64.0, {"l0": 0.0}))
    assert dead.levels == {}


def test_a_missing_l0_is_refused() -> None:
    arm = BETTER.arm("arm")
    del arm.values[1]["l0"]
    assert "missing" in judged(BASE.arm("baseline"), arm).reason


def test_without_a_target_or_for_l0_itself_nothing_moves() -> None:
    arms = {"baseline": BASE.arm("baseline"), "arm": BETTER.arm("arm")}
    for changes, metric in (({"target_l0": None}, "fvu"), ({}, "l0")):
        for name, found in match(arms, "baseline", metric, PLAN.patched(changes)).items():
            assert found.values == arms[name].metric(metric) and found.origin == "not needed"


def test_missing_values_stay_missing() -> None:
    arm = BETTER.arm("arm")
    del arm.values[2]["fvu"]
    arms = {"baseline": BASE.arm("baseline"), "arm": arm}
    assert match(arms, "baseline", "fvu", PLAN)["arm"].values[2] is None


def test_arms_that_differ_more_in_their_slopes_are_trusted_less() -> None:
    alike = {n: Made(0.18, b, BASE.l0).arm(n) for n, b in (("baseline", -0.07), ("a", -0.075))}
    apart = {n: Made(0.18, b, BASE.l0).arm(n) for n, b in (("baseline", -0.07), ("a", -0.2))}
    found = [
        match({**arms, "arm": BETTER.arm("arm")}, "baseline", "fvu", PLAN)["arm"].slope_variance
        for arms in (alike, apart)
    ]
    assert found[0] == pytest.approx((SLOPE_SPREAD * 0.07) ** 2) and found[1] > 2 * found[0]
