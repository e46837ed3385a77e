"""Several runs at once: their cells are trained as one list, and none twice."""

from __future__ import annotations

import re
from pathlib import Path

from projects import BASELINE, PLAN, RATE, SCALED, Project, cli

TWO = f"""\
RUNS = {{
    "run_1": Run("One", [{BASELINE}, {RATE}]),
    "run_2": Run("Two", [{BASELINE}, {SCALED}]),
}}
"""


def two_runs(folder: Path) -> Project:
    few = PLAN.replace("seeds = 3", "seeds = 2").replace("levels = [8]", "levels = []")
    project = Project.make(folder, plan=few)
    text = (folder / "experiment.py").read_text(encoding="utf-8")
    table = next(line for line in text.splitlines() if line.startswith("RUNS = "))
    project.replace("experiment.py", table, TWO)
    return project


def test_runs_together_are_as_each_by_itself(tmp_path: Path) -> None:
    together, alone = two_runs(tmp_path / "together"), two_runs(tmp_path / "alone")
    ended = cli(together.folder, "run", "run_1", "run_2")
    assert ended.code == 0, ended.err
    for run in ("run_1", "run_2"):
        assert cli(alone.folder, "run", run).code == 0
        assert together.info(run) == alone.info(run)
        assert together.weights(run) == alone.weights(run)
    trained = [int(n) for n in re.findall(r"(\d+) cells to train", ended.err)]
    both = sum(len(together.weights(run)) for run in ("run_1", "run_2"))
    shared = sum(name.startswith("baseline") for name in together.weights("run_1"))
    assert trained == [both - shared]
    again = cli(together.folder, "run", "run_1", "run_2")
    assert again.code == 2
    assert "run_1" in again.last and "is a complete run" in again.last
