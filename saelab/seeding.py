"""Named random streams; every draw comes from a stream that a seed and a name determine.

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
    """Returns a 63-bit number that depends only on the seed, the stream's name and the keys."""
    text = "/".join(map(str, (seed, name, *keys)))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little") >> 1


def torch_stream(seed: int, name: str, *keys: int | str) -> torch.Generator:
    """Returns a CPU generator at the start of the named stream (draw on the CPU, then move)."""
    import torch

    return torch.Generator().manual_seed(stream_seed(seed, name, *keys))


def numpy_stream(seed: int, name: str, *keys: int | str) -> np.random.Generator:
    """Returns a numpy generator at the start of the named stream."""
    import numpy as np

    return np.random.default_rng(stream_seed(seed, name, *keys))


def study_seeds(study: str, purpose: str, count: int) -> list[int]:
    """Returns the seeds of a study, which are derived from its name and picked by nobody.

    Args:
        study: the study's name.
        purpose: 'explore', 'confirm', 'tune', 'twin' or 'quick'; the sets are disjoint streams.
        count: number of seeds.
    """
    digest = hashlib.sha256(f"{study}/{purpose}".encode()).digest()
    first = int.from_bytes(digest[:4], "little") // 2
    return [first + i for i in range(count)]
