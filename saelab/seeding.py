"""Named random streams: every draw comes from a stream derived from a seed and a name alone.

    stream_seed(seed, name, *keys) = first 8 bytes of sha256("seed/name/key/...")

So the initialisation, the data order, noise, resampling and evaluation of one seed never share
random numbers, and adding a consumer to one stream leaves all others as they were. The global
random state of torch and numpy is never used.
"""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np
    import torch


def stream_seed(seed: int, name: str, *keys: int | str) -> int:
    """A 63-bit number that depends on the seed, the stream's name and further keys alone."""
    text = "/".join(map(str, (seed, name, *keys)))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little") >> 1


def torch_stream(seed: int, name: str, *keys: int | str) -> torch.Generator:
    """A CPU generator at the start of the named stream (draw on the CPU, then move)."""
    import torch

    return torch.Generator().manual_seed(stream_seed(seed, name, *keys))


def numpy_stream(seed: int, name: str, *keys: int | str) -> np.random.Generator:
    import numpy as np

    return np.random.default_rng(stream_seed(seed, name, *keys))


def study_seeds(study: str, purpose: str, count: int) -> list[int]:
    """The seeds of a study, derived from its name: nobody picks them.

    Args:
        study: the study's name.
        purpose: 'explore', 'confirm' or 'tune'; the three sets are disjoint streams.
        count: how many.
    """
    digest = hashlib.sha256(f"{study}/{purpose}".encode()).digest()
    first = int.from_bytes(digest[:4], "little") // 2
    return [first + i for i in range(count)]
