"""Replacements of a model's activations at counted positions, and the losses that they lead to.

One hook point is replaced by itself. Of several targets, those that are added to the stream
(outputs of attention or an MLP) are replaced together; of residual streams each by itself, because
the last one alone would decide otherwise, and losses are means over the hook points.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from saelab.data.activations.stream import Batch

#: Rows [n, d] and the starts of their runs of tokens [m + 1] -> replacements of the rows [n, d].
Replace = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True, eq=False)
class TokenLosses:
    """Losses of each next token, on the CPU; entry p is the prediction made at position p.

    Args:
        ce: cross entropy in nats, float32 [contexts, positions - 1].
        kl: KL(clean || spliced) in nats of the first contexts, float32 [first, positions - 1];
            first = 0 where it was not measured.
    """

    ce: Tensor
    kl: Tensor

    @classmethod
    def mean(cls, losses: Iterable[TokenLosses]) -> TokenLosses:
        """Returns the mean of several losses; a single one as it is."""
        parts = list(losses)
        if len(parts) == 1:
            return parts[0]
        stacked = (torch.stack([getattr(part, name) for part in parts]) for name in ("ce", "kl"))
        return cls(*(part.mean(0) for part in stacked))


def replaced_together(hooks: Sequence[str]) -> list[tuple[str, ...]]:
    """Returns the groups of hook points that are replaced in one pass."""
    if all("hook_resid" in hook for hook in hooks):
        return [(hook,) for hook in hooks]
    return [tuple(hooks)]


def divergence(clean: Tensor, logits: Tensor) -> Tensor:
    """Returns KL(clean || spliced) of one context, float32 [positions - 1].

    Args:
        clean: log-probabilities [positions - 1, vocabulary].
        logits: spliced, [positions, vocabulary].
    """
    after = logits[:-1].float().log_softmax(-1).cpu()
    return (clean.exp() * (clean - after)).sum(-1)


def run_starts(mask: Tensor) -> Tensor:
    """Returns the starts of the runs of counted tokens in mask [contexts, positions], and the
    number of counted tokens; int64 [m + 1]."""
    rows = Batch(mask.unsqueeze(-1), torch.zeros_like(mask).long(), mask).rows()
    assert rows.starts is not None
    return rows.starts


def splice_counted(instead: Replace, mask: Tensor) -> Callable[[Tensor], Tensor]:
    """Builds a splice that replaces the rows where mask [contexts, positions] is True."""
    starts = run_starts(mask)

    def splice(x: Tensor) -> Tensor:
        out = x.clone()
        keep = mask.to(x.device)
        out[keep] = instead(x[keep], starts)
        return out

    return splice
