"""Tasks of sparse probing: one class against the rest, on examples that the seed draws.

The examples depend on an entry's labels and the seed alone, so that all subjects see the same ones.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from saelab.data.probing.activations import ProbingEntry
from saelab.errors import SourceError
from saelab.seeding import numpy_stream


@dataclass(frozen=True)
class Examples:
    """Text numbers int64 [n] and labels bool [n]; positives first, half of all."""

    index: Tensor
    positive: Tensor


@dataclass(frozen=True, eq=False)
class Task:
    """One class against the rest."""

    name: str
    train: Examples
    test: Examples


def build_tasks(entry: ProbingEntry, seed: int) -> tuple[Task, ...]:
    """Builds the one-vs-rest tasks of an entry, which depend on its labels and the seed alone.

    Raises: SourceError when a class has no texts on one side.
    """
    tasks = []
    for label, name in enumerate(entry.classes):
        rng = numpy_stream(seed, "evaluation", entry.name, name)
        train, test = (
            _examples(entry, label, entry.is_train == side, rng) for side in (True, False)
        )
        tasks.append(Task(name, train, test))
    return tuple(tasks)


def _examples(entry: ProbingEntry, label: int, side: Tensor, rng: np.random.Generator) -> Examples:
    """Draws positives and as many negatives, as evenly as possible from the other classes."""
    pools = [
        ((entry.labels == c) & side).nonzero()[:, 0].numpy() for c in range(len(entry.classes))
    ]
    positives, others = pools[label], [pool for c, pool in enumerate(pools) if c != label]
    rarest = min(map(len, others), default=0)
    n = min(len(positives), rarest * len(others))
    if n == 0:
        raise SourceError(
            f"entry {entry.name} has no train or test texts for class {entry.classes[label]!r} "
            "or for another: give every class texts on both sides"
        )
    shares = [n // len(others) + (c < n % len(others)) for c in range(len(others))]
    negatives = [rng.choice(pool, k, replace=False) for pool, k in zip(others, shares, strict=True)]
    index = torch.from_numpy(np.concatenate([rng.choice(positives, n, replace=False), *negatives]))
    return Examples(index, torch.arange(2 * n) < n)
