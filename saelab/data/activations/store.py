"""Activations as shards of whole contexts, in memory or in a folder of safetensors files.

    <folder>/shard-00000.safetensors   x [contexts, positions, d], mask, ids
    <folder>/header.json               identity, counts and the sha256 of each shard; written last
                                       and sealed (`atomic.write_sealed`)

A folder without header.json is not complete; `partial.json` then lists its shards, a writer of the
same identity goes on after them, and a reader may follow the writer. The digest of a source is a
hash of its identity and of its shards' bytes, the same in memory and on disk.

The folder may be a URL (saelab/storage/remote.py). Shards on a disk are mapped, and `verify`
compares their bytes with the checksums; shards at a URL are read ahead within a bound and compared
at every read.
"""

from __future__ import annotations

import functools
import hashlib
import json
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from pydantic import Field
from safetensors.torch import save, save_file
from torch import Tensor

from saelab.config import digest
from saelab.data.activations.read_ahead import ReadAhead
from saelab.errors import DamageError, MismatchError, SourceError
from saelab.runtime.counting import count
from saelab.storage.atomic import check_seal, read_json, sha256, write_atomically, write_sealed
from saelab.storage.remote import Place, Remote
from saelab.storage.safetensors_file import parse_weights, read_weights
from saelab.storage.validation import Loose, Name, validate

#: Version of the folder's layout.
FORMAT = 1
#: Why loss recovered and probing are missing for activations without their model.
FOREIGN_REASON = "activations were made elsewhere"
#: The largest squared length of an activation. Our choice: sums over 10^8 of them stay finite in
#: float32, and no model comes near it.
MOST_SQUARE = 1e30
#: Reads of an object that does not match its checksum, before it counts as damaged: an error of the
#: transfer does not occur twice.
MAX_READS = 2


def are_usable(x: Tensor) -> Tensor:
    """Returns whether each activation [..., d] is finite and small enough to compute with.

    This is decided in float32, the precision of all computations; bool [...].
    """
    return x.float().square().sum(-1) <= MOST_SQUARE


@dataclass(frozen=True)
class Shard:
    """Whole contexts of activations.

    Args:
        x: [contexts, positions, d] in the stored dtype.
        mask: bool [contexts, positions]; True where the position counts.
        ids: int32 [contexts, positions] token ids; None when they were not stored.
        documents: int32 [contexts, positions], number of the document that each position is of;
            None when it was not stored.
    """

    x: Tensor
    mask: Tensor
    ids: Tensor | None = None
    documents: Tensor | None = None

    def rows(self) -> tuple[Tensor, Tensor]:
        """Returns the counted vectors in order, float32 [n, d], and their positions, int64 [n]."""
        return self.x[self.mask].float(), self.mask.nonzero()[:, 1]

    @property
    def n_tokens(self) -> int:
        """Number of positions that count."""
        return int(self.mask.sum())

    def tensors(self) -> dict[str, Tensor]:
        """Returns the content of a shard file, name -> tensor."""
        parts = {"x": self.x, "mask": self.mask, "ids": self.ids, "documents": self.documents}
        return {name: part.contiguous() for name, part in parts.items() if part is not None}


class Source(Protocol):
    """Activations of one hook point.

    `header` is their identity (model, model_digest, text_digest, hook_name, context, dtype, d,
    n_tokens ...); `shard_counts` is the number of counted tokens in each shard.
    """

    @property
    def header(self) -> dict[str, Any]: ...

    @property
    def d(self) -> int: ...

    @property
    def n_shards(self) -> int: ...

    @property
    def shard_counts(self) -> list[int]: ...

    @property
    def digest(self) -> str: ...

    def shard(self, i: int) -> Shard: ...


