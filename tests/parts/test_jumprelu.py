"""JumpReLU's gradients are the pseudo-derivatives of its source, and its thresholds move.

df/dt  = -(t / h) * 1[|z - t| < h / 2],  d1/dt = -(1 / h) * 1[|z - t| < h / 2],  t = exp(log t)
"""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from saelab.data.activations.stream import Batch
from saelab.kernels import Support
from saelab.parts.activations.jumprelu import JumpReLU, JumpReLUConfig
from saelab.parts.base import Dims
from saelab.sae import SAEConfig
from saelab.seeding import torch_stream
from saelab.training.loop import Cell
from saelab.training.optim import TrainConfig

T, H = 0.5, 0.4  # the kernel covers (0.3, 0.7)
#: z, f, df/dz, near the threshold
CASES = [
    (-1.0, 0.0, 0.0, False),
    (0.29, 0.0, 0.0, False),
    (0.31, 0.0, 0.0, True),
    (0.49, 0.0, 0.0, True),
    (0.51, 0.51, 1.0, True),
    (0.69, 0.69, 1.0, True),
    (0.71, 0.71, 1.0, False),
    (3.0, 3.0, 1.0, False),
]


def jumprelu(d_sae: int, threshold: float = T) -> JumpReLU:
    return JumpReLU(JumpReLUConfig(threshold=threshold, bandwidth=H), Dims(2, d_sae))


def gradient(part: JumpReLU) -> Tensor:
    assert part.log_threshold.grad is not None
    return part.log_threshold.grad


@pytest.mark.parametrize(("z", "f", "slope", "near"), CASES)
@pytest.mark.parametrize("sparse", [False, True])
def test_jump_by_hand(z: float, f: float, slope: float, near: bool, sparse: bool) -> None:
    part = jumprelu(1)
    pre = torch.tensor([z] if sparse else [[z]], requires_grad=True)
    support = Support(torch.tensor([0, 1]), torch.tensor([0]), 1)
    code = part.at(pre, support) if sparse else part.dense(pre)
    (2.0 * code).sum().backward()
    assert code.item() == pytest.approx(f)
    assert pre.grad is not None and pre.grad.item() == pytest.approx(2.0 * slope)
    wanted = -2.0 * (T / H) * near * T  # the last T: d t / d log t
    assert gradient(part).item() == pytest.approx(wanted, rel=1e-5)


@pytest.mark.parametrize(("z", "f", "slope", "near"), CASES)
def test_gate_by_hand(z: float, f: float, slope: float, near: bool) -> None:
    part = jumprelu(1)
    pre = torch.tensor([[z]], requires_grad=True)
    gate = part.gate(pre, None)
    (2.0 * gate).sum().backward()
    assert gate.item() == float(f > 0)
    assert pre.grad is None or pre.grad.item() == 0
    assert gradient(part).item() == pytest.approx(-2.0 * (1 / H) * near * T, rel=1e-5)


def test_margin_holds_every_pair_with_a_gradient(global_random_seed: int) -> None:
    """Training keeps pairs down to half a bandwidth below; evaluation only those that fire."""
    part = jumprelu(64)
    z = torch.randn(20, 64, generator=torch_stream(global_random_seed, "margin")) - 1.2
    support = part.support(z)
    assert support is not None
    wanted = z > T - H / 2
    assert torch.equal(support.flat, wanted.flatten().nonzero().flatten())
    part.eval()
    support = part.support(z)
    assert support is not None
    assert torch.equal(support.flat, (z > T).flatten().nonzero().flatten())


@pytest.mark.parametrize("sparse", [False, True])
def test_gradients_add_over_rows(sparse: bool, global_random_seed: int) -> None:
    part = jumprelu(32)
    z = torch.randn(50, 32, generator=torch_stream(global_random_seed, "rows")) * 0.5 - 0.9
    up = torch.randn(50, 32, generator=torch_stream(global_random_seed, "up"))
    if sparse:
        support = part.support(z)
        assert support is not None
        (part.at(z.flatten()[support.flat], support) * up.flatten()[support.flat]).sum().backward()
    else:
        (part.dense(z) * up).sum().backward()
    near = (z - T).abs() < H / 2
    assert near.any(0).any()
    wanted = -(up * near).sum(0) * (T / H) * T
    torch.testing.assert_close(gradient(part), wanted, rtol=1e-5, atol=1e-6)


def train_step_l0(coefficient: float, steps: int, seed: int) -> Cell:
    config = SAEConfig.parse(
        {
            "d_sae": 32,
            "activation": {"kind": "jumprelu", "threshold": 0.5, "bandwidth": 0.5},
            "losses": ["reconstruction", {"kind": "l0", "coefficient": coefficient}],
            "controllers": [],
            "precision": "float32",
        }
    )
    x = torch.randn(64, 8, generator=torch_stream(seed, "jumprelu data"))
    training = TrainConfig(tokens=64 * steps, batch_size=64, warmup=0, decay=0)
    cell = Cell("jumprelu", config, training, x, seed)
    for _ in range(steps):
        cell.step(Batch(x, torch.zeros(64, dtype=torch.int64)))
    return cell


def test_first_step_by_hand(global_random_seed: int) -> None:
    """Adam's first step moves each log threshold by its own rate against the gradient's sign."""
    cell = train_step_l0(0.1, 1, global_random_seed)
    activation = cell.sae.activation
    assert isinstance(activation, JumpReLU)
    moved = activation.log_threshold.detach() - math.log(0.5)
    first = cell.optimiser.moments()[activation.log_threshold]["exp_avg"]  # (1 - beta1) gradient
    touched = first.abs() > 1e-7
    assert touched.any()
    wanted = -1e-2 * first.sign()
    torch.testing.assert_close(moved[touched], wanted[touched], rtol=1e-3, atol=1e-6)


def test_penalty_moves_thresholds_and_l0(global_random_seed: int) -> None:
    free, pressed = (train_step_l0(c, 60, global_random_seed) for c in (0.0, 0.1))
    forms = [cell.sae.activation.export() for cell in (free, pressed)]
    thresholds = [form.threshold for form in forms if form and form.threshold is not None]
    start = torch.full_like(thresholds[0], 0.5)
    assert (thresholds[1] - start).abs().mean() > 0.05
    assert thresholds[1].mean() > thresholds[0].mean() + 0.05
    assert pressed.log.last("l0") < free.log.last("l0")
