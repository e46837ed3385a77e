"""The eight entries of SAEBench's sparse probing, from the hub or from local tables.

    entry = data set, columns, classes; texts per class: train_size and test_size

Source of the names and columns: SAEBench 0.6.0 (https://github.com/adamkarvonen/SAEBench).
Definition 1 of the draw repeats SAEBench's number by number:

    bias_in_bios, amazon      each class half from each value of a second column
                              (gender, rating): RandomState(42).choice of each half
    amazon sentiment, ag_news RandomState(42).choice of each class
    europarl, github-code     one split, taken in its order until there are enough; Random(42)
                              shuffles class after class; the first ones train, the next ones test

Definition 2 draws from the named stream 'probing' instead, and leaves out a text that is on both
sides, in two classes or repeated. Train and test of a source that has both are never mixed.

A class that is short by at most `SHORT` gives all its texts, which the entry's `source` states; a
class that lacks more makes the entry missing, with the reason, and never smaller in silence.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
from pydantic import PositiveInt

from saelab.config import Frozen
from saelab.data.probing.embedded import SAMPLING_SEED, Entry, drop_shared, sample
from saelab.data.probing.tables import find_sides, read_side
from saelab.data.text.corpus import TextConfig, dataset_rows
from saelab.errors import SettingError, SourceError, UnreachableError, nearest

Definition = Literal[1, 2]
#: Share of the requested texts by which a class may be short. Our choice: it changes the standard
#: error of an accuracy by 1%.
SHORT = 0.02
#: Beginnings of a path on this machine, in contrast to the name of a data set.
LOCAL_PREFIXES = ("/", ".", "~")
UNREACHABLE = "the hub can't be reached: name a local folder for it in evaluation.probing.sources"


class SourceConfig(Frozen):
    """Source of the texts of one entry, if it is not SAEBench's own data set.

    Args:
        path: a local folder with train and test (or only train) as .parquet or .jsonl; or the name
            of a data set for `datasets`. None for SAEBench's.
        text_column, label_column, balance_column: columns, if they differ from SAEBench's.
        classes: values of the label column, if they differ from SAEBench's.
        train_size, test_size: texts per class, if they differ from those of the other entries.
    """

    path: str | None = None
    text_column: str | None = None
    label_column: str | None = None
    balance_column: str | None = None
    classes: tuple[str, ...] | None = None
    train_size: PositiveInt | None = None
    test_size: PositiveInt | None = None


@dataclass(frozen=True, kw_only=True)
class SaebenchRecipe:
    """Definition of an entry in SAEBench.

    Args:
        name: SAEBench's name of the entry.
        hub: name of the data set.
        classes: values of the label column that are probed, in SAEBench's order.
        text, label: columns; the label 'translation' holds a mapping of class to text.
        balance: a second column; each of its values gives half of every class.
        pairs: class -> configuration of the data set from which it is read.
        one_split: the data set has only a train split.
        longer_than: texts must have more characters than this.
        skipped: number of first characters that are cut off.
        ending: two texts are the same if this many last characters agree; 0 compares all.
    """

    name: str
    hub: str
    classes: tuple[str, ...]
    text: str = "text"
    label: str = "label"
    balance: str = ""
    pairs: Mapping[str, str] = field(default_factory=dict)
    one_split: bool = False
    longer_than: int = 0
    skipped: int = 0
    ending: int = 0


_BIOS, _AMAZON = "LabHC/bias_in_bios", "canrager/amazon_reviews_mcauley_1and5"
_PAIRS = {"en": "en-fr", "fr": "fr-it", "de": "de-en", "es": "es-fr", "nl": "nl-pt"}
_PROFESSIONS = (("0", "1", "2", "6", "9"), ("11", "13", "14", "18", "19"))
_PROFESSIONS += (("20", "21", "22", "25", "26"),)

SAEBENCH_RECIPES = (
    *(
        SaebenchRecipe(
            name=f"{_BIOS}_class_set{i}",
            hub=_BIOS,
            classes=classes,
            text="hard_text",
            label="profession",
            balance="gender",
        )
        for i, classes in enumerate(_PROFESSIONS, start=1)
    ),
    SaebenchRecipe(
        name=_AMAZON,
        hub=_AMAZON,
        classes=("1", "2", "3", "5", "6"),
        label="category",
        balance="rating",
    ),
    SaebenchRecipe(
        name=f"{_AMAZON}_sentiment", hub=_AMAZON, classes=("1.0", "5.0"), label="rating"
    ),
    SaebenchRecipe(
        name="codeparrot/github-code",
        hub="codeparrot/github-code",
        classes=("C", "Python", "HTML", "Java", "PHP"),
        text="code",
        label="language",
        one_split=True,
        longer_than=534,
        skipped=150,
    ),
    # Some copies hold a story once with its title and once without: both have the same ending.
    SaebenchRecipe(
        name="fancyzhx/ag_news", hub="fancyzhx/ag_news", classes=("0", "1", "2", "3"), ending=80
    ),
    SaebenchRecipe(
        name="Helsinki-NLP/europarl",
        hub="Helsinki-NLP/europarl",
        classes=tuple(_PAIRS),
        label="translation",
        pairs=_PAIRS,
        one_split=True,
    ),
)
ENTRY_NAMES = tuple(recipe.name for recipe in SAEBENCH_RECIPES)


def saebench_entries(
    sources: Mapping[str, SourceConfig],
    train_size: int = 2000,
    test_size: int = 500,
    definition: Definition = 2,
) -> tuple[tuple[Entry, ...], dict[str, str]]:
    """Returns all entries that are available.

    Args:
        sources: name of an entry -> its source; the others are read from the hub.
        train_size, test_size: texts per class.
        definition: definition of the draw.

    Returns: the entries in SAEBench's order, and name -> reason of the missing ones.
    Raises: SettingError for a source of an entry that SAEBench does not have.
    """
    for name in sources:
        if name not in ENTRY_NAMES:
            hint = nearest(name, ENTRY_NAMES)
            remedy = f"no such entry{hint}: SAEBench has {', '.join(ENTRY_NAMES)}"
            raise SettingError("evaluation.probing.sources", name, remedy)
    entries: list[Entry] = []
    reasons: dict[str, str] = {}
    unreachable = False
    for recipe in SAEBENCH_RECIPES:
        source = sources.get(recipe.name, SourceConfig())
        path = source.path or ""
        local = _is_local(path or recipe.hub) or path.startswith(LOCAL_PREFIXES)
        if unreachable and not local:
            reasons[recipe.name] = UNREACHABLE
            continue
        try:
            entries.append(load_entry(recipe, source, train_size, test_size, definition))
        except UnreachableError:
            unreachable, reasons[recipe.name] = True, UNREACHABLE
        except SourceError as error:
            reasons[recipe.name] = str(error)
    return tuple(entries), reasons


def describe_missing(reasons: Mapping[str, str]) -> str:
    """Returns one sentence for each reason, with the entries that are missing for it."""
    by_reason: dict[str, list[str]] = {}
    for name, reason in reasons.items():
        by_reason.setdefault(reason, []).append(name)
    return "; ".join(f"without {', '.join(names)}: {why}" for why, names in by_reason.items())


def load_entry(
    recipe: SaebenchRecipe,
    source: SourceConfig,
    train_size: int,
    test_size: int,
    definition: Definition,
) -> Entry:
    """Draws the texts of one entry by a definition.

    Raises: SourceError when the source is not available or has too few texts.
    """
    classes = source.classes or recipe.classes
    sizes = source.train_size or train_size, source.test_size or test_size
    pools = _Pools(recipe, source, classes, sum(sizes))
    sides, notes = (_draw_like_saebench if definition == 1 else _draw_by_streams)(pools, sizes)
    for side, groups in zip(SIDES, sides, strict=True):
        for name, texts in groups.items():
            if any(not text.strip() for text in texts):
                raise SourceError(f"class {name!r} has an empty {side} text: leave it out")
    text_column, label_column, _ = pools.columns
    origin = f"{Path(source.path or recipe.hub).name}: {text_column} by {label_column}"
    return Entry(
        name=recipe.name,
        classes=classes,
        train=sides[0],
        test=sides[1],
        source="; ".join([origin, *notes]),
    )


SIDES = ("train", "test")
Texts = dict[str, tuple[str, ...]]
#: Value of the second column ('' without one) -> texts in their order.
Groups = dict[str, list[str]]


class _Pools:
    """All texts that can be drawn.

    `sides` holds class -> groups for train and for test, or one mapping if the source is not split.
    `columns` are the names of the columns of text, label and balance.
    """

    def __init__(
        self, recipe: SaebenchRecipe, source: SourceConfig, classes: tuple[str, ...], total: int
    ) -> None:
        self.recipe, self.classes = recipe, classes
        self.columns = (
            source.text_column or recipe.text,
            source.label_column or recipe.label,
            source.balance_column or recipe.balance,
        )
        self.enough = total + 1
        self.sides = [self._pool(rows) for rows in self._rows(source)]

    def _rows(self, source: SourceConfig) -> list[Iterable[dict[str, Any]]]:
        """Returns the rows of each side."""
        path, translated = source.path or self.recipe.hub, self.columns[1] == "translation"
        columns = ("translation",) if translated else tuple(c for c in self.columns if c)
        if _is_local(path):
            folder = Path(path).expanduser()
            return [read_side(folder, side, columns) for side in find_sides(folder)]
        if path.startswith(LOCAL_PREFIXES):
            raise SourceError(f"{path} is not a folder: name an existing one, or a data set")
        if translated:
            return [self._pairs(path)]
        sides = ("train",) if self.recipe.one_split else ("train", "test")
        return [dataset_rows(_hub(path, split=side), columns) for side in sides]

    def _pairs(self, path: str) -> Iterator[dict[str, Any]]:
        """Yields rows of each class from the class's configuration, as many as are needed."""
        for name in self.classes:
            rows = dataset_rows(_hub(path, self.recipe.pairs.get(name)), ("translation",))
            for _, row in zip(range(self.enough), rows, strict=False):
                yield {"translation": {name: row["translation"][name]}}

    def _pool(self, rows: Iterable[dict[str, Any]]) -> dict[str, Groups]:
        """Sorts the texts of the rows by class and balance group."""
        pool: dict[str, Groups] = {name: {} for name in self.classes}
        counts = dict.fromkeys(self.classes, 0)
        for row in rows:
            for label, group, text in self._labelled_texts(row):
                if label in pool and len(text) > self.recipe.longer_than:
                    text = text[self.recipe.skipped :]
                    pool[label].setdefault(group, []).append(text)
                    counts[label] += 1
            if self.recipe.one_split and min(counts.values()) >= self.enough:
                break
        return pool

    def _labelled_texts(self, row: dict[str, Any]) -> Iterator[tuple[str, str, str]]:
        """Yields (class, balance group, text) of a row."""
        text, label, balance = self.columns
        if label == "translation":
            yield from ((name, "", translation or "") for name, translation in row[label].items())
        elif row[text] is not None and row[label] is not None:
            yield str(row[label]), str(row[balance]) if balance else "", str(row[text])


