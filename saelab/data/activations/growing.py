"""Activations that are read while another process still harvests them."""

from __future__ import annotations

import functools
import multiprocessing
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from saelab.data.activations.store import (
    POLL,
    REMOTE_POLL,
    FolderSource,
    Shard,
    _read_state,
    _width,
)
from saelab.errors import SourceError
from saelab.storage.remote import Place


class GrowingSource:
    """A harvest that another process still writes: whatever is not there yet is waited for.

    `header`, `d` and `n_shards` are there once the writer has announced itself, shard i once it is
    written, `shard_counts` and `digest` once the harvest is complete. Its bytes, and so its digest,
    are those of the complete folder.

    Args:
        path: the folder of one hook point of a harvest.
        alive: whether the writer may still write; by default, whether the process that started this
            one lives. Where no process can be waited for, nothing is waited for.
        ahead: as for `FolderSource`; of what is written.

    Raises: SourceError, by all but the constructor, when something is missing and the writer ended.
    """

    def __init__(
        self, path: Place, alive: Callable[[], bool] | None = None, ahead: int = 0
    ) -> None:
        self.path, self._alive, self._bound = path, alive or _parent_lives, ahead
        self._written: FolderSource | None = None

    @property
    def header(self) -> dict[str, Any]:
        return self._announced["header"]

    @property
    def d(self) -> int:
        return _width(self.header, self.path)

    @property
    def n_shards(self) -> int:
        return -(-self.header["n_contexts"] // self.header["shard_contexts"])

    @property
    def shard_counts(self) -> list[int]:
        return self._whole.shard_counts

    @property
    def digest(self) -> str:
        return self._whole.digest

    def shard(self, i: int) -> Shard:
        """Raises: DamageError when the file can't be read."""
        if self._written is None or i >= self._written.n_shards:
            state = self._wait(lambda state: len(state["shards"]) > i)
            self._written = FolderSource(self.path, state["header"], state["shards"], self._bound)
        return self._written.shard(i)

    @functools.cached_property
    def _announced(self) -> dict[str, Any]:
        return self._wait(lambda state: True)

    @functools.cached_property
    def _whole(self) -> FolderSource:
        self._wait(lambda state: (self.path / "header.json").is_file())
        return FolderSource.open(self.path)

    def _wait(self, enough: Callable[[dict[str, Any]], bool]) -> dict[str, Any]:
        """What is written, as soon as it is enough."""
        while True:
            alive = self._alive()  # before the look, so that a writer's last words count
            state = self._state()
            if state is not None and enough(state):
                return state
            if not alive:
                raise SourceError(f"{self.path} holds an unfinished harvest: run it again")
            time.sleep(POLL if isinstance(self.path, Path) else REMOTE_POLL)

    def _state(self) -> dict[str, Any] | None:
        for name in ("header.json", "partial.json"):
            with suppress(SourceError):  # not there yet, or not any more
                return _read_state(self.path, name)
        return None


def _parent_lives() -> bool:
    parent = multiprocessing.parent_process()
    return parent is not None and parent.is_alive()
