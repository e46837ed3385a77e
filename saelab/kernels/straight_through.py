"""Straight-through gradients of a step function. Rajamanoharan et al. 2024b, eq. 11-12.

    d1[z > t]/dt   = -(1 / h) K((z - t) / h)      K the box kernel of width h
    dz 1[z > t]/dt = -(t / h) K((z - t) / h)

z gets no gradient from the step itself.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class _Gate(torch.autograd.Function):
    """1[z > t] with the pseudo-derivative to t; z gets no gradient."""

    @staticmethod
    def forward(ctx: Any, z: Tensor, threshold: Tensor, width: Tensor | float) -> Tensor:
        ctx.save_for_backward(z, threshold)
        ctx.width = width
        return (z > threshold).to(z.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Any, ...]:
        (g,) = grads
        z, threshold = ctx.saved_tensors
        near = (z - threshold).abs() < ctx.width / 2
        return None, -(near * g) / ctx.width, None


class _Jump(torch.autograd.Function):
    """z * 1[z > t] with the derivative to z away from the step and the pseudo-derivative to t."""

    @staticmethod
    def forward(ctx: Any, z: Tensor, threshold: Tensor, width: Tensor | float) -> Tensor:
        ctx.save_for_backward(z, threshold)
        ctx.width = width
        return z * (z > threshold)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Any, ...]:
        (g,) = grads
        z, threshold = ctx.saved_tensors
        near = (z - threshold).abs() < ctx.width / 2
        return g * (z > threshold), -(near * g * threshold) / ctx.width, None


def gate(z: Tensor, threshold: Tensor, width: Tensor | float) -> Tensor:
    """Computes 1[z > t] in z's dtype; the threshold, and the width if a tensor, have z's shape."""
    return _Gate.apply(z, threshold, width)  # type: ignore[return-value]


def jump(z: Tensor, threshold: Tensor, width: Tensor | float) -> Tensor:
    """Computes z 1[z > t]; arguments as for `gate`."""
    return _Jump.apply(z, threshold, width)  # type: ignore[return-value]
