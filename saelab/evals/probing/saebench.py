"""Sparse probing of SAEBench 0.6.0: definition 1, 'sparse_probing/saebench-0.6.0'.

    z_i  = mean over the counted positions of text i of encode(x), zeros included
    task = one class against as many negatives, ceil(n / others) of each other class
    k-sparse probe: the k columns with the largest |mean z (positives) - mean z (negatives)| on
        train, unscaled; scikit-learn's LogisticRegression, L2, C = 1, at most 1000 iterations
    full probe: one linear layer, binary cross-entropy, AdamW at 1e-2, batches of 250, at most 100
        epochs, ended after 10 without a better test accuracy; reported is the best test accuracy

Source: https://github.com/adamkarvonen/SAEBench. It serves to compare with published numbers, and
has its faults: **the full probe is chosen on the test texts it is scored on**, so that its accuracy
is too high; the negatives of each probe are drawn anew from one running generator, so that two
subjects (and two k) are not scored on the same examples; columns are chosen by raw scale; a code
without any firing scores exactly 0.5. `probing` (definition 2) fixes them.

The generator is one of torch's at seed 42 and is used in SAEBench's order (entry by entry, the full
probes before the k-sparse ones), as for an SAE whose language model activations are cached.
A k that exceeds the number of columns gives a row with the reason; SAEBench silently uses fewer.
"""

from __future__ import annotations

import functools
import random
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from saelab.data.probing.activations import ProbingData, ProbingEntry
from saelab.data.probing.embedded import SAMPLING_SEED
from saelab.errors import SettingError
from saelab.evals.base import Row, Subject, number_or_reason
from saelab.evals.probing import K_VALUES, constant_row, mean_codes, mean_rows
from saelab.evals.probing.tasks import Examples
from saelab.progress import progress

DEFINITION = "sparse_probing/saebench-0.6.0"
#: SAEBench's full probe.
RATE, BATCH, EPOCHS, PATIENCE = 1e-2, 250, 100, 10


@torch.inference_mode()
def evaluate_as_saebench(
    subject: Subject | None,
    data: ProbingData,
    seed: int = SAMPLING_SEED,
    k_values: Sequence[int] = K_VALUES,
    prefix: str = "sae",
    device: torch.device | str = "cpu",
    full: bool = True,
) -> list[Row]:
    """Computes the rows of `probing.evaluate_probing`, each accuracy by definition 1.

    Args:
        subject: probed; None for the language model's channels (prefix 'llm').
        data: the language model's activations.
        seed: of the generator; SAEBench's is 42.
        k_values: numbers of columns, in SAEBench's order.
        prefix: of the metrics.
        device: of the subject.
        full: trains full probes too; without them other negatives are drawn.
    """
    for k in k_values:
        if k < 1:
            raise SettingError("k_values", k, "a probe needs at least one column")
    generator = torch.Generator().manual_seed(seed)
    rows: list[Row] = []
    with progress(f"probing {prefix} as SAEBench", len(data.entries), "entries") as bar:
        for entry in data.entries:
            code = mean_codes(subject, entry.rows, entry.offsets, device=device)
            rows += _entry_rows(code, entry, generator, k_values, prefix, full)
            where = f"entry={entry.name}"
            rows += mean_rows(rows, f"{where},class=", where, DEFINITION)
            rows += [] if subject is None else [constant_row(code, entry, DEFINITION)]
            bar.advance()
    entry_slices = {f"entry={entry.name}" for entry in data.entries}
    return rows + mean_rows([r for r in rows if r.slice in entry_slices], "entry=", "", DEFINITION)


def _entry_rows(
    code: Tensor,
    entry: ProbingEntry,
    generator: torch.Generator,
    k_values: Sequence[int],
    prefix: str,
    full: bool,
) -> list[Row]:
    rows = []
    for k in [*([0] if full else []), *k_values]:
        metric = f"{prefix}_top_{k}_test_accuracy" if k else f"{prefix}_test_accuracy"
        for label, name in enumerate(entry.classes):
            accuracy = _accuracy(code, entry, label, k, generator)
            where = f"entry={entry.name},class={name}"
            rows.append(number_or_reason(metric, accuracy, DEFINITION, where))
    return rows


