"""A cell's log as a thinned table: curves.parquet."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from saelab.runs.schema import CURVE_COLUMNS, CURVE_TYPES
from saelab.storage.parquet import read_columns, read_rows, write_columns
from saelab.training.cell import Log, TrainingCell

if TYPE_CHECKING:
    import pyarrow as pa

#: Points of each curve in the file.
CURVE_POINTS = 200
#: Columns of the file.
OWN_COLUMNS = ("step", "tokens", "name", "value")


def logged_columns(log: Log) -> list[tuple[str, np.ndarray]]:
    """Returns name and values, float32 [steps], of every column; none if nothing was logged."""
    return [(name, column) for name, column in log.columns.items() if log.length]


def write_curves(path: Path, cell: TrainingCell) -> None:
    """Writes the log as a long table: step, tokens, name, value; a point is the mean of its bin."""
    n = cell.log.length
    edges = np.unique(np.linspace(0, n, min(n, CURVE_POINTS) + 1).astype(int))
    columns: dict[str, list[Any]] = {"step": [], "tokens": [], "name": [], "value": []}
    for name, values in logged_columns(cell.log):
        for low, high in itertools.pairwise(edges):
            finite = values[low:high]
            finite = finite[np.isfinite(finite)]
            if finite.size:
                columns["step"].append(int(high))
                columns["tokens"].append(int(high) * cell.config.batch_size)
                columns["name"].append(name)
                columns["value"].append(float(finite.mean()))
    write_columns(path, columns, {name: CURVE_TYPES[name] for name in OWN_COLUMNS})


def read_curves(path: Path) -> pa.Table:
    """Reads the columns of a file of `write_curves`."""
    return read_columns(path, {name: CURVE_COLUMNS[name] for name in OWN_COLUMNS})


def read_curve(path: Path, name: str) -> list[float]:
    """Reads the points of one value, in the order of steps, from a file of `write_curves`."""
    rows = read_rows(path, {"name": "text", "step": "whole", "value": "number"}, {"name": name})
    return [row["value"] for row in sorted(rows, key=lambda row: row["step"])]
