"""Activations at the last token of every text of sae-probes' data sets, made once and stored.

    ids  = the tokenizer's ids with the special tokens that it adds itself; of a longer text the
           last 1,024 (or as many as the model has positions), special tokens included
    row  = the hook's value at the last id, float32

Source: sae-probes 0.4.2 (truncation on the left, padding on the right, which a causal model does
not see; an attention mask hides it from others). One folder of the cache for each model, hook and
data set: a pass of the language model serves all SAEs, and an interrupted harvest goes on.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from saelab.config import digest
from saelab.data.activations.parallel_passes import group_by_length, run_in_lanes
from saelab.data.language_model import LanguageModel
from saelab.data.probing.activations import PASS_TOKENS, ProbingData, ProbingEntry
from saelab.data.probing.sae_probes import (
    SHIFTED,
    LabelledPrompts,
    SaeProbesConfig,
    choose_datasets,
    find_folder,
)
from saelab.data.text.characters import whole_characters
from saelab.errors import SourceError
from saelab.progress import progress
from saelab.runtime.panics import panics_as_errors
from saelab.storage.cache import fetch, share
from saelab.storage.lock import lock_folder

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

#: Ids of a text at most; the package's.
MOST_TOKENS = 1024


@dataclass(frozen=True, kw_only=True)
class LastTokens:
    """Activations of the data sets, and how they are probed; plain data, sent to workers.

    Args:
        config: settings.
        folders: name of a data set -> folder of its activations; those of shifted texts end in
            `SHIFTED`.
    """

    config: SaeProbesConfig
    folders: dict[str, Path]

    @property
    def names(self) -> list[str]:
        """Names of the data sets, without those of shifted texts."""
        return [name for name in self.folders if not name.endswith(SHIFTED)]

    def load(self, name: str) -> ProbingEntry:
        """Reads a data set; its rows are [texts, d], float32.

        Raises: DamageError when a file was changed after it was written.
        """
        return ProbingData.load(self.folders[name]).entries[0]

    def load_shifted(self, name: str) -> ProbingEntry | None:
        """Reads the shifted texts of a data set; None where there are none."""
        shifted = name + SHIFTED
        return self.load(shifted) if shifted in self.folders else None

    def content(self) -> dict[str, Any]:
        """Returns all that the numbers depend on, for keys of the cache."""
        settings = self.config.model_dump(mode="json", exclude={"path", "datasets"})
        return {"settings": settings, "activations": [f.name for f in self.folders.values()]}

    def provenance(self) -> dict[str, Any]:
        """Returns the fields of a row's provenance that differ from those of held-out text."""
        headers = [ProbingData.read_header(folder) for folder in self.folders.values()]
        return {
            "context": headers[0]["context"],
            "mask": headers[0]["mask"],
            "tokens": sum(ProbingData.count_tokens(folder) for folder in self.folders.values()),
            "text": "data sets of sae-probes",
            "text_digest": digest([header["entries"] for header in headers]),
        }


def prepare_last_tokens(
    config: SaeProbesConfig, model: LanguageModel, hook_name: str, cache: Path
) -> LastTokens:
    """Harvests what is not in the cache yet.

    Raises: SettingError or SourceError when a data set can't be had or a text has no token.
    """
    chosen = choose_datasets(config, find_folder(config.path))
    if not chosen:
        raise SourceError("evaluation.sae_probes.datasets chooses no data set: name one, or 'all'")
    folders: dict[str, Path] = {}
    with progress("last tokens", len(chosen), "data sets") as bar:
        for prompts in chosen:
            asked = identity(model, hook_name, prompts)
            folder = cache / "probing" / digest(asked)
            if not (fetch(cache, folder, "probing.json") and ProbingData.is_saved(folder, asked)):
                with lock_folder(folder, "is harvesting its probing activations"):
                    entry = harvest_last_tokens(model, hook_name, prompts)
                    ProbingData((entry,), asked).save(folder)
                    share(cache, folder)
            folders[prompts.name] = folder
            bar.advance()
    return LastTokens(config=config, folders=folders)


