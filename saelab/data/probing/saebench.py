"""The eight entries of SAEBench's sparse probing, from the hub or from tables of one's own.

    entry = data set, columns, classes; texts per class: train_size and test_size

Source: SAEBench 0.6.0 (https://github.com/adamkarvonen/SAEBench), whose names and columns these
are. Its definition 1 of the draw is repeated here number by number:

    bias_in_bios, amazon      each class half from each value of a second column
                              (gender, rating): RandomState(42).choice of each half
    amazon sentiment, ag_news RandomState(42).choice of each class
    europarl, github-code     one split, taken in its order until there are enough; Random(42)
                              shuffles class after class; the first ones train, the next ones test

Definition 2 draws from the named stream 'probing' instead, and a text that is on both sides, in two
classes or twice is left out. Where a source has train and test of its own, both are kept apart.

A class that is short by at most `SHORT` gives all it has, which the entry's `source` states; one
that lacks more makes the entry missing, with the reason, and never smaller in silence.
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
from saelab.data.probing.embedded import (
    SAMPLING_SEED,
    Entry,
    drop_shared,
    read_side,
    sample,
    sides_of,
)
from saelab.data.text.corpus import TextConfig, dataset_rows
from saelab.errors import SettingError, SourceError, UnreachableError, nearest

Definition = Literal[1, 2]
#: A class may fall short of the texts that are asked for by this share. Our choice: it moves the
#: standard error of an accuracy by 1%.
SHORT = 0.02
#: A path that begins so is a place on this machine and no name of a data set.
PLACES = ("/", ".", "~")
UNREACHABLE = "the hub can't be reached: name a local folder for it in evaluation.probing.sources"


class SourceConfig(Frozen):
    """Where the texts of one entry come from, if not from SAEBench's own data set.

    Args:
        path: a local folder with train and test (or train alone) as .parquet or .jsonl; or the name
            of a data set for `datasets`. None for SAEBench's.
        text_column, label_column, balance_column: where they differ from SAEBench's.
        classes: of the label column, where they differ from SAEBench's.
        train_size, test_size: texts per class, where they differ from those of the other entries.
    """

    path: str | None = None
    text_column: str | None = None
    label_column: str | None = None
    balance_column: str | None = None
    classes: tuple[str, ...] | None = None
    train_size: PositiveInt | None = None
    test_size: PositiveInt | None = None


@dataclass(frozen=True)
class Recipe:
    """One entry as SAEBench has it.

    Args:
        name: SAEBench's name of the entry.
        hub: the data set.
        classes: values of the label column that are probed, in SAEBench's order.
        text, label: columns; the label 'translation' holds a mapping of class to text.
        balance: a second column by whose values every class is halved.
        pairs: class -> configuration of the data set that it is read from.
        one_split: the data set has a train split alone.
        longer_than: texts must have more characters.
        skipped: characters that are cut off in front.
        ending: texts are the same where so many last characters agree; 0 for all of them.
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

RECIPES = (
    *(
        Recipe(f"{_BIOS}_class_set{i}", _BIOS, some, "hard_text", "profession", "gender")
        for i, some in enumerate(_PROFESSIONS, start=1)
    ),
    Recipe(_AMAZON, _AMAZON, ("1", "2", "3", "5", "6"), label="category", balance="rating"),
    Recipe(f"{_AMAZON}_sentiment", _AMAZON, ("1.0", "5.0"), label="rating"),
    Recipe(
        "codeparrot/github-code", "codeparrot/github-code", ("C", "Python", "HTML", "Java", "PHP"),
        text="code", label="language", one_split=True, longer_than=534, skipped=150,
    ),
    # Some copies hold a story once with its title and once without: the same ending tells.
    Recipe("fancyzhx/ag_news", "fancyzhx/ag_news", ("0", "1", "2", "3"), ending=80),
    Recipe(
        "Helsinki-NLP/europarl", "Helsinki-NLP/europarl", tuple(_PAIRS),
        label="translation", pairs=_PAIRS, one_split=True,
    ),
)  # fmt: skip
NAMES = tuple(recipe.name for recipe in RECIPES)


