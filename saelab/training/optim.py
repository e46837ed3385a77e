"""The optimiser: fused Adam, one group per learning rate, moments cleared per latent."""

from __future__ import annotations

import torch
from pydantic import Field, PositiveFloat, PositiveInt
from torch import Tensor, nn

from saelab.config import Frozen
from saelab.sae import SAE

WEIGHTS = "weights"


class TrainConfig(Frozen):
    """How a cell is trained.

    Args:
        tokens: rows of activations that the stream hands out.
        batch_size: rows per step.
        lr: Adam's learning rate of the weights.
        warmup: share of the run with a linearly rising rate.
        decay: share of the run, at its end, with a rate that falls linearly to 0.
        grad_clip: largest norm of the weights' gradient.
        positions: train on token positions [low, high) only.
    """

    tokens: PositiveInt = 524_288
    batch_size: PositiveInt = 512
    lr: PositiveFloat = 1e-3
    warmup: float = Field(default=0.05, ge=0, le=1)
    decay: float = Field(default=0.2, ge=0, le=1)
    betas: tuple[float, float] = (0.9, 0.999)
    grad_clip: PositiveFloat = 1.0
    positions: tuple[int, int] | None = None

    @property
    def steps(self) -> int:
        return max(1, self.tokens // self.batch_size)

    def rate(self, step: int) -> float:
        """Share of the full learning rate at a step, in (0, 1]."""
        rise = (step + 1) / max(1.0, self.warmup * self.steps)
        fall = (self.steps - step) / max(1.0, self.decay * self.steps)
        return min(1.0, rise, fall)


class Optimiser:
    """Adam over the weights and, in a group each, over every part's own parameters."""

    def __init__(self, sae: SAE, config: TrainConfig) -> None:
        self.config = config
        weights = [p for p in (sae.W_enc, sae.b_enc, sae.W_dec, sae.b_dec) if p.requires_grad]
        groups: list[dict[str, object]] = [{"params": weights, "name": WEIGHTS, "full": config.lr}]
        for part in sae.parts():
            own = [p for p in part.parameters() if p.requires_grad]
            if own:
                name, full = type(part).__name__, part.lr if part.lr is not None else config.lr
                groups.append(
                    {"params": own, "name": name, "full": full, "maximize": part.maximise}
                )
        self.adam = torch.optim.Adam(groups, lr=config.lr, betas=config.betas, fused=True)

    def clip(self) -> float:
        """Clips the weights' gradient; returns its norm before, and inf or NaN as it is."""
        grads = [p.grad for p in self.adam.param_groups[0]["params"] if p.grad is not None]
        norm = float(nn.utils.get_total_norm(grads))
        if norm > self.config.grad_clip:
            for grad in grads:
                grad.mul_(self.config.grad_clip / norm)
        return norm

    def step(self, step: int) -> None:
        rate = self.config.rate(step)
        for group in self.adam.param_groups:
            group["lr"] = group["full"] * rate
        self.adam.step()

    def zero_grad(self) -> None:
        self.adam.zero_grad(set_to_none=True)

    @torch.no_grad()
    def clear(self, sae: SAE, latents: Tensor) -> None:
        """Clears the moments of the given latents; all others stay bitwise as they were."""
        for parameter in (sae.W_enc, sae.b_enc, sae.W_dec, *sae.activation.parameters()):
            state = self.adam.state.get(parameter, {})
            for name in ("exp_avg", "exp_avg_sq"):
                moment = state.get(name)
                if moment is not None and moment.dim() and moment.shape[0] == sae.d_sae:
                    moment[latents] = 0
