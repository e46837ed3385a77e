"""Three published variants as parts, which the package does not have: what a user would write.

    lp                     a penalty between L1 and L0, p falls; Karvonen et al. 2024, section 3
    gated, gate_l1,        which latents fire and how strongly, as two paths on one encoder, and the
    gate_reconstruction    two loss terms of the first path; Rajamanoharan et al. 2024a, eq. 6-8
    matryoshka             the first latents reconstruct on their own; Bussmann et al. 2025, eq. 4

The contract battery runs over them like over the parts of the package.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from itertools import pairwise
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, cast

import torch
from pydantic import AfterValidator, Field, PositiveFloat
from torch import Tensor, nn

from saelab.errors import SettingError
from saelab.kernels import (
    Support,
    decode_at,
    mean_square,
    support_above,
)
from saelab.parts.base import (
    Activation,
    Dims,
    Form,
    LossTerm,
    PartConfig,
    Pass,
    Scalar,
    measurement,
)

if TYPE_CHECKING:
    from saelab.sae import SAE

# ---- lp --------------------------------------------------------------------------------------

#: Smallest size that is raised to a power.
SMALLEST = 1e-12


class LpConfig(PartConfig):
    """Settings of the penalty.

    Args:
        coefficient: a number, or the name of the controller that sets it.
        start, end: of p.
        begin, until: shares of the run between which p moves.
        smooth: s of the equation, which bounds the gradient at 0.
        keep: whether a factor c keeps the penalty where it was when p moves.
    """

    kind: Literal["lp"] = "lp"
    coefficient: float | str = "sparsity"
    start: float = Field(default=1.0, gt=0, le=2)
    end: float = Field(default=0.2, gt=0, le=2)
    begin: float = Field(default=0.2, ge=0, lt=1)
    until: float = Field(default=1.0, gt=0, le=1)
    smooth: float = Field(default=1e-3, ge=0)
    keep: bool = True

    def build(self, dims: Dims) -> Lp:
        return Lp(self, dims)

    @property
    def logged(self) -> Mapping[str, Scalar]:
        return {
            "lp.p": Scalar("exponent of the penalty", "state"),
            "lp.c": measurement("factor that keeps the penalty where it was when p moves"),
        }


class Lp(LossTerm):
    """coefficient * c * sum_i ((f_i |W_dec_i| + s)^p - s^p) / sqrt(d_in)^p, mean over rows."""

    uses_decoder_norms: ClassVar[bool] = True
    shardable = True
    c: Tensor
    p: Tensor

    def __init__(self, config: LpConfig, dims: Dims) -> None:
        super().__init__()
        if config.begin >= config.until:
            raise SettingError("lp.begin", config.begin, f"must be below until = {config.until}")
        self.config, self.coefficient = config, config.coefficient
        self.register_buffer("c", torch.ones((), dtype=torch.float64))
        self.register_buffer("p", torch.tensor(config.start, dtype=torch.float64))

    def loss(self, p: Pass) -> Tensor:
        power = float(self.p)
        scale = p.setting(self.coefficient) * float(self.c) / p.n
        total = self.ranks.over_latents(self._sum(p, p.decoder_norms, power))
        return total * (scale / math.sqrt(p.x.shape[1]) ** power)

    def update(self, p: Pass) -> None:
        c = self.config
        share = ((p.step + 1) / p.steps - c.begin) / (c.until - c.begin)
        after = c.start + (c.end - c.start) * min(1.0, max(0.0, share))
        if c.keep and after != float(self.p):
            norms, width = p.decoder_norms.detach(), math.sqrt(p.x.shape[1])
            sums = [float(self._sum(p, norms, q)) / width**q for q in (float(self.p), after)]
            old, new = self.ranks.total(*sums)
            if old > 0 and new > 0:
                self.c *= old / new
        self.p.fill_(after)

    def _sum(self, p: Pass, norms: Tensor, power: float) -> Tensor:
        """Sums over the pairs that fire: at 0 the gradient has a pole."""
        code, s = p.code, self.config.smooth
        if code.support is not None:
            norms = norms.index_select(0, code.support.latents)
        sizes = (code.values * norms)[code.active].clamp_min(SMALLEST)
        return ((sizes + s).pow(power) - s**power).sum()

    def scalars(self) -> dict[str, float]:
        return {"lp.p": float(self.p), "lp.c": float(self.c)}


# ---- gated -----------------------------------------------------------------------------------


class GatedConfig(PartConfig):
    """start_l0: latents per row that are active at the start; None starts the biases at 0."""

    kind: Literal["gated"] = "gated"
    start_l0: PositiveFloat | None = None

    def build(self, dims: Dims) -> Gated:
        return Gated(self, dims)

    @property
    def logged(self) -> Mapping[str, Scalar]:
        return {"gated.gain": Scalar("geometric mean of the magnitudes' gains", "state")}

    @property
    def companions(self) -> Mapping[str, Any]:
        """The two terms that train the gate: its step passes no gradient."""
        return {"losses": [{"kind": "gate_l1"}, {"kind": "gate_reconstruction"}]}


class Gated(Activation):
    """f = 1[z + b_gate > 0] max(z exp(r) + b_mag, 0)."""

    shardable = True
    fitted: ClassVar[bool] = True
    per_latent = ("b_gate", "b_mag", "r_mag")

    def __init__(self, config: GatedConfig, dims: Dims) -> None:
        super().__init__()
        self.start_l0, self.lr, self.d_sae = config.start_l0, config.lr, dims.d_sae
        self.b_gate = nn.Parameter(torch.zeros(dims.n_local))
        self.b_mag = nn.Parameter(torch.zeros(dims.n_local))
        self.r_mag = nn.Parameter(torch.zeros(dims.n_local))

    def fit(self, z: Tensor) -> None:
        if self.start_l0 is None or bool(self.b_gate.any()):
            return
        active = min(max(1, round(self.start_l0 * len(z))), len(z) * self.d_sae)
        start = -self.ranks.kth_largest(z.flatten(), active)
        self.b_gate.data.copy_(start.expand_as(self.b_gate))
        self.b_mag.data.copy_(self.b_gate.data)

    def _at(self, name: str, support: Support | None) -> Tensor:
        tensor = getattr(self, name)
        return tensor if support is None else tensor.index_select(0, support.latents)

    def path(self, z: Tensor, support: Support | None) -> Tensor:
        """max(z + b_gate, 0) at the support, or densely, with gradients to z and b_gate."""
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
        return support_above(z, -self.b_gate.detach())

    def floor(self) -> Tensor:
        return torch.maximum(-self.b_gate, -self.b_mag * (-self.r_mag).exp()).detach()

    def forget(self, latents: Tensor) -> None:
        for name in self.per_latent:
            getattr(self, name).data[latents] = 0

    def scalars(self) -> dict[str, float]:
        return {"gated.gain": float(self.ranks.mean_over_latents(self.r_mag).exp())}

    def export(self) -> Form:
        """Gate and magnitude share the encoder, so that together they are a JumpReLU."""
        gain, shift = self.r_mag.detach().exp(), self.b_mag.detach()
        return Form(threshold=self.floor(), affine=(gain, shift))


class GatePath(LossTerm):
    """A term of the gate's path."""

    shardable = True

    def __init__(self, coefficient: float | str) -> None:
        super().__init__()
        self.coefficient = coefficient

    def check(self, sae: SAE) -> None:
        super().check(sae)
        if not isinstance(sae.activation, Gated):
            remedy = "has no gate: choose gated"
            raise SettingError("activation", type(sae.activation).__name__, remedy)

    def path(self, p: Pass) -> Tensor:
        return cast(Gated, p.sae.activation).path(p.code.pre, p.code.support)


