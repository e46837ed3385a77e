"""Activations of the labelled probing texts: harvested once, stored, and read by evaluations."""

from __future__ import annotations

import functools
import hashlib
import sys
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from saelab.config import digest
from saelab.data.activations.parallel_passes import group_by_length, run_in_lanes
from saelab.data.activations.store import check_identity
from saelab.data.hook_names import describe_hooks
from saelab.data.language_model import LanguageModel
from saelab.data.probing.embedded import Entry, entries_digest
from saelab.data.text.tokens import tokenize_texts
from saelab.errors import DamageError, MismatchError, SourceError
from saelab.progress import progress
from saelab.storage.atomic import read_sealed, sha256, write_atomically, write_sealed
from saelab.storage.safetensors_file import read_shapes, read_weights
from saelab.storage.validation import Loose, validate

#: Version of the folder with the model's activations.
FORMAT = 1
#: Positions in one pass of the language model, padding included.
PASS_TOKENS = 2048
_TENSORS = ("rows", "offsets", "labels", "is_train")


@dataclass(frozen=True, kw_only=True)
class ProbingEntry:
    """Activations of the language model on the texts of one entry.

    Args:
        name, classes: as in `Entry`.
        rows: [tokens, d], the counted positions of all texts, one text after the other.
        offsets: int64 [texts + 1]; text i has the rows offsets[i] to offsets[i + 1].
        labels: int64 [texts], index into `classes`.
        is_train: bool [texts].
    """

    name: str
    classes: tuple[str, ...]
    rows: Tensor
    offsets: Tensor
    labels: Tensor
    is_train: Tensor


@dataclass(frozen=True)
class ProbingData:
    """All entries, and a header with everything that they depend on."""

    entries: tuple[ProbingEntry, ...]
    header: dict[str, Any]

    @functools.cached_property
    def digest(self) -> str:
        """16-character content hash of header and tensors."""
        return digest([self.header, [_entry_digests(entry) for entry in self.entries]])

    def save(self, folder: Path) -> None:
        """Writes probing.safetensors, then probing.json with its checksum."""
        tensors = {
            f"{entry.name}.{name}": tensor.contiguous()
            for entry in self.entries
            for name, tensor in _tensors(entry).items()
        }
        file = folder / "probing.safetensors"
        write_atomically(file, lambda temporary: save_file(tensors, temporary))
        entries = [{"name": e.name, "classes": list(e.classes)} for e in self.entries]
        record = {"format": FORMAT, "sha256": sha256(file), "header": self.header}
        write_sealed(folder / "probing.json", {**record, "entries": entries})

    @staticmethod
    def _read_record(folder: Path, remedy: str) -> dict[str, Any]:
        """Reads probing.json.

        Raises: DamageError when one of the two files was changed after it was written.
        """
        file = folder / "probing.json"
        record = validate(read_sealed(file, remedy), _Record, file, remedy)
        tensors = folder / "probing.safetensors"
        if not tensors.is_file() or sha256(tensors) != record["sha256"]:
            raise DamageError(f"{tensors} does not match its checksum: {remedy}")
        return record

    @classmethod
    def read_header(cls, folder: Path) -> dict[str, Any]:
        """Reads the header that `save` wrote."""
        return cls._read_record(folder, f"delete {folder} and run again")["header"]

    @staticmethod
    def count_tokens(folder: Path) -> int:
        """Counts the rows of all texts in the file that `save` wrote."""
        file, remedy = folder / "probing.safetensors", f"delete {folder} and run again"
        shapes = read_shapes(file, DamageError, remedy)
        return sum(shape[0] for name, shape in shapes.items() if name.endswith(".rows"))

    @classmethod
    def is_saved(cls, folder: Path, expected: Mapping[str, Any] | None = None) -> bool:
        """Returns whether `load` can read a folder with these header fields; damage, or a folder of
        another identity, is reported on stderr."""
        if not (folder / "probing.json").is_file():
            return False
        try:
            record = cls._read_record(folder, "it is made again now")
            check_identity(record["header"], expected or {}, str(folder), "it is made again now")
        except (DamageError, MismatchError) as error:
            print(error, file=sys.stderr)
            return False
        return True

    @classmethod
    def load(cls, folder: Path, expected: Mapping[str, Any] | None = None) -> ProbingData:
        """Reads the files that `save` wrote.

        Args:
            folder: folder of the two files.
            expected: header fields that must agree, such as hook_name.

        Raises: MismatchError when they do not; DamageError when a file was changed after it was
            written.
        """
        remedy, file = f"delete {folder} and run again", folder / "probing.safetensors"
        record = cls._read_record(folder, remedy)
        stored = {**record["header"], "format": record["format"]}
        check_identity(stored, {"format": FORMAT, **(expected or {})}, str(folder))
        tensors = read_weights(file, DamageError, remedy)
        names = [_tensor_names(entry) for entry in record["entries"]]
        if absent := [name for group in names for name in group if name not in tensors]:
            raise DamageError(f"{file} lacks {absent[0]!r}: {remedy}")
        entries = tuple(
            ProbingEntry(
                name=e["name"],
                classes=tuple(e["classes"]),
                **dict(zip(_TENSORS, (tensors[name] for name in group), strict=True)),
            )
            for e, group in zip(record["entries"], names, strict=True)
        )
        return cls(entries, record["header"])


