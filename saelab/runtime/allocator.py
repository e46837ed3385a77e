"""Keeps freed memory in the process instead of returning it to the kernel after each step.

Training allocates and frees the same large tensors thousands of times. By default glibc returns
blocks above 128 KB to the kernel, so each step pays for zeroed pages again. `mallopt` changes this;
without glibc nothing happens. Results do not change.
"""

from __future__ import annotations

import ctypes
import functools

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # malloc.h
LARGEST = 1 << 30


@functools.cache
def keep_freed_memory() -> bool:
    """Raises the allocator's thresholds; returns whether it accepted them."""
    try:
        libc = ctypes.CDLL("libc.so.6")
        return bool(
            libc.mallopt(M_MMAP_THRESHOLD, LARGEST) and libc.mallopt(M_TRIM_THRESHOLD, LARGEST)
        )
    except (OSError, AttributeError):
        return False