class GateL1Config(PartConfig):
    """coefficient: a number, or the name of the controller that sets it."""

    kind: Literal["gate_l1"] = "gate_l1"
    coefficient: float | str = "sparsity"

    def build(self, dims: Dims) -> GateL1:
        return GateL1(self.coefficient)

    @property
    def companions(self) -> Mapping[str, Any]:
        return {"activation": {"kind": "gated"}}


class GateL1(GatePath):
    """coefficient * sum_i max(z_i + b_gate_i, 0) |W_dec_i| / sqrt(d_in), mean over rows."""

    uses_decoder_norms: ClassVar[bool] = True

    def loss(self, p: Pass) -> Tensor:
        opened, norms = self.path(p), p.decoder_norms
        if p.code.support is None:
            total = (opened @ norms).sum()
        else:
            total = torch.dot(opened, norms.index_select(0, p.code.support.latents))
        scale = p.setting(self.coefficient) / (p.n * math.sqrt(p.x.shape[1]))
        return self.ranks.over_latents(total) * scale


class GateReconstructionConfig(PartConfig):
    """coefficient: 1 in the paper."""

    kind: Literal["gate_reconstruction"] = "gate_reconstruction"
    coefficient: PositiveFloat = 1.0

    def build(self, dims: Dims) -> GateReconstruction:
        return GateReconstruction(self.coefficient)

    @property
    def companions(self) -> Mapping[str, Any]:
        return {"activation": {"kind": "gated"}}


