"""Parts with one mistake each, next to the check that catches it."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any, Literal

import torch
from torch import Tensor, nn

from saelab.checks.examples import Case
from saelab.kernels import Code, Support, support_above
from saelab.parts.base import (
    Activation,
    Dims,
    Example,
    Form,
    LossTerm,
    Part,
    PartConfig,
    Pass,
    Refusal,
    Weights,
)

#: Seam, name of the check, class of the part.
BROKEN: list[tuple[str, str, type[Part]]] = []


def caught_by(check: str, seam: str = "loss") -> Callable[[type[Part]], type[Part]]:
    def add(part: type[Part]) -> type[Part]:
        BROKEN.append((seam, check, part))
        return part

    return add


@cache
def config_of(part: type[Any]) -> type[PartConfig]:
    """A configuration of a class that is built from the dimensions alone."""
    kind = f"broken_{part.__name__.lower()}"
    fields: dict[str, Any] = {
        "__annotations__": {"kind": Literal[kind]},  # type: ignore[valid-type]
        "kind": kind,
        "build": lambda self, dims: part(dims),
        "__module__": __name__,
    }
    return type(part.__name__ + "Config", (PartConfig,), fields)


def case_of(seam: str, part: type[Any]) -> Case:
    return Case(seam, Example(config_of(part).parse({})))


class Term(LossTerm):
    """A loss that is right."""

    def __init__(self, dims: Dims) -> None:
        super().__init__()

    def loss(self, p: Pass) -> Tensor:
        return (p.recon - p.target).square().mean()


@caught_by("per_latent")
class NoForget(Term):
    """State of each latent that is never cleared, and not declared either."""

    fired: Tensor

    def __init__(self, dims: Dims) -> None:
        super().__init__(dims)
        self.register_buffer("fired", torch.zeros(dims.n_local))

    def loss(self, p: Pass) -> Tensor:
        return super().loss(p) * (1 + self.fired.mean())

    def update(self, p: Pass) -> None:
        self.fired += p.firings


@caught_by("forget")
class DeclaredAndKept(NoForget):
    """The same, declared."""

    per_latent = ("fired",)


@caught_by("saved_state")
class PlainState(Term):
    """Running state in an attribute, not in a buffer."""

    def __init__(self, dims: Dims) -> None:
        super().__init__(dims)
        self.mean = 0.0

    def loss(self, p: Pass) -> Tensor:
        return p.recon.square().mean() * (1 + self.mean)

    def update(self, p: Pass) -> None:
        self.mean = 0.9 * self.mean + 0.1 * float(p.l0)


@caught_by("loss")
class RandomLoss(Term):
    """A loss that is not the same twice."""

    def loss(self, p: Pass) -> Tensor:
        return (p.recon * torch.rand_like(p.recon)).square().mean()


@caught_by("update")
class RandomUpdate(Term):
    """Global random state in update."""

    noise: Tensor

    def __init__(self, dims: Dims) -> None:
        super().__init__(dims)
        self.register_buffer("noise", torch.zeros(()))

    def loss(self, p: Pass) -> Tensor:
        return p.recon.square().mean() * (1 + self.noise)

    def update(self, p: Pass) -> None:
        self.noise.copy_(torch.rand(()))


@caught_by("loss")
class LossMutates(Term):
    """State that changes in the loss."""

    n: Tensor

    def __init__(self, dims: Dims) -> None:
        super().__init__(dims)
        self.register_buffer("n", torch.zeros(()))

    def loss(self, p: Pass) -> Tensor:
        self.n += 1
        return p.recon.square().mean()


@caught_by("loss")
class UndeclaredZ(Term):
    """Pre-activations that are read and not asked for."""

    def loss(self, p: Pass) -> Tensor:
        return p.z.square().mean()


@caught_by("loss")
class NoScalar(Term):
    """A loss that is not reduced."""

    def loss(self, p: Pass) -> Tensor:
        return (p.recon - p.target).square().mean(1)


@caught_by("gradients")
class Pole(Term):
    """L0.5 of a code with zeros."""

    def loss(self, p: Pass) -> Tensor:
        return p.code.values.pow(0.5).mean()


@caught_by("gradients")
class OnePath(Term):
    """A mean over the pairs of the support, which is another number on the dense path."""

    def loss(self, p: Pass) -> Tensor:
        return p.code.values.mean()


@caught_by("scalars")
class SilentScalar(Term):
    """A number in the log that nothing declares."""

    def scalars(self) -> dict[str, float]:
        return {"secret": 1.0}


@caught_by("parameters")
class Idle(Term):
    """A parameter that no gradient reaches."""

    def __init__(self, dims: Dims) -> None:
        super().__init__(dims)
        self.gain = nn.Parameter(torch.ones(()))


class Rectifier(Activation):
    """An activation that is right, and called another name."""

    gain = 1.0

    def __init__(self, dims: Dims) -> None:
        super().__init__()

    def dense(self, z: Tensor) -> Tensor:
        return self.gain * torch.relu(z)

    def support(self, z: Tensor) -> Support | None:
        return support_above(z)

    def at(self, values: Tensor, support: Support) -> Tensor:
        return self.gain * torch.relu(values)

    def floor(self) -> Tensor:
        return torch.zeros(())

    def export(self) -> Form | Refusal:
        return Form()


@caught_by("pass", "activation")
class NoisyReLU(Rectifier):
    """A code that is not the same twice."""

    def dense(self, z: Tensor) -> Tensor:
        return torch.relu(z + 0.1 * torch.randn_like(z) * self.training)

    def at(self, values: Tensor, support: Support) -> Tensor:
        return torch.relu(values + 0.1 * torch.randn_like(values) * self.training)


@caught_by("pass", "activation")
class DenseOnly(Activation):
    """dense() and nothing else."""

    def __init__(self, dims: Dims) -> None:
        super().__init__()

    def dense(self, z: Tensor) -> Tensor:
        return torch.relu(z)


@caught_by("export", "activation")
class WrongGain(Rectifier):
    """An export whose support is right and whose values are not."""

    gain = 2.0

    def export(self) -> Form | Refusal:
        return Form(threshold=torch.zeros(()))


@caught_by("export", "activation")
class WrongFar(Rectifier):
    """An export that is right on the data alone: codes above 50 are cut."""

    def dense(self, z: Tensor) -> Tensor:
        return torch.relu(z).clamp_max(50)

    def at(self, values: Tensor, support: Support) -> Tensor:
        return torch.relu(values).clamp_max(50)


@caught_by("export", "activation")
class NoExport(Rectifier):
    """Nothing that says what it computes."""

    export = Activation.export


@caught_by("paths", "activation")
class OtherPath(Rectifier):
    """A sparse path with other values."""

    def at(self, values: Tensor, support: Support) -> Tensor:
        return 1.01 * torch.relu(values)


@caught_by("rows", "activation")
class Coupled(Rectifier):
    """A code that depends on the batch."""

    def dense(self, z: Tensor) -> Tensor:
        return torch.relu(z) / (1 + z.detach().abs().amax())

    def at(self, values: Tensor, support: Support) -> Tensor:
        return torch.relu(values) / (1 + values.detach().abs().amax())


@caught_by("forget", "activation")
class GainNotDeclared(Rectifier):
    """A parameter for each latent whose value outlives a reset."""

    per_latent = ("log_gain",)

    def __init__(self, dims: Dims) -> None:
        super().__init__(dims)
        self.log_gain = nn.Parameter(torch.zeros(dims.n_local))

    def dense(self, z: Tensor) -> Tensor:
        return torch.relu(z) * self.log_gain.exp()

    def at(self, values: Tensor, support: Support) -> Tensor:
        return torch.relu(values) * self.log_gain.exp()[support.latents]

    def export(self) -> Form | Refusal:
        gain = self.log_gain.detach().exp()
        return Form(affine=(gain, torch.zeros_like(gain)))


@caught_by("thresholds", "activation")
class WrongWay(Rectifier):
    """Thresholds that fall when they are raised."""

    def raise_thresholds(self, by: float, bias: Tensor | None) -> bool:
        assert bias is not None
        bias.add_(by)
        return True


class FromWeights(Activation):
    """The code of a rectifier, computed from the weights."""

    uses_weights = True

    def __init__(self, dims: Dims) -> None:
        super().__init__()

    def encode(self, u: Tensor, weights: Weights) -> Code:
        f = torch.relu(u @ weights.W_enc.T + weights.b_enc)
        return Code(f, f, None)

    def export(self) -> Form | Refusal:
        return Form()


@caught_by("paths", "activation")
class NoGradientOfTheCentre(FromWeights):
    """An input that is detached, so that b_dec misses the encoder's share of its gradient."""

    def encode(self, u: Tensor, weights: Weights) -> Code:
        return super().encode(u.detach(), weights)


@caught_by("rows", "activation")
class CoupledByWeights(FromWeights):
    """A code from the weights that depends on the batch."""

    def encode(self, u: Tensor, weights: Weights) -> Code:
        return super().encode(u / (1 + u.detach().abs().amax()), weights)


@caught_by("export", "activation")
class WrongFormOfWeights(FromWeights):
    """A form with other values than the code from the weights."""

    def encode(self, u: Tensor, weights: Weights) -> Code:
        return super().encode(1.1 * u, weights)
