"""Data for a launch: one harvest for training, one for evaluation, one for probing, all cached.

The cache key of a harvest is everything that decides its bytes, so a second launch, or another run
with the same base, finds it complete and starts at once.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from saelab.config import digest
from saelab.data import models
from saelab.data.harvest import HarvestConfig, harvest
from saelab.data.models import LanguageModel
from saelab.data.store import FolderSource, ForeignSource, Source
from saelab.data.tasks import Entry, embedded_entries, entries_from_table
from saelab.data.texts import TextConfig, manifest, tokenize
from saelab.errors import SourceError
from saelab.evals.probing import harvest_probing, identity
from saelab.study.plan import BaseConfig, ProbingConfig

#: Stored precision of probing activations; the model's own channels are probed from the same.
PROBING_DTYPE = torch.float16


@dataclass
class Prepared:
    """Where the data of a launch lies, and what it is.

    Args:
        train, held_out: activations to train on and to evaluate on.
        probing: folder of the probing activations, or None.
        why_no_probing: the reason when there is none.
        provenance: what every evaluation row carries.
    """

    train: Source
    held_out: Source
    probing: Path | None
    why_no_probing: str
    provenance: dict[str, Any]


def prepare(base: BaseConfig, cache: Path, device: str) -> Prepared:
    """Harvests what is not in the cache yet.

    Raises: SourceError, SettingError or MismatchError when a model, text or hook can't be used.
    """
    if base.activations is not None:
        return _foreign(base)
    model = models.load(base.model.patched({"device": device}))
    train = _activations(base, base.train_text, base.train.tokens, model, cache)
    held_out = _activations(base, base.eval_text, base.evaluation.tokens, model, cache)
    probing = _probing(base, model, cache)
    provenance = {
        "model": base.model.path,
        "model_digest": model.digest,
        "tokenizer": f"{type(model.tokenizer).__name__} of {len(model.tokenizer)}",
        "hook_name": base.hook_name,
        "context": base.context,
        "mask": "BOS, EOS and PAD left out",
        "dtype": base.model.dtype,
        "tokens": held_out.header["n_tokens"],
        "text": str(base.eval_text.path or base.eval_text.kind),
        "text_digest": held_out.header["text_digest"],
    }
    reason = "" if probing else "no probing entries are set (evaluation.probing)"
    return Prepared(train, held_out, probing, reason, provenance)


def _foreign(base: BaseConfig) -> Prepared:
    """Activations made elsewhere: the last shard is held out, or the same one when it is alone."""
    source = ForeignSource.open(Path(str(base.activations)))
    provenance = {
        "model": "",
        "model_digest": "",
        "tokenizer": "",
        "mask": "none",
        "hook_name": str(source.header.get("hook_name") or ""),
        "context": base.context,
        "dtype": str(source.header.get("dtype")),
        "tokens": source.header["n_tokens"],
        "text": "",
        "text_digest": source.digest,
    }
    return Prepared(source, source, None, "activations were made elsewhere", provenance)


def _activations(
    base: BaseConfig, text: TextConfig, tokens: int, model: LanguageModel, cache: Path
) -> Source:
    asked: dict[str, Any] = {
        "model_digest": model.digest,
        "model_dtype": base.model.dtype,
        "hook_name": base.hook_name,
        "corpus": manifest(text),
        "column": text.column,
        "context": base.context,
        "asked_tokens": tokens,
        "dtype": base.harvest.dtype,
    }
    folder = cache / "activations" / digest(asked)
    done = folder / base.hook_name.replace("/", "_")
    if (done / "header.json").is_file():
        return FolderSource.open(done, {"asked_tokens": tokens, "hook_name": base.hook_name})
    found = tokenize(text, model.tokenizer, base.context, tokens)
    extras = {"asked_tokens": tokens, "corpus": asked["corpus"]}
    return harvest(model, found, [base.hook_name], base.harvest, folder, extras)[base.hook_name]


def probing_entries(config: ProbingConfig) -> tuple[Entry, ...]:
    """The entries that the settings name."""
    entries: tuple[Entry, ...] = ()
    if config.entries == "embedded":
        entries += embedded_entries(config.train_size, config.test_size)
    for table in config.tables:
        entries += (
            entries_from_table(
                table.name,
                Path(table.path),
                table.text_column,
                table.label_column,
                config.train_size,
                config.test_size,
            ),
        )
    return entries


def _probing(base: BaseConfig, model: LanguageModel, cache: Path) -> Path | None:
    config = base.evaluation.probing
    entries = probing_entries(config)
    if not entries:
        return None
    context = min(config.context, base.context)
    asked = identity(model, base.hook_name, entries, context, PROBING_DTYPE)
    folder = cache / "probing" / digest(asked)
    if not (folder / "probing.json").is_file():
        harvest_probing(model, base.hook_name, entries, context, PROBING_DTYPE).save(folder)
    return folder


def harvest_bytes(base: BaseConfig, d_in: int) -> int:
    """Bytes that the launch's activations need on disk."""
    width = {"float32": 4, "bfloat16": 2, "float16": 2}[
        HarvestConfig(dtype=base.harvest.dtype).dtype
    ]
    return (base.train.tokens + base.evaluation.tokens) * d_in * width


def open_source(path: Path, foreign: bool) -> Source:
    """The source that `prepare` made, from its folder (in a worker)."""
    return ForeignSource.open(path) if foreign else FolderSource.open(path)


def source_path(source: Source) -> Path:
    """Raises: SourceError when the source is not on disk, so that workers can't read it."""
    path = getattr(source, "path", None)
    if path is None:
        raise SourceError("a launch needs its activations in a folder")
    return Path(path)
