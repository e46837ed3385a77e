"""Tokens to activations: one pass of the model fills the sources of all hook points.

    x_hook[c, p] = activation of the model at hook for position p of context c

The pass stops after the last hooked layer and never computes logits. On disk, memory holds at most
two shards for each hook and one batch a lane (`parallel_passes.py`); an interrupted harvest goes on
with the next shard. A launch on a GPU trains beside its harvest (`HarvestConfig.overlap`; this
has not been run on a GPU).
"""

from __future__ import annotations

from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import NonNegativeInt

from saelab.config import Frozen
from saelab.data.activations.growing import GrowingSource
from saelab.data.activations.parallel_passes import by_length, side_by_side
from saelab.data.activations.store import FolderSource, FolderWriter, MemorySource, Shard, Source
from saelab.data.language_model import LanguageModel
from saelab.data.text.corpus import Tokens
from saelab.errors import SettingError, SourceError
from saelab.progress import Progress, progress
from saelab.storage.lock import lock_folder
from saelab.storage.remote import Place

#: Bytes for a position's mask (bool) and id (int32).
_MASK_AND_ID = 5
#: Passes of a shard with padded contexts, at least: lengths in one pass then differ little. Our
#: choice: with lengths from 2 to 128 and shards of 512 contexts 4% of the positions are padding.
PADDED_PASSES = 32


class HarvestConfig(Frozen):
    """How activations are made.

    Args:
        batch: contexts in one pass of the model.
        shard_tokens: at most so many positions a shard (but at least one context); shards are
            evened out.
        dtype: of the stored activations.
        overlap: whether a launch trains on the first shards while the rest is made, with the same
            bits: true, false or 'auto', which is true on CUDA alone (this has not been run on a
            GPU). On a CPU passes and training would only share the cores.
        read_ahead: bytes of shards that a process may hold before it asks for them, where the
            activations lie at a URL; no number depends on it.
    """

    batch: int = 32
    shard_tokens: int = 65536
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    overlap: Literal["auto", True, False] = "auto"
    read_ahead: NonNegativeInt = 512 * 2**20

    def overlaps(self, device: str) -> bool:
        """Whether a launch on the device trains beside its harvest."""
        return torch.device(device).type == "cuda" if self.overlap == "auto" else self.overlap


