"""Matching pursuit: the latent that fits best, again and again. Costa et al. 2025 (2506.03093).

    r_0 = x - b_dec      i_t = argmax_i <r_t-1, d_i>,   v_t = max(<r_t-1, d_i_t>, 0)
    t = 1 ... k          r_t = r_t-1 - v_t d_i_t,       f_i = sum of v_t over the t with i_t = i

d_i are the decoder's rows, of norm 1; there is no encoder (`tied`) and no bias. Gradients go
through all residuals, to the decoder and b_dec, but not through the choice.

Cost of N rows: TopK's encoder is one product of all rows with all latents, N d_in d_sae
multiplications; this is k of them. Up to 8,192 latents, and where N k >= d_sae, it is one such
product, the inner products of all latents with each other, d_in d_sae^2, and k N d_sae additions.
Values and the backward pass take a few times k N d_in in any case.

A latent may be chosen again, so a row has k active latents or fewer; `repeats` says what happens
then. SAELens' matching pursuit stops there, and where the residual is short; its code is in raw
units, `scale` times ours.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from pydantic import NonNegativeFloat
from torch import Tensor

from saelab.kernels import Code, Support
from saelab.parts.base import Dims, Example, Form, Pursuit, Refusal, Weights
from saelab.parts.iterative import TiedPursuit, TiedPursuitConfig, row_blocks

if TYPE_CHECKING:
    pass

Repeats = Literal["allow", "stop", "exclude"]


class MatchingPursuitConfig(TiedPursuitConfig):
    """Settings of the activation.

    Args:
        k: steps, the most active latents per row; or the name of the controller that sets it.
        repeats: 'allow' takes a latent again, as the paper does; 'stop' ends a row's pursuit after
            such a step, as SAELens does; 'exclude' takes the best of the others.
        residual_threshold: a row's pursuit ends when its residual is shorter, in normalised units,
            where a centred row has the mean square d_in; 0 never ends it.
        free_norms: allows decoder rows of any norm, with the same equations.
    """

    kind: Literal["matching_pursuit"] = "matching_pursuit"
    k_means: ClassVar[str] = "steps per token, of matching pursuit"
    repeats: Repeats = "allow"
    residual_threshold: NonNegativeFloat = 0.0

    def build(self, dims: Dims) -> MatchingPursuit:
        return MatchingPursuit(self, dims)

    @classmethod
    def example(cls, d_sae: int) -> Example:
        part = cls(k=min(20, d_sae))
        return Example(part, part.companions)

    @classmethod
    def examples(cls, d_sae: int) -> tuple[Example, ...]:
        stopping = cls(k=min(20, d_sae), repeats="stop", residual_threshold=0.3)
        distinct, follower = cls(k=4, repeats="exclude"), cls(k="k")
        annealed = {"controllers": [{"kind": "annealed_k", "start": 20, "end": 16}]}
        return (
            cls.example(d_sae),
            Example(stopping, stopping.companions),
            Example(distinct, distinct.companions),
            Example(follower, {**follower.companions, **annealed}),
        )

    @classmethod
    def of_form(cls, form: Form) -> MatchingPursuitConfig | None:
        if form.pursuit is None:
            return None
        pursuit = form.pursuit
        return cls(
            k=pursuit.steps,
            repeats="stop" if pursuit.stops_at_repeats else "allow",
            residual_threshold=pursuit.residual_threshold,
            free_norms=True,
        )


class MatchingPursuit(TiedPursuit):
    def __init__(self, config: MatchingPursuitConfig, dims: Dims) -> None:
        super().__init__(config, dims)
        self.config = config

    @property
    def exact_k(self) -> bool:  # type: ignore[override]
        return self.config.repeats == "exclude" and self.config.residual_threshold == 0

    def encode(self, u: Tensor, weights: Weights) -> Code:
        latents, going = self._choose(u.detach(), weights)
        values: Tensor = _Values.apply(u, weights.W_enc, latents, going)  # type: ignore[assignment]
        if self.exact_k:
            k = latents.shape[1]
            offsets = torch.arange(0, len(u) * k + 1, k, device=u.device)
            values = values.reshape(-1)
            return Code(values, values, Support(offsets, latents.reshape(-1), self.d_sae))
        return _merged(values, latents, self.d_sae)

    @torch.no_grad()
    def _choose(self, u: Tensor, weights: Weights) -> tuple[Tensor, Tensor]:
        """Returns the latent of each step, int64 [N, k], and where a row's pursuit still goes on,
        bool [N, k]."""
        gram = weights.gram if weights.uses_gram(len(u), self.k) else None
        blocks = [self._choose_block(rows, weights.W_enc, gram) for rows in row_blocks(u)]
        latents, going = zip(*blocks, strict=True)
        return torch.cat(latents), torch.cat(going)

    def _choose_block(self, u: Tensor, w: Tensor, gram: Tensor | None) -> tuple[Tensor, Tensor]:
        config, residual, products = self.config, u, u @ w.t()
        taken = torch.zeros_like(products, dtype=torch.bool)
        on = torch.ones(len(u), dtype=torch.bool, device=u.device)
        latents, going = [], []
        for step in range(self.k):
            if step and gram is None:
                products = residual @ w.t()
            free = products.masked_fill(taken, -torch.inf) if self._excludes else products
            best = free.max(dim=1)
            value, latent = torch.relu(best.values) * on, best.indices
            latents.append(latent)
            going.append(on)
            residual = residual - value[:, None] * w[latent]
            if gram is not None:
                products = products - value[:, None] * gram[latent]
            again = taken.gather(1, latent[:, None])[:, 0] | (value <= 0)
            taken.scatter_(1, latent[:, None], True)
            if config.repeats == "stop":
                on = on & ~again
            if config.residual_threshold:
                on = on & (torch.linalg.vector_norm(residual, dim=1) >= config.residual_threshold)
        return torch.stack(latents, 1), torch.stack(going, 1)

    @property
    def _excludes(self) -> bool:
        return self.config.repeats == "exclude"

    def export(self) -> Form | Refusal:
        if self._excludes:
            return Refusal(
                "takes no latent twice (repeats = 'exclude'), and SAELens' matching pursuit may: "
                "train with 'allow' or 'stop'"
            )
        threshold = self.config.residual_threshold
        return Form(pursuit=Pursuit(self.k, threshold, self.config.repeats == "stop"))


class _Values(torch.autograd.Function):
    """Values of the steps of a pursuit whose latents are given.

    The backward pass goes the steps in reverse and gets each residual back from the next one, so
    that nothing of a step is held but its latent and its value.
    """

    @staticmethod
    def forward(ctx: Any, u: Tensor, w: Tensor, latents: Tensor, going: Tensor) -> Tensor:
        residual, values = u, []
        for latent, on in zip(latents.unbind(1), going.unbind(1), strict=True):
            row = w[latent]
            value = torch.relu(torch.linalg.vecdot(residual, row)) * on
            residual = residual - value[:, None] * row
            values.append(value)
        result = torch.stack(values, 1)
        ctx.save_for_backward(w, latents, result, residual)
        return result

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Any, ...]:
        w, latents, values, residual = ctx.saved_tensors
        g_w, g_residual = torch.zeros_like(w), torch.zeros_like(residual)
        for step in reversed(range(latents.shape[1])):
            latent, value = latents[:, step], values[:, step]
            row = w[latent]
            residual = residual + value[:, None] * row  # before the step
            g = grads[0][:, step] - torch.linalg.vecdot(g_residual, row)
            g = torch.where(value > 0, g, 0.0)
            g_w.index_add_(0, latent, g[:, None] * residual - value[:, None] * g_residual)
            g_residual = g_residual + g[:, None] * row
        return g_residual, g_w, None, None


def _merged(values: Tensor, latents: Tensor, d_sae: int) -> Code:
    """Adds up the values of a row's steps that have the same latent, and leaves out what is 0.

    Args:
        values, latents: [N, k], of each step.
    """
    first = (latents[:, :, None] == latents[:, None, :]).to(torch.uint8).argmax(2)
    sums = torch.zeros_like(values).scatter_add(1, first, values)
    active = sums.detach() > 0
    counts = active.sum(1)
    offsets = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
    chosen = sums[active]
    return Code(chosen, chosen, Support(offsets, latents[active], d_sae))
