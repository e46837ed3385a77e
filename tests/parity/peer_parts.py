"""Parts that compute what a peer computes where ours, by their papers, do something else.

Each is one named difference of docs/zoo.md: with it the two trainings are the same, without it they
are not, so that there is no other.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from saelab.kernels import Support, gate
from saelab.parts.activations.groupmax import GroupMax, GroupMaxConfig
from saelab.parts.activations.jumprelu import JumpReLU, JumpReLUConfig
from saelab.parts.base import Constraint, Dims, Pass
from saelab.parts.constraints.frozen import FrozenConfig
from saelab.parts.constraints.unit_norm import UnitNorm, UnitNormConfig
from saelab.parts.losses.auxk import AuxK, AuxKConfig
from saelab.parts.losses.multi_topk import MultiTopK, MultiTopKConfig
from saelab.parts.losses.preactivation import Preactivation, PreactivationConfig
from saelab.sae import SAE

#: Steps of silence after which the peers' latents are dead here.
DEAD_STEPS = 3


class PeersAuxK(AuxK):
    """AuxK of dead latents, scaled, normalised and rectified as a peer does."""

    def __init__(self, config: AuxKConfig, dims: Dims, peer: str) -> None:
        super().__init__(config, dims)
        self.peer = peer

    def loss(self, p: Pass) -> Tensor:
        silent = self.silent
        dead = silent > self.dead_after
        if self.peer == "dictionary_learning":  # counts this batch before it looks
            dead = (silent + p.n >= self.dead_after) & (p.firings == 0)
        if not bool(dead.any()):
            return p.recon.new_zeros(())
        pre = p.sae.encode_all(p.u)
        if self.peer != "saelens":
            pre = torch.relu(pre)
        values, latents = torch.where(dead, pre, -torch.inf).topk(min(self.k, int(dead.sum())))
        if self.peer == "sparsify":  # its encoder takes no gradient from pre-activations
            values = values.detach()
        e = (p.target - p.recon).detach()
        left = torch.zeros_like(pre).scatter(1, latents, values) @ p.sae.W_dec - e
        scale = min(int(dead.sum()) / self.k, 1.0)
        if self.peer == "dictionary_learning":
            variance = (e - e.mean(0)).square().sum(1).mean()
            return p.setting(self.coefficient) * left.square().sum(1).mean() / variance
        return p.setting(self.coefficient) * scale * left.square().mean()


class DecoderOnlyMultiTopK(MultiTopK):
    """Multi-TopK whose gradient stops at the code, as in sparsify."""

    def loss(self, p: Pass) -> Tensor:
        pre = torch.relu(p.sae.encode_all(p.u)).detach()
        values, latents = pre.topk(4 * int(p.sae.config.target_l0 or 0))
        recon = torch.zeros_like(pre).scatter(1, latents, values) @ p.sae.W_dec + p.sae.b_dec
        return p.setting(self.coefficient) * (recon - p.target).square().mean()


class DirectJumpReLU(JumpReLU):
    """Trains the threshold itself, not its logarithm."""

    #: Whether the step counts codes after the jump, as dictionary_learning does.
    after_jump = False

    def __init__(self, config: JumpReLUConfig, dims: Dims) -> None:
        super().__init__(config, dims)
        self.log_threshold.data.exp_()

    @property
    def threshold(self) -> Tensor:
        return self.log_threshold

    def _threshold_at(self, support: Support | None) -> Tensor:
        return self.log_threshold if support is None else self.log_threshold[support.latents]

    def gate(self, z: Tensor, support: Support | None) -> Tensor:
        threshold = self._threshold_at(support)
        if self.after_jump:
            z = torch.where(z > threshold, z, 0).detach()
        return gate(z, threshold.expand_as(z), self.bandwidth, self.to_input)


class AfterJump(DirectJumpReLU):
    after_jump = True


class DeadPreactivation(Preactivation):
    """Draws dead latents alone to their thresholds."""

    def __init__(self, config: PreactivationConfig, dims: Dims) -> None:
        super().__init__(config)
        self.silent = torch.zeros(dims.d_sae, dtype=torch.int64)

    def loss(self, p: Pass) -> Tensor:
        activation = p.sae.activation
        assert isinstance(activation, JumpReLU)
        below = torch.relu(activation.threshold - p.sae.encode_all(p.u)) * p.sae.W_dec.norm(dim=1)
        dead = self.silent > DEAD_STEPS
        return p.setting(self.coefficient) * (below * dead).sum(1).mean() / p.x.shape[1]

    def update(self, p: Pass) -> None:
        self.silent.add_(1).masked_fill_(p.firings > 0, 0)


class UnmaskedGroupMax(GroupMax):
    """Passes the gradient of a group without a positive pre-activation to its first latent, since
    sparsify's backward pass leaves the rectifier out."""

    def _chosen(self, z: Tensor) -> Tensor:
        return super()._chosen(torch.relu(z))

    def at(self, values: Tensor, support: Support) -> Tensor:
        return values + (torch.relu(values) - values).detach()


class Projected(UnitNorm):
    """Rows of norm 1; b_dec stays, since there is none."""

    def on_gradients(self, sae: SAE) -> None:
        super().on_gradients(sae)
        no_offset(sae)


class Unprojected(UnitNorm):
    """Rows of norm 1 whose gradient is not projected; b_dec stays, since there is none."""

    def on_gradients(self, sae: SAE) -> None:
        no_offset(sae)


class NoOffset(Constraint):
    """b_dec stays, since there is none."""

    def on_gradients(self, sae: SAE) -> None:
        no_offset(sae)


def no_offset(sae: SAE) -> None:
    if sae.b_dec.grad is not None:
        sae.b_dec.grad.zero_()


Builders = dict[type[Any], Callable[[Any, Dims], Any]]

DIRECT: Builders = {JumpReLUConfig: lambda c, dims: DirectJumpReLU(c, dims)}
#: Name of a difference -> settings of ours -> the part that stands in for what they build.
PARTS: dict[str, Builders] = {
    "auxk of saelens": {AuxKConfig: lambda c, dims: PeersAuxK(c, dims, "saelens")},
    "auxk of dictionary_learning": {
        AuxKConfig: lambda c, dims: PeersAuxK(c, dims, "dictionary_learning")
    },
    "auxk of sparsify": {AuxKConfig: lambda c, dims: PeersAuxK(c, dims, "sparsify")},
    "decoder-only multi_topk": {MultiTopKConfig: lambda c, dims: DecoderOnlyMultiTopK(c)},
    "unmasked groupmax": {GroupMaxConfig: lambda c, dims: UnmaskedGroupMax(c.k, dims)},
    "direct threshold": DIRECT,
    "pre-activations of the dead": DIRECT
    | {PreactivationConfig: lambda c, dims: DeadPreactivation(c, dims)},
    "step after the jump": {JumpReLUConfig: lambda c, dims: AfterJump(c, dims)},
    "no offset, projected": {UnitNormConfig: lambda c, dims: Projected("decoder")},
    "no offset, no projection": {UnitNormConfig: lambda c, dims: Unprojected("decoder")},
    "no offset": {FrozenConfig: lambda c, dims: NoOffset()},
    "trained offset": {FrozenConfig: lambda c, dims: Constraint()},
}
