"""An autonomous driver of the AI-Scientist kind in a folder made by `saelab template`.

It edits experiment.py alone, by search and replace; starts `python experiment.py --out_dir=run_i`
under a time limit; keeps a copy of experiment.py beside each run; deletes a run that failed and
uses its number again; and sees nothing but `means` and the end of stderr.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from projects import (
    BASE,
    CHARACTERS,
    Ended,
    Project,
    cli,
    environment,
    group_is_gone,
    run,
    stop,
    wait_for,
)

from saelab.data.text import stdlib
from saelab.seeding import study_seeds
from saelab.storage.atomic import read_json

PLAN = """\
study = "driven"
base = "configs/small.toml"
target_l0 = 16
levels = []
seeds = 2
"""
MAIN = 'if __name__ == "__main__":'
PLACE = "# ---- settings that several arms share"
#: What a model might write at the marked place, after the example that stands there.
LOSS = """\
class HarmlessConfig(PartConfig):
    kind: Literal["harmless"] = "harmless"
    weight: float = 0.0

    def build(self, dims: Dims) -> "Harmless":
        return Harmless(self.weight)


class Harmless(LossTerm):
    def __init__(self, weight: float) -> None:
        super().__init__()
        self.weight = weight

    def loss(self, p: Pass):
        return self.weight * p.code.values.abs().mean()


saelab.register("loss", HarmlessConfig)

