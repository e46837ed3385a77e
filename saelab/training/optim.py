"""The optimiser: fused Adam, one group per learning rate, moments cleared per latent."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Annotated, ClassVar, cast

import torch
from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt
from torch import Tensor, nn

from saelab.config import Frozen
from saelab.sae import SAE
from saelab.training.state import State, as_number, as_plain

WEIGHTS = "weights"
#: Added to the square root of the second moment; Adam's usual value.
EPSILON = 1e-8


#: Decay of a moment of Adam.
Beta = Annotated[float, Field(ge=0, lt=1)]


class TrainConfig(Frozen):
    """Settings of a cell's training.

    Args:
        tokens: rows of activations that the stream hands out.
        batch_size: rows per step.
        lr: Adam's learning rate for the weights.
        warmup: share of the run, at its start, in which the rate rises linearly.
        decay: share of the run, at its end, in which the rate falls linearly to 0.
        betas: decay of Adam's two moments.
        grad_clip: largest norm of the weights' gradient.
        positions: train on token positions [low, high) only.
    """

    always_shown: ClassVar[frozenset[str]] = frozenset({"tokens", "lr"})

    tokens: PositiveInt = 524_288
    batch_size: PositiveInt = 512
    lr: PositiveFloat = 1e-3
    warmup: float = Field(default=0.05, ge=0, le=1)
    decay: float = Field(default=0.2, ge=0, le=1)
    betas: tuple[Beta, Beta] = (0.9, 0.999)
    grad_clip: PositiveFloat = 1.0
    positions: tuple[NonNegativeInt, PositiveInt] | None = None

    @property
    def steps(self) -> int:
        """Number of optimiser steps."""
        return max(1, self.tokens // self.batch_size)

    def rate(self, step: int) -> float:
        """Returns the share of the full learning rate at a step, in (0, 1]."""
        rise = (step + 1) / max(1.0, self.warmup * self.steps)
        fall = (self.steps - step) / max(1.0, self.decay * self.steps)
        return min(1.0, rise, fall)


@dataclass(eq=False)
class Group:
    """Parameters that share one learning rate, with Adam's moments of each.

    `travel` is the sum of the rates of all steps: about as far as Adam can move an entry.
    """

    name: str
    parameters: list[nn.Parameter]
    lr: float
    maximise: bool
    travel: float = field(init=False, default=0.0)
    first: list[Tensor] = field(init=False)
    second: list[Tensor] = field(init=False)
    steps: list[Tensor] = field(init=False)

    def __post_init__(self) -> None:
        self.first = [torch.zeros_like(p) for p in self.parameters]
        self.second = [torch.zeros_like(p) for p in self.parameters]
        self.steps = [
            torch.zeros((), device=p.device, dtype=torch.float32) for p in self.parameters
        ]

    def _indices_with_gradient(self) -> list[int]:
        return [i for i, p in enumerate(self.parameters) if p.grad is not None]

    @torch.no_grad()
    def step(self, lr: float, betas: tuple[float, float]) -> None:
        """Takes one step with torch's fused kernel, called as `torch.optim.Adam(fused=True)` calls
        it but without that class's bookkeeping, which costs a sixth of a small step."""
        indices = self._indices_with_gradient()
        self.travel += lr
        if not indices:
            return
        steps = [self.steps[i] for i in indices]
        for count in steps:
            count.add_(1)
        torch._fused_adam_(  # type: ignore[attr-defined]
            [self.parameters[i] for i in indices],
            [cast(Tensor, self.parameters[i].grad) for i in indices],
            [self.first[i] for i in indices],
            [self.second[i] for i in indices],
            [],
            steps,
            lr=lr,
            beta1=betas[0],
            beta2=betas[1],
            weight_decay=0.0,
            eps=EPSILON,
            amsgrad=False,
            maximize=self.maximise,
        )


def _sum_of_squares(x: Tensor) -> float:
    flat = x.reshape(-1)
    return float(torch.dot(flat, flat))