def _accuracy(
    code: Tensor, entry: ProbingEntry, label: int, k: int, generator: torch.Generator
) -> float | str:
    """Test accuracy of one probe, k = 0 for all columns; or the reason why there is none."""
    if k > code.shape[1]:
        return f"the code has {code.shape[1]} columns, fewer than k = {k}"
    sides = []
    for side in (True, False):
        examples = draw_examples(entry, label, side, generator)
        if isinstance(examples, str):
            return examples
        sides.append(Side.of(code, examples))
    train, test = sides
    if not (train.z.isfinite().all() and test.z.isfinite().all()):
        return "the code is not finite"
    if k == 0:
        return _full_probe_accuracy(train, test, generator)
    means = [train.z[train.y == y].mean(0) for y in (1, 0)]
    best = (means[0] - means[1]).abs().argsort(descending=True)[:k].sort().values
    return _regression_accuracy(Side(train.z[:, best], train.y), Side(test.z[:, best], test.y))


def draw_examples(
    entry: ProbingEntry, label: int, is_train: bool, generator: torch.Generator
) -> Examples | str:
    """Draws SAEBench's examples for one class on one side, shuffled; or says why there are none."""
    on_side = entry.is_train == is_train
    pools = [((entry.labels == c) & on_side).nonzero()[:, 0] for c in range(len(entry.classes))]
    positives, others = pools[label], [pool for c, pool in enumerate(pools) if c != label]
    n = len(positives)
    share = -(-n // max(1, len(others)))
    if n == 0 or sum(min(share, len(pool)) for pool in others) < n:
        side = "train" if is_train else "test"
        return f"class {entry.classes[label]!r} has {n} {side} texts, the others too few"

    def permute(size: int) -> Tensor:
        return torch.randperm(size, generator=generator)

    negatives = torch.cat([pool[permute(len(pool))[:share]] for pool in others])
    negatives = negatives[permute(len(negatives))[:n]]
    order = permute(2 * n)
    return Examples(torch.cat([positives, negatives])[order], order < n)


@dataclass(frozen=True)
class Side:
    """Codes float32 [n, k] of the examples, and labels float32 [n], 0 or 1."""

    z: Tensor
    y: Tensor

    @classmethod
    def of(cls, code: Tensor, examples: Examples) -> Side:
        """Selects the codes of examples."""
        index = examples.index.to(code.device)
        return cls(code.index_select(0, index), examples.positive.to(code.device, torch.float32))


@functools.cache
def _logistic_regression() -> Any:
    """Imports scikit-learn's class; restores Python's global random state, from which its import
    draws."""
    state = random.getstate()
    from sklearn.linear_model import LogisticRegression

    random.setstate(state)
    return LogisticRegression


def _regression_accuracy(train: Side, test: Side) -> float:
    z, y, test_z, test_y = (t.cpu().numpy() for t in (train.z, train.y, test.z, test.y))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of convergence, which SAEBench ignores
        probe = _logistic_regression()(C=1.0, max_iter=1000).fit(z, y)
    return float((probe.predict(test_z) == test_y).mean())


@torch.inference_mode(False)
@torch.enable_grad()
def _full_probe_accuracy(train: Side, test: Side, generator: torch.Generator) -> float:
    """Best test accuracy over the epochs: the leak that definition 1 has."""
    z, y, test_z, test_y = (t.clone() for t in (train.z, train.y, test.z, test.y))
    probe = _build_linear(z.shape[1], generator).to(z.device)
    optimiser = torch.optim.AdamW(probe.parameters(), lr=RATE)
    best, since = 0.0, 0
    for _ in range(EPOCHS):
        for batch in torch.randperm(len(z), generator=generator).split(BATCH):
            batch = batch.to(z.device)
            logits = probe(z[batch])[:, 0]
            loss = torch.nn.functional.binary_cross_entropy_with_logits(logits, y[batch])
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
        with torch.no_grad():
            accuracy = float(((probe(test_z)[:, 0] > 0) == (test_y > 0)).float().mean())
        best, since = (accuracy, 0) if accuracy > best else (best, since + 1)
        if since >= PATIENCE:
            break
    return best


def _build_linear(d: int, generator: torch.Generator) -> torch.nn.Linear:
    """Builds a layer with torch's initialisation, drawn from the generator."""
    layer = torch.nn.Linear(d, 1, device="meta").to_empty(device="cpu")  # draws nothing
    torch.nn.init.kaiming_uniform_(layer.weight, a=5**0.5, generator=generator)
    torch.nn.init.uniform_(layer.bias, -(d**-0.5), d**-0.5, generator=generator)
    return layer
