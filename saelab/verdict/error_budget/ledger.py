"""Ledger of comparisons: what each word of a study cost, next to plan.json and attempts.jsonl.

    .saelab/comparisons.jsonl   the budget, one line when a comparison gets its level, before its p
                                value is computed, and one for its result

A comparison is identified by its hypothesis (settings of both sides, metric, target L0) and its
data (content hashes of the cells of both sides), not by names: under another name, in another run
or after its run folder was deleted it has the level that it had and costs nothing more. The same
hypothesis with other cells is another look, and a comparison of its own.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field

from saelab.errors import DamageError
from saelab.runtime.counting import count
from saelab.storage.atomic import LINE_REMEDY, append_line, digest, read_lines
from saelab.storage.lock import wait_for_lock
from saelab.storage.validation import Loose, Number, validate
from saelab.study.plan import PlanConfig
from saelab.study.registry import FOLDER, attempts
from saelab.verdict.error_budget.levels import ErrorBudget, confirming_level, look_share
from saelab.verdict.judge import Comparison

COMPARISONS = "comparisons.jsonl"
#: Word that earns wealth when a hypothesis gets it first.
DISCOVERY = "helps"


@dataclass(frozen=True, kw_only=True)
class Hypothesis:
    """Comparison that is to be made, as its identity needs it.

    Args:
        arm, against: names of both sides, which are for readers only.
        settings: digest of the settings of the arm, and of the arm that it is compared with.
        cells: content hashes of the cells of both sides.
    """

    arm: str
    against: str
    settings: tuple[str, str]
    cells: tuple[Sequence[str], Sequence[str]]

    def key(self, plan: PlanConfig) -> tuple[str, str]:
        """Identity of the hypothesis, and of the data that it is judged by."""
        asked = [*self.settings, plan.primary, plan.direction, plan.target_l0]
        return digest(asked), digest([sorted(self.cells[0]), sorted(self.cells[1])])


@dataclass(frozen=True, kw_only=True)
class Allotted:
    """Level of a comparison.

    Args:
        number: of the comparison in the study, from 1.
        level: error probability of its word.
        look: how often its hypothesis was compared, with other cells each time.
    """

    number: int
    level: float
    look: int


@dataclass(frozen=True, kw_only=True)
class Budget:
    """State of a study's error budget.

    Args:
        left: share of the wealth, which starts at alpha and grows by discoveries, not yet spent.
        next_level: level that the next comparison would get, in a run of one arm.
        comparisons: exploratory ones made so far; confirming ones have levels of their own.
        planned: comparisons that share the larger part of the budget.
        discoveries: hypotheses that were called "helps".
        lost: complete runs whose comparisons are not in the ledger.
    """

    left: float
    next_level: float
    comparisons: int
    planned: int
    discoveries: int
    lost: tuple[str, ...] = ()

    def line(self) -> str:
        """Says in one sentence what is left."""
        return (
            f"error budget: {self.left:.0%} left after {count(self.comparisons, 'comparison')} "
            f"({self.planned} planned, {self.discoveries} called '{DISCOVERY}'); the next one "
            f"would have level {self.next_level:.2g}"
        )


class _Budget(Loose):
    alpha: Annotated[float, Field(gt=0, lt=0.5)]
    planned: Annotated[int, Field(ge=1)]
    lost: list[str]


class _Given(Loose):
    number: Annotated[int, Field(ge=1, lt=10**9)]
    hypothesis: str
    cells: str
    level: Annotated[float, Field(ge=0, lt=0.5)]
    look: Annotated[int, Field(ge=1)]
    confirming: bool
    batch: int
    run: str
    arm: str
    against: str


class _Result(Loose):
    result: int
    word: str
    p: Number | None


@dataclass
class Ledger:
    """Content of the ledger.

    Args:
        rule: gives the levels.
        lost: complete runs that the ledger did not see.
        given: every comparison by number, as its line has it, with its last `word` and `p`.
        known: for each discovery the number of exploratory comparisons given before it.
    """

    rule: ErrorBudget
    lost: tuple[str, ...] = ()
    given: dict[int, dict[str, Any]] = field(default_factory=dict)
    known: list[int] = field(default_factory=list)
    _discovered: set[str] = field(default_factory=set)

    @property
    def exploratory(self) -> int:
        return sum(not line["confirming"] for line in self.given.values())

    @property
    def confirming(self) -> int:
        """Confirming looks so far: comparisons whose levels were given at one time are one look."""
        return len({line["batch"] for line in self.given.values() if line["confirming"]})

    def find(self, hypothesis: str, cells: str, confirming: bool) -> dict[str, Any] | None:
        """The comparison with this identity, if there is one."""
        key = (hypothesis, cells, confirming)
        lines = self.given.values()
        return next(
            (x for x in lines if key == (x["hypothesis"], x["cells"], x["confirming"])), None
        )

    def looks(self, hypothesis: str) -> int:
        """Exploratory comparisons of a hypothesis so far."""
        lines = self.given.values()
        return sum(x["hypothesis"] == hypothesis and not x["confirming"] for x in lines)

    def add_result(self, line: Mapping[str, Any]) -> None:
        given = self.given[line["result"]]
        given |= {"word": line["word"], "p": line["p"]}
        hypothesis = given["hypothesis"]
        is_discovery = line["word"] == DISCOVERY and not given["confirming"]
        if is_discovery and hypothesis not in self._discovered:
            self._discovered.add(hypothesis)
            self.known.append(self.exploratory)

    def lines(self) -> list[str]:
        """One line for each comparison, and one for what is left of the budget."""
        lines = [""]
        for x in self.given.values():
            look = f", look {x['look']}" if x["look"] > 1 else ""
            kind = "confirming, " if x["confirming"] else ""
            word = x.get("word", "no result")
            lines.append(
                f"comparison {x['number']} ({kind}{x['run']}{look}): {x['arm']} - {x['against']}, "
                f"level {x['level']:.2g}, {word}"
            )
        return [*lines, self.budget(self.rule.alpha).line(), *lost_text(self.lost)]

    def budget(self, alpha: float) -> Budget:
        t = self.exploratory
        return Budget(
            left=self.rule.left(t, self.known),
            next_level=min(self.rule.level(t + 1, self.known), alpha),
            comparisons=t,
            planned=self.rule.planned,
            discoveries=len(self.known),
            lost=self.lost,
        )


def allot(
    root: Path,
    plan: PlanConfig,
    hypotheses: Sequence[Hypothesis],
    *,
    run: str,
    confirming: bool = False,
    planned: int | None = None,
) -> dict[str, Allotted]:
    """Gives the comparisons of one run their levels and writes them down; arm -> its level.

    To be called before anything is judged. All of them get their levels from what earlier runs
    reported; those that were made before keep theirs.

    Args:
        root: folder of plan.toml.
        hypotheses: every comparison of the run.
        run: its name.
        confirming: whether the run is judged family-wise.
        planned: comparisons of the whole study where the plan does not name them.

    Raises: DamageError when the ledger can't be read; BusyError when another launch locks it.
    """
    with _locked(root):
        ledger = read_ledger(root) or _begin(root, plan, max(planned or 0, len(hypotheses)))
        family = max(len(hypotheses), plan.family or 0)
        look, batch, t = ledger.confirming + 1, 1 + len(ledger.given), ledger.exploratory
        allotted: dict[str, Allotted] = {}
        for each in hypotheses:
            hypothesis, cells = each.key(plan)
            line = ledger.find(hypothesis, cells, confirming)
            if line is None:
                if confirming:
                    level = confirming_level(plan.alpha, look, family)
                else:
                    t, look = t + 1, ledger.looks(hypothesis) + 1
                    online = ledger.rule.level(t, ledger.known) * look_share(look)
                    level = min(online, plan.alpha / max(1, family))
                line = {
                    "number": 1 + len(ledger.given),
                    "hypothesis": hypothesis,
                    "cells": cells,
                    "level": level,
                    "look": look,
                    "confirming": confirming,
                    "batch": batch,
                    "run": run,
                    "arm": each.arm,
                    "against": each.against,
                    "at": _now(),
                }
                append_line(_file(root), json.dumps(line))
                ledger.given[line["number"]] = line
            allotted[each.arm] = Allotted(
                number=line["number"], level=line["level"], look=line["look"]
            )
        return allotted


def record_results(
    root: Path, run: str, allotted: Mapping[str, Allotted], comparisons: Sequence[Comparison]
) -> None:
    """Writes down the words of comparisons that have a level; repeated ones are not written again.

    Args:
        run: in which they were judged.
        allotted: by arm, as `allot` returned it.
    """
    with _locked(root):
        ledger = read_ledger(root)
        if ledger is None:
            return
        for c in comparisons:
            number = allotted[c.arm].number if c.arm in allotted else 0
            given = ledger.given.get(number)
            if given is not None and (given.get("word"), given.get("p")) != (c.word, c.p):
                line = {"result": number, "word": c.word, "p": c.p, "run": run, "at": _now()}
                append_line(_file(root), json.dumps(line))
                ledger.add_result(line)


def budget(root: Path, plan: PlanConfig) -> Budget | None:
    """State of the study's error budget; None before its first comparison."""
    ledger = read_ledger(root)
    return ledger.budget(plan.alpha) if ledger else None


