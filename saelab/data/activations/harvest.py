"""Tokens to activations: one pass of the model fills the sources of all hook points.

    x_hook[c, p] = activation of the model at hook for position p of context c

The pass stops after the last hooked layer and never computes logits. With a folder, memory holds at
most two shards for each hook and one batch per lane (`parallel_passes.py`); an interrupted harvest
goes on with the next shard. A launch on a GPU trains during its harvest (`HarvestConfig.overlap`;
this has not been run on a GPU).
"""

from __future__ import annotations

from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import NonNegativeInt, PositiveInt

from saelab.config import Frozen
from saelab.data.activations.growing import GrowingSource
from saelab.data.activations.parallel_passes import group_by_length, run_in_lanes
from saelab.data.activations.store import (
    FolderSource,
    FolderWriter,
    MemorySource,
    Shard,
    Source,
    are_usable,
)
from saelab.data.language_model import LanguageModel
from saelab.data.text.tokens import Tokens
from saelab.errors import SettingError, SourceError
from saelab.progress import Progress, progress
from saelab.storage.lock import lock_folder
from saelab.storage.remote import Place

#: Bytes for a position's mask (bool) and id (int32).
_MASK_AND_ID = 5
#: Fewest passes of a shard with padded contexts, so that lengths in one pass differ little. Our
#: choice: with lengths from 2 to 128 and shards of 512 contexts 4% of the positions are padding.
PADDED_PASSES = 32


class HarvestConfig(Frozen):
    """Settings of a harvest.

    Args:
        batch: contexts in one pass of the model.
        shard_tokens: largest number of positions of a shard (but at least one context); shards
            get nearly equal sizes.
        dtype: dtype of the stored activations.
        overlap: whether a launch trains on the first shards while the others are made, with the
            same bits: true, false or 'auto', which is true only on CUDA (this has not been run on
            a GPU). On a CPU passes and training would only share the cores.
        read_ahead: bytes of shards that a process may read before it needs them, if the activations
            are stored at a URL; no number depends on it.
    """

    batch: PositiveInt = 32
    shard_tokens: PositiveInt = 65536
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    overlap: Literal["auto", True, False] = "auto"
    read_ahead: NonNegativeInt = 512 * 2**20

    def overlaps(self, device: str) -> bool:
        """Returns whether a launch on the device trains during its harvest."""
        return torch.device(device).type == "cuda" if self.overlap == "auto" else self.overlap


