"""The rows of activations that initialise an SAE."""

from __future__ import annotations

import torch

from saelab.data.activations.store import Source

#: Rows of the first shard that initialise every cell of a launch.
SAMPLE_ROWS = 65_536


def initial_sample(source: Source) -> torch.Tensor:
    """Raw rows [n, d_in] of the first shard: they initialise every cell of a launch.

    One that is not finite is left out: the cell that meets it in training stops there.
    """
    rows = source.shard(0).rows()[0][:SAMPLE_ROWS].float()
    return rows[rows.isfinite().all(1)]