def saebench_entries(
    sources: Mapping[str, SourceConfig],
    train_size: int = 2000,
    test_size: int = 500,
    definition: Definition = 2,
) -> tuple[tuple[Entry, ...], dict[str, str]]:
    """All entries that can be had.

    Args:
        sources: name of an entry -> where it lies; the others are read from the hub.
        train_size, test_size: texts per class.
        definition: of the draw.

    Returns: the entries in SAEBench's order, and of the others name -> why they are missing.
    Raises: SettingError for a source of an entry that SAEBench does not have.
    """
    for name in sources:
        if name not in NAMES:
            remedy = f"no such entry{nearest(name, NAMES)}: SAEBench has {', '.join(NAMES)}"
            raise SettingError("evaluation.probing.sources", name, remedy)
    entries: list[Entry] = []
    why: dict[str, str] = {}
    unreachable = False
    for recipe in RECIPES:
        source = sources.get(recipe.name, SourceConfig())
        local = _is_local(source.path or recipe.hub) or (source.path or "").startswith(PLACES)
        if unreachable and not local:
            why[recipe.name] = UNREACHABLE
            continue
        try:
            entries.append(load_entry(recipe, source, train_size, test_size, definition))
        except UnreachableError:
            unreachable, why[recipe.name] = True, UNREACHABLE
        except SourceError as error:
            why[recipe.name] = str(error)
    return tuple(entries), why


def why_missing(why: Mapping[str, str]) -> str:
    """One sentence for each reason, with the entries that it holds for."""
    by_reason: dict[str, list[str]] = {}
    for name, reason in why.items():
        by_reason.setdefault(reason, []).append(name)
    return "; ".join(f"without {', '.join(names)}: {why}" for why, names in by_reason.items())


def load_entry(
    recipe: Recipe, source: SourceConfig, train_size: int, test_size: int, definition: Definition
) -> Entry:
    """One entry by a definition's draw; raises SourceError when it can't be had."""
    classes = source.classes or recipe.classes
    sizes = source.train_size or train_size, source.test_size or test_size
    pools = _Pools(recipe, source, classes, sum(sizes))
    drawn, notes = (_as_saebench if definition == 1 else _by_streams)(pools, sizes)
    for side, groups in zip(SIDES, drawn, strict=True):
        for name, texts in groups.items():
            if any(not text.strip() for text in texts):
                raise SourceError(f"class {name!r} has an empty {side} text: leave it out")
    where = Path(source.path or recipe.hub).name
    told = f"{where}: {pools.columns[0]} by {pools.columns[1]}" + "".join(f"; {n}" for n in notes)
    return Entry(recipe.name, classes, *drawn, source=told)


SIDES = ("train", "test")
Texts = dict[str, tuple[str, ...]]
#: Value of the second column ('' without one) -> texts in their order.
Groups = dict[str, list[str]]


