"""Simulated comparisons of one run, and what the verdict promises of them.

Every row simulates whole studies and applies the functions that judge real ones: the interval and
its word (`effect`, `judge.choose_words`) over many studies at once where nothing fails and nothing
is moved, else `judge`, or `judge_run` on cells with their L0. Units are FVU; the spread of a cell
and the slope of the frontier are about those of the shipped study.
"""

from __future__ import annotations

import functools
import math
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np

from saelab import stats
from saelab.runs.schema import CellId
from saelab.runtime.counting import count
from saelab.seeding import numpy_stream
from saelab.study.plan import PlanConfig
from saelab.verdict.arms import ArmResult, CellGate
from saelab.verdict.effect import Effect, estimate
from saelab.verdict.final_info import judge_run
from saelab.verdict.gate import GateResult
from saelab.verdict.judge import Cells, Rules, choose_words, judge
from saelab.verdict.l0_adjustment import Matched

Kind = Literal["normal", "skewed", "discrete"]
KINDS: tuple[Kind, ...] = ("normal", "skewed", "discrete")
#: Correlations of arm and baseline within a seed.
CORRELATIONS = (0.0, 0.3, 0.6, 0.9)

#: Baseline's FVU, standard deviation of a cell, smallest effect of interest, slope of the frontier.
FVU, SD, SESOI, SLOPE = 0.185, 0.00054, 0.005, -0.0727
TARGET = 32.0
#: With next to no smallest effect of interest, every interval that excludes 0 is a word.
PLAN = PlanConfig(study="simulated", target_l0=TARGET, seeds=8, sesoi=1e-9)


@dataclass(frozen=True, kw_only=True)
class Row:
    """Promise of the verdict, and what simulation gives.

    Args:
        promise: what must hold, in words.
        cells: the simulated cells, in words.
        studies: number of simulated studies.
        observed: the share that the promise is about.
        low, high: promised bounds.
        variance: of what one study adds to the share; None for a word that is said or not.
    """

    promise: str
    cells: str
    studies: int
    observed: float
    low: float
    high: float
    variance: float | None = None

    @property
    def is_kept(self) -> bool:
        """True where the share lies inside the bounds, 3 standard errors of simulation allowed."""
        known = self.variance
        variances = [p * (1 - p) if known is None else known for p in (self.low, self.high)]
        errors = [3 * math.sqrt(variance / self.studies) for variance in variances]
        return self.low - errors[0] <= self.observed <= self.high + errors[1]

    def line(self) -> str:
        bounds = f"{self.low:.3f}-{self.high:.3f}"
        word = "kept" if self.is_kept else "BROKEN"
        return _format_row(self.promise, self.cells, f"{self.observed:.3f}", bounds, word)


def _format_row(*cells: str) -> str:
    widths = (48, 68, 8, 11)
    text = [f"{cell:<{width}}" for cell, width in zip(cells, widths, strict=False)]
    return " ".join([*text, cells[-1]])


#: Simulates rows: (studies, seed) -> rows.
Rows = Callable[[int, int], Iterator[Row]]
#: Names the columns of `Row.line`.
HEADING = _format_row("promise", "cells", "observed", "promised", "kept?")


def row_groups() -> list[Rows]:
    """Groups of rows that can be simulated apart, in their order: none uses another's streams."""
    groups: list[Rows] = [_null_rows, _interval_rows, _power_rows]
    for rows in (_failure_rows, _l0_rows, _look_rows):
        groups += [functools.partial(rows, kind=kind) for kind in KINDS]
    return groups


# ---------------------------------------------------------------------------------------- cells


@dataclass(frozen=True)
class Design:
    """Numbers of cells of each arm and of the baseline, whose first ones share their seeds, and of
    arms in the family."""

    arm: int
    baseline: int
    arms: int = 1

    def __str__(self) -> str:
        cells = f"{self.arm} and {count(self.baseline, 'cell')}"
        return f"{cells}, {count(self.arms, 'arm')}" if self.arms > 1 else cells

    @property
    def shared(self) -> int:
        return min(self.arm, self.baseline)


#: Designs of the shipped study: full arms, side arms of three seeds, and small comparisons.
DESIGNS = (
    Design(8, 8),
    Design(8, 8, 6),
    Design(3, 8),
    Design(3, 8, 6),
    Design(3, 3),
    Design(3, 3, 6),
)


