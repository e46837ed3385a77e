"""Core metrics in raw activation space on held-out text.

    FVU = sum |x - x_hat|^2 / sum |x - mean(x)|^2       explained variance = 1 - FVU
    loss recovered = (CE_zero - CE_spliced) / (CE_zero - CE_clean)

CE_spliced runs the language model with the reconstruction in place of the activation, CE_zero with
zeros (primary), CE_mean with the mean activation (beside it). Only counted positions are replaced:
BOS and padding keep the model's own activation in every condition.

SAEBench 0.6.0's own formula of explained variance is wrong; this is the one SAELens uses.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from saelab.data.models import LanguageModel, Start
from saelab.data.store import FOREIGN_REASON, Source
from saelab.data.stream import Batch
from saelab.evals.base import (
    Row,
    SparseSubject,
    Subject,
    missing,
    needs_contexts,
    number,
)

DEFINITION = "core/1"
#: Rows encoded at once; bounds the dense code to that x d_sae floats. Our choice: a CPU keeps such
#: a chunk in its caches; a GPU, and a subject that makes no dense code, want large ones.
CHUNK, LARGE_CHUNK = 512, 4096
#: Contexts per forward pass of the language model.
CONTEXTS = 32
#: Width of the density histogram's bins in log10, and its lowest edge. Our choice.
BIN, LOWEST = 0.25, -5.0
#: Positions per bucket of the by-position slices.
BUCKET = 32
#: Positions [low, high) that an arm may be trained on alone, and those that it has then never seen.
EARLY, LATE = (0, 64), (64, 128)

#: Rows [n, d] and where runs of tokens begin in them [m + 1] -> what takes their place [n, d].
Replace = Callable[[Tensor, Tensor], Tensor]


@dataclass
class CoreData:
    """Held-out activations and, where there is one, the language model they came from.

    Args:
        source: held-out activations with token ids.
        model: None when the activations were made elsewhere.
        loss_contexts: how many contexts loss recovered is measured on.
        device: of the subjects.
    """

    source: Source
    model: LanguageModel | None
    loss_contexts: int = 128
    device: str = "cpu"

    @cached_property
    def rows(self) -> tuple[Tensor, Tensor]:
        """All counted rows: x float32 [n, d], position int64 [n]."""
        shards = [self.source.shard(i).rows() for i in range(self.source.n_shards)]
        return torch.cat([x for x, _ in shards]), torch.cat([p for _, p in shards])

    @cached_property
    def apart(self) -> tuple[Tensor, Tensor, Tensor]:
        """The same rows with their runs of tokens in another order, and where each run begins.

        A control that drives one run's trace by another's must not find it in the same document:
        neighbours here come from places far from each other.

        Returns: x float32 [n, d], position int64 [n], starts int64 [m + 1].
        """
        shards = [self.source.shard(i) for i in range(self.source.n_shards)]
        runs: list[Batch] = []
        for shard in shards:
            positions = torch.arange(shard.mask.shape[1]).expand(shard.mask.shape)
            rows = Batch(shard.x, positions, shard.mask).rows()
            assert rows.starts is not None
            for low, high in itertools.pairwise(rows.starts.tolist()):
                runs.append(Batch(rows.x[low:high].float(), rows.positions[low:high]))
        stride = max(1, round(math.sqrt(len(runs))))
        runs = [run for first in range(stride) for run in runs[first::stride]]
        lengths = torch.tensor([0, *(run.n for run in runs)])
        x, positions = torch.cat([r.x for r in runs]), torch.cat([r.positions for r in runs])
        return x, positions, lengths.cumsum(0)

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
        """Why loss recovered does not exist here; '' when it does."""
        if self.model is None:
            return str(self.source.header.get("reason") or FOREIGN_REASON)
        return "" if self.model.has_head else "the model has no language-model head"

    @cached_property
    def starts(self) -> list[Start | None]:
        """Where the model's pass over each batch of `contexts` can start; None at the beginning.

        Kept for all subjects: contexts x positions x d numbers on the model's device.
        """
        assert self.model is not None
        ids, _ = self.contexts
        if not self.model.starts_agree(ids[:2], None, self.hook_name):
            return [None] * len(ids.split(CONTEXTS))
        return [self.model.start(some, None, self.hook_name) for some in ids.split(CONTEXTS)]

    def loss(self, replace: Replace | None) -> float:
        """Mean next-token loss in nats with `replace` at the hook."""
        assert self.model is not None
        total, count = 0.0, 0
        ids, mask = self.contexts
        batches = zip(ids.split(CONTEXTS), mask.split(CONTEXTS), self.starts, strict=True)
        for some, counted, start in batches:
            splice = (self.hook_name, _masked(replace, counted)) if replace else None
            losses = self.model.losses(some, None, splice, start)
            targets = counted[:, 1:].to(losses.device)
            total += float(losses[targets].double().sum())
            count += int(targets.sum())
        return total / count

    @cached_property
    def reference_losses(self) -> dict[str, float]:
        """CE without a splice, with zeros, and with the mean activation."""
        return {
            "ce_clean": self.loss(None),
            "ce_zero": self.loss(lambda x, _: torch.zeros_like(x)),
            "ce_mean": self.loss(lambda x, _: self.mean.to(x.device).expand_as(x)),
        }


def _masked(replace: Replace, mask: Tensor) -> Callable[[Tensor], Tensor]:
    rows = Batch(mask.unsqueeze(-1), torch.zeros_like(mask).long(), mask).rows()
    assert rows.starts is not None
    starts = rows.starts

    def splice(x: Tensor) -> Tensor:
        out = x.clone()
        keep = mask.to(x.device)
        out[keep] = replace(x[keep], starts)
        return out

    return splice


def evaluate_core(subject: Subject, data: CoreData) -> list[Row]:
    """All core metrics of one subject.

    Returns: rows l0, fvu, explained_variance, mse, cosine, dead_share, loss_recovered,
        loss_recovered_mean, ce_*; fvu, l0 and dead_share by position, also as position.<metric>_early
        (positions 0-63) and _late (64-127); the density histogram.
    """
    return [*_reconstruction(subject, data), *_loss_recovered(subject, data)]


@dataclass(frozen=True)
class Errors:
    """What a subject makes of rows.

    Args:
        error, power: squared distance of each row from its reconstruction and from the mean row;
            float32 [n].
        active: how many latents fire in each row, float32 [n].
        cosine: of row and reconstruction, float32 [n].
        firings: in how many rows of each group each latent fires; int64 [groups, d_sae].
    """

    error: Tensor
    power: Tensor
    active: Tensor
    cosine: Tensor
    firings: Tensor

    @property
    def fvu(self) -> float:
        return _ratio(self.error, self.power)

    @property
    def l0(self) -> float:
        """Latents per row."""
        return float(self.active.double().mean())

    def of(self, rows: Tensor, groups: Tensor) -> Errors:
        """The same of some rows and groups, each bool; the groups must hold just these rows."""
        parts = (self.error, self.power, self.active, self.cosine)
        return Errors(*(part[rows] for part in parts), self.firings[groups])

    @property
    def dead_share(self) -> float:
        return float((self.firings.sum(0) == 0).double().mean())


def errors(
    subject: Subject, data: CoreData, most: int | None = None, groups: Tensor | None = None
) -> Errors:
    """Encodes and decodes the held-out rows.

    Args:
        most: about how many of the first rows; None for all.
        groups: of each row, int64 [n]; None for a single one.
    """


def _reconstruction(subject: Subject, data: CoreData) -> Iterator[Row]:
    x, positions, starts = data.apart if needs_contexts(subject) else (*data.rows, None)
    error, active, cosine = (torch.empty(len(x)) for _ in range(3))
    firings = torch.zeros(subject.d_sae, dtype=torch.int64)
    chunk = _chunk(subject, data.device) if starts is None else len(x)
    for start in range(0, len(x), chunk):
        rows = x[start : start + chunk].to(data.device)
        for part, x_hat, fires, fired in _coded(subject, rows, starts):
            here = slice(start + part.start, start + part.stop)
            error[here] = (rows[part] - x_hat).square().sum(1)
            active[here] = fires
            cosine[here] = torch.cosine_similarity(rows[part], x_hat, dim=1)
            firings += fired.cpu()
    power = (x - data.mean).square().sum(1)
    fvu = _ratio(error, power)
    yield number("fvu", fvu, DEFINITION)
    yield number("explained_variance", 1 - fvu, DEFINITION)
    yield number("mse", float(error.double().mean()) / x.shape[1], DEFINITION)
    yield number("cosine", float(cosine.double().mean()), DEFINITION)
    yield number("l0", float(active.double().mean()), DEFINITION)
    yield number("dead_share", float((firings == 0).double().mean()), DEFINITION)
    for low in range(0, int(positions.max()) + 1, BUCKET):
        here = (positions >= low) & (positions < low + BUCKET)
        if here.any():
            name = f"position={low}-{low + BUCKET - 1}"
            yield number("fvu", _ratio(error[here], power[here]), DEFINITION, name)
            yield number("l0", float(active[here].double().mean()), DEFINITION, name)
    yield from _density(firings, len(x))


def _chunk(subject: Subject, device: str) -> int:
    """Rows given to the subject at once."""
    sparse, cpu = isinstance(subject, SparseSubject), torch.device(device).type == "cpu"
    return CHUNK if cpu and not sparse else LARGE_CHUNK


def _coded(
    subject: Subject, rows: Tensor, starts: Tensor | None
) -> Iterator[tuple[slice, Tensor, Tensor, Tensor]]:
    """Parts of the rows [n, d], in order, with what the subject makes of them.

    Args:
        starts: of runs of tokens in the rows, for a subject that needs them.

    Returns: the part; x_hat [part, d]; how many latents fire in each row, float32 [part]; in how
        many rows each latent fires, int64 [d_sae].
    """
    if isinstance(subject, SparseSubject):
        context = (starts,) if needs_contexts(subject) else ()
        for part, code in subject.codes(rows, *context):
            yield part, subject.decode_code(code), code.row_counts.float(), code.firings
        return
    f = subject.encode(rows)
    fires = torch.ne(f, 0, out=torch.empty_like(f, dtype=torch.float32))  # its sums are exact
    yield slice(0, len(rows)), subject.decode(f), fires.sum(1), fires.sum(0).long()


def _ratio(error: Tensor, power: Tensor) -> float:
    return float(error.double().sum() / power.double().sum())


def _density(firings: Tensor, rows: int) -> Iterator[Row]:
    """Share of latents per bin of log10 firing frequency; those that never fire apart."""
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


def _loss_recovered(subject: Subject, data: CoreData) -> Iterator[Row]:
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
    losses["ce_spliced"] = data.loss(
        lambda x, starts: torch.cat([x_hat for _, x_hat, *_ in _coded(subject, x, starts)])
    )
    yield from (number(name, value, DEFINITION) for name, value in losses.items())
    for name, ablated in (("loss_recovered", "ce_zero"), ("loss_recovered_mean", "ce_mean")):
        gap = losses[ablated] - losses["ce_clean"]
        if gap <= 0:
            reason = f"ablation does not hurt the model ({ablated} - ce_clean = {gap:.4f} nats)"
            yield missing(name, DEFINITION, reason)
        else:
            yield number(name, (losses[ablated] - losses["ce_spliced"]) / gap, DEFINITION)
