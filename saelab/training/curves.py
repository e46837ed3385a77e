"""The log of a cell as a thinned table: curves.parquet."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np

from saelab.storage.atomic import write_atomically
from saelab.training.cell import Log, TrainingCell

#: Points kept of each curve.
CURVE_POINTS = 200


def _logged(log: Log) -> list[tuple[str, np.ndarray]]:
    return [(name, column) for name, column in log.columns.items() if log.length]


def write_curves(path: Path, cell: TrainingCell) -> None:
    """The log as a long table: step, tokens, name, value; each point the mean of its bin."""
    import pyarrow as pa
    import pyarrow.parquet as pq

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
    kinds = (pa.int64(), pa.int64(), pa.string(), pa.float64())
    table = pa.table(columns, schema=pa.schema(list(zip(columns, kinds, strict=True))))
    write_atomically(path, lambda temporary: pq.write_table(table, temporary))


def curve(path: Path, name: str) -> list[float]:
    """The points of one value in a file of `write_curves`."""
    import pyarrow.parquet as pq

    table = pq.read_table(path, filters=[("name", "==", name)]).sort_by("step")
    return table.column("value").to_pylist()
