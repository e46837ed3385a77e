"""Losses beside a JumpReLU, and its pseudo-derivatives to the input, against plain autograd."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from twins import D_IN, D_SAE, ROWS, Twin, assert_same_loss, relu, rows, small

from saelab.data.activations.stream import Batch
from saelab.errors import SettingError
from saelab.sae import SAE, SAEConfig
from saelab.training.loop import Cell
from saelab.training.optim import TrainConfig

T, H = 0.4, 0.3


def jumprelu(seed: int, *losses: dict[str, Any], to_input: bool = False) -> SAE:
    activation = {"kind": "jumprelu", "threshold": T, "bandwidth": H, "to_input": to_input}
    return small(seed, bias=-0.4, losses=["reconstruction", *losses], activation=activation)


def threshold(t: Twin) -> Tensor:
    return t.w["activation.log_threshold"].exp()


def step(t: Twin, size: Tensor | float, to_input: bool = False) -> Tensor:
    """size * 1[z > t], and its pseudo-derivative to t (and z) as a term whose value is 0."""
    level = threshold(t)
    near = ((t.z - level).abs() < H / 2).double()
    moved = level.detach() - level
    if to_input:
        moved = moved + t.z - t.z.detach()
    slope = 1.0 if isinstance(size, float) else level.detach()
    return size * (t.z > level).double() + near * slope / H * moved


def code(t: Twin, to_input: bool = False) -> Tensor:
    return step(t, t.z, to_input)


@pytest.mark.parametrize("to_input", [False, True])
def test_pseudo_derivatives(to_input: bool, global_random_seed: int) -> None:
    sae = jumprelu(global_random_seed, {"kind": "l0", "coefficient": 0.1}, to_input=to_input)
    weight = torch.linspace(-1, 1, ROWS * D_IN).view(ROWS, D_IN)
    penalty = sae.loss_terms()["l0"].loss
    assert_same_loss(
        sae,
        rows(global_random_seed),
        lambda p: (p.recon * weight).sum() + penalty(p),
        lambda t: (
            (t.recon(code(t, to_input)) * weight).sum() + 0.1 * step(t, 1.0, to_input).sum() / ROWS
        ),
    )


@pytest.mark.parametrize("norms", [True, False])
@pytest.mark.parametrize("activation", ["jumprelu", "relu"])
def test_tanh(norms: bool, activation: str, global_random_seed: int) -> None:
    tanh = {"kind": "tanh", "coefficient": 0.3, "steepness": 2.5, "decoder_norms": norms}
    if activation == "jumprelu":
        sae = jumprelu(global_random_seed, tanh)
    else:
        sae = small(global_random_seed, losses=["reconstruction", tanh])

    def theirs(t: Twin) -> Tensor:
        f = code(t) if activation == "jumprelu" else relu(t)
        return 0.3 * (2.5 * f * (t.norms if norms else 1.0)).tanh().sum() / ROWS

    assert_same_loss(sae, rows(global_random_seed), sae.loss_terms()["tanh"].loss, theirs)


def test_preactivation(global_random_seed: int) -> None:
    sae = jumprelu(global_random_seed, {"kind": "preactivation", "coefficient": 0.2})

    def theirs(t: Twin) -> Tensor:
        return 0.2 * (torch.relu(threshold(t) - t.z) * t.norms).sum() / (ROWS * D_IN)

    assert_same_loss(sae, rows(global_random_seed), sae.loss_terms()["preactivation"].loss, theirs)


def test_preactivation_of_a_scaled_input(global_random_seed: int) -> None:
    """All pre-activations are those of the selection, whatever stands before the encoder."""
    activation = {"kind": "jumprelu", "threshold": T}
    losses = ["reconstruction", {"kind": "preactivation", "coefficient": 1.0}]
    scaling = {"kind": "variance", "tau": 0.5}
    sae = small(global_random_seed, losses=losses, activation=activation, scaling=scaling)
    p = sae(rows(global_random_seed))
    z = (p.u @ sae.W_enc.T + sae.b_enc).detach()
    below = torch.relu(sae.activation.learned_thresholds().detach() - z)
    wanted = (below * sae.W_dec.norm(dim=1)).sum() / (ROWS * D_IN)
    torch.testing.assert_close(sae.loss_terms()["preactivation"].loss(p), wanted)


@pytest.mark.parametrize("over", ["rows", "batch"])
def test_quadratic_l0(over: str, global_random_seed: int) -> None:
    settings = {"kind": "quadratic_l0", "target": 3, "over": over, "coefficient": 0.7}
    sae = jumprelu(global_random_seed, settings)

    def theirs(t: Twin) -> Tensor:
        l0 = step(t, 1.0).sum(1)
        if over == "rows":
            return 0.7 * (2 / 3) * (l0 - 3).square().mean() / D_IN
        return 0.7 * (l0.mean() / 3 - 1).square() / D_IN

    assert_same_loss(sae, rows(global_random_seed), sae.loss_terms()["quadratic_l0"].loss, theirs)


@pytest.mark.parametrize("over", ["rows", "batch"])
def test_quadratic_l0_comes_to_its_target(over: str, global_random_seed: int) -> None:
    settings = {
        "kind": "quadratic_l0",
        "over": over,
        "coefficient": 3.0 if over == "batch" else 1.0,
    }
    data = {"losses": ["reconstruction", settings], "activation": "jumprelu", "controllers": []}
    config = SAEConfig.parse({"d_sae": D_SAE, "precision": "float32", **data}).at_l0(5)
    assert config.target_l0 == config.settled_l0 == 5 and config.l0_rules(5) == {"set"}
    training = TrainConfig(tokens=150 * ROWS, batch_size=ROWS, lr=1e-3)
    cell = Cell("cell", config, training, rows(global_random_seed, 200), global_random_seed)
    for i in range(150):
        x = rows(global_random_seed + i + 1)
        cell.step(Batch(x, torch.zeros(ROWS, dtype=torch.int64)))
    assert abs(cell.log.columns["l0"][0] - 5) > 1
    assert cell.sae(rows(global_random_seed, 400)).l0 == pytest.approx(5, abs=0.6)


def test_only_one_part_sets_the_l0() -> None:
    losses = ["reconstruction", "quadratic_l0", "l0"]
    data = {"d_sae": 64, "activation": "jumprelu", "losses": losses}
    with pytest.raises(SettingError, match="all but one of quadratic_l0, l0_target"):
        SAEConfig.parse(data).build(4)
    SAEConfig.parse(data | {"losses": losses[:2]}).build(4)


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("quadratic_l0", "no thresholds to penalise"),
        ("preactivation", r"ReLU.*learns no threshold of each latent: choose jumprelu"),
    ],
)
def test_terms_need_thresholds(kind: str, message: str) -> None:
    with pytest.raises(SettingError, match=message):
        SAEConfig.parse({"d_sae": 64, "losses": ["reconstruction", kind]}).build(4)


def test_a_target_above_all_latents() -> None:
    losses = ["reconstruction", {"kind": "quadratic_l0", "target": 65}]
    data = {"d_sae": 64, "activation": "jumprelu", "losses": losses}
    with pytest.raises(SettingError, match="at most d_sae = 64"):
        SAEConfig.parse(data).build(4)
