"""Results as pandas tables, where pandas is installed; nothing else in the package needs it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from saelab.errors import SettingError, UsageError
from saelab.evals.base import Row
from saelab.runs.folder import RunFolder
from saelab.verdict.judge import Comparison

if TYPE_CHECKING:
    import pandas


def to_pandas(results: Any) -> pandas.DataFrame:
    """Converts results to a pandas table.

    Args:
        results: scores of `saelab.evaluate` (a row for each number, slices included), comparisons
            of `saelab.compare` (a row for each arm), or the folder of a complete run (a row for
            each number of each cell).

    Raises: UsageError where pandas is not installed; SettingError for anything else; SourceError
        for a folder that is not a complete run.
    """
    try:
        from pandas import DataFrame
    except ImportError:
        raise UsageError(
            "pandas is not installed, and tables of results need it: pip install pandas"
        ) from None
    return DataFrame(_rows_of(results))


def _rows_of(results: Any) -> list[dict[str, Any]]:
    if isinstance(results, (str, Path)):
        return RunFolder(Path(results)).metrics
    if isinstance(results, Comparison):
        results = [results]
    entries = getattr(results, "rows", results)
    if isinstance(entries, Iterable) and not isinstance(entries, dict):
        entries = list(entries)
        if all(isinstance(entry, (Row, Comparison)) for entry in entries):
            return [asdict(entry) for entry in entries]
    remedy = "give scores of saelab.evaluate, comparisons of saelab.compare, or a run's folder"
    raise SettingError("results", type(results).__name__, remedy)
