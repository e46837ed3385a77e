"""Normalisation of each row by its own statistics, as some published SAEs have it.

    layer_norm   (x - m) / (s + 1e-5)      m, s: mean and standard deviation (n - 1) of the row
    norm         x sqrt(d) / |x|

The encoder sees the normalised row, the decoder gives back a normalised one, and its reconstruction
takes m, s or |x| from the row itself: `x_hat s + m`, or `x_hat |x| / sqrt(d)`.
"""

from __future__ import annotations

import math
from typing import Literal, get_args

import torch
from torch import Tensor

RowNorm = Literal["none", "layer_norm", "norm"]
ROW_NORMS: tuple[RowNorm, ...] = get_args(RowNorm)
#: Added to the deviation that is divided by; OpenAI and SAELens use the same.
EPSILON = 1e-5


def normalise_rows(x: Tensor, kind: RowNorm) -> Tensor:
    """Normalises rows [n, d] as this module's equation says; zeros stay zeros."""
    if kind == "layer_norm":
        centred = x - x.mean(-1, keepdim=True)
        return centred / (centred.std(-1, keepdim=True) + EPSILON)
    return x if kind == "none" else x / _length(x)


def restore_rows(x_hat: Tensor, x: Tensor, kind: RowNorm) -> Tensor:
    """Gives a normalised reconstruction [n, d] mean and length of the rows x [n, d]."""
    if kind == "layer_norm":
        return x_hat * x.std(-1, keepdim=True) + x.mean(-1, keepdim=True)
    return x_hat if kind == "none" else x_hat * _length(x)


def _length(x: Tensor) -> Tensor:
    """Returns |x| / sqrt(d) of each row, [n, 1]; it is positive also for zeros."""
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    return (norm / math.sqrt(x.shape[-1])).clamp_min(torch.finfo(x.dtype).tiny)
