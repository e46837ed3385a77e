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
from saelab.verdict.simulation.cells import CORRELATIONS, KINDS, Design, Kind, draw_cells
from saelab.verdict.simulation.comparisons import has_direction
from saelab.verdict.simulation.rows import Row, share_row

#: Numbers of settings.
SETTINGS = (3, 5, 8)
#: Standard deviation of true effects between settings, in standard errors of one setting.
TAUS = (0.0, 1.0, 3.0)
LEVEL = 0.05


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Simulated settings; numbers are in standard deviations of an average cell.

    Args:
        k: their number.
        tau: standard deviation of true effects between settings, in standard errors of one setting;
            true effects are normal and have the mean 0.
        design: numbers of cells in each setting.
        kind, correlation: of the cells' noise, and of arm and baseline within a seed.
    """

    k: int
    tau: float
    design: Design
    kind: Kind
    correlation: float

    def __str__(self) -> str:
        where = f"{self.kind}, {self.k} settings of {self.design}, r = {self.correlation:g}"
        return f"{where}, tau = {self.tau:g} standard errors"

    def draw(self, studies: int, seed: int) -> Drawn:
        stream = numpy_stream(seed, "simulation", f"settings {self}")
        between = self.tau * math.sqrt(1 / self.design.arm + 1 / self.design.baseline)
        true = between * stream.normal(size=(studies, self.k + 1))
        sd = np.linspace(2 / 3, 4 / 3, self.k)[:, None]
        arm, base = (
            side.reshape(studies, self.k, -1)
            for side in draw_cells(
                self.design, self.kind, self.correlation, studies * self.k, stream
            )
        )
        effect = estimate(sd * arm + true[:, : self.k, None], sd * base, self.design.shared)
        return Drawn(effect.mean, true[:, self.k])


@dataclass(frozen=True)
class Drawn:
    """Measured effects [studies, k], and the true effect of a further setting [studies]."""

    effects: stats.Array
    new: stats.Array


def settings_rows(studies: int, seed: int) -> Iterator[Row]:
    """Simulates coverage of both intervals, and how often a word is wrong where settings have no
    effect on average."""
    cases: list[tuple[Kind, float, Design]] = [
        (kind, r, Design(3, 8)) for kind in KINDS for r in CORRELATIONS
    ]
    for kind, r, design in [*cases, ("normal", 0.3, Design(8, 8))]:
        for k in SETTINGS:
            for tau in TAUS:
                settings = Settings(k=k, tau=tau, design=design, kind=kind, correlation=r)
                yield from _rows(settings, studies, seed)


def _rows(settings: Settings, studies: int, seed: int) -> Iterator[Row]:
    drawn = settings.draw(studies, seed)
    result = intervals(drawn.effects, LEVEL)
    mean, half = result.mean, result.half
    of_new = np.abs(drawn.new - mean) <= result.new_half
    wrong = has_direction(choose_words(mean, mean - half, mean + half, 0.0))
    cells, covers = str(settings), (0.95, 1.0)
    yield share_row("mean over settings: 95% interval covers", cells, np.abs(mean) <= half, covers)
    yield share_row("new setting: 95% prediction interval covers", cells, of_new, covers)
    yield share_row("no effect over settings: helps or hurts", cells, wrong, (0.0, 0.05))
