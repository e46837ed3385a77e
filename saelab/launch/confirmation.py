"""The confirming run: the best valid arm of earlier runs, on seeds used nowhere else, and tuned.

An arm is valid when none of its cells is invalid or failed and its comparison was not refused. The
best one is that whose 95% interval is best at its worse end, so that few seeds are no advantage.
With `tuned.json` (`saelab tune`) the comparison is repeated with each side at its own best learning
rate, found on seeds of their own in equally many trials. A trial that misses the plan's L0 cannot
win, since fewer zeros would buy it the better number.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field

from saelab.errors import MismatchError, SettingError, SourceError
from saelab.runs.folder import RunFolder
from saelab.runs.schema import CellId
from saelab.storage.atomic import read_json, write_json
from saelab.storage.validation import Number, validate
from saelab.study.plan import (
    BASELINE,
    Arm,
    BaseConfig,
    Confirmation,
    PlanConfig,
    Run,
    arm_settings,
    has_levels,
    references,
    resolve_with_placeholders,
)
from saelab.study.registry import plan_hash
from saelab.verdict.across_settings import FEWEST_SETTINGS
from saelab.verdict.l0_adjustment import off_target
from saelab.verdict.review import Review, review_all

TUNED, COMMAND = "tuned.json", "tune"
#: Learning rates that are tried, as multiples of the arm's own, and seeds of each trial.
FACTORS, TRIAL_SEEDS = (0.5, 1.0, 2.0), 2
#: A learning rate as a name.
Rate = Annotated[str, Field(pattern=r"^[0-9.]{1,20}(e[-+]?[0-9]{1,2})?$")]


class _Tuned(BaseModel):
    """Results of tuning an arm: its best rate, rate -> the metric's mean, and rate -> the reason
    why it could not win."""

    model_config = ConfigDict(strict=True, extra="forbid")
    rate: Annotated[float, Field(alias="train.lr", gt=0, lt=1e3)]
    trials: Annotated[dict[Rate, Number | None], Field(min_length=len(FACTORS))]
    left_out: dict[Rate, str] = {}


@dataclass(frozen=True)
class Candidate:
    """An arm of a finished run; `worst` is the gain at the worse end of its interval."""

    run: str
    arm: str
    word: str
    worst: float


def resolve_confirmation(
    run: Confirmation, runs: Mapping[str, Run], root: Path, base: BaseConfig, name: str = "run_10"
) -> Run:
    """The run with its arm found from the finished runs in `root`, and tuned where that is known.

    Raises: SourceError when no earlier run is finished or none has a valid arm; SettingError when
        the table no longer has the arm as it was.
    """
    best = best_arm(run, runs, root)
    earlier = runs[best.run]
    chosen = _arm(earlier, best)
    _check_unchanged(chosen, root / best.run)
    label = f"{best.arm} ({best.run})"
    comment = f"the best valid arm, {best.word} in {best.run}"
    levels = chosen.levels and _has_levels(chosen, earlier, base)
    arm = replace(chosen, name=label, comment=comment, primary=True, twin_of=None, levels=levels)
    needed = [_arm(earlier, replace(best, arm=other)) for other in _needed(chosen)]
    arms = [*run.arms, *(replace(other, primary=False) for other in needed), arm]
    tuned = {arm: known for arm, known in _tuned(root).get(name, {}).items() if _is_arm(known)}
    if {BASELINE, label} <= set(tuned):
        arms += _tuned_arms(arms, arm, tuned)
    changes = dict(earlier.changes) | dict(run.changes)
    return declare_twins(Run(run.title, arms, changes), base)


def _has_levels(arm: Arm, run: Run, base: BaseConfig) -> bool:
    """Says whether an arm of the run can be trained at further levels, as a primary one is."""
    shown = next(other for other in resolve_with_placeholders(run).arms if other.name == arm.name)
    sae = arm_settings(base, run, shown).sae
    return has_levels(arm, sae, sae.target_l0 or 1.0)


def declare_twins(run: Run, base: BaseConfig) -> Run:
    """The run with arms that have an earlier one's settings declared its twins."""
    first: dict[str, str] = {}
    arms = []
    for arm, shown in zip(run.arms, resolve_with_placeholders(run).arms, strict=True):
        settings = arm_settings(base, run, shown).digest()
        arms.append(arm if arm.module else replace(arm, twin_of=first.get(settings)))
        first.setdefault(settings, arm.name)
    return replace(run, arms=arms)


def best_arm(run: Confirmation, runs: Mapping[str, Run], root: Path) -> Candidate:
    """Raises: SourceError when no earlier run is finished or none has a valid arm."""
    names = run.among or tuple(n for n, r in runs.items() if not isinstance(r, Confirmation))
    folders = [root / n for n in names if (root / n / "final_info.json").is_file()]
    if not folders:
        raise SourceError(
            f"none of {', '.join(names)} is finished in {root}: run one of them first"
        )
    reviews = review_all(folders)
    for folder, review in zip(folders, reviews, strict=True):
        if review.run != folder.name:
            raise MismatchError(f"{folder} holds the run {review.run}: put it back in its place")
    found = [c for review in reviews for c in candidates(review) if c.arm not in run.leave]
    if not found:
        raise SourceError(f"{', '.join(f.name for f in folders)}: no arm is valid, see their gates")
    return max(found, key=lambda candidate: candidate.worst)


def candidates(found: Review) -> Iterator[Candidate]:
    """The valid arms of a finished run, over its settings where it has further ones."""
    bad = {
        CellId.parse(note.cell).arm
        for note in found.cells
        if note.outcome in ("invalid", "failed") and not note.expected
    }
    over = [one for one in found.across if one.n >= FEWEST_SETTINGS]
    for c in over or found.comparisons:
        if c.word != "refused" and c.arm not in bad and c.low is not None and c.high is not None:
            worst = -c.high if found.plan.direction == "lower" else c.low
            yield Candidate(found.run, c.arm, c.word, worst)


