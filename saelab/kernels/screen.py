"""Selection of the pairs of a code by an int8 product, which costs half of a bfloat16 one or less.

With factors c of the columns, each row of u and of W_enc is rounded to multiples of its scale:

    u_n * c = s_n q_n + e_n        W_i / c = s_i q_i + e_i        q whole numbers up to `limit`
    <u_n, W_i> = s_n s_i <q_n, q_i> + <u_n * c, e_i> + <e_n, s_i q_i>

The product <q_n, q_i> is exact in 32 bits. By Cauchy and Schwarz the other two terms are at most

    |u_n * c| |e_i| + |e_n| (|W_i / c| + |e_i|)

and the norms of the rounding errors are computed, not estimated. So every pair whose float32 value
lies above a floor is among those for which the sum of product and bound does; the values of these
are then computed in float32, and those that are not above the floor are dropped. The result is that
of a float32 product up to the order of its sums. The factors c change only how many pairs are
computed in vain: they share a channel that is large in all inputs between both sides (as Xiao et
al. 2023, SmoothQuant, do).

The bound is compared in units of s_n s_i, with the largest |e_i| / s_i in place of each.
"""

from __future__ import annotations

import functools
import math
import platform
from dataclasses import dataclass

import torch
from torch import Tensor

from saelab.kernels import native
from saelab.kernels.code import Support, most_pairs, support_of_topk
from saelab.kernels.table import Precision, kernels_for

#: Room for the rounding of float32 in values, bounds and floors, relative to |u| |w|, |b| and the
#: floor. Our choice: 2^-24 times the square root of any width, several times over.
SLACK = 3e-5
#: Rows below which rounding the encoder costs more than it saves, and the width of rows below which
#: there is little to save; torch 2.13's product is wrong for a width of 1. Our choice.
FEWEST_ROWS, LEAST_WIDTH = 64, 16
#: The largest int8 value, and the width of rows below which the k largest of each are found as
#: quickly without a screen: its bounds are then too wide. Our choice, by measuring.
MOST, LEAST_WIDTH_FOR_TOPK = 127, 512
#: Rows from which the size of a column is taken. Our choice.
SAMPLED = 128
#: Bound of column factors' spread. Our choice: beyond it float32 itself loses small channels.
SPREAD = 1e3


