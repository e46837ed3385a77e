"""Texts of the package sae-probes, split so that no text is on two sides.

The package holds 113 data sets of binary classification. Those whose texts have 100 characters and
more on average are training or held-out text; the others are short, and left to probing. Many of
the data sets share texts, so a text counts by all data sets that hold it:

    train       only in data sets of training text
    held_out    only in those of `HELD_OUT`
    neither     in data sets of both, or in a short one

Texts are compared by a hash of their words. The files are located by the package's record; none of
its code runs.
"""

from __future__ import annotations

import functools
import hashlib
import re
from collections.abc import Iterable, Iterator
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import Any

from saelab.data.text.characters import whole_characters
from saelab.errors import SettingError, SourceError, nearest
from saelab.storage.atomic import sha256

PACKAGE, VERSION = "sae-probes", "0.4.2"
SPLITS = ("train", "held_out")
#: Average characters of a text from which a data set is text to train on or to hold out.
LONG = 100
#: Data sets of held-out text: essays of people and models, medical abstracts, reviews. Our choice;
#: data sets that share many texts are on one side.
HELD_OUT = frozenset(
    {
        *("94_ai_gen", "110_aimade_humangpt3", "157_amazon_5star"),
        "145_disease_class_digestive system diseases",
        "146_disease_class_cardiovascular diseases",
        "147_disease_class_nervous system diseases",
    }
)
_MASTER, _DATA = "probing_datasets_MASTER.csv.zst", re.compile(r"cleaned_data/(.+)\.csv(\.zst)?")
_BINARY = "Binary Classification"


def texts(split: str) -> Iterator[str]:
    """Yields the texts of a split, each once, in the order of their hashes.

    That mixes the data sets: so many tokens of a split are as varied as the whole of it.

    Raises: SettingError for another split; SourceError when the package is missing or damaged.
    """
    if split not in SPLITS:
        hint = nearest(split, SPLITS)
        raise SettingError("text.split", split, f"sae_probes has {', '.join(SPLITS)}{hint}")
    files = data_sets()
    long = _long_sets(tuple(files.items()))
    side = [name for name in files if name in long and (name in HELD_OUT) == (split == "held_out")]
    seen = {text_hash(text) for name in files.keys() - set(side) for text in _prompts(files[name])}
    found: dict[bytes, str] = {}
    for name in side:
        for text in _prompts(files[name]):
            found.setdefault(text_hash(text), text)
    yield from (found[key] for key in sorted(found.keys() - seen))


def manifest(split: str) -> dict[str, Any]:
    """Returns the identity of a split: package, rule of the split, and a hash of every file."""
    files = {name: sha256(file) for name, file in data_sets().items()}
    rule = {"held_out": sorted(HELD_OUT), "long": LONG, "order": "hash"}
    return {"corpus": f"{PACKAGE} texts", "split": split, "rule": rule, "files": files}


def text_hash(text: str) -> bytes:
    """Returns a hash of the words of a text, whatever is between them."""
    return hashlib.blake2b(" ".join(text.split()).encode(), digest_size=12).digest()


def count_shared(first: Iterable[str], second: Iterable[str]) -> int:
    """Returns how many texts of the second are among the first."""
    hashes = {text_hash(text) for text in first}
    return sum(text_hash(text) in hashes for text in second)


def data_sets() -> dict[str, Path]:
    """Returns name -> file of the package's data sets of binary classification.

    Raises: SourceError when the package is not installed, or lacks one of them.
    """
    files = _package_files()
    if _MASTER not in files:
        raise SourceError(f"package {PACKAGE} lacks {_MASTER}: install {PACKAGE}=={VERSION}")
    columns = _columns(files[_MASTER], ("Dataset save name", "Data type"))
    names = [
        match[1]
        for place, kind in zip(*columns, strict=True)
        if kind == _BINARY and (match := _DATA.fullmatch(place))
    ]
    missing = [name for name in names if f"{name}.csv.zst" not in files]
    if missing or not names:
        absent = missing[0] if missing else "data sets"
        raise SourceError(f"package {PACKAGE} lacks {absent}: install {PACKAGE}=={VERSION}")
    return {name: files[f"{name}.csv.zst"] for name in names}


def _package_files() -> dict[str, Path]:
    try:
        record = distribution(PACKAGE)
    except PackageNotFoundError:
        raise SourceError(
            f"texts of kind 'sae_probes' need the package {PACKAGE}: pip install --no-deps "
            f"{PACKAGE}=={VERSION} brings it (45 MB, only its tables are read)"
        ) from None
    root = Path(str(record.locate_file(""))).resolve()
    paths = [Path(str(record.locate_file(entry))) for entry in record.files or ()]
    inside = (path for path in paths if path.resolve().is_relative_to(root))
    return {path.name: path for path in inside if path.name.endswith(".csv.zst")}


@functools.cache
def _long_sets(files: tuple[tuple[str, Path], ...]) -> frozenset[str]:
    """Returns the names of the data sets whose texts are long on average."""
    long = set()
    for name, file in files:
        lengths = [len(text) for text in _prompts(file)]
        if lengths and sum(lengths) >= LONG * len(lengths):
            long.add(name)
    return frozenset(long)


def _prompts(file: Path) -> list[str]:
    return [whole_characters(text) for text in _columns(file, ("prompt",))[0] if text.strip()]


def _columns(file: Path, names: tuple[str, ...]) -> list[list[str]]:
    """Returns columns of a compressed table as texts.

    Raises: SourceError when it is damaged or lacks a column.
    """
    import pyarrow as pa
    from pyarrow import csv

    try:
        with pa.input_stream(str(file), compression="zstd") as stream:
            table = csv.read_csv(
                stream,
                read_options=csv.ReadOptions(block_size=2**28),
                parse_options=csv.ParseOptions(newlines_in_values=True),
                convert_options=csv.ConvertOptions(
                    include_columns=list(names), column_types=dict.fromkeys(names, pa.string())
                ),
            )
    except (pa.ArrowException, OSError, KeyError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise SourceError(
            f"{file.name} of package {PACKAGE} can't be read ({reason}): install it again"
        ) from None
    return [[text or "" for text in table.column(name).to_pylist()] for name in names]
