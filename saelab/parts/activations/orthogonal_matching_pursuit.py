"""Orthogonal matching pursuit: every step fits all chosen latents again. Pati et al. 1993.

    i_t = argmax_i |<r_t-1, d_i>| over latents not chosen before
    f   = argmin |x - b_dec - sum_s f_s d_i_s|^2 over i_1 ... i_t,    r_t what is left over

d_i are the decoder's rows, of norm 1; there is no encoder (`tied`) and no bias. Values take both
signs, as least squares give them. Gradients are those of the least squares on the chosen latents,
to the decoder and b_dec, but not through the choice.

Cost of N rows: k products of all rows with all latents, k N d_in d_sae multiplications, where
TopK's encoder is one. Keeping the chosen latents orthogonal and fitting them takes about
3 N k^2 d_in and N k^3 / 3 more; the backward pass is that of TopK.

A latent that the chosen ones explain, to 1e-2 of its length, is left at 0, so at most d_in latents
of a row are active. The pursuit of
overcomplete is another one: not negative, ten projected gradient steps in place of least squares,
and no gradient of the code; SAELens has none.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

import torch
from torch import Tensor

from saelab.kernels import Code, decode_at, encode_at, support_of_topk
from saelab.parts.base import Dims, Example, Refusal, Weights
from saelab.parts.iterative import ROWS_AT_ONCE, TiedPursuit, TiedPursuitConfig, row_blocks

if TYPE_CHECKING:
    pass

#: Share of a latent's squared length that must be left over from the chosen ones to fit it too.
LEFT_OVER = 1e-4
#: Smallest squared length that is divided by.
TINY = 1e-30


class OrthogonalMatchingPursuitConfig(TiedPursuitConfig):
    """Settings of the activation.

    Args:
        k: active latents per row, or the name of the controller that sets it.
        free_norms: allows decoder rows of any norm, with the same equations.
    """

    kind: Literal["orthogonal_matching_pursuit"] = "orthogonal_matching_pursuit"
    k_means: ClassVar[str] = "latents per token, of orthogonal matching pursuit"

    def build(self, dims: Dims) -> OrthogonalMatchingPursuit:
        return OrthogonalMatchingPursuit(self, dims)

    @classmethod
    def example(cls, d_sae: int) -> Example:
        part = cls(k=2)
        return Example(part, part.companions)

    @classmethod
    def examples(cls, d_sae: int) -> tuple[Example, ...]:
        several, follower = cls(k=4), cls(k="k")
        annealed = {"controllers": [{"kind": "annealed_k", "start": 6, "end": 2}]}
        return (
            cls.example(d_sae),
            Example(several, several.companions),
            Example(follower, {**follower.companions, **annealed}),
        )


class OrthogonalMatchingPursuit(TiedPursuit):
    exact_k: ClassVar[bool] = True
    signed: ClassVar[bool] = True

    def encode(self, u: Tensor, weights: Weights) -> Code:
        w = weights.W_enc
        latents, fits = self._choose(u.detach(), w.detach())
        support = support_of_topk(latents, self.d_sae)
        values, factor = _fit(u.detach(), w.detach(), latents, fits)
        # one Newton step from the solution: its gradient is that of the least squares
        left = u - decode_at(values.reshape(-1), w, support)
        products = encode_at(left, w, w.new_zeros(len(w)), support).view_as(values)
        values = values + _solve(products * fits, factor) * fits
        values = values.reshape(-1)
        return Code(values, values, support)

    @torch.no_grad()
    def _choose(self, u: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
        """Returns the latents of each row in rising order, int64 [N, k], and which of them are not
        explained by those chosen before, bool [N, k]."""
        blocks = [self._choose_block(rows, w) for rows in row_blocks(u)]
        latents, fits = (torch.cat(parts) for parts in zip(*blocks, strict=True))
        latents, order = latents.sort(dim=1)
        return latents, fits.gather(1, order)

    def _choose_block(self, u: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
        residual, basis = u, u.new_zeros(len(u), self.k, u.shape[1])
        taken = torch.zeros(len(u), len(w), dtype=torch.bool, device=u.device)
        latents, fits = [], []
        for step in range(self.k):
            sizes = (residual @ w.t()).abs_().masked_fill_(taken, -1)
            latent = sizes.argmax(1)
            taken.scatter_(1, latent[:, None], True)
            row = w[latent]
            new = _orthogonal(_orthogonal(row, basis[:, :step]), basis[:, :step])
            left, whole = new.square().sum(1), row.square().sum(1)
            fit = left > LEFT_OVER * whole
            unit = torch.where(fit[:, None], new * left.clamp_min(TINY).rsqrt()[:, None], 0.0)
            basis[:, step] = unit
            residual = residual - torch.linalg.vecdot(residual, unit)[:, None] * unit
            latents.append(latent)
            fits.append(fit)
        return torch.stack(latents, 1), torch.stack(fits, 1)

    def export(self) -> Refusal:
        return Refusal(
            "is an orthogonal matching pursuit, which no other tool that is written has: it stays "
            "in saelab's own format"
        )


def _orthogonal(rows: Tensor, basis: Tensor) -> Tensor:
    """Takes from each row [n, d] its part in the span of its orthonormal basis [n, m, d]."""
    along = torch.bmm(basis, rows[:, :, None])
    return rows - torch.bmm(basis.transpose(1, 2), along)[:, :, 0]


@torch.no_grad()
def _fit(u: Tensor, w: Tensor, latents: Tensor, fits: Tensor) -> tuple[Tensor, Tensor]:
    """Fits each row of u by its latents; 0 for those that do not take part.

    Returns: values [N, k], and the Cholesky factors of the latents' inner products [N, k, k].
    """
    values, factors = [], []
    blocks = zip(row_blocks(u), latents.split(ROWS_AT_ONCE), fits.split(ROWS_AT_ONCE), strict=True)
    for rows, chosen, fit in blocks:
        atoms = w[chosen] * fit[:, :, None]
        gram = torch.bmm(atoms, atoms.transpose(1, 2)) + torch.diag_embed((~fit).to(w.dtype))
        factor = torch.linalg.cholesky(gram)
        factors.append(factor)
        values.append(_solve(torch.bmm(atoms, rows[:, :, None])[:, :, 0], factor))
    return torch.cat(values), torch.cat(factors)


def _solve(products: Tensor, factor: Tensor) -> Tensor:
    """Solves L L^T f = products of each row; [N, k], with gradients to the products."""
    return torch.cholesky_solve(products[:, :, None], factor)[:, :, 0]
