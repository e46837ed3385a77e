"""Extension of griffe: docstrings of the package as Markdown.

In the package, entries under `Args:` may name several parameters, and `Raises:` may stand on one
line with several sentences; the styles that griffe reads have neither.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from griffe import Extension

BLOCK = re.compile(r"^(Args|Returns|Raises|Yields):\s*(.*)$")
ENTRY = re.compile(r"^ {4}(\w+(?:, \w+)*): (.*)$")
TITLES = {"Args": "Parameters"}


class PlainDocstrings(Extension):
    """Rewrites each docstring before it is shown."""

    def on_instance(self, *, obj: Any, **_: Any) -> None:
        if obj.docstring is not None:
            obj.docstring.value = "\n".join(markdown(obj.docstring.value.splitlines()))


def markdown(lines: list[str]) -> Iterator[str]:
    """Yields a docstring's lines, its blocks as lists and paragraphs with a title."""
    block = ""
    for line in lines:
        if match := BLOCK.match(line):
            block = match[1]
            yield from ("", f"**{TITLES.get(block, block)}:** {match[2]}")
            if block == "Args":
                yield ""
        elif block and not line.strip():
            block = ""
            yield ""
        elif match := block == "Args" and ENTRY.match(line):
            names = ", ".join(f"`{name}`" for name in match[1].split(", "))
            yield f"- {names}: {match[2]}"
        else:
            yield f"    {line.strip()}" if block == "Args" else line.strip() if block else line
