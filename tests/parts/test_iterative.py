"""Orthogonal matching pursuit and ISTA against plain autograd in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from twins import D_IN, D_SAE, ROWS, Twin, assert_same_loss, rows, small

from saelab.errors import SettingError
from saelab.formats.base import Plain
from saelab.sae import SAE, SAEConfig

ALONE: dict[str, Any] = {"tied": True, "encoder_bias": False}
WEIGHT = torch.linspace(-1, 1, ROWS * D_IN).view(ROWS, D_IN)


def orthogonal(seed: int, k: int, noise: float = 0.2) -> SAE:
    activation = {"kind": "orthogonal_matching_pursuit", "k": k, "free_norms": True}
    return small(seed, noise=noise, activation=activation, **ALONE)


def pursuit(u: Tensor, w: Tensor, k: int) -> Tensor:
    """The code of rows [n, d], one row after the other; differentiable."""
    codes = []
    for row in u:
        chosen: list[int] = []
        left, f = row, torch.zeros(0, dtype=w.dtype)
        for _ in range(k):
            sizes = (w @ left).detach().abs()
            sizes[chosen] = -1
            chosen.append(int(sizes.argmax()))
            atoms = w[chosen]
            f = torch.linalg.solve(atoms @ atoms.T, atoms @ row)
            left = row - f @ atoms
        codes.append(f @ torch.nn.functional.one_hot(torch.tensor(chosen), len(w)).to(w.dtype))
    return torch.stack(codes)


def holds(sae: SAE, seed: int, code: Any, sparse: bool = True) -> None:
    x = rows(seed)
    found, wanted = sae(x).code.dense().double(), code(Twin(sae, x))
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)
    assert_same_loss(
        sae,
        x,
        lambda p: (p.recon * WEIGHT).sum() + p.code.values.square().sum(),
        lambda t: (t.recon(code(t)) * WEIGHT).sum() + code(t).square().sum(),
        (sparse,),
    )


@pytest.mark.parametrize("k", [1, 3, 5])
def test_orthogonal_matching_pursuit(k: int, global_random_seed: int) -> None:
    sae = orthogonal(global_random_seed, k)
    holds(sae, global_random_seed, lambda t: pursuit(t.x - t.b_dec, t.W_dec, k))
    code = sae(rows(global_random_seed)).code.dense()
    assert bool((code < 0).any()) and bool(((code != 0).sum(1) == k).all())


def test_orthogonal_pursuit_leaves_less_than_the_plain_one(global_random_seed: int) -> None:
    """Its residual is orthogonal to all chosen latents; that of matching pursuit to the last."""
    x = rows(global_random_seed)
    activation = {"kind": "matching_pursuit", "k": 5, "free_norms": True}
    plain = small(global_random_seed, noise=0.0, activation=activation, **ALONE)(x)
    p = orthogonal(global_random_seed, 5, 0.0)(x)
    left = p.target - p.recon
    assert float(left.detach().square().mean()) < float(
        (plain.target - plain.recon).detach().square().mean()
    )
    assert p.code.support is not None
    rows_left = left[p.code.support.rows]
    along = torch.linalg.vecdot(rows_left, p.sae.W_dec[p.code.support.latents])
    assert float(along.detach().abs().max()) < 1e-5


def test_more_latents_than_dimensions(global_random_seed: int) -> None:
    """A latent that the chosen ones explain already stays at 0, and gradients are finite."""
    sae = orthogonal(global_random_seed, D_IN + 4)
    p = sae(rows(global_random_seed))
    counts = (p.code.dense() != 0).sum(1)
    assert int(counts.max()) <= D_IN
    torch.testing.assert_close(p.recon, p.target, rtol=0, atol=0.05)
    p.recon.square().sum().backward()
    assert sae.W_dec.grad is not None and bool(sae.W_dec.grad.isfinite().all())


def test_equal_rows_are_chosen_once(global_random_seed: int) -> None:
    sae = orthogonal(global_random_seed, 4)
    with torch.no_grad():
        sae.W_dec[1::2] = sae.W_dec[::2]
    code = sae(rows(global_random_seed)).code.dense()
    assert not bool(((code[:, ::2] != 0) & (code[:, 1::2] != 0)).any())


def ista(t: Twin, steps: int, eta: float) -> Tensor:
    u, w_enc, b_enc = t.x - t.b_dec, t.w["W_enc"], t.w["b_enc"]
    f = torch.relu(u @ w_enc.T + b_enc)
    for _ in range(steps):
        f = torch.relu(f + eta * ((u - f @ t.W_dec) @ w_enc.T + b_enc))
    return f


@pytest.mark.parametrize("bias", [-1.3, 0.5])
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize(("steps", "eta"), [(1, 0.2), (3, 0.05)])
def test_ista(steps: int, eta: float, tied: bool, bias: float, global_random_seed: int) -> None:
    activation = {"kind": "ista", "steps": steps, "step_size": eta}
    sae = small(global_random_seed, bias=bias, activation=activation, tied=tied)
    holds(sae, global_random_seed, lambda t: ista(t, steps, eta), bias < 0)


def test_steps_of_ista_lower_its_objective(global_random_seed: int) -> None:
    """|u - f W|^2 / 2 - <b_enc, f> of a tied SAE, from one number of steps to the next."""
    x, objectives = rows(global_random_seed), []
    for steps in (1, 2, 5, 20):
        activation = {"kind": "ista", "steps": steps, "step_size": 0.1}
        sae = small(global_random_seed, noise=0.05, activation=activation, tied=True)
        f = sae(x).code.dense().detach()
        error = sae.encoder_input(x) - f @ sae.W_dec.detach()
        objectives.append(float(error.square().sum() / 2 - (f @ sae.b_enc.detach()).sum()))
    assert objectives == sorted(objectives, reverse=True)


@pytest.mark.parametrize(
    ("kind", "changes", "setting"),
    [
        ("orthogonal_matching_pursuit", {"tied": False}, "tied"),
        ("orthogonal_matching_pursuit", {"constraints": []}, "free_norms"),
        ("orthogonal_matching_pursuit", {"initial_l0": 3}, "initial_l0"),
        ("ista", {"initial_l0": 3}, "initial_l0"),
        ("ista", {"scaling": "variance"}, "scaling"),
        ("ista", {"centre": False}, "centre"),
        ("ista", {"losses": ["reconstruction", "auxk"]}, "part"),
    ],
)
def test_what_does_not_fit_is_refused(kind: str, changes: dict[str, Any], setting: str) -> None:
    own: dict[str, Any] = {} if kind == "ista" else ALONE | {"constraints": ["unit_norm"]}
    fits = {"d_sae": D_SAE, "activation": kind, "losses": ["reconstruction"], "controllers": []}
    if kind != "ista":
        fits |= {"activation": {"kind": kind, "k": 4}}
    SAEConfig.parse(fits | own).build(D_IN)
    with pytest.raises(SettingError) as refused:
        SAEConfig.parse(fits | own | changes).build(D_IN)
    assert setting in refused.value.setting


@pytest.mark.parametrize("kind", ["orthogonal_matching_pursuit", "ista"])
def test_no_other_tool_has_the_form(kind: str, global_random_seed: int) -> None:
    sae = orthogonal(global_random_seed, 3) if kind != "ista" else small(0, activation="ista")
    with pytest.raises(SettingError, match="saelab's own format"):
        Plain.of(sae.eval())
