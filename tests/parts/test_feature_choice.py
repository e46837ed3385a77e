"""Feature choice: every latent takes its best rows, k N pairs in all; thresholds follow them."""

from __future__ import annotations

import pytest
import torch
from twins import D_IN, D_SAE, ROWS, Twin, assert_same_loss, rows, small

from saelab.parts.activations.feature_choice import FeatureChoice
from saelab.sae import SAE


def built(seed: int, k: int, **settings: float) -> tuple[SAE, FeatureChoice]:
    activation = {"kind": "feature_choice", "k": k, **settings}
    sae = small(seed, activation=activation, bias=0.5)
    assert isinstance(sae.activation, FeatureChoice)
    return sae, sae.activation


def choice(t: Twin, k: int) -> torch.Tensor:
    """By hand: each latent's best rows, then the rest by their value."""
    each, rest = divmod(k * ROWS, D_SAE)
    order = t.z.detach().argsort(0, descending=True)
    on = torch.zeros_like(t.z)
    for i in range(D_SAE):
        on[order[:each, i], i] = 1
    if rest:
        following = t.z.detach().gather(0, order[each : each + 1])[0]
        for i in following.argsort(descending=True)[:rest].tolist():
            on[order[each, i], i] = 1
    return torch.relu(t.z) * on


@pytest.mark.parametrize("k", [1, 3, 5])
def test_against_autograd(k: int, global_random_seed: int) -> None:
    sae, _ = built(global_random_seed, k)
    weight = torch.linspace(-1, 1, ROWS * D_IN).view(ROWS, D_IN)
    assert_same_loss(
        sae,
        rows(global_random_seed),
        lambda p: (p.recon * weight).sum(),
        lambda t: (t.recon(choice(t, k)) * weight).sum(),
    )


def test_every_latent_fires_alike(global_random_seed: int) -> None:
    sae, _ = built(global_random_seed, 3)  # 3 * 40 / 24 = 5 rows each
    p = sae(rows(global_random_seed))
    assert p.code.firings.tolist() == [5] * D_SAE and p.l0 == 3


def test_thresholds_are_the_smallest_selected_values(global_random_seed: int) -> None:
    sae, part = built(global_random_seed, 3, momentum=0.5)
    least = []
    with torch.no_grad():
        for i in range(2):
            p = sae(rows(global_random_seed + i))
            code = p.code.dense()
            least.append(torch.where(code > 0, code, torch.inf).amin(0))
            part.update(p)
    wanted = (0.25 * least[0] + 0.5 * least[1]) / 0.75
    torch.testing.assert_close(part.threshold, wanted)
    sae.eval()
    f = sae.encode(rows(global_random_seed))
    z = (sae.encoder_input(rows(global_random_seed)) @ sae.W_enc.T + sae.b_enc).detach()
    torch.testing.assert_close(f, z * (z > wanted))
    before = sae(rows(global_random_seed, 300)).l0
    assert sae.raise_thresholds(0.2) and sae(rows(global_random_seed, 300)).l0 < before
    torch.testing.assert_close(part.threshold, wanted * torch.tensor(0.2).exp())


def test_a_latent_that_starts_afresh_has_no_threshold(global_random_seed: int) -> None:
    sae, part = built(global_random_seed, 3)
    with torch.no_grad():
        part.update(sae(rows(global_random_seed)))
    assert bool((part.threshold > 0).all())
    part.forget(torch.tensor([2, 5]))
    assert (part.threshold == 0).nonzero().flatten().tolist() == [2, 5]
