"""A run before anything is trained: its cells, exact changes, cost, and smallest visible effect.

The smallest effect that a comparison can see (`stats.detectable_ratio`, 80% power) is a multiple of
the spread of the difference of two cells of one seed. The spread is taken from a finished run of
the study: of the same arm in the same run, else the median over all arms of all finished runs;
without one the effect is in units of the spread.
"""

from __future__ import annotations

import itertools
import json
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from operator import attrgetter
from pathlib import Path
from typing import TYPE_CHECKING, Any

from saelab import stats
from saelab.data import language_model
from saelab.data.activations.foreign import ForeignSource
from saelab.errors import SettingError
from saelab.parts import TABLE
from saelab.preflight.cost import Needs, launch_needs
from saelab.preflight.launch_time import Measured, preparation_seconds, training_seconds
from saelab.progress import clock
from saelab.runs.folder import MANIFEST, RunFolder
from saelab.runs.schema import QUICK, level_of
from saelab.runtime.counting import count
from saelab.runtime.safe_text import visible
from saelab.storage.remote import place_of
from saelab.study.calibration import calibration_tokens, describe_calibration
from saelab.study.plan import (
    BASELINE,
    PREVIEWED,
    Arm,
    BaseConfig,
    CellSpec,
    PlanConfig,
    frozen_control,
    later_arms,
    resolve_with_placeholders,
    twin_controls,
)
from saelab.study.registry import deviations, plan_hash
from saelab.study.settings import OF_PLAN
from saelab.study.task import GROUP

if TYPE_CHECKING:
    from saelab.study.task import Launch

ABSENT = "absent"


@dataclass(frozen=True)
class Change:
    """One resolved setting that an arm changes.

    Args:
        setting: its dotted name.
        base, arm: its value in the base settings and in the arm.
    """

    setting: str
    base: Any
    arm: Any

    def line(self) -> str:
        return f"{self.setting}: {_short(self.base)} -> {_short(self.arm)}"


@dataclass(frozen=True, kw_only=True)
class ArmCheck:
    """One arm before it is trained.

    Args:
        name, comment, twin_of, against: of the arm.
        second_wave: whether it waits for what another arm ends with.
        changes: against the run's base, all of them.
        cells, pairs: cells over all levels, and pairs with the baseline at the target L0.
        spread: of the difference of two cells of one seed in a finished run, None without one.
        spread_of: where it is from.
        sees: smallest effect seen with 80% power, in the metric's unit, or in spreads without one.
    """

    name: str
    comment: str
    twin_of: str | None
    against: str
    second_wave: bool
    changes: tuple[Change, ...]
    cells: int
    pairs: int
    spread: float | None = None
    spread_of: str = ""
    sees: float | None = None


