"""Options of a launch on the command line: seeds, tokens, other settings, the quick form."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from projects import BASELINE, RATE, SCALED, Project, cli

from saelab.errors import SettingError
from saelab.report.figures.common import draw_run
from saelab.report.run_data import load
from saelab.runs.schema import MARK
from saelab.seeding import study_seeds
from saelab.storage.atomic import read_json
from saelab.study.launch_options import LaunchOptions
from saelab.study.plan import Arm, BaseConfig, Confirmation, FromArm, PlanConfig, Run

THIRD = 'Arm("other", {"train.lr": 1e-3}, "a third")'
CONFIRMING = """
from saelab.study.plan import Confirmation
"""


@pytest.fixture(scope="module")
def quick(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Project]:
    """A project after the quick form of a run with three arms besides the baseline."""
    folder = tmp_path_factory.mktemp("quick") / "project"
    project = Project.make_smallest(folder, BASELINE, SCALED, THIRD, RATE)
    ended = cli(folder, "run", "run_1", "--quick")
    assert ended.code == 0, ended.err
    assert MARK in ended.out and "saelab run run_1" in ended.out
    assert "decision:" not in ended.out
    yield project


def test_the_quick_form_judges_three_arms(quick: Project) -> None:
    info = read_json(quick.folder / "quick" / "run_1" / "final_info.json")
    assert list(info) == ["baseline", "scaled", "rate"]  # the primary arm, and the first other one
    assert info["rate"]["means"]["verdict.fvu"]
    assert not (quick.folder / "run_1").exists()


def test_every_output_says_that_it_is_quick(quick: Project) -> None:
    folder = quick.folder / "quick" / "run_1"
    info, manifest = (read_json(folder / name) for name in ("final_info.json", "manifest.json"))
    assert {group["means"]["quick"] for group in info.values()} == {MARK}
    assert manifest["purpose"] == "quick" and manifest["run"] == "run_1 (quick)"
    assert manifest["title"].startswith(MARK)
    summary = (folder / "summary.md").read_text(encoding="utf-8")
    assert summary.startswith(f"# run_1 (quick): {MARK}") and "registered nowhere" in summary
    assert "as registered" not in summary
    verdict = cli(quick.folder, "verdict", "quick/run_1")
    assert verdict.out.startswith(f"run_1 (quick): {MARK}")
    data = json.loads(cli(quick.folder, "verdict", "quick/run_1", "--json").out)
    assert data[0]["title"].startswith(MARK)
    page = cli(quick.folder, "report", "quick/run_1", "--out", "q.html", "--cells", "0")
    assert page.code == 0 and MARK in (quick.folder / "q.html").read_text(encoding="utf-8")


@pytest.mark.parametrize("title", ["", "a title of plot.py"])
def test_pictures_say_it_too(title: str, quick: Project, tmp_path: Path) -> None:
    run = load(quick.folder / "quick" / "run_1", title)
    drawn = dict(draw_run(run, tmp_path, ["loss", "verdict"]))
    assert drawn == {"run_1_loss.png": True, "run_1_verdict.png": True}
    for name in ("loss", "verdict"):
        assert run.title.startswith(MARK) and title in run.title
        assert "QUICK FORM" in (tmp_path / f"run_1_{name}.svg").read_text(encoding="utf-8")


def test_the_quick_form_is_no_part_of_the_study(quick: Project) -> None:
    """No registration, attempt or comparison; seeds that nothing else has; no run of the folder."""
    kept = {file.name for file in (quick.folder / ".saelab").iterdir()}
    assert kept <= {"activations", "cells", "logs", "pairs", "probing", "resume"}
    manifest = read_json(quick.folder / "quick" / "run_1" / "manifest.json")
    study = {s for purpose in ("explore", "confirm", "tune", "twin") for s in seeds(purpose)}
    assert set(manifest["seeds"]) <= set(seeds("quick")) and not study & set(manifest["seeds"])
    assert manifest["error_levels"] == {} and "budget" not in manifest
    ended = cli(quick.folder, "verdict")
    assert ended.code == 2 and "no complete run" in ended.last
    assert cli(quick.folder, "attempts").out == ""


def seeds(purpose: str) -> list[int]:
    return study_seeds("small", purpose, 20)


def test_a_quick_form_is_never_confirmed(quick: Project, tmp_path: Path) -> None:
    project = quick.copied(tmp_path / "project")
    table = (project.folder / "experiment.py").read_text(encoding="utf-8")
    line = 'RUNS["run_10"] = Confirmation("Confirm", [Arm("baseline")])\n\nif __name__'
    project.write("experiment.py", CONFIRMING + table.replace("if __name__", line))
    ended = cli(project.folder, "plan", "check", "run_10")
    assert ended.code == 2 and "run one of them first" in ended.last
    shutil.copytree(project.folder / "quick" / "run_1", project.folder / "run_1")
    ended = cli(project.folder, "plan", "check", "run_10")
    assert ended.code == 2 and "holds the run run_1 (quick)" in ended.last
    ended = cli(project.folder, "run", "run_10", "--quick")
    assert ended.code == 2 and "is a confirming run" in ended.last


def test_it_can_be_made_again(quick: Project) -> None:
    ended = cli(quick.folder, "run", "run_1", "--quick", "--json")
    assert ended.code == 0 and json.loads(ended.out)["run"] == "run_1 (quick)"


def test_which_arms_it_has() -> None:
    arms = [
        Arm("baseline"),
        Arm("a", {"train.lr": 1e-3}),
        Arm("learned", {"sae.tied": FromArm("a", "x")}, primary=True),
        Arm("against", {"train.lr": 2e-3}, against="a", primary=True),
        Arm("b", {"train.lr": 3e-3}, primary=True),
        Arm("c", {"train.lr": 4e-3}),
    ]
    run = LaunchOptions(quick=True).change_run(Run("Title", arms), "run_1")
    assert [arm.name for arm in run.arms] == ["baseline", "a", "b"]
    assert LaunchOptions().change_run(Run("Title", arms), "run_1").arms == arms
    with pytest.raises(SettingError, match="is a confirming run"):
        LaunchOptions(quick=True).change_run(Confirmation("t", arms), "run_10")


def test_its_sizes() -> None:
    options, plan = LaunchOptions(quick=True), PlanConfig(study="s")
    small, base = options.change_plan(plan), options.change_base(BaseConfig(), plan)
    assert (small.seeds, small.seeds_other, small.levels) == (3, 3, ())
    assert base.train.tokens == 131_072 and base.evaluation.probing.entries == "none"
    probed = PlanConfig(study="s", primary="sae_top_5_test_accuracy")
    assert options.change_base(BaseConfig(), probed).evaluation.probing.entries == "embedded"
    assert options.change_plan(PlanConfig(study="s", seeds=2)).seeds == 2


# ---- seeds, tokens, settings -----------------------------------------------------------------


def test_options_of_a_run_are_deviations(tmp_path: Path) -> None:
    project = Project.make_smallest(tmp_path / "p")
    options = ("--seeds", "3", "--tokens", "1024", "--set", "train.warmup=0.1")
    checked = cli(project.folder, "plan", "check", "run_1", *options)
    assert checked.code == 0 and "6 cells" in checked.out, checked.err
    ended = cli(project.folder, "run", "run_1", *options)
    assert ended.code == 0, ended.err
    manifest = project.manifest()
    assert len(manifest["seeds"]) == 3 and manifest["base"]["train"]["tokens"] == 1_024
    assert manifest["base"]["train"]["warmup"] == 0.1
    texts = " ".join(manifest["deviations"])
    assert "seeds: 2 -> 3" in texts and "train.tokens" in texts and "train.warmup" in texts
    registered = read_json(project.folder / ".saelab" / "plan.json")
    assert registered["plan"]["seeds"] == 2  # as plan.toml says
    assert "next: `saelab report run_1`" in ended.out


@pytest.mark.parametrize(
    ("options", "part"),
    [
        (("--seeds", "0"), "use at least 1"),
        (("--tokens", "0"), "use at least 1"),
        (("--set", "train.lr"), "use NAME=VALUE"),
        (("--set", "train.lrr=1"), "did you mean 'lr'"),
    ],
)
def test_bad_options_are_one_sentence(options: tuple[str, ...], part: str, quick: Project) -> None:
    for command in (("run", "run_1"), ("plan", "check", "run_1")):
        ended = cli(quick.folder, *command, *options)
        assert ended.code == 2 and part in ended.last and "Traceback" not in ended.err


def test_settings_of_a_plan_with_further_ones_are_not_changed(tmp_path: Path) -> None:
    plan = PlanConfig.parse(
        {"study": "s", "settings": [{"name": "wide", "changes": {"sae.d_sae": 128}}]}
    )
    with pytest.raises(SettingError, match="further settings"):
        LaunchOptions(tokens=1_024).change_plan(plan)
    assert LaunchOptions(quick=True, tokens=1_024).change_plan(plan).settings == ()
    assert LaunchOptions(seeds=5).change_plan(plan).seeds == 5


def test_train_takes_a_seed_and_replaces_with_force(tmp_path: Path) -> None:
    project = Project.make_smallest(tmp_path / "p")
    command = ("train", "configs/small.toml", "--out_dir", "out", "--tokens", "1024")
    ended = cli(project.folder, *command, "--seed", "7")
    assert ended.code == 0, ended.err
    assert project.manifest("out")["seeds"] == [7]
    assert "saelab.load('out/cells/baseline/seed7" in ended.out
    again = cli(project.folder, *command, "--seed", "8")
    assert again.code == 2 and "is a complete run" in again.last
    forced = cli(project.folder, *command, "--seed", "8", "--force")
    assert forced.code == 0 and project.manifest("out")["seeds"] == [8]
    both = cli(project.folder, *command, "--seed", "8", "--seeds", "2")
    assert both.code == 2 and "leave one of them out" in both.last
