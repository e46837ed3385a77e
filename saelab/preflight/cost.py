"""What a long training costs, before it is paid for: hours, memory, disk, network.

    harvest   tokens x (2 W L/B + 4 c a L) / model rate          or bytes written / store rate
    step      (2 N d F / (R matrix rate) + bytes / (R memory rate)) / efficiency
              + 8 N d / link [R > 1] + overhead
    bytes     36 P + 8 N F + 16 N L0 d,    P = 2 d F + F + d     [one device: P/R, F/R, L0/R]
    memory    16 P / R + CODES 4 N F / R + language model + sample

W: weights of the model's blocks, of which L of B are run; c: context; a: width of the attention;
N: rows a step; R: devices that share a dictionary's latents. Of a parameter Adam reads and writes
28 bytes, its gradient 4, the copy for the GEMM 4; a pre-activation is written and read; of an
active latent four rows are read (decode, gradient of its value, both weights). That is the step of
sparse codes (docs/decisions/0001): a code that is not sparse costs five times the GEMM.

The formulas count; the rates are read from a table (saelab/assets/rates.toml), where they say
whether they were measured, or are measured here. `study/trials.py` checks both against runs here.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import NonNegativeFloat, PositiveFloat

from saelab.assets import EMBEDDED_MODEL
from saelab.config import Frozen, read_toml
from saelab.data import language_model
from saelab.data.activations.harvest import bytes_needed
from saelab.data.language_model import ModelConfig, Size
from saelab.errors import SettingError, SourceError, nearest
from saelab.preflight.memory import CODES, process
from saelab.study.plan import BaseConfig
from saelab.training.sample import SAMPLE_ROWS
from saelab.training.snapshots import snapshot_bytes

RATES = EMBEDDED_MODEL.parent / "rates.toml"
#: Widths of the table, 16k to 1M.
WIDTHS = (2**14, 2**16, 2**18, 2**20)
#: Active latents a row where the settings name no number. Our choice.
L0 = 64
#: Bytes of a text's token as it comes from the hub: about 4 characters, compressed to a half. Our
#: assumption.
TEXT_BYTES = 2.0
#: Share of a device's memory that may be filled. Our choice: the allocator and CUDA take the rest.
FILLED = 0.9
#: Bytes moved per parameter, per pre-activation, and per active latent and channel, in a step.
PARAMETER_BYTES, CODE_BYTES, ACTIVE_BYTES = 36, 8, 16
#: Bytes kept per parameter: the weight, its gradient, two moments.
STATE_BYTES = 16


class Rates(Frozen):
    """What a device does in a second, and where that is known from.

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


@dataclass(frozen=True)
class WidthCost:
    """What training one SAE of a width costs.

    Args:
        d_sae, parameters: of the SAE.
        ranks: devices that share its latents.
        device_bytes, host_bytes: memory of each device, and of the machine.
        step_seconds: of one step.
        hours, device_hours: of the training; the second over all devices.
        store_bound: whether reading the activations takes longer than training.
    """

    d_sae: int
    parameters: int
    ranks: int
    device_bytes: float
    host_bytes: float
    step_seconds: float
    hours: float
    device_hours: float
    store_bound: bool


@dataclass(frozen=True)
class Cost:
    """What a config costs on a device; hours with the rates' assumptions.

    Args:
        rates: of the device.
        tokens: harvested, and trained on by each SAE.
        harvest_flops: per token.
        harvest_hours: of one device; `harvest_store_bound`: whether writing takes longer.
        disk_bytes: of the activations.
        text_bytes, written_bytes, read_bytes: over the network: the text; the activations once,
            where they go to a URL; and from there for each SAE that is trained alone.
        l0: active latents a row.
        widths: one for each.
    """

    rates: Rates
    tokens: int
    harvest_flops: float
    harvest_hours: float
    harvest_store_bound: bool
    disk_bytes: float
    text_bytes: float
    written_bytes: float
    read_bytes: float
    l0: float
    widths: tuple[WidthCost, ...]

    def as_dict(self) -> dict[str, Any]:
        """Plain data for --json."""
        return {**asdict(self), "rates": self.rates.model_dump()}


