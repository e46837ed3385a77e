"""The kernels for GPUs, in Triton; imported only by `table`, and only if Triton is installed.

Checked against `eager` in Triton's interpreter and compiled for sm_80 and sm_90; not yet run on a
GPU. Each output element is computed by one program in a fixed order, without atomics, so that the
same tensors give the same bits; tile sizes follow from the shapes, never from a timing. Values are
float32 and are added in float32. Other dtypes are left to `eager`, and so are the selections and
the counts, which are already exact and fast in torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import triton  # type: ignore[import-not-found]
import triton.language as tl  # type: ignore[import-not-found]
from torch import Tensor
from triton import knobs  # type: ignore[import-not-found]

from saelab.kernels import eager
from saelab.kernels.eager import (
    above,
    by_latent,
    firings,
    gram_product,
    kth_largest,
    normalise,
    project_out,
    topk,
    trace_above,
)

if TYPE_CHECKING:
    from saelab.kernels.code import Support

__all__ = [
    "above",
    "by_latent",
    "decode",
    "decode_backward",
    "encode",
    "encode_backward",
    "firings",
    "gram_product",
    "kth_largest",
    "normalise",
    "pool",
    "project_out",
    "topk",
    "trace_above",
    "unavailable_reason",
]

#: Pairs that a program gathers at once, the most columns of their rows, and latents pooled at once.
#: Our choice, not tuned on a GPU: 16 floats of a tile per thread at Triton's four warps.
PAIRS, WIDEST, LATENTS = 8, 256, 128


def unavailable_reason() -> str:
    """Returns why Triton can't start kernels, '' if it can: it needs a driver and a C compiler."""
    if knobs.runtime.interpret:
        return ""
    try:
        triton.runtime.driver.active.get_current_target()
    except Exception as error:  # driver, compiler and loader may raise anything
        return f"{type(error).__name__}: {error}"
    return ""


@triton.jit
def _bags_kernel(
    weights, order, index, offsets, table, out, totals, d, PAIRS: tl.constexpr, WIDTH: tl.constexpr
):
    """Computes WIDTH columns of out[bag] = sum_j weights[order[j]] * table[index[j]], and the sum
    of the weights.

    Without `order` the weights are in the order of the pairs; without `totals` no sum is stored.
    """
    bag = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
    valid = columns < d
    end = tl.load(offsets + bag + 1)
    parts = tl.zeros([PAIRS, WIDTH], tl.float32)
    weight_parts = tl.zeros([PAIRS], tl.float32)
    for start in range(tl.load(offsets + bag), end, PAIRS):
        pair = start + tl.arange(0, PAIRS)
        exists = pair < end
        row = tl.load(index + pair, mask=exists, other=0)
        place = pair if order is None else tl.load(order + pair, mask=exists, other=0)
        weight = tl.load(weights + place, mask=exists, other=0.0)
        piece = tl.load(
            table + row[:, None] * d + columns[None, :],
            mask=exists[:, None] & valid[None, :],
            other=0.0,
        )
        parts += weight[:, None] * piece
        weight_parts += weight
    tl.store(out + bag * d + columns, tl.sum(parts, axis=0), mask=valid)
    if totals is not None and tl.program_id(1) == 0:
        tl.store(totals + bag, tl.sum(weight_parts, axis=0))


@triton.jit(do_not_specialize=["nnz"])
def _products_kernel(
    u, w, bias, rows, latents, out, nnz, d, PAIRS: tl.constexpr, WIDTH: tl.constexpr
):
    """Computes PAIRS times out[j] = <u[rows[j]], w[latents[j]]>, plus bias[latents[j]] if given."""
    pair = tl.program_id(0).to(tl.int64) * PAIRS + tl.arange(0, PAIRS)
    exists = pair < nnz
    row = tl.load(rows + pair, mask=exists, other=0)
    latent = tl.load(latents + pair, mask=exists, other=0)
    parts = tl.zeros([PAIRS, WIDTH], tl.float32)
    for start in range(0, d, WIDTH):
        columns = start + tl.arange(0, WIDTH)
        valid = exists[:, None] & (columns < d)[None, :]
        one = tl.load(u + row[:, None] * d + columns[None, :], mask=valid, other=0.0)
        other = tl.load(w + latent[:, None] * d + columns[None, :], mask=valid, other=0.0)
        parts += one * other
    products = tl.sum(parts, axis=1)
    if bias is not None:
        products += tl.load(bias + latent, mask=exists, other=0.0)
    tl.store(out + pair, products, mask=exists)


