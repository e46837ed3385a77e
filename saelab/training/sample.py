"""The rows of activations that initialise an SAE."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from saelab.data.activations.joined import target_rows, widths
from saelab.data.activations.store import Source, check_rows_differ

#: Rows of the first shard that initialise every cell of a launch.
SAMPLE_ROWS = 65_536


@dataclass(frozen=True, eq=False)
class Sample:
    """Raw rows, the same for all cells of a launch.

    Args:
        x: float32 [n, d_in].
        y: what is reconstructed, float32 [n, d_out]; None where that is x.
        inputs, targets: width of each hook point of x and of y; () for a single one of x and of no
            y.
    """

    x: Tensor
    y: Tensor | None = None
    inputs: tuple[int, ...] = ()
    targets: tuple[int, ...] = ()

    @classmethod
    def of(cls, rows: Tensor | Sample) -> Sample:
        """Returns rows that are reconstructed themselves as a sample, and a sample as it is."""
        return rows if isinstance(rows, Sample) else cls(rows)

    def to(self, device: torch.device | str) -> Sample:
        """Returns the sample on a device."""
        y = None if self.y is None else self.y.to(device)
        return Sample(self.x.to(device), y, inputs=self.inputs, targets=self.targets)

    @property
    def device(self) -> torch.device:
        return self.x.device

    @property
    def target(self) -> Tensor:
        """Rows to be reconstructed, [n, d_out]."""
        return self.x if self.y is None else self.y

    @property
    def d_in(self) -> int | tuple[int, ...]:
        """Width of the input, or of each of its hook points."""
        return self.inputs or self.x.shape[1]

    @property
    def d_out(self) -> int | tuple[int, ...] | None:
        """Likewise of the target; None without one."""
        return None if self.y is None else self.targets or self.y.shape[1]


def initial_sample(source: Source) -> Sample:
    """Returns raw rows of the first shard, float32.

    Rows that are not finite are left out: a cell that meets one in training stops there.

    Raises: SourceError when all rows are the same.
    """
    shard = source.shard(0)
    rows = shard.rows()[0][:SAMPLE_ROWS].float()
    finite, y = rows.isfinite().all(1), target_rows(shard)
    if y is not None:
        y = y[:SAMPLE_ROWS]
        finite &= y.isfinite().all(1)
        y = y[finite]
        check_rows_differ(y, "training targets")
    rows = rows[finite]
    check_rows_differ(rows, "training activations")
    inputs, targets = widths(source)
    several = inputs if len(inputs) > 1 else ()
    return Sample(rows, y, inputs=several, targets=targets)
