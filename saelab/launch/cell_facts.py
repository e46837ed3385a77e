"""Facts of a trained cell that the gate looks at."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from saelab.data.activations.store import Source
from saelab.evals.base import NOT_FINITE, Row, needs_contexts
from saelab.evals.convergence import FEWEST
from saelab.evals.core import CoreData
from saelab.evals.training_stability import LARGE, spikes
from saelab.sae import SAE
from saelab.training.cell import Log, TrainingCell
from saelab.training.loop import Cell

#: What the gate compares with the random controls.
PROBED = "sae_top_5_test_accuracy"


#: Largest float32.
LARGEST = float(torch.finfo(torch.float32).max)
#: Metrics that the gate looks at under their own names.
MEASURED = (
    *("l0", "explained_variance", "loss_recovered", "dead_share"),
    *("ce_clean", "ce_spliced", "ce_zero"),
)


#: Held-out rows on which a code is asked whether it is constant, and contexts that the activations
#: are described by. Our choice.
CODE_ROWS, INPUT_CONTEXTS = 512, 512


@torch.no_grad()
def code_std(subject: Any, data: CoreData) -> float:
    """The largest standard deviation of a latent over some held-out rows; 0 is a constant code."""
    if needs_contexts(subject):
        x, _, starts = data.shuffled_runs
        starts = starts[: 1 + max(1, int((starts <= CODE_ROWS).sum()) - 1)]
        code = subject.encode(x[: int(starts[-1])].to(data.device), starts.to(data.device))
    else:
        code = subject.encode(data.rows[0][:CODE_ROWS].to(data.device))
    return float(code.float().std(0, correction=0).max())


def removes_mean(cell: TrainingCell) -> bool:
    """Returns True if the cell's SAE takes a mean off its input; False for a user's own module."""
    sae = cell.sae
    return isinstance(sae, SAE) and (sae.config.centre or sae.scaling is not None)


def not_finite(rows: Iterable[Row]) -> str | None:
    """Names of the whole-text metrics that the gate looks at and that came out not finite."""
    judged = ("fvu", *MEASURED, PROBED)
    bad = [r.metric for r in rows if not r.slice and r.reason.startswith(NOT_FINITE)]
    return ", ".join(name for name in judged if name in bad) or None


def input_facts(source: Source) -> dict[str, float | None]:
    """Facts of the activations for the gate: norm(mean) / norm(std) of the rows that count, and
    the share of variance at the first position of each context where it counts too."""
    shard = source.shard(0)
    x, mask = shard.x[:INPUT_CONTEXTS].float(), shard.mask[:INPUT_CONTEXTS]
    rows = x[mask]
    off = (x - rows.mean(0)).square().sum(2) * mask
    several = x.shape[1] > 1
    return {
        "mean_over_std": float(rows.mean(0).norm() / rows.std(0).norm()),
        "bos_masked": float(not mask[:, 0].any()),
        "bos_variance_share": float(off[:, 0].sum() / off.sum()) if several else None,
    }


def _weights_facts(sae: Any, largest: Tensor | None) -> dict[str, float]:
    """Facts of an SAE's weights; `largest` as `largest_cosines` gives them, None for a module,
    whose weights may have any names and shapes."""
    if largest is None:
        return {}
    zero = not bool(sae.W_enc.any()) or not bool(sae.W_dec.any())
    twins = int((largest > 0.95).sum())
    return {"weights_zero": float(zero), "near_duplicate_share": twins / len(largest)}


def largest_weight(module: Any) -> float:
    """Returns the largest absolute value of a module's parameters; the largest float32 where one
    is not finite."""
    largest = 0.0
    for parameter in module.parameters():
        if parameter.numel():
            value = float(parameter.detach().abs().max())
            largest = max(largest, value if math.isfinite(value) else LARGEST)
    return largest


def _curve_facts(log: Log) -> dict[str, float | None]:
    """Latents per row at the first step, large spikes of the loss, and its improvement over the
    last tenth of the run."""
    loss, facts = log.loss, dict[str, float | None]()
    if log.length and "l0" in log.columns:
        facts["l0_at_start"] = float(log.columns["l0"][0])
    if len(loss) < FEWEST:
        return facts
    tenth = max(1, len(loss) // 10)
    before, last = loss[-2 * tenth : -tenth].mean(), loss[-tenth:].mean()
    large = float(spikes(loss, LARGE))
    return facts | {"last_tenth_improvement": float(1 - last / before), "spikes": large}


def part_facts(cell: TrainingCell) -> dict[str, float]:
    """Facts that the parts of the SAE declare of themselves, see `Part.facts`."""
    if not isinstance(cell, Cell) or not cell.log.length:
        return {}
    columns = {name: values[: cell.log.length] for name, values in cell.log.columns.items()}
    facts: dict[str, float] = {}
    for part in cell.sae.parts():
        facts |= part.facts(columns, cell.optimiser.travel)
    return facts
