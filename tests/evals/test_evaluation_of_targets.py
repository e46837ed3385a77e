"""Core metrics, controls and latents of SAEs that reconstruct other activations than they read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pytest
import torch
from tiny_models import tiny_neox
from torch import Tensor

from saelab.data.activations.harvest import HarvestConfig, harvest
from saelab.data.activations.joined import joined
from saelab.data.language_model import LanguageModel, ModelConfig, load
from saelab.data.text.tokens import Tokens
from saelab.evals.base import Row
from saelab.evals.core import CoreData, evaluate_core, measure_reconstruction
from saelab.evals.latent_examples import lenses, survey, why_no_lens
from saelab.launch import controls
from saelab.launch.controls import Setting, expected_fvu_change, subjects, turn_decoder
from saelab.sae import SAE, SAEConfig
from saelab.seeding import torch_stream
from saelab.training.sample import initial_sample

#: Inner activations of the MLP are wider than the stream.
INNER = "gpt_neox.layers.1.mlp.dense_4h_to_h.input"
IN, OUT, LATER = "blocks.1.mlp.hook_in", "blocks.1.hook_mlp_out", "blocks.2.hook_mlp_out"
STREAMS = ("blocks.0.hook_resid_post", "blocks.1.hook_resid_post")
LAYERS, HIDDEN = 3, 8


@pytest.fixture(scope="module")
def model() -> LanguageModel:
    return tiny_neox(HIDDEN, 12, 0.4, LAYERS)


@pytest.fixture(autouse=True)
def silent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SAELAB_PROGRESS", "off")


def tokens(model: LanguageModel) -> Tokens:
    """Text that the model writes itself, so that ablations hurt."""
    stream = torch_stream(0, "test ids")
    ids = torch.randint(2, 20, (60, 2), generator=stream)
    ids[:, 0] = 0
    for _ in range(10):
        weights = model.logits(ids)[:, -1].float().softmax(-1)
        weights[:, :2] = 0
        ids = torch.cat([ids, torch.multinomial(weights, 1, generator=stream)], dim=1)
    ids[4, 3] = 1
    return Tokens(ids, ids > 1)


def core(model: LanguageModel, inputs: Sequence[str], targets: Sequence[str] = ()) -> CoreData:
    hooks = tuple(dict.fromkeys((*inputs, *targets)))
    made = harvest(model, tokens(model), hooks, HarvestConfig(batch=8, shard_tokens=10_000))
    source = joined([made[h] for h in inputs], [made[h] for h in targets])
    return CoreData(source, model, loss_contexts=60)


class Given:
    """A subject of one latent that gives known reconstructions of known rows."""

    def __init__(self, x: Tensor, y: Tensor) -> None:
        self.x, self.y = x, y
        self.d_in, self.d_sae = x.shape[1], 1

    def encode(self, x: Tensor) -> Tensor:
        return torch.cdist(x.double(), self.x.double()).argmin(1, keepdim=True).float() + 1

    def decode(self, f: Tensor) -> Tensor:
        return self.y[f[:, 0].long() - 1]


def values(rows: Sequence[Row]) -> dict[str, float | None]:
    return {row.metric + (f" {row.slice}" if row.slice else ""): row.value for row in rows}


def sae_of(data: CoreData, **changes: Any) -> SAE:
    sample = initial_sample(data.source)
    settings = {"d_sae": 24, "activation": {"kind": "topk", "k": 3}, "controllers": []}
    settings |= {"losses": ["reconstruction"]} | changes
    sae = SAEConfig.parse(settings).build(sample.d_in, d_out=sample.d_out)
    sae.initialise(sample.x, 1, sample.y)
    return sae.eval()


def test_a_target_that_is_the_input_has_the_numbers_of_core(model: LanguageModel) -> None:
    plain, pair = core(model, [STREAMS[1]]), core(model, [STREAMS[1]], [STREAMS[1]])
    sae = sae_of(plain)
    one, other = evaluate_core(sae, plain), evaluate_core(sae, pair)
    assert {row.definition for row in one} == {"core/1"}
    assert {row.definition for row in other} == {"core/targets/1"}
    wanted, found = values(one), values(other)
    assert wanted.keys() == found.keys() and wanted["loss_recovered"] is not None
    for name, value in wanted.items():
        assert found[name] == (None if value is None else pytest.approx(value, rel=1e-4, abs=1e-6))


@pytest.mark.parametrize("targets", [[INNER], [OUT], [OUT, LATER], list(STREAMS)])
def test_a_perfect_reconstruction_recovers_all(model: LanguageModel, targets: list[str]) -> None:
    data = core(model, [IN], targets)
    found = values(evaluate_core(Given(data.rows[0], data.targets), data))
    assert found["fvu"] == pytest.approx(0, abs=1e-9)
    assert found["loss_recovered"] == pytest.approx(1, abs=1e-4)
    assert found["cosine"] == pytest.approx(1, abs=1e-5)
    assert found["ce_zero"] != found["ce_clean"]


def test_errors_are_those_of_the_target(model: LanguageModel) -> None:
    data = core(model, [IN], [INNER])
    y = data.targets
    assert y.shape[1] == 12 and data.rows[0].shape[1] == HIDDEN
    noisy = y + 0.3 * torch.sin(50 * y)  # rows may occur twice
    found = values(evaluate_core(Given(data.rows[0], noisy), data))
    error = (y - noisy).double().square().sum()
    power = (y - y.mean(0)).double().square().sum()
    assert found["fvu"] == pytest.approx(float(error / power), rel=1e-5)
    assert found["mse"] == pytest.approx(float(error) / y.numel(), rel=1e-5)


def by_hand(model: LanguageModel, data: CoreData, instead: Mapping[str, Tensor]) -> float:
    """Mean loss of counted targets with modules' outputs replaced at counted positions."""
    ids, mask = data.contexts
    handles = []
    for hook, rows in instead.items():
        module = model.hook_point(hook).module

        def replace(m: Any, args: Any, y: Tensor, rows: Tensor = rows) -> Tensor:
            out = y.clone()
            out[mask] = rows
            return out

        handles.append(module.register_forward_hook(replace))
    try:
        losses = model.losses(ids)
    finally:
        for handle in handles:
            handle.remove()
    return float(losses[mask[:, 1:]].double().mean())


