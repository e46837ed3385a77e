"""The Lp penalty and its gradients are those of its equation, and p moves as its settings say."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from twins import D_IN, ROWS, Twin, assert_same_loss, relu, rows, small

from saelab.errors import SettingError
from saelab.parts.activations.gated import Gated
from saelab.parts.losses.lp import Lp
from saelab.sae import SAE, SAEConfig


def term(sae: SAE) -> Lp:
    found = sae.loss_terms()["lp"]
    assert isinstance(found, Lp)
    return found


def penalty(sizes: Tensor, p: float, s: float) -> Tensor:
    on = sizes[sizes > 0]
    return ((on + s) ** p - s**p).sum() / (ROWS * math.sqrt(D_IN) ** p)


@pytest.mark.parametrize("p", [1.0, 0.5, 0.2])
@pytest.mark.parametrize("norms", [True, False])
def test_against_autograd(p: float, norms: bool, global_random_seed: int) -> None:
    lp = {"kind": "lp", "coefficient": 0.3, "start": p, "smooth": 1e-2, "decoder_norms": norms}
    sae = small(global_random_seed, losses=["reconstruction", lp])

    def theirs(t: Twin) -> Tensor:
        return 0.3 * penalty(relu(t) * (t.norms if norms else 1.0), p, 1e-2)

    assert_same_loss(sae, rows(global_random_seed), term(sae).loss, theirs)


def test_on_the_gate(global_random_seed: int) -> None:
    lp = {"kind": "lp", "of": "gate", "coefficient": 0.3, "start": 0.5, "decoder_norms": False}
    losses = ["reconstruction", lp, "gate_reconstruction"]
    sae = small(global_random_seed, losses=losses, activation="gated", constraints=["unit_norm"])

    def theirs(t: Twin) -> Tensor:
        return 0.3 * penalty(torch.relu(t.z + t.w["activation.b_gate"]), 0.5, 1e-3)

    assert_same_loss(sae, rows(global_random_seed), term(sae).loss, theirs)
    with pytest.raises(SettingError, match="has no gate: choose gated"):
        SAEConfig.parse({"d_sae": 8, "losses": ["reconstruction", lp]}).build(4)


def test_p_of_one_without_smoothing_is_l1(global_random_seed: int) -> None:
    both = [{"kind": kind, "coefficient": 0.2} for kind in ("lp", "l1")]
    both[0] |= {"smooth": 0.0}
    sae = small(global_random_seed, losses=["reconstruction", *both])
    p = sae(rows(global_random_seed))
    ours, l1 = (sae.loss_terms()[kind].loss(p) for kind in ("lp", "l1"))
    torch.testing.assert_close(ours, l1)


@pytest.mark.parametrize(("updates", "at_half"), [(0, 0.6), (4, 0.6), (1, 1.0), (3, 1 - 0.8 / 3)])
def test_p_falls(updates: int, at_half: float, global_random_seed: int) -> None:
    lp = {"kind": "lp", "coefficient": 0.1, "begin": 0.0, "updates": updates, "keep": False}
    sae = small(global_random_seed, losses=["reconstruction", lp])
    with torch.no_grad():
        for step, wanted in ((0, None), (49, at_half), (99, 0.2)):
            term(sae).update(sae(rows(global_random_seed), step, 100))
            assert wanted is None or float(term(sae).p) == pytest.approx(wanted)
    assert float(term(sae).c) == 1


@pytest.mark.parametrize(("step", "wanted"), [(28, 0.8), (29, 0.6), (38, 0.6), (39, 0.4)])
def test_p_moves_at_its_steps_in_spite_of_rounding(step: int, wanted: float) -> None:
    """Between 0.2 and 1 of 50 steps in 4 updates: after the steps 20, 30, 40 and 50."""
    lp = {"kind": "lp", "coefficient": 0.1, "begin": 0.2, "updates": 4, "keep": False}
    sae = small(0, losses=["reconstruction", lp])
    with torch.no_grad():
        term(sae).update(sae(rows(0), step, 50))
    assert float(term(sae).p) == pytest.approx(wanted)


def test_the_penalty_is_kept_as_the_loss_had_it(global_random_seed: int) -> None:
    """The parameters move between the loss and the update of its factor."""
    lp = {"kind": "lp", "coefficient": 0.1, "begin": 0.0, "of": "gate", "decoder_norms": False}
    losses = ["reconstruction", lp, "gate_reconstruction"]
    factors = []
    for moved in (False, True):
        sae = small(
            global_random_seed, activation="gated", constraints=["unit_norm"], losses=losses
        )
        p = sae(rows(global_random_seed), 30, 100)
        term(sae).loss(p)
        with torch.no_grad():
            if moved:
                assert isinstance(sae.activation, Gated)
                sae.activation.b_gate.add_(0.5)
            term(sae).update(p)
        factors.append(float(term(sae).c))
    assert factors[0] == factors[1] != 1


def test_the_penalty_stays_when_p_moves(global_random_seed: int) -> None:
    lp = {"kind": "lp", "coefficient": 0.1, "begin": 0.0}
    sae, x = small(global_random_seed, losses=["reconstruction", lp]), rows(global_random_seed)
    with torch.no_grad():
        p = sae(x, 30, 100)
        before = term(sae).loss(p)
        term(sae).update(p)
        assert float(term(sae).p) < 1 and float(term(sae).c) != 1
        torch.testing.assert_close(term(sae).loss(p), before)


def test_p_must_have_time() -> None:
    with pytest.raises(SettingError, match="must be below until"):
        lp = {"kind": "lp", "begin": 0.6, "until": 0.5}
        SAEConfig.parse({"d_sae": 8, "losses": ["reconstruction", lp]}).build(4)
