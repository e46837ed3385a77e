"""Texts as they are found in the wild: what is not a character is replaced."""

from __future__ import annotations


def whole_characters(text: str) -> str:
    """Returns the text with U+FFFD for half a surrogate pair, as a cut emoji leaves it in JSON.

    Two halves that follow each other become the character that they stand for.
    """
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
    return text
