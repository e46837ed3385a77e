"""The log of a cell as a thinned table: curves.parquet."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from saelab.runs.schema import CURVE_COLUMNS, CURVE_TYPES
from saelab.storage.parquet import read_columns, read_rows, write_columns
from saelab.training.loop import Cell, Log

if TYPE_CHECKING:
    import pyarrow as pa

#: Points kept of each curve.
CURVE_POINTS = 200
#: Columns of the file.
OWN_COLUMNS = ("step", "tokens", "name", "value")


def _logged(log: Log) -> list[tuple[str, np.ndarray]]:
    return [(name, column) for name, column in log.columns.items() if log.length]


def write_curves(path: Path, cell: Cell) -> None:
    """The log as a long table: step, tokens, name, value; each point the mean of its bin."""
    n = cell.log.length
    edges = np.unique(np.linspace(0, n, min(n, CURVE_POINTS) + 1).astype(int))
    columns: dict[str, list[Any]] = {"step": [], "tokens": [], "name": [], "value": []}
    for name, values in _logged(cell.log):
        for low, high in itertools.pairwise(edges):
            some = values[low:high]
            some = some[np.isfinite(some)]
            if some.size:
                columns["step"].append(int(high))
                columns["tokens"].append(int(high) * cell.config.batch_size)
                columns["name"].append(name)
                columns["value"].append(float(some.mean()))
    write_columns(path, columns, {name: CURVE_TYPES[name] for name in OWN_COLUMNS})


def read_curves(path: Path) -> pa.Table:
    """The columns of a file of `write_curves`."""
    return read_columns(path, {name: CURVE_COLUMNS[name] for name in OWN_COLUMNS})


def curve(path: Path, name: str) -> list[float]:
    """The points of one value in a file of `write_curves`, in the order of their steps."""
    rows = read_rows(path, {"name": "text", "step": "whole", "value": "number"}, {"name": name})
    return [row["value"] for row in sorted(rows, key=lambda row: row["step"])]