@dataclass(frozen=True, kw_only=True)
class RunCheck:
    """One run before it is trained; `seconds` is with nothing in the cache.

    Args:
        task: the launch.
        base: the settings with the run's changes.
        specs, arms: its cells and arms.
        deviations: of the plan from the registered one.
        workers, needs: processes that train it, and the bytes that it takes with them.
        settings: the same run in each further setting of the plan, trained one after another.
        level: of each comparison.
    """

    task: Launch
    base: BaseConfig
    specs: tuple[CellSpec, ...]
    arms: tuple[ArmCheck, ...]
    deviations: tuple[str, ...]
    workers: int
    needs: Needs
    level: float
    settings: tuple[RunCheck, ...] = ()

    @property
    def twins(self) -> tuple[CellSpec, ...]:
        """Cells of the A/A twin; a single comparison and a tuning have none."""
        return tuple(twin_controls(self.specs, self.task.plan)) if self.task.judged else ()

    @property
    def tokens(self) -> int:
        """Over all cells and the controls that are trained."""
        frozen = frozen_control(self.specs)
        trained = [*self.specs, *self.twins, *([frozen] if frozen else [])]
        return sum(spec.train.tokens for spec in trained)

    @cached_property
    def seconds(self) -> float:
        """Expected time of the launch with nothing in the cache; timed when it is first asked."""
        base = self.base
        if base.activations is not None:
            width = ForeignSource.open(place_of(base.activations)).d
        else:
            width = language_model.size(base.model).d_model
        measured = Measured.of(base, width, level_of(self.task.plan.target_l0))
        whole = training_seconds([*self.specs, *self.twins], measured, max(1, self.workers))
        return preparation_seconds(base) + whole

    @property
    def all_settings(self) -> list[RunCheck]:
        """The run in the plan's own base, then in each further setting."""
        return [self, *self.settings]

    @property
    def total_seconds(self) -> float:
        """Expected time over all settings."""
        return sum(each.seconds for each in self.all_settings)

    @property
    def total_disk(self) -> int:
        """Bytes of all activations; settings that are trained on the same ones share them."""
        return sum({_harvested(each.base): each.needs.disk for each in self.all_settings}.values())

    @property
    def warnings(self) -> list[str]:
        """Problems to know before it starts; a tuning is judged by no test."""
        plan = self.task.plan
        if self.task.purpose in ("tune", QUICK):
            return []
        texts = [f"the plan deviates from the registered one: {text}" for text in self.deviations]
        texts += [f"left out on purpose: {text}" for text in plan.exclusions]
        compared = [arm for arm in self.arms if arm.name != BASELINE]
        pairs = attrgetter("pairs")
        for n, arms in itertools.groupby(sorted(compared, key=pairs), pairs):
            names = ", ".join(arm.name for arm in arms)
            if n < 2:
                remedy = "so no comparison is possible: add seeds to the plan"
                texts.append(f"{names}: {n} cell at the target L0, {remedy}")
        return texts

    def check_limit(self) -> None:
        """Raises: SettingError when the launch is expected to take longer than it may."""
        if self.task.limit < float("inf"):
            check_limit(self.task.label, self.total_seconds, self.task.limit)

    def as_dict(self) -> dict[str, Any]:
        """Plain data for --json."""
        return {
            "run": self.task.name,
            "title": self.task.run.title,
            "purpose": self.task.purpose,
            "plan_hash": plan_hash(self.task.plan),
            "deviations": list(self.deviations),
            "primary": self.task.plan.primary,
            "cells": len(self.specs),
            "twin_cells": len(self.twins),
            "tokens": self.tokens,
            "seconds": round(self.seconds, 1),
            "memory_bytes": self.needs.memory,
            "disk_bytes": self.needs.disk,
            "workers": self.workers,
            "level": self.level,
            "arms": [asdict(arm) for arm in self.arms],
            "warnings": self.warnings,
            **(self._settings_as_dict() if self.settings else {}),
        }

    def _settings_as_dict(self) -> dict[str, Any]:
        checks = {_setting_name(each): each for each in self.all_settings}
        return {
            "settings": {
                name: {
                    "cells": len(each.specs),
                    "tokens": each.tokens,
                    "seconds": round(each.seconds, 1),
                    "memory_bytes": each.needs.memory,
                    "disk_bytes": each.needs.disk,
                }
                for name, each in checks.items()
            },
            "total": {
                "cells": sum(len(each.specs) for each in self.all_settings),
                "tokens": sum(each.tokens for each in self.all_settings),
                "seconds": round(self.total_seconds, 1),
                "memory_bytes": max(each.needs.memory for each in self.all_settings),
                "disk_bytes": self.total_disk,
            },
        }


def check(
    task: Launch, specs: Sequence[CellSpec], workers: int, level: float | None = None
) -> RunCheck:
    """Looks at a launch whose cells are worked out already (`plan.cells`, which refuses bad ones).

    Args:
        level: of each comparison, from the study's error budget; None: alpha over the family.

    Raises: SourceError when the language model can't be found.
    """
    base = task.base.patched(dict(task.run.changes))
    spreads = measured_spreads(task.root, task.plan) if task.judged else {}
    resolved = resolve_with_placeholders(task.run).arms
    changes = {arm.name: arm_changes(base, arm) for arm in resolved}
    level = level or task.plan.alpha / max(1, _family(task.plan, len(task.run.arms) - 1))
    arms = [_arm(task, arm, changes[arm.name], specs, spreads, level) for arm in task.run.arms]
    twins = twin_controls(specs, task.plan) if task.judged else []
    return RunCheck(
        task=task,
        base=base,
        specs=tuple(specs),
        arms=tuple(arms),
        deviations=_deviations(task),
        workers=workers,
        level=level,
        needs=launch_needs(base, [*specs, *twins], workers, GROUP),
    )


def check_limit(run: str, seconds: float, limit: float) -> None:
    """Raises: SettingError when a launch is expected to take longer than it may."""
    if seconds > limit:
        remedy = f"is over the limit of {clock(limit)}: train fewer tokens, arms or seeds"
        raise SettingError(f"expected time of {run}", clock(seconds), remedy)


