"""Loss of the unchanged language model on held-out text, next to that of a unigram model.

    unigram   -mean log p(token),   p = (count in the training text + 1) / (tokens + vocabulary)

A model that predicts a text worse than counts of its tokens do has not learnt such text, or was not
read correctly (another tokenizer, weights in another order): then no loss says anything about an
SAE. Both losses are means over the same counted tokens of a few held-out contexts.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from saelab.data.activations.joined import Paths, is_growing
from saelab.data.activations.store import Source
from saelab.data.language_model import LanguageModel
from saelab.data.text.tokens import Tokens
from saelab.runtime.counting import count
from saelab.storage.remote import Remote

#: Positions of the held-out text that are predicted, rounded to whole contexts. Our choice: a good
#: model is nats ahead of its unigram model, and the error of their difference is about .1 nats.
POSITIONS = 1024


@dataclass(frozen=True, kw_only=True)
class CleanLoss:
    """Losses in nats per token.

    Args:
        clean, unigram: of the unchanged model, and of the unigram model.
        tokens: held-out tokens that both predict.
        training_tokens: tokens that the unigram model has counted.
    """

    clean: float
    unigram: float
    tokens: int
    training_tokens: int

    def warning(self, model: str, text: str) -> str:
        """Says that the model is worse than counting, and what to do; '' where it is not.

        Args:
            model, text: names of the model and of the held-out text.
        """
        if self.clean <= self.unigram:
            return ""
        return (
            f"model {model} predicts the text {text} worse than a unigram model does: "
            f"{self.clean:.3f} nats per token against {self.unigram:.3f} on the same "
            f"{count(self.tokens, 'held-out token')} (counted on "
            f"{count(self.training_tokens, 'token')} of the training text, add-one smoothed): "
            "loss recovered means nothing here, so name text that the model knows "
            "(train_text, eval_text), or check its weights and tokenizer"
        )


@torch.no_grad()
def measure_clean_loss(
    model: LanguageModel, training: Tensor, ids: Tensor, mask: Tensor
) -> CleanLoss | None:
    """Measures both losses; None where no token counts.

    Args:
        training: counted token ids of the training text, [n].
        ids: of held-out contexts [contexts, positions]; the first `POSITIONS` positions are used.
        mask: of them, True where a position counts.
    """
    contexts = max(1, POSITIONS // ids.shape[1])
    ids, mask = ids[:contexts].long(), mask[:contexts, 1:]
    if not bool(mask.any()):
        return None
    each = [model.losses(context[None]).cpu() for context in ids]
    clean = torch.cat(each)[mask].double().mean()
    largest = int(max(ids.max(), training.max() if len(training) else 0)) + 1
    vocabulary = max(model.vocabulary or 0, largest)
    counts = torch.bincount(training.long(), minlength=vocabulary)[ids[:, 1:][mask]]
    total = math.log(len(training) + vocabulary)
    unigram = total - (counts + 1).double().log().mean()
    return CleanLoss(
        clean=float(clean),
        unigram=float(unigram),
        tokens=int(mask.sum()),
        training_tokens=len(training),
    )


def _is_local(source: Source) -> bool:
    """Returns True if reading a source moves nothing over the network."""
    path = getattr(source, "path", None)
    places = path.all if isinstance(path, Paths) else [path]
    return not any(isinstance(place, Remote) for place in places)


def clean_loss(
    model: LanguageModel, train: Source, held_out: Source, tokens: Tokens | None
) -> CleanLoss | None:
    """Measures both losses on the text of a launch.

    Args:
        train, held_out: activations of the texts.
        tokens: of the training text, where they were just made.

    Returns: None for a model without a head, and where the training tokens would have to be read
        from a URL.
    """
    if not model.has_head:
        return None
    if tokens is None:
        if is_growing(train) or not _is_local(train):
            return None
        shard = train.shard(0)
        counted = None if shard.ids is None else shard.ids[shard.mask]
    else:
        counted = tokens.ids[tokens.mask]
    shown = held_out.shard(0)
    if counted is None or shown.ids is None:
        return None
    return measure_clean_loss(model, counted, shown.ids, shown.mask)
