"""The language model with an SAE in training spliced into it, for losses that ask for it."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor

from saelab.data.activations.stream import Tokens
from saelab.data.language_model import LanguageModel
from saelab.errors import SettingError
from saelab.sae import SAE
from saelab.training.optim import TrainConfig


class SplicedModel:
    """A language model and the hook points at which reconstructions replace its activations.

    Args:
        model: is not trained.
        hook_names: of the reconstructed activations, in the order of their channels.
    """

    def __init__(self, model: LanguageModel, hook_names: Sequence[str]) -> None:
        self.model, self.hook_names = model, tuple(hook_names)

    def on(self, sae: SAE, tokens: Tokens | None) -> Splice:
        """Returns the model on the contexts of a batch.

        Raises: SettingError where the batch does not say which tokens its rows are of.
        """
        if tokens is None:
            remedy = "is not stored with these activations: harvest them again with saelab"
            raise SettingError("token ids", None, remedy)
        return Splice(self, sae.dims.target_blocks, tokens)


class Splice:
    """The model on the contexts of one batch; see `saelab.parts.forward_pass.SplicedTokens`."""

    def __init__(self, spliced: SplicedModel, widths: Sequence[int], tokens: Tokens) -> None:
        device = next(spliced.model.model.parameters()).device
        self.spliced, self.widths = spliced, tuple(widths)
        self.ids, self.mask = tokens.ids.to(device), tokens.mask.to(device)

    def clean_logits(self) -> Tensor:
        return self.spliced.model.logits(self.ids).float().clone()

    def spliced_logits(self, recon: Tensor) -> Tensor:
        blocks = recon.split(self.widths, dim=1)
        named = zip(self.spliced.hook_names, blocks, strict=True)
        splice = {name: self._replace(block) for name, block in named}
        return self.spliced.model.logits(self.ids, splice=splice, gradient=True).float()

    def _replace(self, rows: Tensor) -> Callable[[Tensor], Tensor]:
        def replace(x: Tensor) -> Tensor:
            return x.masked_scatter(self.mask.unsqueeze(-1), rows.to(x.dtype))

        return replace


def needs_model(sae: SAE) -> bool:
    """Returns True where a part reads the language model's output in training."""
    return any(part.needs_model for part in sae.parts())


def spliced_for(sae: SAE, config: TrainConfig, spliced: SplicedModel | None) -> SplicedModel | None:
    """Returns the model where the SAE needs it, None where it does not.

    Raises: SettingError where it is needed and there is none, or only some positions are trained
        on.
    """
    if not needs_model(sae):
        return None
    names = ", ".join(type(part).__name__ for part in sae.parts() if part.needs_model)
    if spliced is None:
        remedy = "needs the language model: use activations that saelab harvests from one"
        raise SettingError("losses", names, remedy)
    if config.positions is not None:
        remedy = f"{names} needs all positions of a context: leave it out"
        raise SettingError("train.positions", config.positions, remedy)
    return spliced
