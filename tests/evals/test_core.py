"""Core metrics: the same numbers for any chunk, and a model's pass that starts at the hook."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from saelab.data.language_model import ModelConfig, load
from saelab.evals import core, core_data
from saelab.evals.base import SparseSubject
from saelab.evals.core import CoreData, evaluate_core
from saelab.sae import SAEConfig
from saelab.seeding import torch_stream

HOOK = "blocks.1.hook_resid_post"


class Halves:
    """A code of the positive and the negative parts, from which half of x comes back."""

    def __init__(self, d: int) -> None:
        self.d_in, self.d_sae = d, 2 * d + 1  # the last latent never fires

    def encode(self, x: Tensor) -> Tensor:
        return torch.cat([x.relu(), (-x).relu(), torch.zeros_like(x[:, :1])], dim=1)

    def decode(self, f: Tensor) -> Tensor:
        return (f[:, : self.d_in] - f[:, self.d_in : 2 * self.d_in]) / 2


def source(x: Tensor, position: Tensor, ids: Tensor | None = None) -> Any:
    mask = torch.ones((1, len(x)) if ids is None else ids.shape, dtype=torch.bool)
    if ids is not None:
        mask[:, 0] = False
    shard = SimpleNamespace(rows=lambda: (x, position), ids=ids, mask=mask, documents=None)
    return SimpleNamespace(shard=lambda i: shard, n_shards=1, header={"hook_name": HOOK})


def numbers(subject: Any, data: CoreData) -> dict[tuple[str, str], float]:
    rows = evaluate_core(subject, data)
    return {(row.metric, row.slice): row.value for row in rows if row.value is not None}


@pytest.mark.parametrize("chunk", [7, 64, 10_000])
def test_any_chunk_gives_the_numbers_of_their_definitions(
    chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(core, "CHUNK", chunk)
    x = torch.randn(300, 5, generator=torch_stream(0, "test core"))
    x[x.abs() < 0.1] = 0
    found = numbers(Halves(5), CoreData(source(x, torch.arange(300) % 64), None))
    power = float((x - x.mean(0)).square().sum())
    assert found["fvu", ""] == pytest.approx(float(x.square().sum()) / 4 / power, rel=1e-5)
    assert found["mse", ""] == pytest.approx(float(x.square().mean()) / 4, rel=1e-5)
    assert found["l0", ""] == pytest.approx(int((x != 0).sum()) / 300)
    assert found["cosine", ""] == pytest.approx(1, abs=1e-5)
    assert found["dead_share", ""] == pytest.approx(1 / 11)
    early = (torch.arange(300) % 64) < 32
    assert found["l0", "position=0-31"] == pytest.approx(
        int((x[early] != 0).sum()) / int(early.sum())
    )


@pytest.mark.parametrize("activation", ["relu", {"kind": "topk", "k": 5}])
@pytest.mark.parametrize("initial_l0", [6, None])  # the second ReLU code is too dense to be sparse
def test_sparse_codes_give_the_numbers_of_dense_ones(
    activation: Any, initial_l0: int | None, global_random_seed: int
) -> None:
    x = torch.randn(700, 12, generator=torch_stream(global_random_seed, "test core"))
    settings = {"d_sae": 40, "activation": activation, "losses": ["reconstruction"]}
    config = SAEConfig.parse({**settings, "controllers": [], "initial_l0": initial_l0})
    sae = config.build(12)
    sae.initialise(x, global_random_seed)
    sae.eval()
    dense = SimpleNamespace(d_in=12, d_sae=40, encode=sae.encode, decode=sae.decode)
    data = CoreData(source(x, torch.arange(700) % 64), None)
    assert isinstance(sae, SparseSubject) and not isinstance(dense, SparseSubject)
    found, wanted = numbers(sae, data), numbers(dense, data)
    # a pre-activation within rounding of its threshold may fall on either side
    assert found == pytest.approx(wanted, rel=1e-3, abs=1e-6)
    assert (0 < found["l0", ""] < 10) == (initial_l0 is not None or activation != "relu")


class NormedHalves(Halves):
    """Rows of norm 1 come back whole from the code, and only `complete` knows their length."""

    def encode(self, x: Tensor) -> Tensor:
        return super().encode(x / x.norm(dim=1, keepdim=True))

    def decode(self, f: Tensor) -> Tensor:
        return 2 * super().decode(f)

    def complete(self, x_hat: Tensor, x: Tensor) -> Tensor:
        return x_hat * x.norm(dim=1, keepdim=True)


def test_what_is_taken_from_the_rows_counts_in_errors_and_in_the_model() -> None:
    model = load(ModelConfig())
    ids = torch.randint(3, 4096, (4, 16), generator=torch_stream(0, "test core"))
    x = model.activations(ids, None, [HOOK])[HOOK][:, 1:].reshape(-1, model.d_model)
    data = CoreData(source(x, torch.arange(1, 16).repeat(4), ids), model)
    found = numbers(NormedHalves(model.d_model), data)
    assert found["fvu", ""] < 1e-9
    assert found["ce_spliced", ""] == pytest.approx(found["ce_clean", ""], abs=1e-5)
    without = NormedHalves(model.d_model)
    without.complete = lambda x_hat, x: x_hat
    assert numbers(without, data)["fvu", ""] > 0.1


def test_the_spliced_loss_is_the_whole_models(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(core_data, "CONTEXTS", 4)
    model = load(ModelConfig())
    ids = torch.randint(3, 4096, (6, 16), generator=torch_stream(0, "test core"))
    x = model.activations(ids, None, [HOOK])[HOOK][:, 1:].reshape(-1, model.d_model)
    held_out = source(x, torch.arange(1, 16).repeat(6), ids)
    short, whole = CoreData(held_out, model), CoreData(held_out, model)
    whole.starts = [None, None]
    subject = Halves(model.d_model)
    assert all(start is not None and start.blocks == 2 for start in short.starts)
    assert numbers(subject, short) == numbers(subject, whole)
    assert len({short.reference_losses[name] for name in ("ce_clean", "ce_zero", "ce_mean")}) == 3


def test_a_pass_has_no_more_logits_than_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    model = load(ModelConfig())
    ids = torch.randint(3, 4096, (5, 16), generator=torch_stream(0, "test core"))
    x = model.activations(ids, None, [HOOK])[HOOK][:, 1:].reshape(-1, model.d_model)
    held_out, subject = source(x, torch.arange(1, 16).repeat(5), ids), Halves(model.d_model)
    at_once = numbers(subject, CoreData(held_out, model))
    monkeypatch.setattr(core_data, "LOGITS", 2 * 16 * 4096 + 1)
    passes: list[tuple[int, ...]] = []
    logits = model.logits

    def noting(ids: Tensor, *args: Any, **options: Any) -> Tensor:
        passes.append(tuple(ids.shape))
        return logits(ids, *args, **options)

    monkeypatch.setattr(model, "logits", noting)
    assert numbers(subject, CoreData(held_out, model)) == pytest.approx(at_once, abs=1e-5)
    assert {shape[0] for shape in passes[2:]} == {1, 2}  # the first try whether starts agree


def test_contexts_of_a_pass_follow_the_vocabulary() -> None:
    assert core_data.contexts_per_pass(128, 4096) == core_data.contexts_per_pass(128, None) == 32
    assert core_data.contexts_per_pass(128, 49_152) == 5
    assert core_data.contexts_per_pass(2048, 262_144) == 1
