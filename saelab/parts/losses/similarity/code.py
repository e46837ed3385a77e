"""S_act: how much the most active latents fire together.

    h_ni = (f_ni - m_i) / s_i       C_ij = mean_n h_ni h_nj
    S    = mean over i != j of C^A_ij C^B_ij       A, B the two halves of the batch

With running m and s an entry is a correlation; the product over two halves estimates its square
without the 1/N that noise adds to the square of one estimate. `constant` is the gradient with m and
s as constants, which shrinking f pays. `scale_free` is that of a standardised code:

    df = g_c - f_c <g_c, f_c> / <f_c, f_c>       g the constant gradient, c: centred over the batch

so the derivative along each latent's own scale, <df_i, f_i>, is 0.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from saelab.kernels import Code, with_gradient

Gradient = Literal["scale_free", "constant"]


@dataclass(frozen=True)
class Standard:
    """Constants that codes and products are standardised by, all without gradient.

    Args:
        mean, std: of each latent, [k].
        centre, spread: of the products of two latents, 0-dim.
    """

    mean: Tensor
    std: Tensor
    centre: Tensor
    spread: Tensor


def dense_columns(code: Code, latents: Tensor) -> Tensor:
    """The code of the given latents as dense columns, without gradient; [N, k]."""
    values, support = code.values.detach(), code.support
    if support is None:
        return values.index_select(1, latents)
    pairs, slots = _pairs_of(code, latents)
    out = values.new_zeros(support.n_rows, latents.numel())
    out[support.rows[pairs], slots] = values[pairs]
    return out


def code_similarity(
    code: Code, u: Tensor, latents: Tensor, f: Tensor, by: Standard, kind: Gradient
) -> tuple[Tensor, Tensor]:
    """S_act of the given latents.

    Args:
        u: encoder input, [N, d].
        latents: int64 [k], distinct.
        f: their `columns`.
        by: what they are standardised by.

    Returns: S_act with gradient to the code's values, and the norm of its gradient at W_enc; 0-dim.
    """
    value, constant = similarity(f, by)
    gradient = scale_free(constant, f) if kind == "scale_free" else constant
    gradient = gradient * (f != 0)
    norm = torch.linalg.vector_norm(gradient.T @ u.detach())
    return with_gradient(code.values, value, _spread(code, latents, gradient)), norm


@torch.no_grad()
def similarity(f: Tensor, by: Standard) -> tuple[Tensor, Tensor]:
    """S of columns [N, k] and its gradient with the standard as constants, [N, k]."""
    n, k = f.shape
    if n < 2 or k < 2:
        return f.new_zeros(()), torch.zeros_like(f)
    halves = torch.addcmul(-by.mean / by.std, f, 1 / by.std).tensor_split(2)
    a, b = (_entries(h, by) for h in halves)
    pairs = k * (k - 1)
    value = torch.dot(a.flatten(), b.flatten()) / pairs
    gradient = torch.empty_like(f)
    for h, other, out in zip(halves, (b, a), gradient.tensor_split(2), strict=True):
        torch.mm(h, other * (2 / (pairs * len(h)) / (by.std * by.spread)), out=out)
    return value, gradient


def scale_free(gradient: Tensor, f: Tensor) -> Tensor:
    """The gradient's part that neither shifts nor scales a column; [N, k] both."""
    n, g_mean, f_mean = len(f), gradient.mean(0), f.mean(0)
    along = (gradient * f).sum(0) - n * g_mean * f_mean
    square, limits = f.square().sum(0), torch.finfo(f.dtype)
    spread = torch.maximum(square - n * f_mean.square(), limits.eps * square)
    share = along / spread.clamp_min(limits.tiny)
    return torch.addcmul(share * f_mean - g_mean, f, share, value=-1).add_(gradient)


def product_moments(f: Tensor) -> Tensor:
    """Mean of f_i f_j and of its square over rows and pairs i != j, [2]; cost linear in k."""
    n, k = f.shape
    squares = f.square()
    first = f.sum(1).square().sum() - squares.sum()
    second = squares.sum(1).square().sum() - squares.square().sum()
    return torch.stack([first, second]) / max(1, n * k * (k - 1))


def _entries(h: Tensor, by: Standard) -> Tensor:
    """Standardised mean products over the rows of h, diagonal 0; [k, k]."""
    return ((h.T @ h / len(h) - by.centre) / by.spread).fill_diagonal_(0)


def _pairs_of(code: Code, latents: Tensor) -> tuple[Tensor, Tensor]:
    """The code's pairs with one of the latents, and the column of each."""
    assert code.support is not None
    slot = latents.new_full((code.support.d_sae,), -1)
    slot[latents] = torch.arange(latents.numel(), device=latents.device)
    slots = slot[code.support.latents]
    pairs = (slots >= 0).nonzero().flatten()
    return pairs, slots[pairs]


def _spread(code: Code, latents: Tensor, gradient: Tensor) -> Tensor:
    """Columns [N, k] at the places of the code's values, 0 at all others."""
    out = torch.zeros_like(code.values)
    if code.support is None:
        return out.index_copy_(1, latents, gradient)
    pairs, slots = _pairs_of(code, latents)
    out[pairs] = gradient[code.support.rows[pairs], slots]
    return out
