"""Rates measured on this machine, and what `cost` predicts beside runs that are made here.

Everything runs on one thread and is timed in processor time, so that others at work on the machine
count less; each run has a process of its own, whose largest memory is read at its end. A rate is
the best of a few short ones; the runs that are compared have other sizes than those.
"""

from __future__ import annotations

import math
import multiprocessing
import os
import resource
import statistics
import sys
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
from saelab.data.language_model import Size
from saelab.data.text.tokens import Tokens
from saelab.kernels.table import selection_dtype
from saelab.preflight.cost import (
    Rates,
    active_latents,
    harvest_flops,
    size_of,
    state_bytes,
    step_seconds,
)
from saelab.preflight.memory import harvest_bytes, process
from saelab.seeding import torch_stream
from saelab.study.plan import BaseConfig
from saelab.training.cell import TrainingCell
from saelab.training.loop import Cell, train
from saelab.training.sample import SAMPLE_ROWS

#: Times that a rate is measured; the best counts.
TIMES = 5
#: GEMM [rows, channels] x [channels, latents] and floats of a vector that rates are measured by;
#: tokens of the forward pass. Our choice: a second or two in all.
GEMM, FLOATS, TOKENS = (512, 512, 4096), 2**24, 2048
#: Steps of a trial.
STEPS = 28
#: Tokens that the trials harvest, widths that they train, as multiples of the settings' width; and
#: the one whose steps say what share of the rates a step reaches.
HARVESTS, FACTORS, MEASURED_FACTOR = (8_192, 32_768), (1, 4), 2
#: The tiny SAE whose step is all overhead: rows, channels, latents.
TINY = (8, 8, 64)
#: Bytes written and read back to measure the disk.
FILE_BYTES = 2**26


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


HEADING = f"{'':44}  {'predicted':>10}  {'actual':>10} {'':5} {'error':>7}"


# ---- rates -----------------------------------------------------------------------------------


def rates_here(base: BaseConfig) -> Rates:
    """The rates of one thread of this machine's processor, measured now.

    Raises: SourceError when the model can't be loaded.
    """
    return Rates.parse(_alone(_measured, base.model_dump(mode="json")))


def _measured(settings: dict[str, Any]) -> dict[str, Any]:
    torch.set_num_threads(1)
    base = BaseConfig.parse(settings)
    dtype = selection_dtype(base.sae.precision, torch.device("cpu"))
    n, d, latents = GEMM
    a, b = torch.ones(n, d, dtype=dtype), torch.ones(latents, d, dtype=dtype)
    matrix = 2 * n * d * latents / _best(lambda: torch.nn.functional.linear(a, b))
    x, y = torch.ones(FLOATS), torch.ones(FLOATS)
    memory = 3 * 4 * FLOATS / _best(lambda: y.add_(x))
    rates = {
        "title": "one thread of this machine's processor",
        "source": "measured by this command",
        "measured": True,
        "peak_flops": matrix,
        "peak_memory": memory,
        "model_efficiency": _model_flops(base) / matrix,
        "capacity": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "step_seconds": _step_seconds(base, *TINY, STEPS),
        "store": _disk(),
    }
    return rates | {"step_efficiency": _step_efficiency(base, Rates.parse(rates))}


def _step_efficiency(base: BaseConfig, rates: Rates) -> float:
    """What a step's work should take by the rates, over what it takes."""
    n, d = base.train.batch_size, size_of(base.model).d_model
    width = MEASURED_FACTOR * base.sae.d_sae
    work = step_seconds(rates, n, d, width, active_latents(base)) - rates.step_seconds
    actual = _step_seconds(base, n, d, width, STEPS) - rates.step_seconds
    return work / max(actual, 1e-9)


def _best(work: Callable[[], object]) -> float:
    """Processor seconds of the fastest of a few calls."""
    work()
    found = []
    for _ in range(TIMES):
        start = time.process_time()
        work()
        found.append(time.process_time() - start)
    return min(found)


def _model_flops(base: BaseConfig) -> float:
    """FLOP/s of a pass of the model through all of its blocks."""
    model = language_model.load(base.model)
    size = size_of(base.model)
    hook = f"blocks.{size.blocks - 1}.hook_resid_post"
    parts = _ids(base, size, TOKENS).split(base.harvest.batch)
    seconds = _best(lambda: [model.activations(part, None, [hook]) for part in parts])
    positions = sum(part.numel() for part in parts)
    return positions * harvest_flops(size, base.patched({"hook_name": hook})) / seconds