def test_the_splice_is_at_the_target_and_the_code_is_of_clean_inputs(model: LanguageModel) -> None:
    data = core(model, [IN], [OUT, LATER])
    sae = sae_of(data)
    found = values(evaluate_core(sae, data))
    y_hat = sae.decode(sae.encode(data.rows[0])).split(HIDDEN, dim=1)
    both = dict(zip((OUT, LATER), y_hat, strict=True))
    assert found["ce_spliced"] == pytest.approx(by_hand(model, data, both), rel=1e-5)
    zeros = {hook: torch.zeros_like(rows) for hook, rows in both.items()}
    assert found["ce_zero"] == pytest.approx(by_hand(model, data, zeros), rel=1e-5)
    means = {h: m for h, m in zip(both, data.mean.split(HIDDEN), strict=True)}
    assert found["ce_mean"] == pytest.approx(by_hand(model, data, means), rel=1e-5)
    clean = by_hand(model, data, {})
    for hook, rows in both.items():
        zero = by_hand(model, data, {hook: zeros[hook]})
        wanted = (zero - by_hand(model, data, {hook: rows})) / (zero - clean)
        if zero > clean:
            assert found[f"loss_recovered hook={hook}"] == pytest.approx(wanted, rel=1e-3)
        else:
            assert found[f"loss_recovered hook={hook}"] is None


def test_streams_are_replaced_one_by_one(model: LanguageModel) -> None:
    data = core(model, STREAMS)
    sae = sae_of(data)
    rows = values(evaluate_core(sae, data))
    y_hat = sae.decode(sae.encode(data.rows[0])).split(HIDDEN, dim=1)
    alone = [by_hand_stream(model, data, h, y) for h, y in zip(STREAMS, y_hat, strict=True)]
    assert rows["ce_spliced"] == pytest.approx(sum(alone) / 2, rel=1e-5)
    each = [rows[f"fvu hook={hook}"] for hook in STREAMS]
    assert rows["fvu"] == pytest.approx(sum(each) / 2, rel=1e-5)  # type: ignore[arg-type]
    x = data.rows[0].split(HIDDEN, dim=1)
    for value, part, hat in zip(each, x, y_hat, strict=True):
        wanted = (part - hat).square().sum() / (part - part.mean(0)).square().sum()
        assert value == pytest.approx(float(wanted), rel=1e-4)


def by_hand_stream(model: LanguageModel, data: CoreData, hook: str, rows: Tensor) -> float:
    ids, mask = data.contexts

    def replace(x: Tensor) -> Tensor:
        out = x.clone()
        out[mask] = rows
        return out

    losses = model.losses(ids, None, {hook: replace})
    return float(losses[mask[:, 1:]].double().mean())


