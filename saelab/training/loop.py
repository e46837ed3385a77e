"""The training loop: n cells, one stream.

Cells never see each other, so adding one leaves the weights of the others bitwise unchanged.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, final

import torch
from torch import Tensor

from saelab.data.activations.stream import Batch
from saelab.distributed.ranks import ALONE, Ranks
from saelab.distributed.sharded_file import Shards
from saelab.errors import CellFailure
from saelab.parts.base import Pass
from saelab.runtime.counting import count
from saelab.runtime.signals import defer_signals
from saelab.runtime.torch_defaults import standard_torch
from saelab.sae import SAE, SAEConfig
from saelab.training.calibration_text import FARTHEST, CalibrationText
from saelab.training.cell import TrainingCell
from saelab.training.fine_tuning import start_from
from saelab.training.optim import Optimiser, TrainConfig
from saelab.training.sample import Sample
from saelab.training.snapshots import Snapshots
from saelab.training.spliced_model import SplicedModel, spliced_for
from saelab.training.state import State

#: The most batches, and the most bytes, of one turn of a cell. Our choice: few enough to stay in a
#: CPU's cache together with one cell, enough that loading the next cell's weights costs little.
LONGEST_TURN, TURN_BYTES = 16, 4 << 20
#: Shares of the run after which the target of training batches is corrected by held-out text, and
#: share of the steps until then whose L0 is averaged. Our choice: the target has arrived, and the
#: weights have time to follow.
AIMS, AVERAGED = (0.5, 0.65, 0.8, 0.9), 0.05


@final
class Cell(TrainingCell):
    """Trains an SAE that is made of parts.

    Args:
        name: for messages, for example 'baseline/seed 3'.
        sae_config, train_config: what the SAE is and how it is trained.
        sample: raw activations [n, d_in] for initialisation, the same for all cells of a launch;
            a `Sample` where other activations are reconstructed than are read.
        seed: of its named streams.
        snapshots: number of decoders that are stored over the run.
        ranks: the processes that it is trained on, all of which do the same with their cell.
    """

    sae: SAE
    snapshots: Snapshots

    def __init__(
        self,
        name: str,
        sae_config: SAEConfig,
        train_config: TrainConfig,
        sample: Tensor | Sample,
        seed: int,
        snapshots: int = 0,
        ranks: Ranks = ALONE,
    ) -> None:
        sample, steps = Sample.of(sample), train_config.steps
        sae = sae_config.build(sample.d_in, steps, seed, ranks, d_out=sample.d_out)
        sae.to(sample.device).initialise(sample.x, seed, sample.y)
        sae.train()
        self.spliced: SplicedModel | None = None
        self.calibration: CalibrationText | None = None
        decoders = Snapshots(snapshots, train_config.steps, train_config.batch_size)
        super().__init__(name, sae, train_config, sample.device, decoders, ranks)
        self.optimiser = Optimiser(sae, train_config)
        self.fired_at = torch.zeros(sae.local_latents, dtype=torch.int64, device=sample.device)
        self._learned = {n: p for part in sae.parts() for n, p in part.learned().items()}
        self._began = self._scalars()
        self._distance: dict[str, float] | None = None

    def _scalars(self) -> dict[str, Tensor]:
        return {name: p.detach().clone() for name, p in self._learned.items()}

    def start_from(self, start: SAE) -> None:
        """Copies the weights of an SAE whose settings it was built with, before its first step.

        Args:
            start: in evaluation mode; see `saelab.training.fine_tuning`.
        """
        start_from(self.sae, start)
        self._began = self._scalars()

    def use_model(self, spliced: SplicedModel | None) -> None:
        """Takes the language model, for losses that ask for it.

        Raises: SettingError when one asks and there is none.
        """
        self.spliced = spliced_for(self.sae, self.config, spliced)

    def scalar_distance(self) -> dict[str, float]:
        """Returns the distance of each learned scalar (mean over its entries) from its start."""
        if self._distance is not None:
            return self._distance
        return {
            n: float(self.ranks.mean_over_latents((p.detach() - self._began[n]).abs()))
            for n, p in self._learned.items()
        }

    def aim_at(self, text: CalibrationText | None) -> None:
        self.calibration = text

    def _correct_target(self) -> None:
        """Corrects the L0 that controllers hold on training batches by that of held-out text, where
        it is farther from the target than the last step closes."""
        text, aims = self.calibration, [int(share * self.config.steps) for share in AIMS]
        if text is None or self.steps_done not in aims:
            return
        controllers = [part for part in self.sae.controller_parts() if part.follows_text]
        if not controllers or (self.steps_done > aims[0] and not controllers[0].correction):
            return
        ratio = text.ratio(self.sae, self.log.last("l0", AVERAGED), self.config.tokens)
        if self.steps_done > aims[0] or abs(ratio - 1) > FARTHEST:
            for controller in controllers:
                controller.correction = -math.log(ratio)

    def settle(self, text: CalibrationText | None) -> None:
        if text is not None and self.settled is None:
            self._distance = self.scalar_distance()  # of the training, not of this step
            self.settled = text.settle(self.sae, self.config.tokens)

    def scalar_reach(self) -> dict[str, float]:
        """Returns the distance of each learned scalar from its start, as a share of the sum of its
        learning rates, which is about as far as Adam can move it."""
        distance = self.scalar_distance()
        return {
            n: distance[n] / max(self.optimiser.travel(p), 1e-30) for n, p in self._learned.items()
        }

    def shards(self) -> Shards:
        """Describes how the tensors of `state` are split over the ranks."""
        split = self.sae.shards().split
        parameters = self.sae.named_parameters(remove_duplicate=False)
        split_ids = {id(parameter) for name, parameter in parameters if name in split}
        names = {"fired_at", *(f"sae/own/{name}" for name in split)}
        names |= {f"began/{name}" for name, p in self._learned.items() if id(p) in split_ids}
        for i, parameter in enumerate(self.optimiser.moments()):
            if id(parameter) in split_ids:
                names |= {f"optimiser/{i}/exp_avg", f"optimiser/{i}/exp_avg_sq"}
        return Shards(frozenset(names), self.sae.d_sae, self.ranks)

    def _add_training_state(self, state: State) -> None:
        state.tensors["fired_at"] = self.fired_at
        state.tensors |= {f"began/{name}": start for name, start in self._began.items()}
        state.add("optimiser", self.optimiser.state())
        state.add("snapshots", self.snapshots.state())

    def _restore_training_state(self, state: State) -> None:
        state.copy_into("fired_at", self.fired_at)
        for name, start in self._began.items():
            state.copy_into(f"began/{name}", start)
        self.optimiser.restore(state.part("optimiser"))
        self.snapshots.restore(state.part("snapshots"))

    def _rank_rows(self, rows: Batch) -> Batch:
        """Returns this rank's part of the rows."""
        ranks = self.ranks
        if len(rows.x) < ranks.data:
            reason = f"a batch of {len(rows.x)} rows is too small for {count(ranks.data, 'rank')}"
            raise CellFailure(self.name, self.steps_done, f"{reason}: enlarge it")
        return rows.part(ranks.rows(len(rows.x)))

    def _drop_gradients(self) -> None:
        self.optimiser.zero_grad()

    def _step(self, batch: Batch) -> dict[str, float]:
        step, sae = self.steps_done, self.sae
        rows = self._select_rows(batch)
        local = self._rank_rows(rows).to(self.device)
        p = sae(local.x, step, self.config.steps, local.starts, len(rows.x), local.y)
        if self.spliced is not None:
            p.spliced = self.spliced.on(sae, local.tokens)
        terms = {name: term.loss(p) for name, term in sae.loss_terms().items()}
        losses = torch.stack(list(terms.values()))
        losses.sum().backward()
        self.optimiser.gather()
        for constraint in sae.constraint_parts():
            constraint.on_gradients(sae)
        norm = self.optimiser.clip()
        losses = sae.ranks.over_rows(losses.detach())
        total = float(losses.sum())
        if not math.isfinite(total) or not math.isfinite(norm):
            raise CellFailure(self.name, step, f"loss {total}, gradient norm {norm}")
        p.gradient_norms, p.rate = self.optimiser.norms, self.config.rate(step)
        self.optimiser.step(step)
        self._update_parts(p)
        record = {"loss": total, "grad_norm": norm, "l0": p.l0}
        record |= {f"loss.{name}": float(x) for name, x in zip(terms, losses, strict=True)}
        record |= self._block_errors(p)
        dead = int((self.fired_at < self.tokens - self.dead_after).sum())
        record["dead"] = sae.ranks.total_over_latents(dead)[0] / sae.d_sae
        self.log.append(record | sae.scalars())
        self.steps_done += 1
        self._correct_target()
        return record

    def _block_errors(self, p: Pass) -> dict[str, float]:
        """Returns the fraction of variance unexplained at each hook point, where there are
        several."""
        if len(self.sae.dims.target_blocks) == 1:
            return {}
        errors = self.ranks.over_rows(torch.stack(p.block_errors()))
        return {f"fvu.block.{i}": float(error) for i, error in enumerate(errors)}

    @property
    def dead_after(self) -> int:
        """Rows of silence after which a latent counts as dead: a tenth of the run. Our choice."""
        return self.config.tokens // 10

    @torch.no_grad()
    def _update_parts(self, p: Pass) -> None:
        """Applies the constraints to the new parameters and updates all running statistics."""
        sae = self.sae
        for constraint in sae.constraint_parts():
            constraint.on_parameters(sae)
        self.tokens += p.n
        self.fired_at.masked_fill_(p.firings > 0, self.tokens)
        for part in sae.parts():
            part.update(p)
        for observer in sae.observer_parts():
            reset = observer.observe(p)
            if reset is not None:
                sae.reset_latents(reset)
                self.optimiser.clear(sae, reset.latents)


