"""The one way to train SAEs on a source of activations: cells of one seed see the same batches.

`train_members` trains cells with their checkpoints; `train_one` builds, trains and returns one SAE.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

from saelab.data.activations.store import Source
from saelab.data.activations.stream import Layout, batches
from saelab.distributed.ranks import ALONE, Ranks
from saelab.errors import CellFailure
from saelab.progress import progress
from saelab.runtime.torch_defaults import one_thread, standard_torch
from saelab.sae import SAE, SAEConfig
from saelab.training.calibration_text import CalibrationText
from saelab.training.cell import TrainingCell
from saelab.training.fine_tuning import fine_tuning_settings
from saelab.training.loop import Cell
from saelab.training.optim import TrainConfig
from saelab.training.resume import ResumableCell, restore_cell, train_with_checkpoints
from saelab.training.sample import initial_sample
from saelab.training.spliced_model import SplicedModel

#: Called with the steps done since the last call and the cells that took part; changes nothing.
OnStep = Callable[[int, list[TrainingCell]], None]


def train_members(
    members: Sequence[ResumableCell],
    source: Source,
    seed: int,
    layout: Layout,
    on_step: OnStep,
    calibration: CalibrationText | None = None,
) -> dict[str, CellFailure]:
    """Trains cells of one seed and one batch size on the batches of that seed.

    Args:
        members: the cells, each with its position and its folder for checkpoints.
        layout: 'rows', or 'contexts' for parts that need whole contexts.
        calibration: text on which the L0 of each is brought to its target.

    Returns: failures by cell name.
    """
    for member in members:
        member.cell.aim_at(calibration)
    size = members[0].cell.config.batch_size
    failures = train_with_checkpoints(
        members, lambda start: batches(source, seed, size, layout, start), on_step
    )
    for cell in (member.cell for member in members):
        if cell.name not in failures:
            cell.settle(calibration)
    return failures


@dataclass(frozen=True, kw_only=True)
class Surroundings:
    """Circumstances of a training: all but its data and settings.

    Args:
        layout: of the batches: 'rows', or 'contexts' for parts that need whole contexts.
        ranks: the processes that it is trained on, and this one's device.
        checkpoints: folder that training goes on from, and writes to; None keeps none.
        calibration: raw activations of text that no metric reads, see `CalibrationText`.
        start: an SAE that training starts from, see `saelab.training.fine_tuning`.
        spliced: the language model, for losses that ask for it.
    """

    layout: Layout = "rows"
    ranks: Ranks = ALONE
    checkpoints: Path | None = None
    calibration: Source | None = None
    start: SAE | None = None
    spliced: SplicedModel | None = None


@standard_torch()
@one_thread()
def train_one(
    source: Source,
    sae: SAEConfig,
    train: TrainConfig,
    seed: int,
    around: Surroundings = Surroundings(),
) -> TrainingCell:
    """Trains one SAE with a progress bar.

    Args:
        source: raw activations to train on.
        sae: its settings; of those that `start` decides, that SAE's count.

    Returns: the trained cell, its SAE in evaluation mode.
    Raises: CellFailure when the loss is not finite.
    """
    ranks, start = around.ranks, around.start
    sample = initial_sample(source).to(ranks.device)
    text = None if around.calibration is None else CalibrationText(around.calibration)
    config = sae if start is None else fine_tuning_settings(start, sae)

    def build() -> Cell:
        cell = Cell(f"seed {seed}", config, train, sample, seed, ranks=ranks)
        if start is not None:
            cell.start_from(start)
        cell.use_model(around.spliced)
        return cell

    folder = around.checkpoints
    member = restore_cell(build, folder) if folder else ResumableCell(build(), None)
    with progress("training", train.steps, "steps") if ranks.first else nullcontext() as bar:
        advance = bar.advance if bar else (lambda steps: None)
        failures = train_members(
            [member], source, seed, around.layout, lambda steps, _: advance(steps), text
        )
    for failure in failures.values():
        raise failure
    return member.cell
