"""Chooses kernels and precision by device and CPU features.

The choice never depends on a timing at run time, so the same machine always computes the same bits.

    device   kernels            GEMM that selects ('auto')
    cpu      native, or eager   bfloat16 with AVX512-BF16 or AMX, else float32
    cuda     gpu, or eager      bfloat16

Nothing in the CUDA row has run on a GPU yet. The kernels in `gpu` (Triton) agree with `eager` in
Triton's interpreter and compile for sm_80 and sm_90. CUDA uses `eager` if Triton is missing or
finds no C compiler, or if `SAELAB_KERNELS=eager` asks for it.
"""

from __future__ import annotations

import functools
from types import ModuleType
from typing import Literal

import torch

from saelab.kernels import eager, native

Precision = Literal["auto", "float32", "bfloat16"]


def kernels_for(device: torch.device) -> ModuleType:
    """Returns the module for tensors of that device: `native`, `gpu` or `eager`."""
    if device.type == "cuda":
        return _cuda_kernels()
    return native if device.type == "cpu" and native.library() is not None else eager


@functools.cache
def _cuda_kernels() -> ModuleType:
    """Returns `gpu`, imported at the first call because only torch's CUDA packages bring Triton, or
    `eager`."""
    if native.eager_requested():
        return eager
    try:
        from saelab.kernels import gpu
    except ImportError:
        return eager
    return eager if gpu.unavailable_reason() else gpu


def kernels_name() -> str:
    """Returns 'native', or 'eager' with the reason, for the kernels on the CPU in a manifest."""
    return "native" if native.library() is not None else f"eager ({native.unavailable_reason()})"


def has_fast_bfloat16(device: torch.device) -> bool:
    """Returns whether bfloat16 GEMMs are faster than float32 ones: on CPUs with AVX512-BF16 or AMX,
    and on all GPUs."""
    if device.type != "cpu":
        return True
    cpu = torch.cpu
    return bool(cpu._is_avx512_bf16_supported() or cpu._is_amx_tile_supported())  # type: ignore[attr-defined]


def selection_dtype(precision: Precision, device: torch.device) -> torch.dtype:
    """Returns the dtype of the GEMM that selects the active latents; values are always float32."""
    if precision == "bfloat16" or (precision == "auto" and has_fast_bfloat16(device)):
        return torch.bfloat16
    return torch.float32
