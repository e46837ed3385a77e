"""Sums that the core metrics are made of, for each document of the held-out text.

A document is one cluster: its tokens are alike. Where activations do not say which document a
position belongs to (they were made elsewhere, or are synthetic), and where all are of one document,
each context is a cluster. Above `MOST` clusters
neighbours are taken together, which keeps files small and makes intervals wider if anything.

Columns, one line for each cluster:

    tokens              counted rows
    error, power        squared distance from the reconstruction, and from the mean of all rows
    active, cosine      latents that fire; cosine of row and reconstruction
    loss_tokens         next tokens whose loss was measured
    ce_<state>          cross entropy in nats: clean, zero, mean, spliced (core)

All are float64 sums; `saelab.verdict.over_texts` makes intervals of them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import torch
from torch import Tensor

Kind = Literal["document", "context"]
#: Largest number of clusters of a file. Our choice: intervals hardly change beyond it.
MOST = 400


@dataclass(frozen=True, eq=False)
class Clusters:
    """Cluster of every position of the held-out activations.

    Args:
        kind: what a cluster is.
        labels: of each shard, int64 [contexts, positions], numbered from 0 over the counted ones.
        masks: of each shard, True where a position counts.
    """

    kind: Kind
    labels: list[Tensor]
    masks: list[Tensor]

    @cached_property
    def of_rows(self) -> Tensor:
        """Cluster of each counted row in order, int64 [n]."""
        return torch.cat([x[mask] for x, mask in zip(self.labels, self.masks, strict=True)])

    @cached_property
    def count(self) -> int:
        """Number of clusters."""
        return int(self.of_rows.max()) + 1

    def sums(self, values: Tensor, labels: Tensor) -> Tensor:
        """Sums values [n] by their labels [n]; float64 [clusters]."""
        total = torch.zeros(self.count, dtype=torch.float64)
        return total.index_add_(0, labels, values.double())


def clusters_of(masks: list[Tensor], documents: Sequence[Tensor | None]) -> Clusters:
    """Reads which document, or else which context, each position belongs to.

    Args:
        masks: of each shard, bool [contexts, positions], True where a position counts.
        documents: of each shard, the number of each position's document, or None.
    """
    stated = [one.long() for one in documents if one is not None]
    if len(stated) < len(masks):
        stated = []
    numbers = [x[mask] for x, mask in zip(stated, masks, strict=True)] if stated else []
    several = bool(numbers) and len(torch.cat(numbers).unique()) > 1
    kind: Kind = "document" if several else "context"
    if kind == "context":
        stated, first = [], 0
        for mask in masks:
            contexts = torch.arange(first, first + len(mask))
            stated.append(contexts[:, None].expand(mask.shape))
            first += len(mask)
    counted = torch.cat([x[mask] for x, mask in zip(stated, masks, strict=True)]).unique()
    groups = torch.arange(len(counted))
    if len(counted) > MOST:
        groups = groups * MOST // len(counted)
    labels = [
        groups[torch.searchsorted(counted, x.contiguous()).clamp_max(len(counted) - 1)]
        for x in stated
    ]
    return Clusters(kind, labels, masks)


@dataclass(frozen=True, eq=False)
class TextSums:
    """The sums of one subject: column -> float64 [clusters]."""

    kind: Kind
    sums: Mapping[str, Tensor]

    def columns(self) -> dict[str, object]:
        """Columns of a table, one line for each cluster."""
        n = len(next(iter(self.sums.values())))
        arrays = {name: values.numpy() for name, values in self.sums.items()}
        return {"cluster": list(range(n)), "kind": [self.kind] * n, **arrays}


def row_sums(clusters: Clusters, values: Mapping[str, Tensor], order: Tensor | None) -> TextSums:
    """Sums values [n] of rows, which are `order` [n] of the counted ones if they come in another
    order."""
    labels = clusters.of_rows if order is None else clusters.of_rows[order]
    sums = {"tokens": clusters.sums(torch.ones(len(labels), dtype=torch.float64), labels)}
    return TextSums(
        clusters.kind, sums | {name: clusters.sums(v, labels) for name, v in values.items()}
    )


def with_losses(sums: TextSums, clusters: Clusters, losses: Mapping[str, Tensor]) -> TextSums:
    """Adds the losses [contexts, positions - 1] of the first contexts, each at its next token."""
    contexts = len(next(iter(losses.values())))
    counted = clusters.masks[0][:contexts, 1:]
    labels = clusters.labels[0][:contexts, 1:][counted]
    added = {"loss_tokens": clusters.sums(torch.ones(len(labels), dtype=torch.float64), labels)}
    added |= {name: clusters.sums(loss[counted], labels) for name, loss in losses.items()}
    return TextSums(sums.kind, {**sums.sums, **added})
