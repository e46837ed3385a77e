"""Progress lines that a job writes about its cells while it trains and evaluates them.

    {"stage": "train", "arm": .., "seed": .., "level": .., "step": .., "steps": .., "tokens": ..,
     "rate": .., "seconds": .., "values": {"loss": .., "reconstruction": .., "l0": .., "dead": ..}}

A cell's first line has no values but `from_step`: the steps of the checkpoint from which it goes
on, 0 without one.

It reads what the cells have logged and changes nothing, so their bits are the same without it.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from saelab.errors import CellFailure
from saelab.evals.base import Row
from saelab.launch.executors import Advance
from saelab.launch.jobs import TRAINING_SHARE
from saelab.progress.state import DONE, EVALUATE, TRAIN
from saelab.runs.schema import CellId
from saelab.training.cell import TrainingCell

#: Lines of a cell over its training.
POINTS = 100
#: What is said of a cell in training: name -> column of its log.
LOGGED = {"loss": "loss", "reconstruction": "loss.reconstruction", "l0": "l0", "dead": "dead"}
#: And when it is evaluated: name -> metric.
MEASURED = {"fvu": "fvu", "l0": "l0", "dead": "dead_share", "loss_recovered": "loss_recovered"}
MEASURED["ce_rise"] = "ce_rise"
#: Characters kept of a reason, so that a line stays short.
REASON = 500


def line(cell: CellId, stage: str, **values: Any) -> dict[str, Any]:
    """A line of a cell, or of a control subject, that has reached a stage."""
    return {"stage": stage, **cell.as_dict(), **values}


class Reports:
    """Progress lines of the cells of one job.

    Args:
        cells: in training, in the order of `ids`.
        ids: which cells they are.
        advance: takes tokens of the bar, and a line.
    """

    def __init__(
        self, cells: Sequence[TrainingCell], ids: Iterable[CellId], advance: Advance
    ) -> None:
        self._advance, self._start = advance, time.monotonic()
        self._ids = {cell.name: id for cell, id in zip(cells, ids, strict=True)}
        #: TrainingCell -> its steps, tokens and time at its last line.
        self._last = {cell.name: (cell.steps_done, cell.tokens, self._start) for cell in cells}
        for cell in cells:
            self._say(cell, TRAIN, from_step=cell.steps_done)

    def steps(self, steps: int, living: Sequence[TrainingCell]) -> None:
        """After some steps of the living cells, see `training.loop.train`."""
        tokens = sum(steps * cell.config.batch_size for cell in living)
        self._advance(TRAINING_SHARE * tokens)
        for cell in living:
            last, tokens, then = self._last[cell.name]
            if cell.steps_done * POINTS // cell.config.steps == last * POINTS // cell.config.steps:
                continue
            now = time.monotonic()
            self._last[cell.name] = (cell.steps_done, cell.tokens, now)
            rate = round((cell.tokens - tokens) / max(now - then, 1e-9), 1)
            self._say(cell, TRAIN, rate=rate, values=means(cell, last))

    def evaluating(self, cell: TrainingCell) -> None:
        self._say(cell, EVALUATE)

    def done(self, cell: TrainingCell, rows: Iterable[Row], failure: CellFailure | None) -> None:
        """The cell is written, or has stopped."""
        known = {row.metric: row.value for row in rows if not row.slice}
        values = {name: known.get(metric) for name, metric in MEASURED.items()}
        self._say(cell, DONE, values=values, failure=str(failure or "")[:REASON])

    def _say(self, cell: TrainingCell, stage: str, **values: Any) -> None:
        where = {"step": cell.steps_done, "steps": cell.config.steps, "tokens": cell.tokens}
        seconds = round(time.monotonic() - self._start, 3)
        self._advance(0.0, line(self._ids[cell.name], stage, **where, seconds=seconds, **values))


def means(cell: TrainingCell, since: int) -> dict[str, float]:
    """Means of what a cell has logged since a step; NaN where a step's value was."""
    columns, length = cell.log.columns, cell.log.length
    names = {name: column for name, column in LOGGED.items() if column in columns}
    return {name: float(np.mean(columns[column][since:length])) for name, column in names.items()}
