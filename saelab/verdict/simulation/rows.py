"""Rows of the validation table, and its summary: the worst row of each promise."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from saelab.runtime.counting import count

#: Standard errors of the simulation beyond the bounds at which a promise is broken.
ALLOWED = 3.0


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
        repeated: whether this is the second simulation, see `promises`.
    """

    promise: str
    cells: str
    studies: int
    observed: float
    low: float
    high: float
    variance: float | None = None
    repeated: bool = False

    @property
    def excess(self) -> float:
        """Distance of the share beyond its bounds, in standard errors of the simulation; negative
        inside."""
        return max(
            _in_errors(self.low - self.observed, self._error(self.low)),
            _in_errors(self.observed - self.high, self._error(self.high)),
        )

    def _error(self, share: float) -> float:
        variance = share * (1 - share) if self.variance is None else self.variance
        return math.sqrt(variance / self.studies)

    @property
    def is_kept(self) -> bool:
        """True where the share lies inside the bounds, `ALLOWED` standard errors allowed."""
        return self.excess <= ALLOWED

    @property
    def bounds(self) -> str:
        return f"{self.low:.3f} to {self.high:.3f}"

    @property
    def answer(self) -> str:
        return ("kept" if self.is_kept else "BROKEN") + (", repeated" if self.repeated else "")

    def line(self) -> str:
        return _line(
            WIDTHS, self.promise, self.cells, f"{self.observed:.3f}", self.bounds, self.answer
        )


def _in_errors(distance: float, error: float) -> float:
    if error == 0:  # no chance to be beyond it, as beyond 0 and 1
        return math.inf if distance > 1e-12 else -math.inf
    return distance / error


#: Simulates rows: (studies, seed) -> rows.
Rows = Callable[[int, int], Iterator[Row]]
#: Widths of the columns of the table and of its summary; the last one has none.
WIDTHS, SUMMARY_WIDTHS = (62, 74, 8, 15), (62, 5, 8, 15)


def _line(widths: tuple[int, ...], *cells: str) -> str:
    text = [f"{cell:<{width}}" for cell, width in zip(cells, widths, strict=False)]
    return " ".join([*text, cells[-1]])


#: Names the columns of `Row.line`.
HEADING = _line(WIDTHS, "promise", "cells", "observed", "promised", "kept?")


@dataclass(frozen=True, kw_only=True)
class Promise:
    """All rows of one promise.

    Args:
        rows: their number.
        worst: the row that is farthest beyond its bounds, or nearest to them.
        broken, repeated: number of rows that break the promise, and that were simulated again.
    """

    rows: int
    worst: Row
    broken: int
    repeated: int

    def line(self) -> str:
        worst = self.worst
        answer = f"{self.broken} BROKEN" if self.broken else "kept"
        cells = (worst.promise, str(self.rows), f"{worst.observed:.3f}", worst.bounds, answer)
        return _line(SUMMARY_WIDTHS, *cells)


SUMMARY_HEADING = _line(SUMMARY_WIDTHS, "promise", "rows", "worst", "promised", "kept?")


def summarize(rows: Iterable[Row]) -> list[Promise]:
    """Summarizes the rows by promise, in the order of the promises."""
    by_promise: dict[str, list[Row]] = {}
    for row in rows:
        by_promise.setdefault(row.promise, []).append(row)
    return [
        Promise(
            rows=len(group),
            worst=max(group, key=lambda row: row.excess),
            broken=sum(not row.is_kept for row in group),
            repeated=sum(row.repeated for row in group),
        )
        for group in by_promise.values()
    ]


def summary_lines(rows: Iterable[Row]) -> list[str]:
    """The summary as text."""
    promises = summarize(rows)
    total, broken = sum(p.rows for p in promises), sum(p.broken for p in promises)
    repeated = sum(p.repeated for p in promises)
    farthest = max((p.worst.excess for p in promises), default=0.0)
    end = (
        f"{count(total, 'row')} of {count(len(promises), 'promise')}: {broken} broken, {repeated} "
        f"simulated again; the farthest is {farthest:.1f} standard errors beyond its bounds"
    )
    return [SUMMARY_HEADING, *(promise.line() for promise in promises), end]


def share_row(promise: str, cells: str, hits: ArrayLike, bounds: tuple[float, float]) -> Row:
    """Builds the row of a share of studies.

    Args:
        hits: true for the studies that count in the share [studies].
        bounds: promised.
    """
    counted = np.asarray(hits)
    return Row(
        promise=promise,
        cells=cells,
        studies=len(counted),
        observed=float(counted.mean()),
        low=bounds[0],
        high=bounds[1],
    )