def draw_noise(stream: np.random.Generator, kind: Kind, shape: tuple[int, ...]) -> stats.Array:
    """Draws noise of mean 0 and standard deviation 1: normal, exponential, or 20 coin throws."""
    if kind == "normal":
        return stream.normal(size=shape)
    if kind == "skewed":
        return stream.exponential(size=shape) - 1
    return (stream.binomial(20, 0.8, size=shape) / 20 - 0.8) / math.sqrt(0.2 * 0.8 / 20)


def draw_effects(
    design: Design, kind: Kind, correlation: float, effect: float, studies: int, seed: int
) -> Effect:
    """Estimates the arms of many studies; arrays [studies, arms].

    Args:
        correlation: of cells that share their seed.
        effect: true effect of every arm, in standard deviations of a cell.
    """
    name = f"{kind} {design} {correlation:g} {effect:g}"
    stream = numpy_stream(seed, "simulation", name)
    of_seed = draw_noise(stream, kind, (studies, 1, max(design.arm, design.baseline)))
    share, rest = math.sqrt(correlation), math.sqrt(1 - correlation)
    arm = rest * draw_noise(stream, kind, (studies, design.arms, design.arm))
    base = rest * draw_noise(stream, kind, (studies, 1, design.baseline))
    arm += share * of_seed[..., : design.arm] + effect
    base += share * of_seed[..., : design.baseline]
    return estimate(
        arm, np.broadcast_to(base, (studies, design.arms, design.baseline)), design.shared
    )


def _level(design: Design) -> float:
    return Rules(primary="fvu", direction="higher", sesoi=0).level(design.arms)


def _words(effect: Effect, level: float, sesoi: float) -> np.ndarray:
    return choose_words(effect.mean, *effect.interval(level), sesoi)


# ----------------------------------------------------------------------- nothing fails or moves


def _null_rows(studies: int, seed: int) -> Iterator[Row]:
    """No arm has an effect: a study with any word of direction is wrong."""
    for kind in KINDS:
        for design in DESIGNS:
            for r in CORRELATIONS:
                effect = draw_effects(design, kind, r, 0.0, studies, seed)
                word = _words(effect, _level(design), 0.0)
                wrong = ((word == "helps") | (word == "hurts")).any(axis=-1)
                yield Row(
                    promise="no effect: helps or hurts",
                    cells=f"{kind}, {design}, r = {r:g}",
                    studies=studies,
                    observed=float(wrong.mean()),
                    low=0.0,
                    high=0.05,
                )


def _interval_rows(studies: int, seed: int) -> Iterator[Row]:
    """Intervals hold the true effect; an effect of interest is rarely called equivalent."""
    for kind in KINDS:
        for design in (Design(8, 8), Design(3, 8), Design(3, 3)):
            for r in (0.0, 0.6):
                effect = draw_effects(design, kind, r, 1.0, studies, seed)
                low, high = effect.interval(0.05)
                yield Row(
                    promise="95% interval covers",
                    cells=f"{kind}, {design}, r = {r:g}",
                    studies=studies,
                    observed=float(((low <= 1) & (high >= 1)).mean()),
                    low=0.95,
                    high=1.0,
                )
    for design in (Design(8, 8), Design(3, 8), Design(3, 3)):
        effect = draw_effects(design, "normal", 0.3, 3.0, studies, seed)
        word = _words(effect, _level(design), 3.0)
        yield Row(
            promise="effect as large as sesoi: equivalent",
            cells=f"normal, {design}, r = 0.3",
            studies=studies,
            observed=float((word == "equivalent").mean()),
            low=0.0,
            high=0.05,
        )


def _power_rows(studies: int, seed: int) -> Iterator[Row]:
    """An effect is found: three cells use all of the baseline's, and `detectable` is true."""
    for r in CORRELATIONS:
        design = Design(3, 8, 12)
        effect = draw_effects(design, "normal", r, 0.0096 / 0.00122, studies, seed)
        word = _words(effect, _level(design), SESOI / 0.00122)
        yield Row(
            promise="effect of 7.9 standard deviations: found",
            cells=f"normal, {design}, r = {r:g}",
            studies=studies,
            observed=float((word == "helps").mean()),
            low=0.95,
            high=1.0,
        )
    for design in (Design(8, 8), Design(8, 8, 6), Design(3, 3), Design(3, 3, 6)):
        level = _level(design)
        df = stats.degrees_of_freedom(design.shared, 0)
        size = stats.detectable_ratio(df, level) * math.sqrt(2 / design.shared)
        effect = draw_effects(design, "normal", 0.0, size, studies, seed)
        yield Row(
            promise="effect that is called detectable: found",
            cells=f"normal, {design}",
            studies=studies,
            observed=float((effect.p < level).mean()),
            low=0.78,
            high=0.82,
        )
    for design in (Design(8, 8), Design(8, 8, 6), Design(3, 8, 6), Design(3, 3)):
        sd = SESOI / SD
        effect = draw_effects(design, "normal", 0.0, sd / 5, studies, seed)
        word = _words(effect, _level(design), sd)
        decided = word[word != "cannot tell yet"]
        yield Row(
            promise="a fifth of sesoi: one word, where there is one",
            cells=f"normal, {design}",
            studies=studies,
            observed=float((decided == "equivalent").mean()) if len(decided) else 1.0,
            low=0.9,
            high=1.0,
        )


