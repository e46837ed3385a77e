"""GroupMax and Multi-TopK against plain autograd."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from twins import D_IN, D_SAE, ROWS, Twin, assert_same_loss, rows, small, topk

from saelab.errors import SettingError
from saelab.formats.base import Plain
from saelab.sae import SAEConfig


def groupmax(t: Twin, k: int) -> Tensor:
    groups = t.z.reshape(ROWS, k, D_SAE // k)
    on = torch.nn.functional.one_hot(groups.argmax(-1), D_SAE // k)
    return (torch.relu(groups) * on).reshape(ROWS, D_SAE)


@pytest.mark.parametrize("k", [1, 4, 6])
def test_groupmax(k: int, global_random_seed: int) -> None:
    sae = small(global_random_seed, activation={"kind": "groupmax", "k": k})
    weight = torch.linspace(-1, 1, ROWS * D_IN).view(ROWS, D_IN)
    assert_same_loss(
        sae,
        rows(global_random_seed),
        lambda p: (p.recon * weight).sum(),
        lambda t: (t.recon(groupmax(t, k)) * weight).sum(),
    )
    groups = (sae(rows(global_random_seed)).code.dense() != 0).reshape(ROWS, k, -1).sum(-1)
    assert int(groups.max()) == 1


@pytest.mark.parametrize(
    ("k", "message"), [(5, "d_sae = 24 into groups of one size: use 4"), (25, "at most d_sae = 24")]
)
def test_groupmax_needs_a_divisor(k: int, message: str) -> None:
    with pytest.raises(SettingError, match=message):
        SAEConfig.parse({"d_sae": D_SAE, "activation": {"kind": "groupmax", "k": k}}).build(4)


def test_groupmax_has_no_form_of_other_tools(global_random_seed: int) -> None:
    sae = small(global_random_seed, activation={"kind": "groupmax", "k": 4}).eval()
    with pytest.raises(SettingError):
        Plain.of(sae)


@pytest.mark.parametrize(("k", "multiple"), [(2, 4), (3, 2), (10, 4)])
def test_multi_topk(k: int, multiple: int, global_random_seed: int) -> None:
    losses = ["reconstruction", {"kind": "multi_topk", "multiple": multiple}]
    sae = small(global_random_seed, activation={"kind": "topk", "k": k}, losses=losses)

    def theirs(t: Twin) -> Tensor:
        return t.error(topk(t, min(D_SAE, k * multiple))).mean() / 8

    term = sae.loss_terms()["multi_topk"]
    assert_same_loss(sae, rows(global_random_seed), term.loss, theirs)


def test_multi_topk_follows_the_level(global_random_seed: int) -> None:
    activation = {"kind": "batchtopk", "k": 2}
    settings = {"activation": activation, "losses": ["reconstruction", "multi_topk"]}
    sae = small(global_random_seed, **settings)
    config = sae.config.at_l0(3)
    other = config.build(D_IN)
    other.load_state_dict(sae.state_dict())
    x, found = rows(global_random_seed), []
    for one in (sae, other):
        p = one(x)
        k = 4 * int(one.config.target_l0 or 0)
        latents = p.z.topk(k, dim=1).indices
        f = torch.zeros_like(p.z).scatter(1, latents, p.z.gather(1, latents).relu())
        wanted = (f @ one.W_dec + one.b_dec - p.x).square().mean() / 8
        found.append(one.loss_terms()["multi_topk"].loss(p).detach())
        torch.testing.assert_close(found[-1], wanted.detach())
    assert found[0] != found[1]
    with pytest.raises(
        SettingError, match=r"losses.1.multiple = 4: multiplies an L0 that no part names"
    ):
        data = {"losses": ["reconstruction", "multi_topk"], "controllers": []}
        SAEConfig.parse({"d_sae": 8, **data}).build(4)
