"""Held-out activations and their model, as the core metrics and others measure on them."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial

import torch
from torch import Tensor

from saelab.data.activations.joined import JoinedSource, target_hooks, target_rows, widths
from saelab.data.activations.store import FOREIGN_REASON, Source, check_rows_differ
from saelab.data.hook_names import blocks_before
from saelab.data.language_model import LanguageModel, Splices, Start, next_token_losses
from saelab.evals.base import SparseSubject, Subject, complete, needs_contexts
from saelab.evals.splices import (
    Replace,
    TokenLosses,
    divergence,
    replaced_together,
    run_starts,
    splice_counted,
)
from saelab.evals.text_sums import Clusters, TextSums, clusters_of
from saelab.kernels import Code

#: Of one hook point that is reconstructed itself, and of anything else.
DEFINITION, OF_TARGETS = "core/1", "core/targets/1"
#: Most contexts per forward pass of the language model, and most logits. Our choice: 134 MB in
#: float32, where 32 contexts of 128 tokens are 8.6 GB with Gemma's vocabulary of 262,144.
CONTEXTS, LOGITS = 32, 1 << 25
#: Contexts of a quick loss. Our choice.
QUICK = 8
#: Log-probabilities of the unchanged model that are stored for the KL divergence, which bounds the
#: contexts it is measured on. Our choice: 67 MB.
STORED_LOG_PROBS = 1 << 24
#: Number of a batch of contexts -> hook point -> what its rows are replaced by.
Instead = Callable[[int], Mapping[str, Replace]]


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
        rows, masks, documents, targets = [], [], [], []
        for i in range(self.source.n_shards):
            shard = self.source.shard(i)
            rows.append(shard.rows())
            masks.append(shard.mask.clone())
            documents.append(shard.documents)
            targets.append(target_rows(shard))
        x = torch.cat([x for x, _ in rows])
        check_rows_differ(x, "held-out activations")
        outward = [y for y in targets if y is not None]
        self._targets = torch.cat(outward) if outward else x
        check_rows_differ(self._targets, "held-out targets")
        return (x, torch.cat([p for _, p in rows])), masks, documents

    @property
    def targets(self) -> Tensor:
        """Rows to be reconstructed, in the order of `rows`: [n, d_out]; `rows` where there is no
        target."""
        _ = self._read
        return self._targets

    @cached_property
    def hooks(self) -> dict[str, int]:
        """Width of each hook point that is reconstructed."""
        names = target_hooks(self.source) or ("",)
        if not isinstance(self.source, JoinedSource):
            return {names[0]: self.targets.shape[1]}
        inputs, targets = widths(self.source)
        return dict(zip(names, targets or inputs, strict=True))

    @property
    def definition(self) -> str:
        """Definition of the metrics."""
        return OF_TARGETS if isinstance(self.source, JoinedSource) else DEFINITION

    @cached_property
    def weights(self) -> Tensor | None:
        """One over the variance of each channel's hook point, [d_out]; None for a single one."""
        if len(self.hooks) == 1:
            return None
        powers = (self.targets - self.mean).square().mean(0).split(list(self.hooks.values()))
        return torch.cat([(1 / power.sum()).expand(len(power)) for power in powers])

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
            ends = (run_starts(mask) + first).tolist()
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
        """Mean of the targets, [d_out]."""
        return self.targets.mean(0)

    @cached_property
    def contexts(self) -> tuple[Tensor, Tensor]:
        """Token ids int64 and mask bool, [contexts, positions], for loss recovered."""
        shard = self.source.shard(0)
        assert shard.ids is not None
        return shard.ids[: self.loss_contexts].long(), shard.mask[: self.loss_contexts]

    @cached_property
    def batch(self) -> int:
        """Contexts per forward pass of the language model."""
        assert self.model is not None
        return contexts_per_pass(self.contexts[0].shape[1], self.model.vocabulary)

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
        first = min(self.hooks, key=blocks_before)
        if not self.model.starts_agree(ids[:2], None, first):
            return [None] * len(ids.split(self.batch))
        return [self.model.start(batch, None, first) for batch in ids.split(self.batch)]

    def losses_at(
        self, groups: Sequence[Sequence[str]], instead: Instead, with_kl: bool = False
    ) -> TokenLosses:
        """Measures next-token losses with replaced rows; their mean over groups of hook points.

        Args:
            instead: number of a batch of contexts -> hook point -> what its rows are replaced by.
        """

        def splices(group: Sequence[str], i: int, counted: Tensor) -> Splices:
            made = instead(i)
            return {hook: splice_counted(made[hook], counted) for hook in group}

        losses = (self.token_losses(partial(splices, group), with_kl) for group in groups)
        return TokenLosses.mean(losses)

    def token_losses(
        self, splices: Callable[[int, Tensor], Splices] | None, with_kl: bool = False
    ) -> TokenLosses:
        """Measures next-token losses.

        Args:
            splices: number of a batch of contexts and its mask -> splices; None for no change.
        """
        assert self.model is not None
        ids, mask = self.contexts
        ce: list[Tensor] = []
        kl: list[Tensor] = [torch.zeros(0, ids.shape[1] - 1, dtype=torch.float32)]
        batches = zip(ids.split(self.batch), mask.split(self.batch), self.starts, strict=True)
        for i, (batch, counted, start) in enumerate(batches):
            splice = splices(i, counted) if splices else None
            logits = self.model.logits(batch, None, splice, start)
            ce.append(next_token_losses(logits, batch).cpu())
            if with_kl:
                clean = self.clean_log_probs[i * self.batch : (i + 1) * self.batch]
                pairs = zip(clean, logits, strict=False)
                kl += [divergence(before, after)[None] for before, after in pairs]
        return TokenLosses(torch.cat(ce), torch.cat(kl))

    @cached_property
    def clean_log_probs(self) -> Tensor:
        """Log-probabilities of the unchanged model in the first contexts, as many as
        `STORED_LOG_PROBS` allows and at least one; float32 [first, positions - 1, vocabulary], on
        the CPU."""
        assert self.model is not None
        ids, _ = self.contexts
        stored: list[Tensor] = []
        for batch, start in zip(ids.split(self.batch), self.starts, strict=True):
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
        groups = replaced_together(tuple(self.hooks))
        return {
            "ce_clean": self.token_losses(None).ce,
            "ce_zero": self.losses_at(groups, lambda _: self._zeros).ce,
            "ce_mean": self.losses_at(groups, lambda _: self._means).ce,
        }

    @property
    def _zeros(self) -> dict[str, Replace]:
        return {hook: lambda x, _: torch.zeros_like(x) for hook in self.hooks}

    @property
    def _means(self) -> dict[str, Replace]:
        means = zip(self.hooks, self.mean.split(list(self.hooks.values())), strict=True)
        return {
            hook: lambda x, _, mean=mean: mean.to(x.device).expand_as(x) for hook, mean in means
        }

    @cached_property
    def reference_losses(self) -> dict[str, float]:
        """Means of `reference_tokens`."""
        return {name: self.mean_loss(tokens) for name, tokens in self.reference_tokens.items()}

    def spliced_losses(self, subject: Subject, with_kl: bool) -> TokenLosses:
        """Measures next-token losses with the subject's reconstruction at the hook."""
        return self.losses_at(
            replaced_together(tuple(self.hooks)), self._reconstructions(subject), with_kl
        )

    def losses_of_each(self, subject: Subject) -> Iterator[tuple[str, dict[str, float]]]:
        """Yields each of several hook points with ce_zero and ce_spliced where it alone is
        replaced."""
        instead = {"ce_zero": lambda _: self._zeros, "ce_spliced": self._reconstructions(subject)}
        for hook in self.hooks if len(self.hooks) > 1 else ():
            losses = {name: self.losses_at([(hook,)], made).ce for name, made in instead.items()}
            yield hook, {name: self.mean_loss(ce) for name, ce in losses.items()}

    def _reconstructions(self, subject: Subject) -> Instead:
        """Returns what rows are replaced by: the reconstruction of the model's own activation, or
        of the stored inputs where other activations are reconstructed than are read."""

        def of(x: Tensor, starts: Tensor) -> Tensor:
            return torch.cat([x_hat for _, x_hat, _ in reconstruct(subject, x, starts)])

        def of_stored(i: int) -> dict[str, Replace]:
            place = slice(i * self.batch, (i + 1) * self.batch)
            mask = self.contexts[1][place]
            x = self.source.shard(0).x[: self.loss_contexts][place][mask].float()
            y_hat = of(x.to(self.device), run_starts(mask))
            parts = zip(self.hooks, y_hat.split(list(self.hooks.values()), dim=1), strict=True)
            return {hook: lambda x, _, part=part: part.to(x) for hook, part in parts}

        if self.definition == DEFINITION:
            return lambda _: dict.fromkeys(self.hooks, of)
        return of_stored

    @cached_property
    def quick(self) -> CoreData:
        """Copy with a loss on `QUICK` contexts, to compare many variants of one subject."""
        return replace(self, loss_contexts=min(QUICK, self.loss_contexts))


def contexts_per_pass(positions: int, vocabulary: int | None) -> int:
    """Returns how many contexts of so many positions the language model takes at once for losses.

    Args:
        vocabulary: None where it is not known.
    """
    return max(1, min(CONTEXTS, LOGITS // (positions * (vocabulary or 1))))


def reconstruct(
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
