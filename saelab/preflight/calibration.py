"""Calibration of the formulas in `cost`: rates measured on this machine, and runs to check them.

Everything runs on one thread and is timed in processor time, so that others at work on the machine
count less; each run has a process of its own, whose largest memory is read at its end. A rate is
the best of a few short ones; the runs that are compared have other sizes than those.
"""

from __future__ import annotations

import math
import multiprocessing
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from saelab.data import language_model
from saelab.data.activations.harvest import bytes_needed, harvest
from saelab.data.activations.store import MemorySource, Shard
from saelab.data.activations.stream import batches
from saelab.data.text.tokens import Tokens
from saelab.errors import UsageError
from saelab.preflight.cost import (
    active_latents,
    harvest_bytes,
    harvest_flops,
    harvest_seconds,
    process_bytes,
    state_bytes,
    step_seconds,
)
from saelab.preflight.rates import Rates, best_seconds, size_of, thread_rates
from saelab.runtime.system import peak_memory
from saelab.seeding import torch_stream
from saelab.study.plan import BaseConfig
from saelab.training.cell import TrainingCell
from saelab.training.loop import Cell, train

#: Tokens of the forward pass that is timed, and steps of a trial. Our choice: a second or two.
TOKENS, STEPS = 2048, 28
#: Tokens that the trials harvest, widths that they train, as multiples of the settings' width; and
#: the one whose steps say what share of the rates a step reaches.
HARVESTS, FACTORS, MEASURED_FACTOR = (8_192, 32_768), (1, 4), 2
#: The tiny SAE whose step is all overhead: rows, channels, latents.
TINY = (8, 8, 64)
#: Bytes written and read back to measure the disk.
FILE_BYTES = 2**26
HEADING = f"{'':44}  {'predicted':>10}  {'actual':>10} {'':5} {'error':>7}"


@dataclass(frozen=True)
class Compared:
    """One figure as it was predicted and as it came out."""

    what: str
    unit: str
    predicted: float
    actual: float

    @property
    def error(self) -> float:
        """Predicted over actual, minus one."""
        return self.predicted / self.actual - 1

    def line(self) -> str:
        return (
            f"{self.what:44}  {self.predicted:>10.4g}  {self.actual:>10.4g} {self.unit:5} "
            f"{100 * self.error:>+6.0f}%"
        )

    def as_dict(self) -> dict[str, Any]:
        return {**asdict(self), "error": self.error}


# ---- rates -----------------------------------------------------------------------------------


def rates_here(base: BaseConfig) -> Rates:
    """Measures one thread of this machine's processor: a GEMM, a pass over memory, the language
    model, training steps, the disk.

    Raises: SourceError when the model can't be loaded.
    """
    return _run_alone(_measure_rates, base)[0]


def _measure_rates(base: BaseConfig) -> Rates:
    n, d = base.train.batch_size, size_of(base.model).d_model
    width, overhead = MEASURED_FACTOR * base.sae.d_sae, _step_seconds(base, *TINY)
    quick = thread_rates(base.sae.precision)
    full = {"model_efficiency": _model_flops(base) / quick.matrix, "store": _disk_rate()}
    full |= {"step_efficiency": 1.0, "step_seconds": 0.0}
    rates = quick.model_copy(update=full)
    work = step_seconds(rates, n, d, width, active_latents(base.sae))
    actual = max(_step_seconds(base, n, d, width) - overhead, 1e-9)
    return rates.model_copy(
        update={"step_efficiency": work / actual, "step_seconds": overhead},
    )


def _model_flops(base: BaseConfig) -> float:
    """FLOP/s of a pass of the model through all of its blocks."""
    model, size = language_model.load(base.model), size_of(base.model)
    hook = f"blocks.{size.blocks - 1}.hook_resid_post"
    parts = _random_ids(base, TOKENS).split(base.harvest.batch)
    seconds = best_seconds(lambda: [model.activations(part, None, [hook]) for part in parts])
    positions = sum(part.numel() for part in parts)
    return positions * harvest_flops(size, base.patched({"hook_name": hook})) / seconds


