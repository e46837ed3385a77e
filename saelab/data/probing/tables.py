"""Reader of labelled texts from a local folder with `train` and `test`, .parquet or .jsonl."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from saelab.data.probing.embedded import SAMPLING_SEED, Entry, drop_shared, sample
from saelab.errors import SettingError, SourceError
from saelab.storage.parquet import stream_rows

#: Suffixes of local tables.
TABLE_SUFFIXES = (".parquet", ".jsonl")


def entries_from_table(
    name: str,
    folder: Path,
    text_column: str = "text",
    label_column: str = "label",
    train_size: int = 2000,
    test_size: int = 500,
    seed: int = SAMPLING_SEED,
) -> Entry:
    """Reads an entry from a local folder with `train` and `test` as .parquet or .jsonl.

    Args:
        name: name of the entry.
        folder: folder of the two files.
        text_column, label_column: columns of both; labels become class names as text.
        train_size, test_size: texts per class.
        seed: seed of the draw.

    Raises: SourceError for a missing file, column or class; SettingError for too few texts.
    """
    train = _texts_by_label(folder, "train", text_column, label_column)
    test = _texts_by_label(folder, "test", text_column, label_column)
    if set(train) != set(test) or len(train) < 2:
        raise SourceError(
            f"{folder}: train has the classes {sorted(train)} and test {sorted(test)} in "
            f"{label_column!r}: both need the same two or more"
        )
    classes = tuple(sorted(train))
    groups = {(c, False): train[c] for c in classes} | {(c, True): test[c] for c in classes}
    drop_shared(groups)

    def draw(side: bool, setting: str, size: int) -> dict[str, tuple[str, ...]]:
        rarest = min(classes, key=lambda c: len(groups[c, side]))
        if not 1 <= size <= (most := len(groups[rarest, side])):
            raise SettingError(setting, size, f"choose 1 to {most}, all that {rarest!r} has here")
        return {c: sample(list(groups[c, side]), size, seed, name, c, side) for c in classes}

    return Entry(
        name=name,
        classes=classes,
        train=draw(False, "train_size", train_size),
        test=draw(True, "test_size", test_size),
        source=f"{folder.name}: {text_column} by {label_column}",
    )


def _texts_by_label(
    folder: Path, side: str, text_column: str, label_column: str
) -> dict[str, dict[str, None]]:
    """Returns class -> texts, in order and without repetitions.

    Raises: SourceError as `read_side`, or for a column without text.
    """
    groups: dict[str, dict[str, None]] = defaultdict(dict)
    for row in read_side(folder, side, (text_column, label_column)):
        text, label = row[text_column], row[label_column]
        if text is not None and not isinstance(text, str):
            content = f"column {text_column!r} of {folder} holds {type(text).__name__}"
            raise SourceError(f"{content}, not text: name another")
        if text is not None and label is not None and text.strip():
            groups[str(label)][text] = None
    return dict(groups)


def find_sides(folder: Path) -> list[str]:
    """Returns which of train and test a folder has; 'train' if it has neither, for the error."""
    sides = [
        side
        for side in ("train", "test")
        if any(_table_file(folder, side, suffix) for suffix in TABLE_SUFFIXES)
    ]
    return sides or ["train"]


def _table_file(folder: Path, side: str, suffix: str) -> Path | None:
    path = folder / f"{side}{suffix}"
    return path if path.is_file() else None


def read_side(folder: Path, side: str, columns: Sequence[str]) -> Iterator[dict[str, Any]]:
    """Yields the rows of a folder's `train` or `test`, .parquet or .jsonl, with these columns only.

    Raises: SourceError for a missing or broken file, or a missing column; at the first row.
    """
    paths = [path for suffix in TABLE_SUFFIXES if (path := _table_file(folder, side, suffix))]
    if not paths:
        raise SourceError(f"{folder} has no {side}.parquet or {side}.jsonl: name such a folder")
    path = paths[0]

    def choose(names: Sequence[str]) -> list[str]:
        for column in columns:
            if column not in names:
                choices = ", ".join(names)
                raise SourceError(f"{path} has no column {column!r}: choose one of {choices}")
        return list(dict.fromkeys(columns))

    if path.suffix == ".parquet":
        yield from stream_rows(path, choose, SourceError, "fix the file")
    else:
        yield from _json_rows(path, choose)


def _json_rows(path: Path, choose: Callable[[Sequence[str]], list[str]]) -> Iterator[dict]:
    import pyarrow as pa
    import pyarrow.json

    try:
        table = pyarrow.json.read_json(path)
        table.validate(full=True)
    except (pa.ArrowException, OSError, ValueError) as error:
        raise SourceError(f"{path} can't be read ({error}): fix the file") from None
    for batch in table.select(choose(table.column_names)).to_batches(max_chunksize=1024):
        yield from batch.to_pylist()
