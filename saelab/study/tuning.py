"""Equal tuning: every arm at the best of equally many learning rates, found on seeds of its own.

`saelab tune run_i` tries FACTORS of each arm's rate and writes the best into tuned.json. A run with
`tuned = True` then trains its arms at these rates; a confirming run shows both sides tuned next to
themselves. A trial that misses the plan's L0 cannot win, since fewer zeros would buy it the better
number.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field

from saelab.errors import SettingError
from saelab.storage.atomic import read_json, write_json
from saelab.storage.validation import Number, validate
from saelab.study.checks import off_target
from saelab.study.plan import (
    BASELINE,
    Arm,
    BaseConfig,
    PlanConfig,
    Run,
    arm_settings,
    references,
    resolve_with_placeholders,
)
from saelab.study.registry import plan_hash

TUNED, COMMAND = "tuned.json", "tune"
#: Learning rates that are tried, as multiples of the arm's own, and seeds of each trial.
FACTORS, TRIAL_SEEDS = (0.5, 1.0, 2.0), 2
#: A learning rate as a name.
Rate = Annotated[str, Field(pattern=r"^[0-9.]{1,20}(e[-+]?[0-9]{1,2})?$")]


class TunedArm(BaseModel):
    """Results of tuning an arm: its best rate, rate -> the metric's mean, and rate -> the reason
    why it could not win."""

    model_config = ConfigDict(strict=True, extra="forbid")
    rate: Annotated[float, Field(alias="train.lr", gt=0, lt=1e3)]
    trials: Annotated[dict[Rate, Number | None], Field(min_length=len(FACTORS))]
    left_out: dict[Rate, str] = {}


def declare_twins(run: Run, base: BaseConfig) -> Run:
    """The run with arms that have an earlier one's settings declared its twins."""
    first: dict[str, str] = {}
    arms = []
    for arm, shown in zip(run.arms, resolve_with_placeholders(run).arms, strict=True):
        settings = arm_settings(base, run, shown).digest()
        arms.append(arm if arm.module else replace(arm, twin_of=first.get(settings)))
        first.setdefault(settings, arm.name)
    return replace(run, arms=arms)


def needed_arms(arm: Arm) -> list[str]:
    """Arms whose ends the arm's settings are made of."""
    return [found.arm for found in references(arm.changes) if found.arm != BASELINE]


def arms_to_tune(run: Run) -> tuple[list[Arm], list[str]]:
    """Returns the arms of a run that can be tried next to its baseline, and the names of those to
    tune: all of a `tuned` run, of any other the baseline and the primary arms."""
    if run.tuned:
        arms = [replace(arm, against=BASELINE) for arm in run.arms]
        return arms, [arm.name for arm in arms]
    arms = [arm for arm in run.arms if arm.against == BASELINE]
    names = [arm.name for arm in arms if arm.name == BASELINE or arm.primary]
    return arms, [name for name in names if name != f"{BASELINE} tuned"]


def trials(run: Run, base: BaseConfig, names: Sequence[str]) -> Run:
    """A run that tries every rate for each of the named arms, the baseline among them."""
    waited = {other for arm in run.arms if arm.name in names for other in needed_arms(arm)}
    arms = [arm for arm in run.arms if arm.name in {BASELINE, *waited}]
    for arm in run.arms:
        if arm.name in names:
            rate = arm_settings(base, run, arm).train.lr
            tried = [
                (factor, dict(arm.changes) | {"train.lr": factor * rate}) for factor in FACTORS
            ]
            arms += [
                replace(arm, name=trial(arm.name, factor), changes=changes, twin_of=None)
                for factor, changes in tried
                if trial(arm.name, factor) != BASELINE
            ]
    return declare_twins(replace(run, title=f"Learning rates of {run.title}", arms=arms), base)


def trial(arm: str, factor: float) -> str:
    return arm if factor == 1 else f"{arm} lr x{factor:g}"


def trial_plan(plan: PlanConfig) -> PlanConfig:
    """Returns the plan with the same number of seeds for every trial, at the target alone, and
    without further settings."""
    few = {"seeds": TRIAL_SEEDS, "seeds_other": TRIAL_SEEDS, "levels": (), "seeds_levels": 0}
    return plan.patched(few | {"settings": ()})


def keep_best(
    root: Path,
    name: str,
    run: Run,
    base: BaseConfig,
    plan: PlanConfig,
    info: Mapping[str, Any],
    names: Sequence[str],
) -> dict[str, Any]:
    """Writes each arm's best rate and all its trials into tuned.json.

    An arm of which no trial has a number at the plan's L0 stays at its own rate, and every trial is
    listed with its reason: its verdict is then refused, and the other arms have theirs.

    Args:
        info: final_info.json of the trials.

    Raises: SettingError for such a baseline, with which nothing can be compared.
    """  # fmt: skip
    found: dict[str, Any] = {"plan_hash": plan_hash(plan), "primary": plan.primary}
    for arm in (arm for arm in run.arms if arm.name in names):
        rate = arm_settings(base, run, arm).train.lr
        tried = {factor: info[trial(arm.name, factor)] for factor in FACTORS}
        found[arm.name] = _best_rate(arm.name, rate, tried, plan)
    write_json(root / TUNED, read_tuned(root) | {name: found})
    return found


