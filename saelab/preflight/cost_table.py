"""Costs of a long training before it is paid for: what `saelab plan cost` prints."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from saelab.data.activations.harvest import bytes_needed
from saelab.data.language_model import Size
from saelab.errors import SettingError, SourceError
from saelab.preflight.cost import (
    active_latents,
    device_bytes,
    harvest_flops,
    harvest_seconds,
    parameters,
    process_bytes,
    shard_bytes,
    step_seconds,
)
from saelab.preflight.rates import Rates, size_of
from saelab.study.plan import BaseConfig
from saelab.training.snapshots import snapshot_bytes

#: Widths of the table, 16k to 1M.
WIDTHS = (2**14, 2**16, 2**18, 2**20)
#: Bytes of a text's token as it comes from the hub: about 4 characters, compressed to a half. Our
#: assumption.
TEXT_BYTES = 2.0
#: Share of a device's memory that may be filled. Our choice: the allocator and CUDA take the rest.
FILLED = 0.9


@dataclass(frozen=True, kw_only=True)
class WidthCost:
    """Costs of training one SAE of a width.

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


@dataclass(frozen=True, kw_only=True)
class Cost:
    """Costs of a config on a device; hours with the rates' assumptions.

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


def count_cost(
    base: BaseConfig,
    rates: Rates,
    widths: Sequence[int] = WIDTHS,
    ranks: int | None = None,
    l0: float | None = None,
) -> Cost:
    """Counts the harvest of `base` and the training of one SAE of each width on it.

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
    stored = bytes_needed(tokens, base.context, size.d_model, base.harvest.dtype)
    computing = harvest_seconds(size, base, tokens, rates) / 3600
    writing = stored / rates.store / 3600
    l0 = active_latents(base.sae) if l0 is None else l0
    return Cost(
        rates=rates,
        tokens=tokens,
        harvest_flops=harvest_flops(size, base),
        harvest_hours=max(computing, writing),
        harvest_store_bound=writing > computing,
        disk_bytes=stored,
        text_bytes=tokens * TEXT_BYTES,
        written_bytes=stored,
        read_bytes=stored,
        l0=l0,
        widths=tuple(_width_cost(base, rates, size, w, ranks, l0, reading=writing) for w in widths),
    )


def _width_cost(
    base: BaseConfig,
    rates: Rates,
    size: Size,
    width: int,
    ranks: int | None,
    l0: float,
    reading: float,
) -> WidthCost:
    n, d = base.train.batch_size, size.d_model
    ranks = _fewest_ranks(rates, n, d, width, size.weights) if ranks is None else ranks
    if ranks > 1 and not rates.link:
        raise SettingError("--ranks", ranks, f"{rates.title} has no link to others: use 1")
    seconds = step_seconds(rates, n, d, width, l0, ranks)
    training = base.train.steps * seconds / 3600
    return WidthCost(
        d_sae=width,
        parameters=parameters(d, width),
        ranks=ranks,
        device_bytes=device_bytes(n, d, width, ranks) + size.weights,
        host_bytes=_host_bytes(base, d) + snapshot_bytes(base.evaluation.snapshots, width, d),
        step_seconds=seconds,
        hours=max(training, reading),
        device_hours=max(training, reading) * ranks,
        store_bound=reading > training,
    )


def _host_bytes(base: BaseConfig, d: int) -> float:
    """Memory of the machine besides snapshots: a process, token ids, and the stream's shards."""
    tokens = min(base.harvest.shard_tokens, base.train.tokens)
    shard = sum(shard_bytes(tokens, d, base.harvest.dtype))
    return process_bytes() + 9 * base.train.tokens + shard + base.harvest.read_ahead


def _fewest_ranks(rates: Rates, n: int, d: int, width: int, weights: int) -> int:
    """The smallest power of two of devices whose memory holds the training; 1 without a link."""
    ranks = 1
    while rates.link and device_bytes(n, d, width, ranks) + weights > FILLED * rates.capacity:
        ranks *= 2
        if ranks > width:
            raise SourceError(
                f"{rates.title} holds no share of {width} latents: name another device"
            )
    return ranks


def cost_text(cost: Cost) -> str:
    """The table for people."""
    rates = cost.rates
    kind = "measured" if rates.measured else "ASSUMED, not measured"
    lines = [
        f"{rates.title}: rates are {kind} ({rates.source})",
        f"  {rates.model / 1e12:.4g} TFLOP/s in the language model, {rates.matrix / 1e12:.4g} in "
        f"GEMMs, {rates.memory / 1e9:.4g} GB/s of memory, {rates.store / 1e9:.3g} GB/s of store; "
        f"a training step reaches {rates.step_efficiency:.0%} of them",
        f"harvest of {cost.tokens:,} tokens: {_hours(cost.harvest_hours)}"
        f"{', bound by the store' if cost.harvest_store_bound else ''} "
        f"({cost.harvest_flops / 1e9:.4g} GFLOP a token)",
        f"activations: {_bytes(cost.disk_bytes)} of disk; network: {_bytes(cost.text_bytes)} of "
        f"text, {_bytes(cost.written_bytes)} written to a URL, {_bytes(cost.read_bytes)} read "
        "from it for each SAE",
        f"training at L0 {cost.l0:g}:",
        f"{'latents':>10}  {'parameters':>10}  {'devices':>7}  {'each device':>11}  {'host':>8}  "
        f"{'step':>9}  {'hours':>8}  {'device hours':>12}",
    ]
    for row in cost.widths:
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
