"""Sparse encode and decode with gradients, computed by the kernels of the tensors' device.

With the support S of a code (pairs n, i), encoder input u [N, d], W_enc and W_dec [F, d]:

    encode   z_ni = <u_n, W_enc_i> + b_i             for (n, i) in S
             dW_enc_i = sum_n g_ni u_n,   db_i = sum_n g_ni,   du_n = sum_i g_ni W_enc_i
    decode   y_n = sum_i f_ni W_dec_i
             dW_dec_i = sum_n f_ni g_n,   df_ni = <g_n, W_dec_i>

Every sum runs over S only: O(nnz * d) instead of O(N * d * F). Only the selection of S needs all
pre-activations (one GEMM). Both weight gradients use the same index, sorted by latent.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from saelab.kernels.code import Support
from saelab.kernels.table import kernels_for

#: Smallest norm that is divided by, so that a zero row has the gradient 0.
TINY = 1e-30


def preactivations(u: Tensor, w_enc: Tensor, b_enc: Tensor, dtype: torch.dtype) -> Tensor:
    """Computes all pre-activations for the selection, without gradient.

    Args:
        u: encoder input, float32 [N, d].
        w_enc: float32 [F, d].
        b_enc: float32 [F].
        dtype: the GEMM's precision; bfloat16 rounds the result to 8 bits.

    Returns: [N, F] in `dtype`.
    """
    with torch.no_grad():
        return torch.addmm(b_enc.to(dtype), u.to(dtype), w_enc.to(dtype).t())


class _EncodeAt(torch.autograd.Function):
    """Pre-activations at a support."""

    @staticmethod
    def forward(
        ctx: Any,
        u: Tensor,
        w_enc: Tensor,
        b_enc: Tensor,
        centre: Tensor | None,
        support: Support,
        z: Tensor | None,
    ) -> Tensor:
        ctx.save_for_backward(u, w_enc)
        ctx.support = support
        if z is not None and z.dim() == 1:
            return z
        if z is not None and z.dtype == u.dtype:
            return z.reshape(-1).take(support.flat)
        kernels = kernels_for(u.device)
        return kernels.encode(u, w_enc, b_enc, support)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Any, ...]:
        g = grads[0].contiguous()
        u, w_enc = ctx.saved_tensors
        support: Support = ctx.support
        kernels = kernels_for(u.device)
        needs_u, needs_w, needs_b, needs_centre = ctx.needs_input_grad[:4]
        g_u = g_w = g_b = g_centre = None
        if needs_u:
            g_u = kernels.decode(g, w_enc, support)
        if needs_w or needs_b or needs_centre:
            g_w, g_b = kernels.encode_backward(g, u, support)
        if needs_centre and g_b is not None:
            g_centre = -torch.mv(w_enc.t(), g_b)
        return g_u, g_w if needs_w else None, g_b if needs_b else None, g_centre, None, None


class _EncodeAll(torch.autograd.Function):
    """All pre-activations."""

    @staticmethod
    def forward(ctx: Any, u: Tensor, w_enc: Tensor, b_enc: Tensor, centre: Tensor | None) -> Tensor:
        ctx.save_for_backward(u, w_enc)
        return torch.addmm(b_enc, u, w_enc.t())

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Any, ...]:
        (g,) = grads
        u, w_enc = ctx.saved_tensors
        needs_u, needs_w, needs_b, needs_centre = ctx.needs_input_grad
        g_b = g.sum(0) if needs_b or needs_centre else None
        return (
            g @ w_enc if needs_u else None,
            g.t() @ u if needs_w else None,
            g_b if needs_b else None,
            -torch.mv(w_enc.t(), g_b) if needs_centre and g_b is not None else None,
        )


class _Decode(torch.autograd.Function):
    """Weighted sums of decoder rows, and the norms of these rows if they are given."""

    @staticmethod
    def forward(
        ctx: Any, values: Tensor, w_dec: Tensor, support: Support, norms: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        ctx.save_for_backward(values, w_dec, norms)
        ctx.support = support
        ctx.set_materialize_grads(False)
        return kernels_for(w_dec.device).decode(values, w_dec, support), norms

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Any, ...]:
        values, w_dec, norms = ctx.saved_tensors
        g, g_norms = grads
        shares = None if g_norms is None else g_norms / norms.clamp_min(TINY)
        if g is None:
            return None, None if shares is None else w_dec * shares[:, None], None, None
        kernels = kernels_for(w_dec.device)
        g_values, g_w = kernels.decode_backward(g.contiguous(), values, w_dec, ctx.support, shares)
        needs_values, needs_w = ctx.needs_input_grad[:2]
        return g_values if needs_values else None, g_w if needs_w else None, None, None


def encode_at(
    u: Tensor,
    w_enc: Tensor,
    b_enc: Tensor,
    support: Support,
    z: Tensor | None = None,
    centre: Tensor | None = None,
) -> Tensor:
    """Computes pre-activations at the support, float32 [nnz], with gradients to u, W_enc and b_enc.

    Args:
        z: [N, F]; if it has u's dtype (float32 mode), its entries are used instead of new products.
            Or the values themselves, [nnz].
        centre: [d], if u is x - centre, detached: the gradient of the centre is then
            -(sum_n g_n) W_enc, one product with W_enc instead of a gather.
    """
    return _EncodeAt.apply(u, w_enc, b_enc, centre, support, z)  # type: ignore[return-value]


def encode_all(u: Tensor, w_enc: Tensor, b_enc: Tensor, centre: Tensor | None = None) -> Tensor:
    """Computes all pre-activations, float32 [N, F]; gradients and `centre` as in `encode_at`."""
    return _EncodeAll.apply(u, w_enc, b_enc, centre)  # type: ignore[return-value]


def decode_at(values: Tensor, w_dec: Tensor, support: Support) -> Tensor:
    """Computes weighted sums of decoder rows, [N, d], with gradients to values and W_dec."""
    return _Decode.apply(values, w_dec, support, None)[0]  # type: ignore[index]


def decode_with_norms(values: Tensor, w_dec: Tensor, support: Support) -> tuple[Tensor, Tensor]:
    """Computes `decode_at` and the norms of the decoder rows [F], whose gradient to W_dec needs no
    further pass over it. A zero row gets no gradient from its norm."""
    norms = torch.linalg.vector_norm(w_dec.detach(), dim=1)
    return _Decode.apply(values, w_dec, support, norms)  # type: ignore[return-value]


class _MeanSquare(torch.autograd.Function):
    """The mean squared difference of two tensors."""

    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor) -> Tensor:
        difference = a - b
        ctx.save_for_backward(difference)
        flat = difference.view(-1)
        return torch.dot(flat, flat) / flat.numel()

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Any, ...]:
        (difference,) = ctx.saved_tensors
        g = difference * (grads[0] * (2 / difference.numel()))
        needs_a, needs_b = ctx.needs_input_grad
        return g if needs_a else None, -g if needs_b else None


def mean_square(a: Tensor, b: Tensor) -> Tensor:
    """Computes the mean of (a - b)^2 over all entries; a and b have one shape."""
    return _MeanSquare.apply(a, b)  # type: ignore[return-value]


class _WithGradient(torch.autograd.Function):
    """A value whose gradient was computed together with it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, value: Tensor, gradient: Tensor) -> Tensor:
        ctx.save_for_backward(gradient)
        return value.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Any, ...]:
        (gradient,) = ctx.saved_tensors
        return gradient * grads[0], None, None


def with_gradient(x: Tensor, value: Tensor, gradient: Tensor) -> Tensor:
    """Returns the 0-dim `value` as a function of x with the given gradient, of the shape of x."""
    return _WithGradient.apply(x, value, gradient)  # type: ignore[return-value]


class _RowNorms(torch.autograd.Function):
    """Norms of the rows of a matrix."""

    @staticmethod
    def forward(ctx: Any, w: Tensor) -> Tensor:
        norms = torch.linalg.vector_norm(w, dim=1)
        ctx.save_for_backward(w, norms)
        return norms

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        (g,) = grads
        w, norms = ctx.saved_tensors
        return w * (g / norms.clamp_min(TINY)).unsqueeze(1)


def row_norms(w: Tensor) -> Tensor:
    """Computes |w_i| of each row, [F, d] -> [F]; the gradient takes one pass over w, and is 0 at a
    zero row."""
    return _RowNorms.apply(w)  # type: ignore[return-value]
