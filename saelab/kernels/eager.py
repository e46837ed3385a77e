"""The kernels in plain torch: the reference for the others, and a fallback on every device.

Pairs (n, i) are sorted by row: `offsets` gives the position where each row begins, `latents` the i
of each pair (both int64). No function has a gradient; `functions.py` builds autograd on them.
"""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import embedding_bag

if TYPE_CHECKING:
    from saelab.kernels.code import Support

# Torch warns at the first sampled product; tests compare that product with dense autograd.
warnings.filterwarnings("ignore", message="Sparse CSR tensor support is in beta")

#: Pairs that are gathered at once on devices without a sampled product: bounds memory.
SLICE = 1 << 16
#: Smallest norm that a row is divided by.
SMALLEST = 1e-12


def above(z: Tensor, floor: Tensor | None, limit: int) -> tuple[Tensor, Tensor] | None:
    """Selects the pairs with z_ni > floor_i.

    Args:
        z: float32 or bfloat16 [N, F]. Without floors a NaN may or may not be selected.
        floor: float32 [F], compared in float32; None for 0.
        limit: the largest number of pairs.

    Returns: (offsets [N + 1], latents [nnz]), latents rising within a row; None beyond the limit.
    """
    mask = z > (0 if floor is None else floor)
    if int(mask.count_nonzero()) > limit:
        return None
    flat = mask.flatten().nonzero().flatten()
    first_of_row = torch.arange(0, mask.numel() + 1, mask.shape[1], device=z.device)
    return torch.searchsorted(flat, first_of_row), flat % mask.shape[1]


def quantise(x: Tensor, columns: Tensor, limit: int) -> tuple[Tensor, Tensor]:
    """Rounds each row of x * columns to whole multiples of its own scale.

    Args:
        x: float32 [N, d].
        columns: factors of the columns, float32 [d].
        limit: the largest multiple.

    Returns: the multiples, int8 [N, d]; and float32 [3, N], of each row the scale, the norm, and
        the norm of what rounding left out. A row of zeros has the scale 1.
    """
    scaled = x * columns
    most = scaled.abs().amax(1)
    scale = torch.where(most > 0, most / limit, 1)
    steps = scaled * (1 / scale)[:, None]
    q = (steps + torch.copysign(steps.new_tensor(0.5), steps)).trunc().clamp(-limit, limit)
    left = torch.linalg.vector_norm(scaled - scale[:, None] * q, dim=1)
    norm = torch.linalg.vector_norm(scaled, dim=1)
    return q.nan_to_num(0).to(torch.int8), torch.stack([scale, norm, left])


def screened(
    product: Tensor, of_rows: Tensor, of_latents: Tensor, limit: int
) -> tuple[Tensor, Tensor] | None:
    """Selects the pairs whose value may reach what is asked, judged by an int8 product.

        product_ni > least_i * per_n - (norm_i * width_n + room_n)

    Args:
        product: int32 [N, F].
        of_rows: per, width, room; float32 [3, N].
        of_latents: least, norm; float32 [2, F].
        limit: the largest number of pairs.

    Returns: as `above`.
    """
    per, width, room = of_rows[:, :, None]
    least, norm = of_latents
    return above(product.float() - (least * per - (norm * width + room)), None, limit)


def screened_topk(
    product: Tensor, of_rows: Tensor, of_latents: Tensor, k: int, limit: int
) -> tuple[Tensor, Tensor] | None:
    """Selects the pairs that may be among the k largest of their row, judged by an int8 product:
    those whose upper bound reaches the k-th largest lower bound of the row.

        product_ni * scale_i + bias_i * per_n  -+  scale_i * (norm_i * width_n + room_n)

    Args:
        product: int32 [N, F].
        of_rows: per, width, room; float32 [3, N].
        of_latents: scale, norm, bias; float32 [3, F].
        limit: the largest number of pairs.

    Returns: as `above`.
    """
    per, width, room = of_rows[:, :, None]
    scale, norm, bias = of_latents
    middle, margin = product.float() * scale + bias * per, scale * (norm * width + room)
    cut = (middle - margin).topk(k, dim=1).values[:, -1:]
    return above(torch.where(middle + margin >= cut, 1.0, 0.0), None, limit)


def topk_of_pairs(values: Tensor, support: Support, k: int) -> tuple[Tensor, Tensor]:
    """Keeps the pairs with the k largest values of each row; ties go to the lower latent.

    Args:
        values: float32 [nnz], at least k in each row.

    Returns: latents, rising, and values; each [N, k].
    """
    dense = values.new_full((support.n_rows * support.d_sae,), -torch.inf)
    dense = dense.index_put((support.flat,), values).view(support.n_rows, support.d_sae)
    latents = topk(dense, k)
    return latents, dense.gather(1, latents)


