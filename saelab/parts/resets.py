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
        directions: of the encoder rows, unit vectors in normalised space, float32 [m, d_in].
        encoder_norm: norm of the new encoder rows, input scaling folded in.
        decoder_directions: of the decoder rows, [m, d_out]; None where they are the same.
    """

    latents: Tensor
    directions: Tensor
    encoder_norm: float
    decoder_directions: Tensor | None = None


@torch.no_grad()
def draw_reset(p: Pass, latents: Tensor, encoder_norm: float, draw: torch.Generator) -> Reset:
    """Draws new directions: inputs in proportion to their squared error. Bricken et al. 2023.

    A latent that reconstructs other activations than it reads gets both of the drawn row.

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
    b_dec = p.sae.b_dec.detach()
    centre = p.sae.encoder_centre if p.sae.has_target else b_dec
    directions = normalize(_rows_of(p, p.x, rows) - centre, dim=1)
    outward = normalize(_rows_of(p, p.target, rows) - b_dec, dim=1) if p.sae.has_target else None
    others = torch.ones(p.sae.local_latents, dtype=torch.bool, device=latents.device)
    others[latents] = False
    norms = torch.linalg.vector_norm(p.sae.effective_encoder(), dim=1)
    left = ranks.total_over_latents(int(others.sum()))[0]
    mean = float(ranks.mean_over_latents(norms[others] if left else norms))
    return Reset(latents, directions, encoder_norm * mean, outward)


def _gather_rows(p: Pass, values: Tensor) -> Tensor:
    """Gathers a number of each of this rank's rows to one of each of the batch's rows."""
    if p.sae.ranks.data == 1:
        return values
    whole = values.new_zeros(p.n)
    whole[p.sae.ranks.rows(p.n)] = values
    return p.sae.ranks.over_rows(whole)


def _rows_of(p: Pass, x: Tensor, rows: Tensor) -> Tensor:
    """Returns the given rows of the batch, int64 [m], whichever rank has them; [m, d]. Ranks with
    the same latents ask for the same rows.

    Args:
        x: this rank's rows of the batch, [n, d].
    """
    local = p.sae.ranks.rows(p.n)
    if p.sae.ranks.data == 1:
        return x[rows]
    here = (rows >= local.start) & (rows < local.stop)
    values = x.new_zeros(len(rows), x.shape[1])
    values[here] = x[rows[here] - local.start]
    return p.sae.ranks.over_rows(values)
