"""State of a run, computed only from the lines of its metrics.jsonl.

Every reader of the lines has the same state: the launch, and `saelab watch` in another process.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from saelab.runs.schema import CONTROL, CellId

#: Stages of a cell; the lines of all other stages are of the launch.
TRAIN, EVALUATE, DONE = "train", "evaluate", "done"
LAUNCH, CELLS, END = "launch", "cells", "end"


@dataclass(kw_only=True)
class Stage:
    """Stage of the launch.

    Args:
        name: harvest, train ...
        done, total: in units.
        unit: tokens, SAEs ...
        seconds: since the stage began.
    """

    name: str
    done: float
    total: float
    unit: str
    seconds: float

    @property
    def share(self) -> float:
        """Finished share, between 0 and 1."""
        return min(1.0, self.done / self.total) if self.total > 0 else 0.0

    @property
    def left(self) -> float | None:
        """Seconds left; None while nothing is done."""
        missing = max(0.0, self.total - self.done)
        return missing * self.seconds / self.done if self.done > 0 else None


@dataclass(kw_only=True)
class CellState:
    """Progress of a cell, and the values that were measured last.

    Args:
        arm, seed, level: identity of the cell.
        stage: 'train', 'evaluate' or 'done'.
        step, steps: finished steps and all steps.
        tokens: tokens trained on so far.
        rate: tokens per second since the previous line; None when it is not training.
        seconds: seconds since its job began.
        values: name -> value; None for a number that is not finite.
        failure: why it stopped; '' when it did not.
    """

    arm: str
    seed: int
    level: float
    stage: str = TRAIN
    step: int = 0
    steps: int = 0
    tokens: int = 0
    rate: float | None = None
    seconds: float = 0.0
    values: dict[str, float | None] = field(default_factory=dict)
    failure: str = ""

    @property
    def id(self) -> CellId:
        """Which cell it is."""
        return CellId(self.arm, self.seed, self.level)

    @property
    def control(self) -> bool:
        """True for a cell of a control arm."""
        return self.arm.startswith(CONTROL)


@dataclass
class State:
    """State of the run's last launch.

    Args:
        run, title: its name and its title in the run table.
        pid, host, started: its process; `started` distinguishes it from a later one of the same
            number.
        began, now: time of its first and of its last line, in seconds since 1970.
        outcome: how it ended, see `run.py`; '' while it is running.
        reason: why it ended so.
        open, cached: cells to train and cells that were finished before.
        stages, cells: current stages of the launch and cells in progress.
        finished: finished cells, in the order in which they ended.
    """

    run: str = ""
    title: str = ""
    pid: int = 0
    host: str = ""
    started: str = ""
    began: float = 0.0
    now: float = 0.0
    outcome: str = ""
    reason: str = ""
    open: int = 0
    cached: int = 0
    stages: dict[str, Stage] = field(default_factory=dict)
    cells: dict[tuple[str, int, float], CellState] = field(default_factory=dict)
    finished: list[CellState] = field(default_factory=list)
    _before: int = 0

    def fold(self, line: Mapping[str, Any]) -> None:
        """Updates the state by one line; a line that can't be read changes nothing."""
        try:
            self._fold(line)
            self.now = float(line["time"])
        except (KeyError, TypeError, ValueError):
            return

    def _fold(self, line: Mapping[str, Any]) -> None:
        stage = line["stage"]
        if stage == LAUNCH:
            self.__init__(began=float(line["time"]))
            for name in ("run", "title", "pid", "host", "started"):
                setattr(self, name, line.get(name, getattr(self, name)))
        elif stage == CELLS:
            self.open, self.cached = int(line["open"]), int(line["cached"])
            self._before = len(self._study_cells())
        elif stage == END:
            self.outcome, self.reason = str(line["outcome"]), str(line.get("reason") or "")
            self.stages, self.cells = {}, {}
        elif "arm" in line:
            self._fold_cell(line)
        elif line.get("ended"):
            self.stages.pop(stage, None)
        else:
            done, total = float(line["done"]), float(line["total"])
            seconds = float(line.get("seconds") or 0.0)
            self.stages[stage] = Stage(
                name=stage, done=done, total=total, unit=str(line.get("unit", "")), seconds=seconds
            )

    def _fold_cell(self, line: Mapping[str, Any]) -> None:
        names = CellState.__dataclass_fields__
        cell = CellState(**{name: line[name] for name in names if line.get(name) is not None})
        key = (cell.arm, cell.seed, cell.level)
        if cell.stage == DONE:
            self.cells.pop(key, None)
            self.finished.append(cell)
        else:
            self.cells[key] = cell

    def _study_cells(self) -> list[CellState]:
        return [cell for cell in self.finished if not cell.control]

    @property
    def total(self) -> int:
        """Number of cells of the run, without controls."""
        return self.open + self.cached

    @property
    def done(self) -> int:
        """Number of finished cells among them, including cached ones."""
        return self.cached + len(self._study_cells()) - self._before

    @property
    def failed(self) -> int:
        """Number of cells that stopped with a failure, without controls."""
        return sum(bool(cell.failure) for cell in self._study_cells())

    @property
    def rate(self) -> float:
        """Tokens per second over all cells that are training now."""
        return sum(cell.rate or 0.0 for cell in self.cells.values())

    @property
    def left(self) -> float | None:
        """Seconds until the current stages end; None without an estimate."""
        estimates = [stage.left for stage in self.stages.values() if stage.left is not None]
        return max(estimates, default=None)

    def as_dict(self) -> dict[str, Any]:
        """Returns plain data, for programs."""
        return {
            **{name: getattr(self, name) for name in ("run", "title", "outcome", "reason")},
            "seconds": round(self.now - self.began, 3),
            "seconds_left": self.left,
            "tokens_per_second": self.rate,
            "cells": {name: getattr(self, name) for name in ("total", "done", "failed", "cached")},
            "stages": [asdict(stage) for stage in self.stages.values()],
            "running": [asdict(cell) for cell in self.cells.values()],
            "finished": [asdict(cell) for cell in self.finished],
        }
