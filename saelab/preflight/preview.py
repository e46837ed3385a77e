"""What a run is before anything is trained: cells, exact changes, cost, and what it could see.

The smallest effect that a comparison can see is k(n) times the spread of the paired differences
(`stats.smallest_detectable`, 80% power). The spread is taken from a finished run of the study: of
the same arm in the same run, else the median over all arms of all finished runs; without one the
effect is in units of the spread.
"""

from __future__ import annotations

import itertools
import json
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from saelab import stats
from saelab.data import language_model
from saelab.data.activations.foreign import ForeignSource
from saelab.errors import SettingError
from saelab.parts import TABLE
from saelab.preflight.estimate import harvest_seconds, training_seconds
from saelab.preflight.memory import Needs, needs
from saelab.progress import clock
from saelab.runs.folder import MANIFEST, RunFolder
from saelab.runtime.safe_text import visible
from saelab.storage.remote import place_of
from saelab.study.plan import (
    BASELINE,
    PREVIEWED,
    Arm,
    BaseConfig,
    CellSpec,
    PlanConfig,
    arm_settings,
    later_arms,
    resolve_with_placeholders,
)
from saelab.study.registry import deviations, plan_hash
from saelab.study.task import GROUP

if TYPE_CHECKING:
    from saelab.study.task import Launch

ABSENT = "absent"


@dataclass(frozen=True)
class Change:
    """One resolved setting that an arm changes, before and after."""

    setting: str
    base: Any
    arm: Any

    def line(self) -> str:
        return f"{self.setting}: {_short(self.base)} -> {_short(self.arm)}"


