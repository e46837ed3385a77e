"""Settings of torch as a notebook may have changed them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def torch_defaults(dtype: torch.dtype, device: str = "cpu") -> Iterator[None]:
    """Sets the default dtype and device of the process within the block."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            yield
    finally:
        torch.set_default_dtype(before)
