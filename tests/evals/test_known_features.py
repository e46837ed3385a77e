"""Scores against known features: their definitions, their limits, and what stands beside them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import linear_sum_assignment
from torch import Tensor
from torch.nn.functional import normalize

from saelab.data.activations.store import MemorySource, Source
from saelab.data.synthetic.chains import (
    SYNTHETIC_REASON,
    SyntheticConfig,
    Truth,
    generate,
    truth_of,
)
from saelab.errors import MismatchError
from saelab.evals import known_features as scores
from saelab.evals.core import CoreData
from saelab.evals.dictionary_matching import DRAWS, random_directions
from saelab.evals.known_features import (
    METRICS,
    directions,
    evaluate_truth,
    mcc,
    uniqueness,
)
from saelab.evals.measure import EvalData, evaluate, truth_rows
from saelab.seeding import torch_stream

D, FEATURES = 16, 40


class Linear:
    """f = x W^T above a threshold, x_hat = f (scales * W) + origin."""

    def __init__(self, w: Tensor, threshold: float = 0.3) -> None:
        self.d_sae, self.d_in = w.shape
        self.w, self.threshold = w, threshold
        self.scales = torch.rand(len(w), 1, generator=torch_stream(1, "test scales")) + 0.1

    def encode(self, x: Tensor) -> Tensor:
        z = x @ self.w.T
        return z * (z > self.threshold)

    def decode(self, f: Tensor) -> Tensor:
        return f @ (self.scales * self.w) + 2.0


def config(**changes: Any) -> SyntheticConfig:
    data = {"d": D, "features": FEATURES, "l0": 3.0, "positions": 8, "noise": 0.1, **changes}
    return SyntheticConfig.parse(data)


def made(seed: int, **changes: Any) -> tuple[Source, Truth]:
    source = generate(config(**changes), seed, 200, "held_out")
    truth = truth_of(source)
    assert truth is not None
    return source, truth


def numbers(subject: Any, source: Source, truth: Truth, seed: int = 0) -> dict[str, float]:
    rows = evaluate_truth(subject, source, truth, seed)
    assert [row.metric for row in rows] == list(METRICS)
    assert {row.definition for row in rows} == {"truth/2"}
    return {row.metric: row.value for row in rows if row.value is not None}


@pytest.mark.parametrize("latents", [FEATURES, 25, 60])
def test_the_numbers_are_those_of_their_definitions(latents: int, global_random_seed: int) -> None:
    source, truth = made(global_random_seed)
    subject = Linear(random_directions(latents, D, global_random_seed, 7))
    found = numbers(subject, source, truth)
    x, s = source.shard(0).x.flatten(0, 1), truth.codes().flatten(0, 1)
    f = subject.encode(x)
    cosine = (subject.w @ truth.directions.T).double()
    pairs = list(zip(*linear_sum_assignment(-cosine.abs().numpy()), strict=True))
    signed = list(zip(*linear_sum_assignment(-cosine.numpy()), strict=True))
    f1 = [0.0] * FEATURES
    for j, i in pairs:
        both = int(((f[:, j] != 0) & (s[:, i] != 0)).sum())
        f1[i] = 2 * both / max(1, int((f[:, j] != 0).sum()) + int((s[:, i] != 0).sum()))
    fired = (s != 0).any(0).tolist()
    f1 = [value for value, there in zip(f1, fired, strict=True) if there]
    assert found["mcc"] == pytest.approx(
        float(sum(abs(cosine[p]) for p in pairs)) / len(pairs), abs=1e-6
    )
    assert found["mcc_signed"] == pytest.approx(
        float(sum(cosine[p] for p in signed)) / len(pairs), abs=1e-6
    )
    assert found["firing_f1"] == pytest.approx(sum(f1) / len(f1))
    distinct = {int(row.abs().argmax()) for row in cosine}
    assert found["uniqueness"] == pytest.approx(len(distinct) / latents)
    each = {"latent_precision": 0.0, "latent_recall": 0.0, "latent_f1": 0.0}
    for j, row in enumerate(cosine):
        fires, on = f[:, j] != 0, s[:, int(row.abs().argmax())] != 0
        hits = int((fires & on).sum())
        precision, recall = hits / max(1, int(fires.sum())), hits / max(1, int(on.sum()))
        each["latent_precision"] += precision / latents
        each["latent_recall"] += recall / latents
        each["latent_f1"] += 2 * precision * recall / max(1e-30, precision + recall) / latents
    for name, value in each.items():
        assert found[name] == pytest.approx(value), name
    error = (x - s @ truth.directions).square().sum()
    fvu = float(error / (x - x.mean(0)).square().sum())
    assert found["oracle_fvu"] == pytest.approx(fvu, rel=1e-4)
    assert found["oracle_explained_variance"] == pytest.approx(1 - fvu, rel=1e-4)
    assert found["oracle_l0"] == pytest.approx(float((s != 0).sum(1).double().mean()))


@settings(max_examples=20)
@given(st.integers(0, 2**31), st.permutations(range(FEATURES)), st.integers(0, 2**31))
def test_the_truth_in_any_order_and_sign_scores_one(
    seed: int, order: list[int], flips: int
) -> None:
    true = Truth(config(), seed, "train", 1).directions
    signs = torch.randint(0, 2, (FEATURES, 1), generator=torch_stream(flips, "test signs")) * 2 - 1
    assert mcc(true[order] * signs, true) == pytest.approx(1, abs=1e-12)
    assert mcc(true[order], true, signed=True) == pytest.approx(1, abs=1e-12)
    assert uniqueness(true[order] * signs, true) == 1
    if bool((signs < 0).any()):
        assert mcc(true[order] * signs, true, signed=True) < 1 - 1e-3


def test_a_latent_of_each_feature_that_fires_with_it_scores_one(global_random_seed: int) -> None:
    source, truth = made(global_random_seed, features=D, orthogonal=True, noise=0.0)
    order = torch.randperm(D, generator=torch_stream(global_random_seed, "test order"))
    smallest = float(truth.codes()[truth.codes() > 0].min())
    found = numbers(Linear(truth.directions[order], smallest / 2), source, truth)
    for name in scores.SCORES:
        assert found[name] == pytest.approx(1, abs=1e-6), name
    assert found["oracle_fvu"] == pytest.approx(0, abs=1e-9)


def test_the_oracle_scores_one(global_random_seed: int) -> None:
    source, truth = made(global_random_seed)
    found = numbers(Linear(random_directions(5, D, 0)), source, truth)
    assert found["oracle_firing_f1"] == found["oracle_uniqueness"] == 1
    assert found["oracle_mcc"] == pytest.approx(1, abs=1e-12)
    assert found["oracle_mcc_signed"] == pytest.approx(1, abs=1e-12)


@pytest.mark.parametrize("latents", [FEATURES, 20, 80])
def test_a_random_dictionary_scores_what_is_printed_as_chance(
    latents: int, global_random_seed: int
) -> None:
    source, truth = made(global_random_seed)
    found = numbers(Linear(random_directions(latents, D, 0)), source, truth, global_random_seed)
    others = [random_directions(latents, D, global_random_seed + 1, i) for i in range(40)]
    for name, score in (("mcc", mcc), ("uniqueness", uniqueness)):
        values = torch.tensor([score(w, truth.directions) for w in others])
        error = float(values.std()) * (1 / DRAWS + 1 / 40) ** 0.5
        assert abs(found[f"chance_{name}"] - float(values.mean())) < 6 * error, name
    assert 0 < found["chance_firing_f1"] < 0.5


def test_chance_is_the_same_for_all_subjects_of_a_seed(global_random_seed: int) -> None:
    source, truth = made(global_random_seed)
    one = numbers(Linear(random_directions(FEATURES, D, 0, 1)), source, truth)
    other = numbers(Linear(truth.directions), source, truth)
    assert one["chance_mcc"] == other["chance_mcc"]
    assert one["mcc"] < other["mcc"]
    assert one["firing_f1"] < other["firing_f1"]


def test_directions_of_any_affine_decoder(monkeypatch: pytest.MonkeyPatch) -> None:
    w = torch.randn(30, 4, generator=torch_stream(0, "test w"))
    w[3] = 0
    monkeypatch.setattr(scores, "CHUNK", 7)
    found = directions(Linear(w))
    torch.testing.assert_close(found, normalize(w, dim=1), rtol=0, atol=1e-5)
    assert not bool(found[3].any())


@pytest.mark.parametrize("chunk", [3, 10_000])
def test_any_chunk_gives_the_same(chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    source, truth = made(0)
    subject = Linear(random_directions(FEATURES, D, 0, 5))
    expected = numbers(subject, source, truth)
    monkeypatch.setattr(scores, "CHUNK", chunk)
    assert numbers(subject, source, truth) == pytest.approx(expected, rel=1e-6)


def test_a_subject_that_needs_contexts_gets_them(monkeypatch: pytest.MonkeyPatch) -> None:
    source, truth = made(0)

    class Follows(Linear):
        needs_contexts = True
        seen = 0

        def encode(self, x: Tensor, starts: Tensor | None = None) -> Tensor:
            assert starts is not None and int(starts[-1]) == len(x)
            assert bool((starts.diff() == truth.config.positions).all())
            self.seen += len(x)
            return super().encode(x)

    directions = random_directions(FEATURES, D, 0, 5)
    monkeypatch.setattr(scores, "CHUNK", 3 * truth.config.positions + 1)
    subject = Follows(directions)
    assert numbers(subject, source, truth) == numbers(Linear(directions), source, truth)
    assert subject.seen == truth.contexts * truth.config.positions


def test_a_latent_that_never_fires_counts_as_zero(global_random_seed: int) -> None:
    source, truth = made(global_random_seed)
    found = numbers(Linear(truth.directions, threshold=1e9), source, truth)
    assert found["firing_f1"] == 0 and found["mcc"] == pytest.approx(1, abs=1e-6)


def test_another_width_is_refused() -> None:
    source, truth = made(0)
    with pytest.raises(MismatchError, match="d_in = 5"):
        evaluate_truth(Linear(torch.eye(5)), source, truth)


def test_the_table_of_evaluations_has_it(global_random_seed: int) -> None:
    source, truth = made(global_random_seed)
    subject = Linear(truth.directions)
    rows = evaluate(subject, EvalData(CoreData(source, None), None), ["core", "truth"])
    values = {row.metric: row for row in rows if not row.slice}
    assert values["mcc"].value == pytest.approx(1, abs=1e-6)
    assert values["loss_recovered"].value is None
    assert values["loss_recovered"].reason == SYNTHETIC_REASON


def test_unknown_features_are_missing_with_the_reason() -> None:
    shard = Truth(config(), 0, "train", 3).shard(0)
    data = EvalData(CoreData(MemorySource([shard], {}), None), None)
    rows = truth_rows(Linear(torch.eye(D)), data)
    assert [row.metric for row in rows] == list(METRICS)
    assert all(row.value is None and "not known" in row.reason for row in rows)
