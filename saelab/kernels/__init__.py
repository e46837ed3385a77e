"""Sparse encode and decode: one interface, and the table that chooses the GEMM's precision.

The table is keyed by device and CPU feature, never by a timing taken at run time, so the same
machine always computes the same bits.
"""

from __future__ import annotations

from typing import Literal

import torch

from saelab.kernels.code import (
    DENSEST,
    Code,
    Support,
    positive,
    support_of_mask,
    support_of_topk,
)
from saelab.kernels.eager import decode_at, encode_at, preactivations, row_norms

Precision = Literal["auto", "float32", "bfloat16"]

__all__ = [
    "DENSEST",
    "Code",
    "Precision",
    "Support",
    "decode_at",
    "encode_at",
    "positive",
    "preactivations",
    "row_norms",
    "selection_dtype",
    "support_of_mask",
    "support_of_topk",
]


def has_fast_bfloat16(device: torch.device) -> bool:
    """Whether bfloat16 GEMMs are faster than float32 there: AVX512-BF16 or AMX, or any GPU."""
    if device.type != "cpu":
        return True
    cpu = torch.cpu
    return bool(cpu._is_avx512_bf16_supported() or cpu._is_amx_tile_supported())  # type: ignore[attr-defined]


def selection_dtype(precision: Precision, device: torch.device) -> torch.dtype:
    """The dtype of the GEMM that selects the active latents; values are always float32."""
    if precision == "bfloat16" or (precision == "auto" and has_fast_bfloat16(device)):
        return torch.bfloat16
    return torch.float32
