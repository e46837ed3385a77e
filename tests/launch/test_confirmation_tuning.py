"""Equal tuning: a learning rate that misses the plan's L0 can't win."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from saelab.errors import SettingError
from saelab.launch import confirmation
from saelab.launch.confirmation import FACTORS, _tuned, keep_best, trial
from saelab.storage.atomic import read_json
from saelab.study.plan import Arm, BaseConfig, Confirmation, PlanConfig, Run, cells

RUN, BASE = Run("Rates", [Arm("baseline")]), BaseConfig.model_validate({"train": {"lr": 4e-3}})
PLAN = PlanConfig(study="s", target_l0=16, tolerance=0.05)
FVU = (0.2, 0.3, 0.1)


def info(l0: list[list[float | None]], fvu: tuple[float | None, ...] = FVU) -> dict[str, Any]:
    """final_info.json of three trials, the L0 of two seeds each."""
    return {
        trial("baseline", factor): {"means": {"fvu": f}, "final_info_dict": {"l0": seeds}}
        for factor, seeds, f in zip(FACTORS, l0, fvu, strict=True)
    }


def best(root: Path, plan: PlanConfig, l0: list[list[float | None]]) -> dict[str, Any]:
    found = keep_best(root, "run_10", RUN, BASE, plan, info(l0), ["baseline"])
    assert _tuned(root) == read_json(root / "tuned.json") == {"run_10": found}
    return found["baseline"]


def test_the_best_number_wins_where_every_trial_keeps_l0(tmp_path: Path) -> None:
    found = best(tmp_path, PLAN, [[16.0, 16.8], [16.0, 15.2], [16.5, 15.5]])
    assert found["train.lr"] == 8e-3 and found["left_out"] == {}


@pytest.mark.parametrize("missed", [[16.1, 17.0], [15.0, 16.0], [None, None]])
def test_a_trial_off_the_target_is_left_out_and_says_so(
    tmp_path: Path, missed: list[float | None]
) -> None:
    found = best(tmp_path, PLAN, [[16.0, 16.0], [16.0, 16.0], missed])
    assert found["train.lr"] == 2e-3  # the best number, 0.1, is of 8e-3
    assert found["trials"] == {"0.002": 0.2, "0.004": 0.3, "0.008": 0.1}
    (rate,), (why,) = found["left_out"], found["left_out"].values()
    assert rate == "0.008" and ("not measured" in why or "6.2% from the target 16" in why)


def test_without_a_target_every_trial_may_win(tmp_path: Path) -> None:
    plan = PLAN.patched({"target_l0": None, "levels": ()})
    assert best(tmp_path, plan, [[9.0, 9.0], [16.0, 16.0], [30.0, 30.0]])["train.lr"] == 8e-3


def test_where_all_trials_miss_nothing_is_written(tmp_path: Path) -> None:
    off = info([[20.0, 20.0], [16.0, 18.0], [12.0, 12.0]])
    with pytest.raises(SettingError, match="no learning rate keeps the plan's L0") as caught:
        keep_best(tmp_path, "run_10", RUN, BASE, PLAN, off, ["baseline"])
    assert "0.004: L0 18, 12.5%" in str(caught.value) and not (tmp_path / "tuned.json").exists()
    none = info([[16.0], [16.0], [16.0]], (None, None, None))
    with pytest.raises(SettingError, match="no learning rate gives a valid cell"):
        keep_best(tmp_path, "run_10", RUN, BASE, PLAN, none, ["baseline"])


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
