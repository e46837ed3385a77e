"""Core metrics in raw activation space on held-out text.

    FVU = sum |x - x_hat|^2 / sum |x - mean(x)|^2       explained variance = 1 - FVU
    loss recovered = (CE_zero - CE_spliced) / (CE_zero - CE_clean)

CE_spliced runs the language model with the reconstruction in place of the activation, CE_zero with
zeros (primary), CE_mean with the mean activation (secondary). Only counted positions are replaced:
BOS and padding keep the model's activation in every condition.

SAEBench 0.6.0's formula of explained variance is wrong; this is the one SAELens uses.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import cached_property

import torch
from torch import Tensor

from saelab.data.activations.store import FOREIGN_REASON, Source, check_rows_differ
from saelab.data.activations.stream import Batch
from saelab.data.language_model import LanguageModel, Start, next_token_losses
from saelab.evals.base import (
    Row,
    SparseSubject,
    Subject,
    complete,
    missing,
    needs_contexts,
    number,
)
from saelab.evals.text_sums import Clusters, TextSums, clusters_of, row_sums, with_losses
from saelab.kernels import Code

DEFINITION = "core/1"
#: Rows encoded at once; bounds the dense code to that x d_sae floats. Our choice: a CPU keeps such
#: a chunk in its caches; a GPU, and a subject that makes no dense code, want large ones.
CHUNK, LARGE_CHUNK = 512, 4096
#: Contexts per forward pass of the language model.
CONTEXTS = 32
#: Contexts of a quick loss. Our choice.
QUICK = 8
#: Width of the density histogram's bins in log10, and its lowest edge. Our choice.
BIN, LOWEST = 0.25, -5.0
#: Log-probabilities of the unchanged model that are stored for the KL divergence, which bounds the
#: contexts it is measured on. Our choice: 67 MB.
STORED_LOG_PROBS = 1 << 24
#: Positions per bucket of the by-position slices.
BUCKET = 32
#: Positions [low, high) that an arm may be trained on alone, and positions it has then not seen.
EARLY, LATE = (0, 64), (64, 128)
#: Metrics that are also given by position.
POSITION_METRICS = ("fvu", "l0", "dead_share")

#: Rows [n, d] and the starts of their runs of tokens [m + 1] -> replacements of the rows [n, d].
Replace = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True, eq=False)
class TokenLosses:
    """Losses of each next token, on the CPU; entry p is the prediction made at position p.

    Args:
        ce: cross entropy in nats, float32 [contexts, positions - 1].
        kl: KL(clean || spliced) in nats of the first contexts, float32 [first, positions - 1];
            first = 0 where it was not measured.
    """

    ce: Tensor
    kl: Tensor


@dataclass
class CoreData:
    """Held-out activations and, if present, the language model they came from.

    Args:
        source: held-out activations with token ids.
        model: None when the activations were made elsewhere.
        loss_contexts: number of contexts that loss recovered is measured on.
        device: of the subjects.
        density: share of the held-out rows in which each latent fires, of the subject that
            `evaluate_core` measured last; float64 [d_sae].
        with_kl: makes `evaluate_core` measure the KL divergence along with its losses.
        text_sums: what the metrics of that subject are made of, document by document.
        last_losses: the subject that `evaluate_core` measured last and its losses, for evaluations
            that follow in one call of `measure.evaluate`, which clears them at its start and end.
    """

    source: Source
    model: LanguageModel | None
    loss_contexts: int = 128
    device: str = "cpu"
    density: Tensor | None = field(default=None, init=False)
    text_sums: TextSums | None = field(default=None, init=False)
    with_kl: bool = field(default=False, init=False)
    last_losses: tuple[Subject, TokenLosses] | None = field(default=None, init=False)

    @cached_property
    def rows(self) -> tuple[Tensor, Tensor]:
        """All counted rows: x float32 [n, d], position int64 [n].
        Raises: SourceError when all rows are the same."""
        return self._read[0]

    @cached_property
    def _read(self) -> tuple[tuple[Tensor, Tensor], list[Tensor], list[Tensor | None]]:
        """`rows`, and masks and documents of all shards, from one pass over them."""
        rows, masks, documents = [], [], []
        for i in range(self.source.n_shards):
            shard = self.source.shard(i)
            rows.append(shard.rows())
            masks.append(shard.mask.clone())
            documents.append(shard.documents)
        x = torch.cat([x for x, _ in rows])
        check_rows_differ(x, "held-out activations")
        return (x, torch.cat([p for _, p in rows])), masks, documents

    @cached_property
    def shuffled_runs(self) -> tuple[Tensor, Tensor, Tensor]:
        """Counted rows with their runs of tokens in another order, and the start of each run.

        A control that drives one run's trace by another's must not find it in the same document:
        neighbours here come from places far from each other.

        Returns: x float32 [n, d], position int64 [n], starts int64 [m + 1].
        """
        (x, positions), (order, starts) = self.rows, self.shuffled_order
        return x[order], positions[order], starts

    @cached_property
    def shuffled_order(self) -> tuple[Tensor, Tensor]:
        """Numbers of the counted rows as `shuffled_runs` has them, int64 [n]; starts [m + 1]."""
        runs: list[tuple[int, int]] = []
        first = 0
        for mask in self._read[1]:
            rows = Batch(mask.unsqueeze(-1), torch.zeros_like(mask).long(), mask).rows()
            assert rows.starts is not None
            ends = (rows.starts + first).tolist()
            runs += itertools.pairwise(ends)
            first = ends[-1]
        stride = max(1, round(math.sqrt(len(runs))))
        runs = [run for offset in range(stride) for run in runs[offset::stride]]
        lengths = torch.tensor([0, *(high - low for low, high in runs)], dtype=torch.int64)
        return torch.cat([torch.arange(low, high) for low, high in runs]), lengths.cumsum(0)

    @cached_property
    def clusters(self) -> Clusters:
        """Documents of the held-out text, as far as they are known."""
        return clusters_of(*self._read[1:])

    @cached_property
    def mean(self) -> Tensor:
        return self.rows[0].mean(0)

    @cached_property
    def contexts(self) -> tuple[Tensor, Tensor]:
        """Token ids int64 and mask bool, [contexts, positions], for loss recovered."""
        shard = self.source.shard(0)
        assert shard.ids is not None
        return shard.ids[: self.loss_contexts].long(), shard.mask[: self.loss_contexts]

    @property
    def hook_name(self) -> str:
        return str(self.source.header["hook_name"])

    @property
    def why_no_loss(self) -> str:
        """Reason why loss recovered can't be measured; '' when it can."""
        if self.model is None:
            return str(self.source.header.get("reason") or FOREIGN_REASON)
        return "" if self.model.has_head else "the model has no language-model head"

    @cached_property
    def starts(self) -> list[Start | None]:
        """Starting points of the model's pass over each batch of `contexts`; None: from the input.

        Stored for all subjects: contexts x positions x d numbers on the model's device.
        """
        assert self.model is not None
        ids, _ = self.contexts
        if not self.model.starts_agree(ids[:2], None, self.hook_name):
            return [None] * len(ids.split(CONTEXTS))
        return [self.model.start(batch, None, self.hook_name) for batch in ids.split(CONTEXTS)]

    def token_losses(self, instead: Replace | None, with_kl: bool = False) -> TokenLosses:
        """Measures next-token losses with the rows that `instead` returns at the hook."""
        assert self.model is not None
        ids, mask = self.contexts
        ce: list[Tensor] = []
        kl: list[Tensor] = [torch.zeros(0, ids.shape[1] - 1, dtype=torch.float32)]
        batches = zip(ids.split(CONTEXTS), mask.split(CONTEXTS), self.starts, strict=True)
        for i, (batch, counted, start) in enumerate(batches):
            splice = {self.hook_name: _splice_counted(instead, counted)} if instead else None
            logits = self.model.logits(batch, None, splice, start)
            ce.append(next_token_losses(logits, batch).cpu())
            if with_kl:
                clean = self.clean_log_probs[i * CONTEXTS : (i + 1) * CONTEXTS]
                pairs = zip(clean, logits, strict=False)
                kl += [_divergence(before, after)[None] for before, after in pairs]
        return TokenLosses(torch.cat(ce), torch.cat(kl))

    @cached_property
    def clean_log_probs(self) -> Tensor:
        """Log-probabilities of the unchanged model in the first contexts, as many as
        `STORED_LOG_PROBS` allows and at least one; float32 [first, positions - 1, vocabulary], on
        the CPU."""
        assert self.model is not None
        ids, _ = self.contexts
        stored: list[Tensor] = []
        for batch, start in zip(ids.split(CONTEXTS), self.starts, strict=True):
            for row in self.model.logits(batch, None, None, start):
                if stored and (len(stored) + 1) * stored[0].numel() > STORED_LOG_PROBS:
                    return torch.stack(stored)
                stored.append(row[:-1].float().log_softmax(-1).cpu())
        return torch.stack(stored)

    def mean_loss(self, tokens: Tensor) -> float:
        """Mean of losses [contexts, positions - 1] over the counted targets."""
        targets = self.contexts[1][:, 1:]
        parts = zip(tokens.split(CONTEXTS), targets.split(CONTEXTS), strict=True)
        total = sum(float(part[counted].double().sum()) for part, counted in parts)
        return total / int(targets.sum())

    @cached_property
    def reference_tokens(self) -> dict[str, Tensor]:
        """Cross entropy of each token, unchanged, with zeros, and with the mean activation."""
        replaced: dict[str, Replace | None] = {
            "ce_clean": None,
            "ce_zero": lambda x, _: torch.zeros_like(x),
            "ce_mean": lambda x, _: self.mean.to(x.device).expand_as(x),
        }
        return {name: self.token_losses(instead).ce for name, instead in replaced.items()}

    @cached_property
    def reference_losses(self) -> dict[str, float]:
        """Means of `reference_tokens`."""
        return {name: self.mean_loss(tokens) for name, tokens in self.reference_tokens.items()}

    def spliced_losses(self, subject: Subject, with_kl: bool) -> TokenLosses:
        """Measures next-token losses with the subject's reconstruction at the hook."""
        return self.token_losses(
            lambda x, starts: torch.cat(
                [x_hat for _, x_hat, _ in _reconstruct(subject, x, starts)]
            ),
            with_kl,
        )

    @cached_property
    def quick(self) -> CoreData:
        """Copy with a loss on `QUICK` contexts, to compare many variants of one subject."""
        return replace(self, loss_contexts=min(QUICK, self.loss_contexts))


