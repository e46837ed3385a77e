"""Texts that hold what is no character, and tokenizers that stop at a text."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from tiny_models import llama, save
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from saelab.data.language_model import ModelConfig, load
from saelab.data.probing.tables import entries_from_table
from saelab.data.text.characters import whole_characters
from saelab.data.text.corpus import TextConfig, documents
from saelab.data.text.tokens import tokenize, tokenize_texts
from saelab.errors import SaelabError, SourceError
from saelab.runtime.panics import PanicError, panics_as_errors

HALF, PAIR = "\ud83d", "\ud83d\ude00"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("plain", "plain"),
        ("ünïcödé 😀", "ünïcödé 😀"),
        (f"cut {HALF}", "cut \ufffd"),
        ("\ude00 second half", "\ufffd second half"),
        (f"{HALF}{HALF}", "\ufffd\ufffd"),
        (f"both {PAIR} halves", "both 😀 halves"),
        ("", ""),
    ],
)
def test_what_is_no_character_is_replaced(text: str, expected: str) -> None:
    assert whole_characters(text) == expected


def words(pattern: str = r"\s+", unknown: str | None = "<unk>") -> PreTrainedTokenizerFast:
    ids = {"<s>": 0, "</s>": 1, "<unk>": 2, "a": 3, "cat": 4}
    inner = Tokenizer(models.WordLevel(ids, unknown or "missing"))
    inner.pre_tokenizer = pre_tokenizers.Split(Regex(pattern), "removed")
    return PreTrainedTokenizerFast(tokenizer_object=inner, bos_token="<s>", eos_token="</s>")


def jsonl(tmp_path: Path, *texts: str, mark: bytes = b"") -> TextConfig:
    file = tmp_path / "texts.jsonl"
    file.write_bytes(mark + "\n".join(json.dumps({"text": text}) for text in texts).encode())
    return TextConfig(kind="files", path=str(file))


def test_half_a_surrogate_pair_in_a_file_is_read_as_the_replacement_character(
    tmp_path: Path,
) -> None:
    config = jsonl(tmp_path, "a cat", f"a {HALF} cat", f"a {PAIR} cat")
    assert list(documents(config)) == ["a cat", "a \ufffd cat", "a 😀 cat"]
    assert tokenize(config, words(), 3, 4).n_tokens >= 4


def test_texts_from_anywhere_are_tokenized(tmp_path: Path) -> None:
    ids, _, mask = tokenize_texts(["a cat", f"a {HALF}"], words(), 4)
    assert ids.tolist() == [[0, 3, 4, 1], [0, 3, 2, 1]] and mask.sum() == 4


@pytest.mark.parametrize("name", ["one.txt", "one.md"])
def test_a_mark_of_byte_order_is_no_part_of_a_text(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"\xef\xbb\xbfa cat")
    assert list(documents(TextConfig(kind="files", path=str(tmp_path / name)))) == ["a cat"]
    assert list(documents(jsonl(tmp_path, "a", "cat", mark=b"\xef\xbb\xbf"))) == ["a", "cat"]


def test_a_line_that_is_no_text_is_named(tmp_path: Path) -> None:
    file = tmp_path / "texts.jsonl"
    file.write_bytes(b'{"text": "a"}\n{"text": "\xff"}\n')
    with pytest.raises(SourceError, match=r"texts\.jsonl:2 is not JSON .*utf-8"):
        list(documents(TextConfig(kind="files", path=str(file))))


@pytest.mark.parametrize("text", [f"bad {HALF}", f"good {PAIR}"])
def test_a_probing_table_with_half_a_pair_is_read_or_refused_in_a_sentence(
    tmp_path: Path, text: str
) -> None:
    rows = [{"text": f"{text} {i}", "label": label} for i in range(4) for label in "xy"]
    for i, side in enumerate(("train", "test")):
        named = [row | {"text": f"{row['text']}{i}{row['label']}"} for row in rows]
        (tmp_path / f"{side}.jsonl").write_text("\n".join(map(json.dumps, named)))
    try:
        entry = entries_from_table("t", tmp_path, train_size=2, test_size=2)
    except SaelabError as error:
        assert HALF in text and "train.jsonl can't be read" in str(error)
    else:
        tokenize_texts([*entry.train["x"]], words(), 4)


STUBBORN = "a" * 30000 + "c"


def test_a_tokenizer_whose_expression_panics_is_one_sentence(tmp_path: Path) -> None:
    tokenizer = words(r"(a|aa)+$")
    for read in (
        lambda: tokenize(jsonl(tmp_path, "fine", STUBBORN), tokenizer, 3, 4),
        lambda: tokenize_texts(["fine", STUBBORN], tokenizer, 4),
    ):
        with pytest.raises(SourceError, match="tokenizer can't read a text .*'aaaa.*leave") as told:
            read()
        assert "\n" not in str(told.value) and "retry-limit" in str(told.value)


def test_a_tokenizer_that_lacks_a_word_is_one_sentence() -> None:
    with pytest.raises(SourceError, match="can't read a text .*which begins with 'dog'"):
        tokenize_texts(["a cat", "dog"], words(unknown=None), 4)


def test_a_panic_while_a_model_is_loaded_is_one_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class PanicException(BaseException):
        pass

    def panic(*_: object, **__: object) -> None:
        raise PanicException("called `Option::unwrap()` on a `None` value")

    folder = save(llama(), tmp_path)
    monkeypatch.setattr("transformers.AutoTokenizer.from_pretrained", panic)
    with pytest.raises(SourceError, match=r"can't be loaded \(called `Option::unwrap"):
        load(ModelConfig(path=str(folder)))


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit, ValueError])
def test_what_is_no_panic_passes(error: Callable[[], BaseException]) -> None:
    with pytest.raises(BaseException) as caught, panics_as_errors():
        raise error()
    assert type(caught.value) is error and not isinstance(caught.value, PanicError)
