"""Chooses kernels and precision by device and CPU features.

The choice never depends on a timing at run time, so the same machine always computes the same bits.

    device   kernels            GEMM that selects ('auto')
    cpu      native, or eager   int8 where `screen` can; else bfloat16 with AVX512-BF16 or AMX, or
                                float32
    cuda     gpu, or eager      bfloat16
    others   eager              float32

Nothing in the CUDA row has run on a GPU yet. The kernels in `gpu` (Triton) agree with `eager` in
Triton's interpreter and compile for sm_80 and sm_90. CUDA uses `eager` if Triton is missing or
finds no C compiler, if torch is built for ROCm, or if `SAELAB_KERNELS=eager` asks for it.
"""

from __future__ import annotations

import functools
import sys
from types import ModuleType
from typing import Literal

import torch

from saelab.kernels import eager, native

Precision = Literal["auto", "float32", "bfloat16"]
CPU = torch.device("cpu")


def kernels_for(device: torch.device) -> ModuleType:
    """Returns the module for tensors of that device: `native`, `gpu` or `eager`.

    Eager kernels that nobody asked for are reported on stderr, once.
    """
    if device.type == "cuda":
        kernels, reason = _cuda_kernels()
    elif device.type == "cpu" and native.library() is not None:
        return native
    elif device.type == "cpu":
        kernels, reason = eager, native.unavailable_reason()
    else:
        return eager
    if reason and not native.eager_requested():
        _report_fallback(reason)
    return kernels


@functools.cache
def _report_fallback(reason: str) -> None:
    print(f"the slower eager kernels are used: {reason}", file=sys.stderr, flush=True)


@functools.cache
def _cuda_kernels() -> tuple[ModuleType, str]:
    """Returns `gpu`, imported at the first call because only torch's CUDA packages bring Triton, or
    `eager` with the reason."""
    if native.eager_requested():
        return eager, "SAELAB_KERNELS=eager asks for them"
    if torch.version.hip:
        return eager, "torch is built for ROCm, and the kernels for GPUs are for CUDA"
    try:
        from saelab.kernels import gpu
    except ImportError as error:
        return eager, f"Triton can't be imported ({error})"
    reason = gpu.unavailable_reason()
    return (eager, reason) if reason else (gpu, "")


def kernels_kind(device: torch.device) -> str:
    """Returns 'native', 'gpu' or 'eager': the kernels for tensors of that device."""
    return kernels_for(device).__name__.rpartition(".")[2]


def kernels_name(device: torch.device = CPU) -> str:
    """Returns `kernels_kind`, with the reason for eager ones, for a manifest."""
    kind = kernels_kind(device)
    if kind != "eager":
        return kind
    if device.type not in ("cpu", "cuda"):
        return "eager (the only ones for this device)"
    reason = _cuda_kernels()[1] if device.type == "cuda" else native.unavailable_reason()
    return f"eager ({reason})"


def has_fast_bfloat16(device: torch.device) -> bool:
    """Returns whether bfloat16 GEMMs are faster than float32 ones: on CPUs with AVX512-BF16 or AMX,
    and on all GPUs that torch names 'cuda'."""
    if device.type != "cpu":
        return device.type == "cuda"
    if torch.backends.cpu.get_cpu_capability() in ("DEFAULT", "AVX2"):  # or asked to be so
        return False
    cpu = torch.cpu
    return bool(cpu._is_avx512_bf16_supported() or cpu._is_amx_tile_supported())  # type: ignore[attr-defined]


def selection_dtype(precision: Precision, device: torch.device) -> torch.dtype:
    """Returns the dtype of the GEMM that selects the active latents; values are always float32."""
    if precision == "bfloat16" or (precision == "auto" and has_fast_bfloat16(device)):
        return torch.bfloat16
    return torch.float32
