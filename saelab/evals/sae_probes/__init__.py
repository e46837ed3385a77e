"""Probing on sae-probes' data sets: is a binary label in few latents at a text's last token?

    code = encode(the hook's value at the last token), [texts, F]

Definition 1, 'sae_probes/1', is the package's: its rows, its order of latents, its solvers. Latents
are ordered by |mean code (positives) - mean code (negatives)| on the training rows, each divided by
its mean non-zero size there ('mean') or not ('none'); the probes are those of `package_probes`.

Definition 2, 'sae_probes/2', has the same data sets, settings and metrics, but several draws of
rows from named streams, the same for all subjects; columns standardised before they are ordered;
and converged solvers (`converged_probes`), for many data sets and draws at once. A data set's
number is the mean over its draws, the number of all is the mean over data sets; `.low` and `.high`
are 95% t intervals over the draws of a data set, and over data sets for all of them.

Settings besides 'normal' are in `saelab.data.probing.row_selection`. A data set that is too small
for a point of 'scarcity', or has no texts of another kind, is left out there, as in the package.
Label noise and texts of another kind are in the package for its baselines alone; here they are for
latents too.

Source: sae-probes 0.4.2, Kantamneni et al. 2025 (arXiv 2502.16681).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import KW_ONLY, dataclass

import numpy as np
import torch
from torch import Tensor

from saelab import stats
from saelab.data.probing.activations import ProbingEntry
from saelab.data.probing.last_tokens import LastTokens
from saelab.data.probing.row_selection import Condition, Draw, Split, conditions, select_rows
from saelab.data.probing.sae_probes import SaeProbesConfig
from saelab.evals.base import Row, Subject, missing, needs_contexts, number
from saelab.evals.sae_probes.converged_probes import Problem, Rows, build_problem, solve
from saelab.evals.sae_probes.logistic_probes import LogisticProbe, probe_all
from saelab.evals.sae_probes.package_probes import (
    BASELINES,
    SEED,
    Sides,
    order_columns,
    probe_logistic,
)
from saelab.evals.sae_probes.scores import Scores
from saelab.progress import progress
from saelab.seeding import numpy_stream

#: Definitions by the number that settings name them by.
DEFINITIONS = {1: "sae_probes/1", 2: "sae_probes/2"}
#: Beginning of the metrics of a subject's latents, and of the model's channels.
LATENTS, CHANNELS = "sae_probes", "sae_probes_channels"
#: Numbers of a probe, by definition.
KINDS = {1: ("accuracy", "auc", "f1", "validation_auc"), 2: ("accuracy", "auc")}
#: Rows encoded at once. Our choice: a dense code of 16,384 latents takes 32 MB.
CHUNK = 512
#: Numbers of all problems that wait to be solved together. Our choice: 256 MB in float32.
MOST_NUMBERS = 2**26

#: Metric -> number, or the reason why there is none.
Values = dict[str, float | str]


@dataclass
class Item:
    """Values of the probes on one draw of rows.

    Args:
        condition, dataset, draw: which rows.
        values: by metric.
        fits, stopped: fits of definition 1, and those that ended at the limit of iterations.
    """

    condition: Condition
    dataset: str
    draw: int
    values: Values
    _: KW_ONLY
    fits: int = 0
    stopped: int = 0

    def add(self, name: str, scores: Scores | str) -> None:
        """Adds the numbers of one probe of definition 1, or the reason why there are none."""
        self.values.update(_values(name, scores, KINDS[1]))
        if not isinstance(scores, str):
            self.fits += scores.fits
            self.stopped += scores.stopped


def metric_names(config: SaeProbesConfig, channels: bool = False) -> list[str]:
    """Names the metrics of these settings, without ends of intervals.

    Args:
        channels: of the model's channels, not of a subject's latents.
    """
    prefix = CHANNELS if channels else LATENTS
    probes = [f"top_{k}" for k in config.k_values] + list(config.baselines if channels else ())
    return [f"{prefix}_{probe}_{kind}" for probe in probes for kind in KINDS[config.definition]]


@torch.inference_mode()
def evaluate_sae_probes(
    subject: Subject | None,
    data: LastTokens,
    seed: int = 0,
    device: torch.device | str = "cpu",
) -> list[Row]:
    """Computes accuracy and AUC of the probes on the test rows.

    Args:
        subject: whose latents are probed; None for the model's channels, with the baselines.
        data: activations of the data sets, and settings.
        seed: of the rows of definition 2, the same for all subjects that are compared; definition 1
            has the package's, 42.
        device: of the subject.

    Returns: for each k `sae_probes_top_<k>_<number>` (of channels `sae_probes_channels_top_<k>_...`
        and `sae_probes_channels_<baseline>_...`): accuracy and auc; in definition 1 f1 and
        validation_auc too, and `..._unconverged`, the share of fits that ended at the limit of
        iterations. Slices: 'dataset=...' and '' (the mean over data sets) of the normal setting;
        'setting=scarcity,rows=16,dataset=...' and 'setting=scarcity,rows=16' of others.
    """
    config, channels = data.config, subject is None
    definition = DEFINITIONS[config.definition]
    if needs_contexts(subject):
        reason = "its code depends on the tokens before, and only a text's last token is stored"
        return [missing(name, definition, reason) for name in metric_names(config)]
    items: list[Item] = []
    first = config.definition == 1
    solver = _PackageSolver(config, channels) if first else _Solver(config, seed, channels)
    with progress("sae_probes", len(data.names), "data sets") as bar:
        for coded in _encode_all(subject, data, device):
            items += solver.add(coded)
            bar.advance()
        items += solver.finish()
    return _build_rows(items, config, channels)


# ---------------------------------------------------------------- codes and rows


@dataclass(frozen=True, eq=False)
class _Coded:
    """Code float32 [texts, F] and labels int64 [texts] of a data set, and of its shifted texts."""

    name: str
    code: Tensor
    labels: np.ndarray
    shifted: tuple[Tensor, np.ndarray] | None

    def test_rows(self, split: Split) -> tuple[Tensor, np.ndarray, np.ndarray]:
        """Returns the code that the test rows are rows of, their indices, and their labels."""
        if split.test is not None:
            return self.code, split.test, self.labels[split.test]
        assert self.shifted is not None
        code, labels = self.shifted
        return code, np.arange(len(labels)), labels

    def sides(self, split: Split, columns: Tensor | None = None) -> Sides:
        """Returns the columns (None: all), int64 [k], and the labels of a draw."""
        code, test, labels = self.test_rows(split)

        def rows(code: Tensor, index: np.ndarray) -> np.ndarray:
            chosen = code if columns is None else code.index_select(1, columns)
            return chosen[torch.from_numpy(index).to(code.device)].cpu().double().numpy()

        return Sides(rows(self.code, split.train), split.train_labels, rows(code, test), labels)


def _encode_all(
    subject: Subject | None, data: LastTokens, device: torch.device | str
) -> Iterator[_Coded]:
    """Encodes one data set after the other, float32."""

    def encode(entry: ProbingEntry) -> Tensor:
        rows = entry.rows.to(device)
        if subject is None:
            return rows
        return torch.cat([subject.encode(x).float() for x in rows.split(CHUNK)])

    for name in data.names:
        entry, other = data.load(name), data.load_shifted(name)
        shifted = None
        if other is not None and "ood" in data.config.settings:
            shifted = encode(other), other.labels.numpy()
        yield _Coded(name, encode(entry), entry.labels.numpy(), shifted)


def _conditions(coded: _Coded, config: SaeProbesConfig) -> list[Condition]:
    """Lists the conditions that a data set is probed under."""
    return [
        condition
        for condition in conditions(config.settings)
        if condition.is_possible(len(coded.labels), coded.shifted is not None)
    ]


def _splits(
    coded: _Coded, config: SaeProbesConfig, seed: int
) -> Iterator[tuple[Condition, int, Split | str]]:
    """Draws the rows of definition 2 for each condition and draw."""
    for condition in _conditions(coded, config):
        for draw in range(config.draws):
            keys = (coded.name, condition.setting, f"{condition.amount:g}", draw)

            def generator(purpose: str, keys: tuple[str | int, ...] = keys) -> Draw:
                return numpy_stream(seed, "evaluation", LATENTS, *keys, purpose)

            yield condition, draw, select_rows(coded.labels, condition, generator)


# ---------------------------------------------------------------- definition 1


class _PackageSolver:
    """Collects the probes of definition 1; those with an L2 penalty are solved together.

    Args:
        config: settings.
        channels: the columns are the model's channels, for which there are baselines too.
    """

    def __init__(self, config: SaeProbesConfig, channels: bool) -> None:
        self.config, self.channels = config, channels
        self.items: list[Item] = []
        self.waiting: list[tuple[Item, LogisticProbe, dict[int, str]]] = []
        self.numbers = 0

    def add(self, coded: _Coded) -> list[Item]:
        """Adds a data set; returns the items that have been finished."""
        for condition in _conditions(coded, self.config):
            item = Item(condition, coded.name, 0, {})
            self.items.append(item)
            self._add_latents(item, coded, _package_split(coded, condition))
            if self.channels:
                self._add_baselines(item, coded, _package_split(coded, condition, rounded=True))
        return self.finish() if 2 * self.numbers > MOST_NUMBERS else []

    def finish(self) -> list[Item]:
        """Solves what waits; returns the items."""
        results = probe_all([probe for _, probe, _ in self.waiting], SEED)
        for (item, _, names), result in zip(self.waiting, results, strict=True):
            for width, name in names.items():
                item.add(name, result[width])
        items = self.items
        self.items, self.waiting, self.numbers = [], [], 0
        return items

    def _add_latents(self, item: Item, coded: _Coded, split: Split | str) -> None:
        config, names = self.config, {}
        for k in config.k_values:
            name = f"{CHANNELS if self.channels else LATENTS}_top_{k}"
            reason = split if isinstance(split, str) else _too_many(k, coded.code)
            if reason:
                item.add(name, reason)
            else:
                names[k] = name
        if isinstance(split, str) or not names:
            return
        x = coded.code[torch.from_numpy(split.train).to(coded.code.device)]
        best = order_columns(x, split.train_labels, config.normalisation == "mean")[: max(names)]
        sides = coded.sides(split, best)
        absolute = config.regularisation != "l2"
        if not absolute or config.l1_solver == "newton":
            self._wait(item, LogisticProbe(sides, tuple(names), absolute), names)
            return
        for k, name in names.items():
            item.add(name, _scores(sides.first_columns(k), lambda s: probe_logistic(s, SEED, "l1")))

    def _add_baselines(self, item: Item, coded: _Coded, split: Split | str) -> None:
        sides = split if isinstance(split, str) else coded.sides(split)
        for method in self.config.baselines:
            name = f"{CHANNELS}_{method}"
            if method == "logistic" and not isinstance(sides, str):
                width = sides.x.shape[1]
                self._wait(item, LogisticProbe(sides, (width,)), {width: name})
            else:
                item.add(name, _scores(sides, lambda s, m=method: BASELINES[m](s, SEED)))

    def _wait(self, item: Item, probe: LogisticProbe, names: dict[int, str]) -> None:
        self.waiting.append((item, probe, names))
        self.numbers += probe.sides.x.size + probe.sides.test_x.size


def _package_split(coded: _Coded, condition: Condition, rounded: bool = False) -> Split | str:
    """Draws the package's rows, from numpy's generator at its seed."""
    return select_rows(coded.labels, condition, lambda _: np.random.RandomState(SEED), rounded)


def _too_many(k: int, code: Tensor) -> str:
    """Says that the code has fewer than k columns; '' if it has as many."""
    d = code.shape[1]
    return f"the code has {d} columns, fewer than k = {k}" if k > d else ""


def _scores(sides: Sides | str, probe: Callable[[Sides], Scores]) -> Scores | str:
    """Fits one probe; returns its numbers, or the reason why there are none."""
    if isinstance(sides, str):
        return sides
    try:
        return probe(sides)
    except ValueError as error:  # of scikit-learn
        return (str(error).strip() or "scikit-learn refuses the rows").splitlines()[0]


def _values(name: str, scores: Scores | str, kinds: Sequence[str]) -> Values:
    return {
        f"{name}_{kind}": scores if isinstance(scores, str) else float(getattr(scores, kind))
        for kind in kinds
    }


# ---------------------------------------------------------------- definition 2


class _Solver:
    """Collects the problems of definition 2 and solves them together.

    Args:
        config: settings.
        seed: of the rows.
        channels: the columns are the model's channels, for which there are baselines too.
    """

    def __init__(self, config: SaeProbesConfig, seed: int, channels: bool) -> None:
        self.config, self.seed, self.channels = config, seed, channels
        self.waiting: list[tuple[Item, Problem]] = []
        self.numbers = 0

    def add(self, coded: _Coded) -> list[Item]:
        """Adds a data set; returns the items that have been finished."""
        done: list[Item] = []
        for condition, draw, split in _splits(coded, self.config, self.seed):
            item = Item(condition, coded.name, draw, self._reasons(coded.code, split))
            if isinstance(split, str):
                done.append(item)
                continue
            item.values.update(self._baselines(coded, split))
            problem = _problem(coded, split, self._columns(coded.code))
            if isinstance(problem, str):
                names = metric_names(self.config, self.channels)
                item.values.update({name: problem for name in names if name not in item.values})
                done.append(item)
                continue
            self.waiting.append((item, problem))
            self.numbers += problem.train.numel() + problem.test.numel()
        return done + (self.finish() if self.numbers > MOST_NUMBERS else [])

    def finish(self) -> list[Item]:
        """Solves what waits; returns its items."""
        if not self.waiting:
            return []
        prefix = CHANNELS if self.channels else LATENTS
        problems = [problem for _, problem in self.waiting]
        probes = {f"top_{k}": k for k in self.config.k_values}
        width = problems[0].train.shape[0]
        if self.channels and "logistic" in self.config.baselines:
            probes["logistic"] = width
        for name, k in probes.items():
            if k > width:
                continue
            for (item, _), result in zip(self.waiting, solve(problems, k), strict=True):
                item.values[f"{prefix}_{name}_accuracy"] = result.accuracy
                item.values[f"{prefix}_{name}_auc"] = result.auc
        items = [item for item, _ in self.waiting]
        self.waiting, self.numbers = [], 0
        return items

    def _columns(self, code: Tensor) -> int:
        """Returns how many columns the largest possible probe uses."""
        d = code.shape[1]
        if self.channels and "logistic" in self.config.baselines:
            return d
        return max((k for k in self.config.k_values if k <= d), default=1)

    def _reasons(self, code: Tensor, split: Split | str) -> Values:
        """Returns the metrics that no probe can have, with the reasons."""
        if isinstance(split, str):
            return dict.fromkeys(metric_names(self.config, self.channels), split)
        prefix = CHANNELS if self.channels else LATENTS
        reasons = {k: _too_many(k, code) for k in self.config.k_values}
        return {
            f"{prefix}_top_{k}_{kind}": reason
            for k, reason in reasons.items()
            if reason
            for kind in KINDS[2]
        }

    def _baselines(self, coded: _Coded, split: Split) -> Values:
        """Fits the package's other baselines to these rows."""
        values: Values = {}
        for method in self.config.baselines if self.channels else ():
            if method != "logistic":
                new = _scores(coded.sides(split), lambda s, m=method: BASELINES[m](s, SEED))
                values |= _values(f"{CHANNELS}_{method}", new, KINDS[2])
        return values


