"""TopK: the k largest pre-activations of a row, negative ones set to zero. Gao et al. 2024, eq. 5.

f_i = max(z_i, 0) if z_i is among the k largest of its row, else 0

Where k is the name of a setting it follows that controller, one step behind; the last k is stored
for inference.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, ClassVar, Literal

import torch
from torch import Tensor

from saelab.errors import SettingError
from saelab.kernels import Support, kernels_for, support_of_topk, topk_over_ranks
from saelab.parts.base import (
    PER_TOKEN,
    Activation,
    Dims,
    Example,
    Form,
    L0Rule,
    Latents,
    PartConfig,
    Pass,
    Scalar,
    check_setting,
    few,
    measurement,
    nearest_k,
)

if TYPE_CHECKING:
    from saelab.sae import SAE, SAEConfig


class TopKConfig(PartConfig):
    """k: active latents per row, or the name of the controller that sets it."""

    kind: Literal["topk"] = "topk"
    k: Latents = 32

    def build(self, dims: Dims) -> TopK:
        return TopK(self.k, dims)

    @classmethod
    def example(cls, d_sae: int) -> Example:
        return Example(cls(k=few(d_sae)))

    @classmethod
    def examples(cls, d_sae: int) -> tuple[Example, ...]:
        follows = {"controllers": [{"kind": "annealed_k", "start": d_sae // 2, "end": few(d_sae)}]}
        return cls.example(d_sae), Example(cls(k="k"), follows)

    @property
    def logged(self) -> Mapping[str, Scalar]:
        moves = isinstance(self.k, str)
        return {"topk.k": measurement("latents per token, of TopK", PER_TOKEN)} if moves else {}

    @property
    def target_l0(self) -> float | None:
        return self.k if isinstance(self.k, int) else None

    @property
    def l0_setting(self) -> str | None:
        return self.k if isinstance(self.k, str) else None

    def l0_rule(self, sae: SAEConfig) -> L0Rule | None:
        """Leaves the L0 to the controller, where one moves k."""
        return "set" if isinstance(self.k, int) else None

    def at_l0(self, level: float, sae: SAEConfig) -> TopKConfig:
        return self.patched({"k": nearest_k(level)}) if isinstance(self.k, int) else self

    @classmethod
    def of_form(cls, form: Form) -> TopKConfig | None:
        return None if form.k is None or form.signed else cls(k=form.k)


class TopK(Activation):
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
        return {} if isinstance(self.setting, int) else {"topk.k": float(self.k)}

    def dense(self, z: Tensor) -> Tensor:
        values, latents = z.topk(self.k, dim=-1, sorted=False)
        return torch.zeros_like(z).scatter(-1, latents, torch.relu(values))

    def support(self, z: Tensor) -> Support | None:
        if self.ranks.latents > 1:
            return topk_over_ranks(z, self.k, self.ranks)
        return support_of_topk(kernels_for(z.device).topk(z, self.k), z.shape[-1])

    def at(self, values: Tensor, support: Support) -> Tensor:
        return torch.relu(values)

    def export(self) -> Form:
        return Form(k=self.k)
