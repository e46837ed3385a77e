"""The one reader and writer of Parquet tables: read in pieces and by type, written whole.

A table's metadata may lie about sizes, and a compressed page may swell a thousandfold. Tables that
saelab itself writes are therefore read only in the codecs that it uses, which cannot swell, and up
to a limit. Tables of others are streamed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from saelab.errors import DamageError, SaelabError
from saelab.storage.atomic import write_atomically

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


#: What is said of a damaged file that the next run makes again.
REMEDY = "delete it and run again"


def write_rows(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Writes rows of one shape as a table, whole or not at all."""
    import pyarrow as pa

    _write(path, pa.Table.from_pylist(list(rows)))


def write_columns(path: Path, columns: Mapping[str, Any], kinds: Mapping[str, str] = {}) -> None:
    """Writes columns of one length as a table, whole or not at all.

    Args:
        columns: name -> NumPy array or list.
        kinds: name -> Arrow type ('int64', 'float64', 'string'); the others are inferred.
    """
    import pyarrow as pa

    types = {name: pa.type_for_alias(kind) for name, kind in kinds.items()}
    _write(path, pa.table({n: pa.array(values, types.get(n)) for n, values in columns.items()}))


def join_tables(
    path: Path, parts: Sequence[tuple[Mapping[str, Any], Path]], kinds: Mapping[str, str] = {}
) -> None:
    """Writes the rows of several tables of saelab's as one, whole or not at all.

    Args:
        parts: values of further columns, the same for all rows of a table; and its file. A column
            that not all tables have is null in the others.
        kinds: Arrow types of the further columns, as in `write_columns`.

    Raises: DamageError when one can't be read.
    """
    import pyarrow as pa

    tables = []
    for values, file in parts:
        table = read_columns(file, dict.fromkeys(column_types(file), "any"))
        for i, (name, value) in enumerate(values.items()):
            kind = pa.type_for_alias(kinds[name]) if name in kinds else None
            table = table.add_column(i, name, pa.array([value] * len(table), kind))
        tables.append(table)
    _write(path, pa.concat_tables(tables, promote_options="default"))


def _write(path: Path, table: pa.Table) -> None:
    import pyarrow.parquet as pq

    write_atomically(path, lambda temporary: pq.write_table(table, temporary))


def read_columns(path: Path, columns: Mapping[str, Kind], remedy: str = REMEDY) -> pa.Table:
    """The named columns of a table that saelab has written.

    Args:
        columns: name -> what it must hold.

    Raises: DamageError when the file can't be read, lacks a column or holds another type.
    """
    import pyarrow as pa

    batches = list(_typed_batches(path, columns, {}, remedy))
    return pa.Table.from_batches(batches) if batches else pa.table({name: [] for name in columns})


def column_types(path: Path, remedy: str = REMEDY) -> dict[str, bool]:
    """Names of a table's columns, each with whether it holds whole numbers.

    Raises: DamageError when the file can't be read.
    """
    import pyarrow as pa

    with _opened(path, remedy, DamageError, CODECS) as table:
        return {f.name: pa.types.is_integer(f.type) for f in table.schema_arrow}


def read_rows(
    path: Path,
    columns: Mapping[str, Kind],
    only: Mapping[str, str] | None = None,
    remedy: str = REMEDY,
) -> list[dict[str, Any]]:
    """The named columns of a table that saelab has written, row by row.

    Args:
        path: the table.
        columns: name -> type that it must have.
        only: column -> value that rows must have.
        remedy: last part of the error message.

    Raises: DamageError when the file can't be read, lacks a column or holds another type.
    """
    batches = _typed_batches(path, columns, only or {}, remedy)
    return [row for batch in batches for row in batch.to_pylist()]


def _typed_batches(
    path: Path, columns: Mapping[str, Kind], only: Mapping[str, str], remedy: str
) -> Iterator[pa.RecordBatch]:
    """Pieces of a table of ours, of the given types and below the limit."""
    values = 0
    for batch in _batches(path, list(columns), remedy, DamageError, CODECS):
        for name, kind in columns.items():
            if not _has_kind(batch.column(name), kind):
                raise DamageError(
                    f"{path} is damaged (column {name!r} is not of type {kind}): {remedy}"
                )
        batch = _filtered(batch, only)
        values += batch.num_rows * len(columns)
        if values > MOST_VALUES:
            raise DamageError(f"{path} has over {MOST_VALUES:,} values: {remedy}")
        yield batch


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
        yield from batch.to_pylist()


def _batches(
    path: Path,
    columns: list[str] | Callable[[Sequence[str]], list[str]],
    remedy: str,
    error: type[SaelabError],
    codecs: tuple[str, ...] = (),
) -> Iterator[pa.RecordBatch]:
    """Yields the batches of a table after their values were validated."""
    with _opened(path, remedy, error, codecs) as table:
        names = table.schema_arrow.names
        wanted = columns(names) if callable(columns) else columns
        if absent := [name for name in wanted if names.count(name) != 1]:
            raise error(f"{path} has no column {absent[0]!r}: {remedy}")
        for batch in table.iter_batches(BATCH_ROWS, columns=wanted) if wanted else ():
            batch.validate(full=True)
            yield batch


@contextmanager
def _opened(
    path: Path, remedy: str, error: type[SaelabError], codecs: tuple[str, ...]
) -> Iterator[Any]:
    """Opens a Parquet file; whatever goes wrong with it inside the block is one sentence.

    Args:
        codecs: that its pages may be compressed by; () for any.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path, pre_buffer=False) as table:
            if codecs and (other := _codecs(table) - set(codecs)):
                raise error(f"{path} is compressed by {sorted(other)[0]}: {remedy}")
            yield table
    except (pa.ArrowException, OSError, ValueError, KeyError, OverflowError) as cause:
        reason = (str(cause).strip() or type(cause).__name__).splitlines()[0]
        raise error(f"{path} can't be read ({reason[:200]}): {remedy}") from None


def _codecs(table: Any) -> set[str]:
    groups = [table.metadata.row_group(i) for i in range(table.metadata.num_row_groups)]
    return {g.column(i).compression for g in groups for i in range(g.num_columns)}


def _filtered(batch: pa.RecordBatch, only: Mapping[str, str]) -> pa.RecordBatch:
    import pyarrow.compute as pc

    for name, value in only.items():
        batch = batch.filter(pc.equal(batch.column(name), value))  # type: ignore[attr-defined]
    return batch


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