def _problem(coded: _Coded, split: Split, columns: int) -> Problem | str:
    device = coded.code.device
    code, test, labels = coded.test_rows(split)

    def rows(code: Tensor, index: np.ndarray, labels: np.ndarray) -> Rows:
        positive = torch.from_numpy(labels == 1).to(device)
        return Rows(code, torch.from_numpy(index).to(device), positive)

    train = rows(coded.code, split.train, split.train_labels)
    return build_problem(train, rows(code, test, labels), columns)


# ---------------------------------------------------------------- rows of the evaluation


def _build_rows(items: Sequence[Item], config: SaeProbesConfig, channels: bool) -> list[Row]:
    """Builds the rows of data sets, then those of all data sets, condition by condition."""
    definition, rows = DEFINITIONS[config.definition], []
    by_condition: dict[Condition, list[Item]] = {c: [] for c in conditions(config.settings)}
    for item in items:
        by_condition[item.condition].append(item)
    for condition, group in by_condition.items():
        if not group:
            reason = "no chosen data set has the rows that it needs"
            names = metric_names(config, channels)
            rows += [missing(name, definition, reason, condition.slice) for name in names]
            continue
        of_sets: dict[str, dict[str, float | str]] = {}
        for dataset in dict.fromkeys(item.dataset for item in group):
            own = [item.values for item in group if item.dataset == dataset]
            where = ",".join(filter(None, (condition.slice, f"dataset={dataset}")))
            for name in metric_names(config, channels):
                new, value = _summary(name, [values[name] for values in own], where, definition)
                rows += new
                of_sets.setdefault(name, {})[dataset] = value
        for name, values in of_sets.items():
            named = [f"{d}: {v}" if isinstance(v, str) else v for d, v in values.items()]
            rows += _summary(name, named, condition.slice, definition)[0]
        if config.definition == 1 and (fits := sum(item.fits for item in group)):
            name = f"{CHANNELS if channels else LATENTS}_unconverged"
            share = sum(item.stopped for item in group) / fits
            rows.append(number(name, share, definition, condition.slice))
    return rows


def _summary(
    name: str, values: Sequence[float | str], where: str, definition: str
) -> tuple[list[Row], float | str]:
    """Builds the row of a mean, and the ends of its interval where there are two values or more.

    Returns: the rows, and the mean or the reason why there is none.
    """
    for value in values:
        if isinstance(value, str):
            return [missing(name, definition, value, where)], value
    numbers = [float(value) for value in values]
    row = number(name, sum(numbers) / len(numbers), definition, where)
    if row.value is None:
        return [row], row.reason
    rows = [row]
    if len(numbers) > 1:
        low, high = stats.t_interval(numbers)
        rows += [
            number(f"{name}.low", float(low), definition, where),
            number(f"{name}.high", float(high), definition, where),
        ]
    return rows, row.value
