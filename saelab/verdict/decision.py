"""The decision that follows from a verdict, for a program that tries one idea after another.

With the gain of an arm (positive is better), the interval [low, high] of the verdict and s, the
smallest effect of interest:

    keep           the word is helps, or low > 0 and high >= s
    discard        the word is hurts, equivalent or refused, or high < s
    more-seeds N   otherwise, where N seeds of both sides could decide it and N is at most
                   `MOST_TIMES` the plan's number; else discard

`helps` needs an estimate of at least s, which half of the effects of exactly that size miss; their
intervals reach s all the same, so they are kept. An arm that fails more often than the baseline is
never kept.

    val_fvu: 0.178312
    decision: keep {"arm": "candidate", "metric": "fvu", "effect": -0.0061, ...}

are the lines that a program reads: the word of the second is followed by the numbers as JSON.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from saelab import stats
from saelab.errors import UsageError
from saelab.runtime.counting import count
from saelab.study.plan import Arm, PlanConfig
from saelab.verdict.arms import ArmResult
from saelab.verdict.judge import Comparison
from saelab.verdict.l0_adjustment import match

Action = Literal["keep", "discard", "more-seeds"]
#: Seeds of a comparison at most, as a multiple of the plan's. Our choice.
MOST_TIMES = 4
#: First word of the line that a program reads.
LABEL = "decision:"
_LINE = re.compile(rf"^{LABEL} (?:(keep|discard)|more-seeds (\d+)) (\{{.*\}})$")


@dataclass(frozen=True, kw_only=True)
class Decision:
    """The decision about one arm.

    Args:
        comparison: that it follows from.
        action: to take.
        seeds: for 'more-seeds', how many both sides should have.
        reason: one sentence.
        budget_left: share of the study's error budget that is left after this comparison; None
            where none is accounted.
        value: mean of the arm's metric at the declared L0.
    """

    comparison: Comparison
    action: Action
    seeds: int | None = None
    reason: str = ""
    budget_left: float | None = None
    value: float | None = None

    def __str__(self) -> str:
        return f"{self.action} {self.seeds}" if self.seeds is not None else self.action

    def line(self) -> str:
        """The line that a program reads, see `read_decision`; it holds ASCII signs alone."""
        c = self.comparison
        numbers = {
            "arm": c.arm,
            "metric": c.metric,
            "value": self.value,
            "effect": c.mean_diff,
            "low": c.low,
            "high": c.high,
            "seeds": min(c.n, c.n_baseline),
            "word": c.word,
            "level": c.level,
            "budget_left": None if self.budget_left is None else round(self.budget_left, 6),
            "reason": self.reason,
        }
        return f"{LABEL} {self} {json.dumps(numbers)}"

    def means(self) -> dict[str, float | str | None]:
        """Entries of `final_info.json` that hold the decision."""
        return {
            "decision": str(self),
            "needed_seeds": self.comparison.needed_seeds,
        }  # `final_info.add_budget` adds what is left of the budget


def decide(
    c: Comparison, plan: PlanConfig, budget_left: float | None = None, value: float | None = None
) -> Decision:
    """Decides about the arm of one comparison.

    Args:
        c: on the plan's primary metric.
        budget_left: share of the study's error budget that is left after it.
        value: mean of the arm's metric at the declared L0.
    """
    action, reason = _without_more_seeds(c, plan)
    seeds, most = None, MOST_TIMES * plan.seeds
    if action is None and c.needed_seeds is not None and c.needed_seeds <= most:
        action, seeds = "more-seeds", c.needed_seeds
        reason = f"the interval holds both 0 and a gain of {c.sesoi:g}"
    elif action is None:
        needed = "no number of seeds would" if c.needed_seeds is None else f"{c.needed_seeds} would"
        action = "discard"
        reason = f"cannot tell within the budget of {count(most, 'seed')}: {needed} decide it"
    return Decision(
        comparison=c,
        action=action,
        seeds=seeds,
        reason=reason,
        budget_left=budget_left,
        value=value,
    )


def decide_run(
    arms: Mapping[str, ArmResult],
    comparisons: Iterable[Comparison],
    plan: PlanConfig,
    budget_left: float | None = None,
) -> list[Decision]:
    """Decides about every arm of a judged run."""
    decisions = []
    for c in comparisons:
        matched, failed = match(arms, c.against, plan.primary, plan)[c.arm], arms[c.arm].failed
        values = [value for seed, value in matched.values.items() if seed not in failed]
        decisions.append(decide(c, plan, budget_left, stats.mean_stderr(values)[0]))
    return decisions


def _without_more_seeds(c: Comparison, plan: PlanConfig) -> tuple[Action | None, str]:
    """Decides by the word and the interval alone; None where more seeds might decide."""
    if c.word == "refused":
        return "discard", c.reason
    if c.word in ("hurts", "equivalent"):
        return "discard", f"the verdict is {c.word}"
    if c.word == "helps":
        return "keep", "the verdict is helps"
    if c.low is None or c.high is None:
        return None, ""
    sign = 1.0 if plan.direction == "higher" else -1.0
    low, high = sorted((sign * c.low, sign * c.high))
    if high < c.sesoi:
        return "discard", f"a gain of {c.sesoi:g} is excluded"
    if c.balance > 0:
        return "discard", "a larger share of its cells failed"
    if low > 0:
        return "keep", f"it is better, and a gain of {c.sesoi:g} is not excluded"
    return None, ""


def read_decision(text: str) -> tuple[Action, int | None, dict[str, Any]]:
    """Reads the last decision in the output of a run: action, number of seeds, numbers.

    Raises: UsageError when it holds none.
    """
    for line in reversed(text.splitlines()):
        if match := _LINE.match(line):
            seeds = int(match[2]) if match[2] else None
            action: Action = "more-seeds" if seeds is not None else match[1]  # type: ignore[assignment]
            return action, seeds, json.loads(match[3])
    raise UsageError(f"the output has no line that begins with '{LABEL}': see how the run ended")


def lines_to_print(decisions: Sequence[Decision], arms: Iterable[Arm]) -> list[str]:
    """Lines that end what a launch prints: one for each primary arm, or for each arm where none is
    primary; before that of a single one, `val_<metric>: <value>`."""
    primary = {arm.name for arm in arms if arm.primary}
    shown = [d for d in decisions if d.comparison.arm in primary] or list(decisions)
    lines = [decision.line() for decision in shown]
    if len(shown) == 1 and shown[0].value is not None:
        lines.insert(0, f"val_{shown[0].comparison.metric}: {shown[0].value:.6f}")
    return lines
