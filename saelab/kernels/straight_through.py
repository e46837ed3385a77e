"""Straight-through gradients of a step function. Rajamanoharan et al. 2024b, eq. 11-12.

    d1[z > t]/dt   = -(1 / h) K((z - t) / h)      K the box kernel of width h
    dz 1[z > t]/dt = -(t / h) K((z - t) / h)

z gets no gradient from the step itself, unless `to_input`: the step depends on z - t alone, so the
gradient to z is then that to t with the other sign, besides the one of z 1[z > t] away from t.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class _Gate(torch.autograd.Function):
    """1[z > t] with the pseudo-derivative to t, and to z where asked for."""

    @staticmethod
    def forward(
        ctx: Any, z: Tensor, threshold: Tensor, width: Tensor | float, to_input: bool
    ) -> Tensor:
        ctx.save_for_backward(z, threshold)
        ctx.width, ctx.to_input = width, to_input
        return (z > threshold).to(z.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Any, ...]:
        (g,) = grads
        z, threshold = ctx.saved_tensors
        near = (z - threshold).abs() < ctx.width / 2
        step = (near * g) / ctx.width
        return step if ctx.to_input else None, -step, None, None


class _Jump(torch.autograd.Function):
    """z * 1[z > t] with the derivative to z away from the step and the pseudo-derivative to t, and
    to z where asked for."""

    @staticmethod
    def forward(
        ctx: Any, z: Tensor, threshold: Tensor, width: Tensor | float, to_input: bool
    ) -> Tensor:
        ctx.save_for_backward(z, threshold)
        ctx.width, ctx.to_input = width, to_input
        return z * (z > threshold)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Any, ...]:
        (g,) = grads
        z, threshold = ctx.saved_tensors
        near = (z - threshold).abs() < ctx.width / 2
        step, smooth = (near * g * threshold) / ctx.width, g * (z > threshold)
        return smooth + step if ctx.to_input else smooth, -step, None, None


def gate(z: Tensor, threshold: Tensor, width: Tensor | float, to_input: bool = False) -> Tensor:
    """Computes 1[z > t] in z's dtype; the threshold, and the width if a tensor, have z's shape."""
    return _Gate.apply(z, threshold, width, to_input)  # type: ignore[return-value]


def jump(z: Tensor, threshold: Tensor, width: Tensor | float, to_input: bool = False) -> Tensor:
    """Computes z 1[z > t]; arguments as for `gate`."""
    return _Jump.apply(z, threshold, width, to_input)  # type: ignore[return-value]