def bytes_needed(n_tokens: int, positions: int, d: int, dtype: str) -> int:
    """Memory (or disk) in bytes for the activations of one hook point.

    Args:
        n_tokens: counted tokens; each context of `positions` has at most positions - 1 of them.
        positions: of a context.
        d: width of an activation.
        dtype: of the stored activations.
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
    """The activations of all hook points, made in one pass or found complete in the folder.

    Args:
        tokens: contexts; all of them are used.
        hook_names: one source each.
        folder: a subfolder for each hook point is written there; None keeps all in memory
            (`bytes_needed` for each hook point).
        identity: further fields of the headers, such as the corpus manifest.

    Returns: hook name -> source.
    Raises: SettingError for an unknown hook point; MismatchError when the folder holds a harvest of
        another identity; SourceError for activations that are not finite in the stored dtype.
    """
    config = config or HarvestConfig()
    headers = _headers(model, tokens, hook_names, config, identity or {})
    if folder is None:
        return _in_memory(model, tokens, headers, config)
    places = _places(headers, folder)
    for _ in _in_folder(model, tokens, headers, config, places):
        pass
    return {
        hook: FolderSource.open(place, ahead=config.read_ahead) for hook, place in places.items()
    }


def harvest_steps(
    model: LanguageModel,
    tokens: Tokens,
    hook_name: str,
    config: HarvestConfig,
    folder: Place,
    identity: Mapping[str, Any],
) -> tuple[GrowingSource, Generator[None, None, None]]:
    """`harvest` of one hook point into a folder, begun but left to the caller to go on with.

    Returns: the source, which other processes may open as well, and the steps; each of them adds a
        shard, and closing them leaves the rest to a later harvest.
    Raises: what `harvest` raises: here for settings and identity, in the steps for activations.
    """
    headers = _headers(model, tokens, [hook_name], config, identity)
    places = _places(headers, folder)
    steps = _in_folder(model, tokens, headers, config, places)
    next(steps, None)
    return GrowingSource(places[hook_name], ahead=config.read_ahead), steps


def _headers(
    model: LanguageModel,
    tokens: Tokens,
    hook_names: Sequence[str],
    config: HarvestConfig,
    identity: Mapping[str, Any],
) -> dict[str, dict[str, Any]]:
    """Hook -> header, of settings that can be used."""
    for name in ("batch", "shard_tokens"):
        if getattr(config, name) < 1:
            raise SettingError(f"harvest.{name}", getattr(config, name), "use at least 1")
    hooks = list(dict.fromkeys(hook_names))
    if not hooks:
        raise SettingError("hook_names", hook_names, "name at least one hook point")
    return {
        hook: _header(model, tokens, hook, d, config, identity)
        for hook, d in _widths(model, tokens, hooks).items()
    }


def _places(hooks: Iterable[str], folder: Place) -> dict[str, Place]:
    """Hook -> its subfolder."""
    return {hook: folder / hook.replace("/", "_") for hook in hooks}


def _widths(model: LanguageModel, tokens: Tokens, hooks: list[str]) -> dict[str, int]:
    """d of each hook point, from one short context."""
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
    """What a harvest is: everything that its bytes depend on."""
    return {
        "model": model.config.path,
        "model_digest": model.digest,
        "model_dtype": model.config.dtype,
        "hook_name": hook,
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
    """Contexts a shard, evened out so that the last shard is no small rest."""
    contexts, positions = tokens.ids.shape
    shards = -(-contexts // max(1, config.shard_tokens // positions))
    return -(-contexts // shards)


def _in_memory(
    model: LanguageModel,
    tokens: Tokens,
    headers: dict[str, dict[str, Any]],
    config: HarvestConfig,
) -> dict[str, Source]:
    shards: dict[str, list[Shard]] = {hook: [] for hook in headers}
    widths = {hook: int(header["d"]) for hook, header in headers.items()}
    with progress("harvest", tokens.ids.numel(), "tokens") as bar:
        parts = [_Part(part, widths, config) for part in _parts(tokens, config)]
        for part in _filled(model, parts, bar):
            for hook, shard in part.shards().items():
                shards[hook].append(shard)
    made: dict[str, Source] = {
        hook: MemorySource(shards[hook], header) for hook, header in headers.items()
    }
    return made


def _in_folder(
    model: LanguageModel,
    tokens: Tokens,
    headers: dict[str, dict[str, Any]],
    config: HarvestConfig,
    places: Mapping[str, Place],
) -> Generator[None, None, None]:
    """Fills the folders that are not complete, in steps.

    The first one only announces what will be written; each further one adds a shard. The folders
    are locked meanwhile, but for those at a URL, which has no locks; raises BusyError when another
    process fills one of them.
    """
    with ExitStack() as locks:
        for place in places.values():
            if isinstance(place, Path) and not (place / "header.json").is_file():
                locks.enter_context(lock_folder(place, "is harvesting these activations"))
        yield from _in_own_folder(model, tokens, headers, config, places)


def _in_own_folder(
    model: LanguageModel,
    tokens: Tokens,
    headers: dict[str, dict[str, Any]],
    config: HarvestConfig,
    places: Mapping[str, Place],
) -> Generator[None, None, None]:
    complete = {hook: p for hook, p in places.items() if (p / "header.json").is_file()}
    for hook, place in complete.items():
        FolderSource.open(place, headers[hook])
    writers = {
        hook: FolderWriter(place, headers[hook])
        for hook, place in places.items()
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
            for i, part in enumerate(_parts(tokens, config))
        ]
        with progress("harvest", tokens.ids.numel(), "tokens") as bar:
            for part in _filled(model, parts, bar):
                for hook, shard in part.shards().items():
                    writers[hook].add(shard)
                yield
    for writer in writers.values():
        writer.finish()


def _parts(tokens: Tokens, config: HarvestConfig) -> list[Tokens]:
    """The contexts of each shard."""
    size = _shard_contexts(tokens, config)
    starts = range(0, len(tokens.ids), size)
    parts = [slice(start, start + size) for start in starts]
    lengths = tokens.lengths
    return [
        Tokens(tokens.ids[p], tokens.mask[p], None if lengths is None else lengths[p])
        for p in parts
    ]


class _Part:
    """The contexts of one shard while they are filled.

    Args:
        tokens: its contexts.
        widths: hook -> d of the hooks that are still to do; none skips the part.
        config: how activations are made.
    """

    def __init__(self, tokens: Tokens, widths: dict[str, int], config: HarvestConfig) -> None:
        self.tokens, self.widths, self.config = tokens, widths, config
        self._stored: dict[str, torch.Tensor] = {}

    def allocate(self) -> None:
        shape, dtype = self.tokens.ids.shape, getattr(torch, self.config.dtype)
        empty = torch.empty if self.tokens.lengths is None else torch.zeros  # padding holds zeros
        self._stored = {hook: empty((*shape, d), dtype=dtype) for hook, d in self.widths.items()}

    def passes(self) -> list[torch.Tensor]:
        """The contexts of each pass, int64; padded ones together with those of like length."""
        if not self.widths:
            return []
        contexts, positions = self.tokens.ids.shape
        if self.tokens.lengths is None:
            return list(torch.arange(contexts).split(self.config.batch))
        share = int(self.tokens.lengths.sum()) // PADDED_PASSES
        return by_length(self.tokens.lengths, min(self.config.batch * positions, share))

    def fill(self, model: LanguageModel, contexts: torch.Tensor) -> int:
        """One pass.

        Returns: how many positions are done.
        Raises: SourceError for activations that are not finite in the stored dtype.
        """
        ids, attention = self.tokens.ids[contexts], None
        if self.tokens.lengths is not None:
            lengths = self.tokens.lengths[contexts]
            ids = ids[:, : int(lengths.max())]
            inside = torch.arange(ids.shape[1]) < lengths[:, None]
            attention = None if inside.all() else inside
        for hook, x in model.activations(ids, attention, list(self.widths)).items():
            kept = x.to("cpu", getattr(torch, self.config.dtype))
            if attention is not None:
                kept = kept.where(attention[..., None], 0)
            if not bool(torch.isfinite(kept).all()):
                raise SourceError(
                    f"activations at {hook} are not finite as {self.config.dtype}: set "
                    "harvest.dtype to bfloat16 or float32, and model.dtype likewise"
                )
            self._stored[hook][contexts, : ids.shape[1]] = kept
        return len(contexts) * self.tokens.ids.shape[1]

    def shards(self) -> dict[str, Shard]:
        """Hook -> what was made; this part then holds nothing any more."""
        stored, self._stored = self._stored, {}
        ids = self.tokens.ids.to(torch.int32)
        return {hook: Shard(x, self.tokens.mask, ids) for hook, x in stored.items()}


def _filled(model: LanguageModel, parts: Sequence[_Part], bar: Progress) -> Iterator[_Part]:
    """The parts in order, each after its last pass; passes of the next one run meanwhile."""

    groups = [part.passes() for part in parts]

    def passes() -> Iterator[tuple[_Part, torch.Tensor]]:
        for part, some in zip(parts, groups, strict=True):
            part.allocate()
            yield from ((part, contexts) for contexts in some)

    def one(model: LanguageModel, item: tuple[_Part, torch.Tensor]) -> int:
        part, contexts = item
        return part.fill(model, contexts)

    with closing(side_by_side(model, one, passes())) as done:
        for part, some in zip(parts, groups, strict=True):
            if not part.widths:
                bar.advance(part.tokens.ids.numel())
            for _ in some:
                bar.advance(next(done))
            yield part
