"""How long a launch will take on free cores, from GEMMs that are timed here; it decides no bit.

    training = start + sum over cells of 1.5 * steps * (one encoder GEMM + 2 ms) / workers
    harvest  = tokens * 2 * parameters / rate of a GEMM of the model's width

The factors are fits to launches on two cores; an estimate is good to about a factor of 1.5.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

import torch

from saelab.data.language_model import Size
from saelab.study.plan import CellSpec

#: Seconds until workers have imported torch and opened their data.
START_SECONDS = 10.0
#: Seconds of a step besides its GEMMs, and what evaluation adds to training. Our fits.
STEP_SECONDS, WITH_EVALUATION = 2e-3, 1.5
#: Rows of the GEMM that a harvest is measured by.
ROWS = 1024


def training_seconds(specs: Sequence[CellSpec], d_in: int, at_once: int) -> float:
    """Seconds to train and evaluate the cells.

    Args:
        d_in: width of the activations.
        at_once: cells at work at a time, each on one thread.
    """
    costs: dict[tuple[int, int], float] = {}
    total = 0.0
    for spec in specs:
        n, width = spec.train.batch_size, spec.sae.d_sae
        if (n, width) not in costs:
            costs[n, width] = gemm_seconds(n, d_in, width, threads=1)
        total += WITH_EVALUATION * spec.train.steps * (costs[n, width] + STEP_SECONDS)
    return START_SECONDS + total / max(1, at_once)


def harvest_seconds(size: Size, tokens: int, bytes_per_weight: int) -> float:
    """Seconds of this process to harvest so many tokens; the vocabulary's matrix does not count."""
    weights = max(0, size.weights // bytes_per_weight - size.vocabulary * size.d_model)
    seconds = gemm_seconds(ROWS, size.d_model, size.inner, torch.get_num_threads())
    return tokens * 2 * weights * seconds / (2 * ROWS * size.d_model * size.inner)


def gemm_seconds(n: int, d_in: int, d_out: int, threads: int, times: int = 3) -> float:
    """The fastest of a few products [n, d_in] x [d_in, d_out] on so many free cores.

    It is processor time over threads, so that others at work on the machine don't count.
    """
    a, b = torch.ones(n, d_in), torch.ones(d_in, d_out)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        torch.mm(a, b)
        return min(_timed(a, b) for _ in range(times)) / threads
    finally:
        torch.set_num_threads(before)


def _timed(a: torch.Tensor, b: torch.Tensor) -> float:
    start = time.process_time()
    torch.mm(a, b)
    return time.process_time() - start
