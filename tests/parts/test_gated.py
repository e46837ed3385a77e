"""Gated: code, loss terms and gradients are those of the paper's equations."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from twins import D_IN, D_SAE, ROWS, Twin, assert_same_loss, rows, small

from saelab.errors import SettingError
from saelab.sae import SAE, SAEConfig


def gated(seed: int, *losses: dict[str, Any], **settings: Any) -> SAE:
    data = {"activation": "gated", "constraints": ["unit_norm"]} | settings
    return small(seed, losses=["reconstruction", *losses], **data)


def code(t: Twin) -> Tensor:
    gate, mag, r = (t.w[f"activation.{name}"] for name in ("b_gate", "b_mag", "r_mag"))
    return (t.z + gate > 0).double() * torch.relu(t.z * r.exp() + mag)


def opened(t: Twin) -> Tensor:
    return torch.relu(t.z + t.w["activation.b_gate"])


def test_code_against_autograd(global_random_seed: int) -> None:
    sae = gated(global_random_seed)
    weight = torch.linspace(-1, 1, ROWS * D_IN).view(ROWS, D_IN)
    assert_same_loss(
        sae,
        rows(global_random_seed),
        lambda p: (p.recon * weight).sum(),
        lambda t: (t.recon(code(t)) * weight).sum(),
    )


@pytest.mark.parametrize("norms", [False, True])
def test_gate_l1(norms: bool, global_random_seed: int) -> None:
    settings = {"kind": "gate_l1", "coefficient": 0.4, "decoder_norms": norms}
    sae = gated(global_random_seed, settings)

    def theirs(t: Twin) -> Tensor:
        weighted = opened(t) * (t.norms if norms else 1.0)
        return 0.4 * weighted.sum() / (ROWS * math.sqrt(D_IN))

    assert_same_loss(sae, rows(global_random_seed), sae.loss_terms()["gate_l1"].loss, theirs)


@pytest.mark.parametrize("frozen", [True, False])
def test_gate_reconstruction(frozen: bool, global_random_seed: int) -> None:
    sae = gated(global_random_seed, {"kind": "gate_reconstruction", "frozen": frozen})

    def theirs(t: Twin) -> Tensor:
        if frozen:
            return (t.x - opened(t) @ t.W_dec.detach() - t.b_dec.detach()).square().mean()
        return t.error(opened(t)).mean()

    term = sae.loss_terms()["gate_reconstruction"]
    assert_same_loss(sae, rows(global_random_seed), term.loss, theirs)


def test_the_form_of_other_tools_is_the_same_function(global_random_seed: int) -> None:
    sae = gated(global_random_seed).eval()
    x = rows(global_random_seed, 200)
    form, z = sae.activation.export(), sae.encoder_input(x) @ sae.W_enc.T + sae.b_enc
    assert form is not None
    torch.testing.assert_close(form.code(z.detach()), sae.encode(x))


def test_l0_at_the_start(global_random_seed: int) -> None:
    data = {"activation": {"kind": "gated", "start_l0": 3}, "constraints": ["unit_norm"]}
    sae = SAEConfig.parse({"d_sae": D_SAE, "controllers": [], "losses": ["reconstruction"]} | data)
    built, x = sae.build(D_IN), rows(global_random_seed, 400)
    built.initialise(x, global_random_seed)
    assert built(x).l0 == pytest.approx(3, rel=0.01)


def test_raised_thresholds_close_gates(global_random_seed: int) -> None:
    sae = gated(global_random_seed).eval()
    x = rows(global_random_seed, 200)
    before, f = sae(x).l0, sae.encode(x)
    assert sae.raise_thresholds(0.3)
    after = sae.encode(x)
    assert sae(x).l0 < before - 0.5
    assert torch.equal(after[after != 0], f[after != 0])  # magnitudes stay
    sae.raise_thresholds(-0.3)
    torch.testing.assert_close(sae(x).l0, before)


def test_free_norms_are_refused_unless_asked_for() -> None:
    data = {"d_sae": 8, "losses": ["reconstruction", "gate_l1", "gate_reconstruction"]}
    with pytest.raises(SettingError, match="unit_norm"):
        SAEConfig.parse(data | {"activation": "gated"}).build(4)
    SAEConfig.parse(data | {"activation": {"kind": "gated", "free_norms": True}}).build(4)
    SAEConfig.parse(data | {"activation": "gated", "constraints": ["frozen"]}).build(4)


@pytest.mark.parametrize("kind", ["gate_l1", "gate_reconstruction"])
def test_terms_need_a_gate(kind: str) -> None:
    with pytest.raises(SettingError, match=r"ReLU.*has no gate: choose gated"):
        SAEConfig.parse({"d_sae": 8, "losses": ["reconstruction", kind]}).build(4)
