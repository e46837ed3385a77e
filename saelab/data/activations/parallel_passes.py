"""Passes of a language model over many contexts: side by side on the cores, like lengths together.

    lanes    = threads of torch on a CPU for a model of d_model <= NARROW, else 1
    one lane = a thread that runs whole passes on one core, with hooks of its own

A narrow model's layers are too small for several threads to share one, so each core takes its own
pass. That is a rule of device and width alone, and each pass computes what it would compute alone
on one thread: the numbers do not depend on how many lanes there are. On a GPU there is one lane
(this has not been run on a GPU).
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeVar

import torch

from saelab.data.language_model import LanguageModel

#: Widest model that runs one pass a core. Our choice: above it one layer feeds all cores, and as
#: many passes at once would take as many times the memory.
NARROW = 1024
#: Passes handed out ahead of the one that is waited for, per lane.
AHEAD = 2

Item = TypeVar("Item")
Result = TypeVar("Result")


def lanes(device: str, d_model: int) -> int:
    """How many passes run at once."""
    if torch.device(device).type != "cpu" or d_model > NARROW:
        return 1
    return torch.get_num_threads()


def side_by_side(
    model: LanguageModel, work: Callable[[LanguageModel, Item], Result], items: Iterable[Item]
) -> Generator[Result, None, None]:
    """work(model, item) for each item, in the order of the items.

    Args:
        work: runs in a thread of its own with a twin of the model; what it writes must be its
            item's alone.
        items: at most `AHEAD` x lanes of them are taken before their results are asked for.

    Raises: what `work` raises.
    """
    n = lanes(model.device.type, model.d_model)
    if n == 1:
        yield from (work(model, item) for item in items)
        return
    own = threading.local()
    twins = deque(model.twin() for _ in range(n))

    def prepare() -> None:
        torch.set_num_threads(1)  # of this thread
        own.model = twins.pop()

    def run(item: Item) -> Result:
        return work(own.model, item)

    threads = torch.get_num_threads()
    pool = ThreadPoolExecutor(n, "lane", prepare)
    try:
        waiting: deque[Future[Any]] = deque()
        for item in items:
            waiting.append(pool.submit(run, item))
            if len(waiting) >= AHEAD * n:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)
        torch.set_num_threads(threads)  # what threads to come begin with


def by_length(lengths: torch.Tensor, tokens: int) -> list[torch.Tensor]:
    """Groups of like length, so that a pass computes little padding.

    Args:
        lengths: int64 [n], positions of each text.
        tokens: a group's size x its longest text is at most this (but one text is a group).

    Returns: int64 indices of each group; within and across groups from short to long, equal ones
        in their own order.
    """
    order = lengths.argsort(stable=True)
    groups: list[torch.Tensor] = []
    start = 0
    for i, length in enumerate(lengths[order].tolist()):
        if i > start and (i + 1 - start) * length > tokens:
            groups.append(order[start:i])
            start = i
    return [*groups, order[start:]] if len(order) else groups
