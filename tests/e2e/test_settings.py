"""Runs of a plan with `[[settings]]`: every arm is trained in each, and judged over all of them."""

from __future__ import annotations

import contextlib
import itertools
import json
import re
import shutil
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
from projects import BASELINE, TWO_SEEDS, Project, cli

from saelab.errors import StudyFailure
from saelab.launch import over_settings
from saelab.launch.confirmation import candidates
from saelab.storage.atomic import read_json
from saelab.verdict.final_info import MOST_MEANS
from saelab.verdict.review import review

RATE = 'Arm("rate", {"train.lr": 2e-3}, "half the learning rate", primary=True)'
SAME = 'Arm("same", {"train.lr": 3.99e-3}, "hardly another rate")'
EARLY = """
[[settings]]
name = "early"
changes = { hook_name = "blocks.1.hook_resid_post" }
"""
WIDE = """
[[settings]]
name = "wide"
base = "configs/wide.toml"
"""
#: Its baseline diverges at once; the other arms have a rate of their own.
BROKEN = """
[[settings]]
name = "broken"
changes = { "train.lr" = 1e20 }
"""
SETTINGS = ("early", "wide")


def make(folder: Path, *settings: str) -> Project:
    text = f"{TWO_SEEDS}alpha = 0.4\n" + "".join(settings or (EARLY, WIDE))
    project = Project.make_smallest(folder / "project", BASELINE, RATE, SAME, plan=text)
    base = (project.folder / "configs/small.toml").read_text(encoding="utf-8")
    project.write("configs/wide.toml", base.replace("d_sae = 64", "d_sae = 128"))
    return project


def place(project: Project, name: str) -> Path:
    """The run folder of a setting; 'base' is the plan's own."""
    run = project.folder / "run_1"
    return run if name == "base" else run / "settings" / name


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Project:
    project = make(tmp_path_factory.mktemp("settings"))
    ended = project.call()
    assert ended.code == 0, ended.err
    assert "for a new setting" in ended.out
    return project


@pytest.fixture
def project(trained: Project, tmp_path: Path) -> Project:
    return trained.copied(tmp_path / "copy")


def test_every_setting_is_a_complete_run_of_its_own(trained: Project) -> None:
    cells = {}
    for name in ("base", *SETTINGS):
        manifest = read_json(place(trained, name) / "manifest.json")
        cells[name] = manifest["cells"]
        assert len(manifest["cells"]) == 6 and len(manifest["sha256"]) > 10
        assert review(place(trained, name)).sealed
        seeds = {arm: set() for arm in ("baseline", "rate", "same")}
        for cell in manifest["cells"]:
            seeds[cell.split("/")[0]].add(cell.split("/")[1])
        assert seeds["baseline"] == seeds["rate"] == seeds["same"] and len(seeds["rate"]) == 2
    for one, other in itertools.combinations(cells.values(), 2):
        assert not set(one) & set(other)  # no seed stands in two settings
    assert read_json(place(trained, "wide") / "manifest.json")["base"]["sae"]["d_sae"] == 128
    hooks = {read_json(place(trained, n) / "manifest.json")["base"]["hook_name"] for n in SETTINGS}
    assert hooks == {"blocks.1.hook_resid_post", "blocks.2.hook_resid_post"}


def test_one_harvest_for_each_setting_that_needs_another(trained: Project) -> None:
    """'wide' reads the activations of the plan's base; each harvest is of training and held-out."""
    folders = list((trained.folder / ".saelab" / "activations").glob("*/blocks.*"))
    assert len(folders) == 4


def test_final_info_holds_the_general_word_and_that_of_each_setting(trained: Project) -> None:
    info = trained.info()
    alone = {name: read_json(place(trained, name) / "final_info.json") for name in SETTINGS}
    across = {a.arm: a for a in review(place(trained, "base")).across}
    for arm, word in (("rate", "hurts"), ("same", "equivalent")):
        means = info[arm]["means"]
        assert means["verdict.fvu"] == across[arm].word == word
        for name in SETTINGS:
            assert means[f"verdict.fvu.{name}"] == alone[name][arm]["means"]["verdict.fvu"]
        effects = [one.mean_diff for one in across[arm].settings]
        assert means["diff.fvu"] == pytest.approx(sum(e for e in effects if e is not None) / 3)
        assert effects[1:] == [alone[name][arm]["means"]["diff.fvu"] for name in SETTINGS]
        assert means["prediction.fvu.low"] < means["diff.fvu.low"] < means["diff.fvu"]
        assert len(means) <= MOST_MEANS
        assert set(info[arm]) == set(alone["early"][arm]) == {"means", "stderrs", "final_info_dict"}
    assert info["rate"]["means"]["fvu"] == pytest.approx(
        sum(info["rate"]["final_info_dict"]["fvu"]) / 2
    )
    assert trained.manifest()["settings"] == list(SETTINGS)


