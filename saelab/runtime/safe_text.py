"""Texts of others made safe to show: on a terminal, in Markdown.

A name or a text may hold anything. What a terminal would obey (escape sequences, carriage returns,
marks that turn the direction of reading) is shown as its code instead, and what Markdown would obey
is escaped. JSON escapes by itself, and pictures read no mathematics in texts (report/canvas.py).
"""

from __future__ import annotations

import re
import unicodedata

#: Control and format characters, surrogates, and separators of lines.
_OBEYED = ("Cc", "Cf", "Cs", "Zl", "Zp")
#: Signs that begin a link, a picture, code, emphasis over words, HTML, or a new cell of a table.
_MARKDOWN = re.compile(r"([\\`*\[\]<>|])")


def is_plain(text: str) -> bool:
    """Whether a terminal shows the text as it is."""
    return (text.isascii() and text.isprintable()) or not any(map(_obeyed, text))


def visible(text: str, kept: str = "") -> str:
    """The text with every character that a terminal would obey as its code, "\\x1b".

    Args:
        kept: such characters that are left, for example "\\n" in a table.
    """
    if is_plain(text):
        return text
    return "".join(_code(c) if _obeyed(c) and c not in kept else c for c in text)


def markdown(text: str) -> str:
    """The text as Markdown that shows it, on one line."""
    return _MARKDOWN.sub(r"\\\1", visible(" ".join(text.split("\n"))))


def _obeyed(character: str) -> bool:
    return unicodedata.category(character) in _OBEYED


def _code(character: str) -> str:
    return character.encode("unicode_escape").decode("ascii")
