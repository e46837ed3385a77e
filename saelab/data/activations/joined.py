"""Activations of several hook points of one harvest, side by side: inputs and, apart, targets.

    x[c, p] = [x_h1[c, p], x_h2[c, p], ...]     of the hook points that an SAE reads
    y[c, p] = [x_t1[c, p], x_t2[c, p], ...]     of those that it reconstructs; none: x itself

One pass of the model fills all of them with the same contexts, masks and borders of shards
(`harvest`), so rows belong together by their place. A single input is not copied.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from saelab.config import digest
from saelab.data.activations.growing import GrowingSource
from saelab.data.activations.store import Shard, Source
from saelab.errors import DamageError, MismatchError, SourceError
from saelab.storage.remote import Place

#: Fields of a header in which all hook points of a harvest agree.
SHARED = ("model_digest", "text_digest", "n_contexts", "context", "n_tokens", "dtype")


@dataclass(frozen=True)
class JoinedShard(Shard):
    """A shard with what is reconstructed.

    Args:
        y: [contexts, positions, d_out] in the stored dtype; None where x is reconstructed.
    """

    y: Tensor | None = None

    def target_rows(self) -> Tensor | None:
        """Returns the counted targets in the order of `rows`, float32 [n, d_out]."""
        return None if self.y is None else self.y[self.mask].float()


@dataclass(frozen=True)
class Paths:
    """Places of the sources of a `JoinedSource`, for other processes."""

    inputs: tuple[Place, ...]
    targets: tuple[Place, ...] = ()

    @property
    def all(self) -> tuple[Place, ...]:
        """All places."""
        return (*self.inputs, *self.targets)


class JoinedSource:
    """Sources of several hook points as one.

    Args:
        inputs: at least one.
        targets: of what is reconstructed; none where that is the input.

    Raises: MismatchError when they are not of one harvest.
    """

    def __init__(self, inputs: Sequence[Source], targets: Sequence[Source] = ()) -> None:
        self.inputs, self.targets = tuple(inputs), tuple(targets)
        first = self.inputs[0].header
        for source in self._all[1:]:
            for name in (*SHARED, "shard_contexts"):
                if source.header.get(name) != first.get(name):
                    hooks = f"{first.get('hook_name')} and {source.header.get('hook_name')}"
                    raise MismatchError(
                        f"activations at {hooks} differ in {name} ({first.get(name)!r} and "
                        f"{source.header.get(name)!r}): harvest both in one pass"
                    )

    @property
    def _all(self) -> tuple[Source, ...]:
        return (*self.inputs, *self.targets)

    @property
    def header(self) -> dict[str, Any]:
        """The identity of the first input, with the hook points and widths of all."""
        inputs, targets = ([s.header for s in group] for group in (self.inputs, self.targets))
        names = [str(header.get("hook_name")) for header in inputs]
        return {
            **inputs[0],
            "hook_name": ", ".join(names),
            "d": self.d,
            "input_hooks": names,
            "target_hooks": [str(header.get("hook_name")) for header in targets],
            "sources": [*inputs, *targets],
        }

    @property
    def d(self) -> int:
        """Width of all inputs together."""
        return sum(self.input_widths)

    @property
    def input_widths(self) -> tuple[int, ...]:
        """Width of each input."""
        return tuple(source.d for source in self.inputs)

    @property
    def target_widths(self) -> tuple[int, ...]:
        """Width of each target."""
        return tuple(source.d for source in self.targets)

    @property
    def path(self) -> Paths:
        """Places of all sources.

        Raises: SourceError when one is in memory.
        """
        if any(getattr(source, "path", None) is None for source in self._all):
            raise SourceError("a launch needs its activations in a folder")
        inputs, targets = (tuple(s.path for s in g) for g in (self.inputs, self.targets))  # type: ignore[attr-defined]
        return Paths(inputs, targets)

    @property
    def n_shards(self) -> int:
        return self.inputs[0].n_shards

    @property
    def shard_counts(self) -> list[int]:
        return self.inputs[0].shard_counts

    @property
    def digest(self) -> str:
        return digest([[s.digest for s in group] for group in (self.inputs, self.targets)])

    def shard(self, i: int) -> JoinedShard:
        """Returns a shard of all hook points.

        Raises: DamageError when the sources' masks differ.
        """
        inputs, targets = ([s.shard(i) for s in group] for group in (self.inputs, self.targets))
        first = inputs[0]
        if not all(torch.equal(first.mask, shard.mask) for shard in (*inputs[1:], *targets)):
            hook = self.header["hook_name"]
            raise DamageError(f"shard {i} at {hook} counts other positions: harvest it again")
        y = _side_by_side(targets) if targets else None
        return JoinedShard(_side_by_side(inputs), first.mask, first.ids, first.documents, y=y)


def _side_by_side(shards: Sequence[Shard]) -> Tensor:
    """Returns the activations of shards as one tensor; that of a single one is not copied."""
    return shards[0].x if len(shards) == 1 else torch.cat([shard.x for shard in shards], dim=-1)


def joined(inputs: Sequence[Source], targets: Sequence[Source] = ()) -> Source:
    """Returns the sources as one; a single input without a target as it is."""
    return inputs[0] if len(inputs) == 1 and not targets else JoinedSource(inputs, targets)


def target_rows(shard: Shard) -> Tensor | None:
    """Returns the counted targets of a shard in the order of its rows, float32 [n, d_out]; None
    where the input is the target."""
    return shard.target_rows() if isinstance(shard, JoinedShard) else None


def widths(source: Source) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Returns the width of each hook point of the input, and of the target; () without one."""
    if isinstance(source, JoinedSource):
        return source.input_widths, source.target_widths
    return (source.d,), ()


def is_growing(source: Source) -> bool:
    """Returns whether a source, or one of several, is still being harvested."""
    sources = (*source.inputs, *source.targets) if isinstance(source, JoinedSource) else (source,)
    return any(isinstance(each, GrowingSource) for each in sources)


def target_hooks(source: Source) -> tuple[str, ...]:
    """Returns the hook points whose activations are reconstructed, as far as they have names."""
    header = source.header
    names = header.get("target_hooks") or header.get("input_hooks") or [header.get("hook_name")]
    return tuple(str(name) for name in names if name)
