"""Loss recovered and KL by position and frequency: the slices make up core's totals."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from saelab.data.language_model import LanguageModel, ModelConfig, load
from saelab.evals import core_data
from saelab.evals.base import Row
from saelab.evals.core import CoreData
from saelab.evals.loss_by_position import METRICS, _deciles, evaluate_positions
from saelab.evals.measure import EvalData, evaluate
from saelab.seeding import torch_stream

HOOK = "blocks.1.hook_resid_post"
CONTEXTS, LENGTH = 6, 24


class Half:
    """x_hat = share * x."""

    def __init__(self, d: int, share: float = 0.5) -> None:
        self.d_in = self.d_sae = d
        self.share, self.passes = share, 0

    def encode(self, x: Tensor) -> Tensor:
        self.passes += 1
        return x

    def decode(self, f: Tensor) -> Tensor:
        return self.share * f


@pytest.fixture(scope="module")
def model() -> LanguageModel:
    return load(ModelConfig())


@pytest.fixture(scope="module")
def source(model: LanguageModel) -> Any:
    draw = torch.rand(CONTEXTS, LENGTH, generator=torch_stream(0, "test positions"))
    ids = (3 + 40 * draw**3).long()  # some tokens occur far more often than others
    mask = torch.ones(ids.shape, dtype=torch.bool)
    mask[:, 0] = False
    mask[2, 15:] = False
    x = model.activations(ids, None, [HOOK])[HOOK]
    rows = x[mask].float(), mask.nonzero()[:, 1]
    shard = SimpleNamespace(rows=lambda: rows, ids=ids, mask=mask, x=x, documents=None)
    return SimpleNamespace(shard=lambda i: shard, n_shards=1, header={"hook_name": HOOK})


def values(rows: list[Row]) -> dict[str, dict[str, float]]:
    """slice -> metric -> value."""
    found: dict[str, dict[str, float]] = {}
    for row in rows:
        if row.value is not None:
            found.setdefault(row.slice, {})[row.metric.removeprefix("token.")] = row.value
    return found


@pytest.mark.parametrize("kind", ["position", "frequency_decile"])
def test_the_slices_make_up_the_totals_of_core(
    kind: str, model: LanguageModel, source: Any
) -> None:
    data = EvalData(CoreData(source, model), None)
    rows = evaluate(Half(model.d_model), data, ["core", "positions"])
    whole = {row.metric: row.value for row in rows if not row.slice}
    slices = [
        by for name, by in values(rows).items() if name.startswith(f"{kind}=") and "share" in by
    ]
    assert len(slices) == (2 if kind == "position" else 10)
    assert sum(by["share"] for by in slices) == pytest.approx(1)
    for metric in ("ce_clean", "ce_zero", "ce_spliced", "kl"):
        total = sum(by["share"] * by.get(metric, 0.0) for by in slices)
        assert total == pytest.approx(whole[f"token.{metric}"], rel=1e-6), metric
        if metric != "kl":
            assert whole[f"token.{metric}"] == pytest.approx(whole[metric], rel=1e-9), metric
    assert whole["token.loss_recovered"] == pytest.approx(whole["loss_recovered"], rel=1e-9)
    assert {row.definition for row in rows if row.metric.startswith("token.")} == {"positions/1"}


def test_kl_is_that_of_the_two_predictions(model: LanguageModel, source: Any) -> None:
    data = CoreData(source, model)
    rows = evaluate_positions(Half(model.d_model, 0.25), data)
    shard = source.shard(0)

    def quarter(x: Tensor) -> Tensor:
        return torch.where(shard.mask[..., None], 0.25 * x, x)

    clean = model.logits(shard.ids, None).float().log_softmax(-1)
    after = model.logits(shard.ids, None, {HOOK: quarter}).float().log_softmax(-1)
    kl = torch.nn.functional.kl_div(after, clean, log_target=True, reduction="none").sum(-1)
    counted = shard.mask[:, 1:]
    assert values(rows)[""]["kl"] == pytest.approx(float(kl[:, :-1][counted].mean()), rel=1e-4)
    early = counted & (torch.arange(LENGTH - 1) < 8)
    here = values(rows)["position=0-7"]["kl"]
    assert here == pytest.approx(float(kl[:, :-1][early].mean()), rel=1e-4)


def test_what_changes_nothing_recovers_all(model: LanguageModel, source: Any) -> None:
    found = values(evaluate_positions(Half(model.d_model, 1.0), CoreData(source, model)))
    for name, by in found.items():
        assert by.get("kl", 0.0) == pytest.approx(0, abs=1e-5), name
        assert by.get("loss_recovered", 1.0) == pytest.approx(1, abs=1e-5), name


def test_deciles_go_from_rare_tokens_to_frequent_ones(model: LanguageModel, source: Any) -> None:
    ids, mask = source.shard(0).ids, source.shard(0).mask
    counts = torch.bincount(ids[mask])
    decile = _deciles(CoreData(source, model))
    rising = decile[counts.argsort(stable=True)]
    assert bool((rising.diff() >= 0).all()) and int(rising[0]) == 0 and int(rising[-1]) >= 7
    for count in counts.unique():
        assert len(decile[counts == count].unique()) == 1
    found = values(evaluate_positions(Half(model.d_model), CoreData(source, model)))
    for i in range(10):
        share = float((decile[ids[:, 1:]] == i)[mask[:, 1:]].double().mean())
        assert found[f"frequency_decile={i + 1}"]["share"] == pytest.approx(share)


def test_core_lends_its_pass(model: LanguageModel, source: Any) -> None:
    subject, data = Half(model.d_model), EvalData(CoreData(source, model), None)
    alone = evaluate(subject, data, ["positions"])
    passes, subject.passes = subject.passes, 0
    evaluate(subject, data, ["core"])
    core_alone, subject.passes = subject.passes, 0
    both = evaluate(subject, data, ["positions", "core"])
    assert passes > 0 and subject.passes == core_alone
    assert both[: len(alone)] == alone
    assert data.core.last_losses is None


def test_kl_is_kept_for_as_many_contexts_as_fit(
    monkeypatch: pytest.MonkeyPatch, model: LanguageModel, source: Any
) -> None:
    data = CoreData(source, model)
    vocabulary = model.logits(source.shard(0).ids[:1], None).shape[-1]
    monkeypatch.setattr(core_data, "STORED_LOG_PROBS", 2 * (LENGTH - 1) * vocabulary)
    assert len(data.clean_log_probs) == 2
    monkeypatch.setattr(core_data, "STORED_LOG_PROBS", 1)
    assert len(CoreData(source, model).clean_log_probs) == 1
    found = values(evaluate_positions(Half(model.d_model), data))
    assert 0 < found[""]["kl"] < 20 and found[""]["share"] == 1


@pytest.mark.parametrize("why", ["no head", "no model"])
def test_without_a_loss_it_is_missing_with_the_reason(
    why: str, model: LanguageModel, source: Any
) -> None:
    headless: Any = SimpleNamespace(has_head=False)
    data = CoreData(source, headless if why == "no head" else None)
    rows = evaluate_positions(Half(model.d_model), data)
    assert [row.metric for row in rows] == [f"token.{name}" for name in METRICS]
    assert all(row.value is None and row.reason for row in rows)
