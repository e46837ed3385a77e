"""Held-out text that no metric reads, on which the L0 of an SAE in training is measured.

A controller holds the L0 of training batches, and that of held-out text differs: it is other text,
and a language model may have memorised what it was trained on. So in the second half of a run the
loop measures, every few steps, the L0 of the present SAE in evaluation mode on a small part of the
calibration text, and hands it to every part that asks for it (`Part.needs_calibration`,
`Part.calibrate`).

Many small measurements and not a few large ones: from step to step L0 moves by 1 to 3% on the
embedded model while the learning rate is high, which no average over batches follows. Over many
measurements that is the same on both texts. Most of them late, because the ratio depends on the
batches: shards of the embedded default differ by up to 1.5%, and an SAE's L0 falls by another 0.8%
on rows that it has just been trained on, so that only the last shard's ratio is that of the end.

All parts together read the text once. The order of the parts follows the seed, so that arms are
calibrated alike and seeds differ. Nothing else depends on a measurement: it draws no random number
and changes no statistics.
"""

from __future__ import annotations

import math
from functools import cached_property

import torch
from torch import Tensor

from saelab.data.activations.store import Source
from saelab.data.activations.stream import Batch
from saelab.sae import SAE

#: Shares of the run between which L0 is measured. Our choice: from when L0 is at its target, until
#: the learning rate is so low that a controller reaches little.
FIRST, LAST = 0.5, 0.98
#: Measurements of a run, at most. Our choice: the noise of L0 between steps falls to 0.2%.
MEASUREMENTS = 80
#: Most rows that all measurements of a run read, as a share of its training rows. Our choice: they
#: took 5.5 to 5.8% of the training of A2 on the embedded default (docs/decisions/0015); fewer rows
#: make the ratio noisier.
MOST_ROWS = 0.08


def calibration_steps(steps: int) -> dict[int, int]:
    """Returns the numbers of steps done after which L0 is measured -> number of the measurement.

    They lie closer and closer: what counts is the end, but a controller needs time for the first
    correction.
    """
    left = [1 - i / MEASUREMENTS for i in range(MEASUREMENTS)]
    shares = [LAST - (LAST - FIRST) * x**2 for x in left]
    after = sorted({max(1, round(share * steps)) for share in shares})
    return {step: i for i, step in enumerate(after)}


class CalibrationText:
    """Activations of held-out text that no metric reads.

    Args:
        source: the activations; every shard is opened for each measurement.
    """

    def __init__(self, source: Source) -> None:
        self.source = source

    @torch.no_grad()
    def measure_l0(self, sae: SAE, part: tuple[int, int], seed: int, training_rows: int) -> float:
        """Returns the mean number of active latents per row of one part of the text.

        On several ranks each of them encodes some of the rows, and all return the same number. The
        SAE is in evaluation mode meanwhile.

        Args:
            sae: as the training has left it.
            part: number of the measurement, and how many there are.
            seed: of the cell.
            training_rows: of the whole run, which bound the rows that are read.
        """
        i, n = part
        i = (seed + i) * _stride(n) % n
        x, starts = self._rows(sae, i, n, int(MOST_ROWS * training_rows))
        mode, device = sae.training, sae.W_dec.device
        sae.eval()
        try:
            codes = sae.codes(x.to(device), None if starts is None else starts.to(device))
            pairs = sum(code.active_pairs for _, code in codes)
        finally:
            sae.train(mode)
        pairs, rows = sae.ranks.total_over_rows(pairs, len(x))
        return pairs / max(1, rows)

    def _rows(self, sae: SAE, i: int, n: int, most: int) -> tuple[Tensor, Tensor | None]:
        """Returns this rank's rows of a part, float32 [m, d], and the starts of their segments.

        A part has rows that are spread over the whole text; for an SAE that needs contexts, whole
        contexts, which are not split over ranks.
        """
        if sae.needs_contexts:
            contexts = _spread(len(self._masks), most // self._masks.shape[1], i, n)
            mask = self._masks[contexts]
            positions = torch.arange(mask.shape[1]).expand(mask.shape)
            batch = Batch(self._read(contexts), positions, mask).rows()
            return batch.x, batch.starts
        contexts, positions = self._counted
        chosen = _spread(len(contexts), most, i, n)
        if not sae.activation.couples_batch:  # whose ranks must take one path in each block
            chosen = chosen[sae.ranks.rows(len(chosen))]
        return self._read(contexts[chosen], positions[chosen]), None

    def _read(self, contexts: Tensor, positions: Tensor | None = None) -> Tensor:
        """Returns activations of these contexts, float32 [n, positions, d], or at these positions
        of them, [n, d]; the contexts rise."""
        parts: list[Tensor] = []
        for shard, first in enumerate(self._firsts[:-1]):
            begin, end = torch.searchsorted(contexts, self._firsts[shard : shard + 2]).tolist()
            if begin < end:
                x, local = self.source.shard(shard).x, contexts[begin:end] - first
                part = x[local] if positions is None else x[local, positions[begin:end]]
                parts.append(part.float())
        return torch.cat(parts) if parts else torch.zeros(0, self.source.d, dtype=torch.float32)

    @cached_property
    def _shard_masks(self) -> list[Tensor]:
        return [self.source.shard(i).mask.clone() for i in range(self.source.n_shards)]

    @cached_property
    def _masks(self) -> Tensor:
        """Mask of the positions that count; bool [contexts, positions]."""
        return torch.cat(self._shard_masks)

    @cached_property
    def _firsts(self) -> Tensor:
        """First context of each shard, and the number of contexts; int64 [shards + 1]."""
        counts = [0, *map(len, self._shard_masks)]
        return torch.tensor(counts, dtype=torch.int64).cumsum(0)

    @cached_property
    def _counted(self) -> tuple[Tensor, Tensor]:
        """Context and position of each counted row; int64 [rows] each."""
        contexts, positions = self._masks.nonzero(as_tuple=True)
        return contexts, positions


def _stride(n: int) -> int:
    """Returns a step through n parts that visits each once, and after which any few successive ones
    are evenly spread: rows next to each other are alike."""
    stride = max(1, round(n * (5**0.5 - 1) / 2))
    while math.gcd(stride, n) > 1:
        stride += 1
    return stride


def _spread(count: int, most: int, i: int, n: int) -> Tensor:
    """Returns the i-th of n interleaved parts of at most `most` numbers below `count`, which are
    evenly spread and rise; int64, at least one number."""
    used = max(n, min(count, most))
    return (torch.arange(i, used, n) * count // used).unique()
