"""Torch's process-wide settings, of which no result may depend.

Notebooks change them: the default dtype and device (usual when a large model is made), autograd
switched off, autocast, less precise products of float32. Every type that is part of a contract is
stated where a tensor is made; this module covers what cannot be stated there.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch


@contextmanager
def standard_torch() -> Iterator[None]:
    """Computes with torch's own defaults within the block, whatever the process has set.

    These are float32 on the CPU for new tensors, recorded gradients, no autocast, and float32
    products in full precision. The settings of the process are restored at the end.
    """
    dtype = torch.get_default_dtype()
    with ExitStack() as stack:
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        for device in ("cpu", "cuda"):
            if torch.is_autocast_enabled(device):
                stack.enter_context(torch.autocast(device, enabled=False))
        if torch.get_default_device().type != "cpu":
            stack.enter_context(torch.device("cpu"))
        precision = torch.get_float32_matmul_precision()
        if precision != "highest":
            stack.callback(torch.set_float32_matmul_precision, precision)
            torch.set_float32_matmul_precision("highest")
        stack.callback(torch.set_default_dtype, dtype)
        torch.set_default_dtype(torch.float32)
        yield


@contextmanager
def one_thread() -> Iterator[None]:
    """Limits torch to one thread within the block: sums over many rows depend on their number.

    Every cell is trained and measured so, in a worker or not, and has the same bits everywhere.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
