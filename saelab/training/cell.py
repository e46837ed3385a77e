"""A cell in training: one arm at one seed (and one sparsity level), with its log.

There are two kinds: `Cell` (training/loop.py) trains an SAE that is made of parts, `ModuleCell`
(training/module_cell.py) a user's own module. The loop, checkpoints and the launch treat both
alike.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from saelab.data.activations.stream import Batch
from saelab.distributed.ranks import ALONE, Ranks
from saelab.distributed.sharded_file import Shards
from saelab.errors import CellFailure
from saelab.training.calibration_text import CalibrationText, Settled
from saelab.training.optim import TrainConfig
from saelab.training.snapshots import Snapshots
from saelab.training.state import State, module_state, restore_module


@dataclass(eq=False)
class Log:
    """Every step's named values: one float32 column per name, NaN before a name first appears."""

    steps: int
    columns: dict[str, np.ndarray] = field(default_factory=dict)
    length: int = 0

    def append(self, record: dict[str, float]) -> None:
        """Adds one step's values."""
        for name, value in record.items():
            if name not in self.columns:
                self.columns[name] = np.full(self.steps, np.nan, dtype=np.float32)
            self.columns[name][self.length] = value
        self.length += 1

    def state(self) -> State:
        """Returns the logged part of the columns, not copied."""
        names = list(self.columns)
        rows = [torch.from_numpy(self.columns[name][: self.length]) for name in names]
        tensors = dict(zip(map(str, range(len(rows))), rows, strict=True))
        return State(tensors, {"names": names, "length": self.length})

    def restore(self, state: State) -> None:
        """Replaces the log's contents.

        Raises: DamageError when the state lacks a column.
        """
        self.length = state.value("length")
        self.columns = {}
        for i, name in enumerate(state.value("names")):
            column = np.full(self.steps, np.nan, dtype=np.float32)
            column[: self.length] = state.tensor(str(i)).numpy()
            self.columns[name] = column

    @property
    def loss(self) -> np.ndarray:
        """The reconstruction loss of each step, float64 [steps], or the whole loss of a module that
        logs no such term; empty if nothing was logged."""
        name = "loss.reconstruction" if "loss.reconstruction" in self.columns else "loss"
        return self.columns.get(name, np.zeros(0))[: self.length].astype(np.float64)

    def last(self, name: str, share: float = 0.0) -> float:
        """Returns the last value, or the mean over the last `share` of the run."""
        column = self.columns[name][: self.length]
        return float(column[-max(1, int(share * self.length)) :].mean())


class TrainingCell(ABC):
    """An SAE in training with its schedule, log and counters.

    Args:
        name: for messages, for example 'baseline/seed 3'.
        sae: an `SAE`, or a user's own module, in training mode on its device.
        config: how it is trained.
        device: of the SAE.
        snapshots: the decoders stored over the run; None for a module, whose weights may have any
            names.
        ranks: the processes that it is trained on, all of which do the same with their cell.
    """

    def __init__(
        self,
        name: str,
        sae: Any,
        config: TrainConfig,
        device: torch.device,
        snapshots: Snapshots | None = None,
        ranks: Ranks = ALONE,
    ) -> None:
        self.name, self.sae, self.config, self.device = name, sae, config, device
        self.snapshots, self.ranks = snapshots, ranks
        self.log = Log(config.steps)
        self.steps_done = 0
        self.tokens = 0
        self.settled: Settled | None = None

    @property
    def done(self) -> bool:
        """True once all steps are done."""
        return self.steps_done >= self.config.steps

    def aim_at(self, text: CalibrationText | None) -> None:
        """Takes the held-out text on which the trained SAE is to have its target L0.

        Changes nothing for a user's own module.
        """

    def settle(self, text: CalibrationText | None) -> None:
        """Takes the last step of the training: brings the L0 to its target on held-out text.

        Changes nothing for a user's own module, nor where there is no text.
        """

    @abstractmethod
    def scalar_distance(self) -> dict[str, float]:
        """Returns how far each learned scalar (mean over its entries) is from its start."""

    @abstractmethod
    def scalar_reach(self) -> dict[str, float]:
        """Returns how far each learned scalar moved, as a share of how far it could have moved."""

    # ---- state -------------------------------------------------------------------------------

    def state(self) -> State:
        """Returns everything that later steps and the cell's results depend on, between two steps.

        The tensors are the cell's own, not copies: they change with the next step.
        """
        state = State({}, {"steps_done": self.steps_done, "tokens": self.tokens})
        state.add("sae", module_state(self.sae))
        state.add("log", self.log.state())
        self._add_training_state(state)
        return state

    def restore(self, state: State) -> None:
        """Brings a fresh cell of the same configuration, sample and seed to a state.

        It then continues, bitwise, like the cell that the state was taken from. If this fails, the
        cell must be discarded.

        Raises: DamageError when the state does not belong to such a cell.
        """
        self.steps_done, self.tokens = state.value("steps_done"), state.value("tokens")
        restore_module(self.sae, state.part("sae"))
        self.log.restore(state.part("log"))
        self._restore_training_state(state)

    @abstractmethod
    def shards(self) -> Shards:
        """Describes how the tensors of `state` are split over the ranks."""

    @abstractmethod
    def _add_training_state(self, state: State) -> None:
        """Adds the optimiser and whatever else this kind of cell has besides its module and log."""

    @abstractmethod
    def _restore_training_state(self, state: State) -> None:
        """Restores what `_add_training_state` added."""

    # ---- steps -------------------------------------------------------------------------------

    def rows(self, batch: Batch) -> Batch:
        """Returns the batch's rows that the cell trains on, on its device.

        Raises: CellFailure when no row has a position that the cell trains on.
        """
        return self._select_rows(batch).to(self.device)

    def _select_rows(self, batch: Batch) -> Batch:
        """Returns the rows that `rows` moves to the device."""
        rows = batch.rows()
        if self.config.positions is not None:
            rows = rows.within(*self.config.positions)
        if not len(rows.x):
            reason = f"no row of the batch has a position in {self.config.positions}: widen them"
            raise CellFailure(self.name, self.steps_done, reason)
        return rows

    def step(self, batch: Batch) -> dict[str, float]:
        """Takes one optimiser step and returns the record that was logged; no gradients remain.

        Raises: CellFailure when the loss or the gradient is not finite; the weights stay as before.
        """
        self._drop_gradients()
        try:
            record = self._step(batch)
        finally:
            self._drop_gradients()
        if self.snapshots is not None:
            self.snapshots.take_if_due(self.sae, self.steps_done)
        return record

    @abstractmethod
    def _drop_gradients(self) -> None:
        """Frees the gradients of all parameters."""

    @abstractmethod
    def _step(self, batch: Batch) -> dict[str, float]:
        """Takes the step, counts it and its rows, and logs its record."""
