"""Settings of a study, as data: base, pre-registered plan, runs, arms and cells.

A base (configs/*.toml) says which model, texts, hook and SAE; the plan (plan.toml) what is compared
and how it is judged; the run table (experiment.py) which arms each run has. An arm changes named
settings of the base and nothing else. A cell is an arm at one seed and one sparsity level.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, Field, PositiveInt

from saelab.config import Frozen, read_toml
from saelab.data.activations.harvest import HarvestConfig
from saelab.data.activations.stream import Layout
from saelab.data.language_model import ModelConfig
from saelab.data.text.corpus import TextConfig
from saelab.errors import SettingError, nearest
from saelab.parts import HOW_TO_SET_L0
from saelab.runs.folder import MANIFEST, RunFolder
from saelab.runs.schema import CONTROL, TWIN, CellId, Level, control_arm, level_of
from saelab.runtime.system import same_name
from saelab.sae import SAEConfig
from saelab.seeding import study_seeds
from saelab.storage.validation import folder_name_problem
from saelab.study.checks import check_latents, check_layout, check_settings, naming_arm
from saelab.study.evaluation import EvalConfig
from saelab.study.hooks import HookSettings
from saelab.study.settings import MOST_SETTINGS, SettingConfig
from saelab.training.optim import TrainConfig

BASELINE = "baseline"
#: The remedy for an arm that is to have no common L0.
NO_TARGET = "set target_l0 = 'none' in the plan"
#: Stands for what another arm ends with, before it is known: possible for every setting.
PREVIEWED = 0.4375


#: Seeds at most: each is a cell of every arm, and the list of cells is made first. Our choice.
MOST_SEEDS = 1000
#: Smallest level of a verdict. Our choice: below it two pairs detect no effect of any size.
LEAST_ALPHA = 1e-4


class ParallelConfig(Frozen):
    """One SAE on several processes that torchrun has started (docs/parallel.md).

    Args:
        data: into how many parts the rows of each batch are split; None: as many as there are
            processes for each part of the latents.
        latents: into how many parts the latents are split.
    """

    data: PositiveInt | None = None
    latents: PositiveInt = 1


class BaseConfig(HookSettings):
    """Everything a cell is made from, before an arm changes it.

    Args:
        hook_name, target_hook: see `HookSettings`.
        context: tokens per context, BOS included.
        activations: folder of activations made elsewhere; model and texts are then not used.
        layout: 'rows' (shuffled vectors) or 'contexts' (whole contexts in order).
        tracker: where losses are shown beside metrics.jsonl: 'none', 'tensorboard', 'wandb' or
            'trackio' (extra `tracking`), all offline. No cell depends on it.
    """

    always_shown: ClassVar[frozenset[str]] = frozenset({"hook_name", "model", "sae", "train"})

    model: ModelConfig = ModelConfig()
    context: PositiveInt = 128
    activations: str | None = None
    layout: Layout = "rows"
    train_text: TextConfig = TextConfig(split="train")
    eval_text: TextConfig = TextConfig(split="held_out")
    harvest: HarvestConfig = HarvestConfig()
    sae: SAEConfig = SAEConfig()
    train: TrainConfig = TrainConfig()
    evaluation: EvalConfig = EvalConfig()
    tracker: str = "none"
    parallel: ParallelConfig = ParallelConfig()


def _none(value: Any) -> Any:
    """None from the word for it, which TOML has none for."""
    return None if value == "none" else value


class PlanConfig(Frozen):
    """Settings that are pre-registered (plan.toml).

    Args:
        study: its name; all seeds are derived from it.
        base: path of the base settings, relative to plan.toml.
        primary, direction, sesoi: the metric that is judged, which way is better, and the smallest
            effect of interest in the metric's units.
        target_l0, levels, tolerance: sparsity at which arms are compared ('none', or None in
            Python, leaves every arm at its own), further levels of the frontier, and the allowed
            relative distance.
        seeds, seeds_other, seeds_levels: number of seeds of the baseline and of the run's primary
            arm, of the other arms, and of the two main arms at the further levels.
        alpha: level of the verdict.
        family: comparisons whose intervals hold together, at least; None counts the run's arms.
        comparisons: planned ones of the whole study, which share most of its error budget; None
            counts the arms of the run table.
        exclusions: in words, what is left out on purpose; shown in every report.
        settings: further base settings in which every arm is trained, see `SettingConfig`.
    """

    study: str = Field(min_length=1)
    base: str = "configs/embedded.toml"
    primary: str = "fvu"
    direction: Literal["lower", "higher"] = "lower"
    sesoi: float = Field(default=0.005, gt=0, le=1e12)
    target_l0: Annotated[Level | None, BeforeValidator(_none)] = 32
    levels: tuple[Level, ...] = (16, 64)
    tolerance: float = Field(default=0.05, gt=0, lt=1)
    seeds: int = Field(default=8, gt=0, le=MOST_SEEDS)
    seeds_other: int = Field(default=3, gt=0, le=MOST_SEEDS)
    seeds_levels: int = Field(default=2, ge=0, le=MOST_SEEDS)
    alpha: float = Field(default=0.05, ge=LEAST_ALPHA, lt=0.5)
    family: int | None = Field(default=None, gt=0, le=MOST_SEEDS)
    comparisons: int | None = Field(default=None, gt=0, le=10**6)
    exclusions: tuple[str, ...] = ()
    settings: tuple[SettingConfig, ...] = Field(default=(), max_length=MOST_SETTINGS)


@dataclass(frozen=True)
class Arm:
    """One variant.

    Args:
        name: as it is shown.
        changes: dotted settings of the base and their values, for example
            {"sae.scaling": {"kind": "variance"}, "train.lr": 1e-3}.
        comment: one sentence on what the arm isolates.
        primary: the run's primary arm gets as many seeds as the baseline, and further levels.
        levels: False leaves out the further levels of the baseline or of a primary arm.
        twin_of: the arm whose settings this one repeats on purpose.
        against: the arm that it is compared with.
        expected: gate checks that this arm is expected to fail.
        module: instead of changes to the SAE, the user's own torch module: a callable
            (d_in, d_sae, seed) -> module with `encode`, `decode` and `loss(x) -> scalar`.
    """

    name: str
    changes: Mapping[str, Any] = field(default_factory=dict)
    comment: str = ""
    primary: bool = False
    twin_of: str | None = None
    expected: tuple[str, ...] = ()
    module: Callable[..., Any] | None = None
    against: str = BASELINE
    levels: bool = True


@dataclass(frozen=True)
class FromArm:
    """Stands in an arm's changes for what another arm of the run ends with.

    Arms that hold one are trained in a second wave of the same launch.

    Args:
        arm: the other arm.
        name: of its logged value.
        path: its whole course in the arm's last seed instead of its end, the mean over seeds.
    """

    arm: str
    name: str
    path: bool = False


#: The former name of `FromArm`, kept for one release.
Found = FromArm


@dataclass(frozen=True)
class Run:
    """One launch.

    Args:
        title: as it is shown.
        arms: among them the baseline.
        changes: of the base, for all arms.
        tuned: each arm has the learning rate that `saelab tune` found best for it.
    """

    title: str
    arms: tuple[Arm, ...] | list[Arm]
    changes: Mapping[str, Any] = field(default_factory=dict)
    tuned: bool = field(default=False, kw_only=True)


@dataclass(frozen=True)
class Confirmation(Run):
    """A run that trains the best valid arm of earlier runs beside its own arms, see `confirm`.

    Args:
        among: the earlier runs; all others of the table where none is named.
        leave: names of arms that are never confirmed, such as controls of the learning rate.
    """

    among: tuple[str, ...] = ()
    leave: tuple[str, ...] = ()


@dataclass(frozen=True, eq=False, kw_only=True)
class CellSpec:
    """An arm at one seed and one level, with its settings worked out."""

    id: CellId
    sae: SAEConfig
    train: TrainConfig
    expected: tuple[str, ...] = ()
    module: Callable[..., Any] | None = None

    def is_at_target(self, plan: PlanConfig) -> bool:
        """Returns True if the plan compares this cell, False if it is one of a further level."""
        return self.id.level == level_of(plan.target_l0)


def later_arms(run: Run) -> list[Arm]:
    """The arms of the second wave."""
    return [arm for arm in run.arms if _replaced(arm.changes, lambda _: None) != arm.changes]


def first_wave(run: Run) -> Run:
    """The run without its second wave."""
    later = later_arms(run)
    return replace(run, arms=[arm for arm in run.arms if arm not in later])


def resolve(run: Run, value: Callable[[FromArm], Any]) -> Run:
    """The run with each `FromArm` replaced by its value.

    Raises: SettingError when one names no arm of the first wave.
    """
    names = [arm.name for arm in first_wave(run).arms]

    def checked(found: FromArm) -> Any:
        if found.arm not in names:
            remedy = f"no arm of the first wave{nearest(found.arm, names)}: name one of them"
            raise SettingError("FromArm.arm", found.arm, remedy)
        return value(found)

    arms = [replace(arm, changes=_replaced(arm.changes, checked)) for arm in run.arms]
    return replace(run, arms=arms)


def references(changes: Mapping[str, Any]) -> list[FromArm]:
    """Every `FromArm` in an arm's changes."""
    kept: list[FromArm] = []
    _replaced(changes, lambda found: kept.append(found))
    return kept