def _random_ids(base: BaseConfig, tokens: int) -> torch.Tensor:
    """Made-up token ids, int64 [contexts, context]: the cost of a pass does not depend on them."""
    shape = (-(-tokens // base.context), base.context)
    vocabulary = size_of(base.model).vocabulary
    return torch.randint(vocabulary, shape, generator=torch_stream(0, "trial ids"))


def _disk_rate() -> float:
    """Bytes/s of writing a file to the disk under the temporary folder and reading it back."""
    data = bytes(FILE_BYTES)
    with tempfile.TemporaryFile() as file:
        start = time.monotonic()
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
        file.seek(0)
        file.read()
    return 2 * FILE_BYTES / (time.monotonic() - start)


# ---- runs ------------------------------------------------------------------------------------


def run_trials(base: BaseConfig, rates: Rates) -> list[Compared]:
    """Compares the formulas with these rates to what runs on this machine take.

    Raises: SourceError when the model or the text can't be had; UsageError where the system does
        not say how much memory a process has used.
    """
    if peak_memory() is None:
        raise UsageError(
            "the memory of a process can't be measured on this system: leave out --trials"
        )
    size, n, l0 = size_of(base.model), base.train.batch_size, active_latents(base.sae)
    d, results = size.d_model, []
    for tokens in HARVESTS:
        (counted, seconds, written), peak = _run_alone(_harvest_trial, base, tokens)
        what = f"harvest of {tokens:,} tokens"
        memory = process_bytes() + size.weights + harvest_bytes(size, base, tokens)
        disk = bytes_needed(counted, base.context, d, base.harvest.dtype)
        results += [
            Compared(f"{what}, time", "s", harvest_seconds(size, base, counted, rates), seconds),
            Compared(f"{what}, memory", "MB", memory / 1e6, peak / 1e6),
            Compared(f"{what}, disk", "MB", disk / 1e6, written / 1e6),
        ]
    for width in (factor * base.sae.d_sae for factor in FACTORS):
        seconds, peak = _run_alone(_step_seconds, base, n, d, width)
        what, step = f"training of {width:,} latents", step_seconds(rates, n, d, width, l0)
        rows = 8 * n * STEPS * d  # and the stream's copy; no sample
        memory = process_bytes() + state_bytes(n, d, [width]) + rows
        results += [
            Compared(f"{what}, time of a step", "ms", step * 1e3, seconds * 1e3),
            Compared(f"{what}, memory", "MB", memory / 1e6, peak / 1e6),
        ]
    return results


def _harvest_trial(base: BaseConfig, tokens: int) -> tuple[int, float, int]:
    """Counted tokens of a harvest, its processor seconds, and the bytes that it wrote."""
    model = language_model.load(base.model)
    ids = _random_ids(base, tokens)
    mask = torch.ones_like(ids).bool()
    mask[:, 0] = False  # where BOS would be
    texts = Tokens(ids, mask)
    model.activations(texts.ids[:2], None, base.hooks)
    with tempfile.TemporaryDirectory(prefix="saelab-trial-") as folder:
        start = time.process_time()
        harvest(model, texts, base.hooks, base.harvest, Path(folder))
        seconds = time.process_time() - start
        written = sum(file.stat().st_size for file in Path(folder).rglob("*.safetensors"))
    return texts.n_tokens, seconds, written


def _step_seconds(base: BaseConfig, n: int, d: int, width: int, steps: int = STEPS) -> float:
    """Processor seconds of a training step at the L0 of the settings, on made rows."""
    rows = torch.randn(
        n * steps, 1, d, generator=torch_stream(0, "trial rows"), dtype=torch.float32
    )
    source = MemorySource([Shard(rows, torch.ones(rows.shape[:2], dtype=torch.bool))], {})
    activation = base.sae.activation
    initial_l0 = min(active_latents(base.sae), width / 4)
    has_k = activation.target_l0 is not None or activation.l0_setting is not None
    if has_k or not activation.takes_initial_l0:
        initial_l0 = None
    config = base.sae.patched({"d_sae": width, "initial_l0": initial_l0})
    settings = base.train.patched({"batch_size": n, "tokens": n * steps})
    cell = Cell("trial", config, settings, rows[:, 0], seed=0)
    start, turns = time.process_time(), []

    def count(done: int, living: list[TrainingCell]) -> None:
        nonlocal start
        turns.append((time.process_time() - start) / done)
        start = time.process_time()

    train([cell], batches(source, 0, n), count)
    return statistics.median(turns[1:] or turns)  # the first one warms up


def _run_alone(work: Callable[..., Any], *arguments: Any) -> tuple[Any, float]:
    """The work's result, from a new process on one thread, and that process's largest memory."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, context) as pool:
        return pool.submit(_work_on_one_thread, work, *arguments).result()


def _work_on_one_thread(work: Callable[..., Any], *arguments: Any) -> tuple[Any, float]:
    os.environ["SAELAB_PROGRESS"] = "off"
    torch.set_num_threads(1)
    return work(*arguments), peak_memory() or 0


def trial_lines(results: Sequence[Compared]) -> list[str]:
    """The table, and the largest error of the times."""
    errors = [abs(math.log(one.predicted / one.actual)) for one in results]
    worst = results[errors.index(max(errors))]
    factor = math.exp(max(errors))
    return [
        HEADING,
        *(one.line() for one in results),
        f"worst: {worst.what}, a factor of {factor:.2f}",
    ]
