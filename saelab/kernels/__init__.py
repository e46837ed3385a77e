"""Sparse encode and decode: one interface over the kernels of each device (see `table`)."""

from __future__ import annotations

from saelab.kernels.code import (
    Code,
    Support,
    most_pairs,
    pool_codes,
    support_above,
    support_of_topk,
)
from saelab.kernels.eager import Adaptation, moments, trace
from saelab.kernels.functions import (
    decode_at,
    decode_with_norms,
    encode_all,
    encode_at,
    mean_square,
    preactivations,
    row_norms,
    with_gradient,
)
from saelab.kernels.over_ranks import gather_code, select_latents, topk_over_ranks
from saelab.kernels.screen import Screen
from saelab.kernels.straight_through import gate, jump
from saelab.kernels.table import (
    Precision,
    has_fast_bfloat16,
    kernels_for,
    kernels_kind,
    kernels_name,
    selection_dtype,
)

__all__ = [
    "Adaptation",
    "Code",
    "Precision",
    "Screen",
    "Support",
    "decode_at",
    "decode_with_norms",
    "encode_all",
    "encode_at",
    "gate",
    "gather_code",
    "has_fast_bfloat16",
    "jump",
    "kernels_for",
    "kernels_kind",
    "kernels_name",
    "mean_square",
    "moments",
    "most_pairs",
    "pool_codes",
    "preactivations",
    "row_norms",
    "select_latents",
    "selection_dtype",
    "support_above",
    "support_of_topk",
    "topk_over_ranks",
    "trace",
    "with_gradient",
]
