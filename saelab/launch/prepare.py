"""Data for a launch: one harvest for training, one for evaluation, one for probing, all cached.

The cache key of a harvest is everything that decides its bytes, so a second launch, or another run
with the same base, finds it complete and starts at once. The training activations come last: where
a launch overlaps its harvest with training, they alone are still to be made when this is done.
"""

from __future__ import annotations

import sys
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch

from saelab.config import digest
from saelab.data import language_model
from saelab.data.activations.foreign import ForeignSource
from saelab.data.activations.growing import GrowingSource
from saelab.data.activations.harvest import harvest, harvest_steps, hook_folders
from saelab.data.activations.joined import Paths, is_growing, joined
from saelab.data.activations.store import FolderSource, Shard, Source, reopen
from saelab.data.clean_loss import CleanLoss, clean_loss
from saelab.data.devices import check_device
from saelab.data.language_model import LanguageModel
from saelab.data.model_location import locate_model
from saelab.data.packaged.models import model_source
from saelab.data.probing.activations import ProbingData, harvest_probing, identity
from saelab.data.probing.embedded import Entry, embedded_entries
from saelab.data.probing.last_tokens import LastTokens, prepare_last_tokens
from saelab.data.probing.saebench import describe_missing, saebench_entries
from saelab.data.probing.tables import entries_from_table
from saelab.data.text.corpus import TextConfig, check_texts, manifest
from saelab.data.text.tokens import Tokens, tokenize
from saelab.errors import DamageError, SettingError, ShortTextError, SourceError
from saelab.evals.measure import PROBING
from saelab.evals.sae_probes import DEFINITIONS as SAE_PROBES
from saelab.runtime.counting import count
from saelab.runtime.main_guard import refuse_unguarded_script
from saelab.storage.cache import activations_folder, fetch, share
from saelab.storage.lock import lock_folder
from saelab.storage.remote import Place, RemoteError, place_of
from saelab.study.calibration import calibration_tokens, why_not_calibrated
from saelab.study.evaluation import ProbingConfig
from saelab.study.plan import BaseConfig
from saelab.training.spliced_model import SplicedModel, needs_model
from saelab.version import __version__

#: Stored precision of probing activations; the model's own channels are probed from the same.
#: Definition 1 keeps float32.
PROBING_DTYPE = torch.float16

Part = Literal["train", "held_out"]


def no_steps() -> Generator[None, None, None]:
    """Steps of activations that are complete: none."""
    yield from ()


@dataclass(kw_only=True)
class LaunchData:
    """Data of a launch: where it lies, and what it is.

    Args:
        train, held_out: activations to train on and to evaluate on.
        calibration: activations of held-out text that no metric reads, on which L0 is measured
            while an SAE is trained; None where there are none.
        why_no_calibration: the reason, or ''.
        probing: folder of the probing activations, or None.
        why_no_probing: the reason when there is none, or when some entries are missing.
        missing_entries: which, with the reason of each.
        provenance: what evaluation rows carry, and `of_probing` what differs in those of probing.
        model_source: where the model's weights are from, `{}` where its folder does not say.
        sae_probes: last tokens of sae-probes' data sets, None where they are not asked for; and
            `of_sae_probes` what differs in the provenance of their rows.
        steps: make what is missing of `train`, a `GrowingSource` then; none where it is complete.
        clean_loss: of the unchanged model on the held-out text; None where it has none.
        model: the language model, where it was to be kept and a loss of the settings reads it.
    """

    train: Source
    held_out: Source
    probing: Path | None
    why_no_probing: str
    provenance: dict[str, Any]
    steps: Generator[None, None, None] = field(default_factory=no_steps)
    calibration: Source | None = None
    why_no_calibration: str = ""
    missing_entries: dict[str, str] = field(default_factory=dict)
    of_probing: dict[str, Any] = field(default_factory=dict)
    model_source: dict[str, Any] = field(default_factory=dict)
    sae_probes: LastTokens | None = None
    of_sae_probes: dict[str, Any] = field(default_factory=dict)
    clean_loss: CleanLoss | None = None
    model: LanguageModel | None = None

    @property
    def warning(self) -> str:
        """Says that the model is worse than a unigram model on the text; '' where it is not."""
        names = self.provenance["model"], self.provenance["text"]
        return self.clean_loss.warning(*names) if self.clean_loss else ""

    def provenance_of(self, definition: str) -> dict[str, Any]:
        """Provenance of a row of a definition: on what it was measured, and the package."""
        own = self.of_probing if definition in PROBING.values() else {}
        own = self.of_sae_probes if definition in SAE_PROBES.values() else own
        return self.provenance | own | {"saelab": __version__}

    @property
    def train_digest(self) -> str | None:
        """Digest of the training activations, None while they were still to be made."""
        return None if is_growing(self.train) else self.train.digest

    @property
    def calibration_digest(self) -> str | None:
        """Digest of the calibration activations, None where there are none."""
        return None if self.calibration is None else self.calibration.digest


