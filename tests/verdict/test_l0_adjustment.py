"""Values are brought to the declared L0 along the frontier before arms are paired."""

from __future__ import annotations

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
from saelab.verdict.l0_adjustment import move_values, slope, value_moves

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
    assert found.high - found.low == pytest.approx(0, abs=1e-9)  # noise is the pair's
    assert "as measured, brought to L0 32" in found.reason
    plain = -0.01 - 0.07 * sum(
        math.log(a / b) for a, b in zip(BETTER.l0, BASE.l0, strict=True)
    ) / len(BASE.l0)
    assert f"{plain:+.4g} as measured" in found.reason


def test_an_arm_with_levels_has_a_slope_of_its_own() -> None:
    steep = Made(0.17, -0.2, BETTER.l0)
    arms = {"baseline": BASE.arm("baseline"), "arm": steep.arm("arm")}
    assert slope(arms["arm"], "fvu", 32) == pytest.approx(-0.2)
    assert value_moves(arms, PLAN)["arm"][0] == pytest.approx(-0.2 * math.log(32 / 31))
    assert judged(arms["baseline"], arms["arm"]).mean_diff == pytest.approx(-0.01, abs=1e-9)


@given(st.sampled_from([(), (16.0,), (64.0,), (64.0, 128.0), (4.0, 16.0)]))
def test_nothing_is_extrapolated(levels: tuple[float, ...]) -> None:
    base = Made(0.18, -0.07, BASE.l0, levels).arm("baseline")
    arms = {"baseline": base, "arm": BETTER.arm("arm")}
    assert slope(base, "fvu", 32) is None and value_moves(arms, PLAN) == {}
    found = judged(base, arms["arm"])
    plain = [arms["arm"].metric("fvu")[s] - base.metric("fvu")[s] for s in range(4)]  # type: ignore[operator]
    assert found.mean_diff == pytest.approx(sum(plain) / 4) and "brought" not in found.reason


def test_the_nearest_levels_count() -> None:
    arm = ArmResult("baseline")
    for level in (8.0, 24.0, 40.0, 100.0):
        curve = Made(0.18, -0.07 if 20 < level < 50 else -0.3, BASE.l0)
        arm.add_level(*curve._cell(0, level, level, {}))
    assert slope(arm, "fvu", 32) == pytest.approx(-0.07)


def test_cells_that_are_far_off_failed_or_dead_stay_as_they_are() -> None:
    far = Made(0.17, -0.07, (36.0, 31.2, 31.1, 31.3), levels=()).arm("arm")
    arms = {"baseline": BASE.arm("baseline"), "arm": far}
    assert set(value_moves(arms, PLAN)["arm"]) == {1, 2, 3}
    assert judged(arms["baseline"], far).word == "refused"
    dead = ArmResult("baseline")
    dead.add_level(*BASE._cell(0, 64.0, 64.0, {"l0": 0.0}))
    assert dead.levels == {}


def test_without_a_target_or_for_l0_itself_nothing_moves() -> None:
    arms = {"baseline": BASE.arm("baseline"), "arm": BETTER.arm("arm")}
    for changes in ({"target_l0": None}, {"primary": "l0"}):
        assert value_moves(arms, PLAN.patched(changes)) == {}


@given(st.dictionaries(st.integers(0, 5), st.none() | st.floats(-1, 1)))
def test_missing_values_stay_missing(values: dict[int, float | None]) -> None:
    found = move_values(values, dict.fromkeys(range(3), 0.5))
    for seed, value in values.items():
        assert found[seed] == (None if value is None else value + 0.5 * (seed < 3))