@dataclass(frozen=True)
class Screen:
    """An encoder that pairs are selected with.

    Args:
        columns: factors of the columns of u, float32 [d].
        weights: int8 [F, d].
        scale: of each of its rows, float32 [F].
        norm: of each row and its rounding error together, in units of its scale, float32 [F].
        error: the largest norm of a row's rounding error, in the same units, 0-dim.
        limit: the largest int8 value.
    """

    columns: Tensor
    weights: Tensor
    scale: Tensor
    norm: Tensor
    error: Tensor
    limit: int

    @classmethod
    def of(
        cls, w_enc: Tensor, inputs: Tensor, precision: Precision, of_rows: bool = False
    ) -> Screen | None:
        """Rounds an encoder, for inputs like these; None where this is not faster, or not asked.

        Args:
            w_enc: float32 [F, d].
            inputs: encoder input, [N, d], whose channels decide the factors of the columns.
            precision: of the selection; another than 'auto' is kept.
            of_rows: whether the largest of each row are selected, and not those above floors.
        """
        limit = largest_int8(w_enc.device) if precision == "auto" else 0
        small = len(inputs) < FEWEST_ROWS or w_enc.shape[1] < LEAST_WIDTH
        small |= of_rows and (w_enc.shape[1] < LEAST_WIDTH_FOR_TOPK or limit < MOST)
        if limit == 0 or small or w_enc.dtype != torch.float32:
            return None
        of_weights, of_inputs = (_column_sizes(t) for t in (w_enc, inputs))
        columns = (of_weights / of_inputs).sqrt().nan_to_num(1.0, 1.0).clamp(1 / SPREAD, SPREAD)
        quantise = kernels_for(w_enc.device).quantise
        weights, (scale, norm, error) = quantise(w_enc, 1 / columns, limit)
        of_error = error / scale
        return cls(columns, weights, scale, norm / scale + of_error, of_error.max(), limit)

    def candidates(self, u: Tensor, bias: Tensor, floor: Tensor) -> Support | None:
        """Selects every pair whose pre-activation may be above its floor; None where these are more
        than a support should have, or not everything is finite.

        Args:
            u: encoder input, float32 [N, d].
            bias: float32 [F].
            floor: float32 [F] or 0-dim.
        """
        least = floor - bias - SLACK * (bias.abs() + floor.abs())
        product, of_rows = self._product(u)
        of_latents = torch.stack([least / self.scale, self.norm])
        return self._screened("screened", product, of_rows, of_latents)

    def candidates_for_topk(self, u: Tensor, bias: Tensor, k: int) -> Support | None:
        """Selects every pair that may be among the k largest of its row; None as `candidates`."""
        product, of_rows = self._product(u)
        of_rows[2] += SLACK * of_rows[0] * float((bias.abs() / self.scale).max())
        of_latents = torch.stack([self.scale, self.norm, bias])
        return self._screened("screened_topk", product, of_rows, of_latents, k)

    def _product(self, u: Tensor) -> tuple[Tensor, Tensor]:
        """Computes the int8 product, int32 [N, F]; and of each row 1 / scale and the two numbers of
        its bound, float32 [3, N]."""
        q, (scale, norm, error) = kernels_for(u.device).quantise(u, self.columns, self.limit)
        product = torch._int_mm(q, self.weights.t())  # pyright: ignore[reportPrivateImportUsage]
        width, room = error / scale + SLACK * norm / scale, self.error * (norm / scale)
        return product, torch.stack([1 / scale, width, room])

    def _screened(
        self, kernel: str, product: Tensor, of_rows: Tensor, of_latents: Tensor, *options: int
    ) -> Support | None:
        if not math.isfinite(float(of_rows.sum() + of_latents.sum())):
            return None
        select = getattr(kernels_for(product.device), kernel)
        pairs = select(product, of_rows, of_latents, *options, most_pairs(product.numel()))
        return None if pairs is None else Support(pairs[0], pairs[1], len(self.weights))

    @torch.no_grad()
    def selected_topk(
        self, u: Tensor, w_enc: Tensor, bias: Tensor, k: int
    ) -> tuple[Support, Tensor] | None:
        """Selects the k largest of each row and computes their values, float32 [N * k]; otherwise
        as `selected`."""
        wide = self.candidates_for_topk(u, bias, k)
        if wide is None:
            return None
        kernels = kernels_for(u.device)
        latents, values = kernels.topk_of_pairs(kernels.encode(u, w_enc, bias, wide), wide, k)
        return support_of_topk(latents, wide.d_sae), values.flatten()

    @torch.no_grad()
    def selected(
        self, u: Tensor, w_enc: Tensor, bias: Tensor, floor: Tensor
    ) -> tuple[Support, Tensor] | None:
        """Selects the pairs above their floors and computes their values, float32 [nnz].

        Args:
            w_enc: float32 [F, d], the encoder that this screen is of.

        Returns: None where `candidates` does.
        """
        wide = self.candidates(u, bias, floor)
        if wide is None:
            return None
        kernels = kernels_for(u.device)
        values = kernels.encode(u, w_enc, bias, wide)
        offsets, latents, values = kernels.keep_above(values, floor, wide)
        return Support(offsets, latents, wide.d_sae), values


def _column_sizes(x: Tensor) -> Tensor:
    """Returns the mean size of a column's entries, from up to `SAMPLED` to twice as many rows."""
    return x[:: max(1, len(x) // SAMPLED)].abs().mean(0)


def largest_int8(device: torch.device) -> int:
    """Returns the largest weight with which torch's int8 product is exact on that device; 0 where
    it is not, or is not known to be faster than float32."""
    if device.type != "cpu" or native.library() is None:
        return 0
    return _largest_int8_on_cpu()


@functools.cache
def _largest_int8_on_cpu() -> int:
    """Tries the extremes: a processor without VNNI adds two products in 16 bits, which holds for
    weights up to 64 alone."""
    if platform.machine().lower() not in ("x86_64", "amd64") or not hasattr(torch, "_int_mm"):
        return 0
    if torch.backends.cpu.get_cpu_capability() == "DEFAULT":
        return 0
    return next((limit for limit in (MOST, 64) if _is_exact(limit)), 0)


def _is_exact(limit: int) -> bool:
    return all(_is_exact_at(limit, *shape) for shape in ((64, 96, 128), (1, 16, 7), (70, 37, 33)))


def _is_exact_at(limit: int, n_rows: int, width: int, n_weights: int) -> bool:
    rows = torch.full((n_rows, width), 127, dtype=torch.int8, device="cpu")
    rows[1::2] = -127
    rows[::3, ::2] *= -1
    weights = torch.full((n_weights, width), limit, dtype=torch.int8, device="cpu")
    weights[1::2] = -limit
    weights[::5, 1::2] *= -1
    try:
        product = torch._int_mm(rows, weights.t())  # pyright: ignore[reportPrivateImportUsage]
    except RuntimeError:
        return False
    return torch.equal(product.double(), rows.double() @ weights.double().t())
