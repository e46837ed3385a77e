"""Code blocks of README.md and the pages of docs/, and whether a page says that one is not run.

Indented blocks are commands, fenced ones are in the language that they name; `text` is for
equations, outputs and layouts of files. A comment before a block says why nothing runs it:

    <!-- not run: downloads 140 MB -->
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from projects import ROOT

#: Pages whose blocks are run.
PAGES = (ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md")))
MARK = re.compile(r"^<!-- not run: (\S.*) -->$")
FENCE = re.compile(r"^ *```(\w*)$")
COMMANDS = "commands"
#: A line of a block that tests/e2e/test_documented_commands.py runs, with variables before it.
COMMAND = re.compile(r"(?:[A-Z_]+=\S+ )*(?:saelab|python experiment\.py|python plot\.py)(?: .*)?")


@dataclass(frozen=True)
class Block:
    """A block of code in a page.

    Args:
        page: its path relative to the repository.
        line: of the first line of code, from 1.
        language: of the fence; `COMMANDS` for an indented block.
        text: without indentation.
        reason: why no test runs it; '' where one does.
    """

    page: str
    line: int
    language: str
    text: str
    reason: str = ""

    def __str__(self) -> str:
        return f"{self.page}:{self.line}"


def blocks_of(page: Path) -> Iterator[Block]:
    """Yields the blocks of a page."""
    lines = page.read_text(encoding="utf-8").splitlines()
    name = page.relative_to(ROOT).as_posix()
    before, after_list, i = "", False, 0  # the last line that is not blank, before the block
    while i < len(lines):
        line, start = lines[i], i
        marked = MARK.match(before)
        reason = marked[1] if marked else ""
        if fence := FENCE.match(line):
            end = next(j for j in range(i + 1, len(lines)) if FENCE.match(lines[j]))
            text = "\n".join(lines[i + 1 : end])
            yield Block(name, i + 2, fence[1], f"{text}\n", reason)
            i = end
        elif line.startswith("    ") and (i == 0 or not lines[i - 1].strip()) and not after_list:
            while i + 1 < len(lines) and (lines[i + 1].startswith("    ") or not lines[i + 1]):
                i += 1
            text = "\n".join(one[4:] for one in lines[start : i + 1]).rstrip()
            yield Block(name, start + 1, COMMANDS, f"{text}\n", reason)
        if line.strip():
            before = line
            if not line.startswith(" "):
                after_list = bool(re.match(r"(- |\d+\. )", line))
        i += 1


def lines_of(block: Block) -> list[str]:
    """Returns the lines of a block of commands, continued ones as one."""
    joined = re.sub(r" *\\\n *", " ", block.text)
    return [line for line in joined.splitlines() if line.strip()]


def commands_of(block: Block) -> list[str]:
    """Returns those of a block's lines that can be run in a small project."""
    if block.language != COMMANDS:
        return []
    return [line for line in lines_of(block) if COMMAND.fullmatch(line)]


BLOCKS = [block for page in PAGES for block in blocks_of(page)]
