"""`saelab verdict` and `saelab plan check` say what the launch itself wrote."""

from __future__ import annotations

import dataclasses
import functools
import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from projects import BASELINE, LONGER, PLAN, RATE, SCALED, Project, cli

from saelab.analysis.difference import difference
from saelab.errors import SettingError, SourceError
from saelab.launch.controls import SUBJECTS
from saelab.storage.atomic import read_json, write_json, write_sealed
from saelab.verdict.review import chosen_runs, complete_runs
from saelab.verdict.simulation import promises
from saelab.verdict.simulation.comparisons import family_rows, null_rows
from saelab.verdict.simulation.rows import Row

TWIN = 'Arm("twin", {}, twin_of="baseline")'
#: Its learning rate is so high that it diverges at once and has weights of zero.
BROKEN = 'Arm("broken", {"train.lr": 1e30})'
DECLARED = 'Arm("declared", {"train.lr": 3e-3}, expected=["not_converged"])'


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Project:
    arms = (BASELINE, RATE, TWIN, BROKEN, DECLARED)
    made = Project.make(tmp_path_factory.mktemp("verdict") / "project", arms, base=LONGER)
    ended = made.call()
    assert ended.code == 0, ended.err
    return made


def judged(project: Project, *arguments: str) -> list[dict]:
    ended = cli(project.folder, "verdict", *arguments, "--json")
    assert ended.code == 0, ended.err
    return json.loads(ended.out)


def test_it_says_what_the_launch_wrote(project: Project) -> None:
    (found,) = judged(project, "run_1")
    manifest, info = project.manifest(), project.info()
    assert found["comparisons"] == manifest["comparisons"]
    assert found["plan_hash"] == manifest["plan_hash"]
    for c in found["comparisons"]:
        means = info[c["arm"]]["means"]
        assert (means["verdict.fvu"], means["diff.fvu"]) == (c["word"], c["mean_diff"])
    shown = {d["arm"]: d["mean_diff"] for d in found["differences"] if d["metric"] != "fvu"}
    assert shown["rate"] is None  # the last secondary metric, which is not measured here
    recovered = [d for d in found["differences"] if d["metric"] == "loss_recovered"]
    for d in recovered:
        assert info[d["arm"]]["means"]["diff.loss_recovered"] == d["mean_diff"]


def test_without_a_name_it_judges_every_complete_run(project: Project) -> None:
    assert judged(project) == judged(project, "run_1")
    assert [folder.name for folder in complete_runs(project.folder)] == ["run_1"]


def test_a_twin_has_the_baselines_cells_and_no_word_of_direction(project: Project) -> None:
    c = next(c for c in judged(project)[0]["comparisons"] if c["arm"] == "twin")
    fvu = {arm: project.info()[arm]["final_info_dict"]["fvu"] for arm in ("baseline", "twin")}
    assert fvu["twin"] == fvu["baseline"][: len(fvu["twin"])]
    assert (c["n"], c["n_baseline"], c["n_shared"]) == (2, 3, 2)  # all seeds of both sides count
    assert c["low"] <= 0 <= c["high"] and c["word"] in ("equivalent", "cannot tell yet")


def test_the_difference_of_two_arms_is_that_of_the_verdict(project: Project) -> None:
    folder = project.folder / "run_1"
    c = next(c for c in judged(project)[0]["comparisons"] if c["arm"] == "rate")
    found = difference(folder, "rate", "baseline")
    assert found.mean_diff == c["mean_diff"] and found.n == c["n"]
    assert found.low is not None and c["low"] < found.low  # its coverage is not the family's
    turned = difference(folder, "baseline", "rate")
    assert turned.mean_diff == pytest.approx(-c["mean_diff"], rel=0.2)  # the other arm's frontier
    said = cli(project.folder, "difference", "run_1", "rate", "twin")
    assert said.out.startswith("rate - twin, fvu: ") and "95% interval" in said.out
    with pytest.raises(SettingError, match="no such arm"):
        difference(folder, "rate", "rats")
    with pytest.raises(SettingError, match="not measured in both"):
        difference(folder, "rate", "twin", "lo")
    with pytest.raises(SourceError, match="complete run"):
        difference(project.folder / "none", "rate", "twin")