def keep_above(values: Tensor, floor: Tensor, support: Support) -> tuple[Tensor, Tensor, Tensor]:
    """Keeps the pairs whose value is above the floor of their latent.

    Args:
        values: float32 [nnz].
        floor: float32 [F] or 0-dim.

    Returns: offsets [N + 1], latents and values of those that are kept.
    """
    kept = values > (floor if floor.dim() == 0 else floor.index_select(0, support.latents))
    before = torch.cat([support.offsets.new_zeros(1), kept.cumsum(0)])
    return before[support.offsets], support.latents[kept], values[kept]


class Adaptation(NamedTuple):
    """A threshold that adapts along a context; each field [F].

        thr_t = max(base + slope * a_{t-1}, low)
        a_t   = rho * a_{t-1} + (1 - rho) * (r_t - rest)      r_t = z_t * per_sd where z_t > fire

    A segment begins with a = 0. A pair is still selected if it lies less than `margin` below thr.
    """

    base: Tensor
    slope: Tensor
    low: Tensor
    margin: Tensor
    fire: Tensor
    per_sd: Tensor
    rest: Tensor
    rho: Tensor


def drive(z: Tensor, rule: Adaptation) -> Tensor:
    """Computes r of `Adaptation`; [N, F] -> [N, F] in the rule's dtype."""
    z = z.to(rule.rho.dtype)
    return torch.where(z > rule.fire, z * rule.per_sd, z.new_zeros(()))


def trace(z: Tensor, rule: Adaptation, starts: Tensor, drivers: Tensor) -> tuple[Tensor, Tensor]:
    """Computes the trace before each row and its derivative to rho.

    Args:
        z: [N, F].
        rule: of the thresholds.
        starts: int64 [m + 1], rising from 0 to N: the first row of each segment, and N.
        drivers: int64 [m], the segment whose z drives the trace of each segment; past the end of a
            shorter driver the trace only decays.

    Returns: a and da / drho, each [N, F] in the rule's dtype.
    """
    centred = drive(z, rule) - rule.rest
    a, slope = torch.zeros_like(centred), torch.zeros_like(centred)
    first, lengths = starts[:-1], starts.diff()
    for t in range(1, int(lengths.max()) if len(lengths) else 0):
        running = (lengths > t).nonzero().flatten()
        now, source = first[running] + t, drivers[running]
        driven = (lengths[source] >= t).unsqueeze(1)
        r = centred[(first[source] + t - 1).clamp_max(len(z) - 1)] * driven
        slope[now] = a[now - 1] + rule.rho * slope[now - 1] - r
        a[now] = rule.rho * a[now - 1] + (1 - rule.rho) * r
    return a, slope


def moments(z: Tensor, rule: Adaptation) -> Tensor:
    """Computes the sums over rows of z, z^2 and the drive; [N, F] -> [3, F]."""
    wide = z.to(rule.rho.dtype)
    return torch.stack([wide.sum(0), wide.square().sum(0), drive(z, rule).sum(0)])


def trace_above(
    z: Tensor, rule: Adaptation, starts: Tensor, drivers: Tensor, limit: int
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor] | None:
    """Selects the pairs above an adapting threshold less its margin; arguments as for `trace`.

    Args:
        limit: the largest number of pairs.

    Returns: (offsets [N + 1], latents [nnz], a [nnz], da / drho [nnz], `moments` [3, F]); None
        beyond the limit.
    """
    a, slope = trace(z, rule, starts, drivers)
    threshold = torch.maximum(rule.base + rule.slope * a, rule.low) - rule.margin
    pairs = above(z.to(threshold.dtype) - threshold, None, limit)
    if pairs is None:
        return None
    offsets, latents = pairs
    flat = rows_of(offsets, latents.numel()) * z.shape[1] + latents
    return offsets, latents, a.view(-1)[flat], slope.view(-1)[flat], moments(z, rule)


def topk(z: Tensor, k: int) -> Tensor:
    """Selects the k largest of each row, by rising latent; z [N, F], float32 or
    bfloat16, -> int64 [N, k].

    Ties at the k-th place go to any of the equal values; `native` takes the lower index.
    """
    return z.topk(k, dim=-1, sorted=False).indices.sort(dim=-1).values


def kth_largest(z: Tensor, rank: int) -> float:
    """Returns the rank-th largest of all values, or 0 if it is negative; z float32 or bfloat16."""
    flat = z.flatten()
    return max(0.0, float(torch.kthvalue(flat, flat.numel() - rank + 1).values))


