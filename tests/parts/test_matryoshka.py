"""Matryoshka's loss is the sum over prefixes, over any activation, and its order follows energy."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from twins import D_IN, D_SAE, Twin, assert_same_loss, relu, rows, small, topk

from saelab.errors import SettingError
from saelab.parts.losses.matryoshka import Matryoshka
from saelab.sae import SAE, SAEConfig

TOPK = {"activation": {"kind": "topk", "k": 5}}
CASES: dict[str, dict[str, Any]] = {
    "fixed": {"shares": [0.25, 0.5]},
    "widths": {"widths": [3, 7, 20], "weights": [2.0, 1.0, 0.5]},
    "detached": {"widths": [4, 9, 16], "detached": True},
    "sampled": {"sampled": 4, "coefficient": 0.2},
    "energy": {"shares": [0.25, 0.5], "order": "energy"},
}


def term(sae: SAE) -> Matryoshka:
    found = sae.loss_terms()["matryoshka"]
    assert isinstance(found, Matryoshka)
    return found


def built(seed: int, settings: dict[str, Any], **others: Any) -> SAE:
    return small(seed, losses=["reconstruction", {"kind": "matryoshka", **settings}], **others)


@pytest.mark.parametrize("case", list(CASES))
@pytest.mark.parametrize("activation", ["relu", "topk"])
def test_against_autograd(case: str, activation: str, global_random_seed: int) -> None:
    sae = built(global_random_seed, CASES[case], **(TOPK if activation == "topk" else {}))
    x = rows(global_random_seed)
    if case == "energy":
        with torch.no_grad():
            for i in range(3):
                term(sae).update(sae(rows(global_random_seed + i)))
        assert not torch.equal(term(sae).places(), torch.arange(D_SAE))
    widths, places = term(sae).widths(7), term(sae).places()
    weights = CASES[case].get("weights", [1.0] * len(widths))

    def theirs(t: Twin) -> Tensor:
        f = relu(t) if activation == "relu" else topk(t, 5)
        total, inner = torch.zeros((), dtype=torch.float64), t.b_dec.expand(len(t.x), -1)
        for i, (width, weight) in enumerate(zip(widths, weights, strict=True)):
            from_ = widths[i - 1] if i else 0
            on = ((places >= from_) & (places < width)).double()
            before = inner.detach() if case == "detached" and i else inner
            inner = before + (f * on) @ t.W_dec
            total = total + weight * (inner - t.x).square().mean()
        return CASES[case].get("coefficient", 1.0) * total

    assert_same_loss(sae, x, term(sae).loss, theirs, step=7, steps=10)


def test_drawn_widths(global_random_seed: int) -> None:
    """Few are large: P(width <= w) is the root of w's share; and each step has its own."""
    sae = built(global_random_seed, {"sampled": 1, "least": 2})
    drawn = torch.tensor([term(sae).widths(step) for step in range(2000)]).flatten()
    assert int(drawn.min()) == 2 and int(drawn.max()) == D_SAE - 1
    for w in (2, 5, 12):
        wanted = ((w - 2 + 1) / (D_SAE - 2)) ** 0.5
        assert float((drawn <= w).float().mean()) == pytest.approx(wanted, abs=0.05)
    many = built(global_random_seed, {"sampled": 6})
    assert term(many).widths(3) == term(many).widths(3) != term(many).widths(4)
    assert len({*term(many).widths(3)}) == 6


def test_order_follows_energy(global_random_seed: int) -> None:
    sae, x = built(global_random_seed, CASES["energy"]), rows(global_random_seed)
    assert torch.equal(term(sae).places(), torch.arange(D_SAE))  # before anything has fired
    with torch.no_grad():
        p = sae(x)
        term(sae).update(p)
        order = (p.energy / p.n).argsort(descending=True)
        assert torch.equal(term(sae).places()[order], torch.arange(D_SAE))
        assert torch.equal(term(sae).latent_columns()["matryoshka.place"], term(sae).places())
        term(sae).forget(order[:2])
        assert bool((term(sae).places()[order[:2]] >= D_SAE - 2 - int((p.energy == 0).sum())).all())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"shares": [0.01, 0.02]}, "equal, empty or falling"),
        ({"widths": [8, 4]}, "equal, empty or falling"),
        ({"widths": [4, D_SAE]}, "equal, empty or falling"),
        ({"weights": [1.0]}, "there are 4 prefixes"),
        ({"sampled": D_SAE}, "draw fewer"),
        ({"shares": [0.5, 0.25]}, "should rise strictly"),
    ],
)
def test_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(SettingError, match=message):
        data = {"losses": ["reconstruction", {"kind": "matryoshka", **settings}]}
        SAEConfig.parse({"d_sae": D_SAE, **data}).build(D_IN)
