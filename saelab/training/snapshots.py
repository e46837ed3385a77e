"""Decoders stored during training, which show later how long features last.

A snapshot is taken after `points` steps, evenly spaced on a logarithmic scale from `FIRST` of the
run to its end. It holds the decoder rows at length 1 in float16 (the cosine of two rows is then
within 1e-3 of the true one, and equal rows stay equal), the threshold that a pre-activation must
pass to fire, if the activation has one, and the encoder bias, both in float32. That is
d_sae (2 d_in + 8) bytes per snapshot. A latent keeps its index for the whole run, even when it is
resampled. Taking a snapshot changes nothing.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.nn.functional import normalize

from saelab.sae import SAE
from saelab.storage.atomic import write_atomically
from saelab.training.state import State

#: Share of the run after which the first snapshot is taken. Our choice: 10 snapshots are then 0.22
#: decades apart, and some precede the end of a usual warm-up.
FIRST = 0.01


def snapshot_steps(points: int, steps: int) -> list[int]:
    """Returns the steps after which a snapshot is taken, in rising order; the last is the end of
    the run. There are fewer than `points` if two would fall on one step."""
    if points == 0:
        return []
    spaced = np.geomspace(steps, max(1.0, FIRST * steps), points)
    return sorted({round(float(step)) for step in spaced})


class Snapshots:
    """The snapshots of one SAE.

    Args:
        points: how many are taken.
        steps: number of steps of the run.
        batch_size: rows that the stream hands out per step.
    """

    def __init__(self, points: int, steps: int, batch_size: int) -> None:
        self.due = snapshot_steps(points, steps)
        self.batch_size = batch_size
        self.tokens: list[int] = []
        self.decoders: list[Tensor] = []
        self.biases: list[Tensor] = []
        self.thresholds: list[Tensor] = []

    @torch.no_grad()
    def take_if_due(self, sae: SAE, step: int) -> None:
        """Takes a snapshot if one is due after `step` steps."""
        if step not in self.due:
            return
        self.tokens.append(step * self.batch_size)
        self.decoders.append(normalize(sae.W_dec, dim=1).to("cpu", torch.float16))
        self.biases.append(sae.b_enc.detach().cpu().clone())
        threshold = sae.activation.initial_floor()
        if threshold is not None:
            self.thresholds.append(threshold.detach().cpu().float().expand(sae.d_sae).clone())

    def _columns(self) -> dict[str, list[Tensor]]:
        """Returns the lists themselves, one tensor per snapshot, under their names in a state."""
        return {"decoder": self.decoders, "b_enc": self.biases, "threshold": self.thresholds}

    def state(self) -> State:
        """Returns all snapshots taken so far, not copied."""
        columns = self._columns()
        tensors = {f"{n}/{i}": t for n, column in columns.items() for i, t in enumerate(column)}
        return State(tensors, {"tokens": self.tokens})

    def restore(self, state: State) -> None:
        """Replaces the snapshots by those of a state.

        Raises: DamageError when the state holds none.
        """
        self.tokens = list(state.value("tokens"))
        for name, column in self._columns().items():
            stored = state.part(name).tensors
            column[:] = [stored[str(i)] for i in range(len(stored))]

    def save(self, path: Path) -> None:
        """Writes a safetensors file: decoder, float16 [points, d_sae, d_in]; b_enc and, if there is
        one, threshold, float32 [points, d_sae]; all in the order of tokens, int64 [points]."""
        tensors = {
            "tokens": torch.tensor(self.tokens, dtype=torch.int64),
            "decoder": torch.stack(self.decoders),
            "b_enc": torch.stack(self.biases),
        }
        if self.thresholds:
            tensors["threshold"] = torch.stack(self.thresholds)
        write_atomically(path, lambda temporary: save_file(tensors, temporary))


def snapshot_bytes(points: int, d_sae: int, d_in: int) -> int:
    """Returns the bytes that the snapshots of one SAE take, in memory as on disk."""
    return points * d_sae * (2 * d_in + 8)