def test_a_bad_cell_stops_nothing_and_is_listed(project: Project) -> None:
    (found,) = judged(project)
    c = next(c for c in found["comparisons"] if c["arm"] == "broken")
    assert c["word"] in ("hurts", "cannot tell yet", "refused")
    assert "cells of the arm failed" in c["reason"] or "healthy cell" in c["reason"]
    notes = [note for note in found["cells"] if note["cell"].startswith("broken/")]
    assert {note["outcome"] for note in notes} >= {"failed"}
    assert "invalid" not in {note["outcome"] for note in notes}  # it is not the software's fault
    declared = [note for note in found["cells"] if note["cell"].startswith("declared/")]
    assert declared and all(n["expected"] for n in declared if n["check"] == "not_converged")
    kept = read_json(project.folder / "run_1" / "gate.json")
    assert len(kept) == len(project.manifest()["cells"])
    healthy = next(cell["facts"] for cell in kept.values() if cell["arm"] == "rate")
    assert healthy["code_std"] > 0 and healthy["mean_over_std"] > 0
    assert (healthy["bos_masked"], healthy["centred"]) == (1, 1)


def test_an_effect_of_known_size_is_found_and_the_controls_are_shown(project: Project) -> None:
    planted = project.manifest()["planted"]
    c = planted["comparison"]
    assert c["low"] < planted["expected"] < c["high"] and c["n_shared"] == 0
    text = (project.folder / "run_1" / "summary.md").read_text(encoding="utf-8")
    assert f"Planted effect: {c['word']}" in text and "A/A twin" in text
    for name in (*SUBJECTS, "frozen decoder", "planted effect"):
        assert f"| {name} |" in text
    rows = pq.read_table(project.folder / "run_1" / "metrics.parquet").to_pylist()
    fvu = {r["arm"]: r["value"] for r in rows if (r["metric"], r["slice"]) == ("fvu", "")}
    ends = fvu["control:untrained"], fvu["control:frozen decoder"], fvu["baseline"]
    assert list(ends) == sorted(ends, reverse=True)


def test_controls_as_good_as_an_arm_are_named_by_launch_summary_and_verdict(
    project: Project,
) -> None:
    (found,) = judged(project)
    rivals = {(rival["control"], rival["arm"]) for rival in found["rivals"]}
    assert ("PCA", "rate") in rivals  # which is hardly trained
    summary = (project.folder / "run_1" / "summary.md").read_text(encoding="utf-8")
    assert summary.count("CONTROLS AS GOOD AS ARMS: on fvu, ") == 1
    assert summary.index("CONTROLS AS") < summary.index("**Verdict.**")
    assert cli(project.folder, "verdict").out.count("CONTROLS AS GOOD AS ARMS") == 1


def test_the_terminal_shows_all_of_it(project: Project) -> None:
    said = cli(project.folder, "verdict").out
    for words in (
        "coverage",
        "detectable",
        "seeds to tell",
        "cannot tell yet",
        "broken, ",
        "plan ",
    ):
        assert words in said
    assert "declared, not_converged (expected)" in said
    assert "other models or texts" in said
    assert "over texts" in said and "contexts of one text, one model)" in said
    (found,) = judged(project)
    texts = {one["arm"]: one for one in found["over_texts"]}
    rate = next(c for c in found["comparisons"] if c["arm"] == "rate")
    assert texts["rate"]["low"] < rate["mean_diff"] < texts["rate"]["high"]
    assert "one text, one model)" in (project.folder / "run_1" / "summary.md").read_text("utf-8")


def test_a_run_of_an_older_version_says_that_it_has_no_documents(
    project: Project, tmp_path: Path
) -> None:
    shutil.copytree(project.folder / "run_1", tmp_path / "run_1")
    (tmp_path / "run_1" / "documents.parquet").unlink()
    manifest = read_json(tmp_path / "run_1" / "manifest.json")
    del manifest["sha256"]["documents.parquet"], manifest["digest"]
    write_sealed(tmp_path / "run_1" / "manifest.json", manifest)
    said = cli(tmp_path, "verdict", "run_1").out
    assert "over texts: no interval, since the run has no documents.parquet" in said


def test_the_report_shows_an_arm_that_diverged(project: Project) -> None:
    ended = cli(project.folder, "report", "--features", "broken", "--latents", "8")
    assert ended.code == 0, ended.err
    page = (project.folder / "report.html").read_text(encoding="utf-8")
    assert '"arm":"broken"' in page and "NaN" not in page


def copied(project: Project, folder: Path) -> Path:
    shutil.copytree(project.folder / "run_1", folder / "run_1")
    shutil.copytree(project.folder / "run_1", folder / "run_2")
    manifest = read_json(folder / "run_2" / "manifest.json")
    del manifest["digest"], manifest["sha256"]  # tests change its files by hand
    write_json(folder / "run_2" / "manifest.json", manifest | {"run": "run_2"})
    return folder / "run_2"


