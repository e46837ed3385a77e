"""Core metrics in raw activation space on held-out text.

    FVU = sum |x - x_hat|^2 / sum |x - mean(x)|^2       explained variance = 1 - FVU
    loss recovered = (CE_zero - CE_spliced) / (CE_zero - CE_clean)
    rise of the loss = CE_spliced - CE_clean                          nats per token

CE_spliced runs the language model with the reconstruction in place of the activation, CE_zero with
zeros (primary), CE_mean with the mean activation (secondary). Only counted positions are replaced:
BOS and padding keep the model's activation in every condition. `saelab.runs.random_code` has the
share of the way from a random code, whose CE_spliced is of another subject.

SAEBench 0.6.0's formula of explained variance is wrong; this is the one SAELens uses.

Where other activations are reconstructed than are read, x in both formulas is the target, and the
splice is at its hook point; the code is that of the stored inputs, which no splice has changed. Of
several hook points each is divided by its own variance first, so that FVU is the mean of theirs;
rows of the slices `hook=...` are of each. `splices` says which are replaced together.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from saelab.evals.base import (
    Row,
    SkipAlone,
    SparseSubject,
    Subject,
    missing,
    needs_contexts,
    number,
    number_or_reason,
)
from saelab.evals.core_data import DEFINITION as DEFINITION
from saelab.evals.core_data import CoreData, reconstruct
from saelab.evals.text_sums import row_sums, with_losses
from saelab.kernels import Code

#: Rows encoded at once; bounds the dense code to that x d_sae floats. Our choice: a CPU keeps such
#: a chunk in its caches; a GPU, and a subject that makes no dense code, want large ones.
CHUNK, LARGE_CHUNK = 512, 4096
#: Width of the density histogram's bins in log10, and its lowest edge. Our choice.
BIN, LOWEST = 0.25, -5.0
#: Positions per bucket of the by-position slices.
BUCKET = 32
#: Positions [low, high) that an arm may be trained on alone, and positions it has then not seen.
EARLY, LATE = (0, 64), (64, 128)
#: Metrics that are also given by position.
POSITION_METRICS = ("fvu", "l0", "dead_share")


def evaluate_core(subject: Subject, data: CoreData) -> list[Row]:
    """Computes all core metrics of one subject.

    Returns: rows l0, fvu, explained_variance, mse, cosine, dead_share, loss_recovered,
        loss_recovered_mean, ce_*, ce_rise; fvu, l0 and dead_share by position, and of positions
        0-63 and 64-127 as position.<metric>_early and _late; the density histogram.
    """
    data.last_losses = None
    rows = [*_reconstruction_rows(subject, data), *_loss_rows(subject, data)]
    if data.last_losses is not None and data.text_sums is not None:
        losses = {**data.reference_tokens, "ce_spliced": data.last_losses[1].ce}
        data.text_sums = with_losses(data.text_sums, data.clusters, losses)
    return rows


@dataclass(frozen=True, kw_only=True)
class Reconstruction:
    """Errors and firings of a subject on rows.

    Args:
        error, power: squared distance of each row from its reconstruction and from the mean row;
            float32 [n].
        active: number of latents that fire in each row, float32 [n].
        cosine: of row and reconstruction, float32 [n].
        groups: of each row, int64 [n].
        firings: number of rows of each group in which each latent fires; int64 [groups, d_sae].
        of_hooks: FVU at each of several hook points; {} for a single one.
    """

    error: Tensor
    power: Tensor
    active: Tensor
    cosine: Tensor
    groups: Tensor
    firings: Tensor
    of_hooks: dict[str, float] = field(default_factory=dict)

    @property
    def fvu(self) -> float:
        """Fraction of variance unexplained."""
        return float(self.error.double().sum() / self.power.double().sum())

    @property
    def l0(self) -> float:
        """Latents per row."""
        return float(self.active.double().mean())

    @property
    def dead_share(self) -> float:
        """Share of latents that fire in none of the rows."""
        return float((self.firings.sum(0) == 0).double().mean())

    def in_groups(self, low: int, high: int) -> Reconstruction:
        """Returns the part of the rows in groups low to high - 1."""
        rows = (self.groups >= low) & (self.groups < high)
        return Reconstruction(
            error=self.error[rows],
            power=self.power[rows],
            active=self.active[rows],
            cosine=self.cosine[rows],
            groups=self.groups[rows],
            firings=self.firings[low:high],
        )


def measure_reconstruction(
    subject: Subject, data: CoreData, most: int | None = None, by_position: bool = False
) -> Reconstruction:
    """Encodes and decodes the held-out rows.

    Args:
        most: approximate number of rows; None for all.
        by_position: counts firings for each `BUCKET` of positions instead of all together.
    """
    (x, positions), targets, starts = data.rows, data.targets, None
    if needs_contexts(subject):
        x, positions, starts = data.shuffled_runs
        targets = data.targets[data.shuffled_order[0]]
    if most is not None:
        if starts is not None:
            runs = max(1, int(torch.searchsorted(starts, most, right=True)) - 1)
            starts = starts[: runs + 1]
            most = int(starts[-1])
        x, positions, targets = x[:most], positions[:most], targets[:most]
    groups = positions // BUCKET if by_position else torch.zeros_like(positions)
    error, active, cosine = (torch.empty(len(x), dtype=torch.float32) for _ in range(3))
    firings = torch.zeros(int(groups.max()) + 1, subject.d_sae, dtype=torch.int64)
    chunk = _rows_at_once(subject, data.device) if starts is None else len(x)
    channels = torch.zeros(targets.shape[1], dtype=torch.float64)
    for start in range(0, len(x), chunk):
        rows = x[start : start + chunk].to(data.device)
        wanted = rows if targets is x else targets[start : start + chunk].to(data.device)
        for part, x_hat, code in reconstruct(subject, rows, starts):
            block = slice(start + part.start, start + part.stop)
            squares = (wanted[part] - x_hat).square()
            if data.weights is not None:
                squares = squares * data.weights.to(squares)
                channels += squares.sum(0).cpu()
            error[block] = squares.sum(1)
            active[block] = code.row_counts.float()
            cosine[block] = torch.cosine_similarity(wanted[part], x_hat, dim=1)
            firings += _count_firings(code, groups[block], firings.shape).cpu()
    powers = (targets - data.mean).square()
    of_hooks: dict[str, float] = {}
    if data.weights is not None:
        powers = powers * data.weights
        parts = (channels, powers.sum(0))
        errors, totals = (part.split(list(data.hooks.values())) for part in parts)
        of_each = zip(data.hooks, errors, totals, strict=True)
        of_hooks = {hook: float(e.sum() / total.sum()) for hook, e, total in of_each}
    return Reconstruction(
        error=error,
        power=powers.sum(1),
        active=active,
        cosine=cosine,
        groups=groups,
        firings=firings,
        of_hooks=of_hooks,
    )


def _count_firings(code: Code, groups: Tensor, shape: torch.Size) -> Tensor:
    """Counts the rows of each group in which each latent fires; groups [rows] -> int64 [groups,
    d_sae]."""
    if shape[0] == 1:
        return code.firings[None]
    groups = groups.to(code.values.device)
    if code.support is None:
        members = torch.nn.functional.one_hot(groups, shape[0]).float()
        return (members.T @ code.active.float()).long()  # exact below 2^24 rows
    pairs = groups[code.support.rows] * shape[1] + code.support.latents
    return torch.bincount(pairs[code.active], minlength=shape.numel()).view(shape)


def _reconstruction_rows(subject: Subject, data: CoreData) -> Iterator[Row]:
    whole, definition = measure_reconstruction(subject, data, by_position=True), data.definition
    yield number("fvu", whole.fvu, definition)
    yield number("explained_variance", 1 - whole.fvu, definition)
    yield number("mse", float(whole.error.double().mean()) / len(data.mean), definition)
    yield number("cosine", float(whole.cosine.double().mean()), definition)
    yield number("l0", whole.l0, definition)
    yield number("dead_share", whole.dead_share, definition)
    for i in range(len(whole.firings)):
        if bool((whole.groups == i).any()):
            part = whole.in_groups(i, i + 1)
            name = f"position={i * BUCKET}-{(i + 1) * BUCKET - 1}"
            for metric in POSITION_METRICS:
                yield number(metric, getattr(part, metric), definition, name)
    for half, (low, high) in {"early": EARLY, "late": LATE}.items():
        part = whole.in_groups(low // BUCKET, high // BUCKET)
        for metric in POSITION_METRICS:
            name = f"position.{metric}_{half}"
            if len(part.error):
                yield number(name, getattr(part, metric), definition)
            else:
                reason = f"no held-out row has a position from {low} to {high - 1}"
                yield missing(name, definition, reason)
    firings, rows = whole.firings.sum(0), len(whole.error)
    data.density = firings.double() / rows
    order = data.shuffled_order[0] if needs_contexts(subject) else None
    values = {name: getattr(whole, name) for name in ("error", "power", "active", "cosine")}
    data.text_sums = row_sums(data.clusters, values, order)
    yield from _density_rows(firings, rows, definition)
    for hook, fvu in whole.of_hooks.items():
        yield number("fvu", fvu, definition, f"hook={hook}")
    if getattr(subject, "W_skip", None) is not None:
        past = measure_reconstruction(SkipAlone(subject), data)
        yield number("skip_only_fvu", past.fvu, definition)


def _rows_at_once(subject: Subject, device: str) -> int:
    """Returns the number of rows that are given to the subject at once."""
    sparse, cpu = isinstance(subject, SparseSubject), torch.device(device).type == "cpu"
    return CHUNK if cpu and not sparse else LARGE_CHUNK


def _density_rows(firings: Tensor, rows: int, definition: str) -> Iterator[Row]:
    """Rows of the share of latents per bin of log10 firing frequency; silent ones separately."""
    yield number(
        "density_histogram",
        float((firings == 0).double().mean()),
        definition,
        "log10_density=never",
    )
    bins = round(-LOWEST / BIN)
    logs = (firings[firings > 0].double() / rows).log10()
    index = ((logs - LOWEST) / BIN).floor().long().clamp(0, bins - 1)
    counts = torch.bincount(index, minlength=bins)
    for i, count in enumerate(counts.tolist()):
        edge = f"log10_density={LOWEST + i * BIN:.2f}"
        yield number("density_histogram", count / len(firings), definition, edge)


def loss_recovered(subject: Subject, data: CoreData) -> float | None:
    """Loss recovered against zeros; None where it can't be measured."""
    rows = {row.metric: row.value for row in _loss_rows(subject, data)}
    return rows["loss_recovered"]


