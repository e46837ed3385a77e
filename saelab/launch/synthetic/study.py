"""Settings of a study on synthetic activations, how it is tuned and trained."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, PositiveInt

from saelab import stats
from saelab.config import Frozen, read_toml
from saelab.data.activations.store import Source
from saelab.data.activations.stream import Layout
from saelab.data.devices import check_device
from saelab.data.synthetic.chains import Process, SyntheticConfig, generate, parse_process
from saelab.errors import SettingError, nearest
from saelab.evals import check_names
from saelab.launch.synthetic.matched import at_target
from saelab.launch.synthetic.training import EVALS, Conditions, Outcome, train_on
from saelab.runs.schema import Level
from saelab.sae import SAEConfig
from saelab.seeding import study_seeds
from saelab.training.optim import TrainConfig

#: Metrics that are shown where nothing else is asked for: each score with its chance level.
SHOWN = ("fvu", "explained_variance", "mcc", "chance_mcc", "firing_f1", "chance_firing_f1")
SHOWN += ("uniqueness", "chance_uniqueness", "dead_share")
#: Relative distance from the target L0 within which a cell of the only level stands for it. Our
#: choice: calibration ends within half of it.
NEAR = 0.01

Direction = Literal["lower", "higher"]


class JudgedConfig(Frozen):
    """A metric that gets a word.

    Args:
        direction: which way is better.
        sesoi: smallest effect of interest, in the metric's units.
    """

    direction: Direction
    sesoi: float = Field(gt=0, le=1e12)


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
        levels: L0 that are trained for; they must lie on both sides of the target, or be the target
            alone, where a cell within 1% of it stands for it.
        calibration_contexts: further contexts, on which the L0 of each SAE is brought to its level
            (`saelab.training.calibration_text`); 0: it stays as it was trained.
        rates: learning rates that every arm is tried at, on `tuning_seeds` seeds of their own; it
            is then trained at the one with the best mean of the first of `judged`.
        baseline: the arm that the others are paired with; None leaves the pairing out.
        evals: what is measured.
        metrics: that are shown.
        judged: metrics that get a word, with the direction that is better and the smallest effect
            of interest; needs a baseline.
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
    calibration_contexts: int = Field(default=0, ge=0)
    rates: tuple[Annotated[float, Field(gt=0, lt=1e3)], ...] = ()
    tuning_seeds: PositiveInt = 2
    judged: dict[str, JudgedConfig] = Field(default={})
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
        if self.judged and self.baseline is None:
            raise SettingError("judged", list(self.judged), "needs a baseline: name an arm")
        if self.rates and not self.judged:
            raise SettingError("rates", list(self.rates), "needs a metric of `judged` to choose by")

    def trainings(self) -> dict[str, TrainConfig]:
        """The training of each arm that has its own."""
        return {arm: self.train.patched(changes) for arm, changes in self.otherwise.items()}

    @property
    def tolerance(self) -> float:
        """Relative distance from the target within which a cell stands for it."""
        return NEAR if len(self.levels) == 1 else 0.0


def read_study(path: Path) -> SyntheticStudyConfig:
    """Raises: SourceError when the file is missing, SettingError for an unknown setting."""
    return SyntheticStudyConfig.parse(read_toml(path), where=path.name)


def run_study(config: SyntheticStudyConfig) -> list[Outcome]:
    """Generates the activations, trains and evaluates all arms.

    Raises: SettingError for a device that does not exist here.
    """
    seeds = study_seeds(config.study, "explore", config.seeds)
    return _train(config, config.arms, config.trainings(), seeds)


def tune(
    config: SyntheticStudyConfig,
) -> tuple[SyntheticStudyConfig, dict[str, dict[str, float | None]]]:
    """Tries every arm at every one of `rates`.

    An arm that has a value at no rate, as one that never reaches the target L0, keeps its own.

    Returns: the settings with each arm at its best rate, and arm -> rate -> mean of the metric;
        without rates the settings as they are, and nothing.
    """
    if not config.rates:
        return config, {}
    metric, judged = next(iter(config.judged.items()))
    tried = {(arm, rate): f"{arm} lr {rate:g}" for arm in config.arms for rate in config.rates}
    outcomes = _train(
        config,
        {name: config.arms[arm] for (arm, _), name in tried.items()},
        {name: config.train.patched({"lr": rate}) for (_, rate), name in tried.items()},
        study_seeds(config.study, "tune", config.tuning_seeds),
    )
    rows = at_target(outcomes, metric, config.target_l0, config.tolerance)
    trials: dict[str, dict[str, float | None]] = {arm: {} for arm in config.arms}
    for (arm, rate), name in tried.items():
        values = [row.value for row in rows if row.arm == name]
        trials[arm][f"{rate:g}"] = None if None in values else stats.mean_stderr(values)[0]
    best = {arm: _best(t, judged.direction, config.train.lr) for arm, t in trials.items()}
    otherwise = {arm: config.otherwise.get(arm, {}) | {"lr": best[arm]} for arm in config.arms}
    return config.patched({"otherwise": otherwise, "rates": ()}), trials


def _best(trials: Mapping[str, float | None], direction: Direction, otherwise: float) -> float:
    """Returns the rate with the best value; `otherwise` where no rate has one."""
    there = {rate: value for rate, value in trials.items() if value is not None}
    choose = min if direction == "lower" else max
    return float(choose(there, key=lambda rate: there[rate], default=otherwise))


def _train(
    config: SyntheticStudyConfig,
    arms: Mapping[str, SAEConfig],
    otherwise: Mapping[str, TrainConfig],
    seeds: Sequence[int],
) -> list[Outcome]:
    """Trains arms on the study's activations: on one dictionary, or on one for each seed."""
    check_device(config.device, "device")
    groups = [(config.data_seed, seeds)]
    if config.data_seed == "own":
        groups = [(seed, [seed]) for seed in seeds]
    outcomes: list[Outcome] = []
    for data_seed, of_seeds in groups:
        conditions = Conditions(
            seeds=of_seeds,
            training=config.train,
            otherwise=otherwise,
            levels=config.levels,
            layout=config.layout,
            evals=config.evals,
            device=config.device,
        )
        parts = {"train": config.contexts, "held_out": config.held_out_contexts}
        made = {p: _generate(config, int(data_seed), n, p) for p, n in parts.items()}
        calibration = None
        if config.calibration_contexts:
            contexts = config.calibration_contexts
            calibration = _generate(config, int(data_seed), contexts, "calibration")
        outcomes += train_on(made["train"], made["held_out"], arms, conditions, calibration)
    return outcomes


def _generate(config: SyntheticStudyConfig, seed: int, contexts: int, part: str) -> Source:
    keep = config.keep or part != "train"
    return generate(config.data, seed, contexts, part, keep=keep)
