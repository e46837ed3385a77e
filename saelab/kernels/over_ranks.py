"""Codes whose latents lie on several ranks: selection among all of them, and codes put together.

What is sent is N x k candidates or the pairs of a code, never anything of the size F x d.
"""

from __future__ import annotations

import torch
from torch import Tensor

from saelab.distributed.ranks import Ranks
from saelab.kernels.code import Code, Support
from saelab.kernels.table import kernels_for


def topk_over_ranks(z: Tensor, k: int, ranks: Ranks) -> Support:
    """This rank's share of the k largest of each row, over the latents of all ranks.

    Args:
        z: float32 or bfloat16 [N, own latents]; ranks with the same rows call this together.
        k: at most the number of latents of all ranks together.
    """
    kernels, here = kernels_for(z.device), min(k, z.shape[1])
    latents = kernels.topk(z, here) if here else z.new_empty(len(z), 0, dtype=torch.int64)
    candidates = z.new_full((len(z), k), -torch.inf, dtype=torch.float32)
    candidates[:, :here] = z.gather(1, latents)
    found = ranks.gather(candidates)
    chosen = torch.zeros_like(found, dtype=torch.bool).scatter_(1, kernels.topk(found, k), True)
    first = ranks.part_of_latents * k
    return _pairs(chosen[:, first : first + here], latents, z.shape[1])


def _pairs(chosen: Tensor, latents: Tensor, d_sae: int) -> Support:
    """The support of the chosen among some latents per row; both [N, k]."""
    ends = chosen.sum(1).cumsum(0)
    return Support(torch.cat([ends.new_zeros(1), ends]), latents[chosen], d_sae)


def gather_code(code: Code, d_sae: int, ranks: Ranks) -> Code:
    """The code over the latents of all ranks, without gradient, on each of them.

    Args:
        code: of this rank's latents.
        d_sae: number of latents of all ranks together.
    """
    support = code.support
    dense, most = 0.0 if support else 1.0, 0 if support is None else support.nnz
    (any_dense,) = ranks.total_over_latents(dense)
    if any_dense:
        own = [ranks.own(d_sae, part) for part in range(ranks.latents)]
        widest = max(some.stop - some.start for some in own)
        values = code.dense().detach()
        padded = torch.nn.functional.pad(values, (0, widest - values.shape[1]))
        found = ranks.gather(padded).split(widest, dim=1)
        whole = torch.cat([v[:, : o.stop - o.start] for v, o in zip(found, own, strict=True)], 1)
        return Code(whole, whole, None)
    assert support is not None
    counts = ranks.gather(torch.tensor([most], device=code.values.device)).tolist()
    room = max(counts) - support.nnz
    pairs = torch.stack([support.rows, support.latents + ranks.own(d_sae).start])
    rows, latents = _cut(ranks.gather(torch.nn.functional.pad(pairs, (0, room))), counts)
    both = torch.stack([code.values.detach(), code.pre.detach()])
    values, pre = _cut(ranks.gather(torch.nn.functional.pad(both, (0, room))), counts)
    order = torch.argsort(rows, stable=True)
    offsets = torch.searchsorted(rows[order], torch.arange(support.n_rows + 1, device=rows.device))
    return Code(values[order], pre[order], Support(offsets, latents[order], d_sae))


def _cut(padded: Tensor, counts: list[int]) -> Tensor:
    """The first counts[i] columns of each of the blocks that the tensor [m, n] is made of."""
    blocks = padded.split(max(counts), dim=1) if max(counts) else [padded]
    return torch.cat([block[:, :n] for block, n in zip(blocks, counts, strict=False)], dim=1)


def of_latents(code: Code, own: slice) -> Code:
    """The part of a code that lies on the latents of the slice, counted from its start."""
    if code.support is None:
        return Code(code.values[:, own], code.pre[:, own], None)
    support, width = code.support, own.stop - own.start
    here = (support.latents >= own.start) & (support.latents < own.stop)
    rows = torch.arange(support.n_rows + 1, device=here.device)
    offsets = torch.searchsorted(support.rows[here], rows)
    part = Support(offsets, support.latents[here] - own.start, width)
    return Code(code.values[here], code.pre[here], part)
