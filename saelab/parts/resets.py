"""Latents that start afresh: which, and in which directions."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import normalize

from saelab.parts.forward_pass import Pass


@dataclass(frozen=True)
class Reset:
    """Latents to start afresh.

    Args:
        latents: int64 [m].
        directions: unit vectors in normalised space, float32 [m, d_in].
        encoder_norm: norm of the new encoder rows, input scaling folded in.
    """

    latents: Tensor
    directions: Tensor
    encoder_norm: float


@torch.no_grad()
def draw_reset(p: Pass, latents: Tensor, encoder_norm: float, draw: torch.Generator) -> Reset:
    """Draws new directions: inputs in proportion to their squared error. Bricken et al. 2023.

    Args:
        latents: those that start afresh; int64 [m].
        encoder_norm: of the new encoder rows, relative to the mean norm of all others.
        draw: the part's stream.
    """
    ranks = p.sae.ranks
    first, count = ranks.before(latents.numel())
    error = _gather_rows(p, (p.target - p.recon).square().sum(1).double()).cpu()
    rows = torch.multinomial(error, count, replacement=True, generator=draw)
    rows = rows[first : first + latents.numel()].to(p.x.device)
    directions = normalize(_rows_of(p, rows) - p.sae.b_dec.detach(), dim=1)
    others = torch.ones(p.sae.local_latents, dtype=torch.bool, device=latents.device)
    others[latents] = False
    norms = torch.linalg.vector_norm(p.sae.effective_encoder(), dim=1)
    left = ranks.total_over_latents(int(others.sum()))[0]
    mean = float(ranks.mean_over_latents(norms[others] if left else norms))
    return Reset(latents, directions, encoder_norm * mean)


def _gather_rows(p: Pass, values: Tensor) -> Tensor:
    """Gathers a number of each of this rank's rows to one of each of the batch's rows."""
    if p.sae.ranks.data == 1:
        return values
    whole = values.new_zeros(p.n)
    whole[p.sae.ranks.rows(p.n)] = values
    return p.sae.ranks.over_rows(whole)


def _rows_of(p: Pass, rows: Tensor) -> Tensor:
    """Returns x of the given rows of the batch, int64 [m], whichever rank has them; [m, d_in].
    Ranks with the same latents ask for the same rows."""
    local = p.sae.ranks.rows(p.n)
    if p.sae.ranks.data == 1:
        return p.x[rows]
    here = (rows >= local.start) & (rows < local.stop)
    values = p.x.new_zeros(len(rows), p.x.shape[1])
    values[here] = p.x[rows[here] - local.start]
    return p.sae.ranks.over_rows(values)
