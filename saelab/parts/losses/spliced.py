"""Losses of the language model's output with the SAE spliced in: KL divergence and cross-entropy.

The reconstructions replace the activations at the counted positions of whole contexts, and the
model computes its logits from there on.

    kl               mean over counted positions of KL(p || q),   p clean, q spliced; nats
    cross_entropy    mean over counted positions of -log q(next token)

End-to-end training is `kl` with a sparsity penalty (Braun et al. 2024, eq. 4, without their term on
later layers); fine-tuning with `kl` next to the reconstruction is Karvonen 2025. The two differ by
the entropy of the text under the model and by its errors: the gradient of `kl` asks for what the
model says, that of `cross_entropy` for what the text says.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import TYPE_CHECKING, ClassVar, Literal

import torch
from pydantic import NonNegativeFloat
from torch import Tensor
from torch.nn.functional import cross_entropy, kl_div, log_softmax

from saelab.errors import SettingError
from saelab.parts.base import Dims, LossTerm, PartConfig, Pass

if TYPE_CHECKING:
    from saelab.parts.forward_pass import SplicedTokens
    from saelab.sae import SAE


class KLConfig(PartConfig):
    """coefficient: of the divergence in nats; beside a `reconstruction`, whose start is about 1."""

    kind: Literal["kl"] = "kl"
    coefficient: NonNegativeFloat | str = 1.0

    def build(self, dims: Dims) -> KL:
        return KL(self.coefficient)


class CrossEntropyConfig(PartConfig):
    """coefficient: of the loss of the next token in nats."""

    kind: Literal["cross_entropy"] = "cross_entropy"
    coefficient: NonNegativeFloat | str = 1.0

    def build(self, dims: Dims) -> CrossEntropy:
        return CrossEntropy(self.coefficient)


class Spliced(LossTerm):
    """A loss of the spliced model's logits."""

    needs_contexts: ClassVar[bool] = True
    needs_model: ClassVar[bool] = True

    def __init__(self, coefficient: float | str) -> None:
        super().__init__()
        self.coefficient = coefficient

    def check(self, sae: SAE) -> None:
        super().check(sae)
        if sae.row_norm != "none":
            remedy = "normalises each row, which is not undone in training: use another SAE"
            raise SettingError("row_norm", sae.row_norm, remedy)

    def loss(self, p: Pass) -> Tensor:
        if p.spliced is None:
            remedy = "needs the language model: use activations that saelab harvests from one"
            raise SettingError("losses", type(self).__name__, remedy)
        logits = p.spliced.spliced_logits(p.recon * p.sae.out_scale)
        return p.setting(self.coefficient) * self.compare(logits, p.spliced)

    @abstractmethod
    def compare(self, logits: Tensor, tokens: SplicedTokens) -> Tensor:
        """Returns the mean over positions, in nats.

        Args:
            logits: of the spliced model, float32 [contexts, positions, vocabulary].
        """


class KL(Spliced):
    """coefficient * KL(clean || spliced), mean over the counted positions."""

    def compare(self, logits: Tensor, tokens: SplicedTokens) -> Tensor:
        clean = log_softmax(tokens.clean_logits()[tokens.mask], dim=-1)
        spliced = log_softmax(logits[tokens.mask], dim=-1)
        return kl_div(spliced, clean, reduction="batchmean", log_target=True)


class CrossEntropy(Spliced):
    """coefficient * loss of the next token, mean over the counted positions that have one."""

    def compare(self, logits: Tensor, tokens: SplicedTokens) -> Tensor:
        counted = tokens.mask[:, 1:]
        if not bool(counted.any()):
            return torch.zeros((), dtype=torch.float32, device=logits.device)
        return cross_entropy(logits[:, :-1][counted], tokens.ids[:, 1:][counted])
