"""The training loop: n cells, one stream.

A cell is one arm at one seed (and one sparsity level): an SAE with its optimiser and log. Cells
never see each other, so adding one leaves the others' weights bitwise as they were.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from saelab.data.activations.stream import Batch
from saelab.distributed.ranks import ALONE, Ranks
from saelab.distributed.sharded_file import Shards
from saelab.errors import CellFailure
from saelab.runtime.signals import defer_signals
from saelab.sae import SAEConfig
from saelab.training.optim import Optimiser, TrainConfig
from saelab.training.snapshots import Snapshots
from saelab.training.state import State, module_state, restore_module

#: Batches of a cell's turn: at most so many, and so many bytes. Our choice: few enough to stay in a
#: CPU's cache beside one cell, enough that fetching the next cell's weights does not show.
LONGEST_TURN, TURN_BYTES = 16, 4 << 20


@dataclass(eq=False)
class Log:
    """Every step's named values: one float32 column per name, NaN before a name first appears."""

    steps: int
    columns: dict[str, np.ndarray] = field(default_factory=dict)
    length: int = 0

    def append(self, record: dict[str, float]) -> None:
        for name, value in record.items():
            if name not in self.columns:
                self.columns[name] = np.full(self.steps, np.nan, dtype=np.float32)
            self.columns[name][self.length] = value
        self.length += 1

    def state(self) -> State:
        names = list(self.columns)
        rows = [torch.from_numpy(self.columns[name][: self.length]) for name in names]
        tensors = dict(zip(map(str, range(len(rows))), rows, strict=True))
        return State(tensors, {"names": names, "length": self.length})

    def restore(self, state: State) -> None:
        self.length = state.value("length")
        self.columns = {}
        for i, name in enumerate(state.value("names")):
            column = np.full(self.steps, np.nan, dtype=np.float32)
            column[: self.length] = state.tensor(str(i)).numpy()
            self.columns[name] = column

    @property
    def loss(self) -> np.ndarray:
        """The reconstruction loss of each step, float64 [steps]; the whole loss of a module that
        has no such term; empty where nothing was logged."""
        name = "loss.reconstruction" if "loss.reconstruction" in self.columns else "loss"
        return self.columns.get(name, np.zeros(0))[: self.length].astype(np.float64)

    def last(self, name: str, share: float = 0.0) -> float:
        """The last value, or the mean over the last `share` of the run."""
        column = self.columns[name][: self.length]
        return float(column[-max(1, int(share * self.length)) :].mean())


