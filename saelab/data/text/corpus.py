"""Documents of any text source: the standard library, local files, or a data set.

Documents are streamed in their own order; `tokens.py` cuts them into contexts.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

from saelab.config import Frozen
from saelab.data.hub import silence_loggers
from saelab.data.text import probe_texts, stdlib
from saelab.data.text.characters import whole_characters
from saelab.errors import SettingError, SourceError, UnreachableError, nearest
from saelab.runtime.counting import count
from saelab.storage.atomic import sha256
from saelab.storage.parquet import stream_rows

#: Local files read as one document each; .jsonl and .parquet hold one document per row.
PLAIN_SUFFIXES = (".txt", ".md")
SUFFIXES = (*PLAIN_SUFFIXES, ".jsonl", ".parquet")
#: Builders of `datasets` that only parse data (no pickle inside, as webdataset may have).
SAFE_BUILDERS = ("parquet", "json", "text", "csv", "arrow")


class TextConfig(Frozen):
    """Source of a text.

    Args:
        kind: 'stdlib' (the interpreter's own library), 'files' (local), 'dataset' (`datasets`) or
            'sae_probes' (long texts of the package sae-probes; splits train and held_out).
        path: a file or a folder of .txt, .md, .jsonl or .parquet files; or a data set's name.
        name: the data set's configuration.
        split: stdlib: train, held_out or all. dataset: its split. files: if rows have a `split`
            column, the rows with that value; if a folder has files named after the split
            ('train.parquet', 'train-00000.jsonl'), those files; 'all' takes everything.
        column: the column with the text, or several names; each row is read at the first name that
            it has. Plain text files have no columns and ignore it.
        joined: documents follow each other in full contexts, which may contain several. False: each
            document is cut separately and its last context padded, so that no position sees another
            document; short documents then take more disk, but little more computing.
    """

    kind: Literal["stdlib", "files", "dataset", "sae_probes"] = "stdlib"
    path: str | None = None
    name: str | None = None
    split: str = "train"
    column: str | tuple[str, ...] = "text"
    joined: bool = True

    @property
    def columns(self) -> tuple[str, ...]:
        """Names of the text column."""
        return (self.column,) if isinstance(self.column, str) else self.column


def documents(config: TextConfig) -> Iterator[str]:
    """Yields the documents in their own order, without empty ones.

    Raises: SourceError when the source is missing, unreachable, empty or lacks the column.
    """
    readers = {
        "stdlib": _stdlib_texts,
        "files": _file_texts,
        "dataset": _dataset_texts,
        "sae_probes": lambda config: probe_texts.texts(config.split),
    }
    return _skip_empty(readers[config.kind](config), config)


def resume_documents(
    config: TextConfig, cursor: dict[str, Any] | None
) -> tuple[Any, Iterator[str]]:
    """Opens a data set, and yields its documents after a cursor, without empty ones.

    Args:
        config: the data set.
        cursor: state of the stream after the last document; None for the beginning.

    Returns: the `IterableDataset`, whose `state_dict` is the next cursor, and the documents.
    Raises: SourceError as `documents`.
    """
    dataset = open_dataset(config, ())
    texts = _texts_of_rows(dataset, config)
    if cursor is None:
        return dataset, _skip_empty(texts, config)
    dataset.load_state_dict(cursor)
    return dataset, (text for text in texts if text.strip())


def manifest(config: TextConfig) -> dict[str, Any]:
    """Returns the identity of the corpus, for the header of everything made from it.

    It is the library's manifest, the local files with a content hash, or the data set's name, with
    a content hash of each file of a data set on this machine.
    """
    if config.kind == "stdlib":
        return {**stdlib.manifest(), "split": config.split}
    if config.kind == "sae_probes":
        return probe_texts.manifest(config.split)
    if config.kind == "files":
        root = Path(_required_path(config)).expanduser()
        hashes = {_relative_name(root, file): sha256(file) for file in _local_files(config)}
        return {"corpus": root.name, "split": config.split, "files": hashes}
    identity = {"corpus": config.path, "name": config.name, "split": config.split}
    if (local := Path(_required_path(config)).expanduser()).exists():
        files = [local] if local.is_file() else sorted(f for f in local.rglob("*") if f.is_file())
        identity["files"] = {_relative_name(local, file): sha256(file) for file in files}
    return identity


def _relative_name(root: Path, file: Path) -> str:
    """Returns a file's path in its folder; two subfolders may have a file of one name."""
    return file.name if file == root else file.relative_to(root).as_posix()


def _skip_empty(texts: Iterator[str], config: TextConfig) -> Iterator[str]:
    """Yields the texts that are not empty; raises SourceError when all are."""
    filled = (text for text in texts if text.strip())
    first = next(filled, None)
    if first is None:
        raise SourceError(f"{source_title(config)} holds no text: name a source that is not empty")
    yield first
    yield from filled


def source_title(config: TextConfig) -> str:
    """Returns the name of the source and its split, for messages."""
    default = "texts of sae-probes" if config.kind == "sae_probes" else "the standard library"
    source = config.path or default
    return f"{source} (split {config.split!r})"


def _required_path(config: TextConfig) -> str:
    """Returns `path`; raises SettingError when it is not set."""
    if not config.path:
        raise SettingError("text.path", config.path, f"kind {config.kind!r} needs a path or a name")
    return config.path


def _stdlib_texts(config: TextConfig) -> Iterator[str]:
    splits = ("train", "held_out", "all")
    if config.split not in splits:
        hint = nearest(config.split, splits)
        raise SettingError("text.split", config.split, f"stdlib has {', '.join(splits)}{hint}")
    yield from stdlib.texts(config.split)


def _local_files(config: TextConfig) -> list[Path]:
    """Returns the files to read, sorted by path: those named after the split, if there are any.

    Raises: SourceError when the path does not exist or has no file that can be read.
    """
    root = Path(_required_path(config)).expanduser()
    if not root.exists():
        raise SourceError(f"text file or folder {root} does not exist: name an existing one")
    if root.is_file():
        if root.suffix not in SUFFIXES:
            raise SourceError(f"{root} is not one of {', '.join(SUFFIXES)}: convert it to one")
        return [root]
    files = sorted(f for f in root.rglob("*") if f.suffix in SUFFIXES and f.is_file())
    if not files:
        raise SourceError(f"{root} has no {', '.join(SUFFIXES)} file: name a folder with text")
    of_split = [f for f in files if f.stem == config.split or f.stem.startswith(f"{config.split}-")]
    return of_split or files


def _file_texts(config: TextConfig) -> Iterator[str]:
    files = _local_files(config)
    split = _split_to_keep(files, config)
    for file in files:
        if file.suffix in PLAIN_SUFFIXES:
            yield _read_text(file)
            continue
        for row in _rows(file, (*config.columns, "split")):
            if split is None or row.get("split", split) == split:
                yield _row_text(row, config.columns, str(file))


def _split_to_keep(files: list[Path], config: TextConfig) -> str | None:
    """Returns the value that rows must have in their `split` column; None for every row.

    Raises: SourceError when no row has it.
    """
    if config.split == "all" or "split" in config.columns:
        return None
    splits: set[str] = set()
    for file in files:
        for row in _rows(file, ("split",)):
            if "split" not in row:
                break  # the first row shows whether the file has the column
            splits.add(str(row["split"]))
            if config.split in splits:
                return config.split
    if splits:
        raise SourceError(
            f"{config.path} has no rows of split {config.split!r}: its splits are "
            f"{', '.join(sorted(splits))}; set the split of this text (train_text.split or "
            "eval_text.split) to one of them, or to 'all' for every row"
        )
    return None


def _rows(file: Path, columns: tuple[str, ...]) -> Iterator[dict[str, Any]]:
    """Yields the rows of a .parquet or .jsonl file, and none of a plain file.

    Parquet reads only the wanted columns, or all of them if the table has none of these besides
    `split`, so that the error can name them.
    """
    if file.suffix == ".jsonl":
        with file.open("rb") as lines:
            for number, line in enumerate(lines, start=1):
                if line.strip():
                    yield _json_row(line, f"{file}:{number}")
    elif file.suffix == ".parquet":

        def choose(names: Sequence[str]) -> list[str]:
            wanted = [name for name in columns if name in names]
            every = set(wanted) <= {"split"} and set(columns) != {"split"}
            return list(names) if every else wanted

        yield from stream_rows(file, choose, SourceError, "name a readable parquet file")


def _json_row(line: bytes, where: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise SourceError(f"{where} is not JSON ({error}): write one object per line") from None
    if not isinstance(row, dict):
        raise SourceError(f"{where} is not a JSON object: write one object per line")
    return row


def _read_text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8-sig")  # without a mark of byte order
    except UnicodeDecodeError as error:
        raise SourceError(f"{file} is not UTF-8 text ({error.reason}): convert it") from None


def _row_text(row: dict[str, Any], columns: Sequence[str], where: str) -> str:
    """Returns the text of a row at the first of the columns that it has.

    Raises: SourceError when it has none of them, or holds no text there.
    """
    column = next((name for name in columns if name in row), None)
    if column is None:
        missing = " or ".join(f"{name!r}{nearest(name, row)}" for name in columns)
        raise SourceError(
            f"{where} has no column {missing}: its columns are "
            f"{', '.join(row)}; set text.column to one of them"
        )
    if row[column] is None:
        return ""
    if not isinstance(row[column], str):
        kind = type(row[column]).__name__
        raise SourceError(f"column {column!r} of {where} holds {kind}, not text: name another")
    return whole_characters(row[column])


def _dataset_texts(config: TextConfig) -> Iterator[str]:
    yield from _texts_of_rows(open_dataset(config, ()), config)


def _texts_of_rows(dataset: Any, config: TextConfig) -> Iterator[str]:
    """Yields the documents of an opened data set."""
    for row in _dataset_rows(dataset, config):
        yield _row_text(row, config.columns, f"data set {config.path}")


def dataset_rows(config: TextConfig, columns: Sequence[str]) -> Iterator[dict[str, Any]]:
    """Yields the rows of a data set's split in its own order; see `open_dataset`."""
    return _dataset_rows(open_dataset(config, columns), config)


def open_dataset(config: TextConfig, columns: Sequence[str]) -> Any:
    """Opens a data set's split as an `IterableDataset`, without reading any row.

    Args:
        config: the data set.
        columns: columns that it must have.

    Raises: UnreachableError or SourceError when it can't be opened, is not plain data or lacks a
        column.
    """
    path = _required_path(config)
    import datasets

    try:
        with silence_loggers():
            dataset = datasets.load_dataset(path, config.name, split=config.split, streaming=True)
            builder = str(dataset.info.builder_name)
            names = dataset.column_names
    except Exception as error:  # `datasets` raises a dozen kinds without a common base
        raise _dataset_error(config, error) from error
    if builder not in SAFE_BUILDERS:
        raise SourceError(
            f"data set {path} is of type {builder!r}: only {', '.join(SAFE_BUILDERS)} are read"
        )
    for column in columns:
        if names is not None and column not in names:
            _row_text(dict.fromkeys(names), (column,), f"data set {path}")
    return dataset


def _dataset_rows(dataset: Any, config: TextConfig) -> Iterator[dict[str, Any]]:
    rows = iter(dataset)
    while True:
        try:
            row = next(rows)
        except StopIteration:
            return
        except Exception as error:
            raise _dataset_error(config, error) from error
        yield row


def _dataset_error(config: TextConfig, error: Exception) -> SourceError:
    reason = (str(error).strip() or type(error).__name__).splitlines()[0]
    kind = UnreachableError if isinstance(error, ConnectionError) else SourceError
    return kind(
        f"data set {config.path} (name {config.name!r}, split {config.split!r}) can't be read "
        f"({reason}): check its name and split, or name local files where there is no network"
    )


def check_texts(train: TextConfig, held_out: TextConfig) -> None:
    """Raises: SettingError when the text of the evaluation is the one that is trained on.

    Two splits of sae_probes share no text by their rule; local files are compared with one by hash.
    """
    same = train == held_out
    if train.kind == held_out.kind == "files" and train.path and held_out.path:
        places = {Path(text.path or "").expanduser().resolve() for text in (train, held_out)}
        same = len(places) == 1 and next(documents(train)) == next(documents(held_out))
    if same:
        where = held_out.path or held_out.split
        raise SettingError("eval_text", where, "is trained on: name another text or split")
    if {train.kind, held_out.kind} == {"sae_probes", "files"}:
        shared = probe_texts.count_shared(documents(train), documents(held_out))
        if shared:
            where = held_out.path or held_out.split
            remedy = f"{count(shared, 'document')} of it are in the training text: leave them out"
            raise SettingError("eval_text", where, remedy)
