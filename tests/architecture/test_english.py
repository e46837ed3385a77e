"""Names and sentences follow the rules of CONTRIBUTING.md and docs/glossary.md."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

import saelab

ROOT = Path(saelab.__file__).parent
FILES = {file.relative_to(ROOT).as_posix(): file for file in sorted(ROOT.rglob("*.py"))}
TREES = {name: ast.parse(file.read_text(encoding="utf-8")) for name, file in FILES.items()}
DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
#: A docstring begins with a verb or a noun.
OPENINGS = re.compile(r"(Of|What|Where|Whether|As|How|That|By|To be|The same)\b")
#: Words of messages and docstrings for which plain ones exist.
WORDS = re.compile(r"\b(mend|mended|told|has them not|is no (folder|file|TOML|number))\b")
#: A function is named by a verb or by what it returns.
PARTICIPLES = {"told", "found", "known", "some", "kept", "asked", "shown", "named", "held"}
#: Lines that a module may have, and the modules that are longer; the list may only shrink.
LONGEST = 500
LONGER = {"sae.py"}
#: Modules in one room.
LARGEST_ROOM = 21


def functions(tree: ast.AST) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            yield node


def docstrings(tree: ast.Module) -> Iterator[tuple[int, str]]:
    for node in ast.walk(tree):
        if isinstance(node, DOCUMENTED) and (text := ast.get_docstring(node)):
            yield getattr(node, "lineno", 1), text


def texts(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """Every string of a module: docstrings, messages and the pieces of formatted ones."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.lineno, node.value


@pytest.mark.parametrize("name", FILES)
def test_docstrings_begin_with_a_verb_or_a_noun(name: str) -> None:
    fragments = [
        f"{name}:{line} {text.splitlines()[0]}"
        for line, text in docstrings(TREES[name])
        if OPENINGS.match(text)
    ]
    assert not fragments


@pytest.mark.parametrize("name", FILES)
def test_messages_are_in_plain_words(name: str) -> None:
    odd = [f"{name}:{line} {text[:80]}" for line, text in texts(TREES[name]) if WORDS.search(text)]
    assert not odd


@pytest.mark.parametrize("name", FILES)
def test_functions_are_not_named_by_a_bare_participle(name: str) -> None:
    odd = [f"{name}:{f.lineno} {f.name}" for f in functions(TREES[name])]
    assert not [text for text in odd if text.split()[-1].lstrip("_") in PARTICIPLES]


def test_modules_are_short() -> None:
    lines = {
        name: len(file.read_text(encoding="utf-8").splitlines()) for name, file in FILES.items()
    }
    assert {name for name, count in lines.items() if count > LONGEST} == LONGER


def test_rooms_are_small() -> None:
    rooms: dict[str, int] = {}
    for name in FILES:
        room = name.rpartition("/")[0]
        rooms[room] = rooms.get(room, 0) + 1
    assert max(rooms.values()) <= LARGEST_ROOM, rooms


def test_many_fields_are_given_by_name() -> None:
    """No call gives one of the package's dataclasses more than four values by position."""
    calls = [
        f"{name}:{node.lineno} {ast.unparse(node.func)}"
        for name, tree in TREES.items()
        for node in ast.walk(tree)
        if isinstance(node, ast.Call)
        and len(node.args) > 4
        and not any(isinstance(argument, ast.Starred) for argument in node.args)
        and ast.unparse(node.func) in dataclasses_known_in(name)
    ]
    assert not calls


def dataclasses_known_in(name: str) -> set[str]:
    """Names of the package's dataclasses that a module defines or imports from where they are."""
    known = dataclasses_of(name)
    for node in ast.walk(TREES[name]):
        if isinstance(node, ast.ImportFrom) and (file := module_file(node.module or "")):
            known |= {alias.name for alias in node.names} & dataclasses_of(file)
    return known


def dataclasses_of(name: str) -> set[str]:
    return {
        node.name
        for node in TREES[name].body
        if isinstance(node, ast.ClassDef)
        and any(ast.unparse(one).startswith("dataclass") for one in node.decorator_list)
    }


def module_file(module: str) -> str | None:
    """The file of a module of the package."""
    stem = module.removeprefix("saelab.").replace(".", "/")
    return next((file for file in (f"{stem}.py", f"{stem}/__init__.py") if file in FILES), None)
