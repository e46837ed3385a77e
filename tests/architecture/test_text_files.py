"""Every text file is read and written as UTF-8, whatever the locale; settings have one reader."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import saelab

ROOT = Path(saelab.__file__).parent
#: Methods of a path that take an encoding; `open` does unless its mode is binary.
OF_TEXT = {"read_text", "write_text"}
#: Functions that may parse a file of settings or JSON, each by way of `storage/small_files.py`.
PARSERS = {"tomllib.loads", "tomllib.load", "json.load"}
#: Modules that may call them: what they parse comes from the one reader, or is no file.
MAY_PARSE = {"config.py", "cli/common.py"}


def calls(tree: ast.AST) -> Iterator[tuple[str, str, ast.Call]]:
    """The last name, the whole name, and the node of every call."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            whole = ast.unparse(node.func)
            yield whole.rpartition(".")[2], whole, node


def is_binary(call: ast.Call) -> bool:
    """Returns True if a call of `open` has a mode with a 'b', given by position or by name."""
    modes = [k.value for k in call.keywords if k.arg == "mode"]
    first = call.args if isinstance(call.func, ast.Attribute) else call.args[1:]
    texts = [n.value for n in (*modes, *first[:1]) if isinstance(n, ast.Constant)]
    return any(isinstance(text, str) and "b" in text for text in texts)


def is_text(name: str, whole: str, call: ast.Call) -> bool:
    """Returns True if a call reads or writes text of a file or a process."""
    keywords = {keyword.arg for keyword in call.keywords}
    if whole.startswith("subprocess."):
        return bool(keywords & {"text", "universal_newlines"})
    if whole == "os.fdopen":
        return len(call.args) < 2
    if whole in ("os.open", "archive.open"):  # a descriptor; a member of a zip file, always binary
        return False
    if name == "open" and not whole.endswith("Source.open"):
        return not is_binary(call)
    return name in OF_TEXT and name != whole  # the plain names are our own functions


def without_encoding(tree: ast.AST) -> list[str]:
    """Calls that read or write text by the locale."""
    return [
        f"line {call.lineno}: {whole}"
        for name, whole, call in calls(tree)
        if is_text(name, whole, call) and "encoding" not in {k.arg for k in call.keywords}
    ]


MODULES = {str(file.relative_to(ROOT)): file for file in sorted(ROOT.rglob("*.py"))}
TREES = {name: ast.parse(file.read_text(encoding="utf-8")) for name, file in MODULES.items()}


def test_text_has_an_encoding() -> None:
    found = {name: places for name, tree in TREES.items() if (places := without_encoding(tree))}
    assert not found
    sick = "path.read_text(); open(f); p.open('r'); subprocess.run(c, text=True); os.fdopen(h)"
    assert len(without_encoding(ast.parse(sick))) == 5
    sound = "p.open('rb'); open(f, mode='wb'); FolderSource.open(f); os.open(f, 1); p.read_bytes()"
    assert not without_encoding(ast.parse(sound))


def test_settings_have_one_reader() -> None:
    found = {
        name for name, tree in TREES.items() for _, whole, _ in calls(tree) if whole in PARSERS
    }
    assert found == MAY_PARSE
