"""A twin of an SAE in plain autograd and float64, against which parts are held."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from saelab.parts.base import Pass
from saelab.sae import SAE, SAEConfig
from saelab.seeding import torch_stream

D_IN, D_SAE, ROWS = 8, 24, 40


def rows(seed: int, n: int = ROWS) -> Tensor:
    """Raw activations [n, D_IN] with a mean."""
    return 2 * torch.randn(n, D_IN, generator=torch_stream(seed, "twin rows")) + 0.5


def small(seed: int, *, bias: float = -0.7, noise: float = 0.2, **settings: Any) -> SAE:
    """An SAE whose parameters all differ from their start; its code is sparse."""
    data = {"d_sae": D_SAE, "precision": "float32", "losses": ["reconstruction"]} | settings
    sae = SAEConfig.parse({"controllers": []} | data).build(D_IN, seed=seed)
    sae.initialise(rows(seed + 1, 200), seed)
    stream = torch_stream(seed, "twin noise")
    with torch.no_grad():
        for parameter in sae.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=stream), alpha=noise)
        sae.b_enc.add_(bias)
    return sae


class Twin:
    """Leaves in float64 by the names of an SAE's parameters, and its pass up to the code."""

    def __init__(self, sae: SAE, x: Tensor) -> None:
        named = sae.named_parameters()
        self.w = {name: p.detach().double().requires_grad_() for name, p in named}
        self.x = x.double() / sae.scale.double()
        self.buffers = {name: b.detach().clone() for name, b in sae.named_buffers()}
        self.W_dec = self.w["W_enc" if sae.config.tied else "W_dec"]
        self.b_dec = self.w["b_dec"]
        self.z = (self.x - self.b_dec) @ self.w["W_enc"].T + self.w["b_enc"]
        self.norms = self.W_dec.norm(dim=1)

    def recon(self, f: Tensor) -> Tensor:
        return f @ self.W_dec + self.b_dec

    def error(self, f: Tensor) -> Tensor:
        """|x - x_hat|^2 / d_in of each row, [N]."""
        return (self.x - self.recon(f)).square().mean(1)


def relu(t: Twin) -> Tensor:
    return torch.relu(t.z)


def topk(t: Twin, k: int) -> Tensor:
    values, latents = t.z.topk(k, dim=1)
    return torch.zeros_like(t.z).scatter(1, latents, torch.relu(values))


def assert_same_loss(
    sae: SAE,
    x: Tensor,
    ours: Callable[[Pass], Tensor],
    theirs: Callable[[Twin], Tensor],
    paths: tuple[bool, ...] = (True, False),
    **given: Any,
) -> None:
    """Holds a loss and its gradients to all parameters against the twin's, on both paths.

    Args:
        ours: a function of a pass, such as the `loss` of a term.
        theirs: the same of the twin.
        paths: True for the sparse path, False for the dense one.
        given: further arguments of the pass.
    """
    for sparse in paths:
        support = sae.activation.support
        if not sparse:
            sae.activation.support = lambda z, *_: None  # type: ignore[method-assign]
        sae.zero_grad()
        p = sae(x, **given)
        sae.activation.support = support  # type: ignore[method-assign]
        assert (p.code.support is not None) == sparse
        loss, twin = ours(p), Twin(sae, x)
        loss.backward()
        wanted = theirs(twin)
        wanted.backward()
        torch.testing.assert_close(loss.double(), wanted.detach(), rtol=2e-5, atol=1e-8)
        touched = 0
        for name, parameter in sae.named_parameters():
            grads = parameter.grad, twin.w[name].grad
            got, right = (
                torch.zeros_like(twin.w[name]) if g is None else g.double() for g in grads
            )
            size = float(right.abs().max())
            torch.testing.assert_close(got, right, rtol=1e-4, atol=1e-5 * size + 1e-9, msg=name)
            touched += size > 0
        assert touched