def _tensor_names(entry: Mapping[str, Any]) -> list[str]:
    """Returns the names of an entry's tensors in the file."""
    return [f"{entry['name']}.{name}" for name in _TENSORS]


class _Entry(Loose):
    name: str
    classes: list[str]


class _Record(Loose):
    """Content of probing.json."""

    format: int
    sha256: str
    header: dict[str, Any]
    entries: list[_Entry]


def _tensors(entry: ProbingEntry) -> dict[str, Tensor]:
    return {name: getattr(entry, name) for name in _TENSORS}


def _entry_digests(entry: ProbingEntry) -> list[Any]:
    hashes = [
        hashlib.sha256(tensor.contiguous().view(torch.uint8).numpy().data).hexdigest()
        for tensor in _tensors(entry).values()
    ]
    return [entry.name, entry.classes, *hashes]


def identity(
    model: LanguageModel,
    hooks: str | Sequence[str],
    entries: Sequence[Entry],
    context: int,
    dtype: torch.dtype,
    unknown: bool = False,
) -> dict[str, Any]:
    """Returns the header of the activations of `harvest_probing`: everything they depend on."""
    names = (hooks,) if isinstance(hooks, str) else hooks
    several = {"hook_modules": [model.hook_identity(name) for name in names]}
    mask = {"mask": "BOS, EOS and PAD alone left out"} if unknown else {}
    return mask | {
        "model": model.config.path,
        "model_digest": model.digest,
        "model_dtype": model.config.dtype,
        "hook_name": describe_hooks(names),
        **(model.hook_identity(names[0]) if len(names) == 1 else several),
        "context": context,
        "entries": entries_digest(tuple(entries)),
        "dtype": str(dtype).removeprefix("torch."),
    }


def harvest_probing(
    model: LanguageModel,
    hooks: str | Sequence[str],
    entries: Sequence[Entry],
    context: int = 64,
    dtype: torch.dtype = torch.float16,
    unknown: bool = False,
) -> ProbingData:
    """Harvests the activations of all texts in one pass of the language model, for all subjects.

    Args:
        model: the language model.
        hooks: its hook point; the activations of several stand side by side.
        entries: the labelled texts.
        context: positions of a text, BOS included; longer texts are cut.
        dtype: dtype of the stored rows.
        unknown: whether special ids besides BOS, EOS and PAD (UNK) count, as in definition 1.

    Raises: SourceError when an activation is not finite in `dtype`, or a text has no counted token.
    """
    texts = [_TokenisedTexts(entry, model, context, unknown) for entry in entries]
    names = (hooks,) if isinstance(hooks, str) else tuple(hooks)
    rows = _harvest_rows(model, names, texts, dtype)
    for entry, x in zip(entries, rows, strict=True):
        if not x.isfinite().all():
            raise SourceError(
                f"{describe_hooks(names)} has activations beyond {dtype} on entry {entry.name}: "
                "set evaluation.probing.definition = 1, which stores float32, or name another hook"
            )
    results = [
        ProbingEntry(
            name=entry.name,
            classes=entry.classes,
            rows=x,
            offsets=part.offsets,
            labels=part.labels,
            is_train=part.is_train,
        )
        for entry, part, x in zip(entries, texts, rows, strict=True)
    ]
    header = identity(model, names, entries, context, dtype, unknown)
    return ProbingData(tuple(results), header)