def _divergence(clean: Tensor, logits: Tensor) -> Tensor:
    """Returns KL(clean || spliced) of one context, float32 [positions - 1].

    Args:
        clean: log-probabilities [positions - 1, vocabulary].
        logits: spliced, [positions, vocabulary].
    """
    after = logits[:-1].float().log_softmax(-1).cpu()
    return (clean.exp() * (clean - after)).sum(-1)


def _splice_counted(instead: Replace, mask: Tensor) -> Callable[[Tensor], Tensor]:
    """Builds a splice that replaces the rows where mask [contexts, positions] is True."""
    rows = Batch(mask.unsqueeze(-1), torch.zeros_like(mask).long(), mask).rows()
    assert rows.starts is not None
    starts = rows.starts

    def splice(x: Tensor) -> Tensor:
        out = x.clone()
        keep = mask.to(x.device)
        out[keep] = instead(x[keep], starts)
        return out

    return splice


def evaluate_core(subject: Subject, data: CoreData) -> list[Row]:
    """Computes all core metrics of one subject.

    Returns: rows l0, fvu, explained_variance, mse, cosine, dead_share, loss_recovered,
        loss_recovered_mean, ce_*; fvu, l0 and dead_share by position, and of positions 0-63 and
        64-127 as position.<metric>_early and _late; the density histogram.
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
    """

    error: Tensor
    power: Tensor
    active: Tensor
    cosine: Tensor
    groups: Tensor
    firings: Tensor

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
    x, positions, starts = data.shuffled_runs if needs_contexts(subject) else (*data.rows, None)
    if most is not None:
        if starts is not None:
            runs = max(1, int(torch.searchsorted(starts, most, right=True)) - 1)
            starts = starts[: runs + 1]
            most = int(starts[-1])
        x, positions = x[:most], positions[:most]
    groups = positions // BUCKET if by_position else torch.zeros_like(positions)
    error, active, cosine = (torch.empty(len(x), dtype=torch.float32) for _ in range(3))
    firings = torch.zeros(int(groups.max()) + 1, subject.d_sae, dtype=torch.int64)
    chunk = _rows_at_once(subject, data.device) if starts is None else len(x)
    for start in range(0, len(x), chunk):
        rows = x[start : start + chunk].to(data.device)
        for part, x_hat, code in _reconstruct(subject, rows, starts):
            block = slice(start + part.start, start + part.stop)
            error[block] = (rows[part] - x_hat).square().sum(1)
            active[block] = code.row_counts.float()
            cosine[block] = torch.cosine_similarity(rows[part], x_hat, dim=1)
            firings += _count_firings(code, groups[block], firings.shape).cpu()
    return Reconstruction(
        error=error,
        power=(x - data.mean).square().sum(1),
        active=active,
        cosine=cosine,
        groups=groups,
        firings=firings,
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
    whole = measure_reconstruction(subject, data, by_position=True)
    yield number("fvu", whole.fvu, DEFINITION)
    yield number("explained_variance", 1 - whole.fvu, DEFINITION)
    yield number("mse", float(whole.error.double().mean()) / subject.d_in, DEFINITION)
    yield number("cosine", float(whole.cosine.double().mean()), DEFINITION)
    yield number("l0", whole.l0, DEFINITION)
    yield number("dead_share", whole.dead_share, DEFINITION)
    for i in range(len(whole.firings)):
        if bool((whole.groups == i).any()):
            part = whole.in_groups(i, i + 1)
            name = f"position={i * BUCKET}-{(i + 1) * BUCKET - 1}"
            for metric in POSITION_METRICS:
                yield number(metric, getattr(part, metric), DEFINITION, name)
    for half, (low, high) in {"early": EARLY, "late": LATE}.items():
        part = whole.in_groups(low // BUCKET, high // BUCKET)
        for metric in POSITION_METRICS:
            name = f"position.{metric}_{half}"
            if len(part.error):
                yield number(name, getattr(part, metric), DEFINITION)
            else:
                reason = f"no held-out row has a position from {low} to {high - 1}"
                yield missing(name, DEFINITION, reason)
    firings, rows = whole.firings.sum(0), len(whole.error)
    data.density = firings.double() / rows
    order = data.shuffled_order[0] if needs_contexts(subject) else None
    values = {name: getattr(whole, name) for name in ("error", "power", "active", "cosine")}
    data.text_sums = row_sums(data.clusters, values, order)
    yield from _density_rows(firings, rows)


def _rows_at_once(subject: Subject, device: str) -> int:
    """Returns the number of rows that are given to the subject at once."""
    sparse, cpu = isinstance(subject, SparseSubject), torch.device(device).type == "cpu"
    return CHUNK if cpu and not sparse else LARGE_CHUNK


def _reconstruct(
    subject: Subject, rows: Tensor, starts: Tensor | None
) -> Iterator[tuple[slice, Tensor, Code]]:
    """Encodes and decodes rows [n, d] in blocks, in order.

    Args:
        starts: of runs of tokens in the rows, for a subject that needs them.

    Returns: of each block its rows, x_hat [block, d] and the code.
    """
    if isinstance(subject, SparseSubject):
        context = (starts,) if needs_contexts(subject) else ()
        for part, code in subject.codes(rows, *context):
            yield part, complete(subject, subject.decode_code(code), rows[part]), code
        return
    f = subject.encode(rows)
    yield slice(0, len(rows)), complete(subject, subject.decode(f), rows), Code(f, f, None)


def _density_rows(firings: Tensor, rows: int) -> Iterator[Row]:
    """Rows of the share of latents per bin of log10 firing frequency; silent ones separately."""
    yield number(
        "density_histogram",
        float((firings == 0).double().mean()),
        DEFINITION,
        "log10_density=never",
    )
    bins = round(-LOWEST / BIN)
    logs = (firings[firings > 0].double() / rows).log10()
    index = ((logs - LOWEST) / BIN).floor().long().clamp(0, bins - 1)
    counts = torch.bincount(index, minlength=bins)
    for i, count in enumerate(counts.tolist()):
        edge = f"log10_density={LOWEST + i * BIN:.2f}"
        yield number("density_histogram", count / len(firings), DEFINITION, edge)


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
    )
    if data.why_no_loss:
        yield from (missing(name, DEFINITION, data.why_no_loss) for name in names)
        return
    losses = dict(data.reference_losses)
    tokens = data.spliced_losses(subject, data.with_kl)
    data.last_losses = subject, tokens
    losses["ce_spliced"] = data.mean_loss(tokens.ce)
    yield from (number(name, value, DEFINITION) for name, value in losses.items())
    for name, ablated in (("loss_recovered", "ce_zero"), ("loss_recovered_mean", "ce_mean")):
        gap = losses[ablated] - losses["ce_clean"]
        if gap <= 0:
            reason = f"ablation does not hurt the model ({ablated} - ce_clean = {gap:.4f} nats)"
            yield missing(name, DEFINITION, reason)
        else:
            yield number(name, (losses[ablated] - losses["ce_spliced"]) / gap, DEFINITION)