def _is_local(path: str) -> bool:
    return Path(path).expanduser().is_dir()


def _hub(path: str, name: str | None = None, split: str = "train") -> TextConfig:
    return TextConfig(kind="dataset", path=path, name=name, split=split)


# ---------------------------------------------------------------- the two draws


def _draw_like_saebench(
    pools: _Pools, sizes: tuple[int, int]
) -> tuple[tuple[Texts, Texts], list[str]]:
    """Draws by definition 1; returns train and test, and notes on classes that are short."""
    notes: list[str] = []
    if pools.recipe.one_split:
        return _draw_shuffled(pools, sizes, notes), notes
    _check_split(pools)
    sides: list[Texts] = []
    for side, pool, size in zip(SIDES, pools.sides, sizes, strict=True):
        texts: Texts = {}
        for name in pools.classes:
            groups = _group_sizes(name, side, pool[name], size, notes)
            texts[name] = tuple(text for group in groups for text in _sample_like_pandas(*group))
        sides.append(texts)
    return (sides[0], sides[1]), notes


def _draw_shuffled(pools: _Pools, sizes: tuple[int, int], notes: list[str]) -> tuple[Texts, Texts]:
    """Draws class after class from one generator; existing train and test are never mixed."""
    order = random.Random(SAMPLING_SEED)
    result: tuple[Texts, Texts] = ({}, {})
    for name in pools.classes:
        sides = [list(pool[name].get("", ())) for pool in pools.sides]
        sides = [side[: pools.enough] for side in sides] if pools.recipe.pairs else sides
        for side in sides:
            order.shuffle(side)
        sides = _split(sides[0], sizes) if len(sides) == 1 else sides
        for side, texts, size, into in zip(SIDES, sides, sizes, result, strict=True):
            into[name] = tuple(texts[: _texts_to_take(name, side, len(texts), size, notes)])
    return result