def prepare(
    base: BaseConfig,
    cache: Path,
    device: str,
    overlap: bool = False,
    to_train: bool = True,
    keep_model: bool = False,
) -> LaunchData:
    """Harvests what is not in the cache yet.

    Args:
        overlap: leaves the training activations to `LaunchData.steps`.
        to_train: whether SAEs are trained on it; else there is no calibration.
        keep_model: stores the language model in the data where a loss of the settings reads it.

    Raises: SourceError, SettingError or MismatchError when a model, text or hook can't be used.
    """
    refuse_unguarded_script()
    check_device(device)
    if base.activations is not None:
        return _foreign(base)
    check_texts(base.train_text, base.eval_text)
    model = language_model.load(base.model.patched({"device": device}))
    model.check_context(base.context)
    held_out, *_ = _activations(base, base.eval_text, base.evaluation.tokens, model, cache)
    calibration, why_no_calibration = _calibration(base, model, cache) if to_train else (None, "")
    probing, absent = _probing(base, model, cache)
    last_tokens = sae_probes_data(base, model, cache) if base.evaluation.asks_sae_probes else None
    train, steps, tokens = _activations(
        base, base.train_text, base.train.tokens, model, cache, in_steps=overlap
    )
    provenance = {
        "model": base.model.path,
        "model_digest": model.digest,
        "tokenizer": f"{type(model.tokenizer).__name__} of {len(model.tokenizer)}",
        "hook_name": base.hook_text,
        "context": base.context,
        "mask": "BOS, EOS and PAD left out",
        "dtype": base.model.dtype,
        "tokens": held_out.header["n_tokens"],
        "text": str(base.eval_text.path or base.eval_text.kind),
        "text_digest": held_out.header["text_digest"],
    }
    reason = "" if probing else "no probing entries are set (evaluation.probing)"
    reason = describe_missing(absent) or reason
    own = _of_probing(probing) if probing else {}
    return LaunchData(
        train=train,
        held_out=held_out,
        probing=probing,
        why_no_probing=reason,
        provenance=provenance,
        steps=steps,
        calibration=calibration,
        why_no_calibration=why_no_calibration,
        missing_entries=absent,
        of_probing=own,
        model_source=model_source(Path(locate_model(base.model.path))),
        sae_probes=last_tokens,
        of_sae_probes=last_tokens.provenance() if last_tokens else {},
        clean_loss=clean_loss(model, train, held_out, tokens) if to_train else None,
        model=model if keep_model and _reads_model(base) else None,
    )


def held_out(base: BaseConfig, cache: Path) -> tuple[Source, LanguageModel | None]:
    """The held-out activations alone, and the model that they come from where there is one."""
    if base.activations is not None:
        return _foreign(base).held_out, None
    model = language_model.load(base.model)
    model.check_context(base.context)
    source, *_ = _activations(base, base.eval_text, base.evaluation.tokens, model, cache)
    return source, model


def _foreign(base: BaseConfig) -> LaunchData:
    """Activations made elsewhere, of which a part is held out."""
    source = ForeignSource.open(place_of(str(base.activations)), base.harvest.read_ahead)
    train, held_out = ForeignPart(source, "train"), ForeignPart(source, "held_out")
    provenance = {
        "model": "",
        "model_digest": "",
        "tokenizer": "",
        "mask": "none",
        "hook_name": str(source.header.get("hook_name") or ""),
        "context": base.context,
        "dtype": str(source.header.get("dtype")),
        "tokens": held_out.header["n_tokens"],
        "text": "",
        "text_digest": source.digest,
    }
    return LaunchData(
        train=train,
        held_out=held_out,
        probing=None,
        why_no_probing="activations were made elsewhere",
        why_no_calibration=why_not_calibrated(base),
        provenance=provenance,
    )


