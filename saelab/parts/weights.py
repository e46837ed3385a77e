"""The matrices of an SAE, for activations whose code is computed from them."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

#: The most latents whose inner products with each other are held: 256 MiB in float32.
MOST_IN_GRAM = 8192


@dataclass(frozen=True, eq=False)
class Weights:
    """Parameters of an SAE, in normalised space; not copies.

    Args:
        W_enc, W_dec: float32 [d_sae, d_in]; row i belongs to latent i.
        b_enc: [d_sae].
    """

    W_enc: Tensor
    b_enc: Tensor
    W_dec: Tensor

    @cached_property
    def gram(self) -> Tensor:
        """Inner products of the encoder's rows, without gradient; [d_sae, d_sae]. They are those of
        the decoder's rows where the two are tied."""
        rows = self.W_enc.detach()
        return torch.mm(rows, rows.t())

    def uses_gram(self, n_rows: int, steps: int) -> bool:
        """Says whether `gram` saves more than it costs: it takes d_sae^2 d_in multiplications, and
        saves one product of the rows with the decoder, n_rows d_sae d_in, at each step."""
        d_sae = len(self.W_enc)
        return d_sae <= min(MOST_IN_GRAM, n_rows * steps)
