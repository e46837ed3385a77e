"""Codes whose latents are split over several ranks: top-k over all latents, and gathering of codes.

Ranks send N x k candidates or the pairs of a code, never anything of the size F x d.
"""

from __future__ import annotations

import torch
from torch import Tensor

from saelab.distributed.ranks import Ranks
from saelab.kernels.code import Code, Support
from saelab.kernels.table import kernels_for


def topk_over_ranks(z: Tensor, k: int, ranks: Ranks) -> Support:
    """Selects this rank's share of the k largest of each row over the latents of all ranks.

    Args:
        z: float32 or bfloat16 [N, latents of this rank]; ranks with the same rows call this
            together.
        k: at most the number of latents of all ranks together.
    """
    kernels, local_k = kernels_for(z.device), min(k, z.shape[1])
    latents = kernels.topk(z, local_k) if local_k else z.new_empty(len(z), 0, dtype=torch.int64)
    candidates = z.new_full((len(z), k), -torch.inf, dtype=torch.float32)
    candidates[:, :local_k] = z.gather(1, latents)
    gathered = ranks.gather(candidates)
    winners = kernels.topk(gathered, k)
    chosen = torch.zeros_like(gathered, dtype=torch.bool).scatter_(1, winners, True)
    first = ranks.part_of_latents * k
    return _pairs(chosen[:, first : first + local_k], latents, z.shape[1])


def _pairs(chosen: Tensor, latents: Tensor, d_sae: int) -> Support:
    """Builds a support from candidate latents of each row and which of them are chosen; [N, k]."""
    ends = chosen.sum(1).cumsum(0)
    return Support(torch.cat([ends.new_zeros(1), ends]), latents[chosen], d_sae)


def gather_code(code: Code, d_sae: int, ranks: Ranks) -> Code:
    """Gathers the code over the latents of all ranks on each of them, without gradient.

    Args:
        code: over this rank's latents.
        d_sae: number of latents of all ranks together.
    """
    support = code.support
    dense, nnz = 0.0 if support else 1.0, 0 if support is None else support.nnz
    (any_dense,) = ranks.total_over_latents(dense)
    if any_dense:
        slices = [ranks.own(d_sae, part) for part in range(ranks.latents)]
        widths = [part.stop - part.start for part in slices]
        values = code.dense().detach()
        padded = torch.nn.functional.pad(values, (0, max(widths) - values.shape[1]))
        blocks = ranks.gather(padded).split(max(widths), dim=1)
        whole = torch.cat([block[:, :n] for block, n in zip(blocks, widths, strict=True)], 1)
        return Code(whole, whole, None)
    assert support is not None
    count = torch.tensor([nnz], dtype=torch.int64, device=code.values.device)
    counts = ranks.gather(count).tolist()
    pairs = torch.stack([support.rows, support.latents + ranks.own(d_sae).start])
    rows, latents = _gather_columns(pairs, counts, ranks)
    both = torch.stack([code.values.detach(), code.pre.detach()])
    values, pre = _gather_columns(both, counts, ranks)
    order = torch.argsort(rows, stable=True)
    offsets = torch.searchsorted(rows[order], torch.arange(support.n_rows + 1, device=rows.device))
    return Code(values[order], pre[order], Support(offsets, latents[order], d_sae))


def _gather_columns(columns: Tensor, counts: list[int], ranks: Ranks) -> Tensor:
    """Joins the columns of all ranks; columns [m, counts[i]] on rank i -> [m, sum of counts]."""
    padded = torch.nn.functional.pad(columns, (0, max(counts) - columns.shape[1]))
    gathered = ranks.gather(padded)
    blocks = gathered.split(max(counts), dim=1) if max(counts) else [gathered]
    return torch.cat([block[:, :n] for block, n in zip(blocks, counts, strict=False)], dim=1)


def select_latents(code: Code, latents: slice) -> Code:
    """Returns the part of a code on the latents of the slice, which are counted from its start."""
    if code.support is None:
        return Code(code.values[:, latents], code.pre[:, latents], None)
    support, first = code.support, latents.start
    inside = (support.latents >= first) & (support.latents < latents.stop)
    rows = torch.arange(support.n_rows + 1, device=inside.device)
    offsets = torch.searchsorted(support.rows[inside], rows)
    part = Support(offsets, support.latents[inside] - first, latents.stop - first)
    return Code(code.values[inside], code.pre[inside], part)
