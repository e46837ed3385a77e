"""The confirming run: levels of the arm that it finds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from saelab.launch import confirmation
from saelab.study.plan import Arm, BaseConfig, Confirmation, PlanConfig, Run, cells

BASE = BaseConfig.model_validate({"train": {"lr": 4e-3}})
PLAN = PlanConfig(study="s", target_l0=16, tolerance=0.05)
MOVING = {
    "sae.activation": {"kind": "topk", "k": "k"},
    "sae.losses": ["reconstruction"],
    "sae.controllers": [{"kind": "rounded_k", "over": "rows"}],
}


@pytest.mark.parametrize(("changes", "levels"), [(MOVING, {16}), ({"train.lr": 1e-3}, {8, 16})])
def test_a_confirmed_arm_that_finds_its_l0_has_no_further_levels(
    changes: dict[str, Any], levels: set[float], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    best = confirmation.Candidate("run_1", "best", "helps", 0.1)
    monkeypatch.setattr(confirmation, "best_arm", lambda run, runs, root: best)
    monkeypatch.setattr(confirmation, "_check_unchanged", lambda arm, folder: None)
    runs = {"run_1": Run("earlier", [Arm("baseline"), Arm("best", changes)])}
    wanted = Confirmation("again", [Arm("baseline")])
    run = confirmation.resolve_confirmation(wanted, runs, tmp_path, BASE)
    plan = PLAN.patched({"levels": (8,), "seeds": 2, "seeds_levels": 1})
    found = cells(plan, BASE, run, "confirm")
    assert {spec.id.level for spec in found if spec.id.arm == "best (run_1)"} == levels
    assert {spec.id.level for spec in found if spec.id.arm == "baseline"} == {8, 16}
