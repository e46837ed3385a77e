"""Activations of several hook points whose rows belong together; all widths differ."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import normalize

from saelab.data.activations.joined import joined
from saelab.data.activations.store import MemorySource, Shard, Source
from saelab.seeding import torch_stream
from saelab.training.sample import Sample, initial_sample

#: Widths of the hook points.
READ, WRITTEN = 12, 7
CAUSES = 20
HEADER = {"model_digest": "m", "text_digest": "t", "n_contexts": 48, "shard_contexts": 24}


def hook_sources(widths: Sequence[int], seed: int = 0, contexts: int = 24) -> list[MemorySource]:
    """A source for each width, in two shards: rows are the same few causes in other directions,
    each hook point with a mean and a size of its own. The first position does not count."""
    stream = torch_stream(seed, "paired data")
    directions = [normalize(torch.randn(CAUSES, d, generator=stream), dim=1) for d in widths]
    means = [torch.randn(d, generator=stream) for d in widths]
    shards: list[list[Shard]] = [[] for _ in widths]
    for _ in range(2):
        shape = (contexts, 8, CAUSES)
        f = torch.rand(shape, generator=stream) * (torch.rand(shape, generator=stream) < 0.15)
        mask = torch.ones(shape[:2], dtype=torch.bool)
        mask[:, 0] = False
        for i, (direction, mean) in enumerate(zip(directions, means, strict=True)):
            noise = 0.01 * torch.randn(*shape[:2], direction.shape[1], generator=stream)
            shards[i].append(Shard((i + 2) * (f @ direction + noise + mean), mask))
    header = HEADER | {"n_contexts": 2 * contexts, "shard_contexts": contexts}
    return [
        MemorySource(part, header | {"hook_name": f"hook.{i}"}) for i, part in enumerate(shards)
    ]


def pair_source(inputs: Sequence[int] = (READ,), targets: Sequence[int] = (WRITTEN,)) -> Source:
    """Inputs and targets of these widths as one source."""
    sources = hook_sources((*inputs, *targets))
    return joined(sources[: len(inputs)], sources[len(inputs) :])


def pair_sample(inputs: Sequence[int] = (READ,), targets: Sequence[int] = (WRITTEN,)) -> Sample:
    return initial_sample(pair_source(inputs, targets))


def rows_of(sample: Sample, n: int) -> tuple[Tensor, Tensor | None]:
    """The first rows of x and y."""
    return sample.x[:n], None if sample.y is None else sample.y[:n]
