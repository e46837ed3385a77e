"""Which kernels and which precision: a table keyed by device and CPU feature.

Never by a timing taken at run time, so the same machine always computes the same bits.

    device   kernels            GEMM that selects ('auto')
    cpu      native, or eager   bfloat16 with AVX512-BF16 or AMX, else float32
    cuda     gpu, or eager      bfloat16

Nothing of the CUDA row has run on a GPU yet. The kernels in `gpu` (Triton) agree with `eager` in
Triton's interpreter and compile for sm_80 and sm_90; where Triton is missing or finds no C
compiler, or where `SAELAB_KERNELS=eager` asks for it, CUDA has `eager`.
"""

from __future__ import annotations

import functools
from types import ModuleType
from typing import Literal

import torch

from saelab.kernels import eager, native

Precision = Literal["auto", "float32", "bfloat16"]


def kernels_for(device: torch.device) -> ModuleType:
    """The module whose functions serve tensors of that device: `native`, `gpu` or `eager`."""
    if device.type == "cuda":
        return _on_cuda()
    return native if device.type == "cpu" and native.library() is not None else eager


@functools.cache
def _on_cuda() -> ModuleType:
    """`gpu`, imported at the first call: torch's CUDA packages bring Triton, its CPU ones don't."""
    if native.eager_wanted():
        return eager
    try:
        from saelab.kernels import gpu
    except ImportError:
        return eager
    return eager if gpu.why_not() else gpu


def kernels_name() -> str:
    """'native', or 'eager' with the reason: what a manifest says of the kernels on the CPU."""
    return "native" if native.library() is not None else f"eager ({native.why_not()})"


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
