"""Single latents: against the definitions worked out densely, and against the model's own head."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from saelab.data.activations.store import MemorySource, Shard
from saelab.data.language_model import ModelConfig, load
from saelab.evals import latent_examples
from saelab.sae import SAE, SAEConfig
from saelab.seeding import torch_stream

D, F, CONTEXTS, POSITIONS = 12, 40, 23, 9
KINDS = [{"kind": "relu"}, {"kind": "topk", "k": 3}]


def trained_like(activation: dict[str, object], d: int = D) -> tuple[SAE, MemorySource]:
    draw = torch_stream(0, "test features")
    x = torch.randn(CONTEXTS, POSITIONS, d, generator=draw) + 0.3
    mask = torch.rand(CONTEXTS, POSITIONS, generator=draw) > 0.2
    mask[4] = False  # a context without a counted token
    config = SAEConfig.parse(
        {"d_sae": F, "activation": activation, "losses": [{"kind": "reconstruction"}],
         "controllers": [], "initial_l0": 5}
    )  # fmt: skip
    sae = config.build(d)
    sae.initialise(x.flatten(0, 1), 0)
    ids = torch.arange(CONTEXTS * POSITIONS).view(CONTEXTS, POSITIONS).int()
    shards = [Shard(x[:10], mask[:10], ids[:10]), Shard(x[10:], mask[10:], ids[10:])]
    return sae.eval(), MemorySource(shards, {"hook_name": "h"})


def dense(sae: SAE, source: MemorySource) -> tuple[Tensor, Tensor, Tensor]:
    """All rows, their codes with zeros at tokens that do not count, and the mask."""
    x = torch.cat([source.shard(i).x for i in range(2)])
    mask = torch.cat([source.shard(i).mask for i in range(2)])
    return x, sae.encode(x.flatten(0, 1)).view(*mask.shape, F) * mask[..., None], mask


@pytest.mark.parametrize("activation", KINDS, ids=lambda a: str(a["kind"]))
def test_density_and_loss_share_are_those_of_their_definitions(activation: dict) -> None:
    sae, source = trained_like(activation)
    x, f, mask = dense(sae, source)
    found = latent_examples.survey(sae, source, 4)
    assert found.tokens == int(mask.sum())
    torch.testing.assert_close(found.density, (f > 0).sum((0, 1)).double() / found.tokens)
    rows, codes = x[mask], f[mask]
    power = (rows - rows.mean(0)).square().sum()
    whole = (rows - sae.decode(codes)).square().sum()
    for latent in range(F):
        without = codes.clone()
        without[:, latent] = 0
        lost = ((rows - sae.decode(without)).square().sum() - whole) / power
        assert float(found.loss_share[latent]) == pytest.approx(float(lost), abs=2e-6)


@pytest.mark.parametrize("activation", KINDS, ids=lambda a: str(a["kind"]))
def test_examples_are_the_strongest_contexts_at_their_strongest_tokens(activation: dict) -> None:
    sae, source = trained_like(activation)
    _, f, mask = dense(sae, source)
    found = latent_examples.survey(sae, source, 4)
    shown = latent_examples.examples(sae, source, found, range(F), 2, 3)
    for latent in range(F):
        largest = f[..., latent].amax(1)
        order = sorted(range(CONTEXTS), key=lambda c: (-float(largest[c]), c))[:4]
        order = [context for context in order if largest[context] > 0]
        assert [example.context for example in shown[latent]] == order
        for example in shown[latent]:
            own = f[example.context, :, latent]
            assert example.peak == int(own.argmax())
            assert mask[example.context, example.peak]
            assert example.start == max(0, example.peak - 2)
            stop = min(POSITIONS, example.peak + 4)
            assert example.values == pytest.approx(own[example.start : stop].tolist(), abs=1e-5)


def test_a_latent_that_never_fires_has_no_example_and_is_not_among_the_rarest() -> None:
    sae, source = trained_like({"kind": "relu"})
    with torch.no_grad():
        sae.b_enc[7] = -1e4
    found = latent_examples.survey(sae, source)
    assert latent_examples.examples(sae, source, found, [7], 2, 2) == {7: []}
    picked = latent_examples.pick(found, F, 0)
    assert picked[7] != "rarest" and len(picked) == F


def test_picks_are_the_extremes_and_are_drawn_again_the_same() -> None:
    sae, source = trained_like({"kind": "relu"})
    found = latent_examples.survey(sae, source)
    picked = latent_examples.pick(found, 12, 3)
    groups = {group: [i for i in picked if picked[i] == group] for group in latent_examples.GROUPS}
    assert [len(of) for of in groups.values()] == [3, 3, 3, 3]
    assert groups["densest"] == found.density.argsort(descending=True, stable=True)[:3].tolist()
    rest = [i for i in range(F) if i not in (*groups["densest"], *groups["rarest"])]
    best = sorted(rest, key=lambda i: (-float(found.loss_share[i]), i))[:3]
    assert groups["largest loss share"] == best
    assert list(picked.items()) == list(latent_examples.pick(found, 12, 3).items())
    others = [latent_examples.pick(found, 12, seed) for seed in range(4, 8)]
    assert any(list(other) != list(picked) for other in others)


def test_neighbours_are_the_largest_cosines_of_other_rows() -> None:
    sae, _ = trained_like({"kind": "relu"})
    rows = sae.W_dec.detach()
    cosine = torch.nn.functional.cosine_similarity(rows[5][None], rows)
    cosine[5] = -2
    expected = cosine.topk(5)
    (found,) = latent_examples.neighbours(sae, [5])
    assert [latent for latent, _ in found] == expected.indices.tolist()
    assert [value for _, value in found] == pytest.approx(expected.values.tolist(), abs=1e-5)


def test_the_lens_is_the_final_norm_and_the_unembedding() -> None:
    model = load(ModelConfig())
    sae, _ = trained_like({"kind": "relu"}, model.d_model)
    assert latent_examples.why_no_lens(sae, model) == ""
    found = latent_examples.lenses(sae, [3, 8], model, 6)
    body = model.model.base_model
    with torch.no_grad():
        row = sae.W_dec[8] * sae.scale
        norm = body.final_layer_norm
        added = (norm(row) - norm.bias) @ model.model.get_output_embeddings().weight.T
    assert [token for token, _ in found[1].raised] == added.topk(6).indices.tolist()
    assert [value for _, value in found[1].raised] == pytest.approx(
        added.topk(6).values.tolist(), rel=1e-3
    )
    assert [token for token, _ in found[1].lowered] == (-added).topk(6).indices.tolist()


def test_without_a_fitting_head_there_is_a_reason() -> None:
    sae, _ = trained_like({"kind": "relu"})
    assert "without a model" in latent_examples.why_no_lens(sae, None)
    assert "12 dimensions" in latent_examples.why_no_lens(sae, load(ModelConfig()))