class GateReconstruction(GatePath):
    """The reconstruction by the gate's path, on a decoder that gets no gradient from it."""

    def loss(self, p: Pass) -> Tensor:
        opened, w_dec = self.path(p), p.sae.W_dec.detach()
        support = p.code.support
        product = opened @ w_dec if support is None else decode_at(opened, w_dec, support)
        recon = self.ranks.over_latents(product) + p.sae.b_dec.detach()
        return p.setting(self.coefficient) * p.share(mean_square(recon, p.target))


# ---- matryoshka ------------------------------------------------------------------------------


def _rising(shares: tuple[float, ...]) -> tuple[float, ...]:
    if not shares or list(shares) != sorted({*shares}) or shares[0] <= 0 or shares[-1] >= 1:
        raise ValueError("should rise strictly, from above 0 to below 1")
    return shares


class MatryoshkaConfig(PartConfig):
    """shares: of all latents, the width of each prefix; coefficient: of their sum."""

    kind: Literal["matryoshka"] = "matryoshka"
    shares: Annotated[tuple[float, ...], AfterValidator(_rising)] = (1 / 16, 1 / 8, 1 / 4, 1 / 2)
    coefficient: PositiveFloat = 1.0

    def build(self, dims: Dims) -> Matryoshka:
        return Matryoshka(self, dims)


class Matryoshka(LossTerm):
    """sum over prefixes of |x - (f W_dec of the prefix + b_dec)|^2 / d_in, mean over rows.

    On a sparse code each row has one bag of pairs for every ring of latents between two widths: the
    reconstructions of the prefixes are running sums over the rings.
    """

    shardable = True

    def __init__(self, config: MatryoshkaConfig, dims: Dims) -> None:
        super().__init__()
        self.widths = [round(share * dims.d_sae) for share in config.shares]
        if sorted({0, *self.widths, dims.d_sae}) != [0, *self.widths, dims.d_sae]:
            remedy = f"gives equal or empty prefixes of {dims.d_sae} latents: use fewer shares"
            raise SettingError("matryoshka.shares", config.shares, remedy)
        self.coefficient = config.coefficient
        self.first = dims.ranks.own(dims.d_sae).start

    def loss(self, p: Pass) -> Tensor:
        rings = self._dense(p) if p.code.support is None else self._sparse(p, p.code.support)
        recon = self.ranks.over_latents(rings).cumsum(1) + p.sae.b_dec
        error = (recon - p.target.unsqueeze(1)).square()
        return p.setting(self.coefficient) * p.share(error.sum() / error[:, 0].numel())

    def _sparse(self, p: Pass, support: Support) -> Tensor:
        """The share of each ring in the reconstruction; [rows, rings, d_in]."""
        rings = len(self.widths)
        ends = torch.tensor(self.widths, device=support.latents.device)
        ring = torch.bucketize(support.latents + self.first, ends, right=True)
        inner = (ring < rings).nonzero().flatten()
        bags = support.rows[inner] * rings + ring[inner]
        edges = torch.arange(support.n_rows * rings + 1, device=bags.device)
        inside = Support(torch.searchsorted(bags, edges), support.latents[inner], support.d_sae)
        product = decode_at(p.code.values[inner], p.sae.W_dec, inside)
        return product.view(support.n_rows, rings, -1)

    def _dense(self, p: Pass) -> Tensor:
        local = p.sae.W_dec.shape[0]
        cuts = [min(max(0, width - self.first), local) for width in (0, *self.widths)]
        parts = [p.code.values[:, low:high] @ p.sae.W_dec[low:high] for low, high in pairwise(cuts)]
        return torch.stack(parts, dim=1)


#: The variants by seam.
VARIANTS: dict[str, tuple[type[PartConfig], ...]] = {
    "activation": (GatedConfig,),
    "loss": (LpConfig, GateL1Config, GateReconstructionConfig, MatryoshkaConfig),
}
