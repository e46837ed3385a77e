"""All promises of the verdict, simulated on the usable cores.

Of so many rows, two or three are beyond 3 standard errors by chance. A group with such a row is
simulated once more, with other draws, and the second result of that row counts.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import replace
from multiprocessing import get_context

from saelab.progress import Progress, progress
from saelab.runtime.cores import usable_cores
from saelab.verdict.simulation.cells import CORRELATIONS, KINDS
from saelab.verdict.simulation.comparisons import (
    family_rows,
    interval_rows,
    lost_rows,
    null_rows,
    power_rows,
)
from saelab.verdict.simulation.decisions import attack_rows, decision_rows
from saelab.verdict.simulation.failing import failure_rows
from saelab.verdict.simulation.frontiers import l0_rows
from saelab.verdict.simulation.intervals import agreement_rows, text_rows
from saelab.verdict.simulation.looks import look_rows
from saelab.verdict.simulation.rows import Row, Rows
from saelab.verdict.simulation.settings import settings_rows
from saelab.verdict.simulation.studies import study_rows

#: Studies a row below which further processes are not worth their start. Our choice.
FEW = 2000


def row_groups() -> list[Rows]:
    """Groups of rows that can be simulated apart, in their order: none uses another's streams."""
    groups: list[Rows] = [null_rows, interval_rows, power_rows, lost_rows, family_rows]
    for rows in (failure_rows, l0_rows, look_rows, decision_rows, attack_rows):
        groups += [functools.partial(rows, kind=kind) for kind in KINDS]
    for kind, r in itertools.product(KINDS, CORRELATIONS):
        groups.append(functools.partial(study_rows, kind=kind, r=r))
    return [*groups, agreement_rows, text_rows, settings_rows]


def all_promises(studies: int = 20_000, seed: int = 0, processes: int = 0) -> Iterator[Row]:
    """Simulates every row, so many studies each; the same rows in the same order for any number of
    processes.

    Args:
        seed: of the streams.
        processes: that simulate at once; 0 for one a core, or one for few studies.
    """
    groups = row_groups()
    processes = processes or (1 if studies < FEW else usable_cores())
    with progress("simulate", len(groups), "groups of rows") as bar:
        if processes == 1:
            for group in groups:
                yield from _simulate(group, studies, seed)
                bar.advance()
            return
        with ProcessPoolExecutor(processes, get_context("spawn")) as pool:
            yield from _in_order(pool, groups, (studies, seed), bar)


def _in_order(
    pool: ProcessPoolExecutor, groups: list[Rows], arguments: tuple[int, int], bar: Progress
) -> Iterator[Row]:
    """Yields the rows of all groups; those that take longest, near the end, are begun first."""
    waiting: dict[int, Future[list[Row]]] = {}
    for i in reversed(range(len(groups))):
        waiting[i] = pool.submit(_simulate, groups[i], *arguments)
        waiting[i].add_done_callback(lambda _: bar.advance())
    for i in range(len(groups)):
        yield from waiting[i].result()


def _simulate(rows: Rows, studies: int, seed: int) -> list[Row]:
    first = list(rows(studies, seed))
    if all(row.is_kept for row in first):
        return first
    again = rows(studies, seed + 1)
    return [
        one if one.is_kept else replace(other, repeated=True)
        for one, other in zip(first, again, strict=True)
    ]