def _labelled_texts(entry: Entry) -> tuple[list[str], list[int], list[bool]]:
    """Returns all texts, their labels and sides: train class by class, then test."""
    rows = [
        (text, label, side is entry.train)
        for side in (entry.train, entry.test)
        for label, name in enumerate(entry.classes)
        for text in side[name]
    ]
    texts, labels, is_train = zip(*rows, strict=True)
    return list(texts), list(labels), list(is_train)


class _TokenisedTexts:
    """Tokens of the texts of one entry; `offsets`, `labels`, `is_train` as in `ProbingEntry`.

    Raises: SourceError when a text has no counted token.
    """

    def __init__(self, entry: Entry, model: LanguageModel, context: int, unknown: bool) -> None:
        texts, labels, is_train = _labelled_texts(entry)
        self.labels = torch.tensor(labels, dtype=torch.int64)
        self.is_train = torch.tensor(is_train, dtype=torch.bool)
        self.ids, self.attention, self.mask = tokenize_texts(
            texts, model.tokenizer, context, unknown
        )
        if not self.mask.any(1).all():
            i = int(self.mask.any(1).long().argmin())
            where = f"{'train' if is_train[i] else 'test'} text of {entry.classes[labels[i]]!r}"
            raise SourceError(
                f"entry {entry.name}: a {where} has no token that counts ({texts[i][:40]!r}): "
                "leave it out, or name a model that knows its characters"
            )
        self.offsets = torch.zeros(len(texts) + 1, dtype=torch.int64)
        self.offsets[1:] = self.mask.sum(1).cumsum(0)
        self.places = self.offsets[:-1, None] + self.mask.cumsum(1) - 1  # row of each position


def _harvest_rows(
    model: LanguageModel,
    hooks: Sequence[str],
    parts: Sequence[_TokenisedTexts],
    dtype: torch.dtype,
) -> list[Tensor]:
    """Returns the rows of each part; all parts share the passes, which leaves little padding."""
    ids = torch.cat([part.ids for part in parts])
    attention, mask, places = (
        torch.cat([getattr(part, name) for part in parts])
        for name in ("attention", "mask", "places")
    )
    sizes = torch.tensor([len(p.ids) for p in parts], dtype=torch.int64)
    owner = torch.arange(len(parts)).repeat_interleave(sizes)
    lengths = attention.sum(1)
    d = sum(x.shape[-1] for x in model.activations(ids[:1, :2], None, hooks).values())
    rows = [torch.empty(int(part.offsets[-1]), d, dtype=dtype) for part in parts]

    def fill(model: LanguageModel, texts: Tensor) -> int:
        longest = int(lengths[texts].max())
        padded = attention[texts, :longest]
        inputs = ids[texts, :longest], None if padded.all() else padded
        captured = model.activations(*inputs, hooks)
        x = torch.cat([captured[hook].cpu().to(dtype) for hook in hooks], dim=-1)
        for part in owner[texts].unique().tolist():
            counted = mask[texts, :longest] & (owner[texts] == part)[:, None]
            rows[part][places[texts, :longest][counted]] = x[counted]
        return len(texts)

    groups = group_by_length(lengths, PASS_TOKENS)
    with (
        progress("probing texts", len(ids), "texts") as bar,
        closing(run_in_lanes(model, fill, groups)) as counts,
    ):
        for texts in counts:
            bar.advance(texts)
    return rows
