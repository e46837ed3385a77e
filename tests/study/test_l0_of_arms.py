"""Every cell has the L0 that it is named by, or its arm is refused before it is trained."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal

import pytest

from saelab.errors import SettingError
from saelab.parts import TABLE, register
from saelab.parts.base import Controller, Dims, PartConfig
from saelab.study.plan import Arm, BaseConfig, PlanConfig, Run, cells

PLAN = PlanConfig(study="test", target_l0=32, levels=(16, 64), seeds=2, seeds_levels=1)
TOPK = {"sae.activation": "topk", "sae.losses": ["reconstruction"], "sae.controllers": []}
MOVING = TOPK | {"sae.activation": {"kind": "topk", "k": "k"}}


class HoldConfig(PartConfig):
    """A controller of the user's own, with the settings of `l0_target` and none of its answers."""

    kind: Literal["hold"] = "hold"
    name: str = "sparsity"
    target: float = 32

    def build(self, dims: Dims) -> Hold:
        return Hold(self)


class Hold(Controller):
    def __init__(self, config: HoldConfig) -> None:
        super().__init__()
        self.name = config.name

    def value(self, step: int) -> float:
        return 0.1


class ClaimsConfig(HoldConfig):
    """One that says that it sets the L0, and does not."""

    kind: Literal["claims"] = "claims"  # type: ignore[assignment]

    def l0_rule(self, sae: Any) -> Literal["set"]:
        return "set"


class HoldsConfig(ClaimsConfig):
    """One that does."""

    kind: Literal["holds"] = "holds"  # type: ignore[assignment]

    def at_l0(self, level: float, sae: Any) -> HoldsConfig:
        return self.patched({"target": level})


@pytest.fixture(autouse=True)
def registered() -> Iterator[None]:
    before = dict(TABLE["controller"])
    for config in (HoldConfig, ClaimsConfig, HoldsConfig):
        register("controller", config)
    yield
    TABLE["controller"].clear()
    TABLE["controller"].update(before)


def specs(changes: dict[str, Any], plan: PlanConfig = PLAN, **arm: Any) -> list[Any]:
    """The cells of an arm beside the default baseline."""
    run = Run("title", [Arm("baseline"), Arm("arm", changes, **arm)])
    return [spec for spec in cells(plan, BaseConfig(), run) if spec.id.arm == "arm"]


@pytest.mark.parametrize("kind", ["hold", "claims"])
def test_a_controller_that_no_level_reaches_is_refused(kind: str) -> None:
    """Its cells 'at L0 16' and 'at L0 64' would all be trained alike."""
    with pytest.raises(SettingError) as caught:
        specs({"sae.controllers": [{"kind": kind}]}, primary=True)
    sentence = str(caught.value)
    assert sentence.startswith("arm: target_l0 = 32")
    assert "l0_target" in sentence and "target_l0 = 'none'" in sentence
    assert caught.value.exit_code == 2


def test_a_controller_that_answers_is_trained_at_every_level() -> None:
    found = specs({"sae.controllers": [{"kind": "holds"}]}, primary=True)
    targets = {spec.id.level: spec.sae.controllers[0].model_dump()["target"] for spec in found}
    assert targets == {16: 16, 32: 32, 64: 64}


@pytest.mark.parametrize(
    "changes",
    [
        {"sae.controllers": [{"kind": "ramp"}]},
        {"sae.losses": ["reconstruction", {"kind": "l1", "coefficient": 0.1}]},
        {"sae.losses": ["reconstruction"]},  # nothing has the coefficient of l0_target
        MOVING | {"sae.controllers": [{"kind": "ramp", "name": "k", "value": 20}]},
    ],
)
def test_fixed_penalties_have_no_common_l0(changes: dict[str, Any]) -> None:
    with pytest.raises(SettingError, match=r"^arm: target_l0 = 32.*sets or finds its L0"):
        specs(changes)
    (spec, *_) = specs(changes, PlanConfig.parse({"study": "test", "target_l0": "none"}))
    assert spec.id.level == 0 and spec.sae == BaseConfig().patched(changes).sae


@pytest.mark.parametrize(
    "controller",
    [{"kind": "rounded_k", "over": "rows"}, {"kind": "annealed_k", "end": 20}],
)
def test_an_arm_that_finds_its_l0_is_trained_at_the_target_alone(
    controller: dict[str, Any],
) -> None:
    changes = MOVING | {"sae.controllers": [controller]}
    assert {spec.id.level for spec in specs(changes)} == {32}
    with pytest.raises(SettingError, match=r"arm: levels = 16.*L0 16, 64 .*levels=False"):
        specs(changes, primary=True)
    found = specs(changes, primary=True, levels=False)
    assert [spec.id.level for spec in found] == [32] * PLAN.seeds
    few = PLAN.patched({"seeds_levels": 0})
    assert len(specs(changes, few, primary=True)) == PLAN.seeds


def test_an_annealed_k_ends_at_the_level() -> None:
    changes = MOVING | {"sae.controllers": [{"kind": "annealed_k"}]}
    found = specs(changes, primary=True)
    assert {spec.id.level: spec.sae.controllers[0].model_dump()["end"] for spec in found} == {
        16: 16,
        32: 32,
        64: 64,
    }


def test_a_moving_number_that_the_code_does_not_follow_is_no_l0() -> None:
    """Idea B's k is that of its penalty; the L0 stays with the controller of the coefficient."""
    penalty = {"kind": "similarity", "k": "k"}
    changes = {"sae.losses+": penalty, "sae.controllers+": {"kind": "rounded_k"}}
    assert {spec.id.level for spec in specs(changes, primary=True)} == {16, 32, 64}


def test_a_module_of_the_users_has_no_levels() -> None:
    assert {spec.id.level for spec in specs({"train.lr": 1e-3}, module=object)} == {32}
    with pytest.raises(SettingError, match="levels=False"):
        specs({"train.lr": 1e-3}, module=object, primary=True)


def test_a_plan_without_a_target() -> None:
    plan = PlanConfig.parse({"study": "test", "target_l0": "none"})
    assert plan.target_l0 is None and plan == PlanConfig(study="test", target_l0=None)
    with pytest.raises(SettingError, match="target_l0"):
        PlanConfig.parse({"study": "test", "target_l0": "no"})