class Optimiser:
    """Adam (Kingma and Ba 2015) with one group for the weights and further groups for the parts."""

    def __init__(self, sae: SAE, config: TrainConfig) -> None:
        self.config, self.ranks = config, sae.ranks
        weights = {"W_enc": sae.W_enc, "b_enc": sae.b_enc, "W_dec": sae.W_dec, "b_dec": sae.b_dec}
        if sae.config.tied:  # one parameter for both
            del weights["W_enc"]
        if sae.W_skip is not None:
            weights["W_skip"] = sae.W_skip
        weights = {name: weight for name, weight in weights.items() if weight.requires_grad}
        self.groups = [Group(WEIGHTS, list(weights.values()), config.lr, maximise=False)]
        self.weights = list(weights)
        #: Norm of the gradient of each weight before the last clip.
        self.norms: dict[str, float] = {}
        for part in sae.parts():
            for name, parameters, lr in part.groups():
                rate = lr if lr is not None else config.lr
                self.groups.append(Group(name, parameters, rate, part.maximise))

    def clip(self) -> float:
        """Clips the gradient of the weights; returns its norm before the clip, also if that is inf
        or NaN."""
        weights = zip(self.weights, self.groups[0].parameters, strict=True)
        grads = {name: p.grad for name, p in weights if p.grad is not None}
        squares = self._over_ranks({name: _sum_of_squares(g) for name, g in grads.items()})
        self.norms = {name: math.sqrt(square) for name, square in squares.items()}
        norm = math.sqrt(sum(squares.values()))
        if norm > self.config.grad_clip:
            for grad in grads.values():
                grad.mul_(self.config.grad_clip / norm)
        return norm

    def _over_ranks(self, squares: dict[str, float]) -> dict[str, float]:
        """Returns the squared norms of whole gradients from those of this rank's latents; b_dec
        and W_skip are whole on every rank."""
        if self.ranks.latents == 1:
            return squares
        split = [name for name in squares if name not in ("b_dec", "W_skip")]
        totals = self.ranks.total_over_latents(*(squares[name] for name in split))
        return squares | dict(zip(split, totals, strict=True))

    def gather(self) -> None:
        """Adds up the gradients of the ranks that have other rows of the batch."""
        if self.ranks.data == 1:
            return
        parameters = [p for group in self.groups for p in group.parameters]
        self.ranks.add_gradients([p.grad for p in parameters if p.grad is not None])

    def step(self, step: int) -> None:
        """Moves all groups, with the learning rates of that step."""
        for group in self.groups:
            group.step(group.lr * self.config.rate(step), self.config.betas)

    def zero_grad(self) -> None:
        """Frees the gradients of all parameters."""
        for group in self.groups:
            for parameter in group.parameters:
                parameter.grad = None

    def moments(self) -> dict[nn.Parameter, dict[str, Tensor]]:
        """Returns Adam's state of each parameter: exp_avg, exp_avg_sq and step; not copies."""
        return {
            parameter: {"exp_avg": first, "exp_avg_sq": second, "step": steps}
            for group in self.groups
            for parameter, first, second, steps in zip(
                group.parameters, group.first, group.second, group.steps, strict=True
            )
        }

    def state(self) -> State:
        """Returns the moments and travels of all groups; the tensors are not copies."""
        state = State({}, {"travel": [as_plain(group.travel) for group in self.groups]})
        for i, moments in enumerate(self.moments().values()):
            state.add(str(i), State(moments))
        return state

    def restore(self, state: State) -> None:
        """Restores moments and travels.

        Raises: DamageError when the state belongs to other parameters.
        """
        for group, travel in zip(self.groups, state.value("travel"), strict=True):
            group.travel = as_number(travel)
        for i, moments in enumerate(self.moments().values()):
            for name, moment in moments.items():
                state.copy_into(f"{i}/{name}", moment)

    def travel(self, parameter: nn.Parameter) -> float:
        """Returns the sum of the learning rates of all steps of the parameter so far."""
        return next(g.travel for g in self.groups if any(p is parameter for p in g.parameters))

    def rates(self, step: int) -> dict[str, float]:
        """Returns the learning rate of each group at a step."""
        return {group.name: group.lr * self.config.rate(step) for group in self.groups}

    @torch.no_grad()
    def clear(self, sae: SAE, latents: Tensor) -> None:
        """Clears the moments of the given latents, of the weights and of every parameter that a
        part has for each latent, and leaves all others bitwise unchanged."""
        cleared = {id(p) for p in (sae.W_enc, sae.b_enc, sae.W_dec)}
        for part in sae.parts():
            named = part.named_parameters()
            cleared |= {id(parameter) for name, parameter in named if name in part.per_latent}
        for parameter, state in self.moments().items():
            if id(parameter) in cleared:
                state["exp_avg"][latents] = 0
                state["exp_avg_sq"][latents] = 0
