"""Matching pursuit against plain autograd in float64, and against SAELens' equations."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from twins import D_IN, D_SAE, ROWS, Twin, assert_same_loss, rows, small

from saelab.errors import SettingError
from saelab.formats.base import Plain
from saelab.parts import weights
from saelab.parts.base import Reset
from saelab.sae import SAE, SAEConfig

#: An SAE whose encoder is its decoder.
ALONE: dict[str, Any] = {"tied": True, "encoder_bias": False}


def pursuing(seed: int, noise: float = 0.2, **settings: Any) -> SAE:
    activation = {"kind": "matching_pursuit", "free_norms": True, **settings}
    return small(seed, noise=noise, activation=activation, **ALONE)


def pursuit(u: Tensor, w: Tensor, k: int, repeats: str, threshold: float) -> Tensor:
    """The code of rows [n, d], one row after the other; differentiable."""
    codes = []
    for residual in u:
        f, taken = torch.zeros(len(w), dtype=w.dtype), set[int]()
        for _ in range(k):
            products = (w @ residual).detach()
            if repeats == "exclude":
                products[list(taken)] = -torch.inf
            best = int(products.argmax())
            value = torch.relu(residual @ w[best])
            f = f + value * torch.nn.functional.one_hot(torch.tensor(best), len(w))
            residual = residual - value * w[best]
            ends = repeats == "stop" and (best in taken or float(value.detach()) <= 0)
            taken.add(best)
            if ends or float(residual.detach().norm()) < threshold:
                break
        codes.append(f)
    return torch.stack(codes)


@pytest.mark.parametrize("gram", [True, False])
@pytest.mark.parametrize(
    ("k", "repeats", "threshold"),
    [(1, "allow", 0.0), (6, "allow", 0.0), (12, "stop", 0.0), (12, "stop", 0.8), (5, "exclude", 0)],
)
def test_code_and_gradients(
    k: int,
    repeats: str,
    threshold: float,
    gram: bool,
    global_random_seed: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(weights, "MOST_IN_GRAM", 10**6 if gram else 0)
    sae = pursuing(global_random_seed, k=k, repeats=repeats, residual_threshold=threshold)
    x, weight = rows(global_random_seed), torch.linspace(-1, 1, ROWS * D_IN).view(ROWS, D_IN)
    assert sae.weights().uses_gram(ROWS, k) == gram

    def code(t: Twin) -> Tensor:
        return pursuit(t.x - t.b_dec, t.W_dec, k, repeats, threshold)

    torch.testing.assert_close(
        sae(x).code.dense().double(), code(Twin(sae, x)), rtol=1e-4, atol=1e-5
    )
    assert_same_loss(
        sae,
        x,
        lambda p: (p.recon * weight).sum() + p.code.values.square().sum(),
        lambda t: (t.recon(code(t)) * weight).sum() + code(t).square().sum(),
        (True,),
    )


def test_settings_are_reached(global_random_seed: int) -> None:
    """The cases above choose latents again, stop, and exclude."""
    x = rows(global_random_seed)
    counts = {
        repeats: (pursuing(global_random_seed, k=12, repeats=repeats)(x).code.dense() > 0).sum(1)
        for repeats in ("allow", "stop", "exclude")
    }
    assert int(counts["allow"].min()) < 12
    assert bool((counts["stop"] < counts["allow"]).any())
    assert bool((counts["exclude"] > counts["allow"]).any())
    short = pursuing(global_random_seed, k=12, residual_threshold=1.0)(x).code.dense()
    assert float((short > 0).sum()) < float(counts["allow"].sum())


def test_residual_is_orthogonal_to_the_last_latent(global_random_seed: int) -> None:
    """With unit rows, a step takes all of its latent's direction out of the residual."""
    sae = pursuing(global_random_seed, 0.0, k=1)
    p = sae(rows(global_random_seed))
    assert p.code.support is not None
    left = torch.linalg.vecdot(p.target - p.recon, sae.W_dec[p.code.support.latents])
    assert float(left.detach().abs().max()) < 1e-5


def test_each_step_lowers_the_error(global_random_seed: int) -> None:
    x = rows(global_random_seed)
    errors = []
    for k in (1, 2, 4, 8):
        p = pursuing(global_random_seed, 0.0, k=k)(x)
        errors.append(float((p.target - p.recon).square().mean().detach()))
    assert errors == sorted(errors, reverse=True) and errors[-1] < 0.2 * errors[0]


@pytest.mark.parametrize(
    ("changes", "setting", "words"),
    [
        ({"tied": False}, "tied", "set it to true"),
        ({"encoder_bias": True}, "encoder_bias", "set it to false"),
        ({"constraints": []}, "free_norms", "add the constraint 'unit_norm'"),
        ({"centre": False}, "centre", "set it to true"),
        ({"scaling": "centring"}, "scaling", "leave it out"),
        ({"initial_l0": 4}, "initial_l0", "leave it out"),
        ({"losses": ["reconstruction", "auxk"]}, "part", "reads pre-activations"),
        ({"losses": ["reconstruction", "multi_topk"]}, "part", "reads pre-activations"),
        ({"losses": [{"kind": "l0", "coefficient": 0.1}]}, "activation", "thresholds"),
        ({"activation": {"kind": "matching_pursuit", "k": D_SAE + 1}}, "activation.k", "at most"),
    ],
)
def test_what_does_not_fit_is_refused(changes: dict[str, Any], setting: str, words: str) -> None:
    fits = {
        "d_sae": D_SAE,
        "activation": {"kind": "matching_pursuit", "k": 4},
        "losses": ["reconstruction"],
        "controllers": [],
        "constraints": ["unit_norm"],
    } | ALONE
    SAEConfig.parse(fits).build(D_IN)
    with pytest.raises(SettingError, match=words) as refused:
        SAEConfig.parse(fits | changes).build(D_IN)
    assert setting in refused.value.setting


def test_a_target_is_refused() -> None:
    config = SAEConfig.parse(
        {"d_sae": D_SAE, "activation": {"kind": "matching_pursuit", "k": 4}, "encoder_bias": False}
    )
    with pytest.raises(SettingError, match="leave it out") as refused:
        config.build(D_IN, d_out=D_IN + 1)
    assert "target_hook" in refused.value.setting


def test_exclusion_has_no_form_of_other_tools(global_random_seed: int) -> None:
    with pytest.raises(SettingError, match="repeats = 'exclude'"):
        Plain.of(pursuing(global_random_seed, k=4, repeats="exclude").eval())


def test_plain_form_is_the_pursuit_in_raw_units(global_random_seed: int) -> None:
    sae = pursuing(global_random_seed, k=6, repeats="stop", residual_threshold=0.5).eval()
    plain, x = Plain.of(sae), rows(global_random_seed)
    assert plain.pursuit is not None and float(sae.scale) != 1
    wanted = pursuit(
        (x - plain.b_dec).double(), plain.W_dec.double(), 6, "stop", 0.5 * float(sae.scale)
    )
    found = plain.build().encode(x)
    torch.testing.assert_close(found.double(), wanted, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found, sae.encode(x) * sae.scale, rtol=1e-4, atol=1e-5)


def test_a_reset_latent_points_at_its_direction(global_random_seed: int) -> None:
    sae = pursuing(global_random_seed, k=2)
    directions = torch.nn.functional.normalize(torch.ones(1, D_IN), dim=1)
    sae.reset_latents(Reset(torch.tensor([3]), directions, 0.2))
    torch.testing.assert_close(sae.W_dec[3:4].detach(), directions)
    assert sae.W_enc is sae.W_dec