class _Pools:
    """All texts that can be drawn: `sides` holds class -> groups for train and for test, or one
    mapping where nothing is split yet. `columns` are those of text, label and balance."""

    def __init__(
        self, recipe: Recipe, source: SourceConfig, classes: tuple[str, ...], total: int
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
        """The rows of each side."""
        path, translated = source.path or self.recipe.hub, self.columns[1] == "translation"
        wanted = ("translation",) if translated else tuple(c for c in self.columns if c)
        if _is_local(path):
            folder = Path(path).expanduser()
            return [read_side(folder, side, wanted) for side in sides_of(folder)]
        if path.startswith(PLACES):
            raise SourceError(f"{path} is no folder: name an existing one, or a data set")
        if translated:
            return [self._pairs(path)]
        sides = ("train",) if self.recipe.one_split else ("train", "test")
        return [dataset_rows(_hub(path, split=side), wanted) for side in sides]

    def _pairs(self, path: str) -> Iterator[dict[str, Any]]:
        """Each class from its own configuration, as far as it is needed."""
        for name in self.classes:
            rows = dataset_rows(_hub(path, self.recipe.pairs.get(name)), ("translation",))
            for _, row in zip(range(self.enough), rows, strict=False):
                yield {"translation": {name: row["translation"][name]}}

    def _pool(self, rows: Iterable[dict[str, Any]]) -> dict[str, Groups]:
        found: dict[str, Groups] = {name: {} for name in self.classes}
        counts = dict.fromkeys(self.classes, 0)
        for row in rows:
            for label, group, text in self._labelled(row):
                if label in found and len(text) > self.recipe.longer_than:
                    text = text[self.recipe.skipped :]
                    found[label].setdefault(group, []).append(text)
                    counts[label] += 1
            if self.recipe.one_split and min(counts.values()) >= self.enough:
                break
        return found

    def _labelled(self, row: dict[str, Any]) -> Iterator[tuple[str, str, str]]:
        text, label, balance = self.columns
        if label == "translation":
            yield from ((name, "", found or "") for name, found in row[label].items())
        elif row[text] is not None and row[label] is not None:
            yield str(row[label]), str(row[balance]) if balance else "", str(row[text])


def _is_local(path: str) -> bool:
    return Path(path).expanduser().is_dir()


def _hub(path: str, name: str | None = None, split: str = "train") -> TextConfig:
    return TextConfig(kind="dataset", path=path, name=name, split=split)


# ---------------------------------------------------------------- the two draws


def _as_saebench(pools: _Pools, sizes: tuple[int, int]) -> tuple[tuple[Texts, Texts], list[str]]:
    notes: list[str] = []
    if pools.recipe.one_split:
        return _shuffled(pools, sizes, notes), notes
    _check_split(pools)
    drawn: list[Texts] = []
    for side, pool, size in zip(SIDES, pools.sides, sizes, strict=True):
        groups = {name: _halves(name, side, pool[name], size, notes) for name in pools.classes}
        drawn.append(
            {name: tuple(t for some in own for t in _chosen(*some)) for name, own in groups.items()}
        )
    return (drawn[0], drawn[1]), notes


def _shuffled(pools: _Pools, sizes: tuple[int, int], notes: list[str]) -> tuple[Texts, Texts]:
    """Class after class from one generator; sides that are there already are kept apart."""
    order = random.Random(SAMPLING_SEED)
    drawn: tuple[Texts, Texts] = ({}, {})
    for name in pools.classes:
        sides = [list(pool[name].get("", ())) for pool in pools.sides]
        sides = [some[: pools.enough] for some in sides] if pools.recipe.pairs else sides
        for some in sides:
            order.shuffle(some)
        sides = _split(sides[0], sizes) if len(sides) == 1 else sides
        for side, texts, size, into in zip(SIDES, sides, sizes, drawn, strict=True):
            into[name] = tuple(texts[: _size(name, side, len(texts), size, notes)])
    return drawn


def _split(texts: Sequence[str], sizes: tuple[int, int]) -> list[list[str]]:
    """Train, then test; what is short is short in train."""
    cut = max(0, min(sizes[0], len(texts) - sizes[1]))
    return [list(texts[:cut]), list(texts[cut : cut + sizes[1]])]


def _chosen(texts: list[str], size: int) -> tuple[str, ...]:
    """What pandas' `sample(n=size, random_state=42)` takes."""
    state = np.random.RandomState(SAMPLING_SEED)  # SAEBench's own draw
    return tuple(texts[i] for i in state.choice(len(texts), size, replace=False))


def _by_streams(pools: _Pools, sizes: tuple[int, int]) -> tuple[tuple[Texts, Texts], list[str]]:
    notes: list[str] = []
    name = pools.recipe.name
    sides = _unshared(pools)
    if len(sides) == 1:
        split = {
            label: _split(sample(own.get("", []), sum(sizes), SAMPLING_SEED, name, label), sizes)
            for label, own in sides[0].items()
        }
        sides = [{label: {"": texts[side]} for label, texts in split.items()} for side in (0, 1)]
    drawn: tuple[Texts, Texts] = ({}, {})
    for side, pool, size, into in zip(SIDES, sides, sizes, drawn, strict=True):
        for label in pools.classes:
            into[label] = tuple(
                text
                for i, (texts, n) in enumerate(_halves(label, side, pool[label], size, notes))
                for text in sample(texts, n, SAMPLING_SEED, name, label, side, i)
            )
    return drawn, notes


def _unshared(pools: _Pools) -> list[dict[str, Groups]]:
    """The sides without empty texts, repetitions and texts that two classes or sides share."""
    ending = pools.recipe.ending
    groups: dict[tuple[int, str, str], dict[str, Any]] = {
        (side, label, group): {_key(text, ending): text for text in texts if text.strip()}
        for side, pool in enumerate(pools.sides)
        for label, own in pool.items()
        for group, texts in own.items()
    }
    drop_shared(groups)
    return [
        {
            label: {group: list(groups[side, label, group].values()) for group in own}
            for label, own in pool.items()
        }
        for side, pool in enumerate(pools.sides)
    ]


def _key(text: str, ending: int) -> str:
    return " ".join(text.split())[-ending:] if ending else text


def _halves(
    label: str, side: str, groups: Groups, size: int, notes: list[str]
) -> list[tuple[list[str], int]]:
    """The groups of a class in order, each with the number of texts to take."""
    if not groups:
        raise SourceError(f"class {label!r} has no {side} texts: name its classes in `classes`")
    own = [groups[name] for name in sorted(groups)]
    return [(t, _size(label, side, len(t), size // len(own), notes)) for t in own]


def _size(label: str, side: str, have: int, want: int, notes: list[str]) -> int:
    if have < (1 - SHORT) * want:
        raise SourceError(
            f"class {label!r} has {have} {side} texts where {want} are asked for: lower train_size "
            "or test_size for this entry, or name a larger source"
        )
    if have < want:
        notes.append(f"{label} {side} {have} of {want}")
    return min(have, want)


def _check_split(pools: _Pools) -> None:
    if len(pools.sides) != 2:
        raise SourceError("the source has no test side: add test.parquet or test.jsonl")