def _split(texts: Sequence[str], sizes: tuple[int, int]) -> list[list[str]]:
    """Splits texts into train and test; if there are too few, train is short."""
    cut = max(0, min(sizes[0], len(texts) - sizes[1]))
    return [list(texts[:cut]), list(texts[cut : cut + sizes[1]])]


def _sample_like_pandas(texts: list[str], size: int) -> tuple[str, ...]:
    """Draws the texts that pandas' `sample(n=size, random_state=42)` draws."""
    state = np.random.RandomState(SAMPLING_SEED)  # the generator of SAEBench
    return tuple(texts[i] for i in state.choice(len(texts), size, replace=False))


def _draw_by_streams(
    pools: _Pools, sizes: tuple[int, int]
) -> tuple[tuple[Texts, Texts], list[str]]:
    """Draws by definition 2; returns train and test, and notes on classes that are short."""
    notes: list[str] = []
    name = pools.recipe.name
    sides = _drop_shared_texts(pools)
    if len(sides) == 1:
        split = {
            label: _split(sample(groups.get("", []), sum(sizes), SAMPLING_SEED, name, label), sizes)
            for label, groups in sides[0].items()
        }
        sides = [{label: {"": texts[side]} for label, texts in split.items()} for side in (0, 1)]
    result: tuple[Texts, Texts] = ({}, {})
    for side, pool, size, into in zip(SIDES, sides, sizes, result, strict=True):
        for label in pools.classes:
            into[label] = tuple(
                text
                for i, (texts, n) in enumerate(_group_sizes(label, side, pool[label], size, notes))
                for text in sample(texts, n, SAMPLING_SEED, name, label, side, i)
            )
    return result, notes


