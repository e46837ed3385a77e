"""Signed codes: the plain sum by autograd, and nothing that depends on a latent's direction."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from saelab.checks.examples import Case, cases
from saelab.data.activations.stream import Batch
from saelab.errors import SettingError
from saelab.sae import SAE, SAEConfig
from saelab.seeding import torch_stream
from saelab.training.loop import Cell
from saelab.training.optim import TrainConfig

D_IN, D_SAE, ROWS, K = 8, 32, 64, 4


def data(seed: int) -> Tensor:
    x = torch.randn(ROWS, D_IN, generator=torch_stream(seed, "signed data"))
    return 2 * x * torch.linspace(0.5, 2, D_IN) + 1


def cell(config: SAEConfig, seed: int) -> Cell:
    training = TrainConfig(tokens=100 * ROWS, batch_size=ROWS, lr=1e-2)
    return Cell("cell", config, training, data(seed), seed)


def test_gradients_are_those_of_the_plain_sum(global_random_seed: int) -> None:
    settings = {"d_sae": D_SAE, "activation": {"kind": "abs_topk", "k": K}, "precision": "float32"}
    sae = cell(SAEConfig.parse(settings | {"losses": ["reconstruction"]}), global_random_seed).sae
    p = sae(data(global_random_seed))
    assert p.code.support is not None
    sae.losses["reconstruction"].loss(p).backward()  # type: ignore[operator]
    twins = [
        w.detach().clone().requires_grad_() for w in (sae.W_enc, sae.b_enc, sae.W_dec, sae.b_dec)
    ]
    w_enc, b_enc, w_dec, b_dec = twins
    z = (p.x - b_dec) @ w_enc.T + b_enc
    f = z * (z.abs() >= z.abs().topk(K, dim=1).values[:, -1:])
    (f @ w_dec + b_dec - p.x).square().sum(1).mean().div(D_IN).backward()
    assert bool((f < 0).any())
    for ours, twin in zip((sae.W_enc, sae.b_enc, sae.W_dec, sae.b_dec), twins, strict=True):
        torch.testing.assert_close(ours.grad, twin.grad, rtol=1e-4, atol=1e-6)


#: SAEs with signed codes and one further part each.
AROUND = [case for case in cases(D_SAE) if case.seam != "activation"]


def signed(case: Case) -> SAEConfig:
    """The part's example with a signed activation; with its own k, where it reads pre-activations
    to set one."""
    config = case.settings(D_SAE)
    k = getattr(config.activation, "k", K)
    return config.patched({"activation": {"kind": "abs_topk", "k": k}})


def fits(case: Case) -> bool:
    try:
        signed(case).build(D_IN)
    except SettingError as refusal:
        missing = ("threshold", "gate")  # which a signed code does not have
        assert any(word in refusal.remedy for word in missing), str(refusal)
        return False
    return True


@pytest.mark.parametrize("case", [case for case in AROUND if fits(case)], ids=str)
def test_training_does_not_depend_on_the_latents_signs(case: Case, global_random_seed: int) -> None:
    """Half of the latents turned round at the start: the same losses, the same latents, turned."""
    one, other = (cell(signed(case), global_random_seed) for _ in range(2))
    with torch.no_grad():
        one.sae.b_enc[:8] = 1e-4  # a few that hardly fire, so that some die
        one.sae.W_enc[:8] *= 1e-3
        for own, turned in zip(turnable(one.sae), turnable(other.sae), strict=True):
            turned.copy_(own)
            turned[::2] *= -1
    for i in range(5):
        x = Batch(data(global_random_seed + i), torch.arange(ROWS))
        one.step(x)
        other.step(x)
    for name, column in one.log.columns.items():
        wanted, found = torch.from_numpy(column[:5]), torch.from_numpy(other.log.columns[name][:5])
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5, msg=name, equal_nan=True)
    if not one.sae.observers:  # a reset draws a direction, with a sign of its own
        for own, turned in zip(turnable(one.sae), turnable(other.sae), strict=True):
            signs = torch.ones(D_SAE).view(-1, *[1] * (own.dim() - 1))
            signs[::2] = -1
            torch.testing.assert_close(turned * signs, own, rtol=1e-3, atol=1e-4)


def turnable(sae: SAE) -> list[Tensor]:
    return [sae.W_enc.detach(), sae.b_enc.detach(), sae.W_dec.detach()]


def test_most_parts_stand_beside_a_signed_code() -> None:
    of_gates = {"loss-gate_l1", "loss-gate_l1-2", "loss-lp-2"}
    of_gates |= {"loss-gate_reconstruction", "loss-gate_reconstruction-2"}
    of_thresholds = {"loss-l0", "loss-preactivation", "loss-quadratic_l0", "loss-quadratic_l0-2"}
    assert {str(case) for case in AROUND if not fits(case)} == of_gates | of_thresholds


def test_dead_latents_are_chosen_by_size(global_random_seed: int) -> None:
    auxk = {"kind": "auxk", "k": 1, "dead_after": 1}
    settings = {"d_sae": 4, "activation": {"kind": "abs_topk", "k": 1}, "precision": "float32"}
    sae = SAEConfig.parse(settings | {"losses": ["reconstruction", auxk]}).build(2)
    with torch.no_grad():
        sae.W_enc.copy_(torch.tensor([[9.0, 0], [0, 1], [0, -2], [0, 0]]))
        sae.W_dec.copy_(torch.tensor([[0.0, 0], [0, 3], [0, -0.5], [0, 0]]))
    term = sae.loss_terms()["auxk"]
    term.get_buffer("silent")[1:3] = 10**6
    p = sae(torch.tensor([[1.0, 1.0]]))  # f_0 = 9 alone, x_hat = 0: all is left over
    # of the dead, z = (1, -2): the second is larger in size and adds (0, 1), so (1, 0) is left
    assert float(term.loss(p).detach()) == pytest.approx(0.5 / 32)


def test_l1_takes_sizes() -> None:
    l1 = {"kind": "l1", "coefficient": 1.0}
    settings = {"d_sae": 2, "activation": {"kind": "abs_topk", "k": 2}, "precision": "float32"}
    sae = SAEConfig.parse(settings | {"losses": [l1]}).build(1)
    with torch.no_grad():
        sae.W_enc.copy_(torch.tensor([[2.0], [-3.0]]))
        sae.W_dec.copy_(torch.tensor([[1.0], [-0.5]]))
    p = sae(torch.tensor([[1.0]]))  # f = (2, -3), norms (1, .5)
    loss = sae.loss_terms()["l1"].loss(p)
    assert float(loss.detach()) == pytest.approx(2 + 1.5)
    loss.backward()
    assert sae.b_enc.grad is not None and sae.b_enc.grad.tolist() == [1.0, -0.5]
