"""Equal tuning: which rate wins, and runs whose arms have their own best rates."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from saelab.errors import SettingError
from saelab.storage.atomic import read_json, write_json
from saelab.study.plan import Arm, BaseConfig, PlanConfig, Run, arm_settings
from saelab.study.registration import describe_runs, run_changes
from saelab.study.tuning import (
    FACTORS,
    arms_to_tune,
    describe_edge,
    keep_best,
    read_tuned,
    trial,
    with_best_rates,
)

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
    assert read_tuned(root) == read_json(root / "tuned.json") == {"run_10": found}
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


def test_a_best_rate_at_an_end_of_those_tried_is_named() -> None:
    assert describe_edge(2.0, [1.0, 2.0, 4.0]) == ""
    assert "4 is the largest rate tried: a larger one" in describe_edge(4.0, [4.0, 1.0, 2.0])
    assert "1 is the smallest rate tried: a smaller one" in describe_edge(1.0, [1.0, 2.0])
    assert describe_edge(1.0, [1.0]) == ""


def test_without_a_target_every_trial_may_win(tmp_path: Path) -> None:
    plan = PLAN.patched({"target_l0": None, "levels": ()})
    assert best(tmp_path, plan, [[9.0, 9.0], [16.0, 16.0], [30.0, 30.0]])["train.lr"] == 8e-3


OFF = [[20.0, 20.0], [16.0, 18.0], [12.0, 12.0]]


def test_where_all_trials_of_the_baseline_miss_nothing_is_written(tmp_path: Path) -> None:
    with pytest.raises(SettingError, match="no learning rate gives valid cells at the") as caught:
        keep_best(tmp_path, "run_10", RUN, BASE, PLAN, info(OFF), ["baseline"])
    assert "0.004: L0 18, 12.5%" in str(caught.value) and not (tmp_path / "tuned.json").exists()
    none = info([[16.0], [16.0], [16.0]], (None, None, None))
    with pytest.raises(SettingError, match="0.004: no valid cell"):
        keep_best(tmp_path, "run_10", RUN, BASE, PLAN, none, ["baseline"])


def test_another_arm_whose_trials_all_miss_stays_at_its_own_rate_and_says_so(
    tmp_path: Path,
) -> None:
    """So that one arm does not cost the others their tuning."""
    run = Run("Rates", [Arm("baseline"), Arm("a", {"sae.d_sae": 8})], tuned=True)
    good = info([[16.0], [16.0], [16.0]])
    names = {trial("baseline", factor): trial("a", factor) for factor in FACTORS}
    missed = {names[name]: trial_ for name, trial_ in info(OFF).items()}
    keep_best(tmp_path, "run_0", run, BASE, PLAN, good | missed, ["baseline", "a"])
    tuned = with_best_rates(run, BASE, tmp_path, "run_0")
    assert arm_settings(BASE, tuned, tuned.arms[0]).train.lr == 8e-3
    assert arm_settings(BASE, tuned, tuned.arms[1]).train.lr == 4e-3
    assert tuned.arms[1].comment.startswith("no lr of 0.002, 0.004, 0.008 gives valid cells")
    assert len(read_tuned(tmp_path)["run_0"]["a"]["left_out"]) == 3


# ---------------------------------------------------------------- runs at the tuned rates

ARMS = [Arm("baseline"), Arm("a", {"sae.d_sae": 8}, "an arm"), Arm("b", against="a", primary=True)]
TUNED_RUN = Run("Kinds", ARMS, tuned=True)


def tune(root: Path, *names: str) -> None:
    rates = {"baseline": 4e-3, "a": 8e-3, "b": 2e-3}
    trials = {"0.002": 0.2, "0.004": 0.3, "0.008": 0.1}
    entries = {n: {"train.lr": rates[n], "trials": trials, "left_out": {}} for n in names}
    write_json(root / "tuned.json", {"run_0": entries | {"primary": "fvu"}})


def test_every_arm_of_a_tuned_run_has_its_own_best_rate(tmp_path: Path) -> None:
    tune(tmp_path, "baseline", "a", "b")
    run = with_best_rates(TUNED_RUN, BASE, tmp_path, "run_0")
    rates = {arm.name: arm_settings(BASE, run, arm).train.lr for arm in run.arms}
    assert rates == {"baseline": 4e-3, "a": 8e-3, "b": 2e-3}
    assert run.arms[1].comment == "an arm; lr 0.008 is the best of 0.002, 0.004, 0.008"
    assert (run.arms[2].against, run.arms[1].changes["sae.d_sae"]) == ("a", 8)
    assert with_best_rates(RUN, BASE, tmp_path, "run_0") is RUN  # a run that is not tuned


def test_an_arm_that_is_not_tuned_is_refused_with_the_command(tmp_path: Path) -> None:
    with pytest.raises(SettingError, match="of baseline = 'not tuned': run `saelab tune run_0`"):
        with_best_rates(TUNED_RUN, BASE, tmp_path, "run_0")
    tune(tmp_path, "baseline", "a")
    with pytest.raises(SettingError, match="run_0: learning rate of b = 'not tuned'"):
        with_best_rates(TUNED_RUN, BASE, tmp_path, "run_0")


def test_a_rate_that_was_changed_after_tuning_is_refused(tmp_path: Path) -> None:
    tune(tmp_path, "baseline", "a", "b")
    other = BASE.patched({"train.lr": 3e-3})
    with pytest.raises(SettingError, match=r"baseline = 0.003: was not tried \(tuned.json\)"):
        with_best_rates(TUNED_RUN, other, tmp_path, "run_0")


def test_arms_to_tune() -> None:
    arms, names = arms_to_tune(TUNED_RUN)
    assert names == ["baseline", "a", "b"] and {arm.against for arm in arms} == {"baseline"}
    arms, names = arms_to_tune(replace(TUNED_RUN, tuned=False))
    assert names == ["baseline"] and [arm.name for arm in arms] == ["baseline", "a"]


def test_that_a_run_is_tuned_is_registered_and_leaves_other_registrations_as_they_were() -> None:
    plain = describe_runs({"run_0": replace(TUNED_RUN, tuned=False)})
    assert "tuned" not in plain["run_0"]
    assert run_changes(plain, {"run_0": TUNED_RUN}) == ['run_0.tuned: "none" -> true']
