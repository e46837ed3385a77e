"""All promises of the verdict, simulated on the usable cores."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from multiprocessing import get_context

from saelab.progress import Progress, progress
from saelab.runtime.cores import usable_cores
from saelab.verdict.simulation.comparisons import Row, Rows, row_groups
from saelab.verdict.simulation.intervals import agreement_rows, text_rows
from saelab.verdict.simulation.settings import settings_rows
from saelab.verdict.simulation.studies import study_rows

#: Studies a row below which further processes are not worth their start. Our choice.
FEW = 2000


def all_promises(studies: int = 20_000, seed: int = 0, processes: int = 0) -> Iterator[Row]:
    """Simulates every row, so many studies each; the same rows in the same order for any number of
    processes.

    Args:
        seed: of the streams.
        processes: that simulate at once; 0 for one a core, or one for few studies.
    """
    groups: list[Rows] = [
        *row_groups(),
        agreement_rows,
        text_rows,
        settings_rows,
        study_rows,
    ]
    processes = processes or (1 if studies < FEW else usable_cores())
    with progress("simulate", len(groups), "groups of rows") as bar:
        if processes == 1:
            for group in groups:
                yield from group(studies, seed)
                bar.advance()
            return
        with ProcessPoolExecutor(processes, get_context("spawn")) as pool:
            yield from _in_order(pool, groups, (studies, seed), bar)


def _in_order(
    pool: ProcessPoolExecutor, groups: list[Rows], arguments: tuple[int, int], bar: Progress
) -> Iterator[Row]:
    """Yields the rows of all groups; the last ones, which take longest, are begun first."""
    waiting: dict[int, Future[list[Row]]] = {}
    for i in reversed(range(len(groups))):
        waiting[i] = pool.submit(_simulate, groups[i], *arguments)
        waiting[i].add_done_callback(lambda _: bar.advance())
    for i in range(len(groups)):
        yield from waiting[i].result()


def _simulate(rows: Rows, studies: int, seed: int) -> list[Row]:
    return list(rows(studies, seed))
