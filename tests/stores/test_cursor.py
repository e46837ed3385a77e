"""A streamed data set that was interrupted goes on at the very document, with the same tokens."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from flaky import flaky_store

from saelab.data.language_model import ModelConfig, load
from saelab.data.text import corpus, token_cache, tokens
from saelab.data.text.corpus import TextConfig
from saelab.data.text.stdlib import texts as library
from saelab.data.text.tokens import tokenize
from saelab.errors import DamageError, MismatchError, UnreachableError
from saelab.storage.atomic import read_json
from saelab.storage.remote import Place, Remote

CONTEXT, TOKENS = 32, 20_000


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return load(ModelConfig()).tokenizer


@pytest.fixture(params=["parquet", "jsonl"])
def stream(request: pytest.FixtureRequest, tmp_path: Path) -> TextConfig:
    """Two files of documents, some of them empty."""
    whole = "\n".join(library("held_out"))[:120_000]
    rows = [{"text": whole[i : i + 300]} for i in range(0, len(whole), 300)]
    rows = [row for some in rows for row in (some, {"text": " "})]
    folder = tmp_path / "data"
    folder.mkdir()
    for i, part in enumerate((rows[:301], rows[301:])):
        made = datasets.Dataset.from_list(part)
        if request.param == "parquet":
            made.to_parquet(folder / f"train-{i:05d}.parquet", batch_size=50)
        else:
            made.to_json(folder / f"train-{i:05d}.jsonl")
    return TextConfig(kind="dataset", path=str(folder))


class Documents:
    """Counts the rows that are read; the connection is lost before row `last`."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.read, self.last = 0, -1
        plain = corpus.open_dataset

        def opened(*args: Any) -> Any:
            found = plain(*args)
            rows = type(found).__iter__

            def counted(dataset: Any) -> Any:
                for row in rows(dataset):
                    if self.read == self.last:
                        raise ConnectionError("the connection was lost")
                    self.read += 1
                    yield row

            counting = type("Counting", (type(found),), {"__iter__": counted})
            found.__class__ = counting
            return found

        monkeypatch.setattr(corpus, "open_dataset", opened)


@pytest.mark.parametrize("joined", [True, False])
@pytest.mark.parametrize("remote", [False, True])
def test_an_interrupted_stream_goes_on_at_the_very_document(
    stream: TextConfig,
    tokenizer: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    joined: bool,
    remote: bool,
) -> None:
    flaky_store(monkeypatch)
    monkeypatch.setattr(token_cache, "PART_TOKENS", 3000)
    monkeypatch.setattr(tokens, "PART_TOKENS", 3000)
    config = stream.patched({"joined": joined})
    kept: Place = Remote("flaky://bucket/tokens") if remote else tmp_path / "tokens"
    wanted = tokenize(config, tokenizer, CONTEXT, TOKENS)
    documents = Documents(monkeypatch)
    whole = tokenize(config, tokenizer, CONTEXT, TOKENS, cache=tmp_path / "whole")
    assert torch.equal(whole.ids, wanted.ids) and whole.digest == wanted.digest
    all_rows, documents.read, documents.last = documents.read, 0, 290
    with pytest.raises(UnreachableError, match="the connection was lost"):
        tokenize(config, tokenizer, CONTEXT, TOKENS, cache=kept)
    lost, documents.last = documents.read, -1
    found = tokenize(config, tokenizer, CONTEXT, TOKENS, cache=kept)
    assert torch.equal(found.ids, wanted.ids) and torch.equal(found.mask, wanted.mask)
    assert found.digest == wanted.digest
    # what the group at the interruption held is read again, and nothing else
    assert 0 < documents.read - all_rows <= 2 * tokens.DOCUMENTS_AT_ONCE < lost
    read = documents.read
    again = tokenize(config, tokenizer, CONTEXT, TOKENS, cache=kept)
    assert again.digest == wanted.digest and documents.read == read  # nothing is read any more


def test_kept_tokens_of_another_text_or_damaged_ones_are_named(
    stream: TextConfig, tokenizer: Any, tmp_path: Path
) -> None:
    kept = tmp_path / "tokens"
    tokenize(stream, tokenizer, CONTEXT, 1000, cache=kept)
    with pytest.raises(MismatchError, match="context"):
        tokenize(stream, tokenizer, 2 * CONTEXT, 1000, cache=kept)
    part = kept / read_json(kept / "stream.json")["parts"][0]["file"]
    data = bytearray(part.read_bytes())
    data[-1] ^= 1
    part.write_bytes(data)
    with pytest.raises(DamageError, match="part-00000.safetensors does not match"):
        tokenize(stream, tokenizer, CONTEXT, 1000, cache=kept)