def by_latent(offsets: Tensor, latents: Tensor, d_sae: int) -> tuple[Tensor, Tensor, Tensor]:
    """Sorts the pairs by latent, rows rising: (order [nnz], rows [nnz], offsets [F + 1])."""
    order = torch.argsort(latents, stable=True)
    starts = latents.new_zeros(d_sae + 1)
    torch.cumsum(torch.bincount(latents, minlength=d_sae), 0, out=starts[1:])
    return order, rows_of(offsets, latents.numel())[order], starts


def rows_of(offsets: Tensor, nnz: int) -> Tensor:
    """Returns the row of each pair; int64 [nnz]."""
    index = torch.arange(offsets.numel() - 1, device=offsets.device)
    return index.repeat_interleave(offsets.diff(), output_size=nnz)


def firings(values: Tensor, support: Support) -> tuple[Tensor, int]:
    """Counts the rows in which each latent's value is not 0, int64 [F], and all such pairs; values
    [nnz]."""
    active = values != 0
    return torch.bincount(support.latents[active], minlength=support.d_sae), int(active.sum())


def encode(u: Tensor, w: Tensor, bias: Tensor | None, support: Support) -> Tensor:
    """Computes z_ni = <u_n, w_i> + bias_i of every pair; u [N, d], w [F, d], bias [F] -> [nnz]."""
    latents = support.latents
    if u.device.type == "cpu" and torch.backends.mkl.is_available() and support.nnz:
        pattern = torch.sparse_csr_tensor(
            support.offsets,
            latents,
            u.new_zeros(support.nnz),
            size=(u.shape[0], w.shape[0]),
            check_invariants=False,
        )
        products = torch.sparse.sampled_addmm(pattern, u, w.t(), beta=0.0).values()
    else:
        pieces = [
            torch.linalg.vecdot(u.index_select(0, n), w.index_select(0, i))
            for n, i in zip(support.rows.split(SLICE), latents.split(SLICE), strict=True)
        ]
        products = torch.cat(pieces) if pieces else u.new_zeros(0)
    return products if bias is None else products + bias[latents]


def encode_backward(g: Tensor, u: Tensor, support: Support) -> tuple[Tensor, Tensor]:
    """Computes sum_n g_ni u_n and sum_n g_ni; g [nnz], u [N, d] -> ([F, d], [F])."""
    order, rows, starts = support.by_latent
    g_b = g.new_zeros(support.d_sae).index_add_(0, support.latents, g)
    return _bags(g[order], rows, starts, u), g_b


def decode(values: Tensor, w: Tensor, support: Support) -> Tensor:
    """Computes y_n = sum_i values_ni w_i; values [nnz], w [F, d] -> [N, d]."""
    return _bags(values, support.latents, support.offsets, w)


def decode_backward(
    g: Tensor, values: Tensor, w: Tensor, support: Support, shares: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Computes <g_n, w_i> of every pair, and sum_n values_ni g_n + shares_i w_i.

    Args:
        g: [N, d].
        values: [nnz].
        w: [F, d].
        shares: [F]; None leaves the second term out.

    Returns: ([nnz], [F, d]).
    """
    order, rows, starts = support.by_latent
    g_w = _bags(values[order], rows, starts, g)
    if shares is not None:
        g_w.addcmul_(w, shares[:, None])
    return encode(g, w, None, support), g_w


def pool(values: Tensor, support: Support, cuts: Tensor, sums: Tensor) -> None:
    """Adds the values of the rows cuts[s] to cuts[s + 1] to sums[s] [segments, F], in place."""
    bounds = support.offsets[cuts]
    segment = rows_of(bounds, int(bounds[-1] - bounds[0]))
    pairs = slice(int(bounds[0]), int(bounds[-1]))
    places = torch.add(support.latents[pairs], segment, alpha=support.d_sae)
    sums.view(-1).index_add_(0, places, values[pairs])


def project_out(g: Tensor, w: Tensor) -> None:
    """Removes from each row of g its component along the unit row of w; [F, d], g in place."""
    g.sub_(w * torch.linalg.vecdot(g, w).unsqueeze(1))


def normalise(w: Tensor) -> None:
    """Divides each row by its norm (at least SMALLEST); [F, d], in place."""
    w.copy_(torch.nn.functional.normalize(w, dim=1, eps=SMALLEST))


def gram_product(z: Tensor, weights: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Computes Z v and Z^T (weights * Z v); z [n, k], weights [n], v [k] -> ([n], [k])."""
    along = z @ v
    return along, (weights * along) @ z


def _bags(weights: Tensor, index: Tensor, offsets: Tensor, table: Tensor) -> Tensor:
    """Sums weighted rows of `table` in each bag; weights and index [nnz] -> [bags, d]."""
    if not index.numel():
        return table.new_zeros(offsets.numel() - 1, table.shape[1])
    return embedding_bag(
        index, table, offsets, per_sample_weights=weights, mode="sum", include_last_offset=True
    )
