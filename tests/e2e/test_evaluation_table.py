"""A new evaluation is one entry of the table: a launch that asks for it runs it, `saelab eval` has
it, and `--help` describes it."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pyarrow.parquet as pq
import pytest
from projects import BASE, BASELINE, RATE, Ended, Project, cli

from saelab.evals import EVALUATIONS, Evaluation, evals_help
from saelab.evals.base import Row, SeedPair, Subject, Training, number
from saelab.evals.measure import EvalData
from saelab.launch.controls import SUBJECTS
from saelab.runs.schema import TWIN

PLAN = (
    "study = 'small'\nbase = 'configs/small.toml'\ntarget_l0 = 16\nlevels = [8]\n"
    "seeds = 2\nseeds_other = 2\nseeds_levels = 1\n"
)
WATCHED = BASE.replace("controllers = []", 'controllers = []\nobservers = ["lifetimes"]')


def toy(subject: Subject, data: EvalData) -> list[Row]:
    return [number("toy.rows", len(data.core.rows[0]) + subject.d_sae, "toy/1")]


def toy_log(_: Subject, __: EvalData, training: Training) -> list[Row]:
    return [number("toy.steps", training.log.length, "toy/1")]


def toy_seeds(pairs: list[SeedPair] | str) -> list[Row]:
    return [number("toy.pairs", len(pairs), "toy/1")]


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Project:
    """One finished run without the new evaluations."""
    folder = tmp_path_factory.mktemp("table") / "project"
    made = Project.make(folder, (BASELINE, RATE), plan=PLAN, base=WATCHED)
    ended = made.call()
    assert ended.code == 0, ended.err
    return made


@pytest.fixture
def registered(monkeypatch: pytest.MonkeyPatch) -> tuple[str, ...]:
    """Names of three new entries of the table."""
    module = ModuleType("toy_evaluations")
    monkeypatch.setitem(sys.modules, module.__name__, module)
    for function, needs in ((toy, "subject"), (toy_log, "log"), (toy_seeds, "seeds")):
        name = function.__name__
        setattr(module, name, function)
        place = f"{module.__name__}:{name}"
        entry = Evaluation(
            name=name, function=place, at="asked", needs=needs, description=f"description of {name}"
        )  # type: ignore[arg-type]
        monkeypatch.setitem(EVALUATIONS, name, entry)
    return ("toy", "toy_log", "toy_seeds")


def refused(ended: Ended, *words: str) -> None:
    """Ended with one sentence that holds the words."""
    assert ended.code == 2, ended.err
    assert "Traceback" not in ended.err
    assert all(word in ended.last for word in words), ended.last


def metrics(project: Project) -> list[dict[str, Any]]:
    return pq.read_table(project.folder / "run_1" / "metrics.parquet").to_pylist()


def test_a_launch_measures_what_it_is_asked_for(
    project: Project, registered: tuple[str, ...], tmp_path: Path
) -> None:
    before, project = metrics(project), project.copied(tmp_path / "project")
    cells = project.finished_cells()
    ended = project.again()
    assert ended.code == 0, ended.err
    assert project.finished_cells() == cells  # an entry that nobody asks for changes no key
    assert metrics(project) == before

    changes = f'{{"evaluation.extra": {list(registered)}}}'
    project.table((BASELINE, RATE), changes=changes)
    ended = project.again()
    assert ended.code == 0, ended.err
    rows = metrics(project)
    assert [row for row in rows if row["definition"] != "toy/1"] == before
    found: dict[str, dict[tuple[str, float], list[float]]] = {}
    for row in rows:
        if row["definition"] == "toy/1":
            cell = (row["arm"], row["level"])
            found.setdefault(row["metric"], {}).setdefault(cell, []).append(row["value"])
    arms = [("baseline", 16), ("rate", 16)]
    controls = [(f"control:{name}", 16) for name in (*SUBJECTS, TWIN)]
    tokens = next(row["tokens"] for row in rows)
    assert set(found["toy.rows"]) == {*arms, *controls, ("control:frozen decoder", 16)}
    assert all(found["toy.rows"][arm] == [tokens + 256] * 2 for arm in arms)
    trained = ("control:frozen decoder", f"control:{TWIN}")
    assert set(found["toy.steps"]) == {*arms, *((name, 16) for name in trained)}
    assert all(found["toy.steps"][arm] == [64] * 2 for arm in arms)
    assert found["toy.pairs"] == {arm: [1, 1] for arm in arms}


def test_a_saved_sae_has_the_rows_that_need_it_alone(
    project: Project, registered: tuple[str, ...]
) -> None:
    ended = cli(project.folder, "eval", "run_1", "--evals", "survival,toy,decoder", "--json")
    assert ended.code == 0, ended.err
    rows = json.loads(ended.out)
    wanted = ("survival/1", "toy/1", "decoder/1")
    assert tuple(dict.fromkeys(row["definition"] for row in rows)) == wanted
    names = ("arm", "seed", "level", "metric", "slice", "value", "reason")
    launched = [{name: row[name] for name in names} for row in metrics(project)]
    for row in rows:
        if row["definition"] != "toy/1":
            assert {name: row[name] for name in names} in launched
    at_risk = [row["value"] for row in rows if row["metric"] == "lifetime.at_risk"]
    assert at_risk and min(at_risk) > 0


def test_help_describes_a_new_evaluation(registered: tuple[str, ...]) -> None:
    assert "toy: description of toy" in evals_help()
    assert all(name in evals_help() for name in registered)


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("convergence", "needs the log of every training step"),
        ("snapshots", "needs the decoders saved during training"),
        ("seeds", "needs the SAEs of the arm's other seeds"),
        ("cor", "did you mean 'core'?"),
    ],
)
def test_what_a_saved_sae_cannot_have_is_refused(project: Project, name: str, reason: str) -> None:
    refused(cli(project.folder, "eval", "run_1", "--evals", f"core,{name}"), name, reason)


@pytest.mark.parametrize(
    ("name", "reason"),
    [("model_channel", "did you mean 'model_channels'?"), ("core", "is measured in every launch")],
)
def test_a_launch_refuses_other_names(project: Project, name: str, reason: str) -> None:
    ended = cli(project.folder, "eval", "run_1", "--set", f'evaluation.extra=["{name}"]')
    refused(ended, "evaluation.extra", name, reason)
