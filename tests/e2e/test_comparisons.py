"""Comparisons of a study are paid for once, whatever is renamed, repeated or deleted."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from projects import BASELINE, Project, cli

from saelab.seeding import study_seeds
from saelab.verdict.twin import TRUE_OF_A_TWIN

RUNS = """
RATE = Arm("rate", {"train.lr": 2e-3})
RENAMED = Arm("another idea", {"train.lr": 2e-3})
NEW = Arm("new", {"train.lr": 1e-3})
"""


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Project:
    made = Project.make_smallest(tmp_path_factory.mktemp("ledger") / "project")
    made.table((BASELINE, "RATE", "NEW"), RUNS)
    again = 'RUNS["run_2"] = Run("The same", [Arm("baseline"), RENAMED])\n\nif __name__'
    made.replace("experiment.py", "if __name__", again)
    for run in ("run_1", "run_2"):
        assert made.call(f"--out_dir={run}").code == 0
    return made


def lines(project: Project) -> list[dict]:
    file = project.folder / ".saelab" / "comparisons.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines()]


def test_the_ledger_has_each_comparison_once(project: Project) -> None:
    first, *rest = lines(project)
    assert (first["alpha"], first["planned"], first["lost"]) == (0.05, 2, [])
    assert [x["arm"] for x in rest if "number" in x] == ["rate", "new"]
    assert [x["result"] for x in rest if "result" in x] == [1, 2]


def test_the_twin_is_trained_once_for_the_study_at_seeds_of_its_own(project: Project) -> None:
    one, two = (project.manifest(run) for run in ("run_1", "run_2"))
    assert one["twin"] == two["twin"] and len(one["twin"]) == 2
    seeds = {cell["seed"] for cell in one["twin"].values()}
    assert seeds == set(study_seeds("small", "twin", 2)) and not seeds & set(one["seeds"])
    rows = pq.read_table(project.folder / "run_1" / "metrics.parquet").to_pylist()
    for name in ("control:twin", "control:planted effect"):
        assert {row["seed"] for row in rows if row["arm"] == name} == seeds
    assert one["aa_twin"]["word"] in TRUE_OF_A_TWIN and one["planted"]["comparison"]["n"] == 2


def test_words_of_twins_and_planted_effects_are_counted_over_runs(project: Project) -> None:
    text = cli(project.folder, "verdict", "run_1", "run_2").out
    word = project.manifest()["aa_twin"]["word"]
    counted = f"A/A twin: 2 runs with 1 different twin: 1 {word}; planted effect: "
    assert counted in text.splitlines()[-1]
    (shown, _) = json.loads(cli(project.folder, "verdict", "--json").out)
    assert shown["twin"]["word"] == word and shown["planted"]["expected"] > 0
    assert "A/A twin (the baseline at other seeds): " in cli(project.folder, "verdict", "run_1").out


def test_every_file_of_the_run_says_the_level(project: Project) -> None:
    level = 0.05 * 0.8 / 2
    for run, arm in (("run_1", "rate"), ("run_1", "new"), ("run_2", "another idea")):
        info = json.loads((project.folder / run / "final_info.json").read_text())
        manifest = json.loads((project.folder / run / "manifest.json").read_text())
        assert info[arm]["means"]["level"] == pytest.approx(level)
        assert manifest["error_levels"][arm]["level"] == pytest.approx(level)
        assert info[arm]["means"]["budget_left"] == pytest.approx(0.2)
        assert manifest["budget"]["comparisons"] == 2
        assert "**Error budget.** 20% left" in (project.folder / run / "summary.md").read_text()
    assert "budget_left" not in info["baseline"]["means"]


def test_the_verdict_needs_no_ledger(project: Project, tmp_path: Path) -> None:
    shutil.copytree(project.folder / "run_2", tmp_path / "run_2")
    (shown,) = json.loads(cli(tmp_path, "verdict", "run_2", "--json").out)
    assert shown["comparisons"][0]["level"] == pytest.approx(0.02)
    assert shown["budget"]["left"] == pytest.approx(0.2)
    text = cli(tmp_path, "verdict", "run_2").out
    assert "error budget: 20% left after 2 comparisons (2 planned" in text


def test_attempts_lists_what_each_comparison_cost(project: Project) -> None:
    text = cli(project.folder, "attempts").out
    assert "comparison 1 (run_1): rate - baseline, level 0.02" in text
    assert "error budget: 20% left" in text


def test_a_deleted_run_costs_nothing_more_and_a_deleted_ledger_is_loud(project: Project) -> None:
    before, cells = lines(project), project.finished_cells()
    shutil.rmtree(project.folder / "run_1")
    assert project.call().code == 0
    assert lines(project) == before and project.finished_cells() == cells
    (project.folder / ".saelab" / "comparisons.jsonl").unlink()
    shutil.rmtree(project.folder / "run_2")
    ended = project.call("--out_dir=run_2")
    said = "comparisons.jsonl was missing although run_1, run_2 had been run"
    assert said in ended.err
    assert f"deviation: {said}" in (project.folder / "run_2" / "summary.md").read_text()
