"""S_w: how much decoder rows point along each other. Korznikov et al. 2025 (OrtSAE).

    c_ij = <w_i, w_j> / (|w_i| |w_j|)
    mean   average of c_ij^2 over the pairs i != j that share a chunk
    max    average over rows i of max_j c_ij^2 within the row's chunk

The latents are dealt into random chunks anew each step, so the cost is linear in their number and
every pair meets in time. Any two latents are equally likely to share a chunk: the mean is unbiased
for all pairs, and using a few of the chunks is unbiased for using all. A chunk's maximum is smaller
than that of all rows; it is the statistic itself, not an estimate.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from saelab.kernels import with_gradient

Form = Literal["max", "mean"]
#: Smallest norm that is divided by: a zero row has no direction and gets no gradient.
TINY = 1e-30


def deal(n: int, size: int, draw: torch.Generator) -> list[Tensor]:
    """Random disjoint chunks of 0..n-1, as few as hold `size` each and of nearly equal length."""
    order = torch.randperm(n, generator=draw, device="cpu")
    return list(order.tensor_split(max(1, -(-n // size))))


def decoder_similarity(w: Tensor, chunks: Sequence[Tensor], form: Form) -> tuple[Tensor, Tensor]:
    """S_w over the given chunks.

    Args:
        w: decoder rows, [F, d].
        chunks: int64 indices of the rows that are compared with each other.

    Returns: S_w with gradient to w, and the norm of that gradient without; both 0-dim.
    """
    value, gradient, norm = _measured(w.detach(), chunks, form)
    return with_gradient(w, value, gradient), norm


@torch.no_grad()
def _measured(w: Tensor, chunks: Sequence[Tensor], form: Form) -> tuple[Tensor, Tensor, Tensor]:
    sizes = [len(chunk) for chunk in chunks if len(chunk) > 1]
    count = sum(sizes) if form == "max" else sum(m * (m - 1) for m in sizes)
    gradient, value, square = torch.zeros_like(w), w.new_zeros(()), w.new_zeros(())
    along = _largest if form == "max" else _average
    for chunk in chunks:
        if len(chunk) < 2:
            continue
        chunk = chunk.to(w.device)
        rows = w.index_select(0, chunk)
        norms = torch.linalg.vector_norm(rows, dim=1, keepdim=True).clamp_min_(TINY)
        unit = rows.div_(norms)
        here, g = along(unit)
        g.addcmul_(unit, torch.linalg.vecdot(g, unit).unsqueeze(1), value=-1)
        g.div_(norms * count)
        value += here
        square += g.square().sum()
        gradient[chunk] = g
    return value / max(1, count), gradient, square.sqrt()


def _largest(unit: Tensor) -> tuple[Tensor, Tensor]:
    """sum_i max_j c_ij^2 and its gradient to the unit rows [m, d]."""
    cosine = (unit @ unit.T).abs_().fill_diagonal_(-1)
    partner = cosine.argmax(1)
    other = unit.index_select(0, partner)
    c = torch.linalg.vecdot(unit, other)
    twice = (2 * c).unsqueeze(1)
    return torch.dot(c, c), (twice * other).index_add_(0, partner, twice * unit)


def _average(unit: Tensor) -> tuple[Tensor, Tensor]:
    """sum_i sum_{j != i} c_ij^2 and its gradient to the unit rows [m, d]."""
    cosine = (unit @ unit.T).fill_diagonal_(0)
    return cosine.square().sum(), 4 * (cosine @ unit)
