"""Held-out text that no metric reads, on which the L0 of an SAE in training is measured.

A controller holds the L0 of training batches, and that of held-out text differs: it is other text,
and a language model may have memorised what it was trained on. So at a few fixed steps in the
second half of a run the loop measures the L0 of the present SAE, in evaluation mode, on calibration
text, and hands it to every part that asks for it (`Part.needs_calibration`, `Part.calibrate`).

The text is split into as many interleaved subsets as there are measurements, so that together they
read it once; a part averages over them. Nothing else depends on a measurement: it draws no random
number and changes no statistics.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from saelab.data.activations.store import Shard, Source
from saelab.data.activations.stream import Batch
from saelab.sae import SAE

#: Shares of the run after which L0 is measured. Our choice: from when L0 is near its target, until
#: the controller can still follow.
SHARES = (0.5, 0.55, 0.6, 0.65, 0.7, 0.75, 0.8, 0.85, 0.9, 0.95)
#: Most rows that all measurements of a run read, as a share of its training rows. Our choice: a row
#: costs half of what a training row costs, so that this is 4% of the training and less than 3% of a
#: cell with its evaluation.
MOST_ROWS = 0.08


def calibration_steps(steps: int) -> dict[int, int]:
    """Returns the numbers of steps done after which L0 is measured -> the subset that is read."""
    after = sorted({max(1, round(share * steps)) for share in SHARES})
    return {step: i for i, step in enumerate(after)}


class CalibrationText:
    """Activations of held-out text that no metric reads.

    Args:
        source: the activations.
    """

    def __init__(self, source: Source) -> None:
        self.source = source

    @torch.no_grad()
    def measure_l0(self, sae: SAE, subset: int, training_rows: int) -> float:
        """Returns the mean number of active latents per row of one subset of the text.

        On several ranks each of them encodes its part of the rows, and all return the same number.
        The SAE is in evaluation mode meanwhile.

        Args:
            sae: as the training has left it.
            subset: which of the `len(SHARES)` subsets.
            training_rows: of the whole run, which bound the size of a subset.
        """
        mode = sae.training
        sae.eval()
        try:
            pairs = rows = 0
            for batch in self._batches(sae, subset, training_rows):
                starts = None if batch.starts is None else batch.starts.to(sae.W_dec.device)
                for _, code in sae.codes(batch.x.to(sae.W_dec.device), starts):
                    pairs += code.active_pairs
                rows += len(batch.x)
        finally:
            sae.train(mode)
        pairs, rows = sae.ranks.total_over_rows(pairs, rows)
        return pairs / max(1, rows)

    def _batches(self, sae: SAE, subset: int, training_rows: int) -> Iterator[Batch]:
        """Yields this rank's rows of the subset, one batch for each shard.

        A subset has every n-th row, or every n-th context for an SAE that needs contexts; these are
        not split over ranks.
        """
        counts = self.source.shard_counts
        most = max(1, int(MOST_ROWS * training_rows))
        every = len(SHARES) * max(1, -(-sum(counts) // most))
        first = subset * every // len(SHARES)
        before = 0
        for i in range(self.source.n_shards):
            shard = self.source.shard(i)
            offset = (first - before) % every
            if sae.needs_contexts:
                before += len(shard.mask)
                batch = _contexts(shard, slice(offset, None, every))
            else:
                before += counts[i]
                batch = _rows(shard, slice(offset, None, every))
                each = len(batch.x) // sae.ranks.data
                begin = sae.ranks.rows(sae.ranks.data).start * each
                batch = batch.part(slice(begin, begin + each))
            if len(batch.x):
                yield batch


def _rows(shard: Shard, chosen: slice) -> Batch:
    """Returns the chosen ones of a shard's counted rows."""
    contexts, positions = (index[chosen] for index in shard.mask.nonzero(as_tuple=True))
    return Batch(shard.x[contexts, positions].float(), positions)


def _contexts(shard: Shard, chosen: slice) -> Batch:
    """Returns the counted rows of the chosen contexts, with their segments."""
    mask = shard.mask[chosen]
    positions = torch.arange(mask.shape[1]).expand(mask.shape)
    return Batch(shard.x[chosen].float(), positions, mask).rows()
