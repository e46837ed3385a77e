"""Simulated comparisons of one run in which no cell fails and none is moved.

Every row simulates whole studies at once and applies what judges real ones: the interval (`effect`)
and its word (`judge.choose_words`). Numbers are in standard deviations of a cell.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np

from saelab import stats
from saelab.seeding import numpy_stream
from saelab.verdict.effect import Effect, estimate
from saelab.verdict.judge import POWER, Rules, choose_words
from saelab.verdict.simulation.cells import (
    CORRELATIONS,
    KINDS,
    SD,
    SESOI,
    Design,
    Kind,
    draw_cells,
)
from saelab.verdict.simulation.rows import Row, share_row

#: Designs of the shipped study: full arms, side arms of three seeds, and small comparisons.
DESIGNS = (
    Design(8, 8),
    Design(8, 8, 6),
    Design(3, 8),
    Design(3, 8, 6),
    Design(3, 3),
    Design(3, 3, 6),
)
#: Those of one arm.
SINGLE = DESIGNS[::2]


def draw_effects(
    design: Design, kind: Kind, correlation: float, effect: float, studies: int, seed: int
) -> Effect:
    """Estimates the arms of many studies; arrays [studies, arms].

    Args:
        correlation: of cells that share their seed.
        effect: true effect of every arm, in standard deviations of a cell.
    """
    name = f"{kind} {design} {correlation:g} {effect:g}"
    arm, base = draw_cells(design, kind, correlation, studies, _stream(seed, name))
    return estimate(arm + effect, base, design.shared)


def _stream(seed: int, name: str) -> np.random.Generator:
    return numpy_stream(seed, "simulation", name)


def level_of(design: Design) -> float:
    """Level of each comparison of a run without a ledger."""
    return Rules(primary="fvu", direction="higher", sesoi=0).level(design.arms)


def _words(effect: Effect, level: float, sesoi: float) -> np.ndarray:
    return choose_words(effect.mean, *effect.interval(level), sesoi)


def has_direction(words: np.ndarray) -> np.ndarray:
    """True where a word says helps or hurts."""
    return (words == "helps") | (words == "hurts")


def null_rows(studies: int, seed: int) -> Iterator[Row]:
    """No arm has an effect: a study with any word of direction is wrong."""
    for kind in KINDS:
        for design in DESIGNS:
            for r in CORRELATIONS:
                effect = draw_effects(design, kind, r, 0.0, studies, seed)
                wrong = has_direction(_words(effect, level_of(design), 0.0)).any(axis=-1)
                cells = f"{kind}, {design}, r = {r:g}"
                yield share_row("no effect: helps or hurts", cells, wrong, (0.0, 0.05))


def interval_rows(studies: int, seed: int) -> Iterator[Row]:
    """Intervals hold the true effect; an effect of interest is rarely called equivalent."""
    for kind in KINDS:
        for design in SINGLE:
            for r in CORRELATIONS:
                cells = f"{kind}, {design}, r = {r:g}"
                effect = draw_effects(design, kind, r, 1.0, studies, seed)
                low, high = effect.interval(0.05)
                inside = ((low <= 1) & (high >= 1)).all(axis=-1)
                yield share_row("95% interval covers", cells, inside, (0.95, 1.0))
                effect = draw_effects(design, kind, r, 3.0, studies, seed)
                missed = (_words(effect, level_of(design), 3.0) == "equivalent").all(axis=-1)
                yield share_row("effect as large as sesoi: equivalent", cells, missed, (0.0, 0.05))


def power_rows(studies: int, seed: int) -> Iterator[Row]:
    """An effect is found: three cells use all of the baseline's, and `detectable` is true; a small
    one gets one word."""
    for kind in KINDS:
        for r in CORRELATIONS:
            yield from _power_rows(studies, seed, kind, r)


def _power_rows(studies: int, seed: int, kind: Kind, r: float) -> Iterator[Row]:
    design = Design(3, 8, 12)
    effect = draw_effects(design, kind, r, 0.0096 / 0.00122, studies, seed)
    helps = _words(effect, level_of(design), SESOI / 0.00122) == "helps"
    yield share_row(
        "effect of 7.9 standard deviations: helps",
        f"{kind}, {design}, r = {r:g}",
        helps[:, 0],
        (0.95, 1.0),
    )
    for design in (Design(8, 8), Design(8, 8, 6), Design(3, 3), Design(3, 3, 6)):
        level = level_of(design)
        size = detectable(design, r)
        effect = draw_effects(design, kind, r, size, studies, seed)
        yield share_row(
            "effect that is called detectable: found",
            f"{kind}, {design}, r = {r:g}",
            effect.p[:, 0] < level,
            (0.78, 0.82),
        )
    for design in (Design(8, 8), Design(8, 8, 6), Design(3, 8, 6), Design(3, 3)):
        sd = SESOI / SD
        effect = draw_effects(design, kind, r, sd / 5, studies, seed)
        word = _words(effect, level_of(design), sd)
        decided = word[word != "cannot tell yet"]
        yield share_row(
            "a fifth of sesoi: one word, where there is one",
            f"{kind}, {design}, r = {r:g}",
            decided == "equivalent",
            (0.9, 1.0),
        )


def detectable(design: Design, correlation: float) -> float:
    """Smallest effect that an interval excludes 0 for in 80% of studies, for cells that all share
    their seeds and have the standard deviation 1."""
    df = stats.degrees_of_freedom(design.shared, 0)
    error = math.sqrt(2 * (1 - correlation) / design.shared)
    return stats.detectable_ratio(df, level_of(design), POWER) * error


def lost_rows(studies: int, seed: int) -> Iterator[Row]:
    """A cell of an arm is lost by a fault of the software, which says nothing about the arm."""
    for kind in KINDS:
        for r in CORRELATIONS:
            for design in DESIGNS:
                yield _lost_at_random(studies, seed, design, kind, r)
            for design in (Design(8, 8), Design(8, 8, 6)):
                yield from _best_lost(studies, seed, design, kind, r)


def _lost_at_random(studies: int, seed: int, design: Design, kind: Kind, r: float) -> Row:
    """No effect, and every arm loses its last cell; the values do not say which one is lost."""
    left = Design(design.arm - 1, design.baseline, design.arms)
    stream = _stream(seed, f"lost {kind} {design} {r:g}")
    arm, base = draw_cells(left, kind, r, studies, stream)
    effect = estimate(arm, base, left.shared)
    wrong = has_direction(_words(effect, level_of(design), 0.0)).any(axis=-1)
    cells = f"{kind}, {design}, r = {r:g}"
    return share_row("no effect, each arm loses a cell: helps or hurts", cells, wrong, (0.0, 0.05))


def _best_lost(studies: int, seed: int, design: Design, kind: Kind, r: float) -> Iterator[Row]:
    """The arm loses the cell whose difference to the baseline is best."""
    for size, what in ((0.0, "no effect"), (detectable(design, r), "detectable effect")):
        one = Design(design.arm, design.baseline)
        stream = _stream(seed, f"best lost {kind} {design} {r:g} {what}")
        arm, base = (side[:, 0] for side in draw_cells(one, kind, r, studies, stream))
        arm = arm + size
        last = (arm - base).argsort(axis=-1, kind="stable")
        arm, base = (np.take_along_axis(side, last, axis=-1) for side in (arm, base))
        level = level_of(design)
        whole = _words(estimate(arm, base, one.shared), level, 0.0) == "helps"
        without = _words(estimate(arm[:, :-1], base, one.shared - 1), level, 0.0) == "helps"
        changed = float((whole != without).mean())
        yield Row(
            promise="the arm's best cell is lost: gain in helps",
            cells=f"{kind}, {design}, r = {r:g}, {what}",
            studies=studies,
            observed=float(without.mean() - whole.mean()),
            low=-1.0,
            high=0.0,
            variance=changed,  # a study adds 1, -1 or 0
        )


def family_rows(studies: int, seed: int) -> Iterator[Row]:
    """Equal cells in a family of 6 and of 12: the larger family never decides more."""
    for kind in KINDS:
        for design in SINGLE:
            for r in CORRELATIONS:
                effect = draw_effects(design, kind, r, 2.0, studies, seed)
                six, twelve = (Design(design.arm, design.baseline, m) for m in (6, 12))
                (low, high), (lower, higher) = (effect.interval(level_of(d)) for d in (six, twelve))
                wider = (lower <= low) & (higher >= high)
                wider &= ((lower < low) & (higher > high)) | effect.flat
                words = [_words(effect, level_of(d), 1.0) for d in (six, twelve)]
                same = (words[1] == words[0]) | (words[1] == "cannot tell yet")
                yield share_row(
                    "12 arms, not 6: wider interval, no new word",
                    f"{kind}, {design}, r = {r:g}",
                    (wider & same).all(axis=-1),
                    (1.0, 1.0),
                )
