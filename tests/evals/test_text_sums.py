"""Sums over documents: they add up to the core metrics, whatever the order of the rows."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from saelab.data.activations.store import MemorySource, Shard
from saelab.data.language_model import ModelConfig, load
from saelab.evals import text_sums
from saelab.evals.core import CoreData, evaluate_core
from saelab.evals.text_sums import Clusters
from saelab.seeding import torch_stream

HOOK = "blocks.1.hook_resid_post"
#: Documents of two contexts in each of two shards; BOS does not count.
DOCUMENTS = [[[7, 7, 7, 9, 9], [2, 2, 2, 2, 2]], [[9, 9, 11, 11, 11], [2, 2, 2, 7, 7]]]


class Half:
    """Keeps the larger half of the channels, scaled by 0.9."""

    def __init__(self, d: int, contexts: bool = False) -> None:
        self.d_in = self.d_sae = d
        self.needs_contexts = contexts

    def encode(self, x: Tensor) -> Tensor:
        return 0.9 * x * (x.abs() >= x.abs().median(1, keepdim=True).values)

    def decode(self, f: Tensor) -> Tensor:
        return f


def shards(documents: bool = True, d: int = 6) -> list[Shard]:
    made = []
    for i, numbers in enumerate(DOCUMENTS):
        x = torch.randn(2, 5, d, generator=torch_stream(i, "test text sums"))
        mask = torch.ones(2, 5, dtype=torch.bool)
        mask[:, 0] = False
        stated = torch.tensor(numbers, dtype=torch.int32) if documents else None
        made.append(Shard(x, mask, None, stated))
    return made


def clusters_in(source: MemorySource) -> Clusters:
    return CoreData(source, None).clusters


def values(rows: list[Any]) -> dict[str, float]:
    return {row.metric: row.value for row in rows if not row.slice and row.value is not None}


def test_documents_are_numbered_over_shards_and_contexts_stand_in_for_them() -> None:
    clusters = clusters_in(MemorySource(shards(), {}))
    assert (clusters.kind, clusters.count) == ("document", 4)
    assert clusters.of_rows.tolist() == [1, 1, 2, 2, 0, 0, 0, 0, 2, 3, 3, 3, 0, 0, 1, 1]
    without = clusters_in(MemorySource(shards(documents=False), {}))
    assert (without.kind, without.count) == ("context", 4)
    assert without.of_rows.tolist() == [0] * 4 + [1] * 4 + [2] * 4 + [3] * 4
    one = replace(shards()[0], documents=torch.full((2, 5), 7, dtype=torch.int32))
    alone = clusters_in(MemorySource([one], {}))
    assert (alone.kind, alone.of_rows.tolist()) == ("context", [0] * 4 + [1] * 4)


def test_many_documents_are_taken_together_with_their_neighbours(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(text_sums, "MOST", 2)
    clusters = clusters_in(MemorySource(shards(), {}))
    assert clusters.of_rows.tolist() == [0, 0, 1, 1, 0, 0, 0, 0, 1, 1, 1, 1, 0, 0, 0, 0]


def test_they_add_up_to_the_metrics() -> None:
    data = CoreData(MemorySource(shards(), {"hook_name": HOOK}), None)
    found, sums = values(evaluate_core(Half(6), data)), data.text_sums
    assert sums is not None and "loss_tokens" not in sums.sums
    total = {name: float(part.sum()) for name, part in sums.sums.items()}
    assert total["tokens"] == 16 and sums.sums["tokens"].tolist() == [6, 4, 3, 3]
    assert found["fvu"] == pytest.approx(total["error"] / total["power"])
    assert found["mse"] == pytest.approx(total["error"] / 16 / 6)
    assert found["cosine"] == pytest.approx(total["cosine"] / 16)
    assert found["l0"] == pytest.approx(total["active"] / 16)
    x, document = data.rows[0], data.clusters.of_rows
    of_first = (x - Half(6).encode(x)).square().sum(1)[document == 0]
    assert float(sums.sums["error"][0]) == pytest.approx(float(of_first.sum()))
    columns = sums.columns()
    assert columns["cluster"] == [0, 1, 2, 3] and columns["kind"] == ["document"] * 4


def test_rows_in_the_order_of_runs_go_to_their_documents() -> None:
    """A subject that needs contexts has its rows in another order: the sums are the same."""

    class Recurrent(Half):
        def codes(self, x: Tensor, starts: Tensor) -> Any:
            from saelab.kernels import Code

            f = self.encode(x)
            yield slice(0, len(x)), Code(f, f, None)

        def decode_code(self, code: Any) -> Tensor:
            return code.values

        def pooled(self, rows: Tensor, cuts: Tensor) -> Tensor:
            raise NotImplementedError

    source = MemorySource(shards(), {"hook_name": HOOK})
    plain, runs = CoreData(source, None), CoreData(source, None)
    evaluate_core(Half(6), plain)
    evaluate_core(Recurrent(6, contexts=True), runs)
    order = runs.shuffled_order[0]
    assert sorted(order.tolist()) == list(range(16)) and order.tolist() != list(range(16))
    assert plain.text_sums is not None and runs.text_sums is not None
    for name, part in plain.text_sums.sums.items():
        torch.testing.assert_close(runs.text_sums.sums[name], part, rtol=1e-6, atol=1e-6)


def test_losses_belong_to_the_document_of_the_next_token() -> None:
    model = load(ModelConfig())
    ids = torch.randint(5, 200, (2, 5), generator=torch_stream(0, "test text sums"))
    x = model.activations(ids, None, [HOOK])[HOOK]
    mask = torch.ones(2, 5, dtype=torch.bool)
    mask[:, 0] = False
    shard = Shard(x, mask, ids.int(), torch.tensor(DOCUMENTS[0], dtype=torch.int32))
    data = CoreData(MemorySource([shard], {"hook_name": HOOK}), model)
    found, sums = values(evaluate_core(Half(x.shape[-1]), data)), data.text_sums
    assert sums is not None and sums.sums["loss_tokens"].tolist() == [4, 2, 2]
    total = {name: float(part.sum()) for name, part in sums.sums.items()}
    for name in ("ce_clean", "ce_zero", "ce_spliced"):
        assert found[name] == pytest.approx(total[name] / 8)
    expected = (total["ce_zero"] - total["ce_spliced"]) / (total["ce_zero"] - total["ce_clean"])
    assert found["loss_recovered"] == pytest.approx(expected)
    of_second = data.reference_tokens["ce_clean"][0, 2:]  # predictions of positions 3 and 4
    assert float(sums.sums["ce_clean"][2]) == pytest.approx(float(of_second.sum()))