class ForeignPart:
    """The training or the held-out part of activations made elsewhere.

    Held out is the last file or, where there is one file only, its last tenth.
    """

    def __init__(self, source: ForeignSource, part: Part) -> None:
        self.source, self.path, self.held_out = source, source.path, part == "held_out"
        self.alone = source.n_shards == 1
        last = source.n_shards - 1
        self._shards = [last] if self.held_out else list(range(max(1, last)))
        self.header = source.header | {"part": part, "n_tokens": sum(self.shard_counts)}

    @property
    def d(self) -> int:
        return self.source.d

    @property
    def n_shards(self) -> int:
        return len(self._shards)

    @property
    def shard_counts(self) -> list[int]:
        if self.alone:
            return [self.shard(0).n_tokens]
        return [self.source.shard_counts[i] for i in self._shards]

    @property
    def digest(self) -> str:
        return f"{self.source.digest}/{self.header['part']}"

    def shard(self, i: int) -> Shard:
        shard = self.source.shard(self._shards[i])
        if not self.alone:
            return shard
        cut = len(shard.x) - max(1, len(shard.x) // 10)
        kept = slice(cut, None) if self.held_out else slice(cut)
        return Shard(shard.x[kept], shard.mask[kept])


def _activations(
    base: BaseConfig,
    text: TextConfig,
    tokens: int,
    model: LanguageModel,
    cache: Path,
    in_steps: bool = False,
    after: int = 0,
) -> tuple[Source, Generator[None, None, None], Tokens | None]:
    """The activations of all hook points, the steps that they still need, and the tokens of the
    text where these were not stored yet.

    Args:
        after: tokens whose contexts are left out at the beginning of the text; these activations
            are read only, and have no target.
    """
    hooks = base.input_hooks if after else base.hooks
    asked: dict[str, Any] = {
        "model_digest": model.digest,
        "model_dtype": base.model.dtype,
        **_asked_hooks(hooks, model),
        "corpus": manifest(text),
        "column": text.column,
        "joined": text.joined,
        "context": base.context,
        "asked_tokens": tokens,
        "dtype": base.harvest.dtype,
    }
    if after:
        asked["after"] = after
    held_out = text == base.eval_text and not after
    if held_out:  # whose metrics have an interval over documents
        asked["documents"] = True
    key = digest(asked)
    folder = activations_folder(cache) / key
    expected = {"asked_tokens": tokens, "key": key}
    stored = {
        hook: _stored(place, expected | {"hook_name": hook}, base)
        for hook, place in hook_folders(hooks, folder).items()
    }

    def side_by_side(sources: Mapping[str, Source]) -> Source:
        targets = () if after else base.target_hooks
        return joined([sources[h] for h in base.input_hooks], [sources[h] for h in targets])

    complete = {hook: source for hook, source in stored.items() if source is not None}
    if len(complete) == len(hooks):
        return side_by_side(complete), no_steps(), None
    place = folder / "tokens"
    found = tokenize(
        text,
        model.tokenizer,
        base.context,
        tokens,
        cache=place,
        model_digest=model.digest,
        after=after,
    )
    if not held_out:
        found = replace(found, documents=None)
    extras = {"asked_tokens": tokens, "corpus": asked["corpus"], "key": key}
    extras |= {"after": after} if after else {}
    if in_steps:
        growing, steps = harvest_steps(model, found, hooks, base.harvest, folder, extras)
        return side_by_side(growing), steps, found
    done = harvest(model, found, hooks, base.harvest, folder, extras)
    return side_by_side(done), no_steps(), found


def _asked_hooks(hooks: Sequence[str], model: LanguageModel) -> dict[str, Any]:
    """Entries of a harvest's key for its hook points: of several, the whole set."""
    if len(hooks) == 1:
        return {"hook_name": hooks[0], **model.hook_identity(hooks[0])}
    return {"hook_names": {hook: model.hook_identity(hook) for hook in sorted(hooks)}}


def _stored(done: Place, expected: dict[str, Any], base: BaseConfig) -> FolderSource | None:
    """The complete activations of a hook point; None where they are to be made, or made again."""
    if not (done / "header.json").is_file():
        return None
    try:
        found = FolderSource.open(done, expected, base.harvest.read_ahead)
        if not found.checks_reads:
            found.verify()
    except RemoteError:  # no word about what is there
        raise
    except (DamageError, SourceError) as error:
        print(f"{error} (done now)", file=sys.stderr)
        reopen(done)
        return None
    return found


def _calibration(base: BaseConfig, model: LanguageModel, cache: Path) -> tuple[Source | None, str]:
    """The activations of the held-out text after the evaluated contexts, or why there are none."""
    tokens = calibration_tokens(base)
    if not tokens:
        return None, why_not_calibrated(base)
    try:
        after = base.evaluation.tokens
        return _activations(base, base.eval_text, tokens, model, cache, after=after)[0], ""
    except ShortTextError:
        why = f"besides the evaluated text less is held out than {count(tokens, 'token')}"
        return None, f"{why} (evaluation.calibration_tokens)"


def probing_entries(config: ProbingConfig) -> tuple[tuple[Entry, ...], dict[str, str]]:
    """The entries that the settings name, and why those of them are missing that can't be had."""
    entries: tuple[Entry, ...] = ()
    absent: dict[str, str] = {}
    if config.entries == "saebench":
        entries, absent = saebench_entries(
            config.sources, config.train_size, config.test_size, config.definition
        )
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
    return entries, absent


def _probing(
    base: BaseConfig, model: LanguageModel, cache: Path
) -> tuple[Path | None, dict[str, str]]:
    """The folder of the probing activations, and the entries that are missing from them."""
    config = base.evaluation.probing
    entries, absent = probing_entries(config)
    if absent:
        print(f"sparse probing {describe_missing(absent)}", file=sys.stderr)
    if not entries:
        return None, absent
    context, as_saebench = min(config.context, base.context), config.definition == 1
    dtype = torch.float32 if as_saebench else PROBING_DTYPE
    asked = identity(model, base.input_hooks, entries, context, dtype, as_saebench)
    folder = cache / "probing" / digest(asked)
    if not (fetch(cache, folder, "probing.json") and ProbingData.is_saved(folder, asked)):
        with lock_folder(folder, "is harvesting its probing activations"):
            made = harvest_probing(model, base.input_hooks, entries, context, dtype, as_saebench)
            made.save(folder)
            share(cache, folder)
    return folder, absent


def sae_probes_data(base: BaseConfig, model: LanguageModel, cache: Path) -> LastTokens:
    """Returns the last tokens of sae-probes' data sets; harvests what is not in the cache.

    Raises: as `prepare_last_tokens`; SettingError where SAEs read several hook points.
    """
    first, *others = base.input_hooks
    if others:
        remedy = "stores one hook point, and hook_name has several: leave it out"
        raise SettingError("evaluation.extra", "sae_probes", remedy)
    return prepare_last_tokens(base.evaluation.sae_probes, model, first, cache)


def _of_probing(folder: Path) -> dict[str, Any]:
    """Provenance that differs for probing rows: other texts, cut at another length."""
    header = ProbingData.read_header(folder)
    mask = {"mask": header["mask"]} if "mask" in header else {}
    return mask | {
        "context": header["context"],
        "tokens": ProbingData.count_tokens(folder),
        "text": "probing entries",
        "text_digest": header["entries"],
    }


def open_source(
    path: Place | Paths, foreign: bool, part: Part, growing: bool = False, ahead: int = 0
) -> Source:
    """The source that `prepare` made or, if it is growing, still makes (in a worker).

    Args:
        ahead: bytes of shards that may be read ahead, where the path is a URL.
    """
    if isinstance(path, Paths):
        opened = {p: open_source(p, foreign, part, growing, ahead) for p in path.all}
        return joined([opened[p] for p in path.inputs], [opened[p] for p in path.targets])
    if growing:
        return GrowingSource(path, ahead=ahead)
    if foreign:
        return ForeignPart(ForeignSource.open(path, ahead), part)
    return FolderSource.open(path, ahead=ahead)


def source_path(source: Source) -> Place | Paths:
    """Raises: SourceError when the source is not on disk, so that workers can't read it."""
    path = getattr(source, "path", None)
    if path is None:
        raise SourceError("a launch needs its activations in a folder")
    return path


def _reads_model(base: BaseConfig) -> bool:
    """Returns True if a loss of the settings reads the model's output, and there is a model."""
    sae = base.sae.outline(d_out=2 if base.target_hooks else None)
    return needs_model(sae) and base.activations is None


def spliced_model(
    base: BaseConfig, device: str, model: LanguageModel | None = None
) -> SplicedModel | None:
    """Returns the language model where a loss of the settings reads its output.

    Args:
        model: as `prepare` has kept it; None loads it.

    Returns: None where none does, or where the activations were made elsewhere.
    """
    if not _reads_model(base):
        return None
    model = model or language_model.load(base.model.patched({"device": device}))
    return SplicedModel(model, base.output_hooks)