class Cell:
    """One SAE in training.

    Args:
        name: for messages, for example 'baseline/seed 3'.
        sae_config, train_config: what it is and how it is trained.
        sample: raw activations [n, d_in] for initialisation, the same for all cells of a launch.
        seed: of its named streams.
        snapshots: how many decoders are kept over the run.
        ranks: the processes that it is trained on, all of which do the same with their cell.
    """

    snapshots: Snapshots | None = None
    ranks = ALONE

    def __init__(
        self,
        name: str,
        sae_config: SAEConfig,
        train_config: TrainConfig,
        sample: Tensor,
        seed: int,
        snapshots: int = 0,
        ranks: Ranks = ALONE,
    ) -> None:
        self.name, self.config, self.device = name, train_config, sample.device
        self.ranks = ranks
        sae = sae_config.build(sample.shape[1], train_config.steps, seed, ranks)
        self.sae = sae.to(sample.device)
        self.sae.initialise(sample, seed)
        self.sae.train()
        self.optimiser = Optimiser(self.sae, train_config)
        self.fired_at = torch.zeros(self.sae.own, dtype=torch.int64, device=sample.device)
        self.log = Log(train_config.steps)
        self.snapshots = Snapshots(snapshots, train_config.steps, train_config.batch_size)
        self.steps_done = 0
        self.tokens = 0
        self._learned = {n: p for part in self.sae.parts() for n, p in part.learned().items()}
        self._began = {name: p.detach().clone() for name, p in self._learned.items()}

    def moved(self) -> dict[str, float]:
        """Of each learned scalar (the mean over its entries): the distance from where it began, as
        a share of the sum of its learning rates, which is Adam's reach."""
        distance = {
            n: float(self.ranks.mean_over_latents((p.detach() - self._began[n]).abs()))
            for n, p in self._learned.items()
        }
        return {
            n: distance[n] / max(self.optimiser.travel(p), 1e-30) for n, p in self._learned.items()
        }

    @property
    def done(self) -> bool:
        return self.steps_done >= self.config.steps

    def state(self) -> State:
        """Everything that later steps and the cell's results depend on, between two steps.

        Its tensors are the cell's own, not copies: they change with the next step.
        """
        state = State({}, {"steps_done": self.steps_done, "tokens": self.tokens})
        state.add("sae", module_state(self.sae))
        state.add("log", self.log.state())
        self._add_own(state)
        return state

    def restore(self, state: State) -> None:
        """Brings a fresh cell of the same configuration, sample and seed to a state.

        It then goes on, bitwise, like the cell that the state is of. The cell is of no use where
        that fails.

        Raises: DamageError when the state is not one of such a cell.
        """
        self.steps_done, self.tokens = state.value("steps_done"), state.value("tokens")
        restore_module(self.sae, state.part("sae"))
        self.log.restore(state.part("log"))
        self._restore_own(state)

    def shards(self) -> Shards:
        """How the tensors of `state` lie on the ranks."""
        own = self.sae.shards().split
        parameters = self.sae.named_parameters(remove_duplicate=False)
        split = {id(parameter) for name, parameter in parameters if name in own}
        names = {"fired_at", *(f"sae/own/{name}" for name in own)}
        names |= {f"began/{name}" for name, p in self._learned.items() if id(p) in split}
        for i, parameter in enumerate(self.optimiser.moments()):
            if id(parameter) in split:
                names |= {f"optimiser/{i}/exp_avg", f"optimiser/{i}/exp_avg_sq"}
        return Shards(frozenset(names), self.sae.d_sae, self.ranks)

    def _add_own(self, state: State) -> None:
        """Adds to a state what an SAE made of parts has."""
        state.tensors["fired_at"] = self.fired_at
        state.tensors |= {f"began/{name}": start for name, start in self._began.items()}
        state.add("optimiser", self.optimiser.state())
        if self.snapshots is not None:
            state.add("snapshots", self.snapshots.state())

    def _restore_own(self, state: State) -> None:
        state.into("fired_at", self.fired_at)
        for name, start in self._began.items():
            state.into(f"began/{name}", start)
        self.optimiser.restore(state.part("optimiser"))
        if self.snapshots is not None:
            self.snapshots.restore(state.part("snapshots"))

    def rows(self, batch: Batch) -> Batch:
        """The batch's rows that the cell trains on, on its device.

        Raises: CellFailure when none has a position that the cell trains on.
        """
        return self._counted(batch).to(self.device)

    def _counted(self, batch: Batch) -> Batch:
        rows = batch.rows()
        if self.config.positions is not None:
            rows = rows.within(*self.config.positions)
        if not len(rows.x):
            reason = f"no row of the batch has a position in {self.config.positions}: widen them"
            raise CellFailure(self.name, self.steps_done, reason)
        return rows

    def _own(self, rows: Batch) -> Batch:
        """This rank's part of the rows."""
        ranks = self.ranks
        if len(rows.x) < ranks.data:
            reason = f"a batch of {len(rows.x)} rows has none for some of {ranks.data} ranks"
            raise CellFailure(self.name, self.steps_done, f"{reason}: enlarge it")
        return rows.part(ranks.rows(len(rows.x)))

    def step(self, batch: Batch) -> dict[str, float]:
        """One optimiser step; returns the record that was logged. Gradients live no longer.

        Raises: CellFailure when the loss or the gradient is not finite; the weights stay as before.
        """
        self._drop_gradients()
        try:
            record = self._step(batch)
        finally:
            self._drop_gradients()
        if self.snapshots is not None:
            self.snapshots.look(self.sae, self.steps_done)
        return record

    def _drop_gradients(self) -> None:
        self.optimiser.zero_grad()

    def _step(self, batch: Batch) -> dict[str, float]:
        step, sae = self.steps_done, self.sae
        rows = self._counted(batch)
        own = self._own(rows).to(self.device)
        p = sae(own.x, step, self.config.steps, own.starts, len(rows.x))
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
        p.gradient_norms = self.optimiser.norms
        self.optimiser.step(step)
        self._after(p)
        record = {"loss": total, "grad_norm": norm, "l0": p.l0}
        record |= {f"loss.{name}": float(x) for name, x in zip(terms, losses, strict=True)}
        dead = int((self.fired_at < self.tokens - self.dead_after).sum())
        record["dead"] = sae.ranks.total_over_latents(dead)[0] / sae.d_sae
        self.log.append(record | sae.scalars())
        self.steps_done += 1
        return record

    @property
    def dead_after(self) -> int:
        """Rows of silence after which a latent counts as dead: a tenth of the run. Our choice."""
        return self.config.tokens // 10

    @torch.no_grad()
    def _after(self, p) -> None:
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


def train(
    cells: Sequence[Cell],
    stream: Iterable[tuple[Batch, Any]],
    on_step: Callable[[int, list[Cell]], None] | None = None,
    on_round: Callable[[Any, list[Cell]], None] | None = None,
) -> dict[str, CellFailure]:
    """Trains all cells on the one stream until each has done its steps.

    The cells take turns, a few batches each, so that a cell's weights and moments stay in the
    cache meanwhile. A cell that fails stops alone; the others go on as if it had never been there.
    A signal (saelab/runtime/signals.py) waits for the end of a round.

    Args:
        cells: cells of one seed.
        stream: yields (batch, position); must be long enough.
        on_step: called after every round and at the end with the steps done since the last call
            and the cells that took part; it must not change anything.
        on_round: called after every round with the stream's position, from which the cells that
            took part and did not fail go on; it must not change anything.

    Returns: failures by cell name.
    """
    failures: dict[str, CellFailure] = {}
    living = [cell for cell in cells if not cell.done]
    for turn, position in _turns(stream) if living else ():
        with defer_signals():
            before = max(cell.steps_done for cell in living)
            for cell in living:
                failure = _take(cell, turn)
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


def _take(cell: Cell, turn: Sequence[Batch]) -> CellFailure | None:
    """The cell's steps on the batches of one turn; why it stopped, if it failed."""
    try:
        for batch in turn:
            if not cell.done:
                cell.step(batch)
    except CellFailure as failure:
        return failure
    return None


def _turns(stream: Iterable[tuple[Batch, Any]]) -> Iterator[tuple[list[Batch], Any]]:
    """Groups of consecutive batches, TURN_BYTES large at most but for a single batch, and the
    position after each."""
    turn: list[Batch] = []
    size, position = 0, None
    for batch, position in stream:
        size += batch.x.numel() * batch.x.element_size()
        turn.append(batch)
        if size + size // len(turn) > TURN_BYTES or len(turn) == LONGEST_TURN:
            yield turn, position
            turn, size = [], 0
    if turn:
        yield turn, position