class MemorySource:
    """Shards held in memory.

    Args:
        shards: at least one; all with the same d.
        header: the identity; d, dtype, context and n_tokens are added from the shards.
    """

    def __init__(self, shards: Sequence[Shard], header: Mapping[str, Any]) -> None:
        if not shards:
            raise SourceError("no activations: a source needs at least one shard")
        self._shards = list(shards)
        self.header = {
            **_describe_shard(self._shards[0]),
            **header,
            "n_tokens": sum(self.shard_counts),
        }

    @property
    def d(self) -> int:
        return int(self._shards[0].x.shape[-1])

    @property
    def n_shards(self) -> int:
        return len(self._shards)

    @property
    def shard_counts(self) -> list[int]:
        return [shard.n_tokens for shard in self._shards]

    @property
    def digest(self) -> str:
        return source_digest(self.header, self._hashes)

    @functools.cached_property
    def _hashes(self) -> list[str]:
        return [hashlib.sha256(save(shard.tensors())).hexdigest() for shard in self._shards]

    def shard(self, i: int) -> Shard:
        return self._shards[i]


def _describe_shard(shard: Shard) -> dict[str, Any]:
    """Returns the header fields that all shards share with this one."""
    _, positions, d = shard.x.shape
    return {"context": positions, "d": d, "dtype": str(shard.x.dtype).removeprefix("torch.")}


def source_digest(header: Mapping[str, Any], hashes: list[str]) -> str:
    """Returns the digest of a source from its identity and the sha256 of each shard."""
    return digest([header, hashes])


# ---------------------------------------------------------------- folder


class FolderSource:
    """Shards in a folder, opened by `FolderSource.open`; on a disk they are mapped, not read.

    Args:
        path: the folder.
        header: the identity.
        shards: a record of each shard.
        ahead: bytes of shards that may be read before they are requested, if the folder is a URL.
    """

    def __init__(
        self, path: Place, header: dict[str, Any], shards: list[dict[str, Any]], ahead: int = 0
    ) -> None:
        self.path, self.header, self._records = path, header, shards
        self._ahead = ReadAhead(self._read_file, [record["bytes"] for record in shards], ahead)
        self._last: tuple[int, Shard] | None = None

    @classmethod
    def open(
        cls, path: Place, expected: Mapping[str, Any] | None = None, ahead: int = 0
    ) -> FolderSource:
        """Opens a complete folder and checks the sizes of its files; `verify` checks their bytes.

        Args:
            path: the folder.
            expected: fields that the header must have, as in `check_identity`.
            ahead: as for the class.

        Raises: SourceError when there is no complete harvest, DamageError for a missing or
            truncated shard, MismatchError when the header differs from `expected`.
        """
        if not (path / "header.json").is_file():
            unfinished = (path / "partial.json").is_file()
            why = (
                "an unfinished harvest: run it again" if unfinished else "no harvested activations"
            )
            raise SourceError(f"{path} holds {why}" + ("" if unfinished else ": harvest first"))
        stored = read_state(path, "header.json")
        source = cls(path, stored["header"], stored["shards"], ahead)
        check_identity(source.header, expected or {}, str(path))
        sizes = tensor_file_sizes(path)
        for record in source._records:
            _check_size(path, record, sizes)
        return source

    @property
    def d(self) -> int:
        return stored_width(self.header, self.path)

    @property
    def n_shards(self) -> int:
        return len(self._records)

    @property
    def shard_counts(self) -> list[int]:
        return [record["n_tokens"] for record in self._records]

    @property
    def digest(self) -> str:
        return source_digest(self.header, [record["sha256"] for record in self._records])

    def shard(self, i: int) -> Shard:
        """Maps the shard, or reads it from a URL.

        Raises: DamageError when the file can't be read, or an object does not match its checksum.
        """
        file = self.path / self._records[i]["file"]
        if isinstance(file, Path):
            parts = read_weights(file, DamageError, "harvest it again")
            return _build_shard(parts, self._records[i], self.d, file)
        if self._last is None or self._last[0] != i:
            self._last = None  # so that memory never holds two
            parts = parse_weights(self._ahead.get(i), file, DamageError, "harvest it again")
            self._last = i, _build_shard(parts, self._records[i], self.d, file)
        return self._last[1]

    def _read_file(self, i: int) -> bytes:
        return read_checked(self.path, self._records[i])

    @property
    def checks_reads(self) -> bool:
        """True if every read is compared with its checksum, so that `verify` would read twice."""
        return isinstance(self.path, Remote)

    def verify(self) -> None:
        """Compares every shard with its checksum.

        Raises: DamageError naming the first file that differs.
        """
        sizes = tensor_file_sizes(self.path)
        for record in self._records:
            _check_size(self.path, record, sizes)
            _check_bytes(self.path, record)