# ------------------------------------------------------------------------------------- failures


def _cells(values: stats.Array, failed: np.ndarray | None = None) -> Cells:
    lost = set() if failed is None else set(np.flatnonzero(failed).tolist())
    by_seed = {seed: None if seed in lost else float(v) for seed, v in enumerate(values)}
    return Cells(matched=Matched(values=by_seed), failed=frozenset(lost))


def _rules(sesoi: float = 0.0, looks: int | None = None) -> Rules:
    return Rules(primary="fvu", direction="lower", sesoi=sesoi, looks=looks)


def _count(studies: int, study: Callable[[], str]) -> Counter[str]:
    return Counter(study() for _ in range(studies))


def _failure_rows(studies: int, seed: int, kind: Kind) -> Iterator[Row]:
    """Cells that fail count on both sides."""
    for n in (8, 12):
        for q in (0.05, 0.1, 0.2, 0.3):
            stream = numpy_stream(seed, "simulation", f"failures {kind} {n} {q:g}")

            def study(n: int = n, q: float = q, stream: np.random.Generator = stream) -> str:
                values = FVU + SD * draw_noise(stream, kind, (2, n))
                failed = stream.random((2, n)) < q
                base, arm = (_cells(v, f) for v, f in zip(values, failed, strict=True))
                return judge(_rules(), base, {"arm": arm})[0].word

            words = _count(studies, study)
            cells = f"{kind}, {n} and {count(n, 'cell')}, all fail with probability {q:g}"
            wrong = words["helps"] + words["hurts"]
            yield Row(
                promise="no effect: helps or hurts",
                cells=cells,
                studies=studies,
                observed=wrong / studies,
                low=0.0,
                high=0.05,
            )
            yield Row(
                promise="no effect: |hurts - helps|",
                cells=cells,
                studies=studies,
                observed=abs(words["hurts"] - words["helps"]) / studies,
                low=0.0,
                high=0.01,
                variance=wrong / studies,  # a study adds 1, -1 or 0
            )
    stream = numpy_stream(seed, "simulation", f"sturdier {kind}")

    def sturdier() -> str:
        values = FVU + SD * draw_noise(stream, kind, (2, 8))
        base = _cells(values[0], stream.random(8) < 0.75)
        return judge(_rules(), base, {"arm": _cells(values[1])})[0].word

    yield Row(
        promise="the arm never fails: helps",
        cells=f"{kind}, 8 and 8 cells, baseline's fail with probability 0.75",
        studies=studies,
        observed=_count(studies, sturdier)["helps"] / studies,
        low=0.8,
        high=1.0,
    )


# ------------------------------------------------------------------------------------------- L0


#: Of a cell with which nothing is wrong.
PASSED = GateResult("ok", ())


@dataclass(frozen=True)
class Frontier:
    """An arm on a frontier: FVU at the target, slope, distance of its L0 from the target, spread of
    that distance, whether it has cells at the levels 16 and 64 (of two seeds), and the standard
    deviation of a cell."""

    off: float
    slope: float = SLOPE
    levels: bool = False
    effect: float = 0.0
    spread: float = 0.003
    sd: float = SD

    def at(self, l0: float) -> float:
        return FVU + self.effect + self.slope * math.log(l0 / TARGET)

    def draw(self, name: str, seeds: int, kind: Kind, stream: np.random.Generator) -> ArmResult:
        """Draws an arm whose cells have passed the gate."""
        arm = ArmResult(name, definitions=dict.fromkeys(("fvu", "l0"), "core/1"))
        off = self.spread * stream.normal(size=seeds)
        noise = self.sd * draw_noise(stream, kind, (seeds,))
        for seed in range(seeds):
            l0 = TARGET * (1 + self.off) * math.exp(off[seed])
            arm.gates[seed] = PASSED
            arm.values[seed] = {"fvu": self.at(l0) + float(noise[seed]), "l0": l0}
        if self.levels:
            noise = self.sd * draw_noise(stream, kind, (2, 2))
            for seed, of_seed in enumerate(noise.tolist()):
                l0 = (1.01 * TARGET / 2, 1.01 * TARGET * 2)
                cells = [{"fvu": self.at(x) + e, "l0": x} for x, e in zip(l0, of_seed, strict=True)]
                arm.levels[seed] = dict(zip((TARGET / 2, TARGET * 2), cells, strict=True))
        return arm

    def cell(
        self, seed: int, level: float, l0: float, stream: np.random.Generator
    ) -> tuple[CellGate, list[dict[str, object]]]:
        """Draws one cell.

        Args:
            level: that it was trained for.
            l0: where it ended.
        """
        values = {"fvu": self.at(l0) + self.sd * stream.normal(), "l0": l0}
        rows: list[dict[str, object]] = [
            {"metric": metric, "value": value, "slice": "", "definition": "core/1"}
            for metric, value in values.items()
        ]
        id = CellId("simulated", seed, level)
        return CellGate(id=id, expected=(), facts={"l0": l0, "target_l0": level}), rows


