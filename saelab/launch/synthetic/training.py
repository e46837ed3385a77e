"""SAEs trained on synthetic activations: all arms of a seed see the same batches."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from saelab.data.activations.store import Source
from saelab.data.activations.stream import Layout
from saelab.errors import CellFailure, SettingError
from saelab.evals import check_names
from saelab.evals.base import Row
from saelab.evals.core import CoreData
from saelab.evals.measure import EvalData, evaluate
from saelab.progress import progress
from saelab.runs.schema import CellId, level_of
from saelab.runtime.torch_defaults import standard_torch
from saelab.sae import SAE, SAEConfig
from saelab.study.checks import check_layout
from saelab.training.calibration_text import CalibrationText
from saelab.training.loop import Cell
from saelab.training.optim import TrainConfig
from saelab.training.resume import ResumableCell
from saelab.training.sample import initial_sample
from saelab.training.train import train_members

#: Evaluations that are run where nothing else is asked for.
EVALS = ("core", "truth", "absorption")


@dataclass(frozen=True, eq=False, kw_only=True)
class Outcome:
    """One trained cell.

    Args:
        arm, seed, level: which; level 0 for an arm that was trained as it is.
        sae: in evaluation mode.
        rows: its measurements; none after a failure.
        failure: why training stopped early, or None.
    """

    arm: str
    seed: int
    level: float
    sae: SAE
    rows: list[Row]
    failure: CellFailure | None = None

    def value(self, metric: str) -> float | None:
        """The metric over all data; None where it is missing."""
        found = (row.value for row in self.rows if row.metric == metric and not row.slice)
        return next(found, None)


@dataclass(frozen=True, kw_only=True)
class Conditions:
    """Conditions that all arms are trained and measured under.

    Args:
        seeds: of initialisation and data order; the arms of a seed see the same batches.
        training: of every arm.
        otherwise: arm -> its own training, on the same batches.
        levels: L0 that the arms are trained for, see `SAEConfig.at_l0`; none leaves them as they
            are.
        layout: 'rows', or 'contexts' for parts that need whole contexts.
        evals: names of evaluations.
        device: to train and measure on.

    Raises: SettingError for an unknown evaluation, or for an arm's training on other batches.
    """

    seeds: Sequence[int]
    training: TrainConfig
    otherwise: Mapping[str, TrainConfig] = field(default_factory=dict)
    levels: Sequence[float] = ()
    layout: Layout = "rows"
    evals: Sequence[str] = EVALS
    device: str = "cpu"

    def __post_init__(self) -> None:
        check_names(self.evals)
        for arm, own in self.otherwise.items():
            if (own.steps, own.batch_size) != (self.training.steps, self.training.batch_size):
                remedy = f"an arm sees the same batches as the others: leave them for {arm!r}"
                raise SettingError("tokens and batch_size", (own.tokens, own.batch_size), remedy)


@standard_torch()
def train_on(
    source: Source,
    held_out: Source,
    arms: Mapping[str, SAEConfig],
    conditions: Conditions,
    calibration: Source | None = None,
) -> list[Outcome]:
    """Trains every arm at every seed and level, and evaluates it on the held-out activations.

    Args:
        source, held_out: activations, for example two parts of `generate`.
        arms: name -> settings of the SAE.
        calibration: further activations, on which the L0 of each SAE is brought to its target.

    Returns: the cells, seed by seed, level by level.
    Raises: SettingError for settings that can't be used.
    """
    if not arms:
        raise SettingError("arms", dict(arms), "at least one is needed")
    training, layout, device = conditions.training, conditions.layout, conditions.device
    trainings = {arm: conditions.otherwise.get(arm, training) for arm in arms}
    places = [
        (arm, level, config.at_l0(level) if level and config.decides_l0 else config)
        for level in conditions.levels or (level_of(None),)
        for arm, config in arms.items()
    ]
    for arm, _, config in places:
        check_layout(arm, config, layout)
    sample = initial_sample(source).to(device)
    data = EvalData(CoreData(held_out, None, device=device), None, why_no_probing="not asked for")
    text = None if calibration is None else CalibrationText(calibration)
    outcomes: list[Outcome] = []
    with progress("training", len(conditions.seeds) * training.steps, "steps") as bar:
        for seed in conditions.seeds:
            members = []
            for arm, level, config in places:
                name = CellId(arm, seed, level).name
                members.append(
                    ResumableCell(Cell(name, config, trainings[arm], sample, seed), None)
                )
            failures = train_members(
                members, source, seed, layout, lambda steps, _: bar.advance(steps), text
            )
            for member in members:
                cell, of_cell = member.cell, CellId.parse(member.cell.name)
                failure = failures.get(cell.name)
                rows = [] if failure else evaluate(cell.sae, data, conditions.evals)
                rows = [row.of_cell(of_cell) for row in rows]
                outcomes.append(
                    Outcome(**of_cell.as_dict(), sae=cell.sae, rows=rows, failure=failure)
                )
    return outcomes