def test_a_skip_connection_counts_and_is_shown_alone(model: LanguageModel) -> None:
    data = core(model, [IN], [INNER])
    sae = sae_of(data, skip=True)
    _, w = controls.linear_map(initial_sample(data.source))
    with torch.no_grad():
        sae.W_skip.copy_((w.T * sae.scale) / sae.target_scale)  # type: ignore[union-attr]
        sae.W_dec.zero_()
    found = values(evaluate_core(sae, data))
    linear = measure_reconstruction(subjects(True)["linear map"](setting(data)), data).fvu
    assert found["fvu"] == pytest.approx(linear, abs=1e-4)
    assert found["skip_only_fvu"] == pytest.approx(linear, abs=1e-4) and linear < 0.9
    assert "skip_only_fvu" not in values(evaluate_core(sae_of(data), data))


def setting(data: CoreData, k: float = 3.0) -> Setting:
    config = SAEConfig.parse({"d_sae": 24, "activation": {"kind": "topk", "k": 3}})
    return Setting(initial_sample(data.source), config, k, 7)


@pytest.mark.parametrize("targets", [[INNER], [OUT, LATER], []])
def test_controls(model: LanguageModel, targets: list[str]) -> None:
    data = core(model, [IN] if targets else STREAMS, targets)
    made = subjects(bool(targets))
    found = {name: measure_reconstruction(make(setting(data)), data) for name, make in made.items()}
    assert ("linear map" in found) == bool(targets)
    assert found["all zero"].l0 == 0 and found["all zero"].fvu > 1
    for name in ("top channels", "PCA", "untrained"):
        assert found[name].l0 == pytest.approx(3, abs=0.2)
    assert found["PCA"].fvu < found["top channels"].fvu < 1.2
    if targets:
        x, y = data.rows[0].double(), data.targets.double()
        design = torch.cat([x, torch.ones(len(x), 1, dtype=x.dtype)], dim=1)
        best = design @ torch.linalg.lstsq(design, y).solution
        weights = 1 if data.weights is None else data.weights.double()
        wanted = ((y - best).square() * weights).sum() / ((y - y.mean(0)).square() * weights).sum()
        assert found["linear map"].fvu == pytest.approx(float(wanted), abs=2e-3)
        assert found["linear map"].fvu <= found["PCA"].fvu + 1e-3
        whole = subjects(True)["PCA"](setting(data, 100))
        if len(targets) == 1:  # all components together are the map itself
            assert measure_reconstruction(whole, data).fvu == pytest.approx(
                found["linear map"].fvu, abs=1e-4
            )


@pytest.mark.parametrize("targets", [[INNER], [OUT, LATER]])
def test_the_planted_effect_is_as_large_as_expected(
    model: LanguageModel, targets: list[str]
) -> None:
    data = core(model, [IN], targets)
    sae = sae_of(data, skip=True)
    with torch.no_grad():  # a decoder that fits
        wanted = data.targets / sae.target_scale - sae.b_dec
        sae.W_dec.copy_(torch.linalg.lstsq(sae.encode(data.rows[0]), wanted).solution)
    before = measure_reconstruction(sae, data).fvu
    turned = [measure_reconstruction(turn_decoder(sae, s, 40), data).fvu for s in range(30)]
    rise = sum(turned) / len(turned) - before
    expected = expected_fvu_change(sae, data.rows[0], 40, data.targets, data.weights)
    assert rise == pytest.approx(expected, rel=0.1)


def test_latents_of_a_transcoder_are_surveyed(model: LanguageModel) -> None:
    data = core(model, [IN], [OUT, LATER])
    sae = sae_of(data)
    found = survey(sae, data.source, examples=2)
    x, y = data.rows[0], data.targets
    f = sae.encode(x)
    rows = sae.W_dec.detach() * sae.target_scale
    error = y - sae.decode(f)
    latent = int(found.density.argmax())
    without = error + f[:, latent, None] * rows[latent]
    gain = (without.square().sum() - error.square().sum()) / (y - y.mean(0)).square().sum()
    assert float(found.loss_share[latent]) == pytest.approx(float(gain), rel=1e-3)
    assert why_no_lens(sae, model) == ""
    (lens,) = lenses(sae, [latent], model, n=3)
    assert len(lens.raised) == 3
    inner = sae_of(core(model, [IN], [INNER]))
    assert "has 12 dimensions" in why_no_lens(inner, model)


def test_the_embedded_models_mlp(capsys: pytest.CaptureFixture[str]) -> None:
    lm = load(ModelConfig())
    ids = torch.randint(5, 300, (6, 16), generator=torch_stream(0, "test ids"))
    made = harvest(lm, Tokens(ids, torch.ones_like(ids).bool()), [IN, OUT])
    data = CoreData(joined([made[IN]], [made[OUT]]), lm, loss_contexts=6)
    found = values(evaluate_core(Given(data.rows[0], data.targets), data))
    assert found["ce_spliced"] == pytest.approx(found["ce_clean"], rel=1e-5)
