"""Pairs of a row and a latent that rounding may switch: no two paths need to agree on them."""

from __future__ import annotations

import torch
from torch import Tensor

from saelab.sae import SAE
from saelab.seeding import torch_stream

#: Random directions in which the pre-activations are moved. Two that exchange their ranks move
#: towards each other in a quarter of these: all miss it with a chance of 1e-4.
DIRECTIONS = 32


@torch.no_grad()
def near_a_boundary(sae: SAE, x: Tensor, by: float = 1e-5) -> Tensor:
    """Returns the pairs whose code appears or disappears when pre-activations move a little.

    Args:
        sae: in training or evaluation mode, whose activation sees nothing but pre-activations.
        x: raw activations, [n, d_in].
        by: how far every pre-activation moves, either way.

    Returns: bool [n, d_sae].
    """
    z = sae.encoder_input(x) @ sae.W_enc.T + sae.b_enc
    on = sae.activation.dense(z) != 0
    near = torch.zeros_like(on)
    for i in range(DIRECTIONS):
        sign = torch.randn(z.shape, generator=torch_stream(i, "near"), dtype=z.dtype).sign()
        near |= (sae.activation.dense(z + by * sign) != 0) != on
    return near