def next_level(
    root: Path, plan: PlanConfig, family: int, *, confirming: bool, planned: int
) -> float:
    """Level that each of so many new comparisons of a run would get, before anything is written.

    Args:
        family: comparisons of the run.
        planned: comparisons of the whole study where neither ledger nor plan name them.
    """
    ledger = read_ledger(root)
    if confirming:
        return confirming_level(plan.alpha, 1 + (ledger.confirming if ledger else 0), family)
    if ledger is None:
        rule = ErrorBudget(alpha=plan.alpha, planned=plan.comparisons or max(1, planned, family))
        ledger = Ledger(rule=rule)
    last = ledger.rule.level(ledger.exploratory + max(1, family), ledger.known)
    return min(last, plan.alpha / max(1, family))


def lost_comparisons(root: Path) -> tuple[str, ...]:
    """Says that complete runs are missing from the ledger; () where all are there."""
    ledger = read_ledger(root)
    return lost_text(ledger.lost) if ledger else ()


def lost_text(lost: Sequence[str]) -> tuple[str, ...]:
    """Says that these runs are missing from the ledger; () for none."""
    text = f"{COMPARISONS} was missing although {', '.join(lost)} had been run"
    return (f"{text}: what was spent there is not counted",) if lost else ()


def read_ledger(root: Path) -> Ledger | None:
    """Reads the ledger; None where there is none.

    Raises: DamageError when a line can't be read, SourceError when the file can't be opened.
    """
    ledger: Ledger | None = None
    for where, line in read_lines(_file(root)):
        ledger = _add_line(ledger, line, where)
    return ledger