def test_runs_of_one_plan_are_shown_together(project: Project, tmp_path: Path) -> None:
    copied(project, tmp_path)
    ended = cli(tmp_path, "verdict", "--json")
    assert [one["run"] for one in json.loads(ended.out)] == ["run_1", "run_2"]


def test_runs_of_different_plans_are_not_compared(project: Project, tmp_path: Path) -> None:
    run_2 = copied(project, tmp_path)
    manifest = read_json(run_2 / "manifest.json")
    manifest["plan"]["sesoi"] = 0.01
    write_json(run_2 / "manifest.json", manifest)
    ended = cli(tmp_path, "verdict")
    assert ended.code == 2 and "the plan (sesoi: 0.005 -> 0.01)" in ended.last
    assert cli(tmp_path, "verdict", "run_2").code == 0


@pytest.mark.parametrize(
    ("column", "value", "words"),
    [
        ("definition", "core/2", "the definition (core/1 -> core/2)"),
        (
            "hook_name",
            "blocks.1.hook_resid_post",
            "hook_name (blocks.2.hook_resid_post -> blocks.1",
        ),
        ("text_digest", "another", "text_digest"),
    ],
)
def test_runs_measured_otherwise_are_not_compared(
    project: Project, tmp_path: Path, column: str, value: str, words: str
) -> None:
    file = copied(project, tmp_path) / "metrics.parquet"
    table = pq.read_table(file)
    index = table.schema.get_field_index(column)
    pq.write_table(table.set_column(index, column, [[value] * len(table)]), file)
    ended = cli(tmp_path, "verdict")
    assert ended.code == 2 and words in ended.last and "one at a time" in ended.last


def test_arms_of_other_definitions_are_refused(project: Project, tmp_path: Path) -> None:
    run_2 = copied(project, tmp_path)
    table = pq.read_table(run_2 / "metrics.parquet")
    index = table.schema.get_field_index("definition")
    values = ["core/2" if row["arm"] == "rate" else row["definition"] for row in table.to_pylist()]
    pq.write_table(table.set_column(index, "definition", [values]), run_2 / "metrics.parquet")
    found = json.loads(cli(tmp_path, "verdict", "run_2", "--json").out)[0]["comparisons"]
    words = {c["arm"]: (c["word"], c["reason"]) for c in found}
    assert words["rate"][0] == "refused" and "core/2" in words["rate"][1]
    assert words["twin"][0] != "refused"


def test_what_is_no_complete_run_is_told(project: Project, tmp_path: Path) -> None:
    for arguments, words in (((), "no complete run"), (("run_9",), "run_9 holds no final_info")):
        ended = cli(tmp_path, "verdict", *arguments)
        assert ended.code == 2 and words in ended.last
    run_2 = copied(project, tmp_path)
    (run_2 / "gate.json").write_text("{}}")
    ended = cli(tmp_path, "verdict", "run_2")
    assert ended.code == 1 and "gate.json is damaged" in ended.last


def test_a_later_change_of_the_plan_is_allowed_and_shown(project: Project, tmp_path: Path) -> None:
    folder = tmp_path / "p"
    shutil.copytree(project.folder, folder, ignore=shutil.ignore_patterns("run_1"))
    changed = Project(folder)
    changed.table((BASELINE, RATE))
    changed.replace("plan.toml", "seeds = 3", "seeds = 2")
    ended = changed.call()
    assert ended.code == 0, ended.err
    assert "deviates from the registered one: seeds: 3 -> 2" in ended.err
    deviations = changed.manifest()["deviations"]
    assert deviations[0] == "seeds: 3 -> 2"
    assert all("run_1: arm" in line and "removed" in line for line in deviations[1:])
    assert r"deviation: seeds: 3 -\> 2" in (folder / "run_1" / "summary.md").read_text()
    assert "deviation from the registered plan: seeds: 3 -> 2" in cli(folder, "verdict").out
    assert judged(changed)[0]["deviations"] == deviations