def resolve_with_placeholders(run: Run) -> Run:
    """The run with numbers for what is not known before its first wave: to check and to count."""
    return resolve(run, lambda found: (PREVIEWED, PREVIEWED) if found.path else PREVIEWED)


def _replaced(data: Any, value: Callable[[FromArm], Any]) -> Any:
    if isinstance(data, FromArm):
        return value(data)
    if isinstance(data, Mapping):
        return {name: _replaced(part, value) for name, part in data.items()}
    if isinstance(data, (list, tuple)):
        return type(data)(_replaced(part, value) for part in data)
    return data


def read_plan(path: Path) -> PlanConfig:
    """Raises: SourceError when the file is missing, SettingError for an unknown setting."""
    return PlanConfig.parse(read_toml(path), where=path.name)


def describe_probing(base: BaseConfig) -> str:
    """Names the texts of sparse probing in one line; '' for settings without any."""
    foreign = base.activations is not None
    return "" if foreign else base.evaluation.probing.describe(base.model.path)


def read_base(path: Path) -> BaseConfig:
    return BaseConfig.parse(read_toml(path), where=path.name)


def base_of_run(run: RunFolder) -> BaseConfig:
    """Settings that a finished run was made from, the run's own changes included."""
    return BaseConfig.parse(run.required("base")["base"], where=str(run.folder / MANIFEST))


