"""Choices of the command line about one launch: seeds, tokens, other settings, the quick form.

The quick form trains the baseline and at most two arms with few tokens and seeds, to see the whole
way from data to verdict in about 90 seconds on two idle cores. It is marked in every output by its
name and title, and lies in `quick/`. It is no part of the study: it registers nothing, spends
nothing of the error budget, is no attempt, uses seeds that nothing else uses, and is never
confirmed, since its folder is not that of the run and its name is not the run's.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from saelab.errors import SettingError
from saelab.runs.schema import MARK, QUICK
from saelab.study.plan import BASELINE, Arm, BaseConfig, Confirmation, PlanConfig, Run, references

#: Sizes of the quick form. Our choice: 90 seconds on two idle cores for the embedded model.
ARMS, SEEDS, TOKENS, HELD_OUT, CONTEXTS = 3, 3, 131_072, 16_256, 32


@dataclass(frozen=True, kw_only=True)
class LaunchOptions:
    """Choices about one launch that the run table and plan.toml do not hold.

    Args:
        seeds: of every arm, in place of the plan's numbers.
        tokens: that each SAE trains on; stands for the change of `train.tokens`.
        changes: dotted settings of the base.
        quick: whether the quick form is launched.
    """

    seeds: int | None = None
    tokens: int | None = None
    changes: Mapping[str, Any] = field(default_factory=dict)
    quick: bool = False

    def change_plan(self, plan: PlanConfig) -> PlanConfig:
        """Returns the plan as this launch has it.

        Raises: SettingError for an impossible number, and for changed base settings of a plan with
            further settings, whose bases are in files of their own.
        """
        if plan.settings and not self.quick and (self.changes or self.tokens is not None):
            remedy = "the plan has further settings with bases of their own: change plan.toml"
            raise SettingError("--set" if self.changes else "--tokens", self._value(), remedy)
        if self.quick:
            few = min(SEEDS, plan.seeds)
            plan = plan.patched(
                {"seeds": few, "seeds_other": few, "levels": (), "settings": (), "family": None}
            )
        if self.seeds is not None:
            if self.seeds < 1:
                raise SettingError("--seeds", self.seeds, "use at least 1")
            plan = plan.patched({"seeds": self.seeds, "seeds_other": self.seeds})
        return plan

    def change_base(self, base: BaseConfig, plan: PlanConfig) -> BaseConfig:
        """Returns the base settings as this launch has them.

        Raises: SettingError for a setting that is unknown or refused.
        """
        if self.quick:
            base = _quick_base(base, plan)
        if self.tokens is not None:
            if self.tokens < 1:
                raise SettingError("--tokens", self.tokens, "use at least 1")
            base = base.patched({"train.tokens": self.tokens})
        return base.patched(dict(self.changes))

    def change_run(self, run: Run, name: str) -> Run:
        """Returns the run as this launch has it.

        Raises: SettingError for the quick form of a confirming run.
        """
        if not self.quick:
            return run
        if isinstance(run, Confirmation):
            remedy = "is a confirming run, whose arm other complete runs decide: name another run"
            raise SettingError("--quick", name, remedy)
        return replace(run, arms=_few_arms(run), title=f"{MARK}: {run.title}", tuned=False)

    def place(self, folder: Path) -> Path:
        """Returns the folder of the launch of a run whose own folder is given."""
        return folder.parent / QUICK / folder.name if self.quick else folder

    def _value(self) -> Any:
        return dict(self.changes) or self.tokens


def quick_name(name: str) -> str:
    """Returns the name of a run's quick form, which no run table has."""
    return f"{name} ({QUICK})"


def _quick_base(base: BaseConfig, plan: PlanConfig) -> BaseConfig:
    changes: dict[str, Any] = {
        "train.tokens": min(base.train.tokens, TOKENS),
        "evaluation.tokens": min(base.evaluation.tokens, HELD_OUT),
        "evaluation.loss_contexts": min(base.evaluation.loss_contexts, CONTEXTS),
        "evaluation.snapshots": 0,
    }
    if not plan.primary.startswith("sae_"):  # probing is measured only where it is what is judged
        none = {"entries": "none", "tables": ()}
        changes |= {f"evaluation.probing.{name}": value for name, value in none.items()}
        changes["evaluation.extra"] = ()
    return base.patched(changes)


def _few_arms(run: Run) -> list[Arm]:
    """Returns the baseline and at most two other arms, primary ones first: those that need no arm
    besides the baseline."""
    alone = [
        arm
        for arm in run.arms
        if arm.name != BASELINE
        and not references(arm.changes)
        and arm.against == BASELINE
        and arm.twin_of in (None, BASELINE)
    ]
    first = sorted(alone, key=lambda arm: not arm.primary)[: ARMS - 1]
    return [arm for arm in run.arms if arm.name == BASELINE or arm in first]