def test_every_word_is_paid_from_the_budget_of_the_study(trained: Project) -> None:
    ledger = trained.folder / ".saelab" / "comparisons.jsonl"
    lines = [json.loads(line) for line in ledger.read_text(encoding="utf-8").splitlines()]
    given = {(line["run"], line["arm"]): line["level"] for line in lines if "level" in line}
    runs = ["run_1", *(f"run_1/settings/{name}" for name in SETTINGS)]
    of_settings = {(run, arm) for run in runs for arm in ("rate", "same")}
    general = {("run_1", f"{arm}/over settings") for arm in ("rate", "same")}
    assert given.keys() == of_settings | general
    assert lines[0]["planned"] == len(given)
    across = {a.arm: a for a in review(place(trained, "base")).across}
    for arm in ("rate", "same"):
        assert across[arm].level == given["run_1", f"{arm}/over settings"]
        means = trained.info()[arm]["means"]
        kept = means["decision"] == "keep"
        assert kept == (across[arm].word == "helps")


def test_a_changed_setting_is_a_deviation(project: Project) -> None:
    shutil.rmtree(project.folder / "run_1")
    file = project.folder / "configs/wide.toml"
    file.write_text(file.read_text(encoding="utf-8").replace("d_sae = 128", "d_sae = 96"), "utf-8")
    ended = project.call()
    assert ended.code == 0, ended.err
    deviations = {n: read_json(place(project, n) / "manifest.json")["deviations"] for n in SETTINGS}
    assert deviations == {"early": [], "wide": ["settings.wide.sae.d_sae: 128 -> 96"]}


def test_words_and_pictures_of_a_run_show_both(project: Project) -> None:
    from saelab.report.figures import common

    ended = cli(project.folder, "verdict", "run_1")
    assert ended.code == 0, ended.err
    for text in (
        "words in 3 settings",
        "base        early",
        "over settings",
        "I²",
        "in a new setting",
    ):
        assert text in ended.out, ended.out
    summary = (project.folder / "run_1" / "summary.md").read_text(encoding="utf-8")
    assert summary.index("**Over settings.**") < summary.index("**Verdict.**")
    assert "| rate | hurts | hurts | hurts | hurts |" in summary
    ended = cli(project.folder, "report", "run_1", "--out", "page.html", "--cells", "0")
    assert ended.code == 0, ended.err
    page = (project.folder / "page.html").read_text(encoding="utf-8")
    first = re.sub(r"<[^>]+>", "", page[page.index('id="answers"') : page.index('id="plan"')])
    assert "rate, for a new setting. Over these settings: ▼ hurts; base: ▼ hurts" in first
    few = {name: common.PICTURES[name] for name in ("forest", "verdict")}
    with contextlib.chdir(project.folder), patch.object(common, "PICTURES", few):
        common.draw({"run_1": ""})
    assert (project.folder / "run_1_forest.png").is_file()
    assert (project.folder / "run_1_verdict.png").is_file()


def test_other_tools_work_on_a_run_and_on_each_of_its_settings(project: Project) -> None:
    for folder in ("run_1", "run_1/settings/early"):
        ended = cli(project.folder, "export", folder, "--out", f"out/{folder}", "--arm", "rate")
        assert ended.code == 0, ended.err
        ended = cli(project.folder, "difference", folder, "rate", "baseline")
        assert ended.code == 0, ended.err
    ended = cli(project.folder, "verdict", "run_1/settings/early")
    assert ended.code == 0 and "run_1/settings/early: A small run" in ended.out
    assert "over settings" not in ended.out


def test_plan_check_shows_the_cost_of_each_setting_and_of_all(project: Project) -> None:
    ended = cli(project.folder, "plan", "check", "run_1")
    assert ended.code == 0, ended.err
    lines = [line.split() for line in ended.out.splitlines()]
    cells = {line[0]: line[1] for line in lines if line and line[0] in ("base", "early", "wide")}
    assert cells == {"base": "6", "early": "6", "wide": "6"}
    assert ["in", "total", "18"] in [line[:3] for line in lines]
    assert "sae.d_sae: 64 -> 128" in ended.out
    import json

    (data,) = json.loads(cli(project.folder, "plan", "check", "run_1", "--json").out)
    assert list(data["settings"]) == ["base", "early", "wide"]
    assert data["total"]["cells"] == 18
    parts = data["settings"].values()
    assert data["total"]["seconds"] == pytest.approx(sum(p["seconds"] for p in parts), abs=1)
    shared = data["settings"]["base"]["disk_bytes"]  # 'wide' is trained on the same activations
    assert data["total"]["disk_bytes"] == shared + data["settings"]["early"]["disk_bytes"]
    assert data["total"]["memory_bytes"] == max(p["memory_bytes"] for p in parts)