def find_run(runs: Mapping[str, Run], name: str) -> Run:
    """Raises: SettingError when the run is not in the table (nearest name suggested)."""
    if name not in runs:
        remedy = f"no such run{nearest(name, runs)}; the table has {', '.join(runs)}"
        raise SettingError("out_dir", name, remedy)
    return runs[name]


def arm_settings(base: BaseConfig, run: Run, arm: Arm) -> BaseConfig:
    """The base with the run's and the arm's changes.

    Raises: SettingError for an unknown name, or for a change that must hold for the whole launch.
    """
    shared = base.patched(dict(run.changes))
    with naming_arm(arm.name):
        settings = shared.patched(dict(arm.changes))
    for name in type(base).model_fields:
        if name not in ("sae", "train") and getattr(settings, name) != getattr(shared, name):
            remedy = "is shared by all arms of a launch: put it into the run's changes"
            raise SettingError(f"{arm.name}: {name}", getattr(settings, name), remedy)
    if settings.train.batch_size != shared.train.batch_size:
        remedy = "is shared by all arms, which see the same batches: change it for the run"
        raise SettingError(f"{arm.name}: train.batch_size", settings.train.batch_size, remedy)
    return settings


def cells(
    plan: PlanConfig,
    base: BaseConfig,
    run: Run,
    purpose: str = "explore",
    fixed_seeds: Sequence[int] = (),
) -> list[CellSpec]:
    """All cells of a run.

    The baseline and the primary arm have `plan.seeds` seeds at the target L0 and `seeds_levels`
    seeds at each further level; the other arms `seeds_other` seeds at the target.

    Args:
        purpose: name of the stream of seeds.
        fixed_seeds: in place of those of the study, as many as the plan says.

    Raises: SettingError for a run without baseline, equal arms, impossible settings, or an arm
        whose L0 would not be that of its cells.
    """
    _check_arms(run)
    seeds = list(fixed_seeds) or study_seeds(plan.study, purpose, plan.seeds)
    specs: list[CellSpec] = []
    digests: dict[str, str] = {}
    for arm in run.arms:
        settings = arm_settings(base, run, arm)
        with naming_arm(arm.name):
            check_settings(settings)
        _check_equal(arm, settings.digest(), digests)
        main = arm.name == BASELINE or arm.primary
        further = _further_levels(plan) if main and arm.levels else []
        count = plan.seeds if main else min(plan.seeds, plan.seeds_other)
        places = [(level_of(plan.target_l0), seed) for seed in seeds[:count]]
        places += [(level, seed) for level in further for seed in seeds[: plan.seeds_levels]]
        for level, seed in places:
            sae = settings.sae.at_l0(level) if level and settings.sae.decides_l0 else settings.sae
            check_layout(arm.name, sae, settings.layout, "sae", bool(settings.target_hook))
            check_latents(arm.name, sae)
            specs.append(
                CellSpec(
                    id=CellId(arm.name, seed, level),
                    sae=sae,
                    train=settings.train,
                    expected=tuple(arm.expected),
                    module=arm.module,
                )
            )
        if plan.target_l0:
            _check_l0(arm, settings.sae, plan.target_l0, further)
    return specs


