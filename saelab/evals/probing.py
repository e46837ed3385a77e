"""Sparse probing: can few latents tell the class of a text? Definition 'sparse_probing/2'.

    z_i = mean over the counted positions of text i of encode(x), zeros included
    task: one class against the rest, as many negatives as positives, evenly from the other classes
    k-sparse probe: the k columns with the largest |mean z (positives) - mean z (negatives)| on
        train, unscaled; full probe: all columns
    both: logistic regression, min over w, b of  1/2 |w|^2 + sum_i log(1 + exp(-s_i (w z_i + b)))
        with s_i = +-1, which is scikit-learn's with C = 1

Source: SAEBench's sparse_probing (https://github.com/adamkarvonen/SAEBench), definition 1. What
definition 2 changes: the examples depend on the seed alone, so that all subjects see the same ones;
the full probe is the same regression instead of the best of 100 epochs on the test set; what can't
be measured is a row with a reason.

The regressions are solved to convergence by Newton's method in float64 (iteratively reweighted
least squares with a line search). With more columns than texts it works on the texts' inner
products instead (w = sum_i a_i z_i), so its cost does not grow with the dictionary.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from saelab.config import digest
from saelab.data.models import LanguageModel
from saelab.data.passes import by_length, side_by_side
from saelab.data.store import check_identity
from saelab.data.tasks import Entry, entries_digest
from saelab.data.texts import tokenize_texts
from saelab.errors import DamageError, SettingError, SourceError
from saelab.evals.base import Row, Subject, missing, number
from saelab.files import read_json, sha256, write_atomically, write_json
from saelab.progress import progress
from saelab.seeding import numpy_stream

DEFINITION = "sparse_probing/2"
#: Version of the folder with the model's activations.
FORMAT = 1
K_VALUES = (1, 2, 5, 10, 20, 50)
#: Rows encoded at once. Our choice: 100 MB of float32 code at 3,000 latents.
CHUNK = 8192
#: Positions in one pass of the language model, padding included.
TOKENS = 2048

# ---------------------------------------------------------------- data


@dataclass(frozen=True)
class ProbingEntry:
    """The language model's activations on the texts of one entry.

    Args:
        name, classes: as in `Entry`.
        rows: [tokens, d], the counted positions of all texts, one text after the other.
        offsets: int64 [texts + 1]; text i has the rows offsets[i] to offsets[i + 1].
        labels: int64 [texts], index into `classes`.
        is_train: bool [texts].
    """

    name: str
    classes: tuple[str, ...]
    rows: Tensor
    offsets: Tensor
    labels: Tensor
    is_train: Tensor


@dataclass(frozen=True)
class ProbingData:
    """All entries, and a header that says what they were made from."""

    entries: tuple[ProbingEntry, ...]
    header: dict[str, Any]

    @functools.cached_property
    def digest(self) -> str:
        """A 16-character content hash of header and tensors."""
        return digest([self.header, [_content(entry) for entry in self.entries]])

    def save(self, folder: Path) -> None:
        """Writes probing.safetensors, then probing.json with its checksum."""
        tensors = {
            f"{entry.name}.{name}": tensor.contiguous()
            for entry in self.entries
            for name, tensor in _tensors(entry).items()
        }
        file = folder / "probing.safetensors"
        write_atomically(file, lambda temporary: save_file(tensors, temporary))
        entries = [{"name": e.name, "classes": list(e.classes)} for e in self.entries]
        record = {"format": FORMAT, "sha256": sha256(file), "header": self.header}
        write_json(folder / "probing.json", {**record, "entries": entries})

    @classmethod
    def load(cls, folder: Path, expected: Mapping[str, Any] | None = None) -> ProbingData:
        """Reads what `save` wrote.

        Args:
            folder: that holds the two files.
            expected: header fields that must agree, such as hook_name.

        Raises: MismatchError when they do not; DamageError when the file is not what was written.
        """
        record = read_json(folder / "probing.json")
        file = folder / "probing.safetensors"
        stored = {**record["header"], "format": record["format"]}
        check_identity(stored, {"format": FORMAT, **(expected or {})}, str(folder))
        if not file.is_file() or sha256(file) != record["sha256"]:
            raise DamageError(f"{file} is not what was written: delete {folder} and run again")
        tensors = load_file(file)
        entries = tuple(
            ProbingEntry(
                entry["name"],
                tuple(entry["classes"]),
                *(tensors[f"{entry['name']}.{name}"] for name in _TENSORS),
            )
            for entry in record["entries"]
        )
        return cls(entries, record["header"])


_TENSORS = ("rows", "offsets", "labels", "is_train")


def _tensors(entry: ProbingEntry) -> dict[str, Tensor]:
    return {name: getattr(entry, name) for name in _TENSORS}


def _content(entry: ProbingEntry) -> list[Any]:
    hashes = [
        hashlib.sha256(tensor.contiguous().view(torch.uint8).numpy().data).hexdigest()
        for tensor in _tensors(entry).values()
    ]
    return [entry.name, entry.classes, *hashes]


def identity(
    model: LanguageModel, hook_name: str, entries: Sequence[Entry], context: int, dtype: torch.dtype
) -> dict[str, Any]:
    """The header of the activations that `harvest_probing` would make: all they depend on."""
    return {
        "model": model.config.path,
        "model_digest": model.digest,
        "model_dtype": model.config.dtype,
        "hook_name": hook_name,
        "context": context,
        "entries": entries_digest(tuple(entries)),
        "dtype": str(dtype).removeprefix("torch."),
    }


def harvest_probing(
    model: LanguageModel,
    hook_name: str,
    entries: Sequence[Entry],
    context: int = 64,
    dtype: torch.dtype = torch.float16,
) -> ProbingData:
    """One pass of the language model over all texts, for all subjects.

    Args:
        model: the language model.
        hook_name: where it is read.
        entries: the labelled texts.
        context: positions a text, BOS included; what is longer is cut.
        dtype: of the stored rows.

    Raises: SourceError when an activation is not finite in `dtype`.
    """
    texts = [_TokenisedTexts(entry, model, context) for entry in entries]
    rows = _filled(model, hook_name, texts, dtype)
    for entry, x in zip(entries, rows, strict=True):
        if not x.isfinite().all():
            raise SourceError(
                f"{hook_name} has activations beyond {dtype} on entry {entry.name}: store float32"
            )
    made = [
        ProbingEntry(entry.name, entry.classes, x, part.offsets, part.labels, part.is_train)
        for entry, part, x in zip(entries, texts, rows, strict=True)
    ]
    return ProbingData(tuple(made), identity(model, hook_name, entries, context, dtype))


def _texts(entry: Entry) -> tuple[list[str], list[int], list[bool]]:
    """All texts, their labels and sides: train class by class, then test."""
    found = [
        (text, label, side is entry.train)
        for side in (entry.train, entry.test)
        for label, name in enumerate(entry.classes)
        for text in side[name]
    ]
    texts, labels, is_train = zip(*found, strict=True)
    return list(texts), list(labels), list(is_train)


class _TokenisedTexts:
    """The texts of one entry as tokens; `offsets`, `labels` and `is_train` as in `ProbingEntry`."""

    def __init__(self, entry: Entry, model: LanguageModel, context: int) -> None:
        texts, labels, is_train = _texts(entry)
        self.labels, self.is_train = torch.tensor(labels), torch.tensor(is_train)
        self.ids, self.attention, self.mask = tokenize_texts(texts, model.tokenizer, context)
        self.offsets = torch.zeros(len(texts) + 1, dtype=torch.int64)
        self.offsets[1:] = self.mask.sum(1).cumsum(0)
        self.places = self.offsets[:-1, None] + self.mask.cumsum(1) - 1  # row of each position


def _filled(
    model: LanguageModel, hook_name: str, parts: Sequence[_TokenisedTexts], dtype: torch.dtype
) -> list[Tensor]:
    """The rows of each part; texts of all parts share the passes, so that hardly any is padded."""
    ids = torch.cat([part.ids for part in parts])
    attention, mask, places = (
        torch.cat([getattr(part, name) for part in parts])
        for name in ("attention", "mask", "places")
    )
    owner = torch.arange(len(parts)).repeat_interleave(torch.tensor([len(p.ids) for p in parts]))
    lengths = attention.sum(1)
    d = model.activations(ids[:1, :2], None, [hook_name])[hook_name].shape[-1]
    rows = [torch.empty(int(part.offsets[-1]), d, dtype=dtype) for part in parts]

    def fill(model: LanguageModel, texts: Tensor) -> int:
        longest = int(lengths[texts].max())
        padded = attention[texts, :longest]
        inputs = ids[texts, :longest], None if padded.all() else padded
        x = model.activations(*inputs, [hook_name])[hook_name].cpu().to(dtype)
        for part in owner[texts].unique().tolist():
            counted = mask[texts, :longest] & (owner[texts] == part)[:, None]
            rows[part][places[texts, :longest][counted]] = x[counted]
        return len(texts)

    groups = by_length(lengths, TOKENS)
    with (
        progress("probing texts", len(ids), "texts") as bar,
        closing(side_by_side(model, fill, groups)) as done,
    ):
        for texts in done:
            bar.advance(texts)
    return rows


# ---------------------------------------------------------------- tasks


@dataclass(frozen=True)
class Examples:
    """Text numbers int64 [n] and labels bool [n]; positives first, half of all."""

    index: Tensor
    positive: Tensor


@dataclass(frozen=True)
class Task:
    """One class against the rest."""

    name: str
    train: Examples
    test: Examples


def build_tasks(entry: ProbingEntry, seed: int) -> tuple[Task, ...]:
    """The one-vs-rest tasks of an entry; they depend on its labels and the seed alone.

    Raises: SourceError when a class has no texts on one side.
    """
    tasks = []
    for label, name in enumerate(entry.classes):
        rng = numpy_stream(seed, "evaluation", entry.name, name)
        train, test = (
            _examples(entry, label, entry.is_train == side, rng) for side in (True, False)
        )
        tasks.append(Task(name, train, test))
    return tuple(tasks)


def _examples(entry: ProbingEntry, label: int, side: Tensor, rng: np.random.Generator) -> Examples:
    """Positives and as many negatives, whose shares of the other classes differ by one at most."""
    pools = [
        ((entry.labels == c) & side).nonzero()[:, 0].numpy() for c in range(len(entry.classes))
    ]
    own, others = pools[label], [pool for c, pool in enumerate(pools) if c != label]
    rarest = min(map(len, others), default=0)
    n = min(len(own), rarest * len(others))
    if n == 0:
        raise SourceError(
            f"entry {entry.name} has no train or test texts for class {entry.classes[label]!r} "
            "or for another: give every class some"
        )
    shares = [n // len(others) + (c < n % len(others)) for c in range(len(others))]
    negatives = [rng.choice(pool, k, replace=False) for pool, k in zip(others, shares, strict=True)]
    index = torch.from_numpy(np.concatenate([rng.choice(own, n, replace=False), *negatives]))
    return Examples(index, torch.arange(2 * n) < n)


# ---------------------------------------------------------------- pooling


@torch.inference_mode()
def pooled(
    encode: Callable[[Tensor], Tensor],
    rows: Tensor,
    offsets: Tensor,
    chunk: int = CHUNK,
    device: torch.device | str = "cpu",
) -> Tensor:
    """Mean code of every text over its counted positions, zeros included.

    Args:
        encode: float32 [n, d] -> [n, F].
        rows: [tokens, d], one text after the other.
        offsets: int64 [texts + 1].
        chunk: rows encoded at once; texts may lie across chunks.
        device: where `encode` works.

    Returns: float32 [texts, F] on that device.
    Raises: SourceError when a text has no counted position.
    """
    lengths = offsets.diff()
    if len(lengths) == 0 or int(lengths.min()) == 0:
        where = int(lengths.argmin()) if len(lengths) else 0
        raise SourceError(f"text {where} has no counted position to average: leave it out")
    total: Tensor | None = None
    for start in range(0, int(offsets[-1]), chunk):
        stop = min(start + chunk, int(offsets[-1]))
        code = encode(rows[start:stop].to(device, torch.float32)).float()
        first = int(torch.searchsorted(offsets, start, right=True)) - 1
        last = int(torch.searchsorted(offsets, stop))
        cuts = offsets[first : last + 1].clamp(start, stop).sub(start).to(device)
        if total is None:
            total = code.new_zeros(len(lengths), code.shape[1])
        total[first:last] += _segment_sums(code, cuts)
    assert total is not None
    return total / lengths.to(device, torch.float32)[:, None]


def _segment_sums(code: Tensor, cuts: Tensor) -> Tensor:
    """Sums of code[cuts[i] : cuts[i + 1]]. An embedding bag: deterministic and fast everywhere."""
    index = torch.arange(len(code), device=code.device)
    return torch.nn.functional.embedding_bag(
        index, code, cuts, mode="sum", include_last_offset=True
    )


# ---------------------------------------------------------------- logistic regression


class _Space(Protocol):
    """The coefficients' space: columns (w) or texts (a, with w = sum_i a_i z_i)."""

    size: int

    def fit(self, w: Tensor) -> Tensor: ...

    def inner(self, u: Tensor, v: Tensor) -> Tensor: ...

    def solve(self, weight: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        """min over w, b of 1/2 |w|^2 + 1/2 sum_i weight_i (fit(w)_i + b - target_i)^2."""
        ...


class _Columns:
    """Few columns: a linear system of their number."""

    def __init__(self, z: Tensor) -> None:
        self.z, self.size = z, z.shape[1]

    def fit(self, w: Tensor) -> Tensor:
        return self.z @ w

    def inner(self, u: Tensor, v: Tensor) -> Tensor:
        return u @ v

    def solve(self, weight: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        share = weight / weight.sum()
        centre = share @ self.z
        z = self.z - centre
        system = (z * weight[:, None]).T @ z
        system.diagonal().add_(1)
        middle = share @ target
        w = _solve(system, ((target - middle) * weight @ z)[:, None])[:, 0]
        return w, middle - centre @ w


class _Texts:
    """Few texts: a linear system of their number (Rasmussen and Williams 2006, algorithm 3.1).

    (K + W^-1) a = target - b and sum_i a_i = 0, through B = 1 + W^1/2 K W^1/2, whose eigenvalues
    are 1 or larger. Inner products and steps are float32 where K is small enough for it; a step
    only has to go down, the loss and its slope are always float64.
    """

    def __init__(self, z: Tensor) -> None:
        dtype = torch.float32 if float(z.square().sum()) < SMALL_TRACE else torch.float64
        self.rough = z.to(dtype) @ z.to(dtype).T
        self.gram, self.size = self.rough.double(), z.shape[0]

    def fit(self, w: Tensor) -> Tensor:
        return self.gram @ w

    def inner(self, u: Tensor, v: Tensor) -> Tensor:
        return u @ (self.gram @ v)

    def solve(self, weight: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        root = weight.sqrt()
        rough = root.to(self.rough.dtype)
        system = (self.rough * rough[:, None]).mul_(rough)
        system.diagonal().add_(1)
        right = torch.stack([target, torch.ones_like(target)], dim=1) * root[:, None]
        of_target, of_one = (_solve(system, right.to(system.dtype)).double() * root[:, None]).T
        b = of_target.sum() / of_one.sum()
        return of_target - b * of_one, b


def _solve(system: Tensor, right: Tensor) -> Tensor:
    return torch.cholesky_solve(right, torch.linalg.cholesky(system))


def logistic_regression(z: Tensor, positive: Tensor) -> tuple[Tensor, Tensor]:
    """L2-penalised logistic regression with C = 1 and a free intercept, to convergence.

    Args:
        z: float64 [n, k].
        positive: bool [n].

    Returns: coefficients float64 [k] and intercept float64 [].
    """
    n, k = z.shape
    space: _Space = _Columns(z) if k <= n else _Texts(z)
    w, b = _newton(space, positive.to(z.dtype))
    return (w, b) if k <= n else (z.T @ w, b)


#: Inner products are float32 below this sum of squares: their errors (6e-8 of it, divided by the
#: root of the number of texts) then stay far below 1, the penalty's own eigenvalue. Our choice.
SMALL_TRACE = 1e6
#: Newton's method stops after a step that promised to lower the loss by less than this share of
#: it. Our choice: it converges quadratically there, and accuracies no longer move.
TOLERANCE = 1e-5
MAX_STEPS = 100
#: Weights p (1 - p) below this are raised to it: they only shape the step, never the solution.
LEAST_WEIGHT = 1e-8


def _newton(space: _Space, y: Tensor) -> tuple[Tensor, Tensor]:
    """Coefficients and intercept that minimise 1/2 |w|^2 + sum_i softplus(eta_i) - y_i eta_i."""
    w, b, fit = y.new_zeros(space.size), y.new_zeros(()), torch.zeros_like(y)

    def loss(w: Tensor, eta: Tensor) -> float:
        logistic = torch.nn.functional.softplus(eta).sum() - y @ eta
        return float(logistic + 0.5 * space.inner(w, w))

    current = loss(w, fit)
    for _ in range(MAX_STEPS):
        eta = fit + b
        p = torch.sigmoid(eta)
        weight = (p * (1 - p)).clamp_min(LEAST_WEIGHT)
        new_w, new_b = space.solve(weight, eta + (y - p) / weight)
        dw, db, dfit = new_w - w, new_b - b, space.fit(new_w) - fit
        slope = float((p - y) @ (dfit + db) + space.inner(w, dw))
        step = 1.0
        while (
            new := loss(w + step * dw, eta + step * (dfit + db))
        ) > current + 1e-4 * step * slope:
            step /= 2
            if step < 1e-9:
                return w, b
        w, b, fit, current = w + step * dw, b + step * db, fit + step * dfit, new
        if -slope < TOLERANCE * current:
            break
    return w, b


# ---------------------------------------------------------------- the evaluation


@torch.inference_mode()
def evaluate_probing(
    subject: Subject | None,
    data: ProbingData,
    seed: int,
    k_values: Sequence[int] = K_VALUES,
    prefix: str = "sae",
    device: torch.device | str = "cpu",
    standardised: bool = False,
    chunk: int = CHUNK,
) -> list[Row]:
    """Accuracies of k-sparse and full probes on the test texts.

    Args:
        subject: what is probed; None for the language model's own channels (prefix 'llm').
        data: the language model's activations.
        seed: chooses the examples; the same for all subjects that are compared.
        k_values: numbers of columns.
        prefix: of the metrics.
        device: of the subject.
        standardised: also choose and fit with every column divided by its standard deviation, as
            `<prefix>_standardised_top_<k>_test_accuracy`, where no column is large by scale alone.
        chunk: rows encoded at once; bounds the memory at chunk x d_sae numbers.

    Returns: `<prefix>_top_<k>_test_accuracy` and `<prefix>_test_accuracy` (all columns) of each
        class (slice 'entry=..,class=..'), their mean over the classes of an entry ('entry=..') and
        the plain mean over entries (''); and for a subject `probing_constant`, 1 where all texts of
        an entry have the same code, so that its probes are at 0.5 and mean nothing.
    """
    for k in k_values:
        if k < 1:
            raise SettingError("k_values", k, "a probe needs at least one column")
    rows: list[Row] = []
    encode = (lambda x: x) if subject is None else subject.encode
    with progress(f"probing {prefix}", len(data.entries), "entries") as bar:
        for entry in data.entries:
            code = pooled(encode, entry.rows, entry.offsets, chunk, device)
            rows += _class_rows(code, entry, seed, k_values, prefix, standardised)
            rows += _means(rows, f"entry={entry.name},class=", f"entry={entry.name}")
            if subject is not None:
                rows.append(_constant(code, entry))
            bar.advance()
    entry_slices = {f"entry={entry.name}" for entry in data.entries}
    return rows + _means([row for row in rows if row.slice in entry_slices], "entry=", "")


def _class_rows(
    code: Tensor,
    entry: ProbingEntry,
    seed: int,
    k_values: Sequence[int],
    prefix: str,
    standardised: bool,
) -> list[Row]:
    """The rows of every class of one entry, from code float32 [texts, F]."""
    variants = {"": code}
    if standardised:
        spread = code[entry.is_train].std(0)
        variants["standardised_"] = code / torch.where(spread > 0, spread, 1)
    rows = []
    for task in build_tasks(entry, seed):
        where = f"entry={entry.name},class={task.name}"
        for variant, columns in variants.items():
            found = _accuracies(columns, task, k_values, full=not variant)
            for k, value in found.items():
                part = f"{variant}top_{k}_" if k else ""
                metric = f"{prefix}_{part}test_accuracy"
                rows.append(
                    missing(metric, DEFINITION, value, where)
                    if isinstance(value, str)
                    else number(metric, value, DEFINITION, where)
                )
    return rows


def _accuracies(
    code: Tensor, task: Task, k_values: Sequence[int], full: bool
) -> dict[int, float | str]:
    """Test accuracy by k, with 0 for the full probe; a sentence where there is none."""
    train, test = code[task.train.index], code[task.test.index]
    wanted = [*k_values, *([0] if full else [])]
    if not (train.isfinite().all() and test.isfinite().all()):
        return dict.fromkeys(wanted, "the code is not finite")
    positive = task.train.positive.to(code.device)
    difference = train[positive].mean(0) - train[~positive].mean(0)
    order = difference.abs().argsort(descending=True, stable=True)  # the columns of k are nested
    centre = train.double().mean(0)
    found: dict[int, float | str] = {}
    for k in wanted:
        if k > code.shape[1]:
            found[k] = f"the code has {code.shape[1]} columns, fewer than k = {k}"
            continue
        columns = order[:k] if k else slice(None)
        z, z_test = (side[:, columns].double() - centre[columns] for side in (train, test))
        w, b = logistic_regression(z, positive)
        right = (z_test @ w + b > 0) == task.test.positive.to(code.device)
        found[k] = float(right.double().mean())
    return found


def _constant(code: Tensor, entry: ProbingEntry) -> Row:
    same = float((code == code[0]).all())
    return number("probing_constant", same, DEFINITION, f"entry={entry.name}")


def _means(rows: Sequence[Row], begins: str, where: str) -> list[Row]:
    """One row for each metric: the mean over the rows whose slice begins so."""
    groups: dict[str, list[Row]] = {}
    for row in rows:
        if row.slice.startswith(begins):
            groups.setdefault(row.metric, []).append(row)
    made = []
    for metric, group in groups.items():
        values = [row.value for row in group if row.value is not None]
        if len(values) == len(group):
            made.append(number(metric, sum(values) / len(values), DEFINITION, where))
        else:
            first = next(row for row in group if row.value is None)
            made.append(missing(metric, DEFINITION, f"{first.slice}: {first.reason}", where))
    return made
