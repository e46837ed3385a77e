"""Loss recovered and KL divergence by position in the context and by how frequent the token is.

    token.kl               mean over tokens of sum_v P_clean(v) log(P_clean(v) / P_spliced(v)), nats
    token.ce_clean, token.ce_zero, token.ce_spliced         mean cross entropy in nats
    token.ce_rise          ce_spliced - ce_clean, nats
    token.loss_recovered   (ce_zero - ce_spliced) / (ce_zero - ce_clean)
    token.share            of the tokens that are in the slice

over all predicted tokens of core's contexts, and over those of a slice:

    position=0-7, 8-31, ...          where the prediction is made
    frequency_decile=1 (rarest), ... the predicted token's place among all tokens of the held-out
                                     text, ordered by how often they occur there: tokens of
                                     equal count share a decile, so that deciles differ in size

Splices and ablations are those of `core`, whose passes are used where it ran before: the CE of the
slices, weighted by their shares, is core's. KL is measured on the first contexts alone, as many as
fit into `core_data.STORED_LOG_PROBS` numbers: all of them where positions x vocabulary is small.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from saelab.evals.base import Row, Subject, missing, number
from saelab.evals.core_data import CoreData, TokenLosses
from saelab.runtime.counting import count

DEFINITION = "positions/1"
METRICS = ("kl", "ce_clean", "ce_zero", "ce_spliced", "ce_rise", "loss_recovered", "share")
#: First positions of the slices by position. Our choice: each is four times as long as the one
#: before, since differences between positions become smaller along the context.
EDGES = (0, 8, 32, 128, 512, 2048, 8192)
DECILES = 10


@torch.no_grad()
def evaluate_positions(subject: Subject, data: CoreData) -> list[Row]:
    """Computes the rows of one subject; missing without a model that has a head."""
    if data.why_no_loss:
        return [missing(f"token.{name}", DEFINITION, data.why_no_loss) for name in METRICS]
    last = data.last_losses
    losses = last[1] if last and last[0] is subject else None
    if losses is None or not len(losses.kl):
        losses = data.spliced_losses(subject, with_kl=True)
    counted = data.contexts[1][:, 1:]
    rows = list(_slice_rows(data, losses, counted, counted, ""))
    for name, inside in _slices(data):
        rows += _slice_rows(data, losses, counted, inside & counted, name)
    return rows


def _slices(data: CoreData) -> Iterator[tuple[str, Tensor]]:
    """Yields each slice's name and its predicted tokens, bool [contexts, positions - 1]."""
    ids, _ = data.contexts
    n = ids.shape[1] - 1
    positions = torch.arange(n).expand(len(ids), n)
    for low, high in zip(EDGES, (*EDGES[1:], n), strict=True):
        if low < n:
            last = min(high, n) - 1
            yield f"position={low}-{last}", (positions >= low) & (positions <= last)
    decile = _deciles(data)[ids[:, 1:]]
    for i in range(DECILES):
        yield f"frequency_decile={i + 1}", decile == i


def _deciles(data: CoreData) -> Tensor:
    """Decile of each token id, by its count in the held-out text; int64 [largest id + 1]."""
    counts = torch.zeros(0, dtype=torch.int64)
    for i in range(data.source.n_shards):
        shard = data.source.shard(i)
        assert shard.ids is not None
        more = torch.bincount(shard.ids[shard.mask].long(), minlength=len(counts))
        more[: len(counts)] += counts
        counts = more
    largest = int(data.contexts[0].max())
    if largest >= len(counts):  # a token that occurs only at positions that are not counted
        counts = torch.cat([counts, counts.new_zeros(largest + 1 - len(counts))])
    kinds, which, each = counts.unique(return_inverse=True, return_counts=True)
    mass = kinds * each  # tokens of the text, from the rarest kind on
    middle = mass.cumsum(0).double() - mass.double() / 2
    place = (DECILES * middle / mass.sum()).long().clamp(max=DECILES - 1)
    return place[which]


def _slice_rows(
    data: CoreData, losses: TokenLosses, counted: Tensor, inside: Tensor, name: str
) -> Iterator[Row]:
    """Yields the rows of one slice.

    Args:
        losses: with the subject's reconstruction.
        counted, inside: predicted tokens that count, and those of them in the slice; bool
            [contexts, positions - 1].
        name: of the slice.
    """
    n = int(inside.sum())
    if not n:
        reason = "no predicted token of core's contexts is in this slice"
        yield from (missing(f"token.{m}", DEFINITION, reason, name) for m in METRICS[:-1])
        yield number("token.share", 0.0, DEFINITION, name)
        return
    measured = inside[: len(losses.kl)]
    if bool(measured.any()):
        yield number("token.kl", _mean(losses.kl, measured), DEFINITION, name)
    else:
        contexts = f"the first {count(len(losses.kl), 'context')}"
        reason = f"none of its tokens is in {contexts}, on which KL is measured"
        yield missing("token.kl", DEFINITION, reason, name)
    clean, zero = (_mean(data.reference_tokens[key], inside) for key in ("ce_clean", "ce_zero"))
    spliced = _mean(losses.ce, inside)
    yield number("token.ce_clean", clean, DEFINITION, name)
    yield number("token.ce_zero", zero, DEFINITION, name)
    yield number("token.ce_spliced", spliced, DEFINITION, name)
    yield number("token.ce_rise", spliced - clean, DEFINITION, name)
    if zero > clean:
        recovered = (zero - spliced) / (zero - clean)
        yield number("token.loss_recovered", recovered, DEFINITION, name)
    else:
        reason = f"ablation does not hurt the model (ce_zero - ce_clean = {zero - clean:.4f} nats)"
        yield missing("token.loss_recovered", DEFINITION, reason, name)
    yield number("token.share", n / int(counted.sum()), DEFINITION, name)


def _mean(losses: Tensor, inside: Tensor) -> float:
    return float(losses[inside].double().mean())