def _further_levels(plan: PlanConfig) -> list[float]:
    """The plan's levels besides the target that have cells; none without a target."""
    if not plan.target_l0 or not plan.seeds_levels:
        return []
    return [level for level in dict.fromkeys(plan.levels) if level != plan.target_l0]


def _check_l0(arm: Arm, sae: SAEConfig, target: float, further: Sequence[float]) -> None:
    """Raises: SettingError where cells would be named by an L0 that nothing gives them."""
    if arm.module is None and not sae.l0_rules(target):
        remedy = f"no part of this arm sets or finds its L0: {HOW_TO_SET_L0}, or {NO_TARGET}"
        raise SettingError(f"{arm.name}: target_l0", target, remedy)
    if further and not has_levels(arm, sae, target):
        levels = ", ".join(f"{level:g}" for level in further)
        remedy = (
            f"its L0 does not follow the level, so cells at L0 {levels} would be trained like "
            f"those at {target:g}: give this arm levels=False"
        )
        raise SettingError(f"{arm.name}: levels", further[0], remedy)


def frozen_control(specs: Sequence[CellSpec]) -> CellSpec | None:
    """Returns the baseline's cell that a control trains again with a decoder that stays random;
    None where it has no decoder of its own."""
    first = next((spec for spec in specs if spec.id.arm == BASELINE), None)
    return None if first is None or first.module is not None or first.sae.tied else first


def twin_controls(specs: Sequence[CellSpec], plan: PlanConfig) -> list[CellSpec]:
    """Returns the baseline's cells at fresh seeds, as many as a side arm has: the run's A/A twin.

    None where the baseline is the user's own module, which only its arm in the run table names.
    """
    first = next((spec for spec in specs if spec.id.arm == BASELINE), None)
    if first is None or first.module is not None:
        return []
    seeds = study_seeds(plan.study, "twin", min(plan.seeds, plan.seeds_other))
    ids = [CellId(control_arm(TWIN), seed, first.id.level) for seed in seeds]
    return [replace(first, id=id) for id in ids]


def has_levels(arm: Arm, sae: SAEConfig, level: float) -> bool:
    """Says whether the cells of an arm at several levels differ.

    Args:
        sae: its settings.
        level: one of them.
    """
    return arm.module is None and sae.l0_rules(level) == {"set"}


def _check_equal(arm: Arm, digest: str, digests: dict[str, str]) -> None:
    """Refuses an arm that repeats another unless it is declared its twin, and a twin that is none.

    Args:
        digests: of the arms before this one, by name; this one's is added.
    """
    if arm.twin_of is not None and digests.get(arm.twin_of) != digest:
        remedy = "must be an arm before this one with exactly its settings: fix one of the two"
        raise SettingError(f"{arm.name}: twin_of", arm.twin_of, remedy)
    equal = [name for name, other in digests.items() if other == digest]
    if equal and arm.twin_of is None and arm.module is None:
        remedy = f"has exactly the settings of {equal[0]!r}: change it or declare twin_of"
        raise SettingError("arm", arm.name, remedy)
    if arm.module is None:
        digests[arm.name] = digest


def _check_arms(run: Run) -> None:
    names = [arm.name for arm in run.arms]
    arms = {arm.name: arm for arm in run.arms}
    if BASELINE not in names:
        raise SettingError("arms", names, f"every run trains the baseline: add Arm({BASELINE!r})")
    for name in names:
        if sum(same_name(name, other) for other in names) > 1:
            raise SettingError("arm", name, "occurs twice: names must differ")
        if arms[name].against not in names or arms[name].against == name != BASELINE:
            remedy = f"is no other arm of the run{nearest(arms[name].against, names)}: name one"
            raise SettingError(f"{name}: against", arms[name].against, remedy)
        problem = folder_name_problem(name)
        if not problem and name.startswith(CONTROL):
            problem = f"names a folder: what starts with {CONTROL!r} is a control"
        if problem:
            raise SettingError("arm", name, problem)
