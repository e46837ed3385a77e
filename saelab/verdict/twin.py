"""Checks of the verdict itself in every run: an A/A twin and an effect of known size.

The twin is the baseline at fresh seeds, under another name. Without any difference its word should
be "equivalent" or "cannot tell yet"; the other two are false. The effect is planted in the twin's
cells, so that its noise is that of real arms: its word should be "hurts", and the interval should
hold the expected change. Both are judged at the plan's alpha and are no comparisons of the study.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from saelab.runs import schema
from saelab.runs.schema import CellId
from saelab.runtime.counting import count
from saelab.study.plan import BASELINE, PlanConfig
from saelab.verdict.arms import ArmResult, CellGate
from saelab.verdict.final_info import cells_at_target
from saelab.verdict.judge import Comparison, Rules, Word, judge

#: Words that a twin may get.
TRUE_OF_A_TWIN: tuple[Word, ...] = ("equivalent", "cannot tell yet")


@dataclass(frozen=True)
class Planted:
    """The verdict on the planted effect.

    Args:
        comparison: of the SAEs with the effect and the baseline.
        expected: by how much the effect should worsen FVU.
    """

    comparison: Comparison
    expected: float

    @property
    def holds(self) -> bool:
        """True where the interval holds the expected change."""
        c = self.comparison
        return c.low is not None and c.high is not None and c.low <= self.expected <= c.high


def judge_twin(
    rows: Sequence[Mapping[str, Any]],
    gates: Iterable[CellGate],
    baseline: ArmResult,
    plan: PlanConfig,
) -> Comparison | None:
    """Judges the A/A twin on the primary metric; None where a run has none.

    Args:
        rows: of controls.
        gates: facts of the twin's cells.
    """
    cells = list(gates)
    twin = _arm(schema.TWIN, rows, {cell.id.seed: cell for cell in cells})
    if not cells or not twin.gates:
        return None
    return _judge(twin, baseline, plan, plan.primary)


def judge_planted(
    rows: Sequence[Mapping[str, Any]],
    baseline: ArmResult,
    plan: PlanConfig,
    gates: Iterable[CellGate] = (),
) -> Planted | None:
    """Checks whether the rules see an effect of known size on FVU; returns None if none was
    planted, or if fewer than two SAEs have numbers.

    Args:
        rows: of controls.
        gates: facts of the cells that it was planted in; older runs planted it in the baseline's.
    """
    turned = _arm(schema.PLANTED, rows, {cell.id.seed: cell for cell in gates})
    change = turned.metric("planted.expected_fvu_change").values()
    worse = [value for value in change if value is not None]
    if sum(value is not None for value in turned.metric("fvu").values()) < 2 or not worse:
        return None
    return Planted(_judge(turned, baseline, plan, "fvu"), sum(worse) / len(worse))


def _arm(name: str, rows: Sequence[Mapping[str, Any]], gates: Mapping[int, CellGate]) -> ArmResult:
    """Results of a control that has cells of several seeds."""
    by_seed: dict[int, list[Mapping[str, Any]]] = {}
    for row in rows:
        if row["arm"] == schema.control_arm(name):
            by_seed.setdefault(row["seed"], []).append(row)
    arm = ArmResult(name)
    for seed, measured in by_seed.items():
        plain = CellGate(id=CellId(name, seed, 0.0), expected=(), facts={})
        cell = gates.get(seed, plain)
        arm.add(replace(cell, id=replace(cell.id, arm=name)), measured)
    return arm


def _judge(arm: ArmResult, baseline: ArmResult, plan: PlanConfig, metric: str) -> Comparison:
    primary = metric == plan.primary
    rules = Rules(
        primary=metric,
        direction=plan.direction if primary else "lower",
        sesoi=plan.sesoi if primary else 0.0,
        alpha=plan.alpha,
    )
    cells = cells_at_target({BASELINE: baseline, arm.name: arm}, BASELINE, metric, plan)
    (comparison,) = judge(rules, cells[BASELINE], {arm.name: cells[arm.name]})
    return comparison


def twin_line(twin: Comparison) -> str:
    """Says in one sentence what the twin's word was, and where it is false."""
    false = "" if twin.word in (*TRUE_OF_A_TWIN, "refused") else ", which is FALSE"
    return f"A/A twin (the baseline at other seeds): {twin.word}{false}; {twin.reason}"


def planted_line(planted: Planted) -> str:
    """Says in one sentence whether the planted effect was seen, and as large as it is."""
    c = planted.comparison
    seen = "" if c.word == "hurts" else ", so an effect of this size is missed"
    outside = "" if planted.holds or c.low is None else ", which the interval does not hold"
    return f"planted effect: {c.word}{seen} (expected {planted.expected:+.4g}{outside}); {c.reason}"


def counted_line(twins: Sequence[Comparison | None], planted: Sequence[Planted | None]) -> str:
    """Counts the words of the twins and of the planted effects of several runs; '' without any.

    Runs of one study share the cells of one twin where their baselines are equal. Such a twin is
    evidence once, so that twins with other numbers are counted, not runs:

    'A/A twin: 10 runs with 3 different twins: 2 equivalent, 1 cannot tell yet; planted effect: 3 of
    3 "hurts", 2 of 3 intervals hold the expected change'
    """
    there = [twin for twin in twins if twin is not None]
    effects = {_numbers(one.comparison): one for one in planted if one is not None}.values()
    parts = []
    if there:
        different = {_numbers(twin): twin.word for twin in there}
        words = Counter(different.values()).most_common()
        n = count(len(different), "different twin")
        each = ", ".join(f"{n} {word}" for word, n in words)
        parts.append(f"A/A twin: {count(len(there), 'run')} with {n}: {each}")
    if effects:
        hurts = sum(one.comparison.word == "hurts" for one in effects)
        holds = sum(one.holds for one in effects)
        parts.append(
            f"planted effect: {hurts} of {len(effects)} 'hurts', {holds} of {len(effects)} "
            "intervals hold the expected change"
        )
    return "; ".join(parts)


def _numbers(comparison: Comparison) -> tuple[object, ...]:
    """Numbers that comparisons of the same cells share, and of other cells do not."""
    return comparison.word, comparison.mean_diff, comparison.low, comparison.high, comparison.p
