"""Documents to tokens: texts cut into contexts that begin with BOS.

    stream  = doc_1 EOS doc_2 EOS ...                   (no special tokens added by the tokenizer)
    context = BOS stream[i (c - 1) : (i + 1) (c - 1)]   for contexts of c positions

With `joined = false` each document is its own stream, and its last context is padded.

A position counts unless it holds a special id (BOS, EOS, PAD, UNK ...). Texts on this machine (the
standard library, local files) are cut as a whole and their contexts put in a random order, so that
any number of tokens is a fair sample; a streamed data set is used in its own order. In both cases
fewer tokens are a prefix of more. The tokens of a streamed data set can be stored together with the
position in the stream (saelab/data/text/token_cache.py), so that no document is read twice.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from saelab.data.text.characters import whole_characters
from saelab.data.text.corpus import TextConfig, documents, manifest, resume_documents, source_title
from saelab.data.text.token_cache import PART_TOKENS, TokenParts
from saelab.errors import SettingError, ShortTextError, SourceError
from saelab.runtime.panics import panics_as_errors
from saelab.seeding import numpy_stream
from saelab.storage.remote import Place

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

#: Documents tokenised in one call. Our choice: enough to be fast, few enough to stream.
DOCUMENTS_AT_ONCE = 64


@dataclass(frozen=True)
class Tokens:
    """Contexts of token ids.

    Args:
        ids: int64 [contexts, positions].
        mask: bool [contexts, positions]; True where the position counts (no special id there).
        lengths: int64 [contexts], positions before the padding on the right; None: all are full.
        documents: int32 [contexts, positions], number of the document that each position is of,
            in the order of the text; None where it is not known.
    """

    ids: torch.Tensor
    mask: torch.Tensor
    lengths: torch.Tensor | None = None
    documents: torch.Tensor | None = None

    @property
    def n_tokens(self) -> int:
        """Number of positions that count."""
        return int(self.mask.sum())

    @functools.cached_property
    def digest(self) -> str:
        """16-character content hash of ids, mask and shape."""
        content = hashlib.sha256(str(tuple(self.ids.shape)).encode())
        content.update(np.ascontiguousarray(self.ids.numpy()).tobytes())
        content.update(np.ascontiguousarray(self.mask.numpy()).tobytes())
        return content.hexdigest()[:16]


@dataclass(frozen=True)
class _Ids:
    """Special ids of a tokenizer: first of a context, end of a document, padding, and all."""

    first: int
    end: int
    fill: int
    special: np.ndarray

    @classmethod
    def from_tokenizer(cls, tokenizer: PreTrainedTokenizerBase) -> _Ids:
        """Raises: SourceError when no special id can begin a context."""
        t = tokenizer
        first = _first_id(t.bos_token_id, t.eos_token_id, t.cls_token_id)
        end = _first_id(t.eos_token_id, t.sep_token_id, first)
        if first is None or end is None:
            raise SourceError(
                "the tokenizer has no BOS, EOS or CLS token: a context needs one to begin with, "
                "so add it to the tokenizer's special tokens"
            )
        fill = _first_id(t.pad_token_id, end)
        special = {*t.all_special_ids, first, end, fill} - {None}
        return cls(first, end, fill or 0, np.array(sorted(special), dtype=np.int64))

    def is_counted(self, ids: np.ndarray) -> np.ndarray:
        """Returns a bool for each id: True if it is not special."""
        return ~np.isin(ids, self.special)

    def is_ordinary(self, ids: np.ndarray) -> np.ndarray:
        """Returns a bool for each id: True if it is neither BOS nor EOS nor PAD."""
        return ~np.isin(ids, [self.first, self.end, self.fill])


def _first_id(*ids: Any) -> int | None:
    return next((int(i) for i in ids if i is not None), None)


def tokenize(
    config: TextConfig,
    tokenizer: PreTrainedTokenizerBase,
    context: int,
    tokens: int,
    seed: int = 0,
    cache: Place | None = None,
    model_digest: str = "",
    after: int = 0,
) -> Tokens:
    """Returns the first contexts that have at least `tokens` counted positions.

    Args:
        config: the text.
        tokenizer: tokenizer of the language model.
        context: positions of a context, the first of which is BOS.
        tokens: number of counted positions.
        seed: seed of the stream 'text order', which decides the order of contexts of local texts.
        cache: folder for the tokens of a streamed data set; an interrupted call goes on there.
        model_digest: of the model that the tokenizer belongs to; cached tokens must have the same.
        after: number of tokens whose contexts are left out: exactly those that a call with
            `tokens` = `after` returns.

    Raises: ShortTextError when the text has fewer tokens; MismatchError or DamageError when `cache`
        contains other or damaged tokens.
    """
    if context < 2:
        raise SettingError("context", context, "a context has BOS and at least one token: use >= 2")
    if tokens < 1:
        raise SettingError("tokens", tokens, "at least one token is needed")
    ids = _Ids.from_tokenizer(tokenizer)
    cut = _cut_stream if config.joined else _cut_documents
    cut = functools.partial(cut, width=context - 1)
    if config.kind == "dataset" and cache is not None:
        settings = {"columns": config.columns, "joined": config.joined, "context": context}
        settings |= {"model_digest": model_digest}
        parts = TokenParts(cache, manifest(config) | settings)
        with closing(_resume_dataset(config, parts, tokenizer, ids.end, cut)) as windows:
            numbered = _skip(_number_documents(windows, ids.end), ids, after)
            return _fill_contexts(numbered, ids, context, tokens, source_title(config))
    windows = _cut_texts(documents(config), tokenizer, ids.end, cut)
    numbered = _number_documents(windows, ids.end)
    if config.kind != "dataset":
        every = list(numbered)
        order = numpy_stream(seed, "text order").permutation(len(every))
        numbered = (every[i] for i in order)
    numbered = _skip(numbered, ids, after)
    return _fill_contexts(numbered, ids, context, tokens, source_title(config))


def _number_documents(windows: Iterable[np.ndarray], end: int) -> Iterator[tuple[np.ndarray, int]]:
    """Yields each window of the text, in order, with the number of the document it begins in."""
    first = 0
    for window in windows:
        yield window, first
        first += int((window == end).sum())


def _skip(
    windows: Iterator[tuple[np.ndarray, int]], ids: _Ids, tokens: int
) -> Iterator[tuple[np.ndarray, int]]:
    """Returns the windows after the first ones that have `tokens` counted ids."""
    count = 0
    while count < tokens and (window := next(windows, None)) is not None:
        count += int(ids.is_counted(window[0]).sum())
    return windows


def _fill_contexts(
    windows: Iterable[tuple[np.ndarray, int]], ids: _Ids, context: int, tokens: int, title: str
) -> Tokens:
    """Returns the first windows that have `tokens` counted ids, each with BOS before it.

    Args:
        windows: ids, and the number of the document that the first of them is of.

    Raises: ShortTextError when there are fewer tokens.
    """
    rows: list[np.ndarray] = []
    firsts: list[int] = []
    count = 0
    for row, first in windows:
        rows.append(row)
        firsts.append(first)
        count += int(ids.is_counted(row).sum())
        if count >= tokens:
            break
    if count < tokens:
        lower = f"lower train.tokens or evaluation.tokens to {count:,}, or " if count else ""
        raise ShortTextError(
            f"{title} has only {count:,} tokens in contexts of {context}, {tokens:,} are wanted: "
            f"{lower}name a larger text"
        )
    full = np.full((len(rows), context), ids.fill, dtype=np.int64)
    full[:, 0] = ids.first
    lengths = torch.tensor([1 + len(row) for row in rows], dtype=torch.int64)
    for target, row in zip(full, rows, strict=True):
        target[1 : 1 + len(row)] = row
    padded = bool((lengths < context).any())
    mask = torch.from_numpy(ids.is_counted(full))
    ends = np.cumsum(full[:, :-1] == ids.end, axis=1) - (full[:, :1] == ids.end)
    documents = np.array(firsts, dtype=np.int32)[:, None] + np.pad(ends, ((0, 0), (1, 0)))
    return Tokens(
        torch.from_numpy(full),
        mask,
        lengths if padded else None,
        torch.from_numpy(documents.astype(np.int32)),
    )


#: (ids of documents, each with its end; rest of the documents before) -> (windows, rest)
_Cut = Callable[[Sequence[np.ndarray], np.ndarray], tuple[list[np.ndarray], np.ndarray]]


def _cut_stream(
    documents: Sequence[np.ndarray], rest: np.ndarray, width: int
) -> tuple[list[np.ndarray], np.ndarray]:
    """Cuts the joined documents into windows [width], int32; returns them and the rest."""
    stream = np.concatenate([rest, *documents])
    end = len(stream) // width * width
    return list(stream[:end].reshape(-1, width)), stream[end:]


def _cut_documents(
    documents: Sequence[np.ndarray], rest: np.ndarray, width: int
) -> tuple[list[np.ndarray], np.ndarray]:
    """Cuts each document into windows [<= width], int32; returns them and the unchanged rest."""
    windows = [piece[i : i + width] for piece in documents for i in range(0, len(piece), width)]
    return windows, rest


def _cut_texts(
    texts: Iterator[str], tokenizer: PreTrainedTokenizerBase, end: int, cut: _Cut
) -> Iterator[np.ndarray]:
    """Yields all windows of the texts; a rest at the end that fills no window is dropped."""
    rest = np.empty(0, dtype=np.int32)
    while group := list(islice(texts, DOCUMENTS_AT_ONCE)):
        windows, rest = cut(_encode_documents(group, tokenizer, end), rest)
        yield from windows


def _resume_dataset(
    config: TextConfig, parts: TokenParts, tokenizer: PreTrainedTokenizerBase, end: int, cut: _Cut
) -> Generator[np.ndarray, None, None]:
    """Yields all windows of a streamed data set: first the stored ones, then new ones.

    The windows of the documents after the stored ones are stored as well.
    """
    yield from parts.windows()
    dataset, texts = resume_documents(config, parts.cursor)
    unsaved: list[np.ndarray] = []
    cursor, rest = parts.cursor or {}, parts.rest
    try:
        while group := list(islice(texts, DOCUMENTS_AT_ONCE)):
            windows, rest = cut(_encode_documents(group, tokenizer, end), rest)
            unsaved, cursor = unsaved + windows, dataset.state_dict()
            yield from windows
            if sum(map(len, unsaved)) >= PART_TOKENS:
                parts.add(unsaved, cursor, rest)
                unsaved = []
    finally:  # the caller has enough, or reading failed: stored up to the last whole group
        parts.add(unsaved, cursor, rest)


def _encode_documents(
    texts: list[str], tokenizer: PreTrainedTokenizerBase, end: int
) -> list[np.ndarray]:
    """Returns the ids of each text followed by `end`, int32."""
    return [np.array([*piece, end], dtype=np.int32) for piece in _encode(texts, tokenizer)]


def _encode(texts: list[str], tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    """Returns the ids of each text, without special tokens.

    Raises: SourceError when the tokenizer can't read a text.
    """
    texts = [whole_characters(text) for text in texts]
    try:
        with panics_as_errors():
            return _encode_all(texts, tokenizer)
    except MemoryError:
        raise
    except Exception as error:  # tokenizers raise no class of their own
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        text = next((text for text in texts if not _is_readable(text, tokenizer)), texts[0])
        raise SourceError(
            f"the tokenizer can't read a text ({reason}), which begins with {text[:40]!r}: leave "
            "the text out, or take another tokenizer"
        ) from error


def _is_readable(text: str, tokenizer: PreTrainedTokenizerBase) -> bool:
    try:
        with panics_as_errors():
            _encode_all([text], tokenizer)
    except Exception:
        return False
    return True


def _encode_all(texts: list[str], tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    if (fast := _plain_backend(tokenizer)) is not None:
        return [piece.ids for piece in fast.encode_batch_fast(texts, add_special_tokens=False)]
    batch = tokenizer(texts, add_special_tokens=False, return_attention_mask=False, verbose=False)
    return batch["input_ids"]  # type: ignore[return-value]


def _plain_backend(tokenizer: PreTrainedTokenizerBase) -> Any | None:
    """Returns the `tokenizers` object that gives the same ids 1.5 times faster, without offsets.

    It is None for a tokenizer that itself changes texts or ids, truncates or pads.
    """
    from transformers import PreTrainedTokenizerFast

    encode = getattr(PreTrainedTokenizerFast, "_encode_plus", None)
    if encode is None or getattr(type(tokenizer), "_encode_plus", None) is not encode:
        return None
    fast = getattr(tokenizer, "backend_tokenizer", None)
    return fast if fast and fast.truncation is None and fast.padding is None else None


def tokenize_texts(
    texts: list[str], tokenizer: PreTrainedTokenizerBase, context: int, unknown: bool = False
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Returns one context for each text: BOS and its first tokens, padded on the right.

    Args:
        texts: n texts; an empty one has no counted position.
        tokenizer: tokenizer of the language model.
        context: positions of a context; longer texts are cut.
        unknown: whether special ids besides BOS, EOS and PAD count.

    Returns: ids int64 [n, context]; attention mask bool [n, context], True on BOS and tokens;
        mask bool [n, context], True where the position counts.
    """
    special = _Ids.from_tokenizer(tokenizer)
    ids = np.full((len(texts), context), special.fill, dtype=np.int64)
    attention = np.zeros((len(texts), context), dtype=bool)
    for row, piece in enumerate(_encode(texts, tokenizer) if texts else []):
        filled = [special.first, *piece[: context - 1]]
        ids[row, : len(filled)] = filled
        attention[row, : len(filled)] = True
    mask = attention & (special.is_ordinary(ids) if unknown else special.is_counted(ids))
    return torch.from_numpy(ids), torch.from_numpy(attention), torch.from_numpy(mask)


def counted_positions(ids: torch.Tensor, tokenizer: PreTrainedTokenizerBase) -> torch.Tensor:
    """Returns where a position counts, that is has no special id; bool, on the CPU, in the shape of
    ids.

    Raises: SourceError when no special id can begin a context.
    """
    return torch.from_numpy(_Ids.from_tokenizer(tokenizer).is_counted(ids.cpu().numpy()))


def decode_token(tokenizer: PreTrainedTokenizerBase, token: int) -> str:
    """Decodes one token id, with its leading space."""
    piece = str(tokenizer.convert_ids_to_tokens(token))
    if piece.startswith("▁"):  # sentencepiece; decoding one token alone loses the space
        return piece.replace("▁", " ")
    return str(tokenizer.decode([token]))
