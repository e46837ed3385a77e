"""The rows of activations that initialise an SAE."""

from __future__ import annotations

import torch

from saelab.data.activations.store import Source
from saelab.errors import SourceError
from saelab.runtime.counting import count

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


def check_rows_differ(rows: torch.Tensor, what: str) -> None:
    """Raises: SourceError when all rows [n, d] are the same, since no SAE can explain a variance of
    0 and none would be to blame."""
    if not len(rows) or bool((rows == rows[:1]).all()):
        raise SourceError(
            f"all {count(len(rows), 'row')} of the {what} are the same, so there is nothing to "
            "reconstruct: name another hook, other texts or other activations"
        )
