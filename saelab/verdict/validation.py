"""All promises of the verdict, simulated: those of one comparison or run, and of whole studies."""

from __future__ import annotations

from collections.abc import Iterator

from saelab.verdict.simulation import Row, validation_table
from saelab.verdict.study_simulation import study_rows


def all_promises(studies: int = 20_000, seed: int = 0) -> Iterator[Row]:
    """Simulates every row in turn, so many studies each.

    Args:
        seed: of the streams.
    """
    yield from validation_table(studies, seed)
    yield from study_rows(studies, seed)