def bytes_needed(n_tokens: int, positions: int, d: int, dtype: str) -> int:
    """Returns the bytes in memory or on disk of the activations of one hook point.

    Args:
        n_tokens: counted tokens; each context of `positions` has at most positions - 1 of them.
        positions: positions of a context.
        d: width of an activation.
        dtype: dtype of the stored activations.
    """
    contexts = -(-n_tokens // max(1, positions - 1))
    return contexts * positions * (d * getattr(torch, dtype).itemsize + _MASK_AND_ID)


def harvest(
    model: LanguageModel,
    tokens: Tokens,
    hook_names: Sequence[str],
    config: HarvestConfig | None = None,
    folder: Place | None = None,
    identity: Mapping[str, Any] | None = None,
) -> dict[str, Source]:
    """Makes the activations of all hook points in one pass, or opens them if they are complete.

    Args:
        model: the language model.
        tokens: contexts; all of them are used.
        hook_names: hook points, each of which becomes a source.
        config: settings.
        folder: parent of a subfolder for each hook point; None keeps all in memory
            (`bytes_needed` for each hook point).
        identity: further fields of the headers, such as the corpus manifest.

    Returns: hook name -> source.
    Raises: SettingError for an unknown hook point; MismatchError when the folder holds a harvest of
        another identity; SourceError for activations that are not finite in the stored dtype.
    """
    config = config or HarvestConfig()
    headers = _headers(model, tokens, hook_names, config, identity or {})
    if folder is None:
        return _harvest_in_memory(model, tokens, headers, config)
    folders = hook_folders(headers, folder)
    for _ in _fill_folders(model, tokens, headers, config, folders):
        pass
    return {hook: FolderSource.open(f, ahead=config.read_ahead) for hook, f in folders.items()}


def harvest_steps(
    model: LanguageModel,
    tokens: Tokens,
    hook_names: Sequence[str],
    config: HarvestConfig,
    folder: Place,
    identity: Mapping[str, Any],
) -> tuple[dict[str, GrowingSource], Generator[None, None, None]]:
    """Begins the harvest of hook points into a folder; the caller runs its steps.

    Returns: hook name -> source, which other processes may open as well; and the steps, each of
        which adds a shard to all, and closing them leaves the rest to a later harvest.
    Raises: the errors of `harvest`: here for settings and identity, in the steps for activations.
    """
    headers = _headers(model, tokens, hook_names, config, identity)
    folders = hook_folders(headers, folder)
    steps = _fill_folders(model, tokens, headers, config, folders)
    next(steps, None)
    return {h: GrowingSource(f, ahead=config.read_ahead) for h, f in folders.items()}, steps


def _headers(
    model: LanguageModel,
    tokens: Tokens,
    hook_names: Sequence[str],
    config: HarvestConfig,
    identity: Mapping[str, Any],
) -> dict[str, dict[str, Any]]:
    """Returns hook -> header.

    Raises: SettingError for a setting that can't be used.
    """
    for name in ("batch", "shard_tokens"):
        if getattr(config, name) < 1:
            raise SettingError(f"harvest.{name}", getattr(config, name), "use at least 1")
    model.check_ids(tokens.ids)
    hooks = list(dict.fromkeys(hook_names))
    if not hooks:
        raise SettingError("hook_names", hook_names, "name at least one hook point")
    return {
        hook: _header(model, tokens, hook, d, config, identity)
        for hook, d in _measure_widths(model, tokens, hooks).items()
    }


def hook_folders(hooks: Iterable[str], folder: Place) -> dict[str, Place]:
    """Returns hook -> its subfolder."""
    return {hook: folder / hook.replace("/", "_") for hook in hooks}


def _measure_widths(model: LanguageModel, tokens: Tokens, hooks: list[str]) -> dict[str, int]:
    """Returns hook -> d, from a pass over one short context."""
    x = model.activations(tokens.ids[:1, :2], None, hooks)
    return {hook: int(x[hook].shape[-1]) for hook in hooks}


def _header(
    model: LanguageModel,
    tokens: Tokens,
    hook: str,
    d: int,
    config: HarvestConfig,
    extras: Mapping[str, Any],
) -> dict[str, Any]:
    """Returns the identity of a harvest: everything that its bytes depend on."""
    return {
        "model": model.config.path,
        "model_digest": model.digest,
        "model_dtype": model.config.dtype,
        "hook_name": hook,
        **model.hook_identity(hook),
        "text_digest": tokens.digest,
        "n_contexts": int(tokens.ids.shape[0]),
        "context": int(tokens.ids.shape[1]),
        "n_tokens": tokens.n_tokens,
        "d": d,
        "dtype": config.dtype,
        "shard_contexts": _shard_contexts(tokens, config),
        **extras,
    }


def _shard_contexts(tokens: Tokens, config: HarvestConfig) -> int:
    """Returns the contexts per shard, chosen so that the last shard is not much smaller."""
    contexts, positions = tokens.ids.shape
    shards = -(-contexts // max(1, config.shard_tokens // positions))
    return -(-contexts // shards)


def _harvest_in_memory(
    model: LanguageModel,
    tokens: Tokens,
    headers: dict[str, dict[str, Any]],
    config: HarvestConfig,
) -> dict[str, Source]:
    """Makes the activations of all hook points and keeps them in memory."""
    shards: dict[str, list[Shard]] = {hook: [] for hook in headers}
    widths = {hook: int(header["d"]) for hook, header in headers.items()}
    with progress("harvest", tokens.ids.numel(), "tokens") as bar:
        parts = [_Part(part, widths, config) for part in _split_by_shard(tokens, config)]
        for part in _fill_parts(model, parts, bar):
            for hook, shard in part.shards().items():
                shards[hook].append(shard)
    sources: dict[str, Source] = {
        hook: MemorySource(shards[hook], header) for hook, header in headers.items()
    }
    return sources


def _fill_folders(
    model: LanguageModel,
    tokens: Tokens,
    headers: dict[str, dict[str, Any]],
    config: HarvestConfig,
    folders: Mapping[str, Place],
) -> Generator[None, None, None]:
    """Fills the folders that are not complete, in steps.

    The first step only announces what will be written; each further one adds a shard. The folders
    are locked meanwhile, except at a URL, which has no locks.

    Raises: BusyError when another process fills one of them.
    """
    with ExitStack() as locks:
        for folder in folders.values():
            if isinstance(folder, Path) and not (folder / "header.json").is_file():
                locks.enter_context(lock_folder(folder, "is harvesting these activations"))
        yield from _fill_locked_folders(model, tokens, headers, config, folders)


def _fill_locked_folders(
    model: LanguageModel,
    tokens: Tokens,
    headers: dict[str, dict[str, Any]],
    config: HarvestConfig,
    folders: Mapping[str, Place],
) -> Generator[None, None, None]:
    complete = {hook: f for hook, f in folders.items() if (f / "header.json").is_file()}
    for hook, folder in complete.items():
        FolderSource.open(folder, headers[hook])
    writers = {
        hook: FolderWriter(folder, headers[hook])
        for hook, folder in folders.items()
        if hook not in complete
    }
    for writer in writers.values():
        writer.announce()
    yield
    if writers:
        parts = [
            _Part(
                part,
                {h: int(headers[h]["d"]) for h, writer in writers.items() if writer.done <= i},
                config,
            )
            for i, part in enumerate(_split_by_shard(tokens, config))
        ]
        with progress("harvest", tokens.ids.numel(), "tokens") as bar:
            for part in _fill_parts(model, parts, bar):
                for hook, shard in part.shards().items():
                    writers[hook].add(shard)
                yield
    for writer in writers.values():
        writer.finish()


def _split_by_shard(tokens: Tokens, config: HarvestConfig) -> list[Tokens]:
    """Returns the contexts of each shard."""
    size = _shard_contexts(tokens, config)
    starts = range(0, len(tokens.ids), size)
    parts = [slice(start, start + size) for start in starts]
    lengths, documents = tokens.lengths, tokens.documents
    return [
        Tokens(
            tokens.ids[p],
            tokens.mask[p],
            None if lengths is None else lengths[p],
            None if documents is None else documents[p],
        )
        for p in parts
    ]


class _Part:
    """Contexts of one shard, and the activations that were made for them so far.

    Args:
        tokens: its contexts.
        widths: hook -> d of the hooks without this shard; none skips the part.
        config: settings of the harvest.
    """

    def __init__(self, tokens: Tokens, widths: dict[str, int], config: HarvestConfig) -> None:
        self.tokens, self.widths, self.config = tokens, widths, config
        self._stored: dict[str, torch.Tensor] = {}

    def allocate(self) -> None:
        """Allocates the activations of the shard."""
        shape, dtype = self.tokens.ids.shape, getattr(torch, self.config.dtype)
        empty = torch.empty if self.tokens.lengths is None else torch.zeros  # padding holds zeros
        self._stored = {hook: empty((*shape, d), dtype=dtype) for hook, d in self.widths.items()}

    def passes(self) -> list[torch.Tensor]:
        """Returns the contexts of each pass, int64; padded ones are grouped by similar length."""
        if not self.widths:
            return []
        contexts, positions = self.tokens.ids.shape
        if self.tokens.lengths is None:
            return list(torch.arange(contexts).split(self.config.batch))
        share = int(self.tokens.lengths.sum()) // PADDED_PASSES
        return group_by_length(self.tokens.lengths, min(self.config.batch * positions, share))

    def fill(self, model: LanguageModel, contexts: torch.Tensor) -> int:
        """Runs one pass and stores its activations.

        Returns: number of positions that are done.
        Raises: SourceError for activations that are not finite in the stored dtype.
        """
        ids, attention = self.tokens.ids[contexts], None
        if self.tokens.lengths is not None:
            lengths = self.tokens.lengths[contexts]
            ids = ids[:, : int(lengths.max())]
            inside = torch.arange(ids.shape[1]) < lengths[:, None]
            attention = None if inside.all() else inside
        for hook, x in model.activations(ids, attention, list(self.widths)).items():
            x = x.to("cpu", getattr(torch, self.config.dtype))
            if attention is not None:
                x = x.where(attention[..., None], 0)
            if not bool(are_usable(x).all()):
                problem = "too large" if bool(torch.isfinite(x).all()) else "not finite"
                raise SourceError(
                    f"activations at {hook} are {problem} as {self.config.dtype}: set "
                    "harvest.dtype to bfloat16 or float32, and model.dtype likewise"
                )
            self._stored[hook][contexts, : ids.shape[1]] = x
        return len(contexts) * self.tokens.ids.shape[1]

    def shards(self) -> dict[str, Shard]:
        """Returns hook -> shard, and releases the memory of this part."""
        stored, self._stored = self._stored, {}
        ids = self.tokens.ids.to(torch.int32)
        documents = self.tokens.documents
        return {hook: Shard(x, self.tokens.mask, ids, documents) for hook, x in stored.items()}


def _fill_parts(model: LanguageModel, parts: Sequence[_Part], bar: Progress) -> Iterator[_Part]:
    """Yields the parts in order, each after its last pass; passes of the next run meanwhile."""
    groups = [part.passes() for part in parts]

    def passes() -> Iterator[tuple[_Part, torch.Tensor]]:
        for part, group in zip(parts, groups, strict=True):
            part.allocate()
            yield from ((part, contexts) for contexts in group)

    def run_pass(model: LanguageModel, item: tuple[_Part, torch.Tensor]) -> int:
        part, contexts = item
        return part.fill(model, contexts)

    with closing(run_in_lanes(model, run_pass, passes())) as positions:
        for part, group in zip(parts, groups, strict=True):
            if not part.widths:
                bar.advance(part.tokens.ids.numel())
            for _ in group:
                bar.advance(next(positions))
            yield part
