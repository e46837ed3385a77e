"""SAEs on synthetic activations, where the truth is known: no language model, no texts.

All arms of a seed, at all its levels, see the same batches. A metric at the target L0 is
interpolated for each seed between the seed's own levels (`stats.at_l0`), so that arms can then be
paired by seed at exactly one L0.

    python -m saelab synthetic configs/synthetic/baselines.toml
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, PositiveInt

from saelab import stats
from saelab.config import Frozen, read_toml
from saelab.data.activations.store import Source
from saelab.data.activations.stream import Layout
from saelab.data.devices import check_device
from saelab.data.synthetic.chains import Process, SyntheticConfig, generate, parse_process
from saelab.errors import CellFailure, SettingError, nearest
from saelab.evals import check_names
from saelab.evals.base import Row
from saelab.evals.core import CoreData
from saelab.evals.measure import EvalData, evaluate
from saelab.progress import progress
from saelab.runs.schema import CellId, Level, level_of
from saelab.runtime.counting import count
from saelab.runtime.torch_defaults import standard_torch
from saelab.sae import SAE, SAEConfig
from saelab.seeding import study_seeds
from saelab.study.checks import check_layout
from saelab.training.calibration_text import CalibrationText
from saelab.training.loop import Cell
from saelab.training.optim import TrainConfig
from saelab.training.resume import ResumableCell
from saelab.training.sample import initial_sample
from saelab.training.train import train_members

#: What is measured where nothing else is asked for.
EVALS = ("core", "truth", "absorption")
#: What is shown of it: each score with its chance level.
SHOWN = ("fvu", "explained_variance", "mcc", "chance_mcc", "firing_f1", "chance_firing_f1")
SHOWN += ("uniqueness", "chance_uniqueness", "dead_share")
#: What is reported of the true dictionary with the true code.
ORACLE = ("oracle_fvu", "oracle_l0")


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


def at_target(outcomes: Sequence[Outcome], metric: str, target: float) -> list[Row]:
    """The metric of each arm and seed at L0 = target: a value, or missing with the reason.

    Returns: one row per arm and seed, in the order of the outcomes.
    """
    rows: list[Row] = []
    for arm, seed in dict.fromkeys((outcome.arm, outcome.seed) for outcome in outcomes):
        own = [outcome for outcome in outcomes if (outcome.arm, outcome.seed) == (arm, seed)]
        levels, values = [o.value("l0") for o in own], [o.value(metric) for o in own]
        found = stats.at_l0(levels, values, target)
        failed = "; ".join(str(o.failure) for o in own if o.failure) if found.reason else ""
        reason = "; ".join(part for part in (found.reason, failed) if part)
        definition = next((r.definition for o in own for r in o.rows if r.metric == metric), "")
        row = Row(metric, found.value, definition, slice="interpolated in log L0", reason=reason)
        rows.append(row.of_cell(CellId(arm, seed, target)))
    return rows


def differences(rows: Sequence[Row], arm: str, baseline: str) -> list[float]:
    """Differences for `stats.paired`: arm minus baseline of every seed that has a value of both.

    Args:
        rows: of one metric, as `at_target` gives them.

    Raises: SettingError for an arm that has no row.
    """
    values = {name: _by_seed(rows, name) for name in (arm, baseline)}
    ours, theirs = values[arm], values[baseline]
    return [ours[seed] - theirs[seed] for seed in ours if seed in theirs]


def _by_seed(rows: Sequence[Row], arm: str) -> dict[int, float]:
    own = [row for row in rows if row.arm == arm]
    if not own:
        names = dict.fromkeys(row.arm for row in rows)
        raise SettingError("arm", arm, f"has no rows{nearest(arm, names)}")
    return {row.seed: row.value for row in own if row.value is not None}


# ---- from a file -------------------------------------------------------------------------------


class SyntheticStudyConfig(Frozen):
    """A comparison on synthetic activations (configs/synthetic/baselines.toml).

    Args:
        study: its name; all seeds are derived from it.
        data: the activations.
        data_seed: of the dictionary; 'own' gives every seed a dictionary of its own.
        contexts, held_out_contexts: to train on and to evaluate on.
        keep: training activations in memory; False makes them on the way, each time anew.
        arms: name -> SAE.
        otherwise: arm -> what is changed of `train` for it; batches are those of the others.
        seeds: how many.
        target_l0: where arms are compared.
        levels: L0 that are trained for; they must lie on both sides of the target.
        baseline: the arm that the others are paired with; None leaves the pairing out.
        evals: what is measured.
        metrics: that are shown.
        device: that SAEs are trained and measured on; activations are made on the CPU.

    Raises: SettingError for an unknown evaluation, and for a baseline, or an arm trained
        otherwise, that is no arm.
    """

    study: str = Field(default="synthetic", min_length=1)
    data: Annotated[Process, BeforeValidator(parse_process)] = SyntheticConfig()
    data_seed: int | Literal["own"] = 0
    contexts: PositiveInt = 8192
    keep: bool = True
    held_out_contexts: PositiveInt = 256
    layout: Layout = "rows"
    train: TrainConfig = TrainConfig()
    arms: dict[str, SAEConfig] = Field(min_length=1)
    otherwise: dict[str, dict[str, Any]] = Field(default={})
    seeds: PositiveInt = 3
    target_l0: Level
    levels: tuple[Level, ...]
    baseline: str | None = None
    evals: tuple[str, ...] = EVALS
    metrics: tuple[str, ...] = SHOWN
    device: str = "cpu"

    def model_post_init(self, _: Any) -> None:
        check_names(self.evals)
        named = [("otherwise", arm) for arm in self.otherwise]
        named += [("baseline", self.baseline)] if self.baseline is not None else []
        for setting, arm in named:
            if arm not in self.arms:
                raise SettingError(setting, arm, f"is no arm{nearest(arm, self.arms)}")

    def trainings(self) -> dict[str, TrainConfig]:
        """The training of each arm that has its own."""
        return {arm: self.train.patched(changes) for arm, changes in self.otherwise.items()}


def read_study(path: Path) -> SyntheticStudyConfig:
    """Raises: SourceError when the file is missing, SettingError for an unknown setting."""
    return SyntheticStudyConfig.parse(read_toml(path), where=path.name)


def run_study(config: SyntheticStudyConfig) -> list[Outcome]:
    """Generates the activations, trains and evaluates all arms.

    Raises: SettingError for a device that does not exist here.
    """
    check_device(config.device, "device")
    seeds = study_seeds(config.study, "explore", config.seeds)
    if config.data_seed != "own":
        return _on_one_dictionary(config, config.data_seed, seeds)
    return [found for seed in seeds for found in _on_one_dictionary(config, seed, [seed])]


def _on_one_dictionary(
    config: SyntheticStudyConfig, data_seed: int, seeds: Sequence[int]
) -> list[Outcome]:
    source = generate(config.data, data_seed, config.contexts, keep=config.keep)
    held_out = generate(config.data, data_seed, config.held_out_contexts, "held_out")
    conditions = Conditions(
        seeds=seeds,
        training=config.train,
        otherwise=config.trainings(),
        levels=config.levels,
        layout=config.layout,
        evals=config.evals,
        device=config.device,
    )
    return train_on(source, held_out, config.arms, conditions)


def table(config: SyntheticStudyConfig, outcomes: Sequence[Outcome]) -> dict[str, Any]:
    """Summary of the outcomes, ready for JSON and for `saelab.report.figures.synthetic`.

    Returns:
        config: all settings.
        seeds: of the columns below.
        values: arm -> metric -> value at the target L0 of each seed, None where it is missing.
        missing: why, as sentences.
        l0: arm -> level -> measured L0 of each seed.
        scalars: arm -> scalar of its activation or input scaling -> value of every cell, in the
            order of training.
        differences: arm -> metric -> arm minus baseline over the seeds that have both: n, mean, sd
            and the 95% t interval from low to high; {} without a baseline.
        oracle: of the true dictionary with the true code, the mean over seeds.
    """
    found: dict[str, Any] = {"config": config.model_dump(mode="json")}
    found["seeds"] = list(dict.fromkeys(outcome.seed for outcome in outcomes))
    found |= {"values": {}, "missing": [], "l0": {}, "scalars": {}, "differences": {}}
    rows = {name: at_target(outcomes, name, config.target_l0) for name in config.metrics}
    for arm in config.arms:
        own = [outcome for outcome in outcomes if outcome.arm == arm]
        mine = {name: [row for row in of if row.arm == arm] for name, of in rows.items()}
        found["values"][arm] = {name: [row.value for row in of] for name, of in mine.items()}
        found["missing"] += [
            f"{arm}, seed {row.seed}, {row.metric}: {row.reason}"
            for of in mine.values()
            for row in of
            if row.value is None
        ]
        found["l0"][arm] = {
            f"{level:g}": [o.value("l0") for o in own if o.level == level]
            for level in config.levels
        }
        found["scalars"][arm] = _columns([_scalars(o.sae) for o in own])
        if config.baseline not in (None, arm):
            found["differences"][arm] = {
                name: _paired(differences(of, arm, config.baseline)) for name, of in rows.items()
            }
    found["oracle"] = {
        name: stats.mean_stderr(outcome.value(name) for outcome in outcomes)[0] for name in ORACLE
    }
    return found


def study_lines(table: Mapping[str, Any]) -> Iterator[str]:
    """Lines of a `table`: metrics and scalars with their range, then paired differences."""
    config, n = table["config"], len(table["seeds"])
    yield f"at L0 {config['target_l0']:g}, mean over seeds (lowest to highest), {count(n, 'seed')}"
    for arm, metrics in table["values"].items():
        yield arm
        for name, values in metrics.items():
            yield f"  {name:20s} {_summary(values)}"
        for name, values in table["scalars"][arm].items():
            yield f"  {name:20s} {_summary(values)} at all levels"
    yield "truth"
    for name, value in table["oracle"].items():
        yield f"  {name:20s} {'missing' if value is None else f'{value:.4f}'}"
    if table["differences"]:
        yield f"arm minus {config['baseline']!r}, paired by seed: mean [95% t interval]"
    for arm, metrics in table["differences"].items():
        yield arm
        for name, paired in metrics.items():
            yield f"  {name:20s} {_interval(paired)}"
    yield from (f"missing: {sentence}" for sentence in table["missing"])


def _scalars(sae: SAE) -> dict[str, float]:
    parts = (sae.activation, sae.scaling)
    return {name: value for part in parts if part for name, value in part.scalars().items()}


def _columns(records: Sequence[Mapping[str, float]]) -> dict[str, list[float]]:
    return {name: [record[name] for record in records] for name in (records[0] if records else ())}


def _paired(row: Sequence[float]) -> dict[str, Any]:
    return asdict(stats.paired_summary(row)) if row else {"n": 0, "mean": None}


def _summary(values: Sequence[float | None]) -> str:
    there = [value for value in values if value is not None]
    lost = len(values) - len(there)
    why = f" [{lost} missing]" if lost else ""
    if not there:
        return f"missing{why}"
    return f"{sum(there) / len(there):.4f} ({min(there):.4f} to {max(there):.4f}){why}"


def _interval(paired: Mapping[str, Any]) -> str:
    if paired["mean"] is None:
        return "missing: no seed has both"
    if paired["low"] is None:
        return f"{paired['mean']:+.4f}, one seed"
    return f"{paired['mean']:+.4f} [{paired['low']:+.4f}, {paired['high']:+.4f}]"