def _arm(
    task: Launch,
    arm: Arm,
    changes: tuple[Change, ...],
    specs: Sequence[CellSpec],
    spreads: Mapping[tuple[str, str], float],
    level: float,
) -> ArmCheck:
    plan = task.plan
    own = [spec for spec in specs if spec.id.arm == arm.name]
    pairs = sum(spec.is_at_target(plan) for spec in own)
    plain = ArmCheck(
        name=arm.name,
        comment=arm.comment,
        twin_of=arm.twin_of,
        against=arm.against,
        second_wave=arm in later_arms(task.run),
        changes=changes,
        cells=len(own),
        pairs=pairs,
    )
    if arm.name == BASELINE or pairs < 2:
        return plain
    others = sum(s.id.arm == arm.against and s.is_at_target(plan) for s in specs)
    spread, source = _spread(task.name, arm.name, spreads)
    return replace(
        plain,
        spread=spread,
        spread_of=source,
        sees=_smallest_seen(pairs, others, level) * (spread or 1.0),
    )


def _family(plan: PlanConfig, arms: int) -> int:
    return max(arms, plan.family or 0)


def _smallest_seen(pairs: int, others: int, level: float) -> float:
    """Smallest effect seen with 80% power, in spreads of the difference of two cells of one seed.

    Args:
        pairs: cells of the arm, whose seeds the other arm has too.
        others: cells of the other arm.
    """
    shared = min(pairs, others)
    df = stats.degrees_of_freedom(shared, pairs + others - 2 * shared)
    return stats.detectable_ratio(df, level) * stats.planned_error(pairs, others, shared)


# ---- what an arm changes ---------------------------------------------------------------------


def arm_changes(base: BaseConfig, arm: Arm) -> tuple[Change, ...]:
    """The exact difference of an arm's settings from the run's base."""
    old, new = (x.model_dump(mode="json") for x in (base, base.patched(dict(arm.changes))))
    changes = list(_changes("", old, new))
    if arm.module is not None:
        changes.append(Change("module", ABSENT, getattr(arm.module, "__name__", repr(arm.module))))
    return tuple(changes)


def _changes(name: str, old: Any, new: Any) -> Iterator[Change]:
    """Differences of plain data, as deep as both have the same shape; a part of another kind is
    one difference."""
    if old == new:
        return
    if isinstance(old, dict) and isinstance(new, dict) and old.get("kind") == new.get("kind"):
        for key in dict.fromkeys([*old, *new]):
            where = f"{name}.{key}" if name else key
            yield from _changes(where, old.get(key, ABSENT), new.get(key, ABSENT))
    elif isinstance(old, list) and isinstance(new, list):
        for i, (a, b) in enumerate(itertools.zip_longest(old, new, fillvalue=ABSENT)):
            yield from _changes(f"{name}.{i}", a, b)
    else:
        yield Change(name, old, _name_placeholders(new))


def _name_placeholders(value: Any) -> Any:
    """Settings in which a stand-in for the end of another arm is named as that."""
    if value == PREVIEWED or value == [PREVIEWED, PREVIEWED]:
        return "what another arm ends with"
    if isinstance(value, dict):
        return {name: _name_placeholders(part) for name, part in value.items()}
    return value


def _short(value: Any) -> str:
    """A setting for people: a part as its kind with what is not at its default."""
    if not isinstance(value, dict) or "kind" not in value:
        return value if isinstance(value, str) else repr(value)
    usual = _defaults(value)
    settings = [
        f"{name}={_short(part)}"
        for name, part in value.items()
        if name != "kind" and (name not in usual or usual[name] != part)
    ]
    return f"{value['kind']}({', '.join(settings)})" if settings else str(value["kind"])


def _defaults(part: Mapping[str, Any]) -> dict[str, Any]:
    """The defaults of a part's settings, as plain data."""
    for kinds in TABLE.values():
        config = kinds.get(part["kind"])
        if config is None:
            continue
        names = set(config.model_fields)
        if names - config.added_later <= set(part) <= names:
            fields = config.model_fields.items()
            usual = {name: field.default for name, field in fields if not field.is_required()}
            return json.loads(json.dumps(usual, default=str))
    return {}


# ---- spreads of finished runs ----------------------------------------------------------------


def measured_spreads(root: Path, plan: PlanConfig) -> dict[tuple[str, str], float]:
    """Reads the finished runs in `root`: (run, arm) -> sd of the paired differences of the primary
    metric."""
    spreads: dict[tuple[str, str], float] = {}
    for file in sorted(root.glob(f"run_*/{MANIFEST}")):
        manifest = RunFolder(file.parent).manifest
        if manifest.get("primary") != plan.primary or manifest.get("study") != plan.study:
            continue
        for c in manifest.get("comparisons", []):
            if c.get("spread"):
                spreads[manifest["run"], c["arm"]] = c["spread"]
    return spreads


