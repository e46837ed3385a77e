"""A cell's log as a thinned table: curves.parquet."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np

from saelab.storage.atomic import write_atomically
from saelab.training.cell import Log, TrainingCell

#: Points of each curve in the file.
CURVE_POINTS = 200


def logged_columns(log: Log) -> list[tuple[str, np.ndarray]]:
    """Returns name and values, float32 [steps], of every column; none if nothing was logged."""
    return [(name, column) for name, column in log.columns.items() if log.length]


def write_curves(path: Path, cell: TrainingCell) -> None:
    """Writes the log as a long table: step, tokens, name, value; a point is the mean of its bin."""
    import pyarrow as pa
    import pyarrow.parquet as pq

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
    kinds = (pa.int64(), pa.int64(), pa.string(), pa.float64())
    table = pa.table(columns, schema=pa.schema(list(zip(columns, kinds, strict=True))))
    write_atomically(path, lambda temporary: pq.write_table(table, temporary))


def read_curve(path: Path, name: str) -> list[float]:
    """Reads the points of one value, in the order of steps, from a file of `write_curves`."""
    import pyarrow.parquet as pq

    table = pq.read_table(path, filters=[("name", "==", name)]).sort_by("step")
    return table.column("value").to_pylist()
