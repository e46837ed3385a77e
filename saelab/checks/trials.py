"""Small SAEs on random data in which parts are tried."""

from __future__ import annotations

import torch
from torch import Tensor

from saelab.checks.examples import Case
from saelab.data.activations.stream import Batch
from saelab.sae import SAE, SAEConfig
from saelab.seeding import torch_stream
from saelab.training.loop import Cell
from saelab.training.optim import TrainConfig

#: Sizes of the trials: large enough that a code is sparse, small enough for milliseconds a step.
D_IN, D_SAE, ROWS, STEPS = 16, 512, 48, 40


def rows(seed: int, n: int = ROWS) -> Tensor:
    """Draws rows with a mean and with dimensions of unlike variance, float32 [n, D_IN]."""
    stream = torch_stream(seed, "contract data")
    x = torch.randn(n, D_IN, generator=stream, dtype=torch.float32)
    scale = torch.linspace(0.3, 2, D_IN, dtype=torch.float32)
    return 3 * (x * scale + torch.linspace(-1, 1, D_IN, dtype=torch.float32))


def batch(x: Tensor) -> Batch:
    """Makes a batch of the rows of one context."""
    return Batch(x, torch.arange(len(x), dtype=torch.int64))


def fresh_cell(config: SAEConfig, seed: int, steps: int = STEPS, snapshots: int = 0) -> Cell:
    """Makes a cell that has not been trained."""
    training = TrainConfig(tokens=steps * ROWS, batch_size=ROWS, lr=3e-3)
    return Cell("cell", config, training, rows(seed, 256), seed, snapshots)


def trained_cell(config: SAEConfig, seed: int, steps: int = 3) -> Cell:
    """Makes a cell and trains it for a few steps of a run of STEPS."""
    cell = fresh_cell(config, seed)
    for i in range(steps):
        cell.step(batch(rows(seed + i + 1)))
    return cell


def sparse_sae(case: Case, seed: int, precision: str = "float32") -> SAE:
    """Makes an SAE a few steps old whose code is sparse enough for the sparse path."""
    sae = trained_cell(case.settings(D_SAE, precision=precision), seed).sae
    with torch.no_grad():
        sae.b_enc.sub_(1.5)
        if sae.activation.couples_batch:  # its statistics must fit the new bias
            for i in range(20):
                sae.activation.update(sae(rows(seed + i)))
    return sae
