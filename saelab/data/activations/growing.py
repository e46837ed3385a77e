"""Reader of activations that another process is still harvesting."""

from __future__ import annotations

import functools
import multiprocessing
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from saelab.data.activations.store import FolderSource, Shard, read_state, stored_width
from saelab.errors import SourceError
from saelab.storage.remote import Place

#: Seconds between two reads of a growing harvest's state, in a folder and at a URL, where each read
#: is a request. Our choice: short compared with the time of a shard.
FOLDER_POLL_SECONDS, URL_POLL_SECONDS = 0.1, 2.0


class GrowingSource:
    """Harvest that another process is still writing; every access waits until its data exist.

    `header`, `d` and `n_shards` wait for the writer's announcement, shard i until it is written,
    `shard_counts` and `digest` until the harvest is complete. The bytes, and so the digest, are
    those of the complete folder.

    Args:
        path: the folder of one hook point of a harvest.
        alive: returns whether the writer may still write; by default, whether the process that
            started this one is alive. Without such a process nothing is waited for.
        ahead: as for `FolderSource`, for shards that are written.

    Raises: SourceError, by all but the constructor, when something is missing and the writer ended.
    """

    def __init__(
        self, path: Place, alive: Callable[[], bool] | None = None, ahead: int = 0
    ) -> None:
        self.path, self._alive, self._bound = path, alive or _parent_is_alive, ahead
        self._written: FolderSource | None = None

    @property
    def header(self) -> dict[str, Any]:
        return self._announcement["header"]

    @property
    def d(self) -> int:
        return stored_width(self.header, self.path)

    @property
    def n_shards(self) -> int:
        return -(-self.header["n_contexts"] // self.header["shard_contexts"])

    @property
    def shard_counts(self) -> list[int]:
        return self._complete_source.shard_counts

    @property
    def digest(self) -> str:
        return self._complete_source.digest

    def shard(self, i: int) -> Shard:
        """Reads a shard as soon as it is written.

        Raises: DamageError when the file can't be read.
        """
        if self._written is None or i >= self._written.n_shards:
            state = self._wait_until(lambda state: len(state["shards"]) > i)
            self._written = FolderSource(self.path, state["header"], state["shards"], self._bound)
        return self._written.shard(i)

    @functools.cached_property
    def _announcement(self) -> dict[str, Any]:
        return self._wait_until(lambda state: True)

    @functools.cached_property
    def _complete_source(self) -> FolderSource:
        self._wait_until(lambda state: (self.path / "header.json").is_file())
        return FolderSource.open(self.path)

    def _wait_until(self, enough: Callable[[dict[str, Any]], bool]) -> dict[str, Any]:
        """Returns the state of the folder as soon as it is enough."""
        while True:
            alive = self._alive()  # before the read, so that the last state of a writer counts
            state = self._read_state()
            if state is not None and enough(state):
                return state
            if not alive:
                raise SourceError(f"{self.path} holds an unfinished harvest: run it again")
            time.sleep(FOLDER_POLL_SECONDS if isinstance(self.path, Path) else URL_POLL_SECONDS)

    def _read_state(self) -> dict[str, Any] | None:
        for name in ("header.json", "partial.json"):
            with suppress(SourceError):  # it does not exist yet, or no longer
                return read_state(self.path, name)
        return None


def _parent_is_alive() -> bool:
    parent = multiprocessing.parent_process()
    return parent is not None and parent.is_alive()