def test_the_time_of_all_settings_counts(tmp_path: Path) -> None:
    project = make(tmp_path)
    limit = 15.0  # one setting takes about 10 seconds
    with patch("saelab.study.task.Launch.__init__", _limited(limit)):
        ended = cli(project.folder, "plan", "check", "run_1")
    assert ended.code == 2 and "expected time of run_1" in ended.last


def _limited(limit: float) -> Any:
    from saelab.study.task import Launch

    whole = Launch.__init__

    def init(self: Launch, **fields: Any) -> None:
        whole(self, **(fields | {"limit": limit}))

    return init


def test_a_complete_run_is_kept_and_replaced_by_force(project: Project) -> None:
    again = project.call()
    assert again.code == 2 and "is a complete run" in again.last
    before, info = project.weights(), project.info()
    leftover = project.folder / "run_1" / "settings" / "old"
    leftover.mkdir()
    ended = cli(project.folder, "run", "run_1", "--force")
    assert ended.code == 0, ended.err
    assert "to train" not in ended.err  # all cells are in the cache
    assert project.weights() == before and project.info() == info
    assert not leftover.exists()


def test_an_interrupted_run_goes_on_without_training_again(
    tmp_path: Path, trained: Project
) -> None:
    project = make(tmp_path)
    real = over_settings.launch

    def stops(task: Any) -> Any:
        if task.setting == "wide":
            raise KeyboardInterrupt
        return real(task)

    with patch.object(over_settings, "launch", stops), contextlib.suppress(KeyboardInterrupt):
        project.call()
    run = project.folder / "run_1"
    assert (run / "settings" / "early" / "final_info.json").is_file()
    assert not (run / "final_info.json").exists()
    assert cli(project.folder, "verdict", "run_1").code == 2
    ended = project.call()
    assert ended.code == 0, ended.err
    assert "run_1/settings/early: 6 cells to train" not in ended.err
    assert "run_1/settings/wide: 6 cells to train (0 in the cache)" in ended.err
    assert project.info() == trained.info()


def test_a_setting_whose_baseline_fails_is_missing_and_the_others_go_on(tmp_path: Path) -> None:
    project = make(tmp_path, EARLY, BROKEN, WIDE)
    ended = project.call()
    assert ended.code == 0, ended.err
    assert "run_1/settings/broken: the baseline has no valid cell" in ended.err
    assert "the other settings go on" in ended.err
    means = project.info()["rate"]["means"]
    (rate, _) = review(project.folder / "run_1").across
    assert rate.n == 3 and [one.setting for one in rate.missing] == ["broken"]
    assert "broken is missing (" in rate.reason
    assert means["verdict.fvu.broken"] == rate.settings[2].word != "equivalent"


def test_a_setting_that_was_changed_or_lost_is_noticed(project: Project) -> None:
    early = place(project, "early")
    shutil.copytree(early, project.folder / "kept")
    file = early / "manifest.json"
    file.write_text(file.read_text().replace('"seconds"', '"secondz"'))
    ended = cli(project.folder, "verdict", "run_1")
    assert ended.code == 1 and "settings/early/manifest.json was changed" in ended.last
    shutil.rmtree(early)
    ended = cli(project.folder, "verdict", "run_1")
    assert ended.code == 1 and "early is missing" in ended.last


def test_the_best_arm_is_the_best_over_settings(trained: Project) -> None:
    found = {c.arm: c for c in candidates(review(place(trained, "base")))}
    across = {a.arm: a for a in review(place(trained, "base")).across}
    for arm, candidate in found.items():
        high = across[arm].high
        assert high is not None
        assert (candidate.word, candidate.worst) == (across[arm].word, -high)


IMPOSSIBLE = [
    ('name = "wide"', 'name = "early"', ("settings.name = 'early'", "occurs twice")),
    ("wide.toml", "widee.toml", ("widee.toml does not exist",)),
    ("blocks.1.", "blocks.2.", ("settings = 'early'", "of the plan's own base")),
    ("blocks.1.", "blocks.9.", ("blocks.9.hook_resid_post",)),
]