def _drop_shared_texts(pools: _Pools) -> list[dict[str, Groups]]:
    """Returns the sides without empty, repeated and shared texts.

    A text is shared if it occurs in two classes or on both sides.
    """
    ending = pools.recipe.ending
    unique: dict[tuple[int, str, str], dict[str, Any]] = {
        (side, label, group): {_key(text, ending): text for text in texts if text.strip()}
        for side, pool in enumerate(pools.sides)
        for label, groups in pool.items()
        for group, texts in groups.items()
    }
    drop_shared(unique)
    return [
        {
            label: {group: list(unique[side, label, group].values()) for group in groups}
            for label, groups in pool.items()
        }
        for side, pool in enumerate(pools.sides)
    ]


def _key(text: str, ending: int) -> str:
    """Returns the text by which repetitions are recognised."""
    return " ".join(text.split())[-ending:] if ending else text


def _group_sizes(
    label: str, side: str, groups: Groups, size: int, notes: list[str]
) -> list[tuple[list[str], int]]:
    """Returns the groups of a class in order, each with the number of texts to take.

    Raises: SourceError when a group has too few.
    """
    if not groups:
        raise SourceError(f"class {label!r} has no {side} texts: name its classes in `classes`")
    ordered = [groups[name] for name in sorted(groups)]
    size = size // len(ordered)
    return [(texts, _texts_to_take(label, side, len(texts), size, notes)) for texts in ordered]


def _texts_to_take(label: str, side: str, have: int, want: int, notes: list[str]) -> int:
    """Returns the smaller of both numbers and notes a small lack.

    Raises: SourceError when more than the share `SHORT` is missing.
    """
    if have < (1 - SHORT) * want:
        raise SourceError(
            f"class {label!r} has {have} {side} texts where {want} are needed: lower train_size "
            "or test_size for this entry, or name a larger source"
        )
    if have < want:
        notes.append(f"{label} {side} {have} of {want}")
    return min(have, want)


def _check_split(pools: _Pools) -> None:
    """Raises: SourceError when the source has no test side."""
    if len(pools.sides) != 2:
        raise SourceError("the source has no test side: add test.parquet or test.jsonl")
