"""Decoders kept during training, to see later how long features last.

`points` steps, evenly spaced in the logarithm from `FIRST` of the run to its end. Of each: the
decoder's rows at length 1 in float16 (a cosine of two is then within 1e-3 of the true one, and two
that were equal stay so), what a pre-activation must pass to fire where the activation has such a
threshold, and the encoder's bias, both in float32. That is d_sae (2 d_in + 8) bytes a point. A
latent keeps its index for the whole run, also when it is resampled. Taking one reads only.
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
#: decades apart, and some come before the end of a usual warm-up.
FIRST = 0.01


def snapshot_steps(points: int, steps: int) -> list[int]:
    """The steps after which a snapshot is taken, rising; the last is the end. Fewer than `points`
    where two would fall on one step."""
    if points == 0:
        return []
    spaced = np.geomspace(steps, max(1.0, FIRST * steps), points)
    return sorted({round(float(step)) for step in spaced})


class Snapshots:
    """What is kept of one SAE.

    Args:
        points: how many.
        steps: of the run.
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
    def look(self, sae: SAE, step: int) -> None:
        """Keeps a snapshot if one is due after `step` steps."""
        if step not in self.due:
            return
        self.tokens.append(step * self.batch_size)
        self.decoders.append(normalize(sae.W_dec, dim=1).to("cpu", torch.float16))
        self.biases.append(sae.b_enc.detach().cpu().clone())
        threshold = sae.activation.initial_floor()
        if threshold is not None:
            self.thresholds.append(threshold.detach().cpu().float().expand(sae.d_sae).clone())

    def _kept(self) -> dict[str, list[Tensor]]:
        return {"decoder": self.decoders, "b_enc": self.biases, "threshold": self.thresholds}

    def state(self) -> State:
        tensors = {f"{n}/{i}": t for n, kept in self._kept().items() for i, t in enumerate(kept)}
        return State(tensors, {"tokens": self.tokens})

    def restore(self, state: State) -> None:
        self.tokens = list(state.value("tokens"))
        for name, kept in self._kept().items():
            own = state.part(name).tensors
            kept[:] = [own[str(i)] for i in range(len(own))]

    def save(self, path: Path) -> None:
        """Tensors decoder float16 [points, d_sae, d_in], b_enc and, where there is one, threshold,
        float32 [points, d_sae], in the order of tokens int64 [points]."""
        tensors = {
            "tokens": torch.tensor(self.tokens),
            "decoder": torch.stack(self.decoders),
            "b_enc": torch.stack(self.biases),
        }
        if self.thresholds:
            tensors["threshold"] = torch.stack(self.thresholds)
        write_atomically(path, lambda temporary: save_file(tensors, temporary))


def snapshot_bytes(points: int, d_sae: int, d_in: int) -> int:
    """Memory, and disk, of one SAE's snapshots."""
    return points * d_sae * (2 * d_in + 8)
