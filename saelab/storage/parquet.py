"""Readers of foreign Parquet tables and of tables of finished runs, in batches and by type.

A table's metadata may lie about sizes, and a compressed page may expand a thousandfold. Tables of
runs are therefore read only up to a limit and in the codecs that they are written in, whose pages
can't expand like that.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from saelab.errors import DamageError, SaelabError

if TYPE_CHECKING:
    import pyarrow as pa

#: Type of a column; '?' allows missing values, 'any' is text, integers ('whole') or numbers.
Kind = Literal["text", "text?", "whole", "number", "number?", "any"]
#: Largest number of values read from a run's table; each takes about 100 bytes.
MOST_VALUES = 8_000_000
#: Codecs whose pages grow by less than 30 times.
CODECS = ("SNAPPY", "UNCOMPRESSED")
#: Rows of one batch.
BATCH_ROWS = 4096


def read_rows(
    path: Path,
    columns: Mapping[str, Kind],
    only: Mapping[str, str] | None = None,
    remedy: str = "delete it and run again",
) -> list[dict[str, Any]]:
    """Reads the named columns of a run's table, row by row.

    Args:
        path: the table.
        columns: name -> type that it must have.
        only: column -> value that rows must have.
        remedy: last part of the error message.

    Raises: DamageError when the file can't be read, lacks a column or holds another type.
    """
    rows: list[dict[str, Any]] = []
    for batch in _batches(path, list(columns), remedy, DamageError, CODECS):
        for name, kind in columns.items():
            if not _has_kind(batch.column(name), kind):
                raise DamageError(
                    f"{path} is damaged (column {name!r} is not of type {kind}): {remedy}"
                )
        rows += _select(batch, only or {})
        if len(rows) * len(columns) > MOST_VALUES:
            raise DamageError(f"{path} has over {MOST_VALUES:,} values: {remedy}")
    return rows


def stream_rows(
    path: Path, choose: Callable[[Sequence[str]], list[str]], error: type[SaelabError], remedy: str
) -> Iterator[dict[str, Any]]:
    """Streams the rows of any Parquet file; no row stays in memory.

    Args:
        path: the file.
        choose: names of all columns -> names of the columns to read; none of them reads no row.
        error: class of the error that is raised when the file can't be read.
        remedy: last part of the error message.
    """
    for batch in _batches(path, choose, remedy, error):
        yield from _select(batch, {})


def _batches(
    path: Path,
    columns: list[str] | Callable[[Sequence[str]], list[str]],
    remedy: str,
    error: type[SaelabError],
    codecs: tuple[str, ...] = (),
) -> Iterator[pa.RecordBatch]:
    """Yields the batches of a table after their values were validated."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path, pre_buffer=False) as table:
            names = table.schema_arrow.names
            chosen = columns(names) if callable(columns) else columns
            if absent := [name for name in chosen if names.count(name) != 1]:
                raise error(f"{path} has no column {absent[0]!r}: {remedy}")
            if codecs and (other := _codecs(table) - set(codecs)):
                raise error(f"{path} is compressed by {sorted(other)[0]}: {remedy}")
            for batch in table.iter_batches(BATCH_ROWS, columns=chosen) if chosen else ():
                batch.validate(full=True)
                yield batch
    except (pa.ArrowException, OSError, ValueError, KeyError, OverflowError) as cause:
        reason = (str(cause).strip() or type(cause).__name__).splitlines()[0]
        raise error(f"{path} can't be read ({reason[:200]}): {remedy}") from None


def _codecs(table: Any) -> set[str]:
    groups = [table.metadata.row_group(i) for i in range(table.metadata.num_row_groups)]
    return {g.column(i).compression for g in groups for i in range(g.num_columns)}


def _select(batch: pa.RecordBatch, only: Mapping[str, str]) -> list[dict[str, Any]]:
    """Returns the rows of a batch whose columns have the values of `only`."""
    import pyarrow.compute as pc

    for name, value in only.items():
        batch = batch.filter(pc.equal(batch.column(name), value))  # type: ignore[attr-defined]
    return batch.to_pylist()


def _has_kind(column: pa.Array, kind: Kind) -> bool:
    import pyarrow as pa

    types, null = pa.types, pa.types.is_null(column.type)
    if column.null_count and kind not in ("any", "text?", "number?"):
        return False
    if kind == "any":
        plain = (types.is_string, types.is_integer, types.is_floating, types.is_null)
        return any(is_type(column.type) for is_type in plain)
    if kind in ("text", "text?"):
        return types.is_string(column.type) or types.is_large_string(column.type) or null
    if kind == "whole":
        return types.is_integer(column.type)
    return types.is_floating(column.type) or types.is_integer(column.type) or null