@triton.jit
def _pool_kernel(values, order, bounds, sums, d_sae, LATENTS: tl.constexpr):
    """Adds to one segment's sums, for LATENTS latents, values[order[j]] of the pairs between
    bounds[segment] and bounds[segment + 1] of each latent."""
    segment = tl.program_id(0).to(tl.int64)
    latent = tl.program_id(1) * LATENTS + tl.arange(0, LATENTS)
    exists = latent < d_sae
    place = segment * d_sae + latent
    pair = tl.load(bounds + place, mask=exists, other=0)
    end = tl.load(bounds + place + d_sae, mask=exists, other=0)
    total = tl.load(sums + place, mask=exists, other=0.0)
    for _ in range(tl.max(end - pair, axis=0)):
        more = pair < end
        value = tl.load(values + tl.load(order + pair, mask=more, other=0), mask=more, other=0.0)
        total += value
        pair += 1
    tl.store(sums + place, total, mask=exists)


def encode(u: Tensor, w: Tensor, bias: Tensor | None, support: Support) -> Tensor:
    """Computes `eager.encode`."""
    if u.dtype != torch.float32:
        return eager.encode(u, w, bias, support)
    out = u.new_empty(support.nnz)
    if not out.numel():
        return out
    u, w, bias = u.contiguous(), w.contiguous(), None if bias is None else bias.contiguous()
    d = u.shape[1]
    tiles = {"PAIRS": PAIRS, "WIDTH": _width(d)}
    places = support.rows, support.latents
    grid = (_tiles(support.nnz, PAIRS),)
    _start(_products_kernel, grid, u, w, bias, *places, out, support.nnz, d, **tiles)
    return out


def encode_backward(g: Tensor, u: Tensor, support: Support) -> tuple[Tensor, Tensor]:
    """Computes `eager.encode_backward`, both results from one read of g."""
    if u.dtype != torch.float32:
        return eager.encode_backward(g, u, support)
    order, rows, starts = support.by_latent
    g_b = g.new_empty(support.d_sae)
    return _bags(g, order, rows, starts, u, g_b), g_b


def decode(values: Tensor, w: Tensor, support: Support) -> Tensor:
    """Computes `eager.decode`."""
    if w.dtype != torch.float32:
        return eager.decode(values, w, support)
    return _bags(values, None, support.latents, support.offsets, w)


def decode_backward(
    g: Tensor, values: Tensor, w: Tensor, support: Support, shares: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Computes `eager.decode_backward`."""
    if w.dtype != torch.float32:
        return eager.decode_backward(g, values, w, support, shares)
    order, rows, starts = support.by_latent
    g = g.contiguous()
    g_w = _bags(values, order, rows, starts, g)
    if shares is not None:
        g_w.addcmul_(w, shares[:, None])
    return encode(g, w, None, support), g_w


def pool(values: Tensor, support: Support, cuts: Tensor, sums: Tensor) -> None:
    """Computes `eager.pool` latent by latent, because torch would add in no fixed order."""
    if values.dtype != torch.float32 or not sums.is_contiguous():
        eager.pool(values, support, cuts, sums)
        return
    if not sums.numel() or not support.nnz:
        return
    order, rows, _ = support.by_latent
    latents = torch.arange(support.d_sae, device=sums.device)
    pairs = torch.add(rows, support.latents[order], alpha=support.n_rows)
    ends = torch.add(cuts.to(sums.device).unsqueeze(1), latents, alpha=support.n_rows)
    bounds = torch.searchsorted(pairs, ends)  # [segments + 1, F]
    grid = sums.shape[0], _tiles(support.d_sae, LATENTS)
    values, d_sae = values.contiguous(), support.d_sae
    _start(_pool_kernel, grid, values, order, bounds, sums, d_sae, LATENTS=LATENTS)


def _bags(
    weights: Tensor,
    order: Tensor | None,
    index: Tensor,
    offsets: Tensor,
    table: Tensor,
    totals: Tensor | None = None,
) -> Tensor:
    """Computes the weighted sum of rows of `table` in each bag.

    Args:
        weights: [nnz], in the order of the pairs; `order` sorts them like `index`.
        order: int64 [nnz]; None if the weights are already sorted.
        index: rows of `table`, int64 [nnz], sorted by bag.
        offsets: positions where the bags begin, int64 [bags + 1].
        table: [rows, d].
        totals: [bags], filled with the sums of the weights.

    Returns: [bags, d].
    """
    weights, table = weights.contiguous(), table.contiguous()
    bags, d = offsets.numel() - 1, table.shape[1]
    out = table.new_empty(bags, d)
    if not out.numel():
        return out
    tiles = {"PAIRS": PAIRS, "WIDTH": _width(d)}
    grid = bags, _tiles(d, tiles["WIDTH"])
    _start(_bags_kernel, grid, weights, order, index, offsets, table, out, totals, d, **tiles)
    return out


def _start(kernel: Any, grid: tuple[int, ...], *arguments: Any, **tiles: int) -> None:
    """Starts a kernel on the device of its first argument."""
    with torch.cuda.device_of(arguments[0]):
        kernel[grid](*arguments, **tiles)


def _width(d: int) -> int:
    """Returns the columns of a tile: a power of two, as Triton requires."""
    return min(WIDEST, 1 << (d - 1).bit_length())


def _tiles(length: int, size: int) -> int:
    """Returns how many tiles of `size` cover `length`."""
    return -(-length // size)
