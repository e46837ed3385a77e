"""Rates of devices and sizes of models: read from a table (saelab/assets/rates.toml), or measured.

The table says of each device whether its rates were measured. One thread of this machine is timed
in a fraction of a second (`thread_rates`): good enough to say how long a launch will take.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from pathlib import Path

import torch
from pydantic import NonNegativeFloat, PositiveFloat

from saelab.assets import EMBEDDED_MODEL
from saelab.config import Frozen, read_toml
from saelab.data import language_model
from saelab.data.language_model import ModelConfig, Size
from saelab.errors import SettingError, SourceError, nearest
from saelab.kernels.table import Precision, selection_dtype
from saelab.runtime.system import machine_memory
from saelab.runtime.torch_defaults import one_thread

RATES = EMBEDDED_MODEL.parent / "rates.toml"
#: Times that a rate is measured; the best counts.
TIMES = 5
#: Bytes of memory of a machine that does not say how much it has: no training is too large for it.
UNKNOWN_MEMORY = 1e15
#: GEMM [rows, channels] x [channels, latents] and floats of a vector that rates are measured by.
GEMM, FLOATS = (512, 512, 4096), 2**24
#: Shares of the GEMM's rate in its dtype that a language model reaches on a processor. Measured on
#: an EPYC with AVX512-BF16: in float32 0.98 to 1.04 (the embedded model) and 0.86 to 0.93
#: (SmolLM2-135M), in bfloat16 0.71 to 0.75.
MODEL_SHARES = {torch.float32: 0.95, torch.bfloat16: 0.75}
#: Share of the rates that a training step reaches, and its seconds besides its work. Measured by
#: `rates_here`: 0.47 to 0.6 and 0.97 ms.
STEP_SHARE, STEP_SECONDS = 0.5, 1e-3


class Rates(Frozen):
    """Work that a device does in a second, and the source of these numbers.

    Args:
        title, source: for the reader.
        measured: whether the rates were measured on the device; else they are supposed.
        peak_flops, peak_memory: FLOP/s of bfloat16 GEMMs and bytes/s of memory.
        matrix_efficiency, model_efficiency, memory_efficiency: shares of the peaks that large
            GEMMs, a language model and streaming kernels reach.
        capacity: bytes of memory.
        link: bytes/s to the other devices, 0 where there are none.
        step_efficiency: share of these rates that the work of a training step reaches.
        step_seconds: of a training step besides its work.
        store: bytes/s to and from the place of the activations.
    """

    title: str
    source: str
    measured: bool
    peak_flops: PositiveFloat
    peak_memory: PositiveFloat
    matrix_efficiency: PositiveFloat = 1.0
    model_efficiency: PositiveFloat = 1.0
    memory_efficiency: PositiveFloat = 1.0
    capacity: PositiveFloat
    link: NonNegativeFloat = 0.0
    step_efficiency: PositiveFloat = 1.0
    step_seconds: NonNegativeFloat = 0.0
    store: PositiveFloat

    @property
    def matrix(self) -> float:
        """FLOP/s of the encoder's GEMM."""
        return self.peak_flops * self.matrix_efficiency

    @property
    def model(self) -> float:
        """FLOP/s of the language model."""
        return self.peak_flops * self.model_efficiency

    @property
    def memory(self) -> float:
        """Bytes/s of an optimiser's pass."""
        return self.peak_memory * self.memory_efficiency


def read_rates(name: str, file: Path = RATES) -> Rates:
    """Reads the rates of a device from a table.

    Raises: SettingError for a device that is not there; SourceError for a file that can't be read.
    """
    devices = read_toml(file).get("devices", {})
    if not isinstance(devices, dict):
        raise SourceError(f"{file} has no tables [devices.NAME]: name a table of rates")
    if name not in devices:
        remedy = f"no such device{nearest(name, devices)}; use here or {', '.join(devices)}"
        raise SettingError("--device", name, remedy)
    return Rates.parse(devices[name], where=f"{file.name}: devices.{name}")


def size_of(config: ModelConfig, file: Path = RATES) -> Size:
    """Reads the size of a model from the table, so that it need not be at hand, or from its files.

    Raises: SourceError when the model is neither in the table nor found.
    """
    row = read_toml(file).get("models", {}).get(config.path)
    if row is None:
        return language_model.size(config)
    weights = row["parameters"] * getattr(torch, config.dtype).itemsize
    names = ("d_model", "inner", "vocabulary", "blocks", "attention")
    d_model, inner, vocabulary, blocks, attention = (int(row[name]) for name in names)
    return Size(
        weights=weights,
        d_model=d_model,
        inner=inner,
        vocabulary=vocabulary,
        blocks=blocks,
        attention=attention,
    )


@functools.cache
def thread_rates(precision: Precision = "auto") -> Rates:
    """Measures a GEMM and a pass over memory on one thread of this machine's processor.

    Args:
        precision: of the GEMM, as the settings of an SAE name it; `model_rates` asks for that of a
            language model.
    """
    dtype = selection_dtype(precision, torch.device("cpu"))
    n, d, latents = GEMM
    with one_thread():
        a, b = torch.ones(n, d, dtype=dtype), torch.ones(latents, d, dtype=dtype)
        matrix = 2 * n * d * latents / best_seconds(lambda: torch.nn.functional.linear(a, b))
        x = torch.ones(FLOATS, dtype=torch.float32)
        y = x.clone()
        memory = 3 * 4 * FLOATS / best_seconds(lambda: y.add_(x))
    return Rates(
        title="one thread of this machine's processor",
        source="measured by this command",
        measured=True,
        peak_flops=matrix,
        peak_memory=memory,
        model_efficiency=MODEL_SHARES[dtype],
        step_efficiency=STEP_SHARE,
        step_seconds=STEP_SECONDS,
        capacity=machine_memory() or UNKNOWN_MEMORY,
        store=1e9,
    )


def model_rates(dtype: str) -> Rates:
    """Measures one thread of this machine's processor in the dtype of a language model."""
    return thread_rates("bfloat16" if dtype == "bfloat16" else "float32")


def best_seconds(work: Callable[[], object]) -> float:
    """Times a few calls; returns the processor seconds of the fastest.

    Processor time leaves out what others do on the machine.
    """
    work()
    seconds = []
    for _ in range(TIMES):
        start = time.process_time()
        work()
        seconds.append(time.process_time() - start)
    return min(seconds)
