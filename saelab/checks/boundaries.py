"""Pairs of a row and a latent that rounding may switch: no two paths need to agree on them."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from saelab.sae import SAE
from saelab.seeding import torch_stream

#: Random directions in which the pre-activations are moved. Two that exchange their ranks move
#: towards each other in a quarter of these: all miss it with a chance of 1e-4.
DIRECTIONS = 32


@torch.no_grad()
def near_a_boundary(sae: SAE, x: Tensor, by: float = 1e-5) -> Tensor:
    """Returns the pairs whose code appears or disappears when pre-activations move a little, or the
    encoder's input where the activation `uses_weights`.

    Args:
        sae: in training or evaluation mode.
        x: raw activations, [n, d_in].
        by: how far every pre-activation, or entry of the input, moves, either way.

    Returns: bool [n, d_sae].
    """
    start, code = sae.encoder_input(x), _code_of_input(sae)
    if not sae.activation.uses_weights:
        start, code = start @ sae.W_enc.T + sae.b_enc, sae.activation.dense
    on = code(start) != 0
    near = torch.zeros_like(on)
    for i in range(DIRECTIONS):
        sign = torch.randn(start.shape, generator=torch_stream(i, "near"), dtype=start.dtype).sign()
        near |= (code(start + by * sign) != 0) != on
    return near


def _code_of_input(sae: SAE) -> Callable[[Tensor], Tensor]:
    """Returns the function from the encoder's input to the dense code."""
    weights = sae.weights()
    return lambda u: sae.activation.encode(u, weights).dense()
