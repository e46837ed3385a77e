"""Windows of tokens from a streamed data set, stored together with the position in the stream.

    <folder>/part-00000.safetensors   ids int32 [n], lengths int32 [windows]
    <folder>/stream.json              the parts with their checksums, and the position; sealed

A part holds the windows of whole groups of documents, and `stream.json` is written after it: with
the cursor of `datasets` after the last document of the part, and the ids that filled no window yet.
A later reader gets the windows of the parts and then those of the documents after them: the same
windows, in the same order, as without an interruption.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import suppress
from typing import Any

import numpy as np
import torch

from saelab.data.activations.store import check_identity, read_checked, write_tensors
from saelab.errors import DamageError, SourceError
from saelab.storage.atomic import read_sealed, write_sealed
from saelab.storage.remote import Place
from saelab.storage.safetensors_file import parse_weights
from saelab.storage.validation import Loose, Name, validate

#: Tokens of a part. Our choice: 16 MB, and the most that an interruption loses.
PART_TOKENS = 2**22


class _Part(Loose):
    file: Name
    sha256: str


class _Stream(Loose):
    """Content of stream.json."""

    identity: dict[str, Any]
    cursor: dict[str, Any]
    rest: list[int]
    parts: list[_Part]


class TokenParts:
    """The parts in a folder, and the position of the stream after them.

    Args:
        folder: folder of the parts; may contain earlier ones.
        identity: identity of the windows, as plain data.

    Raises: MismatchError when the folder holds windows of another identity, DamageError when
        stream.json was changed after it was written.
    """

    def __init__(self, folder: Place, identity: dict[str, Any]) -> None:
        self.folder, self.identity = folder, identity
        self.cursor: dict[str, Any] | None = None
        self.rest = np.empty(0, dtype=np.int32)
        self._records: list[dict[str, Any]] = []
        with suppress(SourceError):  # the folder is empty
            file, remedy = folder / "stream.json", f"delete {folder} and run again"
            stored = validate(read_sealed(file, remedy), _Stream, file, remedy)
            check_identity(stored["identity"], identity, str(folder))
            self.cursor, self._records = stored["cursor"], stored["parts"]
            self.rest = np.array(stored["rest"], dtype=np.int32)

    def windows(self) -> Iterator[np.ndarray]:
        """Yields the windows of all parts, int32.

        Raises: DamageError naming the part that was changed after it was written.
        """
        for record in self._records:
            file = self.folder / record["file"]
            data = read_checked(self.folder, record)
            part = parse_weights(data, file, DamageError, "delete it and run again")
            cuts = part["lengths"].cumsum(0)[:-1].numpy()
            yield from np.split(part["ids"].numpy(), cuts)

    def add(self, windows: Sequence[np.ndarray], cursor: dict[str, Any], rest: np.ndarray) -> None:
        """Writes a part, then the position of the stream after it."""
        if not windows:
            return
        name = f"part-{len(self._records):05d}.safetensors"
        lengths = torch.tensor([len(window) for window in windows], dtype=torch.int32)
        ids = torch.from_numpy(np.concatenate(windows))
        written = write_tensors(self.folder / name, {"ids": ids, "lengths": lengths})
        self._records.append({"file": name, **written})
        self.cursor, self.rest = cursor, rest
        state = {"cursor": cursor, "rest": rest.tolist(), "parts": self._records}
        write_sealed(self.folder / "stream.json", {"identity": self.identity, **state})
