"""ISTA: steps of iterative soft thresholding from the SAE's own code. Gregor & LeCun 2010.

    f_0 = max(W_enc u + b_enc, 0)                                                   u = x - b_dec
    f_t = max(f_t-1 + eta (W_enc (u - f_t-1 W_dec) + b_enc), 0)             t = 1 ... steps

The code is f_steps. With W_enc = W_dec (`tied`) a step is ISTA's for the penalty -b_enc of the
code; with an encoder of its own it is a layer of their LISTA, whose layers share their weights and
whose S = I - eta W_enc W_dec is not trained apart. Gradients go through all steps.

Their network starts at f = 0; that this one starts at the SAE's own code, with one or a few steps,
is our choice. The L0 follows from a penalty. eta above 2 / (largest eigenvalue of W_enc W_dec)
makes steps grow.

Cost of N rows: 1 + 2 steps products of all rows with all latents, N d_in d_sae multiplications
each, where ReLU's encoder is one; the backward pass takes twice as many, dense, and holds the code
of every step.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

import torch
from pydantic import PositiveFloat, PositiveInt
from torch import Tensor

from saelab.kernels import Code, support_above
from saelab.parts.base import Activation, Dims, Example, PartConfig, Refusal, Weights
from saelab.parts.iterative import check_decoder_space

if TYPE_CHECKING:
    from saelab.sae import SAE


class ISTAConfig(PartConfig):
    """steps: after the first code; step_size: eta."""

    kind: Literal["ista"] = "ista"
    steps: PositiveInt = 1
    step_size: PositiveFloat = 0.1

    def build(self, dims: Dims) -> ISTA:
        return ISTA(self)

    @classmethod
    def examples(cls, d_sae: int) -> tuple[Example, ...]:
        return Example(cls()), Example(cls(steps=3, step_size=0.03))

    @property
    def takes_initial_l0(self) -> bool:
        return False


class ISTA(Activation):
    uses_weights: ClassVar[bool] = True
    shardable = "rows"

    def __init__(self, config: ISTAConfig) -> None:
        super().__init__()
        self.config = config

    def check(self, sae: SAE) -> None:
        check_decoder_space(self.config.kind, sae)

    def encode(self, u: Tensor, weights: Weights) -> Code:
        w, b = weights.W_enc, weights.b_enc
        f = torch.relu(torch.addmm(b, u, w.t()))
        for _ in range(self.config.steps):
            left = torch.addmm(u, f, weights.W_dec, alpha=-1)
            f = torch.relu(f + self.config.step_size * torch.addmm(b, left, w.t()))
        support = support_above(f.detach())
        values = f if support is None else f.reshape(-1).index_select(0, support.flat)
        return Code(values, values, support)

    def raise_thresholds(self, by: float, bias: Tensor | None) -> bool:
        if bias is None:
            return False
        bias.sub_(by)
        return True

    def export(self) -> Refusal:
        return Refusal(
            "takes steps back from the reconstruction, which no other tool does: it stays in "
            "saelab's own format"
        )
