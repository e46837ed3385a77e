"""`plan check`: what a run changes, costs and could see, before anything is trained."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from saelab import stats
from saelab.errors import SettingError
from saelab.launch.launch import check_launch
from saelab.preflight.preview import RunCheck, check_limit, check_text
from saelab.storage.atomic import write_json
from saelab.study.plan import Arm, BaseConfig, FromArm, PlanConfig, Run
from saelab.study.task import Launch

BASE = BaseConfig()
LEARNED = Arm("learned", {"sae.scaling": {"kind": "variance", "temperature": "learned"}})
FOUND = Arm("found", {"sae.scaling": {"kind": "variance", "tau": FromArm("learned", "tau")}})
RATE = Arm("rate", {"train.lr": 2e-3}, "half the rate", primary=True)


def checked_run(root: Path, *arms: Arm, limit: float = 7000.0, **plan: object) -> RunCheck:
    settings = PlanConfig.parse({"study": "test", **plan})
    run = Run("A run", [Arm("baseline"), *arms])
    task = Launch(
        name="run_1",
        run=run,
        plan=settings,
        base=BASE,
        out_dir=root / "run_1",
        root=root,
        experiment=root / "experiment.py",
        limit=limit,
        workers=2,
    )
    return check_launch(task)


def changes(found: RunCheck, arm: str) -> dict[str, tuple[object, object]]:
    (checked,) = [a for a in found.arms if a.name == arm]
    return {change.setting: (change.base, change.arm) for change in checked.changes}


def test_each_arm_says_exactly_what_it_changes(tmp_path: Path) -> None:
    losses = Arm("losses", {"sae.losses+": {"kind": "auxk"}, "sae.controllers.0.warmup": 0.3})
    kind = Arm("kind", {"sae.activation": {"kind": "jumprelu", "threshold": 0.7}})
    found = checked_run(tmp_path, RATE, losses, kind)
    assert changes(found, "baseline") == {}
    assert changes(found, "rate") == {"train.lr": (BASE.train.lr, 2e-3)}
    added = changes(found, "losses")
    assert list(added) == ["sae.losses.2", "sae.controllers.0.warmup"]
    assert added["sae.controllers.0.warmup"] == (0.15, 0.3)
    assert added["sae.losses.2"][0] == "absent" and added["sae.losses.2"][1]["kind"] == "auxk"
    assert list(changes(found, "kind")) == ["sae.activation"]
    said = check_text(found)
    assert "sae.activation: relu -> jumprelu(threshold=0.7)" in said  # defaults left out
    assert f"train.lr: {BASE.train.lr} -> 0.002" in said


def test_it_counts_cells_tokens_pairs_and_cost(tmp_path: Path) -> None:
    found = checked_run(tmp_path, RATE, LEARNED)
    by_name = {arm.name: arm for arm in found.arms}
    assert [by_name[name].cells for name in ("baseline", "rate", "learned")] == [12, 12, 3]
    assert (by_name["rate"].pairs, by_name["learned"].pairs) == (8, 3)
    assert len(found.specs) == 27 and len(found.twins) == 3
    assert found.tokens == 31 * BASE.train.tokens  # and the control with a frozen decoder
    assert "27 cells, 3 of the A/A twin and the controls" in check_text(found)
    alone = replace(found, task=replace(found.task, experiment=None))
    assert not alone.twins and alone.seconds < found.seconds
    assert found.seconds > 10 and found.needs.memory > 1e8
    data = found.as_dict()
    assert data["cells"] == 27 and data["arms"][1]["changes"][0]["setting"] == "train.lr"
    assert "27 cells" in check_text(found) and "GB of memory" in check_text(found)


def test_the_second_wave_is_named_and_what_it_waits_for(tmp_path: Path) -> None:
    found = checked_run(tmp_path, LEARNED, FOUND)
    by_name = {arm.name: arm for arm in found.arms}
    assert by_name["found"].second_wave and not by_name["learned"].second_wave
    assert "tau=what another arm ends with" in check_text(found)
    assert "second wave" in check_text(found)


def test_the_smallest_effect_is_in_spreads_until_a_run_is_finished(tmp_path: Path) -> None:
    arm = checked_run(tmp_path, RATE).arms[1]
    assert arm.spread is None and arm.sees == pytest.approx(
        stats.detectable_ratio(7, 0.04) / 8**0.5  # four fifths of the study's error budget
    )
    comparisons = [
        {"arm": name, "n": n, "spread": sd}
        for name, n, sd in (("rate", 8, 0.002), ("other", 3, 0.004), ("third", 3, 0.008))
    ]
    manifest = {"run": "run_1", "primary": "fvu", "study": "test", "plan": {"alpha": 0.05}}
    write_json(tmp_path / "run_1" / "manifest.json", manifest | {"comparisons": comparisons})
    rate, learned = checked_run(tmp_path, RATE, LEARNED).arms[1:]
    assert rate.spread == pytest.approx(0.002) and rate.spread_of == "of rate in run_1"
    assert rate.sees == pytest.approx(0.002 * stats.detectable_ratio(7, 0.02) / 8**0.5)
    assert learned.spread == pytest.approx(0.004) and "median" in learned.spread_of
    other = checked_run(tmp_path, RATE, study="another").arms[1]
    assert other.spread is None  # numbers of another study say nothing


def test_it_warns_where_no_comparison_is_possible(tmp_path: Path) -> None:
    (warning,) = checked_run(tmp_path, RATE, seeds=1).warnings
    assert "rate" in warning and "no comparison is possible: add seeds" in warning
    assert not checked_run(tmp_path, RATE, seeds=2).warnings


def test_the_planned_family_and_the_baselines_further_seeds_count(tmp_path: Path) -> None:
    alone, planned = (checked_run(tmp_path, RATE, family=n).arms[1].sees for n in (1, 7))
    assert alone is not None and planned is not None and alone < planned
    side = Arm("side", {"train.lr": 3e-3})
    few = checked_run(tmp_path, RATE, side, seeds_other=3).arms[2].sees
    three = stats.detectable_ratio(2, 0.025) / 3**0.5  # with three cells on each side
    assert few is not None and few < three


def test_exclusions_and_deviations_are_shown(tmp_path: Path) -> None:
    from saelab.study.registry import register

    register(tmp_path, PlanConfig(study="test", seeds=9))
    found = checked_run(tmp_path, RATE, exclusions=("the old text",))
    assert any("seeds: 9 -> 8" in warning for warning in found.warnings)
    assert any("the old text" in warning for warning in found.warnings)


def test_impossible_arms_are_refused(tmp_path: Path) -> None:
    with pytest.raises(SettingError, match="did you mean 'lr'"):
        checked_run(tmp_path, Arm("x", {"train.lrr": 1.0}))
    with pytest.raises(SettingError, match="declare twin_of"):
        checked_run(tmp_path, RATE, Arm("same", {"train.lr": 2e-3}))
    twin = checked_run(tmp_path, RATE, Arm("same", {"train.lr": 2e-3}, twin_of="rate")).arms[2]
    assert twin.twin_of == "rate" and "train.lr" in {c.setting for c in twin.changes}
    with pytest.raises(SettingError, match="exactly its settings"):
        checked_run(tmp_path, RATE, Arm("no twin", {"train.lr": 3e-3}, twin_of="rate"))


def test_a_launch_over_the_limit_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SettingError, match="over the limit of 0:02"):
        checked_run(tmp_path, RATE, limit=2.0).check_limit()
    checked_run(tmp_path, RATE, limit=float("inf")).check_limit()
    check_limit("run_1", 6999, 7000)
