"""Reads objects of a store in threads before they are requested, within a bound on memory.

    request i:   returns i, and begins to read i + 1, i + 2 ... while their bytes fit into the bound

Waiting objects (read, or being read) together never hold more than the bound; the requested one
comes on top of it. The content that is returned does not depend on the bound.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

#: Objects read at once. Our choice: enough to use a fast network, few enough for a store.
READERS = 4


class ReadAhead:
    """Reader of objects in order, which reads the next ones in the background.

    Args:
        read: i -> the bytes of object i; several threads call it.
        sizes: bytes of each object.
        bound: bytes that may wait; 0 reads nothing ahead.
    """

    def __init__(self, read: Callable[[int], bytes], sizes: Sequence[int], bound: int) -> None:
        self._read, self._sizes, self._bound = read, sizes, bound
        self._waiting: dict[int, Future[bytes]] = {}
        self._threads: ThreadPoolExecutor | None = None

    @property
    def waiting_bytes(self) -> int:
        """Bytes of all objects that are read, or being read, and not requested yet."""
        return sum(self._sizes[i] for i in self._waiting)

    def get(self, i: int) -> bytes:
        """Returns object i.

        Raises: the errors of `read`.
        """
        self._drop([j for j in self._waiting if not i <= j <= i + len(self._waiting)])
        future = self._waiting.pop(i, None)
        self._begin_after(i)
        return self._read(i) if future is None else future.result()

    def _drop(self, numbers: Sequence[int]) -> None:
        """Forgets waiting objects that are no longer next in order.

        It waits for those that are being read, so that the bound holds.
        """
        dropped = [self._waiting.pop(j) for j in numbers]
        for future in dropped:
            if not future.cancel():
                future.exception()

    def _begin_after(self, i: int) -> None:
        """Begins to read the objects after i, as far as they fit into the bound."""
        for j in range(i + 1, len(self._sizes)):
            if j not in self._waiting:
                if self.waiting_bytes + self._sizes[j] > self._bound:
                    return
                self._threads = self._threads or ThreadPoolExecutor(READERS, "read-ahead")
                self._waiting[j] = self._threads.submit(self._read, j)