@dataclass(frozen=True)
class ArmCheck:
    """One arm before it is trained.

    Args:
        name, comment, twin_of, against: of the arm.
        second_wave: whether it waits for what another arm ends with.
        changes: against the run's base, all of them.
        cells, pairs: cells over all levels, and pairs with the baseline at the target L0.
        test: that will decide, '' where there is no comparison.
        exact_p: the smallest that sign flips can give, Holm over the run's family.
        spread: of the paired differences in a finished run, None without one; `spread_of` says
            where it is from.
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
    test: str = ""
    exact_p: float | None = None
    spread: float | None = None
    spread_of: str = ""
    sees: float | None = None


@dataclass(frozen=True)
class RunCheck:
    """One run before it is trained; `seconds` is with nothing in the cache."""

    name: str
    title: str
    purpose: str
    plan: PlanConfig
    deviations: tuple[str, ...]
    arms: tuple[ArmCheck, ...]
    specs: tuple[CellSpec, ...]
    base: BaseConfig
    needs: Needs
    workers: int
    limit: float

    @property
    def tokens(self) -> int:
        """Over all cells."""
        return sum(spec.train.tokens for spec in self.specs)

    @cached_property
    def seconds(self) -> float:
        """Expected time of the launch with nothing in the cache; timed when it is first asked."""
        base = self.base
        if base.activations is not None:
            width, harvest = ForeignSource.open(place_of(base.activations)).d, 0.0
        else:
            size = language_model.size(base.model)
            tokens = base.train.tokens + base.evaluation.tokens
            each = getattr(torch, base.model.dtype).itemsize
            width, harvest = size.d_model, harvest_seconds(size, tokens, each)
        return harvest + training_seconds(self.specs, width, max(1, self.workers))

    @property
    def warnings(self) -> list[str]:
        """What should be known before it starts; a tuning is judged by no test."""
        if self.purpose == "tune":
            return []
        found = [f"the plan deviates from the registered one: {text}" for text in self.deviations]
        found += [f"left out on purpose: {text}" for text in self.plan.exclusions]
        compared = [arm for arm in self.arms if arm.name != BASELINE]
        family = _family(self.plan, len(compared))
        for n, some in itertools.groupby(sorted(compared, key=_pairs), _pairs):
            names = ", ".join(arm.name for arm in some)
            if text := _no_exact_p(n, family, self.plan.alpha):
                found.append(f"{names}: {text}")
        return found

    def check_limit(self) -> None:
        """Raises: SettingError when the launch is expected to take longer than it may."""
        if self.limit < float("inf"):
            check_limit(self.name, self.seconds, self.limit)

    def as_dict(self) -> dict[str, Any]:
        """Plain data for --json."""
        return {
            "run": self.name,
            "title": self.title,
            "purpose": self.purpose,
            "plan_hash": plan_hash(self.plan),
            "deviations": list(self.deviations),
            "primary": self.plan.primary,
            "cells": len(self.specs),
            "tokens": self.tokens,
            "seconds": round(self.seconds, 1),
            "memory_bytes": self.needs.memory,
            "disk_bytes": self.needs.disk,
            "workers": self.workers,
            "arms": [asdict(arm) for arm in self.arms],
            "warnings": self.warnings,
        }


def check(task: Launch, specs: Sequence[CellSpec], workers: int) -> RunCheck:
    """Looks at a launch whose cells are worked out already (`plan.cells`, which refuses bad ones).

    Raises: SourceError when the language model can't be found.
    """
    base = task.base.patched(dict(task.run.changes))
    spreads = measured_spreads(task.root, task.plan) if task.judged else {}
    arms = tuple(_arm(task, arm, specs, spreads) for arm in task.run.arms)
    return RunCheck(
        task.name,
        task.run.title,
        task.purpose,
        task.plan,
        deviations(task.root, task.plan) if task.judged else (),
        arms,
        tuple(specs),
        base,
        needs(base, specs, workers, GROUP),
        workers,
        task.limit,
    )


def check_limit(run: str, seconds: float, limit: float) -> None:
    """Raises: SettingError when a launch is expected to take longer than it may."""
    if seconds > limit:
        remedy = f"is over the limit of {clock(limit)}: train fewer tokens, arms or seeds"
        raise SettingError(f"expected time of {run}", clock(seconds), remedy)


def _arm(
    task: Launch, arm: Arm, specs: Sequence[CellSpec], spreads: Mapping[tuple[str, str], float]
) -> ArmCheck:
    plan = task.plan
    own = [spec for spec in specs if spec.id.arm == arm.name]
    pairs = sum(spec.is_at_target(plan) for spec in own)
    plain = ArmCheck(
        arm.name,
        arm.comment,
        arm.twin_of,
        arm.against,
        arm in later_arms(task.run),
        arm_changes(task, arm),
        len(own),
        pairs,
    )
    if arm.name == BASELINE or pairs < 2:
        return plain
    family = _family(plan, len(task.run.arms) - 1)
    spread, where = _spread(task.name, arm.name, spreads)
    return replace(
        plain,
        test=stats.choose_test(pairs, family, plan.alpha),
        exact_p=min(1.0, family * 2.0 ** (1 - pairs)),
        spread=spread,
        spread_of=where,
        sees=stats.smallest_detectable(spread or 1.0, pairs, plan.alpha),
    )


def _family(plan: PlanConfig, arms: int) -> int:
    return max(arms, plan.family or 0)


def _pairs(arm: ArmCheck) -> int:
    return arm.pairs


def _no_exact_p(n: int, family: int, alpha: float) -> str:
    """The warning where n pairs can't reach alpha by sign flips; '' where they can."""
    if n < 2:
        return f"{n} pair with the baseline, so no comparison is possible: add seeds to the plan"
    if stats.choose_test(n, family, alpha) == "sign-flip":
        return ""
    holm = f", {min(1.0, family * 2.0 ** (1 - n)):.3g} with Holm over {family}"
    return (
        f"with {n} pairs no exact p below {alpha:g} is possible (smallest 2/{2**n} = "
        f"{2.0 ** (1 - n):.4g}{holm if family > 1 else ''}), so the paired t test decides, which "
        "takes the differences for normal"
    )


# ---- what an arm changes ---------------------------------------------------------------------


