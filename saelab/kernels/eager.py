"""Sparse encode and decode in plain torch, with their gradients: the reference implementation.

With the support S of a code (pairs n, i), encoder input u [N, d], W_enc and W_dec [F, d]:

    encode   z_ni = <u_n, W_enc_i> + b_i             for (n, i) in S
             dW_enc_i = sum_n g_ni u_n,   db_i = sum_n g_ni,   du_n = sum_i g_ni W_enc_i
    decode   y_n = sum_i f_ni W_dec_i
             dW_dec_i = sum_n f_ni g_n,   df_ni = <g_n, W_dec_i>

Every sum runs over S only: O(nnz * d) instead of O(N * d * F). Only the selection of S needs all
pre-activations (one GEMM). Both weight gradients use the one index sorted by latent.
"""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import embedding_bag

from saelab.kernels.code import Support

# Torch says so at the first sampled product; tests compare that product with dense autograd.
warnings.filterwarnings("ignore", message="Sparse CSR tensor support is in beta")

#: Pairs per slice where a gather is needed (devices without a sampled product): bounds memory.
SLICE = 1 << 16


def preactivations(u: Tensor, w_enc: Tensor, b_enc: Tensor, dtype: torch.dtype) -> Tensor:
    """All pre-activations for the selection, without gradient.

    Args:
        u: encoder input, float32 [N, d].
        w_enc: float32 [F, d].
        b_enc: float32 [F].
        dtype: the GEMM's precision; bfloat16 rounds the result to 8 bits.

    Returns: [N, F] in `dtype`.
    """
    with torch.no_grad():
        return torch.addmm(b_enc.to(dtype), u.to(dtype), w_enc.to(dtype).t())


def inner_products(a: Tensor, b: Tensor, support: Support) -> Tensor:
    """<a_row, b_latent> for every pair of the support; a [N, d], b [F, d] -> [nnz]."""
    if a.device.type == "cpu" and torch.backends.mkl.is_available() and support.nnz:
        pattern = torch.sparse_csr_tensor(
            support.offsets,
            support.latents,
            a.new_zeros(support.nnz),
            size=(support.n_rows, support.d_sae),
            check_invariants=False,
        )
        return torch.sparse.sampled_addmm(pattern, a, b.t(), beta=0.0).values()
    pieces = [
        torch.linalg.vecdot(a.index_select(0, rows), b.index_select(0, latents))
        for rows, latents in zip(
            support.rows.split(SLICE), support.latents.split(SLICE), strict=True
        )
    ]
    return torch.cat(pieces) if pieces else a.new_zeros(0)


def combine(weights: Tensor, index: Tensor, offsets: Tensor, table: Tensor) -> Tensor:
    """Per bag the weighted sum of rows of `table`; weights, index [nnz] -> [bags, d]."""
    if not index.numel():
        return table.new_zeros(offsets.numel() - 1, table.shape[1])
    return embedding_bag(
        index, table, offsets, per_sample_weights=weights, mode="sum", include_last_offset=True
    )


class _EncodeAt(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, u: Tensor, w_enc: Tensor, b_enc: Tensor, support: Support, z: Tensor | None
    ) -> Tensor:
        ctx.save_for_backward(u, w_enc)
        ctx.support = support
        if z is not None and z.dtype == u.dtype:
            return z.reshape(-1).take(support.flat)
        return inner_products(u, w_enc, support) + b_enc[support.latents]

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Any, ...]:
        (g,) = grads
        u, w_enc = ctx.saved_tensors
        support: Support = ctx.support
        g_u = g_w = g_b = None
        if ctx.needs_input_grad[0]:
            g_u = combine(g, support.latents, support.offsets, w_enc)
        if ctx.needs_input_grad[1]:
            order, rows, offsets = support.by_latent
            g_w = combine(g[order], rows, offsets, u)
        if ctx.needs_input_grad[2]:
            g_b = torch.zeros_like(w_enc[:, 0]).index_add_(0, support.latents, g)
        return g_u, g_w, g_b, None, None


class _Decode(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor, w_dec: Tensor, support: Support) -> Tensor:
        ctx.save_for_backward(values, w_dec)
        ctx.support = support
        return combine(values, support.latents, support.offsets, w_dec)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Any, ...]:
        (g,) = grads
        values, w_dec = ctx.saved_tensors
        support: Support = ctx.support
        g_values = g_w = None
        if ctx.needs_input_grad[0]:
            g_values = inner_products(g.contiguous(), w_dec, support)
        if ctx.needs_input_grad[1]:
            order, rows, offsets = support.by_latent
            g_w = combine(values[order], rows, offsets, g.contiguous())
        return g_values, g_w, None


def encode_at(
    u: Tensor, w_enc: Tensor, b_enc: Tensor, support: Support, z: Tensor | None = None
) -> Tensor:
    """Pre-activations at the support, float32 [nnz], with gradients to u, W_enc and b_enc.

    `z` [N, F] saves the products when it has them in u's dtype already (float32 mode).
    """
    return _EncodeAt.apply(u, w_enc, b_enc, support, z)  # type: ignore[return-value]


def decode_at(values: Tensor, w_dec: Tensor, support: Support) -> Tensor:
    """Weighted sums of decoder rows, [N, d], with gradients to values and W_dec."""
    return _Decode.apply(values, w_dec, support)  # type: ignore[return-value]


class _RowNorms(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, w: Tensor) -> Tensor:
        norms = torch.linalg.vector_norm(w, dim=1)
        ctx.save_for_backward(w, norms)
        return norms

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        (g,) = grads
        w, norms = ctx.saved_tensors
        return w * (g / norms.clamp_min(1e-30)).unsqueeze(1)


def row_norms(w: Tensor) -> Tensor:
    """|w_i| of each row, [F, d] -> [F]; its gradient in one pass over w, and 0 at a zero row."""
    return _RowNorms.apply(w)  # type: ignore[return-value]