@pytest.mark.parametrize(("old", "new", "words"), IMPOSSIBLE)
def test_impossible_settings_are_refused(
    tmp_path: Path, old: str, new: str, words: tuple[str, ...]
) -> None:
    project = make(tmp_path)
    project.replace("plan.toml", old, new)
    ended = project.call()
    assert ended.code == 2 and "Traceback" not in ended.err, ended.err
    assert all(word in ended.last for word in words), ended.last


def test_an_arm_that_is_impossible_in_one_setting_is_named_before_anything_is_trained(
    tmp_path: Path,
) -> None:
    narrow = '\n[[settings]]\nname = "narrow"\nchanges = { "sae.d_sae" = 32 }\n'
    project = make(tmp_path, EARLY, narrow)
    many = 'Arm("many", {"sae.activation.k": 48, "sae.initial_l0": 48})'
    project.table((BASELINE, many))
    project.replace("plan.toml", "target_l0 = 16", 'target_l0 = "none"')
    ended = project.call()
    assert ended.code == 2 and "Traceback" not in ended.err, ended.err
    assert "settings 'narrow': many: " in ended.last and "48" in ended.last
    assert not list((project.folder / ".saelab").glob("cells/*")) and "train" not in ended.out


def test_all_settings_of_several_runs_are_trained_together(tmp_path: Path) -> None:
    project = make(tmp_path)
    text = (project.folder / "experiment.py").read_text(encoding="utf-8")
    table = next(line for line in text.splitlines() if line.startswith("RUNS = "))
    one, other = (f'Run("A run", [{BASELINE}, {arm}])' for arm in (RATE, SAME))
    two = f'RUNS = {{"run_1": {one}, "run_2": {other}}}'
    project.replace("experiment.py", table, two)
    ended = cli(project.folder, "run", "run_1", "run_2")
    assert ended.code == 0, ended.err
    assert re.findall(r"(\d+) cells to train", ended.err) == ["18"]  # 2 seeds, 3 arms, 3 settings
    assert "verdict.fvu.wide" in project.info("run_2")["same"]["means"]


@pytest.mark.slow
def test_the_confirming_run_is_made_in_every_setting(project: Project) -> None:
    text = (project.folder / "experiment.py").read_text(encoding="utf-8")
    project.write(
        "experiment.py",
        text.replace("import Arm, Run", "import Arm, Confirmation, Run").replace(
            "\nif __name__",
            f'RUNS["run_10"] = Confirmation("Confirmed", [{BASELINE}])\n\nif __name__',
        ),
    )
    ended = project.call("--out_dir=run_10")
    assert ended.code == 0, ended.err
    (best,) = review(project.folder / "run_10").across
    assert best.arm == "same (run_1)" and not best.exploratory
    assert [one.setting for one in best.settings] == ["base", "early", "wide"]


def test_settings_in_python(tmp_path: Path) -> None:
    import saelab

    project = make(tmp_path)
    base = saelab.settings(project.folder / "configs/small.toml", {})
    texts = {
        f"{name}.path": str(project.folder / f"{split}.txt")
        for name, split in (("train_text", "train"), ("eval_text", "held_out"))
    }
    wide = {"name": "wide", "changes": {"sae.d_sae": 128}}
    with contextlib.chdir(project.folder):
        comparisons = saelab.compare(
            base.patched(texts),
            {"rate": {"train.lr": 2e-3}},
            seeds=2,
            out_dir="run_x",
            target_l0=16,
            settings=[wide],
        )
    assert [c.arm for c in comparisons] == ["rate"]
    (rate,) = review(project.folder / "run_x").across
    assert rate.word == "refused" and "3 are needed" in rate.reason  # two settings


def test_a_launch_without_settings_is_what_it_was(tmp_path: Path) -> None:
    project = Project.make_smallest(tmp_path / "project")
    assert project.call().code == 0
    assert "settings" not in project.manifest() and "across" not in project.manifest()
    assert not (project.folder / "run_1" / "settings").exists()
    means = project.info()["rate"]["means"]
    assert not [name for name in means if "setting" in name or name.startswith("prediction")]


def test_the_failure_of_the_plans_own_base_ends_the_launch(tmp_path: Path) -> None:
    project = make(tmp_path)
    text = (project.folder / "configs/small.toml").read_text(encoding="utf-8")
    project.write("configs/small.toml", text.replace("lr = 4e-3", "lr = 1e20"))
    ended = project.call()
    assert ended.code == StudyFailure("").exit_code == 1
    assert "run_1: the baseline has no valid cell" in ended.last
