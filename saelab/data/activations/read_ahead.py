"""Objects of a store, read by threads before they are asked for, within a bound in memory.

    asked for i:   i comes back, and i + 1, i + 2 ... are begun while their bytes fit into the bound

Objects that wait (read, or being read) never hold more than the bound together; the one that is
asked for comes on top of it. What is read does not depend on the bound.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

#: Objects that are read at once. Our choice: enough to use a fast network, few enough for a store.
READERS = 4


class ReadAhead:
    """Reads objects in order, the next ones meanwhile.

    Args:
        read: i -> the bytes of object i; called by several threads.
        sizes: bytes of each object.
        bound: bytes that may wait; 0 reads nothing ahead.
    """

    def __init__(self, read: Callable[[int], bytes], sizes: Sequence[int], bound: int) -> None:
        self._read, self._sizes, self._bound = read, sizes, bound
        self._waiting: dict[int, Future[bytes]] = {}
        self._threads: ThreadPoolExecutor | None = None

    @property
    def waiting_bytes(self) -> int:
        """Of all objects that are read, or being read, and not asked for yet."""
        return sum(self._sizes[i] for i in self._waiting)

    def get(self, i: int) -> bytes:
        """Object i.

        Raises: what `read` raises.
        """
        self._drop([j for j in self._waiting if not i <= j <= i + len(self._waiting)])
        begun = self._waiting.pop(i, None)
        self._begin_after(i)
        return self._read(i) if begun is None else begun.result()

    def _drop(self, numbers: Sequence[int]) -> None:
        """Forgets what a reader that went elsewhere had begun; what is being read is waited for, so
        that the bound holds."""
        dropped = [self._waiting.pop(j) for j in numbers]
        for future in dropped:
            if not future.cancel():
                future.exception()

    def _begin_after(self, i: int) -> None:
        """Begins what comes next, as far as it fits."""
        for j in range(i + 1, len(self._sizes)):
            if j not in self._waiting:
                if self.waiting_bytes + self._sizes[j] > self._bound:
                    return
                self._threads = self._threads or ThreadPoolExecutor(READERS, "read-ahead")
                self._waiting[j] = self._threads.submit(self._read, j)