class _Header(Loose):
    d: int = Field(default=1, ge=1)
    n_tokens: int = Field(default=0, ge=0)


class _Record(Loose):
    file: Name
    sha256: str
    bytes: int
    contexts: int
    n_tokens: int


class _State(Loose):
    header: _Header
    shards: list[_Record]


def read_state(path: Place, name: str) -> dict[str, Any]:
    """Reads header.json or partial.json of a folder.

    Raises: DamageError when the file was changed, SourceError when it is of another version.
    """
    file, remedy = path / name, f"delete {path} and harvest again"
    stored = read_json(file)
    if isinstance(stored, dict) and stored.get("format") != FORMAT:
        raise SourceError(
            f"{path} has format {stored.get('format')!r}, this version reads {FORMAT}: "
            "harvest it again"
        )
    return validate(check_seal(stored, file, remedy), _State, file, remedy)


def stored_width(header: Mapping[str, Any], path: Place) -> int:
    """Returns d from a header.

    Raises: DamageError when the header does not have it.
    """
    if "d" not in header:
        raise DamageError(f"{path} does not say its width d: delete it and harvest again")
    return int(header["d"])


def read_checked(path: Place, record: Mapping[str, Any]) -> bytes:
    """Reads a file of the folder and compares it with its checksum.

    Raises: DamageError naming the file that is missing or differs from its checksum.
    """
    file = path / record["file"]
    for _ in range(MAX_READS):
        try:
            data = file.read_bytes()
        except FileNotFoundError:
            raise DamageError(f"{file} is missing: run again") from None
        if hashlib.sha256(data).hexdigest() == record["sha256"]:
            return data
    raise DamageError(f"{file} does not match its checksum: delete it and run again")


def write_tensors(file: Place, tensors: dict[str, Tensor]) -> dict[str, Any]:
    """Writes a safetensors file and returns its record, `sha256` and `bytes`."""
    record: dict[str, Any] = {}

    def write(temporary: Path) -> None:
        save_file(tensors, temporary)
        record.update(sha256=sha256(temporary), bytes=temporary.stat().st_size)

    write_atomically(file, write)
    return record


def tensor_file_sizes(path: Place) -> dict[str, int]:
    """Returns name -> bytes of the safetensors files of a folder."""
    if isinstance(path, Remote):
        sizes = path.sizes()
        return {name: sizes[name] for name in sizes if name.endswith(".safetensors")}
    return {file.name: file.stat().st_size for file in path.glob("*.safetensors") if file.is_file()}


def _check_size(path: Place, record: Mapping[str, Any], sizes: Mapping[str, int]) -> None:
    size = sizes.get(record["file"])
    if size != record["bytes"]:
        state = "is missing" if size is None else f"has {size} bytes, not {record['bytes']}"
        raise DamageError(f"{path / record['file']} {state}: delete {path} and harvest again")


def _build_shard(
    parts: Mapping[str, Tensor], record: Mapping[str, Any], d: int, file: Place
) -> Shard:
    """Returns the shard that consists of these tensors.

    Raises: DamageError when they do not fit the record.
    """
    x, mask = parts.get("x"), parts.get("mask")
    further = {name: parts.get(name) for name in ("ids", "documents")}
    fits = x is not None and mask is not None and x.dim() == 3 and x.shape[2] == d
    fits = fits and x.is_floating_point() and mask.dtype == torch.bool  # type: ignore[union-attr]
    fits = fits and mask.shape == x.shape[:2]  # type: ignore[union-attr]
    fits = fits and all(p is None or p.shape == mask.shape for p in further.values())  # type: ignore[union-attr]
    if not fits or x is None or mask is None or int(mask.sum()) != record["n_tokens"]:
        raise DamageError(f"{file} is not a shard of this harvest: harvest it again")
    return Shard(x, mask, **further)


