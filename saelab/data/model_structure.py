"""Structure of a language model: its blocks, its vocabulary and its longest context.

Of a model with several parts (images and text) only the text part counts.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from saelab.errors import SourceError

#: Names in a model's settings for the number of positions that its code can take.
CONTEXT_SETTINGS = ("max_position_embeddings", "max_seq_len")


def find_blocks(model: Any, n_layers: int) -> nn.ModuleList:
    """Returns the blocks: of the text part's lists with `n_layers` modules that with most weights.

    Raises: SourceError when there is no such list.
    """
    lists = [
        module
        for module in _text_part(model).modules()
        if isinstance(module, nn.ModuleList) and len(module) == n_layers
    ]
    if not lists:
        raise SourceError(
            f"{type(model).__name__} has no list of {n_layers} blocks: only models with a plain "
            "list of layers can be hooked"
        )
    return max(lists, key=lambda blocks: sum(p.numel() for p in blocks.parameters()))


def path_of(model: nn.Module, part: nn.Module) -> str:
    """Returns the path of a module in the model."""
    return next(path for path, module in model.named_modules() if module is part)


def longest_context(model: Any) -> int | None:
    """Returns the number of positions that the model can take; None where nothing limits it.

    A table of positions may have fewer rows for them than it has: RoBERTa counts positions from its
    padding id on, OPT from 2 on.
    """
    text = model.config.get_text_config()
    limits = [getattr(text, name, None) for name in CONTEXT_SETTINGS]
    for path, module in _text_part(model).named_modules():
        if isinstance(module, nn.Embedding) and "position" in path.rpartition(".")[2]:
            padding = module.padding_idx
            first = getattr(module, "offset", 0) if padding is None else padding + 1
            limits.append(module.num_embeddings - int(first))
    known = [limit for limit in limits if isinstance(limit, int) and limit > 0]
    return min(known, default=None)


def embedding_rows(model: Any) -> int | None:
    """Returns the number of token ids that have an embedding; None for a model without a table."""
    try:
        table = model.get_input_embeddings()
    except NotImplementedError:
        return None
    weight = getattr(table, "weight", None)
    return None if weight is None else len(weight)


def token_settings(config: Any) -> list[int]:
    """Returns the ids of special tokens that a model's settings name, such as that of an image."""
    values = {**config.to_dict(), **config.get_text_config().to_dict()}
    named = [v for n, v in values.items() if n.endswith(("token_id", "token_index"))]
    return [value for value in named if isinstance(value, int)]


def _text_part(model: Any) -> nn.Module:
    """Returns the innermost part that was built from the settings of the text model."""
    text = model.config.get_text_config()
    if text is model.config:
        return model
    parts = [m for m in model.modules() if type(getattr(m, "config", None)) is type(text)]
    return next((part for part in parts if hasattr(part, "get_input_embeddings")), model)
