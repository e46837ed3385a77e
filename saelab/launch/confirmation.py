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
from typing import Any

from saelab.errors import MismatchError, SettingError, SourceError
from saelab.runs.folder import RunFolder
from saelab.runs.schema import CellId
from saelab.study.plan import (
    BASELINE,
    Arm,
    BaseConfig,
    Confirmation,
    Run,
    arm_settings,
    has_levels,
    references,
    resolve_with_placeholders,
)
from saelab.study.tuning import (
    FACTORS,
    declare_twins,
    is_tuned,
    needed_arms,
    read_tuned,
    with_best_rates,
)
from saelab.verdict.across_settings import FEWEST_SETTINGS
from saelab.verdict.review import Review, review_all


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
    earlier = with_best_rates(runs[best.run], base, root, best.run)
    chosen = _arm(earlier, best)
    _check_unchanged(chosen, root / best.run)
    label = f"{best.arm} ({best.run})"
    comment = f"the best valid arm, {best.word} in {best.run}"
    levels = chosen.levels and _has_levels(chosen, earlier, base)
    arm = replace(chosen, name=label, comment=comment, primary=True, twin_of=None, levels=levels)
    needed = [_arm(earlier, replace(best, arm=other)) for other in needed_arms(chosen)]
    arms = [*run.arms, *(replace(other, primary=False) for other in needed), arm]
    tuned = {arm: known for arm, known in read_tuned(root).get(name, {}).items() if is_tuned(known)}
    if {BASELINE, label} <= set(tuned):
        arms += _tuned_arms(arms, arm, tuned)
    changes = dict(earlier.changes) | dict(run.changes)
    return declare_twins(Run(run.title, arms, changes), base)


def _has_levels(arm: Arm, run: Run, base: BaseConfig) -> bool:
    """Says whether an arm of the run can be trained at further levels, as a primary one is."""
    shown = next(other for other in resolve_with_placeholders(run).arms if other.name == arm.name)
    sae = arm_settings(base, run, shown).sae
    return has_levels(arm, sae, sae.target_l0 or 1.0)


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
