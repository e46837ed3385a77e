"""Gated: which latents fire and how strongly, two paths on one encoder. Rajamanoharan et al. 2024a.

    pi_i = z_i + b_gate_i          f_i = 1[pi_i > 0] max(z_i exp(r_i) + b_mag_i, 0)      eq. 6-7

The step passes no gradient, so the gate learns from two loss terms of its own, `gate_l1` and
`gate_reconstruction`; the decoder's rows have norm 1 (2404.16014, eq. 8). In the paper the gate and
the magnitude each add their bias to W x; b_enc, which they share here, is a third that moves both.

Since both paths read one encoder the function is that of a JumpReLU (appendix E of the paper), and
that is the form other tools get.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from pydantic import PositiveFloat
from torch import Tensor, nn

from saelab.errors import SettingError
from saelab.kernels import Support, support_above
from saelab.parts.base import Activation, Dims, Form, PartConfig, Scalar

if TYPE_CHECKING:
    from saelab.sae import SAE


class GatedConfig(PartConfig):
    """Settings of the activation.

    Args:
        start_l0: latents per row that are active at the start; None starts the biases at 0, as the
            paper does.
        free_norms: allows decoder rows of any norm, with which the penalty of the gate is evaded
            unless it is weighted with these norms.
    """

    kind: Literal["gated"] = "gated"
    start_l0: PositiveFloat | None = None
    free_norms: bool = False

    def build(self, dims: Dims) -> Gated:
        return Gated(self, dims)

    @property
    def logged(self) -> Mapping[str, Scalar]:
        return {"gated.gain": Scalar("geometric mean of the magnitudes' gains", "state")}

    @property
    def companions(self) -> Mapping[str, Any]:
        losses = [{"kind": "gate_l1"}, {"kind": "gate_reconstruction"}]
        return {"losses": losses, "constraints": [{"kind": "unit_norm"}]}


class Gated(Activation):
    shardable = True
    fitted: ClassVar[bool] = True
    per_latent = ("b_gate", "b_mag", "r_mag")

    def __init__(self, config: GatedConfig, dims: Dims) -> None:
        super().__init__()
        self.config, self.lr, self.d_sae = config, config.lr, dims.d_sae
        self.b_gate = nn.Parameter(torch.zeros(dims.n_local, dtype=torch.float32))
        self.b_mag = nn.Parameter(torch.zeros(dims.n_local, dtype=torch.float32))
        self.r_mag = nn.Parameter(torch.zeros(dims.n_local, dtype=torch.float32))

    def check(self, sae: SAE) -> None:
        fixed = any(part.fixes_decoder_norms for part in sae.config.constraints)
        if not (fixed or self.config.free_norms):
            remedy = (
                "needs decoder rows of norm 1: add the constraint 'unit_norm', or set it to true"
            )
            raise SettingError("free_norms", False, remedy)

    def fit(self, z: Tensor) -> None:
        if self.config.start_l0 is None or bool(self.b_gate.any()):
            return
        active = min(max(1, round(self.config.start_l0 * len(z))), len(z) * self.d_sae)
        start = -self.ranks.kth_largest(z.flatten(), active)
        self.b_gate.data.copy_(start.expand_as(self.b_gate))
        self.b_mag.data.copy_(self.b_gate.data)

    def _at(self, name: str, support: Support | None) -> Tensor:
        tensor = getattr(self, name)
        return tensor if support is None else tensor.index_select(0, support.latents)

    def gate_path(self, z: Tensor, support: Support | None) -> Tensor:
        return torch.relu(z + self._at("b_gate", support))

    def _code(self, z: Tensor, support: Support | None) -> Tensor:
        opens = z.detach() + self._at("b_gate", support).detach() > 0
        return opens * torch.relu(z * self._at("r_mag", support).exp() + self._at("b_mag", support))

    def dense(self, z: Tensor) -> Tensor:
        return self._code(z, None)

    def at(self, values: Tensor, support: Support) -> Tensor:
        return self._code(values, support)

    def support(self, z: Tensor) -> Support | None:
        """Pairs whose gate is open; the loss terms need those without a magnitude too."""
        return support_above(z, self.selection_floor())

    def selection_floor(self) -> Tensor:
        return -self.b_gate.detach()

    def floor(self) -> Tensor:
        return torch.maximum(-self.b_gate, -self.b_mag * (-self.r_mag).exp()).detach()

    def raise_thresholds(self, by: float, bias: Tensor | None) -> bool:
        """Closes every gate by `by` more, in pre-activations; magnitudes stay."""
        self.b_gate.sub_(by)
        return True

    def forget(self, latents: Tensor) -> None:
        for name in self.per_latent:
            getattr(self, name).data[latents] = 0

    def scalars(self) -> dict[str, float]:
        return {"gated.gain": float(self.ranks.mean_over_latents(self.r_mag).exp())}

    def export(self) -> Form:
        gain, shift = self.r_mag.detach().exp(), self.b_mag.detach()
        return Form(threshold=self.floor(), affine=(gain, shift))
