"""Errors of exhausted memory are told from others, however a library words them."""

from __future__ import annotations

import pytest

from saelab.errors import StudyFailure
from saelab.runtime.exhaustion import ExhaustedError, as_usage_error


@pytest.mark.parametrize(
    "text",
    [
        "could not create a memory object",
        "could not create a primitive",
        "could not execute a primitive",
        "[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: "
        "you tried to allocate 4096 bytes. Error code 12 (Cannot allocate memory)",
        "unable to mmap 64 bytes from file <x>: Cannot allocate memory (12)",
        "DefaultCPUAllocator: not enough memory: you tried to allocate 4096 bytes.",
        "std::bad_alloc",
        "CUDA out of memory. Tried to allocate 2.00 GiB",
        "CUDA error: out of memory",
        "Unable to allocate 2.00 GiB for an array",
        "malloc of size 4096 failed: failed to allocate",
    ],
)
def test_words_for_exhausted_memory(text: str) -> None:
    with pytest.raises(ExhaustedError, match="memory is used up"), as_usage_error():
        raise RuntimeError(text)


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("could not create a primitive descriptor for a matmul"),
        RuntimeError("mat1 and mat2 shapes cannot be multiplied"),
        StudyFailure("a worker process was killed (out of memory?)"),
    ],
)
def test_other_errors_pass(error: Exception) -> None:
    with pytest.raises(type(error)) as caught, as_usage_error():
        raise error
    assert caught.value is error