def test_earlier_attempts_are_kept_and_named(project: Project, tmp_path: Path) -> None:
    folder = tmp_path / "p"
    shutil.copytree(project.folder, folder, ignore=shutil.ignore_patterns("run_1"))
    again = Project(folder)
    again.table((BASELINE, 'Arm("odd", {"train.lrr": 1})'))
    assert again.call().code == 2
    again.table((BASELINE, RATE))
    assert again.call().code == 0
    ended = cli(folder, "attempts", "--json")
    outcomes = [(a["run"], a["outcome"]) for a in json.loads(ended.out)]
    assert outcomes == [("run_1", "complete"), ("run_1", "refused"), ("run_1", "complete")]
    text = (folder / "run_1" / "summary.md").read_text(encoding="utf-8")
    assert "Earlier attempts at run_1" in text and "train.lrr" in text
    assert text.count("complete after") == 1  # the first; this one is the folder itself


def test_plan_check_trains_nothing(tmp_path: Path) -> None:
    made = Project.make(tmp_path / "p", (BASELINE, RATE, SCALED))
    ended = cli(made.folder, "plan", "check", "--json")
    assert ended.code == 0, ended.err
    (found,) = json.loads(ended.out)
    assert (found["run"], found["cells"], found["primary"]) == ("run_1", 10, "fvu")
    assert all(arm["sees"] > 0 for arm in found["arms"][1:])
    assert "scaled" in cli(made.folder, "plan", "check", "run_1").out
    assert not (made.folder / ".saelab").exists() and not (made.folder / "run_1").exists()
    ended = cli(made.folder, "plan", "check", "run_2")
    assert ended.code == 2 and "did you mean 'run_1'" in ended.last


def test_a_launch_that_would_take_too_long_is_refused_before_its_harvest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SAELAB_MEMORY", "999GB")  # so that memory is no reason
    made = Project.make(tmp_path / "p", (BASELINE, RATE), plan=PLAN)
    made.replace("configs/small.toml", "tokens = 8_192", "tokens = 16_384_000_000")
    for ended in (made.call(), cli(made.folder, "plan", "check")):
        assert ended.code == 2 and "over the limit of 1:56:40" in ended.last
    assert not list(made.folder.glob(".saelab/activations/*"))
    assert not (made.folder / "run_1").exists()


def test_a_run_from_the_command_line_prints_its_verdict_as_json(tmp_path: Path) -> None:
    plan = "study = 'small'\nbase = 'configs/small.toml'\ntarget_l0 = 16\nlevels = []\nseeds = 2\n"
    made = Project.make(tmp_path / "p", (BASELINE, RATE), plan=plan)
    ended = cli(made.folder, "run", "run_1", "--json")
    assert ended.code == 0, ended.err
    assert json.loads(ended.out)["comparisons"] == made.manifest()["comparisons"]


def test_the_simulation_prints_its_table_and_a_summary(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two groups of rows; tests/verdict/test_simulation.py runs all of them."""
    monkeypatch.setattr(promises, "row_groups", lambda: [null_rows, family_rows])
    ended = cli(tmp_path, "verdict", "--simulate", "--simulations", "500")
    assert ended.code == 0, ended.err
    table, summary = (part.splitlines() for part in ended.out.split("\n\n"))
    assert table[1].startswith("no effect: helps or hurts") and table[1].endswith("kept")
    assert [line.split("  ")[0] for line in summary[:-1]] == [
        "promise",
        "no effect: helps or hurts",
        "12 arms, not 6: wider interval, no new word",
    ]
    assert summary[-1].startswith("108 rows of 2 promises: 0 broken")
    rows = json.loads(cli(tmp_path, "verdict", "--simulate", "--simulations", "500", "--json").out)
    assert len(rows) + 1 == len(table) and all(row["kept"] for row in rows)
    assert cli(tmp_path, "verdict", "--simulate", "--simulations", "1").code == 2


def test_a_broken_promise_ends_the_simulation_with_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def rows(studies: int, seed: int) -> Iterator[Row]:
        yield from map(functools.partial(dataclasses.replace, observed=0.5), null_rows(100, 0))

    monkeypatch.setattr(promises, "row_groups", lambda: [rows])
    ended = cli(tmp_path, "verdict", "--simulate", "--simulations", "500")
    assert ended.code == 1 and "72 BROKEN" in ended.out


def test_pictures_that_a_shell_names_with_the_runs_are_left_out(
    project: Project, tmp_path: Path
) -> None:
    picture = tmp_path / "run_1_verdict.png"
    picture.write_bytes(b"a picture")
    run = project.folder / "run_1"
    assert chosen_runs([run, picture]) == [run]
    ended = cli(project.folder, "verdict", str(run), str(picture))
    assert ended.code == 0 and ended.out.startswith("run_1:")
    ended = cli(project.folder, "verdict", str(picture))
    assert ended.code == 2 and "run_1_verdict.png" in ended.last
