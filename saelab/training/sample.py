"""The rows of activations that initialise an SAE."""

from __future__ import annotations

import torch

from saelab.data.activations.store import Source, check_rows_differ

#: Rows of the first shard that initialise every cell of a launch.
SAMPLE_ROWS = 65_536


def initial_sample(source: Source) -> torch.Tensor:
    """Returns raw rows, float32 [n, d_in], of the first shard.

    Rows that are not finite are left out: a cell that meets one in training stops there.

    Raises: SourceError when all rows are the same.
    """
    rows = source.shard(0).rows()[0][:SAMPLE_ROWS].float()
    rows = rows[rows.isfinite().all(1)]
    check_rows_differ(rows, "training activations")
    return rows