def known_rates(name: str, file: Path = RATES) -> Rates:
    """The rates of a device in a table.

    Raises: SettingError for a device that is not there; SourceError for a file that can't be read.
    """
    devices = read_toml(file).get("devices", {})
    if name not in devices:
        remedy = f"no such device{nearest(name, devices)}; use here or {', '.join(devices)}"
        raise SettingError("--device", name, remedy)
    return Rates.parse(devices[name], where=f"{file.name}: devices.{name}")


def size_of(config: ModelConfig, file: Path = RATES) -> Size:
    """The size of a model: from the table, so that it need not be at hand, or from its own files.

    Raises: SourceError when it is neither in the table nor found.
    """
    known = read_toml(file).get("models", {}).get(config.path)
    if known is None:
        return language_model.size(config)
    weights = known["parameters"] * getattr(torch, config.dtype).itemsize
    names = ("d_model", "inner", "vocabulary", "blocks", "attention")
    return Size(weights, *(int(known[name]) for name in names))


# ---- formulas --------------------------------------------------------------------------------


def harvest_flops(size: Size, base: BaseConfig) -> float:
    """Of one position, in the blocks up to the hook point."""
    each = getattr(torch, base.model.dtype).itemsize
    of_block = max(0.0, size.weights / each - size.vocabulary * size.d_model) / size.blocks
    run = language_model.blocks_run(base.hook_name, size.blocks)
    return run * (2 * of_block + 4 * base.context * size.attention)


def parameters(d: int, d_sae: int) -> int:
    return 2 * d * d_sae + d_sae + d


def step_seconds(rates: Rates, n: int, d: int, d_sae: int, l0: float, ranks: int = 1) -> float:
    """Seconds of one training step of n rows.

    Args:
        d, d_sae: channels and latents.
        l0: active latents a row.
        ranks: devices that share the latents.
    """
    moved = PARAMETER_BYTES * parameters(d, d_sae) + CODE_BYTES * n * d_sae
    moved += ACTIVE_BYTES * n * l0 * d
    seconds = 2 * n * d * d_sae / rates.matrix + moved / rates.memory
    seconds /= ranks * rates.step_efficiency
    if ranks > 1:
        seconds += 8 * n * d / rates.link
    return seconds + rates.step_seconds


def state_bytes(n: int, d: int, d_sae: int, ranks: int = 1) -> float:
    """Memory of one SAE in training on each device: parameters, gradient, moments, dense codes and
    the rows that initialise it."""
    shared = STATE_BYTES * parameters(d, d_sae) + 4 * CODES * n * d_sae
    return shared / ranks + 4 * SAMPLE_ROWS * d


def shard_memory(base: BaseConfig, d: int) -> float:
    """Memory of the stream: a shard as it is stored, its rows in float32, and their copy."""
    itemsize = getattr(torch, base.harvest.dtype).itemsize
    return min(base.harvest.shard_tokens, base.train.tokens) * d * (itemsize + 8)


def active_latents(base: BaseConfig) -> float:
    """The L0 that the settings name, or our choice."""
    return base.sae.target_l0 or float(L0)


def cost(
    base: BaseConfig,
    rates: Rates,
    widths: Sequence[int] = WIDTHS,
    ranks: int | None = None,
    l0: float | None = None,
) -> Cost:
    """What the training of one SAE of each width costs on the activations of `base`.

    Args:
        ranks: devices for each SAE; None takes the smallest power of two whose memory is enough.
        l0: active latents a row; None takes what the settings name.

    Raises: SourceError when the model's size is not known; SettingError for an impossible width.
    """
    if base.activations is not None:
        raise SettingError("activations", base.activations, "leave it out: a harvest is counted")
    if bad := [width for width in widths if width < 1]:
        raise SettingError("--width", bad[0], "use at least 1")
    size, tokens = size_of(base.model), base.train.tokens
    flops = harvest_flops(size, base)
    stored = bytes_needed(tokens, base.context, size.d_model, base.harvest.dtype)
    positions = tokens * base.context / max(1, base.context - 1)
    computing, writing = positions * flops / rates.model / 3600, stored / rates.store / 3600
    l0 = active_latents(base) if l0 is None else l0
    return Cost(
        rates,
        tokens,
        flops,
        max(computing, writing),
        writing > computing,
        stored,
        tokens * TEXT_BYTES,
        stored,
        stored,
        l0,
        tuple(_width_cost(base, rates, size, width, ranks, l0, stored) for width in widths),
    )


