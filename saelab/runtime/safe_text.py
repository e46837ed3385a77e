"""Makes foreign texts safe to print: on a terminal and in Markdown.

A name or a text may contain anything. Characters that a terminal would obey (escape sequences,
carriage returns, marks that turn the direction of reading) are replaced by their codes, and
characters that Markdown would obey are escaped. JSON escapes by itself, and figures parse no
mathematics in texts (report/figures/style.py).
"""

from __future__ import annotations

import re
import unicodedata

#: Control and format characters, surrogates, and separators of lines.
_CONTROL_CATEGORIES = ("Cc", "Cf", "Cs", "Zl", "Zp")
#: Characters that begin a link, an image, code, emphasis, HTML, or a new cell of a table.
_MARKDOWN = re.compile(r"([\\`*\[\]<>|])")


def is_plain(text: str) -> bool:
    """Returns whether a terminal shows the text unchanged."""
    return (text.isascii() and text.isprintable()) or not any(map(_is_control, text))


def visible(text: str, keep: str = "") -> str:
    """Returns the text with each character that a terminal would obey replaced by its code.

    Args:
        text: any text; an escape character in it becomes "\\x1b".
        keep: control characters that are left in place, for example "\\n" in a table.
    """
    if is_plain(text):
        return text
    return "".join(_code(c) if _is_control(c) and c not in keep else c for c in text)


def markdown(text: str) -> str:
    """Returns Markdown that shows the text, on one line."""
    return _MARKDOWN.sub(r"\\\1", visible(" ".join(text.split("\n"))))


def _is_control(character: str) -> bool:
    return unicodedata.category(character) in _CONTROL_CATEGORIES


def _code(character: str) -> str:
    return character.encode("unicode_escape").decode("ascii")
