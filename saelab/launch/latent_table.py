"""Table of the latents of a finished cell: `latents.parquet`, one line per latent.

latent                                  its index, int64
density                                 share of the held-out rows in which it fires, float64
threshold                               what its pre-activation must pass, where each has one
others                                  what parts know of each latent (`Part.latent_columns`)
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from saelab.sae import SAE
from saelab.storage.parquet import read_columns, write_columns

FILE = "latents.parquet"
#: Columns of every SAE; all others are of its parts.
COMMON = ("latent", "density", "threshold")


def write_latents(path: Path, sae: SAE, density: Tensor) -> None:
    """Writes the file of one trained SAE; density float64 [d_sae]."""
    columns = {"latent": torch.arange(sae.d_sae), "density": density}
    threshold = sae.activation.initial_floor()
    if threshold is not None and threshold.shape == (sae.d_sae,):
        columns["threshold"] = threshold
    for part in sae.parts():
        columns |= part.latent_columns()
    arrays = {name: column.detach().cpu().numpy() for name, column in columns.items()}
    write_columns(path, arrays)


def read_density(path: Path) -> Tensor:
    """The column 'density' of such a file, float64 [d_sae]."""
    column = read_columns(path, {"density": "number"}).column("density")
    return torch.tensor(column.to_pylist(), dtype=torch.float64)
