"""Sparse probing: the class of a text from few latents. Definition 'sparse_probing/2'.

    z_i = mean over the counted positions of text i of encode(x), zeros included
    task: one class against the rest, as many negatives as positives, evenly from the other classes
    k-sparse probe: the k columns with the largest |mean z (positives) - mean z (negatives)| on
        train, unscaled; full probe: all columns
    both: logistic regression, min over w, b of  1/2 |w|^2 + sum_i log(1 + exp(-s_i (w z_i + b)))
        with s_i = +-1, which is scikit-learn's with C = 1

Source: SAEBench's sparse_probing (https://github.com/adamkarvonen/SAEBench), definition 1.
Definition 2 differs from it: the examples depend on the seed alone, so that all subjects see the
same ones; the full probe is the same regression instead of the best of 100 epochs on the test set;
besides the probes on columns chosen by raw scale there are probes on columns divided by their
standard deviation; the mean over entries has an interval; what can't be measured is a row with a
reason.

The regressions are solved to convergence (`logistic`): the k-sparse probes of all classes of an
entry together in float64, the full ones in float32 without any matrix but the codes themselves.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from saelab import stats
from saelab.data.probing.activations import ProbingData, ProbingEntry
from saelab.errors import SettingError, SourceError
from saelab.evals.base import (
    Row,
    SparseSubject,
    Subject,
    missing,
    needs_contexts,
    number,
    number_or_reason,
)
from saelab.evals.probing.logistic import logistic_regression, logistic_regressions
from saelab.evals.probing.tasks import Task, build_tasks
from saelab.progress import progress
from saelab.runtime.counting import count

DEFINITION = "sparse_probing/2"
K_VALUES = (1, 2, 5, 10, 20, 50)
#: Rows encoded at once into a dense code. Our choice: a CPU keeps such a chunk in its caches at
#: 3,000 latents (6 MB), and is slower beyond; a GPU wants large ones.
CHUNK, GPU_CHUNK = 512, 8192
#: Rows given at once to a subject that sums its codes itself: float32 rows, not codes. Our choice.
POOLED_CHUNK = 8192
#: Texts are also probed on their first positions and on their later ones alone, at one k, if each
#: class has at least `LEAST_LONG` longer texts both in train and in test. Our choice.
SPLIT, POSITION_K, LEAST_LONG = 32, 5, 20
#: Numbers of columns that are also chosen and fitted with every column at standard deviation 1. Our
#: choice: the two that reports show, which cost little time.
STANDARDISED_K = (1, 5)
HALVES = ("position=0-31", "position=32-63")

# ---------------------------------------------------------------- pooling


@torch.inference_mode()
def mean_codes(
    subject: Subject | None,
    rows: Tensor,
    offsets: Tensor,
    chunk: int | None = None,
    device: torch.device | str = "cpu",
) -> Tensor:
    """Averages the code of every text over its counted positions, zeros included.

    Args:
        subject: encodes the rows; a `SparseSubject` sums its codes itself. None for the rows
            themselves.
        rows: [tokens, d], one text after the other.
        offsets: int64 [texts + 1].
        chunk: rows encoded at once; texts may extend over several chunks. None for a number that
            suits subject and device.
        device: of the subject.

    Returns: float32 [texts, F] on that device.
    Raises: SourceError when a text has no counted position.
    """
    total = _sum_code(subject, rows, offsets, offsets, chunk, device)
    return total.div_(offsets.diff().to(device, torch.float32)[:, None])


def _sum_code(
    subject: Subject | None,
    rows: Tensor,
    offsets: Tensor,
    texts: Tensor,
    chunk: int | None,
    device: torch.device | str,
) -> Tensor:
    """Sums the code over segments of rows; arguments as for `mean_codes`, but for two.

    Args:
        offsets: of the segments, which may be parts of texts.
        texts: first rows of the texts, and the number of rows.
    """
    sums, suited = _choose_sums(subject, texts, device)
    chunk = len(rows) if needs_contexts(subject) else chunk or suited  # no text is cut in two
    lengths = offsets.diff()
    if len(lengths) == 0 or int(lengths.min()) == 0:
        text = int(lengths.argmin()) if len(lengths) else 0
        raise SourceError(f"text {text} has no counted position to average: leave it out")
    total: Tensor | None = None
    for start in range(0, int(offsets[-1]), chunk):
        stop = min(start + chunk, int(offsets[-1]))
        first = int(torch.searchsorted(offsets, start, right=True)) - 1
        last = int(torch.searchsorted(offsets, stop))
        cuts = offsets[first : last + 1].clamp(start, stop).sub(start).to(device)
        part = sums(rows[start:stop].to(device, torch.float32), cuts)
        if total is None:
            total = part.new_zeros(len(lengths), part.shape[1])
        total[first:last] += part
    assert total is not None
    return total


@dataclass(frozen=True)
class ByPosition:
    """Mean codes of an entry's texts over all positions, and before and after `SPLIT`.

    Args:
        whole: of all texts, float32 [texts, F].
        long: indices of the texts that are longer than `SPLIT`, int64 [m].
        early, late: of these texts, float32 [m, F].
    """

    whole: Tensor
    long: Tensor
    early: Tensor
    late: Tensor


@torch.inference_mode()
def pool_by_position(
    subject: Subject | None,
    entry: ProbingEntry,
    chunk: int | None = None,
    device: torch.device | str = "cpu",
) -> ByPosition:
    """Averages the code of every text as a whole and by position, in one pass over the rows."""
    offsets, lengths = entry.offsets, entry.offsets.diff()
    long = (lengths > SPLIT).nonzero()[:, 0]
    fine = torch.cat([offsets, offsets[long] + SPLIT]).sort().values
    sums = _sum_code(subject, entry.rows, fine, offsets, chunk, device)
    first = torch.searchsorted(fine, offsets[:-1])
    early, late = sums[first[long].to(device)], sums[first[long].to(device) + 1]
    whole = sums[first.to(device)].index_add_(0, long.to(device), late)
    counts = lengths.to(device, torch.float32)[:, None]
    return ByPosition(
        whole.div_(counts), long, early.div_(SPLIT), late.div_(counts[long.to(device)] - SPLIT)
    )


def _choose_sums(
    subject: Subject | None, texts: Tensor, device: torch.device | str
) -> tuple[Callable[[Tensor, Tensor], Tensor], int]:
    """Returns `SparseSubject.pooled` for any subject, and a suitable number of rows for a call."""
    if isinstance(subject, SparseSubject):
        if needs_contexts(subject):
            pool: Any = subject.pooled
            return functools.partial(pool, starts=texts), POOLED_CHUNK
        return subject.pooled, POOLED_CHUNK

    def sums(rows: Tensor, cuts: Tensor) -> Tensor:
        code = rows if subject is None else subject.encode(rows).float()
        index = torch.arange(len(code), device=code.device)
        return torch.nn.functional.embedding_bag(  # deterministic and fast everywhere
            index, code, cuts, mode="sum", include_last_offset=True
        )

    return sums, CHUNK if torch.device(device).type == "cpu" else GPU_CHUNK


# ---------------------------------------------------------------- the evaluation


@torch.inference_mode()
def evaluate_probing(
    subject: Subject | None,
    data: ProbingData,
    seed: int,
    k_values: Sequence[int] = K_VALUES,
    prefix: str = "sae",
    device: torch.device | str = "cpu",
    standardised_k: Sequence[int] = STANDARDISED_K,
    chunk: int | None = None,
) -> list[Row]:
    """Computes accuracies of k-sparse and full probes on the test texts.

    Args:
        subject: probed; None for the language model's channels (prefix 'llm').
        data: the language model's activations.
        seed: chooses the examples; the same for all subjects that are compared.
        k_values: numbers of columns.
        prefix: of the metrics.
        device: of the subject.
        standardised_k: those of `k_values` at which columns are also chosen and fitted divided by
            their standard deviation on train, as `<prefix>_standardised_top_<k>_test_accuracy`:
            no column is large there by scale alone.
        chunk: rows encoded at once, which bounds the memory at chunk x d_sae numbers; None for a
            number that suits subject and device.

    Returns: `<prefix>_top_<k>_test_accuracy` and `<prefix>_test_accuracy` (all columns) of each
        class (slice 'entry=..,class=..'), their mean over the classes of an entry ('entry=..') and
        the plain mean over entries (''), with its 95% interval as `<metric>.low` and
        `<metric>.high` where there are two entries or more; and for a subject `probing_constant`,
        1 where all texts of an entry have the same code, so that the accuracies of its probes are
        0.5 and meaningless. The accuracy at k = 5 also from positions 0-31 and 32-63 alone, of
        entries with enough texts that have both ('position=0-31,entry=..'), and their mean
        ('position=0-31').
    """
    for k in k_values:
        if k < 1:
            raise SettingError("k_values", k, "a probe needs at least one column")
    rows: list[Row] = []
    by_position: list[Row] = []
    with progress(f"probing {prefix}", len(data.entries), "entries") as bar:
        for entry in data.entries:
            codes = pool_by_position(subject, entry, chunk, device)
            by_position += _rows_by_position(codes, entry, seed, prefix)
            code = codes.whole
            constant = None if subject is None else constant_row(code, entry)
            rows += probe_rows(code, entry, seed, k_values, prefix, standardised_k)
            rows += mean_rows(rows, f"entry={entry.name},class=", f"entry={entry.name}")
            rows += [] if constant is None else [constant]
            bar.advance()
    entry_slices = {f"entry={entry.name}" for entry in data.entries}
    of_entries = [row for row in rows if row.slice in entry_slices]
    rows += mean_rows(of_entries, "entry=", "") + _intervals(of_entries)
    return rows + by_position + _means_by_position(by_position)


def _rows_by_position(codes: ByPosition, entry: ProbingEntry, seed: int, prefix: str) -> list[Row]:
    """Computes the accuracy of an entry at `POSITION_K` from each half alone, the mean over its
    classes."""
    metric = f"{prefix}_top_{POSITION_K}_test_accuracy"
    labels, is_train = entry.labels[codes.long], entry.is_train[codes.long]
    slices = {f"{name},entry={entry.name}": name for name in HALVES}
    fewest = min(
        int(((labels == c) & (is_train == side)).sum())
        for c in range(len(entry.classes))
        for side in (True, False)
    )
    if fewest < LEAST_LONG:
        reason = (
            f"a class has {count(fewest, 'text')} of more than {SPLIT} tokens (least: {LEAST_LONG})"
        )
        return [missing(metric, DEFINITION, reason, where) for where in slices]
    long_texts = replace(entry, labels=labels, is_train=is_train)
    tasks, rows = build_tasks(long_texts, seed), []
    for where, name in slices.items():
        code = codes.early if name == HALVES[0] else codes.late
        by_task = _accuracies(code, long_texts, tasks, _probes((POSITION_K,)))
        values = [value for accuracies in by_task for value in accuracies.values()]
        reasons = [value for value in values if isinstance(value, str)]
        mean = 0.0 if reasons else sum(map(float, values)) / len(values)
        rows.append(number_or_reason(metric, reasons[0] if reasons else mean, DEFINITION, where))
    return rows


def _means_by_position(rows: Sequence[Row]) -> list[Row]:
    """Averages over the entries that have enough long texts, for each half."""
    means = []
    for name in HALVES:
        of_half = [row for row in rows if row.slice.startswith(name)]
        measured = [row for row in of_half if row.value is not None]
        means += mean_rows(measured or of_half[:1], name, name)
    return means


@torch.inference_mode()
def probe_rows(
    code: Tensor,
    entry: ProbingEntry,
    seed: int,
    k_values: Sequence[int] = K_VALUES,
    prefix: str = "sae",
    standardised_k: Sequence[int] = STANDARDISED_K,
) -> list[Row]:
    """Computes the rows of every class of one entry.

    Args:
        code: `mean_codes` of the entry, float32 [texts, F]; it is changed: the mean over the
            training texts is subtracted in place, since a copy would cost as much as some probes.
        entry, seed, k_values, prefix, standardised_k: as in `evaluate_probing`.
    """
    tasks = build_tasks(entry, seed)
    scaled_k = [k for k in standardised_k if k in k_values]
    by_task = _accuracies(code, entry, tasks, _probes(k_values, scaled_k, full=True))
    rows = []
    for task, accuracies in zip(tasks, by_task, strict=True):
        where = f"entry={entry.name},class={task.name}"
        for probe, value in accuracies.items():
            metric = f"{prefix}_{probe}test_accuracy"
            rows.append(number_or_reason(metric, value, DEFINITION, where))
    return rows


#: Part of a metric's name -> number of columns (0 for all), and True if they are standardised.
Probes = dict[str, tuple[int, bool]]


def _probes(k_values: Sequence[int], scaled_k: Sequence[int] = (), full: bool = False) -> Probes:
    raw = {f"top_{k}_": (k, False) for k in k_values}
    scaled = {f"standardised_top_{k}_": (k, True) for k in scaled_k}
    return {**raw, **({"": (0, False)} if full else {}), **scaled}


def _accuracies(
    code: Tensor, entry: ProbingEntry, tasks: Sequence[Task], probes: Probes
) -> list[dict[str, float | str]]:
    """Computes each task's test accuracy of each probe, or the reason why there is none.

    The code is centred in place.
    """
    finite = code.sum(1).isfinite()
    usable = finite.cpu()
    sound = [t for t in tasks if bool(usable[t.train.index].all() and usable[t.test.index].all())]
    if not usable.all():
        code.masked_fill_(~finite[:, None], 0)
    is_train = entry.is_train & usable
    train = is_train.to(code)
    code.sub_((train / train.sum()) @ code)
    log_odds: dict[str, list[Tensor]] = {}
    for scaled in (False, True) if sound else ():
        possible = {n: k for n, (k, s) in probes.items() if s == scaled and 0 < k <= code.shape[1]}
        if possible:
            scale = _inverse_spread(code, is_train) if scaled else None
            by_k = _sparse_log_odds(code, sound, list(possible.values()), scale)
            log_odds |= {name: by_k[k] for name, k in possible.items()}
    for name in (name for name, (k, _) in probes.items() if k == 0):
        log_odds[name] = [_full_log_odds(code, task) for task in sound]
    by_task: list[dict[str, float | str]] = []
    for task in tasks:
        if task not in sound:
            by_task.append(dict.fromkeys(probes, "the code is not finite"))
            continue
        accuracies: dict[str, float | str] = {}
        for name, (k, _) in probes.items():
            if name in log_odds:
                right = (log_odds[name][sound.index(task)].cpu() > 0) == task.test.positive
                accuracies[name] = float(right.double().mean())
            else:
                accuracies[name] = f"the code has {code.shape[1]} columns, fewer than k = {k}"
        by_task.append(accuracies)
    return by_task


def _sparse_log_odds(
    code: Tensor, tasks: Sequence[Task], k_values: Sequence[int], scale: Tensor | None = None
) -> dict[int, list[Tensor]]:
    """Fits the k-sparse probes.

    Args:
        code: float32 [texts, F], of mean zero.
        scale: float32 [F] by which columns are multiplied; None for ones.

    Returns: k -> log-odds for the test texts of each task, float64.
    """
    best = _best_columns(code, tasks, max(k_values), scale)
    columns = code.index_select(1, best.flatten()).T.reshape(*best.shape, len(code)).double()
    if scale is not None:
        columns *= scale[best][:, :, None]
    n = max(len(task.train.index) for task in tasks)
    index = torch.zeros(len(tasks), n, dtype=torch.int64)
    positive, counted = (torch.zeros(len(tasks), n, dtype=torch.bool) for _ in range(2))
    for i, task in enumerate(tasks):
        size = len(task.train.index)
        index[i, :size], positive[i, :size] = task.train.index, task.train.positive
        counted[i, :size] = True
    index, positive, counted = (part.to(code.device) for part in (index, positive, counted))
    train = columns.gather(2, index[:, None].expand(-1, best.shape[1], -1))
    test = [z[:, task.test.index.to(code.device)] for z, task in zip(columns, tasks, strict=True)]
    log_odds: dict[int, list[Tensor]] = {}
    w, b = columns.new_zeros(len(tasks), 0), columns.new_zeros(len(tasks))
    for k in sorted(k_values):
        w, b = logistic_regressions(train[:, :k], positive, counted, start=(w, b))
        log_odds[k] = [w[i] @ z[:k] + b[i] for i, z in enumerate(test)]
    return log_odds


def _best_columns(code: Tensor, tasks: Sequence[Task], k: int, scale: Tensor | None) -> Tensor:
    """Finds the k columns whose scaled class means differ most, best first; int64 [tasks, k]."""
    sign = torch.zeros(len(tasks), len(code), dtype=torch.float32)
    for i, task in enumerate(tasks):
        positive = task.train.positive
        sign[i, task.train.index] = positive / positive.sum() - ~positive / (~positive).sum()
    difference = sign.to(code.device) @ code
    difference = difference if scale is None else difference * scale
    return difference.abs().argsort(dim=1, descending=True, stable=True)[:, :k]


def _inverse_spread(code: Tensor, is_train: Tensor) -> Tensor:
    """Returns 1 / standard deviation of each column over the training texts; 1 for constant ones.

    Args:
        code: float32 [texts, F], of mean zero there.
    """
    n = int(is_train.sum())
    train = code[:n] if is_train[:n].all() else code[is_train.to(code.device)]  # rarely a copy
    spread = torch.linalg.vector_norm(train, dim=0) / max(1, n - 1) ** 0.5
    return 1 / torch.where(spread > 0, spread, 1)


def _full_log_odds(code: Tensor, task: Task) -> Tensor:
    """Fits the full probe; returns its log-odds for the test texts, float32."""
    train, test = (
        code.index_select(0, side.index.to(code.device)) for side in (task.train, task.test)
    )
    w, b = logistic_regression(train, task.train.positive.to(code.device))
    return test @ w + b


def _intervals(rows: Sequence[Row]) -> list[Row]:
    """Computes the 95% t interval of each mean over entries, which are its units.

    The tasks of an entry share their texts, so that they are not independent draws.
    """
    values: dict[str, list[float | None]] = {}
    for row in rows:
        if row.metric.endswith("accuracy"):
            values.setdefault(row.metric, []).append(row.value)
    intervals = []
    for metric, of_entries in values.items():
        numbers = [value for value in of_entries if value is not None]
        if len(numbers) == len(of_entries) > 1:
            low, high = stats.t_interval(numbers)
            intervals += [
                number(f"{metric}.low", float(low), DEFINITION),
                number(f"{metric}.high", float(high), DEFINITION),
            ]
    return intervals


def constant_row(code: Tensor, entry: ProbingEntry, definition: str = DEFINITION) -> Row:
    """Builds the row that is 1 where all texts of an entry have the same code, else 0."""
    constant = float((code == code[0]).all())
    return number("probing_constant", constant, definition, f"entry={entry.name}")


def mean_rows(
    rows: Sequence[Row], begins: str, where: str, definition: str = DEFINITION
) -> list[Row]:
    """Averages each metric over the rows whose slice starts with `begins`.

    Returns: a row of slice `where` for each metric, missing where one of its rows is.
    """
    groups: dict[str, list[Row]] = {}
    for row in rows:
        if row.slice.startswith(begins):
            groups.setdefault(row.metric, []).append(row)
    means = []
    for metric, group in groups.items():
        values = [row.value for row in group if row.value is not None]
        if len(values) == len(group):
            means.append(number(metric, sum(values) / len(values), definition, where))
        else:
            first = next(row for row in group if row.value is None)
            means.append(missing(metric, definition, f"{first.slice}: {first.reason}", where))
    return means
