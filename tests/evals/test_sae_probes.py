"""Probing on sae-probes' data sets, against scikit-learn used as the package uses it."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.decomposition import PCA
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import accuracy_score, f1_score, log_loss, roc_auc_score
from sklearn.model_selection import LeavePOut, StratifiedKFold
from sklearn.neighbors import KNeighborsClassifier
from sklearn.neural_network import MLPClassifier
from sklearn.preprocessing import StandardScaler
from torch import Tensor

from saelab.data.probing.activations import ProbingEntry
from saelab.data.probing.last_tokens import LastTokens
from saelab.data.probing.row_selection import TRAIN_SIZES, Condition, Split, select_rows
from saelab.data.probing.sae_probes import SHIFTED, SaeProbesConfig
from saelab.evals.base import Row
from saelab.evals.sae_probes import evaluate_sae_probes
from saelab.evals.sae_probes.converged_probes import Rows, area, build_problem, solve
from saelab.evals.sae_probes.package_probes import (
    BASELINES,
    Sides,
    folds,
    order_columns,
    probe_logistic,
)
from saelab.seeding import numpy_stream, torch_stream

D, F = 10, 24


@dataclass(frozen=True, kw_only=True)
class Made(LastTokens):
    """Data sets in memory."""

    entries: dict[str, ProbingEntry] = field(default_factory=dict)

    def load(self, name: str) -> ProbingEntry:
        return self.entries[name]


def entry(name: str, n: int, seed: int, strength: float = 1.0) -> ProbingEntry:
    """Noise, and channel 0 larger for label 1; labels in random order, half of each."""
    draw = torch_stream(seed, "test", name)
    labels = (torch.arange(n) % 2)[torch.randperm(n, generator=draw)]
    rows = torch.randn(n, D, generator=draw)
    rows[:, 0] += strength * labels
    return ProbingEntry(
        name=name,
        classes=("no", "yes"),
        rows=rows,
        offsets=torch.arange(n + 1),
        labels=labels,
        is_train=torch.ones(n, dtype=torch.bool),
    )


def made(*entries: ProbingEntry, **settings: Any) -> Made:
    config = SaeProbesConfig.parse({"k_values": [1, 3], **settings})
    named = {each.name: each for each in entries}
    return Made(config=config, folders=dict.fromkeys(named, Path()), entries=named)


class Relu:
    """A subject: latent 0 follows channel 0, the others are random directions."""

    d_in, d_sae = D, F

    def __init__(self) -> None:
        self.weight = torch.randn(D, F, generator=torch_stream(0, "test", "relu"))
        self.weight[:, 0] = torch.eye(D)[0] * 5

    def encode(self, x: Tensor) -> Tensor:
        return (x @ self.weight).relu()

    def decode(self, f: Tensor) -> Tensor:
        return f @ self.weight.T


def value(rows: Sequence[Row], metric: str, where: str = "") -> float:
    (row,) = [row for row in rows if (row.metric, row.slice) == (metric, where)]
    assert row.value is not None, row
    return row.value


# ---------------------------------------------------------------- as the package does it


def regression(c: float, kind: str) -> LogisticRegression:
    kinds = {"solver": "saga", "l1_ratio": 1.0} if kind == "l1" else {}
    if kinds and LogisticRegression().penalty == "l2":
        kinds = {"solver": "saga", "penalty": "l1"}
    return LogisticRegression(C=c, random_state=42, max_iter=1000, **kinds)


def splits(y: Tensor) -> list[tuple[Any, Any]]:
    """Training and validation rows, from the protocol."""
    n, zeros = len(y), np.zeros(len(y))
    if n >= 128:
        cut = n - min(int(0.2 * n), 100)
        return [(list(range(cut)), list(range(cut, n)))]
    way = LeavePOut(2) if n <= 12 else StratifiedKFold(6, shuffle=True, random_state=42)
    return [(a, b) for a, b in way.split(zeros, y) if len(set(y[b].tolist())) == 2]


def package_logistic(sides: tuple[Tensor, Tensor, Tensor, Tensor], kind: str) -> dict[str, float]:
    """The search as the package's source does it, on tensors as the package has them."""
    x, y, test_x, test_y = sides
    strengths, means = np.logspace(5, -5, 10), []
    if len(y) <= 3:
        strengths = np.array([1.0])
    for c in strengths if len(y) > 3 else ():
        scores = []
        for train, held in splits(y):
            if len(set(y[train].tolist())) < 2:
                scores.append(0.5)
                continue
            fitted = regression(c, kind).fit(x[train], y[train])
            scores.append(roc_auc_score(y[held], fitted.predict_proba(x[held])[:, 1]))
        means.append(np.mean(scores))
    order = np.random.RandomState(42).permutation(len(y))
    best = regression(strengths[int(np.argmax(means)) if means else 0], kind)
    best.fit(x[order], y[order])
    own = roc_auc_score(y, best.predict_proba(x)[:, 1])
    return numbers(best, test_x, test_y) | {"validation_auc": max(means) if means else own}


