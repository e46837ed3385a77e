"""Texts of tokens in the feature browser: a character may be split over several tokens."""

from __future__ import annotations

from collections.abc import Sequence

from saelab.analysis.latents import PART, join_characters

TEXT = "so good \U0001f600\U0001f44d!\nNaïve “x”"


def decode(tokens: Sequence[int]) -> str:
    """Decodes tokens that are single bytes, as a tokenizer with bytes does."""
    return bytes(tokens).decode("utf-8", errors="replace")


def test_the_words_of_a_context_are_its_text() -> None:
    tokens = list(TEXT.encode())
    words = join_characters(tokens, decode)
    assert len(words) == len(tokens)
    assert "".join(words) == TEXT
    assert words[8:12] == ["", "", "", "\U0001f600"]  # the last of four bytes shows it
    assert [words[i] for i in range(4)] == ["s", "o", " ", "g"]


def test_tokens_that_end_one_character_and_begin_the_next_are_joined() -> None:
    data = "\U0001f600\U0001f44d".encode()
    parts = [data[:2], data[2:6], data[6:]]
    words = join_characters(
        range(3), lambda some: b"".join(parts[i] for i in some).decode(errors="replace")
    )
    assert words == ["", "", "\U0001f600\U0001f44d"]


def test_bytes_that_are_no_character_are_said_to_be_a_part() -> None:
    cut = "é".encode()[1:] + b"ok" + "é".encode()[:1]
    assert join_characters(list(cut), decode) == [PART, "o", "k", PART]