def _add_line(ledger: Ledger | None, line: Any, where: str) -> Ledger:
    """The ledger with one more line."""
    if ledger is None:
        validate(line, _Budget, where, LINE_REMEDY)
        rule = ErrorBudget(alpha=line["alpha"], planned=line["planned"])
        return Ledger(rule=rule, lost=tuple(line["lost"]))
    if isinstance(line, dict) and "number" in line:
        validate(line, _Given, where, LINE_REMEDY)
        if line["number"] != 1 + len(ledger.given):
            raise DamageError(f"{where} is not comparison {1 + len(ledger.given)}: {LINE_REMEDY}")
        ledger.given[line["number"]] = line
        return ledger
    validate(line, _Result, where, LINE_REMEDY)
    if line["result"] not in ledger.given:
        raise DamageError(
            f"{where} is about comparison {line['result']}, which has none: {LINE_REMEDY}"
        )
    ledger.add_result(line)
    return ledger


def _begin(root: Path, plan: PlanConfig, planned: int) -> Ledger:
    """Writes the first line: what the study's budget is."""
    done = [one.run for one in attempts(root) if one.outcome == "complete"]
    lost = tuple(dict.fromkeys(done))
    rule = ErrorBudget(alpha=plan.alpha, planned=plan.comparisons or max(1, planned))
    append_line(_file(root), json.dumps(asdict(rule) | {"lost": lost, "at": _now()}))
    return Ledger(rule=rule, lost=lost)


def _locked(root: Path) -> AbstractContextManager[None]:
    """Holds the ledger; waits while another launch does."""
    return wait_for_lock(_file(root), "is writing down comparisons")


def _file(root: Path) -> Path:
    return root / FOLDER / COMPARISONS


def _now() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