def _ids(base: BaseConfig, size: Size, tokens: int) -> torch.Tensor:
    """Made-up token ids, int64 [contexts, context]: what a pass costs does not depend on them."""
    shape = (-(-tokens // base.context), base.context)
    return torch.randint(size.vocabulary, shape, generator=torch_stream(0, "trial ids"))


def _disk() -> float:
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


def trials(base: BaseConfig, rates: Rates) -> list[Compared]:
    """What the formulas say with these rates beside what runs on this machine take.

    Raises: SourceError when the model or the text can't be had.
    """
    size, settings = size_of(base.model), base.model_dump(mode="json")
    found = []
    for tokens in HARVESTS:
        made = _alone(_harvest_trial, settings, tokens)
        positions = made["positions"]
        what = f"harvest of {tokens:,} tokens"
        seconds = positions * harvest_flops(size, base) / rates.model
        memory = (
            process()
            + size.weights
            + harvest_bytes(size, base.context, tokens, base.harvest, "cpu")
        )
        disk = bytes_needed(made["tokens"], base.context, size.d_model, base.harvest.dtype)
        found += [
            Compared(f"{what}, time", "s", seconds, made["seconds"]),
            Compared(f"{what}, memory", "MB", memory / 1e6, made["memory"] / 1e6),
            Compared(f"{what}, disk", "MB", disk / 1e6, made["bytes"] / 1e6),
        ]
    n, l0 = base.train.batch_size, active_latents(base)
    for width in (factor * base.sae.d_sae for factor in FACTORS):
        made = _alone(_training_trial, settings, size.d_model, width)
        what = f"training of {width:,} latents"
        step = step_seconds(rates, n, size.d_model, width, l0)
        memory = process() + state_bytes(n, size.d_model, width) + made["data"]
        found += [
            Compared(f"{what}, time of a step", "ms", step * 1e3, made["seconds"] * 1e3),
            Compared(f"{what}, memory", "MB", memory / 1e6, made["memory"] / 1e6),
        ]
    return found


def _harvest_trial(settings: dict[str, Any], tokens: int) -> dict[str, float]:
    torch.set_num_threads(1)
    base = BaseConfig.parse(settings)
    model = language_model.load(base.model)
    ids = _ids(base, size_of(base.model), tokens)
    mask = torch.ones_like(ids).bool()
    mask[:, 0] = False  # where BOS would be
    texts = Tokens(ids, mask)
    model.activations(texts.ids[:2], None, [base.hook_name])
    with tempfile.TemporaryDirectory(prefix="saelab-trial-") as folder:
        start = time.process_time()
        harvest(model, texts, [base.hook_name], base.harvest, Path(folder))
        seconds = time.process_time() - start
        written = sum(file.stat().st_size for file in Path(folder).rglob("*.safetensors"))
    return {
        "seconds": seconds,
        "positions": ids.numel(),
        "tokens": texts.n_tokens,
        "bytes": written,
        "memory": _memory(),
    }


def _training_trial(settings: dict[str, Any], d: int, width: int) -> dict[str, float]:
    torch.set_num_threads(1)
    base = BaseConfig.parse(settings)
    n = base.train.batch_size
    seconds = _step_seconds(base, n, d, width, STEPS)
    data = 4 * d * (2 * n * STEPS - SAMPLE_ROWS)  # the rows and the stream's copy; no sample
    return {"seconds": seconds, "data": data, "memory": _memory()}


def _step_seconds(base: BaseConfig, n: int, d: int, width: int, steps: int) -> float:
    """Processor seconds of a training step at the L0 of the settings, on made rows."""
    rows = torch.randn(n * steps, 1, d, generator=torch_stream(0, "trial rows"))
    source = MemorySource([Shard(rows, torch.ones(rows.shape[:2], dtype=torch.bool))], {})
    changes: dict[str, Any] = {"d_sae": width, "initial_l0": min(active_latents(base), width / 4)}
    activation = base.sae.activation
    if activation.target_l0 is not None or activation.l0_setting is not None:
        changes["initial_l0"] = None
    settings = base.train.patched({"batch_size": n, "tokens": n * steps})
    cell = Cell("trial", base.sae.patched(changes), settings, rows[:, 0], seed=0)
    start, turns = time.process_time(), []

    def count(done: int, living: list[TrainingCell]) -> None:
        nonlocal start
        turns.append((time.process_time() - start) / done)
        start = time.process_time()

    train([cell], batches(source, 0, n), count)
    return statistics.median(turns[1:] or turns)  # the first one warms up


def _memory() -> float:
    """The largest memory that this process has had, bytes."""
    unit = 1 if sys.platform == "darwin" else 1024
    return float(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit)


def _alone(work: Callable[..., Any], *arguments: Any) -> Any:
    """The work's result, from a new process on one thread."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, context, _begin) as pool:
        return pool.submit(work, *arguments).result()


def _begin() -> None:
    os.environ["SAELAB_PROGRESS"] = "off"
    torch.set_num_threads(1)


def trial_lines(found: Sequence[Compared]) -> list[str]:
    """The table, and the largest error of the times."""
    errors = [abs(math.log(one.predicted / one.actual)) for one in found]
    worst = found[errors.index(max(errors))]
    factor = math.exp(max(errors))
    return [
        HEADING,
        *(one.line() for one in found),
        f"worst: {worst.what}, a factor of {factor:.2f}",
    ]