def arm_changes(task: Launch, arm: Arm) -> tuple[Change, ...]:
    """The exact difference of the arm's resolved settings from the run's base.

    Raises: SettingError for an unknown setting.
    """
    shown = next(a for a in resolve_with_placeholders(task.run).arms if a.name == arm.name)
    base = task.base.patched(dict(task.run.changes)).model_dump(mode="json")
    settings = arm_settings(task.base, task.run, shown).model_dump(mode="json")
    found = list(_changes("", base, settings))
    if arm.module is not None:
        found.append(Change("module", ABSENT, getattr(arm.module, "__name__", repr(arm.module))))
    return tuple(found)


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
        yield Change(name, old, _found(new))


def _found(value: Any) -> Any:
    """Settings in which a stand-in for what another arm ends with is named as that."""
    if value == PREVIEWED or value == [PREVIEWED, PREVIEWED]:
        return "what another arm ends with"
    if isinstance(value, dict):
        return {name: _found(part) for name, part in value.items()}
    return value


def _short(value: Any) -> str:
    """A setting for people: a part as its kind with what is not at its default."""
    if not isinstance(value, dict) or "kind" not in value:
        return value if isinstance(value, str) else repr(value)
    usual = _defaults(value)
    own = {name: part for name, part in value.items() if name != "kind"}
    said = [f"{k}={_short(v)}" for k, v in own.items() if k not in usual or usual[k] != v]
    return f"{value['kind']}({', '.join(said)})" if said else str(value["kind"])


def _defaults(part: Mapping[str, Any]) -> dict[str, Any]:
    """The defaults of a part's settings, as plain data."""
    for kinds in TABLE.values():
        config = kinds.get(part["kind"])
        if config is not None and set(config.model_fields) == set(part):
            fields = config.model_fields.items()
            usual = {name: field.default for name, field in fields if not field.is_required()}
            return json.loads(json.dumps(usual, default=str))
    return {}


# ---- spreads of finished runs ----------------------------------------------------------------


def measured_spreads(root: Path, plan: PlanConfig) -> dict[tuple[str, str], float]:
    """(run, arm) -> sd of the paired differences of the primary metric, from the runs in `root`."""
    found: dict[tuple[str, str], float] = {}
    for file in sorted(root.glob(f"run_*/{MANIFEST}")):
        manifest = RunFolder(file.parent).manifest
        if manifest.get("primary") != plan.primary or manifest.get("study") != plan.study:
            continue
        for c in manifest.get("comparisons", []):
            if c["detectable"]:
                sd = c["detectable"] / stats.detectable_factor(c["n"], manifest["plan"]["alpha"])
                found[manifest["run"], c["arm"]] = sd
    return found


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


def text(found: RunCheck) -> str:
    """What `saelab plan check` prints for one run."""
    plan, compared = found.plan, len(found.arms) - 1
    lines = [
        f"{found.name}: {found.title}",
        f"  plan {plan_hash(plan)}: {plan.primary}, {plan.direction} is better, smallest effect of "
        f"interest {plan.sesoi:g}, Holm over {_family(plan, compared)}, alpha {plan.alpha:g}"
        + (", confirmatory" if found.purpose == "confirm" else ", exploratory"),
        f"  {len(found.specs)} cells, {found.tokens:,} tokens, about {clock(found.seconds)} with "
        f"{found.workers} workers and nothing in the cache",
        f"  {found.needs.line()}",
    ]
    for arm in found.arms:
        lines += _arm_lines(arm, plan)
    lines += [f"  warning: {warning}" for warning in found.warnings]
    return visible("\n".join(lines), keep="\n")


def _arm_lines(arm: ArmCheck, plan: PlanConfig) -> list[str]:
    notes = [f"{arm.cells} cells"]
    if arm.name != BASELINE:
        notes.append(f"{arm.pairs} pairs")
    if arm.sees is not None:
        unit = f" ({arm.spread_of})" if arm.spread is not None else " spreads of the differences"
        notes += [arm.test, f"sees {plan.primary} from {arm.sees:.3g}{unit}"]
    if arm.second_wave:
        notes.append("second wave")
    if arm.against != BASELINE:
        notes.append(f"against {arm.against}")
    if arm.twin_of:
        notes.append(f"twin of {arm.twin_of}")
    changed = [f"      {change.line()}" for change in arm.changes]
    return [f"  - {arm.name}: {', '.join(notes)}", *changed]