def identity(model: LanguageModel, hook_name: str, prompts: LabelledPrompts) -> dict[str, Any]:
    """Returns the header of the activations of `harvest_last_tokens`: all they depend on."""
    return {
        "rows": "last token",
        "model": model.config.path,
        "model_digest": model.digest,
        "model_dtype": model.config.dtype,
        "hook_name": hook_name,
        **model.hook_identity(hook_name),
        "context": _most_tokens(model),
        "mask": "last token alone",
        "entries": prompts.digest,
        "dtype": "float32",
    }


def harvest_last_tokens(
    model: LanguageModel, hook_name: str, prompts: LabelledPrompts
) -> ProbingEntry:
    """Computes the activations of one data set; all its rows count as training rows.

    Raises: SourceError when a text has no token or an activation is not finite.
    """
    ids = encode_prompts(prompts, model.tokenizer, _most_tokens(model))
    lengths = torch.tensor([len(each) for each in ids], dtype=torch.int64)
    first = torch.tensor([ids[0][:2]], dtype=torch.int64)
    d = model.activations(first, None, [hook_name])[hook_name].shape[-1]
    rows = torch.empty(len(ids), d, dtype=torch.float32)

    def fill(model: LanguageModel, texts: Tensor) -> int:
        inputs = _pad([ids[i] for i in texts.tolist()])
        x = model.activations(*inputs, [hook_name])[hook_name]
        last = lengths[texts] - 1
        rows[texts] = x[torch.arange(len(texts)), last.to(x.device)].cpu().float()
        return len(texts)

    groups = group_by_length(lengths, PASS_TOKENS)
    with closing(run_in_lanes(model, fill, groups)) as counts:
        for _ in counts:
            pass
    if not rows.isfinite().all():
        raise SourceError(
            f"{hook_name} has activations that are not finite on {prompts.name}: name another hook "
            "or run the model in float32"
        )
    return ProbingEntry(
        name=prompts.name,
        classes=prompts.classes,
        rows=rows,
        offsets=torch.arange(len(ids) + 1),
        labels=torch.tensor(prompts.labels, dtype=torch.int64),
        is_train=torch.ones(len(ids), dtype=torch.bool),
    )


def _most_tokens(model: LanguageModel) -> int:
    return min(MOST_TOKENS, model.max_context or MOST_TOKENS)


def encode_prompts(
    prompts: LabelledPrompts, tokenizer: PreTrainedTokenizerBase, most: int
) -> list[list[int]]:
    """Returns the ids of each text, with the tokenizer's special tokens, cut on the left.

    Raises: SourceError when a text has no id or can't be read by the tokenizer.
    """
    tokenizer = copy.deepcopy(tokenizer)  # which a call with truncation changes
    tokenizer.truncation_side = "left"
    texts = [whole_characters(text) for text in prompts.texts]
    try:
        with panics_as_errors():
            batch = tokenizer(
                texts,
                truncation=True,
                max_length=most,
                return_attention_mask=False,
                verbose=False,
            )
    except MemoryError:
        raise
    except Exception as error:  # tokenizers raise no class of their own
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise SourceError(
            f"the tokenizer can't read the texts of {prompts.name} ({reason}): leave the data set "
            "out (evaluation.sae_probes.datasets), or take another tokenizer"
        ) from error
    ids: list[list[int]] = batch["input_ids"]  # type: ignore[assignment]
    if not all(ids):
        text = prompts.texts[next(i for i, each in enumerate(ids) if not each)]
        raise SourceError(
            f"{prompts.name} has a text without a token ({text[:40]!r}): leave the data set out "
            "(evaluation.sae_probes.datasets), or take another tokenizer"
        )
    return ids


def _pad(ids: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor | None]:
    """Pads ids on the right with 0; returns them and the attention mask, None without padding."""
    longest = max(map(len, ids))
    padded = torch.zeros(len(ids), longest, dtype=torch.int64)
    attention = torch.zeros(len(ids), longest, dtype=torch.bool)
    for row, each in enumerate(ids):
        padded[row, : len(each)] = torch.tensor(each, dtype=torch.int64)
        attention[row, : len(each)] = True
    return padded, None if attention.all() else attention
