"""Parquet tables of others and of finished runs, read in pieces and by type.

A table's metadata may lie about sizes, and a compressed page may swell a thousandfold. Tables of
runs are therefore read only in the codec that they are written in, which can't, and to a limit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from saelab.errors import DamageError, SaelabError

if TYPE_CHECKING:
    import pyarrow as pa

#: What a column holds: text, an integer, a number; '?' allows missing values; 'any' plain values.
Kind = Literal["text", "text?", "whole", "number", "number?", "any"]
#: Values that are read of a run's table at most; they take about 100 bytes each.
MOST_VALUES = 8_000_000
#: Codecs whose pages grow by less than 30 times.
CODECS = ("SNAPPY", "UNCOMPRESSED")
#: Rows in one piece.
ROWS = 4096


def read_rows(
    path: Path,
    columns: Mapping[str, Kind],
    only: Mapping[str, str] | None = None,
    remedy: str = "delete it and run again",
) -> list[dict[str, Any]]:
    """The named columns of a run's table, row by row.

    Args:
        columns: name -> what it must hold.
        only: column -> the value that rows must have.

    Raises: DamageError when the file can't be read, lacks a column or holds another type.
    """
    found: list[dict[str, Any]] = []
    for batch in _batches(path, list(columns), remedy, DamageError, CODECS):
        for name, kind in columns.items():
            if not _is(batch.column(name), kind):
                raise DamageError(f"{path} is damaged (column {name!r} is no {kind}): {remedy}")
        found += _kept(batch, only or {})
        if len(found) * len(columns) > MOST_VALUES:
            raise DamageError(f"{path} has over {MOST_VALUES:,} values: {remedy}")
    return found


def stream_rows(
    path: Path, choose: Callable[[Sequence[str]], list[str]], error: type[SaelabError], remedy: str
) -> Iterator[dict[str, Any]]:
    """The rows of any Parquet file, streamed; nothing of it is kept.

    Args:
        choose: names of all columns -> those that are wanted; none reads no row.
        error: that is raised when the file can't be read.
    """
    for batch in _batches(path, choose, remedy, error):
        yield from _kept(batch, {})


def _batches(
    path: Path,
    columns: list[str] | Callable[[Sequence[str]], list[str]],
    remedy: str,
    error: type[SaelabError],
    codecs: tuple[str, ...] = (),
) -> Iterator[pa.RecordBatch]:
    """Pieces of a table whose values are valid."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path, pre_buffer=False) as table:
            there = table.schema_arrow.names
            wanted = columns(there) if callable(columns) else columns
            if absent := [name for name in wanted if there.count(name) != 1]:
                raise error(f"{path} has no column {absent[0]!r}: {remedy}")
            if codecs and (other := _codecs(table) - set(codecs)):
                raise error(f"{path} is compressed by {sorted(other)[0]}: {remedy}")
            for batch in table.iter_batches(ROWS, columns=wanted) if wanted else ():
                batch.validate(full=True)
                yield batch
    except (pa.ArrowException, OSError, ValueError, KeyError, OverflowError) as found:
        reason = (str(found).strip() or type(found).__name__).splitlines()[0]
        raise error(f"{path} can't be read ({reason[:200]}): {remedy}") from None


def _codecs(table: Any) -> set[str]:
    groups = [table.metadata.row_group(i) for i in range(table.metadata.num_row_groups)]
    return {g.column(i).compression for g in groups for i in range(g.num_columns)}


def _kept(batch: pa.RecordBatch, only: Mapping[str, str]) -> list[dict[str, Any]]:
    import pyarrow.compute as pc

    for name, value in only.items():
        batch = batch.filter(pc.equal(batch.column(name), value))  # type: ignore[attr-defined]
    return batch.to_pylist()


def _is(column: pa.Array, kind: Kind) -> bool:
    import pyarrow as pa

    types, null = pa.types, pa.types.is_null(column.type)
    if column.null_count and kind not in ("any", "text?", "number?"):
        return False
    if kind == "any":
        known = (types.is_string, types.is_integer, types.is_floating, types.is_null)
        return any(check(column.type) for check in known)
    if kind in ("text", "text?"):
        return types.is_string(column.type) or types.is_large_string(column.type) or null
    if kind == "whole":
        return types.is_integer(column.type)
    return types.is_floating(column.type) or types.is_integer(column.type) or null
