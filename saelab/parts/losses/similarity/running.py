"""Running mean and standard deviation of each latent's code.

    ema <- m ema + (1 - m) * batch mean of (f, f^2),    weight <- m weight + (1 - m)

ema / weight is exactly bias-corrected from the first step, for every latent since its own start.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from saelab.kernels import Code

#: Smallest standard deviation, relative to the median over living latents.
STD_FLOOR = 1e-3


class LatentMoments(nn.Module):
    ema: Tensor
    weight: Tensor

    def __init__(self, d_sae: int, momentum: float) -> None:
        super().__init__()
        self.momentum = momentum
        self.register_buffer("ema", torch.zeros(2, d_sae, dtype=torch.float32))
        self.register_buffer("weight", torch.zeros(d_sae, dtype=torch.float32))

    @torch.no_grad()
    def standard(self, code: Code, n: int) -> tuple[Tensor, Tensor]:
        """Mean and floored std of every latent, [d_sae] each; of this batch where none is gathered.

        Args:
            n: rows of the code.
        """
        gathered = self.weight > 0
        if bool(gathered.all()):
            mean, square = self.ema / self.weight
        else:
            sums = torch.stack(code.sums) / n
            tiny = torch.finfo(sums.dtype).tiny
            mean, square = torch.where(gathered, self.ema / self.weight.clamp_min(tiny), sums)
        std = std_of(mean, square)
        living = std[std > 0]
        floor = STD_FLOOR * float(living.median()) if living.numel() else 1.0
        return mean, std.clamp_min(floor)

    @torch.no_grad()
    def gather(self, code: Code, n: int) -> None:
        batch = torch.stack(code.sums) / n
        self.ema.mul_(self.momentum).add_(batch, alpha=1 - self.momentum)
        self.weight.mul_(self.momentum).add_(1 - self.momentum)

    def forget(self, latents: Tensor) -> None:
        self.ema[:, latents] = 0
        self.weight[latents] = 0


def std_of(mean: Tensor, square: Tensor) -> Tensor:
    """sqrt(E f^2 - (E f)^2), 0 where rounding makes it negative."""
    return (square - mean.square()).clamp_min(0).sqrt()