@standard_torch()
def train(
    cells: Sequence[TrainingCell],
    stream: Iterable[tuple[Batch, Any]],
    on_step: Callable[[int, list[TrainingCell]], None] | None = None,
    on_round: Callable[[Any, list[TrainingCell]], None] | None = None,
) -> dict[str, CellFailure]:
    """Trains all cells on one stream until each has done its steps.

    The cells take turns of a few batches each, so that the weights and moments of a cell stay in
    the cache during its turn. A cell that fails stops alone; the others continue as if it had never
    been there. A signal (saelab/runtime/signals.py) takes effect at the end of a round.

    Args:
        cells: cells of one seed.
        stream: yields (batch, position); must be long enough.
        on_step: called after every round with the number of steps since the last call and the cells
            that took part; it must not change anything.
        on_round: called after every round with the stream's position, from which the cells that
            took part and did not fail continue; it must not change anything.

    Returns: failures by cell name.
    """
    failures: dict[str, CellFailure] = {}
    living = [cell for cell in cells if not cell.done]
    for turn, position in _turns(stream) if living else ():
        with defer_signals():
            before = max(cell.steps_done for cell in living)
            for cell in living:
                failure = _take_turn(cell, turn)
                if failure is not None:
                    failures[cell.name] = failure
            if on_step:
                on_step(max(cell.steps_done for cell in living) - before, living)
            living = [cell for cell in living if cell.name not in failures]
            if on_round:
                on_round(position, living)
        living = [cell for cell in living if not cell.done]
        if not living:
            break
    for cell in cells:
        cell.sae.eval()
    return failures


def _take_turn(cell: TrainingCell, turn: Sequence[Batch]) -> CellFailure | None:
    """Takes the cell's steps on the batches of one turn; returns the failure, if there was one."""
    try:
        for batch in turn:
            if not cell.done:
                cell.step(batch)
    except CellFailure as failure:
        return failure
    return None


def _turns(stream: Iterable[tuple[Batch, Any]]) -> Iterator[tuple[list[Batch], Any]]:
    """Yields groups of consecutive batches, each with the position after it; a group has at most
    LONGEST_TURN batches and TURN_BYTES bytes, unless a single batch is larger."""
    turn: list[Batch] = []
    size, position = 0, None
    for batch, position in stream:
        tensors = (batch.x,) if batch.y is None else (batch.x, batch.y)
        size += sum(x.numel() * x.element_size() for x in tensors)
        turn.append(batch)
        if size + size // len(turn) > TURN_BYTES or len(turn) == LONGEST_TURN:
            yield turn, position
            turn, size = [], 0
    if turn:
        yield turn, position
