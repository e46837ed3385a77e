"""A number of latents per row, or the controller that sets it: shared by activations with a k."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, ClassVar, Self

import torch

from saelab.errors import SettingError
from saelab.parts.base import Activation, Dims, Pass, check_setting
from saelab.parts.settings import (
    PER_TOKEN,
    Example,
    L0Rule,
    Latents,
    PartConfig,
    Scalar,
    few,
    measurement,
    nearest_k,
)

if TYPE_CHECKING:
    from saelab.sae import SAE, SAEConfig


class KConfig(PartConfig):
    """k: active latents per row, or the name of the controller that sets it."""

    #: Said of k in the log.
    k_means: ClassVar[str] = "latents per token"
    k: Latents = 32

    @classmethod
    def example(cls, d_sae: int) -> Example:
        part = cls.parse({"k": few(d_sae)})
        return Example(part, part.companions)

    @classmethod
    def examples(cls, d_sae: int) -> tuple[Example, ...]:
        follower = cls.parse({"k": "k"})
        annealed = {"kind": "annealed_k", "start": d_sae // 2, "end": few(d_sae)}
        return cls.example(d_sae), Example(
            follower, {**follower.companions, "controllers": [annealed]}
        )

    @property
    def logged(self) -> Mapping[str, Scalar]:
        moves = isinstance(self.k, str)
        return {f"{self.kind}.k": measurement(self.k_means, PER_TOKEN)} if moves else {}

    @property
    def target_l0(self) -> float | None:
        return self.k if isinstance(self.k, int) else None

    @property
    def l0_setting(self) -> str | None:
        return self.k if isinstance(self.k, str) else None

    def l0_rule(self, sae: SAEConfig) -> L0Rule | None:
        """Leaves the L0 to the controller, where one moves k."""
        return "set" if isinstance(self.k, int) else None

    def at_l0(self, level: float, sae: SAEConfig) -> Self:
        return self.patched({"k": nearest_k(level)}) if isinstance(self.k, int) else self


class FollowsK(Activation):
    """An activation with a k, which follows a controller one step behind where it has its name; the
    last k is stored for inference."""

    def __init__(self, config: KConfig, dims: Dims) -> None:
        super().__init__()
        k = config.k
        if isinstance(k, int) and k > dims.d_sae:
            raise SettingError("activation.k", k, f"must be at most d_sae = {dims.d_sae}")
        self.setting, self.d_sae, self.k_name = k, dims.d_sae, f"{config.kind}.k"
        if isinstance(k, str):
            self.register_buffer("last_k", torch.ones((), dtype=torch.int64))

    @property
    def k(self) -> int:
        """Active latents per row now."""
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
        return {} if isinstance(self.setting, int) else {self.k_name: float(self.k)}