def _width_cost(
    base: BaseConfig,
    rates: Rates,
    size: Size,
    width: int,
    ranks: int | None,
    l0: float,
    stored: float,
) -> WidthCost:
    n, d = base.train.batch_size, size.d_model
    ranks = _fewest(rates, n, d, width, size.weights) if ranks is None else ranks
    if ranks > 1 and not rates.link:
        raise SettingError("--ranks", ranks, f"{rates.title} has no link to others: use 1")
    seconds = step_seconds(rates, n, d, width, l0, ranks)
    training, reading = base.train.steps * seconds / 3600, stored / rates.store / 3600
    host = process() + 9 * base.train.tokens + shard_memory(base, d) + base.harvest.read_ahead
    return WidthCost(
        width,
        parameters(d, width),
        ranks,
        state_bytes(n, d, width, ranks) + size.weights,
        host + snapshot_bytes(base.evaluation.snapshots, width, d),
        seconds,
        max(training, reading),
        max(training, reading) * ranks,
        reading > training,
    )


def _fewest(rates: Rates, n: int, d: int, width: int, weights: int) -> int:
    """The smallest power of two of devices whose memory holds the training; 1 without a link."""
    ranks = 1
    while rates.link and state_bytes(n, d, width, ranks) + weights > FILLED * rates.capacity:
        ranks *= 2
        if ranks > width:
            raise SourceError(
                f"{rates.title} holds no share of {width} latents: name another device"
            )
    return ranks


# ---- in words --------------------------------------------------------------------------------


def text(found: Cost) -> str:
    """What `saelab plan cost` prints."""
    rates = found.rates
    kind = "measured" if rates.measured else "ASSUMED, not measured"
    lines = [
        f"{rates.title}: rates are {kind} ({rates.source})",
        f"  {rates.model / 1e12:.4g} TFLOP/s in the language model, {rates.matrix / 1e12:.4g} in "
        f"GEMMs, {rates.memory / 1e9:.4g} GB/s of memory, {rates.store / 1e9:.3g} GB/s of store; "
        f"a training step reaches {rates.step_efficiency:.0%} of them",
        f"harvest of {found.tokens:,} tokens: {_hours(found.harvest_hours)}"
        f"{', bound by the store' if found.harvest_store_bound else ''} "
        f"({found.harvest_flops / 1e9:.4g} GFLOP a token)",
        f"activations: {_bytes(found.disk_bytes)} of disk; network: {_bytes(found.text_bytes)} of "
        f"text, {_bytes(found.written_bytes)} written to a URL, {_bytes(found.read_bytes)} read "
        "from it for each SAE",
        f"training at L0 {found.l0:g}:",
        f"{'latents':>10}  {'parameters':>10}  {'devices':>7}  {'each device':>11}  {'host':>8}  "
        f"{'step':>9}  {'hours':>8}  {'device hours':>12}",
    ]
    for row in found.widths:
        note = "  bound by the store" if row.store_bound else ""
        lines.append(
            f"{row.d_sae:>10,}  {_short(row.parameters):>10}  {row.ranks:>7}  "
            f"{_bytes(row.device_bytes):>11}  {_bytes(row.host_bytes):>8}  "
            f"{row.step_seconds * 1e3:>6.3g} ms  {row.hours:>8.3g}  {row.device_hours:>12.3g}{note}"
        )
    return "\n".join(lines)


def _hours(hours: float) -> str:
    return f"{hours:.3g} hours"


def _short(count: float) -> str:
    return f"{count / 1e9:.3g} G" if count >= 1e9 else f"{count / 1e6:.3g} M"


def _bytes(count: float) -> str:
    power = min(4, int(math.log10(max(1.0, count)) // 3))
    return f"{count / 1000**power:.3g} {('B', 'kB', 'MB', 'GB', 'TB')[power]}"
