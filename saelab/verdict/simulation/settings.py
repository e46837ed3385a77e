"""Rows of the validation table on what is said over settings.

Every study draws the true effect of k settings, measures each from cells whose spread differs
between settings by up to a factor of two, and asks the intervals of `across_settings` for the mean
effect and for the true effect of one more setting.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from saelab import stats
from saelab.seeding import numpy_stream
from saelab.verdict.across_settings import intervals
from saelab.verdict.effect import estimate
from saelab.verdict.judge import choose_words
from saelab.verdict.simulation.comparisons import Design, Kind, Row, draw_noise

#: Numbers of settings.
SETTINGS = (3, 5, 8)
#: Standard deviation of true effects between settings, in standard errors of one setting.
TAUS = (0.0, 1.0, 3.0)
#: Correlation of arm and baseline within a seed.
CORRELATION = 0.3
LEVEL = 0.05


@dataclass(frozen=True)
class Drawn:
    """Measured effects [studies, k], and the true effect of a further setting [studies]."""

    effects: stats.Array
    new: stats.Array


def draw_settings(
    k: int, design: Design, tau: float, kind: Kind, mean: float, studies: int, seed: int
) -> Drawn:
    """Draws studies of k settings; numbers are in standard deviations of an average cell.

    Args:
        design: numbers of cells in each setting.
        tau: spread of true effects between settings, in standard errors of one setting.
        kind: of the cells' noise; true effects are normal.
        mean: mean true effect.
    """
    stream = numpy_stream(seed, "simulation", f"settings {k} {design} {tau:g} {kind} {mean:g}")
    between = tau * math.sqrt(1 / design.arm + 1 / design.baseline)
    true = mean + between * stream.normal(size=(studies, k + 1))
    sd = np.linspace(2 / 3, 4 / 3, k)[:, None]
    of_seed = draw_noise(stream, kind, (studies, k, max(design.arm, design.baseline)))
    share, rest = math.sqrt(CORRELATION), math.sqrt(1 - CORRELATION)
    arm = rest * draw_noise(stream, kind, (studies, k, design.arm))
    base = rest * draw_noise(stream, kind, (studies, k, design.baseline))
    arm += share * of_seed[..., : design.arm]
    base += share * of_seed[..., : design.baseline]
    effect = estimate(sd * arm + true[:, :k, None], sd * base, design.shared)
    return Drawn(effect.mean, true[:, k])


def settings_rows(studies: int, seed: int) -> Iterator[Row]:
    """Simulates coverage of both intervals, and how often a word is wrong."""
    cases: tuple[tuple[Kind, Design], ...] = (
        ("normal", Design(8, 8)),
        ("normal", Design(3, 8)),
        ("skewed", Design(3, 8)),
    )
    for kind, design in cases:
        for k in SETTINGS:
            for tau in TAUS:
                yield from _coverage_rows(k, design, tau, kind, studies, seed)
    for k in SETTINGS:
        for tau in TAUS:
            yield _wrong_row(k, tau, studies, seed)


def _coverage_rows(
    k: int, design: Design, tau: float, kind: Kind, studies: int, seed: int
) -> Iterator[Row]:
    drawn = draw_settings(k, design, tau, kind, 0.0, studies, seed)
    found = intervals(drawn.effects, LEVEL)
    covered = {
        "mean over settings: 95% interval covers": np.abs(found.mean) <= found.half,
        "new setting: 95% prediction interval covers": np.abs(drawn.new - found.mean)
        <= found.new_half,
    }
    for promise, hits in covered.items():
        yield Row(
            promise=promise,
            cells=f"{kind}, {k} settings of {design}, tau = {tau:g} standard errors",
            studies=studies,
            observed=float(hits.mean()),
            low=0.95,
            high=1.0,
        )


def _wrong_row(k: int, tau: float, studies: int, seed: int) -> Row:
    """No effect on average, and next to no smallest effect of interest: every word is wrong."""
    drawn = draw_settings(k, Design(3, 8), tau, "normal", 0.0, studies, seed + 1)
    found = intervals(drawn.effects, LEVEL)
    low, high = found.mean - found.half, found.mean + found.half
    word = choose_words(found.mean, low, high, 0.0)
    return Row(
        promise="no effect over settings: helps or hurts",
        cells=f"normal, {k} settings of {Design(3, 8)}, tau = {tau:g} standard errors",
        studies=studies,
        observed=float(np.isin(word, ("helps", "hurts")).mean()),
        low=0.0,
        high=0.05,
    )
