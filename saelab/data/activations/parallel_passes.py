"""Parallel passes of a language model over many contexts, in groups of similar length.

    lanes    = threads of torch, but no more than the cores that this process may use, on a CPU for
               a model of d_model <= NARROW, else 1
    one lane = a thread that runs whole passes on one core, with its own hooks

A narrow model's layers are too small for several threads to share one, so each core takes its own
pass. This rule depends only on device and width, and each pass computes what it would compute on
one thread, so the numbers do not depend on the number of lanes. On a GPU there is one lane (this
has not been run on a GPU).
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeVar

import torch

from saelab.data.language_model import LanguageModel
from saelab.runtime.cores import usable_cores

#: Widest model that runs one pass per core. Our choice: above it one layer feeds all cores, and as
#: many passes at once would take as many times the memory.
NARROW = 1024
#: Passes per lane that are submitted before the first result is awaited.
AHEAD = 2

Item = TypeVar("Item")
Result = TypeVar("Result")


def lane_count(device: str, d_model: int) -> int:
    """Returns the number of passes that run at once."""
    if not _has_lanes(device, d_model):
        return 1
    return min(torch.get_num_threads(), usable_cores())


def _has_lanes(device: str, d_model: int) -> bool:
    """Returns True where each pass runs on one core."""
    return torch.device(device).type == "cpu" and d_model <= NARROW


def run_in_lanes(
    model: LanguageModel, work: Callable[[LanguageModel, Item], Result], items: Iterable[Item]
) -> Generator[Result, None, None]:
    """Yields work(model, item) for each item, in the order of the items.

    Args:
        model: the language model.
        work: runs in its own thread with a twin of the model; it may write only what belongs to
            its item.
        items: at most `AHEAD` x lanes of them are taken before their results are requested.

    Raises: the errors of `work`.
    """
    n = lane_count(model.device.type, model.d_model)
    if torch.get_num_threads() == 1 or not _has_lanes(model.device.type, model.d_model):
        yield from (work(model, item) for item in items)
        return
    local = threading.local()
    twins = deque(model.twin() for _ in range(n))

    def prepare() -> None:
        torch.set_num_threads(1)  # for this thread
        local.model = twins.pop()

    def run(item: Item) -> Result:
        return work(local.model, item)

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
        torch.set_num_threads(threads)  # the default of later threads


def group_by_length(lengths: torch.Tensor, tokens: int) -> list[torch.Tensor]:
    """Groups texts of similar length, so that a pass computes little padding.

    Args:
        lengths: int64 [n], positions of each text.
        tokens: limit of a group's size x its longest text (a single text may exceed it).

    Returns: int64 indices of each group; within and across groups from short to long, equal lengths
        in their original order.
    """
    order = lengths.argsort(stable=True)
    groups: list[torch.Tensor] = []
    start = 0
    for i, length in enumerate(lengths[order].tolist()):
        if i > start and (i + 1 - start) * length > tokens:
            groups.append(order[start:i])
            start = i
    return [*groups, order[start:]] if len(order) else groups
