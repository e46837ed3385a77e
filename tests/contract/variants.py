"""Two published variants as parts, which the package does not have: what a user would write.

    abs_topk               k latents by magnitude, with their sign; Zhu et al. 2025, eq. 10
    matryoshka             the first latents reconstruct on their own; Bussmann et al. 2025, eq. 4

The contract battery runs over them like over the parts of the package.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

import torch
from pydantic import AfterValidator, PositiveFloat
from torch import Tensor

from saelab.errors import SettingError
from saelab.kernels import (
    Support,
    decode_at,
    kernels_for,
    support_of_topk,
    topk_over_ranks,
)
from saelab.parts.base import (
    PER_TOKEN,
    Activation,
    Dims,
    L0Rule,
    Latents,
    LossTerm,
    PartConfig,
    Pass,
    Scalar,
    check_setting,
    measurement,
    nearest_k,
)

if TYPE_CHECKING:
    from saelab.sae import SAE, SAEConfig

# ---- abs_topk --------------------------------------------------------------------------------


class AbsTopKConfig(PartConfig):
    """k: active latents per row, or the name of the controller that sets it."""

    kind: Literal["abs_topk"] = "abs_topk"
    k: Latents = 32

    def build(self, dims: Dims) -> AbsTopK:
        return AbsTopK(self.k, dims)

    @property
    def logged(self) -> Mapping[str, Scalar]:
        moves = isinstance(self.k, str)
        return {"abs_topk.k": measurement("latents per token", PER_TOKEN)} if moves else {}

    @property
    def target_l0(self) -> float | None:
        return self.k if isinstance(self.k, int) else None

    @property
    def l0_setting(self) -> str | None:
        return self.k if isinstance(self.k, str) else None

    def l0_rule(self, sae: SAEConfig) -> L0Rule | None:
        return "set" if isinstance(self.k, int) else None

    def at_l0(self, level: float, sae: SAEConfig) -> AbsTopKConfig:
        return self.patched({"k": nearest_k(level)}) if isinstance(self.k, int) else self


class AbsTopK(Activation):
    """f_i = z_i where |z_i| is among the k largest of its row; no other tool here computes it."""

    exact_k: ClassVar[bool] = True
    shardable = True

    def __init__(self, k: int | str, dims: Dims) -> None:
        super().__init__()
        if isinstance(k, int) and k > dims.d_sae:
            raise SettingError("activation.k", k, f"must be at most d_sae = {dims.d_sae}")
        self.setting, self.d_sae = k, dims.d_sae
        if isinstance(k, str):
            self.register_buffer("last_k", torch.ones((), dtype=torch.int64))

    @property
    def k(self) -> int:
        return self.setting if isinstance(self.setting, int) else int(self.get_buffer("last_k"))

    def check(self, sae: SAE) -> None:
        if isinstance(self.setting, str):
            check_setting("activation.k", self.setting, sae)
            self._follow(sae.settings(0)[self.setting])

    def update(self, p: Pass) -> None:
        if isinstance(self.setting, str):
            self._follow(p.settings[self.setting])

    def _follow(self, value: float) -> None:
        self.get_buffer("last_k").fill_(min(max(1, round(value)), self.d_sae))

    def scalars(self) -> dict[str, float]:
        return {} if isinstance(self.setting, int) else {"abs_topk.k": float(self.k)}

    def dense(self, z: Tensor) -> Tensor:
        latents = z.detach().abs().topk(self.k, dim=-1, sorted=False).indices
        return torch.zeros_like(z).scatter(-1, latents, z.gather(-1, latents))

    def support(self, z: Tensor) -> Support | None:
        if self.ranks.latents > 1:
            return topk_over_ranks(z.abs(), self.k, self.ranks)
        return support_of_topk(kernels_for(z.device).topk(z.abs(), self.k), z.shape[-1])

    def at(self, values: Tensor, support: Support) -> Tensor:
        return values.clone()


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
    "activation": (AbsTopKConfig,),
    "loss": (MatryoshkaConfig,),
}
