"""Balances: the share alpha = sigmoid(a) of S_act and 1 - alpha of S_w.

    fixed          alpha as given
    frozen_random  alpha drawn once
    replay         another run's path of alpha
    descent        a follows the loss; dL/dalpha = S_act - S_w, so it runs to the smaller term
    uncertainty    sum_i exp(-s_i) S_i + s_i, alpha = sigmoid(s_w - s_act); Kendall et al. 2018
    minimax        a <- (1 - eta) a + eta (S_act - S_w) / h: weight goes to the larger term
    gradnorm       a = log R_w - log R_act, equal shares of the gradient; after Chen et al. 2018

S are the terms over their norms; R their gradients' norms, of S_w at W_dec and of S_act at W_enc.
alpha and 1 - alpha add up to 1 under every balance, so the penalty's total strength is the same.
The entropy h makes minimax settle at alpha = sigmoid((S_act - S_w) / h).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from saelab.seeding import torch_stream

if TYPE_CHECKING:
    from saelab.parts.losses.similarity import SimilarityConfig

#: Where a random alpha may lie: inside it, a balance does not count as collapsed.
RANGE = (0.02, 0.98)


@dataclass(frozen=True)
class Terms:
    """The two terms over their norms, and the norms of their gradients, likewise divided."""

    act: float
    weight: float
    act_gradient: float
    weight_gradient: float


class Balance(nn.Module):
    """Rule for alpha; `update` is called in steps in which the penalty acts."""

    def alpha(self, step: int, steps: int) -> Tensor:
        """Share of S_act, float32 0-dim, with gradient where it is learned on the loss."""
        raise TypeError(f"{type(self).__name__} has no alpha()")

    def objective(self, act: Tensor, weight: Tensor) -> Tensor | None:
        """Term that a learned balance adds to the loss; its value is 0, its gradient is not."""

    def update(self, terms: Terms) -> None: ...


class Fixed(Balance):
    value: Tensor

    def __init__(self, alpha: float) -> None:
        super().__init__()
        self.register_buffer("value", torch.tensor(alpha, dtype=torch.float32))

    def alpha(self, step: int, steps: int) -> Tensor:
        return self.value


class Replay(Balance):
    path: Tensor

    def __init__(self, path: tuple[float, ...]) -> None:
        super().__init__()
        self.register_buffer("path", torch.tensor(path, dtype=torch.float32))

    def alpha(self, step: int, steps: int) -> Tensor:
        """The path's value at the same share of the run."""
        return self.path[min(len(self.path) - 1, step * len(self.path) // max(1, steps))]


class Descent(Balance):
    def __init__(self, alpha: float) -> None:
        super().__init__()
        self.a = nn.Parameter(torch.tensor(_logit(alpha), dtype=torch.float32))

    def alpha(self, step: int, steps: int) -> Tensor:
        return self.a.sigmoid()


class Uncertainty(Balance):
    def __init__(self, alpha: float) -> None:
        super().__init__()
        half = _logit(alpha) / 2
        self.log_variance = nn.Parameter(torch.tensor([-half, half], dtype=torch.float32))

    def alpha(self, step: int, steps: int) -> Tensor:
        act, weight = self.log_variance.detach()
        return (weight - act).sigmoid()

    def objective(self, act: Tensor, weight: Tensor) -> Tensor:
        s = self.log_variance
        value = ((-s).exp() * torch.stack([act, weight]).to(s.dtype) + s).sum()
        return value - value.detach()


class _Stepped(Balance):
    """A balance whose logit moves by a rule instead of a gradient."""

    a: Tensor

    def __init__(self, alpha: float) -> None:
        super().__init__()
        self.register_buffer("a", torch.tensor(_logit(alpha), dtype=torch.float32))

    def alpha(self, step: int, steps: int) -> Tensor:
        return self.a.sigmoid()


class Minimax(_Stepped):
    def __init__(self, alpha: float, eta: float, entropy: float) -> None:
        super().__init__(alpha)
        self.eta, self.entropy = eta, entropy

    def update(self, terms: Terms) -> None:
        aim = (terms.act - terms.weight) / self.entropy
        self.a.mul_(1 - self.eta).add_(self.eta * aim)


class GradNorm(_Stepped):
    """The logarithms are EMAs that start at the given alpha; a step without gradient is skipped."""

    def __init__(self, alpha: float, momentum: float) -> None:
        super().__init__(alpha)
        self.momentum = momentum

    def update(self, terms: Terms) -> None:
        if terms.act_gradient > 0 and terms.weight_gradient > 0:
            ratio = math.log(terms.weight_gradient) - math.log(terms.act_gradient)
            self.a.mul_(self.momentum).add_((1 - self.momentum) * ratio)


def build_balance(config: SimilarityConfig, seed: int) -> Balance:
    match config.balance:
        case "fixed":
            return Fixed(config.alpha)
        case "frozen_random":
            low, high = RANGE
            drawn = torch.rand(
                (), generator=torch_stream(seed, "similarity balance"), dtype=torch.float32
            )
            return Fixed(low + (high - low) * float(drawn))
        case "replay":
            return Replay(config.path)
        case "descent":
            return Descent(config.alpha)
        case "uncertainty":
            return Uncertainty(config.alpha)
        case "minimax":
            return Minimax(config.alpha, config.eta, config.entropy)
        case "gradnorm":
            return GradNorm(config.alpha, config.momentum)


def _logit(share: float) -> float:
    return math.log(share) - math.log1p(-share)