def _arm(run: Run, best: Candidate) -> Arm:
    for arm in run.arms:
        if arm.name == best.arm:
            return arm
    remedy = f"was in {best.run} and is no longer in the run table: put it back"
    raise SettingError("arm", best.arm, remedy)


def _check_unchanged(arm: Arm, folder: Path) -> None:
    """Raises: SettingError when the arm was edited after its run; one of a second wave has other
    numbers there."""
    kept = RunFolder(folder).required("arms")["arms"].get(arm.name, {}).get("changes")
    if not references(arm.changes) and kept != _plain(arm.changes):
        remedy = f"was changed after {folder.name}: make that run again, or undo the change"
        raise SettingError("arm", arm.name, remedy)


def _plain(value: Any) -> Any:
    """Returns a value in the form in which JSON gives it back."""
    if hasattr(value, "model_dump"):
        return value.model_dump(mode="json")
    if isinstance(value, Mapping):
        return {name: _plain(part) for name, part in value.items()}
    return [_plain(part) for part in value] if isinstance(value, (list, tuple)) else value


def _needed(arm: Arm) -> list[str]:
    """Arms whose ends the arm's settings are made of."""
    return [found.arm for found in references(arm.changes) if found.arm != BASELINE]


# ---- equal tuning ----------------------------------------------------------------------------


def trials(run: Run, base: BaseConfig, names: Sequence[str]) -> Run:
    """A run that tries every rate for each of the named arms, the baseline among them."""
    waited = {other for arm in run.arms if arm.name in names for other in _needed(arm)}
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

    Args:
        info: final_info.json of the trials.

    Raises: SettingError when no trial of an arm has a number at the plan's L0.
    """  # fmt: skip
    found: dict[str, Any] = {"plan_hash": plan_hash(plan), "primary": plan.primary}
    for arm in (arm for arm in run.arms if arm.name in names):
        rate = arm_settings(base, run, arm).train.lr
        tried = {factor: info[trial(arm.name, factor)] for factor in FACTORS}
        found[arm.name] = _best_rate(arm.name, rate, tried, plan)
    write_json(root / TUNED, _tuned(root) | {name: found})
    return found


def _best_rate(
    arm: str, rate: float, tried: Mapping[float, Mapping[str, Any]], plan: PlanConfig
) -> dict[str, Any]:
    """Entry of an arm in tuned.json.

    Args:
        rate: the arm's own, that each factor multiplies.
        tried: factor -> its trial in final_info.json.

    Raises: SettingError when no trial has a number at the plan's L0.
    """
    sign = 1 if plan.direction == "lower" else -1
    values = {f: known["means"].get(plan.primary) for f, known in tried.items()}
    there = {f: value for f, value in values.items() if value is not None}
    off = {f: text for f in there if (text := _off_target(tried[f], plan))}
    left_out = {f"{f * rate:g}": text for f, text in off.items()}
    if not there:
        raise SettingError("arm", arm, "no learning rate gives a valid cell: fix the arm")
    if off.keys() == there.keys():
        each = "; ".join(f"{one}: {text}" for one, text in left_out.items())
        remedy = f"no learning rate keeps the plan's L0 ({each}): calibrate the arm"
        raise SettingError("arm", arm, remedy)
    best = min(there.keys() - off.keys(), key=lambda f: (sign * there[f], f != 1, f))
    by_rate = {f"{f * rate:g}": value for f, value in values.items()}
    return {"train.lr": best * rate, "trials": by_rate, "left_out": left_out}


def _off_target(known: Mapping[str, Any], plan: PlanConfig) -> str:
    """Why an arm of final_info.json is not at the plan's L0; '' where it is, or the plan has none.

    One cell is enough, as it is for the verdict.
    """
    target = plan.target_l0
    if target is None:
        return ""
    found = [l0 for l0 in known["final_info_dict"].get("l0", []) if l0 is not None]
    if not found:
        return "its L0 was not measured"
    worst = max(found, key=lambda l0: abs(l0 / target - 1))
    off = off_target(worst, target, plan.tolerance)
    return f"L0 {off}" if off else ""


def _tuned(root: Path) -> dict[str, Any]:
    file = root / TUNED
    if not file.is_file():
        return {}
    remedy = f"delete it, and tune again (saelab {COMMAND})"
    data = validate(read_json(file), dict[str, dict[str, Any]], file, remedy)
    for name, of_run in data.items():
        for arm, known in of_run.items():
            if isinstance(known, dict):
                validate(known, _Tuned, f"{file}: {name}.{arm}", remedy)
    return data


def _is_arm(known: Any) -> bool:
    return isinstance(known, dict)


def _tuned_arms(arms: Sequence[Arm], arm: Arm, tuned: Mapping[str, Any]) -> list[Arm]:
    """Both sides at their own best rate, the arm compared with the tuned baseline."""
    base = next(a for a in arms if a.name == BASELINE)
    made = []
    for side in (base, arm):
        rate = tuned[side.name]["train.lr"]
        own = min(tuned[side.name]["trials"], key=lambda r: abs(float(r) - rate))
        trials = list(tuned[side.name]["trials"])
        plain = own == trials[FACTORS.index(1.0)]  # then it is the side itself
        made.append(
            replace(
                side,
                name=f"{side.name} tuned",
                changes=dict(side.changes) | ({} if plain else {"train.lr": rate}),
                comment=f"at its own best rate of {', '.join(trials)}",
                primary=True,
                against=f"{BASELINE} tuned" if side is arm else BASELINE,
            )
        )
    return made
