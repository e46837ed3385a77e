"""Keeps freed memory in the process instead of giving it back to the kernel after each step.

Training allocates and frees the same large tensors thousands of times. glibc's default returns
blocks above 128 KB to the kernel, so each step pays for zeroed pages again. `mallopt` is glibc's
own switch; elsewhere this does nothing. Results do not change.
"""

from __future__ import annotations

import ctypes
import functools

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # malloc.h
LARGEST = 1 << 30


@functools.cache
def keep_freed_memory() -> bool:
    """Returns whether the allocator took the setting."""
    try:
        libc = ctypes.CDLL("libc.so.6")
        return bool(
            libc.mallopt(M_MMAP_THRESHOLD, LARGEST) and libc.mallopt(M_TRIM_THRESHOLD, LARGEST)
        )
    except (OSError, AttributeError):
        return False