def numbers(model: Any, test_x: Any, test_y: Tensor) -> dict[str, float]:
    predicted = model.predict(test_x)
    return {
        "accuracy": accuracy_score(test_y, predicted),
        "f1": f1_score(test_y, predicted, average="weighted"),
        "auc": roc_auc_score(test_y, model.predict_proba(test_x)[:, 1]),
    }


def tensors(
    of: ProbingEntry, condition: Condition, code: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    split = select_rows(of.labels.numpy(), condition, lambda _: np.random.RandomState(42))
    assert isinstance(split, Split) and split.test is not None
    return (
        *(code[split.train], torch.from_numpy(split.train_labels)),
        *(code[split.test], of.labels[split.test]),
    )


def normalised_order(x: Tensor, y: Tensor, normalised: bool) -> Tensor:
    if normalised:
        counts = (x != 0).sum(dim=0)
        x = x / (x.abs().sum(dim=0) / (counts + 1e-6) + 1e-6)
    return (x[y == 1].mean(dim=0) - x[y == 0].mean(dim=0)).abs().argsort(descending=True)


@pytest.mark.parametrize("normalisation", ["mean", "none"])
@pytest.mark.parametrize("kind", ["l2", "l1"])
def test_definition_1_has_the_package_s_numbers(kind: str, normalisation: str) -> None:
    data = made(
        *(entry("1_a", 300, 1), entry("2_b", 260, 2)),
        definition=1,
        regularisation=kind,
        normalisation=normalisation,
    )
    subject = Relu()
    rows = evaluate_sae_probes(subject, data, seed=7)
    totals: dict[str, list[float]] = {}
    for name, of in data.entries.items():
        sides = tensors(of, Condition("normal"), subject.encode(of.rows))
        order = normalised_order(sides[0], sides[1], normalisation == "mean")
        for k in (1, 3):
            chosen = (sides[0][:, order[:k]], sides[1], sides[2][:, order[:k]], sides[3])
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                expected = package_logistic(chosen, kind)
            for number, theirs in expected.items():
                metric = f"sae_probes_top_{k}_{number}"
                assert value(rows, metric, f"dataset={name}") == pytest.approx(theirs, abs=1e-12)
                totals.setdefault(metric, []).append(theirs)
    for metric, theirs in totals.items():
        assert value(rows, metric) == pytest.approx(np.mean(theirs))
    assert {row.definition for row in rows} == {"sae_probes/1"}
    assert 0 <= value(rows, "sae_probes_unconverged") <= 1
    assert evaluate_sae_probes(subject, data, seed=8) == rows  # rows are the package's


@pytest.mark.parametrize("n_train", [2, 3, 5, 8, 13, 127, 128])
def test_few_rows_are_validated_as_in_the_package(n_train: int) -> None:
    of = entry("1_a", 300, 3, strength=0.5)
    x, y, test_x, test_y = tensors(of, Condition("scarcity", n_train), of.rows[:, :3])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        expected = package_logistic((x, y, test_x, test_y), "l2")
    own = probe_logistic(Sides(*(t.double().numpy() for t in (x, y, test_x, test_y))))  # type: ignore[arg-type]
    for number, theirs in expected.items():
        assert getattr(own, number) == pytest.approx(theirs, abs=1e-12), number


def test_float32_arrays_would_give_other_numbers() -> None:
    """scikit-learn fits tensors in float64: the reason for `Sides` in float64."""
    of = entry("1_a", 300, 1)
    x, y, *_ = tensors(of, Condition("normal"), Relu().encode(of.rows))
    assert regression(1.0, "l2").fit(x, y).coef_.dtype == np.float64
    assert regression(1.0, "l2").fit(x.numpy(), y).coef_.dtype == np.float32


def test_columns_are_ordered_as_in_the_package() -> None:
    of = entry("1_a", 300, 5)
    code = Relu().encode(of.rows)
    code[:, 7] = 0
    for normalised in (True, False):
        own = order_columns(code, of.labels.numpy(), normalised)
        assert own.tolist() == normalised_order(code, of.labels, normalised).tolist()
    orders = [order_columns(code, of.labels.numpy(), n).tolist() for n in (True, False)]
    assert orders[0] != orders[1]


def baseline(name: str, x: Any, y: Any, test_x: Any, test_y: Any) -> dict[str, float]:
    """The package's baselines, from the protocol."""
    scaler = StandardScaler().fit(x)
    x, test_x = scaler.transform(x), scaler.transform(test_x)
    candidates: list[tuple[Any, Any]] = []
    if name == "pca":
        pca = PCA(n_components=min(*x.shape, 100)).fit(x)
        x, test_x = pca.transform(x), pca.transform(test_x)
        sizes = np.unique(np.logspace(0, np.log2(x.shape[1]), num=10, base=2, dtype=int))
        candidates = [(lambda: regression(1.0, "l2"), slice(size)) for size in sizes]
    if name == "knn":
        most = min(len(y) - 1, 100, *(len(train) for train, _ in splits(y)))
        sizes = np.unique(np.logspace(0, np.log2(most), num=10, base=2, dtype=int))
        candidates = [
            (lambda size=size: KNeighborsClassifier(n_neighbors=size), slice(None))
            for size in sizes
        ]
    if name == "mlp":
        rng = np.random.RandomState(42)
        shapes = [(w,) * depth for depth in (1, 2, 3) for w in (16, 32, 64)]
        options = {
            "hidden_layer_sizes": shapes[rng.randint(9)],
            "learning_rate_init": np.logspace(-4, -2, num=5)[rng.randint(5)],
            "alpha": rng.choice(np.logspace(-5, -2, num=5)),
        }
        fixed = {"activation": "relu", "solver": "adam", "max_iter": 1000, "random_state": 42}
        candidates = [(lambda: MLPClassifier(**options, **fixed), slice(None))]
    scores = [
        np.mean(
            [
                roc_auc_score(
                    y[b], make().fit(x[a][:, columns], y[a]).predict_proba(x[b][:, columns])[:, 1]
                )
                for a, b in splits(y)
            ]
        )
        for make, columns in candidates
    ]
    make, columns = candidates[int(np.argmax(scores))]
    fitted = make().fit(x[:, columns], y)
    return numbers(fitted, test_x[:, columns], test_y) | {"validation_auc": max(scores)}


@pytest.mark.parametrize("method", ["pca", "knn", "mlp"])
@pytest.mark.parametrize("n", [150, 260])
def test_baselines_are_the_package_s(method: str, n: int) -> None:
    data = made(entry("1_a", n, 4), definition=1, baselines=[method], k_values=[1])
    rows = evaluate_sae_probes(None, data)
    sides = tensors(data.entries["1_a"], Condition("normal"), data.entries["1_a"].rows)
    expected = baseline(method, *sides)
    for number, theirs in expected.items():
        name = f"sae_probes_channels_{method}_{number}"
        assert value(rows, name, "dataset=1_a") == pytest.approx(theirs, abs=1e-12), number


def test_the_logistic_baseline_uses_all_channels() -> None:
    of = entry("1_a", 300, 4)
    rows = evaluate_sae_probes(None, made(of, definition=1, k_values=[1]))
    expected = package_logistic(tensors(of, Condition("normal"), of.rows), "l2")
    assert value(rows, "sae_probes_channels_logistic_auc", "dataset=1_a") == expected["auc"]


def test_a_global_random_state_changes_nothing() -> None:
    wide = entry("1_a", 700, 4)
    rows = torch.randn(700, 200, generator=torch_stream(0, "test", "wide"))  # randomised PCA
    sides = Sides(rows[:600].double().numpy(), wide.labels[:600].numpy(), *_tail(rows, wide))
    np.random.seed(1)  # noqa: NPY002
    first = BASELINES["pca"](sides, 42)
    np.random.seed(2)  # noqa: NPY002
    assert BASELINES["pca"](sides, 42) == first


def _tail(rows: Tensor, of: ProbingEntry) -> tuple[np.ndarray, np.ndarray]:
    return rows[600:].double().numpy(), of.labels[600:].numpy()


def test_fits_that_stop_early_are_counted() -> None:
    data = made(entry("1_a", 300, 1), definition=1, regularisation="l1", k_values=[20])
    x = data.entries["1_a"].rows
    x *= torch.logspace(0, 4, D)  # saga crawls on columns of such different sizes
    rows = evaluate_sae_probes(Relu(), data)
    assert value(rows, "sae_probes_unconverged") > 0


def test_minima_with_an_l1_penalty_are_asked_for() -> None:
    asked = {"definition": 1, "regularisation": "l1", "k_values": [3, 20]}
    fast = made(entry("1_a", 400, 1), **asked, l1_solver="newton")
    slow = made(entry("1_a", 400, 1), **asked)
    assert "l1_solver" not in slow.config.model_dump(mode="json")  # keys of stored cells
    assert slow.content() != fast.content()
    rows, theirs = evaluate_sae_probes(Relu(), fast), evaluate_sae_probes(Relu(), slow)
    for k in (3, 20):
        auc = f"sae_probes_top_{k}_auc"
        assert value(rows, auc) == pytest.approx(value(theirs, auc), abs=0.01)
    assert rows != theirs
    assert value(rows, "sae_probes_unconverged") == 0


def test_folds_have_both_classes() -> None:
    y = np.array([0, 0, 0, 1, 1, 1, 0, 1])
    pairs = folds(y, 42)
    assert len(pairs) == 16
    assert all(sorted(y[held]) == [0, 1] for _, held in pairs)


# ---------------------------------------------------------------- definition 2


def problem_of(n: int, seed: int, k: int) -> tuple[Rows, Rows]:
    of = entry("1_a", n, seed, strength=0.7)
    code = Relu().encode(of.rows) * torch.logspace(-2, 2, F)
    index, cut = torch.randperm(n, generator=torch_stream(seed, "test")), n * 2 // 3
    return (
        Rows(code, index[:cut], of.labels[index[:cut]] == 1),
        Rows(code, index[cut:], of.labels[index[cut:]] == 1),
    )


def exact(train: Rows, test: Rows, k: int) -> tuple[float, float, float]:
    """Accuracy, AUC and C, from definition 2 by scikit-learn."""
    scaler = StandardScaler().fit(train.code[train.index].double())
    x = scaler.transform(train.code[train.index].double())
    y = train.positive.numpy()
    order = np.argsort(-np.abs(x[y].mean(0) - x[~y].mean(0)), kind="stable")[:k]
    x, test_x = x[:, order], scaler.transform(test.code[test.index].double())[:, order]

    def fit(c: float, rows: slice) -> LogisticRegression:
        model = LogisticRegression(C=c, tol=1e-10, max_iter=10_000, solver="newton-cholesky")
        return model.fit(x[rows], y[rows])

    c, cut = 1.0, len(y) - int(0.2 * len(y))
    if len(y) >= 50:
        losses = {
            c: log_loss(y[cut:], fit(c, slice(cut)).predict_proba(x[cut:]))
            for c in (100.0, 10.0, 1.0, 0.1, 0.01, 0.001)
        }
        c = min(losses, key=lambda c: losses[c])
    model = fit(c, slice(None))
    right = accuracy_score(test.positive, model.predict(test_x))
    return right, float(roc_auc_score(test.positive, model.decision_function(test_x))), c


@pytest.mark.parametrize("k", [1, 4, F])
def test_probes_solved_together_are_those_solved_alone(k: int) -> None:
    sides = [problem_of(n, seed, k) for seed, n in enumerate([60, 90, 300, 900])]
    problems = [build_problem(train, test, k) for train, test in sides]
    results = solve(problems, k)  # type: ignore[arg-type]
    for (train, test), result in zip(sides, results, strict=True):
        accuracy, auc, c = exact(train, test, k)
        assert result.strength == c
        assert result.auc == pytest.approx(auc, abs=2e-3 if len(test.index) < 100 else 5e-4)
        assert result.accuracy == pytest.approx(accuracy, abs=1.01 / len(test.index))


def test_area_counts_ties_half() -> None:
    rng = numpy_stream(0, "test", "area")
    for _ in range(20):
        scores = rng.integers(0, 6, 50).astype(float)
        y = rng.integers(0, 2, 50) == 1
        own = area(torch.from_numpy(scores), torch.from_numpy(y))
        assert own == pytest.approx(roc_auc_score(y, scores))
    assert np.isnan(area(torch.arange(3.0), torch.ones(3, dtype=torch.bool)))


def test_a_planted_latent_is_found_and_noise_is_chance() -> None:
    planted = [entry(f"{i}_a", 600, i, strength=4.0) for i in range(3)]
    noise = [entry(f"{i}_b", 600, i, strength=0.0) for i in range(3)]
    found = evaluate_sae_probes(Relu(), made(*planted))
    assert value(found, "sae_probes_top_1_auc") > 0.95
    chance = evaluate_sae_probes(Relu(), made(*noise, draws=5))
    low, high = (value(chance, f"sae_probes_top_1_auc.{end}") for end in ("low", "high"))
    assert low < value(chance, "sae_probes_top_1_auc") < high
    assert abs(value(chance, "sae_probes_top_1_auc") - 0.5) < 0.05
    assert value(chance, "sae_probes_top_1_auc.low", "dataset=0_b") < 0.55


def test_draws_depend_on_the_seed_and_not_on_the_subject() -> None:
    data = made(entry("1_a", 400, 1))
    first = evaluate_sae_probes(None, data, seed=1)
    assert evaluate_sae_probes(None, data, seed=1) == first
    assert evaluate_sae_probes(None, data, seed=2) != first

    class Channels:
        d_in = d_sae = D

        def encode(self, x: Tensor) -> Tensor:
            return x

        def decode(self, f: Tensor) -> Tensor:
            return f

    own = evaluate_sae_probes(Channels(), data, seed=1)
    for row in own:
        twin = row.metric.replace("sae_probes_", "sae_probes_channels_")
        assert value(first, twin, row.slice) == row.value


def test_a_scale_of_the_latents_changes_nothing() -> None:
    class Scaled(Relu):
        def encode(self, x: Tensor) -> Tensor:
            return super().encode(x) * torch.logspace(-3, 3, F)

    data = made(entry("1_a", 400, 1, strength=0.5))
    pairs = zip(evaluate_sae_probes(Relu(), data), evaluate_sae_probes(Scaled(), data), strict=True)
    for one, other in pairs:
        assert one.value == pytest.approx(other.value, abs=0.01), one


def aucs(rows: Sequence[Row]) -> dict[str, float]:
    """Slice -> AUC of the probes on one latent; each has a value."""
    return {
        row.slice: value(rows, row.metric, row.slice)
        for row in rows
        if row.metric == "sae_probes_top_1_auc"
    }


def test_settings_have_slices_of_their_own() -> None:
    shifted = entry(f"3_c{SHIFTED}", 50, 3, strength=3.0)
    data = made(
        *(entry("1_a", 180, 1), entry("2_b", 400, 2), entry("3_c", 1500, 3, strength=3.0), shifted),
        settings=["normal", "scarcity", "label_noise", "ood"],
        draws=1,
        k_values=[1],
    )
    auc = aucs(evaluate_sae_probes(Relu(), data))
    size = next(size for size in TRAIN_SIZES if size > 80)
    assert {"", "dataset=1_a", "setting=ood", "setting=ood,dataset=3_c"} <= auc.keys()
    assert f"setting=scarcity,rows={size},dataset=2_b" in auc
    assert f"setting=scarcity,rows={size},dataset=1_a" not in auc  # 80 rows are left for it
    assert "setting=ood,dataset=1_a" not in auc
    assert auc["setting=ood"] > 0.9
    clean, noisy = (
        auc[f"setting=label_noise,inverted={share:g},dataset=3_c"] for share in (0, 0.3)
    )
    assert clean > 0.9
    assert noisy <= clean + 0.02


def test_texts_of_another_kind_are_tested_as_a_whole_in_definition_1() -> None:
    shifted = entry(f"3_c{SHIFTED}", 50, 3, strength=2.0)
    of = entry("3_c", 1500, 3, strength=2.0)
    data = made(of, shifted, settings=["ood"], definition=1, k_values=[D])
    split = select_rows(of.labels.numpy(), Condition("ood"), lambda _: np.random.RandomState(42))
    assert isinstance(split, Split)
    train = of.rows[split.train], of.labels[split.train]
    theirs = package_logistic((*train, shifted.rows, shifted.labels), "l2")
    rows = evaluate_sae_probes(None, data)
    assert value(rows, "sae_probes_channels_logistic_auc", "setting=ood") == theirs["auc"]


@pytest.mark.parametrize("definition", [1, 2])
def test_what_cannot_be_measured_has_a_reason(definition: int) -> None:
    tiny, usable = entry("1_a", 90, 1), entry("2_b", 300, 2)
    data = made(tiny, usable, definition=definition, k_values=[1, F + 1])
    rows = evaluate_sae_probes(Relu(), data)
    reasons = {(row.metric, row.slice): row.reason for row in rows}
    assert "fewer than" in reasons["sae_probes_top_1_auc", "dataset=1_a"]
    assert reasons["sae_probes_top_1_auc", "dataset=2_b"] == ""
    assert "1_a: " in reasons["sae_probes_top_1_auc", ""]
    expected = f"the code has {F} columns, fewer than k = {F + 1}"
    assert reasons[f"sae_probes_top_{F + 1}_auc", "dataset=2_b"] == expected

    class Broken(Relu):
        def encode(self, x: Tensor) -> Tensor:
            return super().encode(x) * float("nan")

    broken = evaluate_sae_probes(Broken(), made(usable, definition=definition))
    auc = [row for row in broken if row.metric == "sae_probes_top_1_auc"]
    assert all(row.value is None and ("NaN" in row.reason or "finite" in row.reason) for row in auc)

    class Following(Relu):
        needs_contexts = True

    following = evaluate_sae_probes(Following(), data)
    assert {row.value for row in following} == {None}
    assert all("tokens before" in row.reason for row in following)