"""


def small(folder: Path) -> Project:
    """A folder made by `saelab template`, with a base and plan that take seconds."""
    assert cli(folder.parent, "template", folder.name).code == 0
    project = Project(folder)
    project.write("plan.toml", PLAN)
    project.write("configs/small.toml", BASE.replace("16_384", "8_192"))
    for split, size in CHARACTERS.items():
        project.write(f"{split}.txt", "\n".join(stdlib.texts(split))[:size])
    return project


@dataclass
class Driver:
    """What it remembers: the next number, and what it was shown."""

    project: Project
    number: int = 1
    shown: dict[int, dict] = field(default_factory=dict)
    errors: list[str] = field(default_factory=list)

    @property
    def name(self) -> str:
        return f"run_{self.number}"

    def edit(self, old: str, new: str) -> None:
        self.project.replace("experiment.py", old, new)

    def add_run(self, arms: str) -> None:
        entry = f'RUNS["{self.name}"] = Run("Run {self.number}", [BASE, {arms}])\n\n'
        self.edit(MAIN, entry + MAIN)

    def start(self) -> Ended:
        """One attempt, as it is made without a time-out."""
        shutil.copy(self.project.folder / "experiment.py", self._file(f"{self.name}.py"))
        ended = run(
            self.project.folder,
            "experiment.py",
            f"--out_dir={self.name}",
            variables={"SAELAB_WORKERS": "1"},
        )
        if ended.code != 0:
            self._failed(ended.err[-1500:])
        else:
            info = read_json(self._file(self.name) / "final_info.json")
            self.shown[self.number] = {arm: group["means"] for arm, group in info.items()}
            self.number += 1
        return ended

    def start_and_time_out(self, when: Callable[[], bool]) -> int:
        """One attempt that is killed: the process it started, and no other."""
        shutil.copy(self.project.folder / "experiment.py", self._file(f"{self.name}.py"))
        process = subprocess.Popen(
            [sys.executable, "experiment.py", f"--out_dir={self.name}"],
            cwd=self.project.folder,
            env=environment(SAELAB_WORKERS="2"),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            text=True,
            start_new_session=True,
        )
        try:
            wait_for(when, "the time limit")
            process.kill()
            process.wait()
            wait_for(lambda: group_is_gone(process.pid), "the workers to end", 30)
        finally:
            stop(process)
        self._failed("the run was stopped by its time limit")
        return process.pid

    def _failed(self, why: str) -> None:
        self.errors.append(why)
        shutil.rmtree(self._file(self.name), ignore_errors=True)

    def _file(self, name: str) -> Path:
        return self.project.folder / name


def arm(name: str, rate: float) -> str:
    return f'Arm("{name}", {{"train.lr": {rate}}}, "another rate", primary=True)'


# ---------------------------------------------------------------- the folder


def test_the_template_is_complete_for_a_driver(tmp_path: Path) -> None:
    ended = cli(tmp_path, "template", "study")
    assert ended.code == 0, ended.err
    assert "no run_0 yet" in ended.out
    folder = tmp_path / "study"
    prompt = read_json(folder / "prompt.json")
    assert set(prompt) == {"system", "task_description"} and all(prompt.values())
    seeds, ideas = read_json(folder / "seed_ideas.json"), read_json(folder / "ideas.json")
    fields = {"Name", "Title", "Experiment", "Interestingness", "Feasibility", "Novelty"}
    assert [set(idea) for idea in seeds] == [fields] * 2
    assert [set(idea) for idea in ideas] == [fields | {"novel"}] * 2
    assert [idea["Experiment"].split(".")[0] for idea in seeds] == ["Idea A", "Idea B"]
    assert all(idea["Name"].isidentifier() for idea in ideas)
    latex = (folder / "latex" / "template.tex").read_text(encoding="utf-8")
    assert r"\begin{filecontents}{references.bib}" in latex and r"\end{document}" in latex
    experiment = (folder / "experiment.py").read_text(encoding="utf-8")
    assert len(experiment.splitlines()) <= 220 and "a new part may be written here" in experiment
    assert "labels" in (folder / "plot.py").read_text(encoding="utf-8")
    ended = cli(folder, "plan", "check", "run_1", "--json")  # the shipped table runs from here
    assert json.loads(ended.out)[0]["cells"] > 30
    again = cli(tmp_path, "template", "study")
    assert again.code == 2 and "not empty" in again.last


def test_a_baseline_of_another_plan_is_not_put_into_a_template(tmp_path: Path) -> None:
    project = small(tmp_path / "small")
    driver = Driver(project, 0)
    driver.add_run(arm("rate", 2e-3))
    assert project.call("--out_dir=run_0").code == 0
    ended = cli(project.folder, "template", "other")  # it would be taken from here by itself
    assert ended.code == 2 and "another plan (study: " in ended.last
    assert not (project.folder / "other").exists()


# ---------------------------------------------------------------- one run, in this process


def test_a_loss_term_and_an_arm_by_search_and_replace_get_a_verdict(tmp_path: Path) -> None:
    driver = Driver(small(tmp_path / "study"))
    driver.edit(PLACE, f"{LOSS}\n{PLACE}")
    harmful = '{"sae.losses+": {"kind": "harmless", "weight": 0.3}}'
    idle = '{"sae.losses+": {"kind": "harmless"}}'
    example = '{"sae.losses+": {"kind": "squared_code", "coefficient": 0.002}}'
    driver.add_run(
        f'Arm("penalty", {harmful}, "new", primary=True), Arm("idle", {idle}, "weight 0"), '
        f'Arm("example", {example}, "the loss that experiment.py shows")'
    )
    ended = driver.project.call()
    assert ended.code == 0, ended.err
    means = {name: group["means"] for name, group in driver.project.info().items()}
    assert means["penalty"]["verdict.fvu"] in ("hurts", "equivalent", "cannot tell yet")
    assert means["penalty"]["diff.fvu"] > 0
    assert (means["idle"]["verdict.fvu"], means["idle"]["diff.fvu"]) == ("equivalent", 0.0)
    assert means["example"]["diff.fvu"] > 0


# ---------------------------------------------------------------- ten runs in a row


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="workers are bound on Linux only")
def test_ten_runs_in_a_row(tmp_path: Path) -> None:
    project = small(tmp_path / "study")
    driver = Driver(project)
    for rate in (2e-3, 3e-3):  # run_1, run_2
        driver.add_run(arm("rate", rate))
        assert driver.start().code == 0
    # run_3: a bad edit ends with the error as its last line, and nothing is left of it
    driver.add_run('Arm("typo", {"train.lrr": 1e-3})')
    ended = driver.start()
    assert ended.code == 2 and "did you mean 'lr'" in driver.errors[-1]
    assert not (project.folder / "run_3").exists() and driver.name == "run_3"
    driver.edit('"train.lrr"', '"train.lr"')
    driver.edit(f'RUNS["{driver.name}"] = Run(', f"RUNS[{driver.name}] = Run(")  # not even a name
    ended = driver.start()
    assert ended.code == 1 and "NameError: name 'run_3' is not defined" in driver.errors[-1]
    # run_3 again: the driver mends it, and adds a loss term of its own
    driver.edit("RUNS[run_3] = Run(", 'RUNS["run_3"] = Run(')
    driver.edit(
        'Arm("typo", {"train.lr": 1e-3})', 'Arm("own", {"sae.losses+": {"kind": "harmless"}})'
    )
    driver.edit(PLACE, f"{LOSS}\n{PLACE}")
    assert driver.start().code == 0
    assert driver.shown[3]["own"]["verdict.fvu"] == "equivalent"
    # run_4: killed by the time limit when some of its cells are there; the same number goes on
    driver.add_run(", ".join(arm(f"a{i}", (i + 5) * 1e-3) for i in range(4)))
    before = len(project.finished_cells())
    driver.start_and_time_out(lambda: len(project.finished_cells()) > before + 1)
    assert driver.name == "run_4" and not (project.folder / "run_4").exists()
    ended = driver.start()
    assert ended.code == 0 and "(0 in the cache)" not in ended.err
    for i in range(5, 11):
        driver.add_run(arm("rate", i * 1e-3 + 5e-4))
        assert driver.start().code == 0, driver.errors[-1]
    assert driver.number == 11 and sorted(driver.shown) == list(range(1, 11))

    ledger = json.loads(cli(project.folder, "attempts", "--json").out)
    assert [a["number"] for a in ledger] == list(range(1, len(ledger) + 1))
    outcomes = [(a["run"], a["outcome"]) for a in ledger]
    assert outcomes == [
        ("run_1", "complete"),
        ("run_2", "complete"),
        ("run_3", "refused"),  # the edit that Python itself refused never came to the front door
        ("run_3", "complete"),
        ("run_4", "no end"),
        ("run_4", "complete"),
        *((f"run_{i}", "complete") for i in range(5, 11)),
    ]
    for i in range(1, 11):
        kept = (project.folder / f"run_{i}.py").read_text(encoding="utf-8")
        added = [f'RUNS["run_{number}"] = Run(' in kept for number in (i, i + 1)]
        assert added == [True, False]
        assert driver.shown[i].keys() >= {"baseline"}
        assert all(len(means) <= 40 for means in driver.shown[i].values())
    judged = json.loads(cli(project.folder, "verdict", "--json").out)
    assert [one["run"] for one in judged] == [f"run_{i}" for i in range(1, 11)]
    assert [one["exploratory"] for one in judged] == [True] * 9 + [False]
    for one in judged:
        for c in one["comparisons"]:
            means = driver.shown[int(one["run"].removeprefix("run_"))][c["arm"]]
            assert means["verdict.fvu"] == c["word"]
    confirmed = set(project.manifest("run_10")["seeds"])
    assert confirmed == set(study_seeds("driven", "confirm", 2))
    assert not confirmed & set(project.manifest("run_9")["seeds"])
