"""Language models that SAEs are attached to: from any form to hook points, checks, generation."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from saelab.data import language_model
from saelab.data.hook_names import describe_hooks, split_hooks
from saelab.data.language_model import LanguageModel, ModelConfig
from saelab.data.model_structure import path_of
from saelab.errors import MismatchError, SettingError
from saelab.runtime.counting import count
from saelab.sae import SAE


@dataclass(frozen=True)
class NoTokenizer:
    """Stand-in for the tokenizer of a model that is given without one."""

    all_special_ids: list[int] = field(default_factory=list)

    def convert_ids_to_tokens(self, token: int) -> str:
        return f"token {token}"


def as_language_model(
    model: Any, tokenizer: Any = None, active: Iterable[LanguageModel] = ()
) -> LanguageModel:
    """Returns a model with hook points from any form that `attach` takes.

    Args:
        active: models with SAEs in them, whose hooks would disturb the trial of another.

    Raises: SettingError for anything else; SourceError for a model that does not run on text.
    """
    if isinstance(model, LanguageModel):
        return model
    if isinstance(model, (str, Path)):
        return language_model.load(ModelConfig(path=str(model)))
    same = next((one for one in active if one.model is model), None)
    if same is not None:
        twin = copy.copy(same)
        twin.tokenizer = same.tokenizer if tokenizer is None else tokenizer
        return twin
    if not isinstance(model, nn.Module) or not hasattr(model, "get_input_embeddings"):
        remedy = "give a transformers model, or a path such as 'embedded'"
        raise SettingError("model", type(model).__name__, remedy)
    given: Any = model
    given_tokenizer: Any = NoTokenizer() if tokenizer is None else tokenizer
    training = [module for module in given.modules() if module.training]
    try:
        return LanguageModel(
            given.eval(),
            given_tokenizer,
            ModelConfig(path=given.config.name_or_path or type(given).__name__),
            digest="",
            has_head=given.can_generate(),
        )
    finally:
        for module in training:
            module.training = True


def name_of(model: Any) -> str:
    """Returns the name or folder of a model in any form that `attach` takes; '' where it has none,
    as one that was built in memory."""
    if isinstance(model, (str, Path)):
        return str(model)
    config = getattr(model, "config", None)
    return str(getattr(config, "path", "") or getattr(config, "name_or_path", "") or "")


def check_origin(
    model: LanguageModel, name: str, sae: SAE, hook: str, places: Sequence[str]
) -> None:
    """Checks that the SAE was trained on this model, and at these hook points by any of their
    names.

    Raises: MismatchError, which names both sides of every difference.
    """
    here = describe_hooks([hook], places if sae.has_target else ())
    trained = [one for side in split_hooks(sae.origin.hook_name) for one in side]
    asked = [hook, *places] if sae.has_target else [hook]
    same = len(trained) == len(asked) and all(
        _same_place(model, *pair) for pair in zip(trained, asked, strict=True)
    )
    sae.origin.check(name, "" if same else here, "set allow_mismatch=True")


def _same_place(model: LanguageModel, one: str, other: str) -> bool:
    """Returns True where two names denote the same side of the same module."""
    try:
        points = [model.hook_point(name) for name in (one, other)]
    except SettingError:  # the model has no such place
        return False
    return points[0].module is points[1].module and points[0].side == points[1].side


def modules_around(model: LanguageModel) -> list[nn.Module]:
    """Returns the modules that hold the blocks, the whole model first: a pass goes through some of
    them, and which ones depends on the model's code and on what is called."""
    path = path_of(model.model, model.blocks).split(".")[:-1]
    return [model.model.get_submodule(".".join(path[:n])) for n in range(len(path) + 1)]


def check_places(
    model: LanguageModel, sae: SAE, hook: str | None, target: str | Sequence[str] | None
) -> tuple[str, tuple[str, ...]]:
    """Returns the hook points that are read and replaced; raises as `attach`."""
    if len(sae.dims.input_blocks) > 1:
        remedy = "the SAE reads all of them at once, but one activation is replaced before the "
        remedy += "next is reached: attach an SAE or a transcoder of one input"
        raise SettingError("hook", len(sae.dims.input_blocks), remedy)
    if hook is None:
        raise SettingError("hook", None, "name the hook point, such as blocks.2.hook_resid_post")
    targets = () if target is None else (target,) if isinstance(target, str) else tuple(target)
    if sae.has_target and len(targets) != len(sae.dims.targets):
        number = count(len(sae.dims.targets), "target")
        remedy = f"the SAE is a transcoder of {number}: name as many"
        raise SettingError("target", target, remedy)
    if targets and not sae.has_target:
        raise SettingError("target", target, "the SAE reconstructs its input: leave it out")
    places = targets or (hook,)
    ids = torch.zeros(1, 2, dtype=torch.int64)
    widths = {name: x.shape[2] for name, x in model.activations(ids, None, (hook, *places)).items()}
    if widths[hook] != sae.d_in:
        raise wrong_width(hook, sae.d_in, widths[hook])
    for name, width in zip(places, sae.dims.target_blocks, strict=True):
        if widths[name] != width:
            raise wrong_width(name, width, widths[name])
    return hook, places


def wrong_width(hook: str, width: int, actual: int) -> MismatchError:
    """Returns the error of an SAE whose width is not that of the activations."""
    problem = f"the SAE has {count(width, 'channel')}, but the activations at {hook} have {actual}"
    return MismatchError(f"{problem}: attach it at the hook point that it was trained on")


@torch.no_grad()
def generate_text(model: LanguageModel, ids: Tensor, tokens: int, cache: bool = True) -> str:
    """Continues ids [1, positions] by the most likely tokens; returns the text after the first id.

    Raises: SettingError where the model has no head, or takes fewer positions.
    """
    if not model.has_head:
        kind = type(model.model).__name__
        raise SettingError("model", kind, "has no language-model head: name a causal model")
    if tokens < 1:
        raise SettingError("tokens", tokens, "generate at least 1 token")
    longest = model.max_context
    if longest is not None and ids.shape[1] + tokens > longest:
        most = f"the model takes {count(longest, 'position')} and the prompt has {ids.shape[1]}"
        raise SettingError("tokens", tokens, f"{most}: lower it, or shorten the prompt")
    generate: Any = model.model.generate
    out = generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=tokens,
        do_sample=False,
        use_cache=cache,
        pad_token_id=model.tokenizer.pad_token_id or 0,
    )
    return str(model.tokenizer.decode(out[0, 1:], skip_special_tokens=True))