def _best_rate(
    arm: str, rate: float, tried: Mapping[float, Mapping[str, Any]], plan: PlanConfig
) -> dict[str, Any]:
    """Entry of an arm in tuned.json.

    Args:
        rate: the arm's own, that each factor multiplies.
        tried: factor -> its trial in final_info.json.

    Raises: SettingError for a baseline of which no trial has a number at the plan's L0.
    """
    names = {f"{f * rate:g}": f for f in tried}
    by_name = {name: tried[f] for name, f in names.items()}
    best, left_out = choose_best(by_name, plan, lambda name: (names[name] != 1, names[name]))
    if best is None and arm == BASELINE:
        each = "; ".join(f"{one}: {text}" for one, text in left_out.items())
        remedy = f"no learning rate gives valid cells at the plan's L0 ({each}): fix the arm"
        raise SettingError("arm", arm, remedy)
    factor = 1.0 if best is None else names[best]
    by_rate = {name: tried[f]["means"].get(plan.primary) for name, f in names.items()}
    return {"train.lr": factor * rate, "trials": by_rate, "left_out": left_out}


def choose_best(
    tried: Mapping[str, Mapping[str, Any]], plan: PlanConfig, order: Callable[[str], Any]
) -> tuple[str | None, dict[str, str]]:
    """Returns the trial with the best number of those at the plan's L0, and why others can't win.

    Args:
        tried: name -> its entry in final_info.json.
        order: which of two trials with equal numbers is first.
    """
    left_out = {name: text for name in tried if (text := _why_not(tried[name], plan))}
    sign = 1 if plan.direction == "lower" else -1
    numbers = {
        n: sign * one["means"][plan.primary] for n, one in tried.items() if n not in left_out
    }
    return min(numbers, key=lambda n: (numbers[n], order(n)), default=None), left_out


def describe_edge(best: float, rates: Sequence[float]) -> str:
    """Says that the best learning rate lies at an end of those that were tried; '' inside."""
    if len(rates) < 2 or min(rates) < best < max(rates):
        return ""
    size, beyond = ("smallest", "smaller") if best <= min(rates) else ("largest", "larger")
    return f"{best:g} is the {size} rate tried: a {beyond} one may be better"


def _why_not(known: Mapping[str, Any], plan: PlanConfig) -> str:
    """Why a trial in final_info.json can't win: it has no number, or is not at the plan's L0, for
    which one cell is enough, as it is for the verdict. '' where it can."""
    if known["means"].get(plan.primary) is None:
        return "no valid cell"
    target = plan.target_l0
    if target is None:
        return ""
    found = [l0 for l0 in known["final_info_dict"].get("l0", []) if l0 is not None]
    if not found:
        return "its L0 was not measured"
    worst = max(found, key=lambda l0: abs(l0 / target - 1))
    off = off_target(worst, target, plan.tolerance)
    return f"L0 {off}" if off else ""


def read_tuned(root: Path) -> dict[str, Any]:
    file = root / TUNED
    if not file.is_file():
        return {}
    remedy = f"delete it, and tune again (saelab {COMMAND})"
    data = validate(read_json(file), dict[str, dict[str, Any]], file, remedy)
    for name, of_run in data.items():
        for arm, known in of_run.items():
            if isinstance(known, dict):
                validate(known, TunedArm, f"{file}: {name}.{arm}", remedy)
    return data


def is_tuned(known: Any) -> bool:
    return isinstance(known, dict)


def is_run_tuned(root: Path, name: str) -> bool:
    """Says whether tuned.json has an entry of a run."""
    return name in read_tuned(root)


def with_best_rates(run: Run, base: BaseConfig, root: Path, name: str) -> Run:
    """Returns a `tuned` run with each arm at its best learning rate; any other run as it is.

    Args:
        root: folder of tuned.json.
        name: of the run.

    Raises: SettingError for an arm that was not tuned, or tuned from another rate than it has now.
    """
    if not run.tuned:
        return run
    stored = read_tuned(root).get(name, {})
    return replace(run, arms=[_at_best_rate(run, base, arm, stored, name) for arm in run.arms])


def _at_best_rate(
    run: Run, base: BaseConfig, arm: Arm, stored: Mapping[str, Any], name: str
) -> Arm:
    shown = next(a for a in resolve_with_placeholders(run).arms if a.name == arm.name)
    own, entry = arm_settings(base, run, shown).train.lr, stored.get(arm.name)
    remedy = f"run `saelab {COMMAND} {name}`, which finds it on seeds of its own"
    if not isinstance(entry, dict):
        raise SettingError(f"{name}: learning rate of {arm.name}", "not tuned", remedy)
    rate, tried = entry["train.lr"], list(entry["trials"])
    if f"{own:g}" not in tried:
        raise SettingError(
            f"{name}: learning rate of {arm.name}", own, f"was not tried ({TUNED}): {remedy}"
        )
    best = f"lr {rate:g} is the best of {', '.join(tried)}"
    if len(entry.get("left_out", {})) == len(tried):
        best = f"no lr of {', '.join(tried)} gives valid cells at the plan's L0"
    comment = f"{arm.comment}; {best}" if arm.comment else best
    return replace(arm, comment=comment, changes=dict(arm.changes) | {"train.lr": rate})
