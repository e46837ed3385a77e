"""A weight matrix that stays as it was drawn: dL/dW = 0.

With the decoder frozen, training can only choose when its random directions fire; what an SAE
gains beyond that it owes to the directions that it learned.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from saelab.errors import SettingError
from saelab.parts.base import Constraint, Dims, Example, PartConfig

if TYPE_CHECKING:
    from saelab.sae import SAE


class FrozenConfig(PartConfig):
    """weight: the matrix that stays."""

    kind: Literal["frozen"] = "frozen"
    weight: Literal["decoder", "encoder"] = "decoder"

    def build(self, dims: Dims) -> Frozen:
        return Frozen(self.weight)

    @classmethod
    def examples(cls, d_sae: int) -> tuple[Example, ...]:
        return cls.example(d_sae), Example(cls(weight="encoder"))

    @property
    def fixes_decoder_norms(self) -> bool:
        return self.weight == "decoder"


class Frozen(Constraint):
    shardable = True

    def __init__(self, weight: Literal["decoder", "encoder"]) -> None:
        super().__init__()
        self.name = "W_dec" if weight == "decoder" else "W_enc"

    def check(self, sae: SAE) -> None:
        if sae.config.tied:
            remedy = "the encoder is the decoder here, and neither would learn: untie them"
            raise SettingError("constraints", "frozen", remedy)

    def on_gradients(self, sae: SAE) -> None:
        weight = getattr(sae, self.name)
        if weight.grad is not None:
            weight.grad.zero_()