def _l0_rows(studies: int, seed: int, kind: Kind) -> Iterator[Row]:
    """An L0 that is not the target's gives no word; levels on both sides give the right one."""
    one = Frontier(0.0, levels=True)
    no_levels = [(Frontier(0.016), Frontier(0.0)), (Frontier(0.0), Frontier(0.03))]
    cases = [(n, base, arm, "no levels") for n in (3, 8) for base, arm in no_levels]
    cases += [
        (n, one, Frontier(0.031, SLOPE * share), f"slope {share:g} of the baseline's")
        for n in (3, 8)
        for share in (0.7, 0.86, 1.3)
    ]
    cases += [(8, one, Frontier(0.03, SLOPE * 0.7, levels=True), "own levels")]
    for n, base, arm, how in cases:
        words = _judge_frontiers(studies, seed, (n, kind), base, arm)
        off = f"L0 off by {base.off:.1%} and {arm.off:.1%}"
        yield Row(
            promise="no effect at the target: helps or hurts",
            cells=f"{kind}, {n} and {count(n, 'cell')}, {off}, {how}",
            studies=studies,
            observed=(words["helps"] + words["hurts"]) / studies,
            low=0.0,
            high=0.05,
        )
    for n in (3, 8):
        wide = Frontier(0.04, levels=True, effect=0.015, spread=0.015)
        words = _judge_frontiers(studies, seed, (n, kind), one, wide)
        yield Row(
            promise="cells off the tolerance, levels: refused",
            cells=f"{kind}, {n} and {count(n, 'cell')}, L0 off by 4.0%, spread 1.5%",
            studies=studies,
            observed=words["refused"] / studies,
            low=0.0,
            high=0.02,
        )


def _judge_frontiers(
    studies: int, seed: int, cells: tuple[int, Kind], base: Frontier, arm: Frontier
) -> Counter[str]:
    n, kind = cells
    stream = numpy_stream(seed, "simulation", f"{kind} {n} {base} {arm}")

    def study() -> str:
        sides = {"baseline": base, "arm": arm}
        arms = {name: side.draw(name, n, kind, stream) for name, side in sides.items()}
        return judge_run(arms, PLAN, exploratory=True)[0][0].word

    return _count(studies, study)


# ---------------------------------------------------------------------------------------- looks


def _look_rows(studies: int, seed: int, kind: Kind) -> Iterator[Row]:
    """Judging, adding the seeds that the verdict asks for, and judging again."""
    for sd in (0.0017, 0.003, 0.005, 0.008):
        stream = numpy_stream(seed, "simulation", f"looks {kind} {sd:g}")

        def study(sd: float = sd, stream: np.random.Generator = stream) -> str:
            base, arm = FVU + sd / math.sqrt(2) * draw_noise(stream, kind, (2, 60))
            n = 3
            for look in range(1, 7):
                (c,) = judge(_rules(SESOI, look), _cells(base[:n]), {"arm": _cells(arm[:n])})
                if c.p is not None and c.p < c.level:
                    return "differs"
                if c.word != "cannot tell yet" or not c.needed_seeds or n == 60:
                    break
                n = min(60, c.needed_seeds)
            return "no difference"

        words = _count(studies, study)
        yield Row(
            promise="no effect, up to 6 looks: a difference",
            cells=f"{kind}, from 3 to 60 seeds, sd of differences {sd:g}",
            studies=studies,
            observed=words["differs"] / studies,
            low=0.0,
            high=0.05,
        )
