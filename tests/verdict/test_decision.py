"""The decision that follows from a verdict: keep, discard, or more seeds."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest

from saelab.errors import UsageError
from saelab.seeding import numpy_stream
from saelab.study.plan import Arm, PlanConfig
from saelab.verdict.decision import decide, lines_to_print, read_decision
from saelab.verdict.judge import Cells, Comparison, Rules, judge
from saelab.verdict.l0_adjustment import Matched

PLAN = PlanConfig(study="decided", seeds=8, sesoi=0.005)
#: Lower is better, so that a negative difference is a gain.
BLANK = Comparison(
    arm="arm", metric="fvu", n=8, n_baseline=8, level=0.05, sesoi=0.005, exploratory=True
)


def comparison(low: float, high: float, word: Any = "cannot tell yet", **more: Any) -> Comparison:
    middle = (low + high) / 2
    return replace(BLANK, mean_diff=middle, low=low, high=high, word=word, **more)


@pytest.mark.parametrize(
    ("c", "expected"),
    [
        (comparison(-0.009, -0.006, "helps"), "keep"),
        (comparison(-0.006, -0.003), "keep"),  # an effect of sesoi is not excluded, its sign is
        (comparison(-0.005, -0.003), "keep"),
        (comparison(-0.0049, -0.003, "equivalent"), "discard"),
        (comparison(-0.0049, 0.02, needed_seeds=9), "discard"),  # no effect of interest is left
        (comparison(-0.006, 0.003, needed_seeds=12), "more-seeds 12"),
        (comparison(-0.006, 0.003, needed_seeds=32), "more-seeds 32"),
        (comparison(-0.006, 0.003, needed_seeds=33), "discard"),  # four times the plan's are 32
        (comparison(-0.006, 0.003), "discard"),
        (comparison(0.006, 0.009, "hurts"), "discard"),
        (comparison(-0.009, -0.003, balance=1), "discard"),
        (replace(BLANK, word="refused", reason="L0 is off"), "discard"),
        (replace(BLANK, word="helps"), "keep"),  # by its failures alone
        (replace(BLANK, word="cannot tell yet"), "discard"),
    ],
)
def test_rule(c: Comparison, expected: str) -> None:
    decision = decide(c, PLAN, 0.03)
    assert str(decision) == expected and decision.reason
    assert decision.means() == {"decision": expected, "needed_seeds": c.needed_seeds}


def test_higher_is_better() -> None:
    plan = PLAN.model_copy(update={"direction": "higher"})
    assert decide(comparison(0.003, 0.006), plan).action == "keep"
    assert decide(comparison(-0.006, -0.003), plan).action == "discard"


def test_an_arm_that_fails_more_often_is_never_kept() -> None:
    stream = numpy_stream(0, "test-decision")
    base = Cells(matched=Matched(values=dict(enumerate(0.2 + 1e-4 * stream.normal(size=8)))))
    better = {seed: 0.19 + 1e-4 * stream.normal() for seed in range(6)}
    rules = Rules(primary="fvu", direction="lower", sesoi=0.005)
    arm = Cells(matched=Matched(values=better), failed=frozenset({6, 7}))
    (c,) = judge(rules, base, {"arm": arm})
    assert c.high is not None and c.high < -0.005 and c.word == "cannot tell yet"
    assert decide(c, PLAN).action == "discard"
    (c,) = judge(rules, base, {"arm": Cells(matched=Matched(values=better))})
    assert decide(c, PLAN).action == "keep"


def test_an_effect_as_large_as_the_smallest_of_interest_is_kept() -> None:
    """Its word is helps in half of the studies, since half of the estimates lie below it."""
    stream = numpy_stream(0, "test-decision-sesoi")
    rules = Rules(primary="fvu", direction="lower", sesoi=PLAN.sesoi)
    words, kept, studies = [], 0, 300
    for _ in range(studies):
        base, arm = 0.185 + 0.00054 * stream.normal(size=(2, 8))
        cells = [Cells(matched=Matched(values=dict(enumerate(v)))) for v in (base, arm - 0.005)]
        (c,) = judge(rules, cells[0], {"arm": cells[1]})
        words.append(c.word)
        kept += decide(c, PLAN).action == "keep"
    assert kept / studies > 0.95 and 0.4 < words.count("helps") / studies < 0.6


def test_the_line_is_read_again() -> None:
    odd = replace(comparison(-0.006, 0.003, needed_seeds=12), arm='a | "b"\nü')
    line = decide(odd, PLAN, 0.02).line()
    assert line.isascii() and "\n" not in line
    action, seeds, numbers = read_decision(f"text\ndecision: keep {{}}\n{line}\n")
    assert (action, seeds) == ("more-seeds", 12)
    assert numbers["arm"] == odd.arm and numbers["budget_left"] == 0.02
    assert (numbers["effect"], numbers["low"], numbers["high"]) == (odd.mean_diff, -0.006, 0.003)
    assert json.loads(line.split(" ", 3)[3]) == numbers
    with pytest.raises(UsageError, match="no line that begins with 'decision:'"):
        read_decision("a decision: keep\n")


def test_primary_arms_are_printed() -> None:
    decisions = [decide(replace(BLANK, arm=name), PLAN, value=0.2) for name in ("a", "b")]
    arms = [Arm("baseline"), Arm("a"), Arm("b", primary=True)]
    assert lines_to_print(decisions, arms) == ["val_fvu: 0.200000", decisions[1].line()]
    assert lines_to_print(decisions, arms[:2]) == [d.line() for d in decisions]
    assert lines_to_print([], arms) == []
