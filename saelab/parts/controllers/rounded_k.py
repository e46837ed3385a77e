"""k, a number of latents, that follows how many carry the activation energy.

    e_i     = sum_n f_ni^2 |W_dec_i|^2
    kappa   <- m kappa + (1 - m) * smallest number of latents that cover the share of sum_i e_i
    k       = round(kappa), inside [k_min, k_max]

Over the batch, f is the code, and k is for a penalty on the batch's most active latents. Over rows
(e of one row, the mean of some rows' numbers) k drives TopK's, and f stands for the rectified
pre-activations, or all of them where codes are signed: measured on the selected code, the share
would be covered by fewer than k, and k would fall to its lower bound.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Literal

import torch
from pydantic import Field, PositiveFloat, PositiveInt
from torch import Tensor

from saelab.errors import SettingError
from saelab.parts.base import (
    Controller,
    Dims,
    Example,
    L0Rule,
    PartConfig,
    Pass,
    Scalar,
    few,
    measurement,
)

if TYPE_CHECKING:
    from saelab.sae import SAEConfig

#: Rows of a batch whose numbers are averaged.
SAMPLED_ROWS = 32


class RoundedKConfig(PartConfig):
    """Settings of the controller.

    Args:
        name: the setting that it owns.
        start: first kappa.
        cover: share of the energy.
        over: 'batch' or 'rows'.
        momentum: of kappa.
        k_min, k_max: bounds; k never exceeds d_sae.
    """

    kind: Literal["rounded_k"] = "rounded_k"
    name: str = "k"
    start: PositiveFloat = 100
    cover: float = Field(default=0.9, gt=0, lt=1)
    over: Literal["batch", "rows"] = "batch"
    momentum: float = Field(default=0.99, ge=0, lt=1)
    k_min: PositiveInt = 8
    k_max: PositiveInt = 512

    def build(self, dims: Dims) -> RoundedK:
        return RoundedK(self, dims)

    @classmethod
    def examples(cls, d_sae: int) -> tuple[Example, ...]:
        batch = cls(start=few(d_sae), k_min=1)
        rows = batch.patched({"over": "rows"})
        return Example(batch), Example(rows, {"activation": {"kind": "topk", "k": "k"}})

    @classmethod
    def example(cls, d_sae: int) -> Example:
        return cls.examples(d_sae)[0]

    @property
    def logged(self) -> Mapping[str, Scalar]:
        return {
            self.name: Scalar("number of latents that carry the energy", unit="latents"),
            f"{self.name}.kappa": measurement("the same before it is rounded", "latents"),
        }

    def l0_rule(self, sae: SAEConfig) -> L0Rule | None:
        """Decides the L0 where the activation follows it: by the data, not by a level."""
        return "found" if self.name == sae.activation.l0_setting else None


class RoundedK(Controller):
    kappa: Tensor

    def __init__(self, config: RoundedKConfig, dims: Dims) -> None:
        super().__init__()
        if config.k_min > min(config.k_max, dims.d_sae):
            remedy = f"must be at most k_max = {config.k_max} and d_sae = {dims.d_sae}"
            raise SettingError("k_min", config.k_min, remedy)
        self.config, self.name = config, config.name
        self.uses_preactivations = config.over == "rows"
        self.k_max = min(config.k_max, dims.d_sae)
        start = torch.tensor(config.start, dtype=torch.float64, device="cpu")
        self.register_buffer("kappa", start)

    def value(self, step: int) -> float:
        return float(min(max(round(float(self.kappa)), self.config.k_min), self.k_max))

    def update(self, p: Pass) -> None:
        rows = self.config.over == "rows"
        number = (
            self._over_rows(p) if rows else float(smallest_cover(p.energy[None], self.config.cover))
        )
        if number > 0:
            self.kappa.mul_(self.config.momentum).add_((1 - self.config.momentum) * number)

    def scalars(self) -> dict[str, float]:
        return {self.name: self.value(0), f"{self.name}.kappa": float(self.kappa)}

    def _over_rows(self, p: Pass) -> float:
        rows = p.z[:: -(-p.n // SAMPLED_ROWS)]
        rows = rows.float() if p.sae.activation.signed else torch.relu(rows.float())
        energy = rows.square() * p.decoder_norms.detach().square()
        return float(smallest_cover(energy, self.config.cover).float().mean())


def smallest_cover(energy: Tensor, cover: float) -> Tensor:
    """Smallest number of entries of each row that hold the share; [n, F] -> int64 [n].

    0 where a row has no energy.
    """
    held = energy.sort(dim=1, descending=True).values.cumsum(1)
    enough = (held < cover * held[:, -1:]).sum(1) + 1
    return enough * (held[:, -1] > 0)
