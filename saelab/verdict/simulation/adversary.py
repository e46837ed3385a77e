"""An adversary of the decision: a driver that submits nothing of value until something is kept.

Cells are simulated, and everything else is as in a study: each submission gets its level from the
ledger of a study in a folder, `judge_run` judges it and `decide_run` decides. Cells are drawn by
settings and seed, so that a repeated submission has the cells that it had.

    no-op           a setting that does nothing
    L0 drift        an arm without effect at the declared L0 that ends up to 4.5% off it, most often
                    where the metric is better; with or without levels, and with a frontier that is
                    up to 30% flatter or steeper than the baseline's
    other seeds     one of the last submissions on further seeds (`Launch.seed_set`)
    other name      one of the last submissions under another name, after its run was deleted
    more seeds      one that could not be decided with more seeds, asked for or not
    planted         an effect of the smallest size of interest: the only ones worth keeping

Two rules are measured on the same submissions: keep one whose mean is better than the baseline's,
and keep one whose first cell is better than the baseline's of the same seed.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from saelab.config import digest
from saelab.seeding import numpy_stream
from saelab.study.plan import BASELINE, PlanConfig
from saelab.verdict.arms import ArmResult
from saelab.verdict.decision import MOST_TIMES, Decision, decide_run
from saelab.verdict.error_budget.ledger import Hypothesis, allot, budget, record_results
from saelab.verdict.final_info import judge_run
from saelab.verdict.simulation.cells import SD, SESOI, SLOPE, TARGET, Kind, draw_noise
from saelab.verdict.simulation.frontiers import LEVELS, WITH_LEVELS, Frontier

PLANTED = "planted"
#: Shares of the submissions that are worth nothing.
TRICKS = {
    "no-op": 0.35,
    "L0 drift": 0.25,
    "other seeds": 0.15,
    "other name": 0.1,
    "more seeds": 0.15,
}


@dataclass(frozen=True)
class Submission:
    """An arm that is submitted.

    Args:
        trick: why.
        settings: what makes its cells, besides their seeds.
        frontier: that they lie on.
        seeds: their number.
        seed_set: further set of seeds, 0 for the study's first.
    """

    trick: str
    settings: str
    frontier: Frontier
    seeds: int
    seed_set: int = 0

    @property
    def is_planted(self) -> bool:
        return self.frontier.effect != 0


@dataclass
class Count:
    """Submissions, and how many of them a rule kept: of those worth nothing, and of the others."""

    worthless: int = 0
    planted: int = 0
    false_keeps: int = 0
    true_keeps: int = 0

    def add(self, submission: Submission, kept: bool) -> None:
        if submission.is_planted:
            self.planted += 1
            self.true_keeps += kept
        else:
            self.worthless += 1
            self.false_keeps += kept

    def __add__(self, other: Count) -> Count:
        return Count(
            worthless=self.worthless + other.worthless,
            planted=self.planted + other.planted,
            false_keeps=self.false_keeps + other.false_keeps,
            true_keeps=self.true_keeps + other.true_keeps,
        )

    @property
    def of_submissions(self) -> float:
        """False keeps as a share of the submissions that are worth nothing."""
        return self.false_keeps / max(1, self.worthless)

    @property
    def of_keeps(self) -> float:
        """False keeps as a share of all keeps."""
        return self.false_keeps / max(1, self.false_keeps + self.true_keeps)

    @property
    def power(self) -> float:
        return self.true_keeps / max(1, self.planted)


@dataclass
class Study:
    """A study in a folder that submissions are judged in.

    Args:
        root: folder for its ledger.
        plan: its rules.
        seed: of all cells.
        sd: standard deviation of a cell.
        correlation: of arm and baseline within a seed.
        kind: of the cells' noise.
    """

    root: Path
    plan: PlanConfig
    seed: int
    sd: float = SD
    correlation: float = 0.0
    kind: Kind = "normal"

    def arms(self, submission: Submission) -> dict[str, ArmResult]:
        """Baseline and candidate, with the cells that they always have."""
        base = Frontier(0.0, levels=True, sd=self.sd)
        return {
            BASELINE: self._arm(BASELINE, BASELINE, base, submission),
            "arm": self._arm("arm", submission.settings, submission.frontier, submission),
        }

    def _arm(
        self, name: str, settings: str, frontier: Frontier, submission: Submission
    ) -> ArmResult:
        own = replace(frontier, sd=self.sd * math.sqrt(1 - self.correlation))
        arm = ArmResult(name)
        for i in range(submission.seeds):
            seed = 1000 * submission.seed_set + i
            stream = numpy_stream(self.seed, "adversary", settings, seed)
            shared = self._noise(numpy_stream(self.seed, "adversary-seed", seed))
            moved = replace(own, effect=own.effect + self.sd * math.sqrt(self.correlation) * shared)
            l0 = TARGET * (1 + own.off) * math.exp(own.spread * stream.normal())
            arm.add(*moved.cell(seed, TARGET, l0, self._noise(stream)))
            if own.levels and i < WITH_LEVELS:
                for level in LEVELS:
                    noise = self._noise(stream)
                    arm.add_level(*moved.cell(seed, level, LEVELS[level], noise))
        return arm

    def _noise(self, stream: np.random.Generator) -> float:
        return float(draw_noise(stream, self.kind, (1,))[0])

    def submit(self, submission: Submission, name: str, arms: dict[str, ArmResult]) -> Decision:
        """Judges a submission as a launch does.

        Args:
            name: of its run.
            arms: as `arms` returns them.
        """
        sides = [(submission.settings, arms["arm"]), (BASELINE, arms[BASELINE])]
        hypothesis = Hypothesis(
            arm="arm",
            against=BASELINE,
            settings=(digest(submission.settings), digest(BASELINE)),
            cells=(_hashes(*sides[0]), _hashes(*sides[1])),
        )
        levels = allot(self.root, self.plan, [hypothesis], run=name)
        given = {arm: each.level for arm, each in levels.items()}
        comparisons, _ = judge_run(arms, self.plan, True, given)
        record_results(self.root, name, levels, comparisons)
        left = budget(self.root, self.plan)
        (decision,) = decide_run(arms, comparisons, self.plan, left.left if left else None)
        return decision


@dataclass
class Driver:
    """Chooses submissions; it knows the decisions so far.

    Args:
        plan: of the study.
        stream: for its choices.
    """

    plan: PlanConfig
    stream: np.random.Generator
    past: list[tuple[Submission, Decision]] = field(default_factory=list)
    number: int = 0

    def choose(self) -> Submission:
        """A submission that is worth nothing."""
        trick = str(self.stream.choice(list(TRICKS), p=list(TRICKS.values())))
        recent = [s for s, _ in self.past[-30:] if not s.is_planted]
        if trick == "more seeds":
            open_ones = [
                (s, d)
                for s, d in self.past[-30:]
                if not s.is_planted and d.comparison.word == "cannot tell yet"
            ]
            if open_ones:
                return self._extended(*open_ones[-1])
        elif recent and trick == "other seeds":
            return replace(self._one_of(recent), trick=trick, seed_set=self.number + 1)
        elif recent and trick == "other name":
            return replace(self._one_of(recent), trick=trick)
        elif trick == "L0 drift":
            return self._new(trick, self._drifting())
        return self._new("no-op", Frontier(0.0, levels=bool(self.stream.random() < 0.5)))

    def plant(self) -> Submission:
        gain = -self.plan.sesoi if self.plan.direction == "lower" else self.plan.sesoi
        return self._new(PLANTED, Frontier(0.0, levels=True, effect=gain))

    def _new(self, trick: str, frontier: Frontier) -> Submission:
        self.number += 1
        return Submission(trick, f"{trick} {self.number}", frontier, self.plan.seeds)

    def _drifting(self) -> Frontier:
        off = float(self.stream.uniform(-0.02, 0.045))  # a larger L0 has the better FVU
        slope = SLOPE * float(self.stream.uniform(0.7, 1.3))
        return Frontier(off, slope, levels=bool(self.stream.random() < 0.5))

    def _extended(self, submission: Submission, decision: Decision) -> Submission:
        asked = decision.seeds or submission.seeds + 4
        most = MOST_TIMES * self.plan.seeds
        seeds = min(most, max(asked, submission.seeds + 1))
        return replace(submission, trick="more seeds", seeds=seeds)

    def _one_of(self, submissions: Sequence[Submission]) -> Submission:
        return submissions[int(self.stream.integers(len(submissions)))]


def attack(
    root: Path,
    *,
    worthless: int = 500,
    planted: int = 50,
    seed: int = 0,
    sd: float = SD,
    correlation: float = 0.0,
    kind: Kind = "normal",
    comparisons: int | None = None,
) -> dict[str, Count]:
    """Submits worthless and planted arms in random order to one study; rule -> its counts.

    A planted arm that is to have more seeds gets them, as an honest driver would do.

    Args:
        root: empty folder for the study's ledger.
        worthless, planted: numbers of submissions.
        seed: of all draws.
        sd, correlation, kind: of the cells.
        comparisons: that the plan names; None for as many as are submitted.
    """
    plan = PlanConfig(
        study="attacked",
        target_l0=TARGET,
        sesoi=SESOI,
        comparisons=comparisons or worthless + planted,
    )
    stream = numpy_stream(seed, "adversary-driver")
    study = Study(root, plan, seed, sd=sd, correlation=correlation, kind=kind)
    driver = Driver(plan, stream)
    order = stream.permutation([False] * worthless + [True] * planted)
    counts = {rule: Count() for rule in ("decision", "mean is better", "one cell is better")}
    for i, plant in enumerate(order):
        submission = driver.plant() if plant else driver.choose()
        arms = study.arms(submission)
        decision = study.submit(submission, f"run_{i}", arms)
        if plant and decision.action == "more-seeds" and decision.seeds:
            more = replace(submission, seeds=decision.seeds)
            decision = study.submit(more, f"run_{i} again", study.arms(more))
        driver.past.append((submission, decision))
        counts["decision"].add(submission, decision.action == "keep")
        fvu, base = (_values(arms[name]) for name in ("arm", BASELINE))
        counts["mean is better"].add(submission, bool(np.mean(fvu) < np.mean(base)))
        counts["one cell is better"].add(submission, fvu[0] < base[0])
    return counts


def _hashes(settings: str, arm: ArmResult) -> list[str]:
    """Content hashes of the cells of an arm."""
    return [digest([settings, seed]) for seed in arm.values]


def _values(arm: ArmResult) -> list[float]:
    return [values["fvu"] for values in arm.values.values()]