def _loss_rows(subject: Subject, data: CoreData) -> Iterator[Row]:
    names = (
        "loss_recovered",
        "loss_recovered_mean",
        "ce_clean",
        "ce_zero",
        "ce_mean",
        "ce_spliced",
        "ce_rise",
    )
    definition = data.definition
    if data.why_no_loss:
        yield from (missing(name, definition, data.why_no_loss) for name in names)
        return
    losses = dict(data.reference_losses)
    tokens = data.spliced_losses(subject, data.with_kl)
    data.last_losses = subject, tokens
    losses["ce_spliced"] = data.mean_loss(tokens.ce)
    yield from (number(name, value, definition) for name, value in losses.items())
    yield number("ce_rise", losses["ce_spliced"] - losses["ce_clean"], definition)
    for name, ablated in (("loss_recovered", "ce_zero"), ("loss_recovered_mean", "ce_mean")):
        yield number_or_reason(name, _recovered(losses, ablated), definition)
    for hook, alone in data.losses_of_each(subject):
        share = _recovered({"ce_clean": losses["ce_clean"]} | alone, "ce_zero")
        yield number_or_reason("loss_recovered", share, definition, f"hook={hook}")
        rise = alone["ce_spliced"] - losses["ce_clean"]
        yield number("ce_rise", rise, definition, f"hook={hook}")


def _recovered(losses: Mapping[str, float], ablated: str) -> float | str:
    """Returns the loss recovered against an ablation, or the reason why there is none."""
    gap = losses[ablated] - losses["ce_clean"]
    if gap <= 0:
        return f"ablation does not hurt the model ({ablated} - ce_clean = {gap:.4f} nats)"
    return (losses[ablated] - losses["ce_spliced"]) / gap