def _check_bytes(path: Place, record: Mapping[str, Any]) -> None:
    if sha256(path / record["file"]) != record["sha256"]:
        file = path / record["file"]
        raise DamageError(f"{file} does not match its checksum: delete {path} and harvest again")


def reopen(path: Place) -> None:
    """Makes a complete folder an unfinished one; a writer goes on after its last intact shard."""
    state: dict[str, Any] | None = None
    with suppress(DamageError, SourceError):  # or of another version
        state = read_state(path, "header.json")
    if state is not None:
        write_sealed(path / "partial.json", state)
    (path / "header.json").unlink()


class FolderWriter:
    """Writer of shards, one after the other; it goes on after those of an interrupted writer.

    Args:
        path: the folder.
        header: the identity of the source; a partial harvest of another identity is refused.

    Raises: MismatchError when the folder holds activations of another identity.
    """

    def __init__(self, path: Place, header: Mapping[str, Any]) -> None:
        self.path, self.header = path, _to_json_types(header)
        self._records: list[dict[str, Any]] = []
        for name in ("header.json", "partial.json"):
            if (self.path / name).is_file():
                stored = self._read_stored(name)
                if stored.get("shards"):  # an announcement without shards may be replaced
                    check_identity(stored.get("header", {}), self.header, str(self.path))
                    self._records = self._intact_records(stored["shards"])
                break

    def _read_stored(self, name: str) -> dict[str, Any]:
        """Reads an earlier writer's state, or {} if it is damaged; its shards are made again."""
        try:
            return read_state(self.path, name)
        except DamageError as error:
            print(f"{error} (done now)", file=sys.stderr)
            return {}

    @property
    def done(self) -> int:
        """Number of shards that are written and intact."""
        return len(self._records)

    def _intact_records(self, records: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Returns the records up to the first file that does not match.

        Only the sizes are compared at a URL, where every read compares the bytes.
        """
        intact: list[dict[str, Any]] = []
        sizes = tensor_file_sizes(self.path)
        for record in records:
            try:
                _check_size(self.path, record, sizes)
                if isinstance(self.path, Path):
                    _check_bytes(self.path, record)
            except DamageError:
                break
            intact.append(record)
        return intact

    def announce(self) -> None:
        """Writes the state of the folder; from now on a `GrowingSource` may follow."""
        write_sealed(self.path / "partial.json", self._state())

    def add(self, shard: Shard) -> None:
        """Writes the next shard, then its record."""
        name = f"shard-{self.done:05d}.safetensors"
        record = {
            "file": name,
            **write_tensors(self.path / name, shard.tensors()),
            "contexts": int(shard.mask.shape[0]),
            "n_tokens": shard.n_tokens,
            "dtype": str(shard.x.dtype).removeprefix("torch."),
        }
        self._records.append(record)
        self.announce()

    def finish(self) -> FolderSource:
        """Writes header.json and opens the folder."""
        write_sealed(self.path / "header.json", self._state())
        (self.path / "partial.json").unlink(missing_ok=True)
        return FolderSource.open(self.path)

    def _state(self) -> dict[str, Any]:
        return {"format": FORMAT, "header": self.header, "shards": self._records}


def check_identity(
    header: Mapping[str, Any],
    expected: Mapping[str, Any],
    where: str = "the activations",
    remedy: str = "name another folder, or delete this one",
) -> None:
    """Compares the fields of `expected` with a header.

    Raises: MismatchError naming the first field that differs and both values.
    """
    for field, needed in _to_json_types(expected).items():
        value = header.get(field)
        if value != needed:
            raise MismatchError(
                f"{where} has {field} = {value!r}, but {needed!r} is needed: {remedy}"
            )


def _to_json_types(data: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the data as JSON would return them (tuples become lists)."""
    return json.loads(json.dumps(dict(data)))


def check_rows_differ(rows: Tensor, what: str) -> None:
    """Raises: SourceError when all rows [n, d] are the same, since no SAE can explain a variance of
    0 and none would be to blame."""
    if not len(rows) or bool((rows == rows[:1]).all()):
        raise SourceError(
            f"all {count(len(rows), 'row')} of the {what} are the same, so there is nothing to "
            "reconstruct: name another hook, other texts or other activations"
        )