def _spread(
    run: str, arm: str, spreads: Mapping[tuple[str, str], float]
) -> tuple[float | None, str]:
    if (run, arm) in spreads:
        return spreads[run, arm], f"of {arm} in {run}"
    if spreads:
        runs = ", ".join(sorted({name for name, _ in spreads}))
        return statistics.median(spreads.values()), f"median over the arms of {runs}"
    return None, ""


# ---- in words --------------------------------------------------------------------------------


def check_text(run: RunCheck) -> str:
    """Text that `saelab plan check` prints for one run."""
    task, plan, compared = run.task, run.task.plan, len(run.arms) - 1
    lines = [
        f"{task.name}: {task.run.title}",
        f"  plan {plan_hash(plan)}: {plan.primary}, {plan.direction} is better, smallest effect of "
        f"interest {plan.sesoi:g}, family of {_family(plan, compared)}, alpha {plan.alpha:g}, "
        f"level {run.level:.2g}"
        + (", confirmatory" if task.purpose == "confirm" else ", exploratory"),
        f"  {count(len(run.specs), 'cell')}{_twin_text(run)} and the controls, "
        f"{count(run.tokens, 'token')}, about "
        f"{clock(run.seconds)} with {count(run.workers, 'worker')} and nothing in the cache",
        f"  {run.needs.line()}",
        f"  {describe_calibration(run.base, [spec.sae for spec in run.specs])}",
    ]
    lines += _setting_lines(run)
    for arm in run.arms:
        lines += _arm_lines(arm, plan)
    lines += [f"  warning: {warning}" for warning in run.warnings]
    return visible("\n".join(lines), keep="\n")


def _deviations(task: Launch) -> tuple[str, ...]:
    """Deviations of a run's plan, base settings and run table; () outside a study."""
    if not task.judged:
        return ()
    return deviations(task.root, task.plan, task.base, task.table, task.setting)


def _setting_name(check: RunCheck) -> str:
    return check.task.setting or OF_PLAN


def _harvested(base: BaseConfig) -> str:
    """Names the activations that a launch with these settings harvests."""
    asked = {"model", "hook_name", "target_hook", "context", "activations"}
    asked |= {"train_text", "eval_text", "harvest"}
    tokens = (base.train.tokens, base.evaluation.tokens, calibration_tokens(base))
    tokens = (*tokens, base.evaluation.probing.model_dump_json())
    return f"{base.model_dump_json(include=asked)} {tokens}"


def _setting_lines(run: RunCheck) -> list[str]:
    """Lines on the cost of each setting and of all of them; [] without further settings."""
    if not run.settings:
        return []
    rows = [["setting", "cells", "tokens", "time", "memory", "disk", "what differs"]]
    base = run.base.model_dump(mode="json")
    for each in run.all_settings:
        differs = _changes("", base, each.base.model_dump(mode="json"))
        what = "; ".join(change.line() for change in differs)
        cost = (len(each.specs), each.tokens, each.seconds, each.needs.memory, each.needs.disk)
        rows.append([_setting_name(each), *_cost_texts(*cost), what])
    cells = sum(len(each.specs) for each in run.all_settings)
    tokens = sum(each.tokens for each in run.all_settings)
    memory = max(each.needs.memory for each in run.all_settings)
    total = _cost_texts(cells, tokens, run.total_seconds, memory, run.total_disk)
    rows.append(["in total", *total, ""])
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return [
        "  " + "  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip()
        for row in rows
    ]


def _cost_texts(cells: int, tokens: int, seconds: float, memory: int, disk: int) -> list[str]:
    sizes = (f"{size / 1e9:.1f} GB" for size in (memory, disk))
    return [str(cells), f"{tokens:,}", clock(seconds), *sizes]


def _twin_text(run: RunCheck) -> str:
    return f", {len(run.twins)} of the A/A twin" if run.twins else ""


def _arm_lines(arm: ArmCheck, plan: PlanConfig) -> list[str]:
    notes = [count(arm.cells, "cell")]
    if arm.name != BASELINE:
        notes.append(count(arm.pairs, "pair"))
    if arm.sees is not None:
        unit = f" ({arm.spread_of})" if arm.spread is not None else " spreads of the differences"
        notes += [f"sees {plan.primary} from {arm.sees:.3g}{unit}"]
    if arm.second_wave:
        notes.append("second wave")
    if arm.against != BASELINE:
        notes.append(f"against {arm.against}")
    if arm.twin_of:
        notes.append(f"twin of {arm.twin_of}")
    changed = [f"      {change.line()}" for change in arm.changes]
    return [f"  - {arm.name}: {', '.join(notes)}", *changed]
