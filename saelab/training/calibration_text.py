"""Held-out text that no metric reads, on which the L0 of a trained SAE is brought to its target.

A controller holds the L0 of training batches, and ends up to 3% from its target on held-out text:
that is other text, a language model may have memorised what it was trained on, and L0 moves by 1 to
3% from step to step. So the last step of a training moves the thresholds of all latents alike, by
the amount after which the SAE has its target L0 on this text (`Activation.raise_thresholds`), as
the threshold of a BatchTopK is set for inference (Bussmann et al. 2024). Thresholds trade error for
L0 at about the rate of the frontier where the penalty is on L0, and at 1.6 to 2 times that rate
where it is on L1, which shrinks values; over the 1 or 2% that are closed the difference is .0009 of
FVU at most (docs/decisions/0015).

Text of another kind than what an SAE is trained on can be farther away than that: essays, abstracts
and reviews have 18% more active latents than the rest of the data sets of sae-probes (SmolLM2,
docs/real_models.md). Where L0 is off by more than the last step closes after half of the training,
the controllers' target for training batches is divided by the ratio of both L0, and three more
times later (`CalibrationText.ratio`, `training.loop.Cell`).

Nothing else depends on this text, and no random number is drawn.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from saelab.data.activations.store import Source
from saelab.data.activations.stream import Batch
from saelab.sae import SAE

#: Most rows that are read, as a share of the training rows. Our choice: the settling then takes a
#: few percent of a cell's time.
MOST_ROWS = 0.15
#: Every n-th of the rows is read again to measure the effect of moved thresholds. Our choice: it
#: is a difference of two L0 of the same rows, which needs few of them.
PROBED = 8
#: Largest relative distance from the target that is closed. Our choice, as the plan's default
#: tolerance: an SAE that is farther away was not trained for its target, which the comparison must
#: show.
FARTHEST = 0.05
#: Most rows that are read for one `ratio`, as a share of the training rows. Our choice: it takes
#: about half a percent of a cell's time.
RATIO_ROWS = 0.02
#: Error of log L0 that is left, and the most trials.
NEAR, TRIALS = 5e-4, 8
#: The first trial's amount, in the activation's own unit.
FIRST = 0.01
#: Stands in for an L0 of 0.
LEAST_L0 = 1e-6


@dataclass(frozen=True)
class Settled:
    """L0 on the text before and after, and the amount that the thresholds were raised by."""

    before: float
    after: float
    amount: float


class CalibrationText:
    """Activations of held-out text that no metric reads.

    Args:
        source: the activations.
    """

    def __init__(self, source: Source) -> None:
        self.source = source

    @torch.no_grad()
    def settle(self, sae: SAE, training_rows: int) -> Settled | None:
        """Moves the thresholds of an SAE in evaluation mode so that its L0 is at its target.

        On several ranks all of them find the same amount.

        Args:
            sae: is changed in place.
            training_rows: of the whole run, which bound the rows that are read.

        Returns: None where nothing sets an L0, where no threshold decides it, or where the SAE is
            too far from its target.
        """
        target = sae.config.settled_l0
        if target is None or not sae.raise_thresholds(0.0):
            return None
        every = max(1, math.ceil(self._n_rows / max(1.0, MOST_ROWS * training_rows)))
        before = self.measure_l0(sae, every)
        if not abs(before / target - 1) < FARTHEST:
            return None
        amount, change = self._search(sae, every * PROBED, math.log(target / before))
        return Settled(before, before * math.exp(change), amount)

    @torch.no_grad()
    def ratio(self, sae: SAE, l0: float, training_rows: int) -> float:
        """Measures how many times as large the L0 is on this text as on training batches.

        Args:
            sae: in training mode, in which it is left.
            l0: of the last training batches.
            training_rows: of the whole run, which bound the rows that are read.
        """
        every = max(1, math.ceil(self._n_rows / max(1.0, RATIO_ROWS * training_rows)))
        sae.eval()
        try:
            return max(self.measure_l0(sae, every), LEAST_L0) / max(l0, LEAST_L0)
        finally:
            sae.train()

    def _search(self, sae: SAE, every: int, change: float) -> tuple[float, float]:
        """Raises the thresholds by the amount that changes log L0 of every n-th row by `change`.

        A secant search. Returns: the amount, and the change that was reached.
        """
        start = self._log_l0(sae, every)
        amount, reached, step = 0.0, 0.0, -math.copysign(FIRST, change)
        for _ in range(TRIALS):
            if abs(change - reached) < NEAR:
                break
            sae.raise_thresholds(step)
            before, reached = reached, self._log_l0(sae, every) - start
            amount, slope = amount + step, (reached - before) / step
            if slope == 0:
                break
            step = (change - reached) / slope
        return amount, reached

    def _log_l0(self, sae: SAE, every: int) -> float:
        return math.log(max(self.measure_l0(sae, every), LEAST_L0))

    @torch.no_grad()
    def measure_l0(self, sae: SAE, every: int = 1) -> float:
        """Returns the mean number of active latents per row, the same on all ranks.

        Args:
            sae: in evaluation mode.
            every: reads every n-th row, or every n-th context where the SAE needs contexts.
        """
        pairs = rows = 0
        for x, starts in self._blocks(sae, every):
            x, starts = (
                x.to(sae.W_dec.device),
                None if starts is None else starts.to(sae.W_dec.device),
            )
            pairs += sum(code.active_pairs for _, code in sae.codes(x, starts))
            rows += len(x)
        total, count = sae.ranks.total_over_rows(pairs, rows)
        return total / max(1, count)

    def _blocks(self, sae: SAE, every: int) -> Iterator[tuple[Tensor, Tensor | None]]:
        """Yields this rank's rows of each shard, float32 [m, d], and the starts of their segments.

        Whole contexts are not split over ranks.
        """
        skipped = 0
        for i in range(self.source.n_shards):
            shard = self.source.shard(i)
            if sae.needs_contexts:
                chosen = torch.arange(skipped, len(shard.mask), every)
                skipped = (skipped - len(shard.mask)) % every
                mask = shard.mask[chosen]
                positions = torch.arange(mask.shape[1]).expand(mask.shape)
                batch = Batch(shard.x[chosen].float(), positions, mask).rows()
                yield batch.x, batch.starts
                continue
            contexts, positions = shard.mask.nonzero(as_tuple=True)
            chosen = torch.arange(skipped, len(contexts), every)
            skipped = (skipped - len(contexts)) % every
            chosen = chosen[sae.ranks.rows(len(chosen))]
            yield shard.x[contexts[chosen], positions[chosen]].float(), None

    @cached_property
    def _n_rows(self) -> int:
        return sum(int(self.source.shard(i).mask.sum()) for i in range(self.source.n_shards))
