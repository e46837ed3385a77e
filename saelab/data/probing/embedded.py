"""Labelled texts for sparse probing, cut from the structure of the standard library's source.

Every entry has several classes, probed one against the rest. Only modules that the embedded
language model never saw are used (`Module.held_out`), and train and test never share a file:

    test  <=>  path_hash(path, "probing") mod 4 == 0

A label is the origin of a text (package, node of the syntax tree, comment or docstring). The words
that would reveal it (`if`, `return`, `#`, quotes, a function's name if the name is the label) lie
outside the text. A text that occurs under two classes or on both sides is dropped.
"""

from __future__ import annotations

import ast
import functools
import textwrap
import warnings
from collections import defaultdict, deque
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

from saelab import config
from saelab.data.text.stdlib import Module, modules, path_hash
from saelab.errors import SettingError
from saelab.seeding import numpy_stream

#: Fewest texts per class of an entry. Our choice: with 150 texts of a class the standard error of a
#: test accuracy is below 3%.
MIN_TRAIN, MIN_TEST = 500, 150
#: Longest text. Our choice: about 40 tokens, because every SAE must encode all of them.
CHARACTERS = 128
#: One held-out file in TEST_EVERY is a test file.
TEST_EVERY = 4
#: Seed of the draw from all candidates, the same as SAEBench's.
SAMPLING_SEED = 42

Labelled = Iterator[tuple[str, str]]  # pairs (class, text)
Candidates = dict[tuple[str, bool], dict[str, None]]  # (class, is test) -> texts in order


@dataclass(frozen=True, kw_only=True)
class Entry:
    """Labelled data set with several classes.

    Args:
        name: name of its results.
        classes: the keys of `train` and `test`, in order.
        train, test: texts by class; no text is in both.
        source: one line on the origin of texts and labels.
    """

    name: str
    classes: tuple[str, ...]
    train: dict[str, tuple[str, ...]]
    test: dict[str, tuple[str, ...]]
    source: str


class ParsedModule:
    """Syntax tree of a module: its nodes by type, their parents, and the text of any node.

    Raises: SyntaxError when this interpreter can't parse the module.
    """

    def __init__(self, module: Module) -> None:
        self.module = module
        self.lines = module.text.split("\n")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # old escapes in the library's own strings
            self.tree = ast.parse(module.text)
        self.parents: dict[ast.AST, ast.AST] = {}
        self._by_type: dict[type[ast.AST], list[Any]] = defaultdict(list)
        self._bytes = [line.encode() for line in self.lines]
        nodes: deque[ast.AST] = deque([self.tree])
        while nodes:  # the order of ast.walk, which would look for all children once more
            node = nodes.popleft()
            self._by_type[type(node)].append(node)
            for child in ast.iter_child_nodes(node):
                self.parents[child] = node
                nodes.append(child)

    def all(self, *types: type[ast.AST]) -> Iterator[Any]:
        """Yields all nodes of exactly these types."""
        for kind in types:
            yield from self._by_type[kind]

    def text(self, first: Any, last: Any = None) -> str:
        """Returns the source from `first` to the end of `last`, without common indentation."""
        last = last or first
        lines = self._bytes[first.lineno - 1 : last.end_lineno]
        if last.end_lineno == first.lineno:
            return lines[0][first.col_offset : last.end_col_offset].decode()
        lines = [b" " * first.col_offset + lines[0][first.col_offset :], *lines[1:]]
        lines[-1] = lines[-1][: last.end_col_offset]
        return textwrap.dedent(b"\n".join(lines).decode())

    def owner(self, node: ast.AST) -> ast.AST:
        """Returns the function, class or module whose body contains the node."""
        while True:
            node = self.parents[node]
            if isinstance(node, (*FUNCTIONS, ast.ClassDef, ast.Module)):
                return node


FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)
DOCUMENTED = (*FUNCTIONS, ast.ClassDef, ast.Module)

#: Package families by theme; a family without held-out modules is harmless.
THEMES = {
    "gui": "curses idlelib tkinter turtle turtledemo",
    "network": "asynchat asyncio asyncore cgi email ftplib http imaplib mailbox mimetypes nntplib "
    "poplib selectors smtpd smtplib socket socketserver ssl telnetlib urllib webbrowser wsgiref "
    "xmlrpc",
    "tooling": "ast bdb cProfile code compileall dis distutils doctest ensurepip importlib inspect "
    "lib2to3 modulefinder opcode pdb pickletools pkgutil profile pstats py_compile pyclbr runpy "
    "site symtable tabnanny token tokenize trace traceback venv zipapp zipimport",
}
_THEME_OF = {family: theme for theme, names in THEMES.items() for family in names.split()}


def cut_theme(source: ParsedModule) -> Labelled:
    """Yields whole lines of a module, labelled by the theme of its package."""
    theme = _THEME_OF.get(source.module.family)
    if theme is None:
        return
    window: list[str] = []
    for line in source.lines:
        window.append(line)
        if sum(map(len, window)) + len(window) > CHARACTERS:
            yield theme, textwrap.dedent("\n".join(window))
            window = []


def cut_prose(source: ParsedModule) -> Labelled:
    """Yields first and later paragraphs of docstrings, comments, and messages, without marks."""
    for node in source.all(*DOCUMENTED):
        if (text := ast.get_docstring(node)) is not None:
            summary, *details = text.split("\n\n")
            yield "summary", summary
            yield from (("detail", textwrap.dedent(detail)) for detail in details)
    inside: set[int] = set()
    for node in source.all(ast.Constant):
        if isinstance(node.value, (str, bytes)):
            inside.update(range(node.lineno + 1, node.end_lineno + 1))
            argument = isinstance(source.parents[node], (ast.Call, ast.BinOp))
            if argument and isinstance(node.value, str) and " " in node.value.strip():
                yield "message", node.value
    for node in source.all(ast.JoinedStr):
        inside.update(range(node.lineno + 1, node.end_lineno + 1))
    yield from (("comment", text) for text in comment_blocks(source.lines, inside))


def comment_blocks(lines: list[str], inside: set[int]) -> Iterator[str]:
    """Yields adjoining whole-line comments as one text each, without `#`.

    Args:
        lines: lines of the module.
        inside: numbers (from 1) of the lines that begin inside a string.
    """
    block: list[str] = []
    for number, line in enumerate([*lines, ""], start=1):
        bare = line.strip()
        if bare.startswith("#") and number not in inside:
            block.append(bare.lstrip("#! ").rstrip("#-=* "))
        elif block:
            yield "\n".join(block)
            block = []


def cut_expression_role(source: ParsedModule) -> Labelled:
    """Yields expressions, labelled by their use."""
    for node in source.all(ast.If, ast.While, ast.IfExp):
        yield "condition", source.text(node.test)
    for node in source.all(ast.Return):
        if node.value:
            yield "returned", source.text(node.value)
    for node in source.all(ast.Call):
        yield from (("argument", source.text(argument)) for argument in node.args)


def cut_assignment_scope(source: ParsedModule) -> Labelled:
    """Yields assignments, labelled by their scope."""
    for node in source.all(ast.Assign, ast.AnnAssign, ast.AugAssign):
        owner = source.owner(node)
        if isinstance(owner, FUNCTIONS):
            yield "constructor" if owner.name == "__init__" else "function", source.text(node)
        elif isinstance(owner, ast.Module):
            yield "module", source.text(node)


def cut_block(source: ParsedModule) -> Labelled:
    """Yields bodies of compound statements, labelled by the statement."""
    kinds = {"branch": (ast.If,), "loop": (ast.For, ast.While), "guarded": (ast.Try, ast.With)}
    for kind, types in kinds.items():
        for node in source.all(*types):
            yield kind, source.text(node.body[0], node.body[-1])


def _body(function: Any) -> list[ast.stmt]:
    """Returns the statements of a function without its docstring."""
    return function.body[ast.get_docstring(function, clean=False) is not None :]


def cut_function_name(source: ParsedModule) -> Labelled:
    """Yields bodies of functions, without name and docstring, labelled by the kind of name."""
    for node in source.all(*FUNCTIONS):
        if body := _body(node):
            special = node.name.startswith("__") and node.name.endswith("__")
            kind = "special" if special else "private" if node.name[0] == "_" else "public"
            yield kind, source.text(body[0], body[-1])


def cut_function_part(source: ParsedModule) -> Labelled:
    """Yields the first two and the last two statements of functions with at least four."""
    for node in source.all(*FUNCTIONS):
        if len(body := _body(node)) >= 4:
            yield "opening", source.text(body[0], body[1])
            yield "closing", source.text(body[-2], body[-1])


@dataclass(frozen=True, kw_only=True)
class EmbeddedRecipe:
    """Recipe of an embedded entry: `cut(source)` yields the (class, text) pairs of a module."""

    name: str
    classes: tuple[str, ...]
    cut: Callable[[ParsedModule], Labelled]
    shortest: int  # characters
    source: str


#: The embedded entries. A new one is a function and a line here.
EMBEDDED_RECIPES = (
    EmbeddedRecipe(
        name="theme",
        classes=("gui", "network", "tooling"),
        cut=cut_theme,
        shortest=40,
        source="windows of whole lines, by the theme of the package",
    ),
    EmbeddedRecipe(
        name="prose",
        classes=("summary", "detail", "comment", "message"),
        cut=cut_prose,
        shortest=20,
        source="prose without its marks: first and later paragraphs of docstrings, comments, "
        "messages",
    ),
    EmbeddedRecipe(
        name="expression_role",
        classes=("condition", "returned", "argument"),
        cut=cut_expression_role,
        shortest=16,
        source="expressions, by what they are used for",
    ),
    EmbeddedRecipe(
        name="assignment_scope",
        classes=("module", "constructor", "function"),
        cut=cut_assignment_scope,
        shortest=12,
        source="assignments, by where they stand",
    ),
    EmbeddedRecipe(
        name="block",
        classes=("branch", "loop", "guarded"),
        cut=cut_block,
        shortest=20,
        source="bodies of compound statements (if; for and while; try and with), by the statement",
    ),
    EmbeddedRecipe(
        name="function_name",
        classes=("public", "private", "special"),
        cut=cut_function_name,
        shortest=20,
        source="bodies of functions, by the kind of the name, which is left out (f, _f, __f__)",
    ),
    EmbeddedRecipe(
        name="function_part",
        classes=("opening", "closing"),
        cut=cut_function_part,
        shortest=20,
        source="the first two and the last two statements of functions with at least four",
    ),
)


def embedded_entries(train_size: int = 500, test_size: int = 250) -> tuple[Entry, ...]:
    """Returns the entries for which this interpreter's library is large enough, in a fixed order.

    Args:
        train_size, test_size: largest number of texts per class; a class may have fewer
            (`MIN_TRAIN`, `MIN_TEST`).

    Raises: SettingError when a size is below 1.
    """
    for setting, size in (("train_size", train_size), ("test_size", test_size)):
        if size < 1:
            raise SettingError(setting, size, "choose a number of texts per class from 1 on")
    return _entries(train_size, test_size)


@functools.cache
def _entries(train_size: int, test_size: int) -> tuple[Entry, ...]:
    reasons = missing_entries()
    return tuple(
        _draw(recipe, _candidates()[recipe.name], train_size, test_size)
        for recipe in EMBEDDED_RECIPES
        if recipe.name not in reasons
    )


def missing_entries() -> dict[str, str]:
    """Returns the entries for which this interpreter's library is too small, with the reason."""
    reasons: dict[str, str] = {}
    for recipe in EMBEDDED_RECIPES:
        for name in recipe.classes:
            for test, least in ((False, MIN_TRAIN), (True, MIN_TEST)):
                count = len(_candidates()[recipe.name][name, test])
                if count < least:
                    side = "test" if test else "train"
                    reasons.setdefault(
                        recipe.name, f"class {name!r} has {count} {side} texts, {least} are needed"
                    )
    return reasons


@functools.cache
def _candidates() -> dict[str, Candidates]:
    """Returns all texts of every recipe that have only one class and one side."""
    candidates = {
        recipe.name: {(name, test): {} for name in recipe.classes for test in (False, True)}
        for recipe in EMBEDDED_RECIPES
    }
    for module in modules():
        if not module.held_out:
            continue
        try:
            source = ParsedModule(module)
        except SyntaxError:
            continue  # templates and files for another version of the language
        test = path_hash(module.path, "probing") % TEST_EVERY == 0
        for recipe in EMBEDDED_RECIPES:
            for name, text in recipe.cut(source):
                text = text.strip()[:CHARACTERS].strip()
                if len(text) >= recipe.shortest:
                    candidates[recipe.name][name, test][text] = None
    for groups in candidates.values():
        drop_shared(groups)
    return candidates


def drop_shared(groups: dict[Any, dict[str, Any]]) -> None:
    """Removes every text (key) that is in more than one group from all of them."""
    count: dict[str, int] = defaultdict(int)
    for group in groups.values():
        for text in group:
            count[text] += 1
    for key, group in groups.items():
        groups[key] = {text: value for text, value in group.items() if count[text] == 1}


def _draw(recipe: EmbeddedRecipe, groups: Candidates, train_size: int, test_size: int) -> Entry:
    """Draws the texts of an entry from its candidates."""

    def side(test: bool, size: int) -> dict[str, tuple[str, ...]]:
        return {
            name: sample(list(groups[name, test]), size, SAMPLING_SEED, recipe.name, name, test)
            for name in recipe.classes
        }

    train, test = side(False, train_size), side(True, test_size)
    source = f"held-out modules of the standard library: {recipe.source}"
    return Entry(name=recipe.name, classes=recipe.classes, train=train, test=test, source=source)


def sample(texts: list[str], size: int, seed: int, *keys: int | str) -> tuple[str, ...]:
    """Draws at most `size` of the texts from the stream 'probing' of `seed` and `keys`."""
    order = numpy_stream(seed, "probing", *keys).permutation(len(texts))
    return tuple(texts[i] for i in order[:size])


def entries_digest(entries: tuple[Entry, ...]) -> str:
    """Returns a 16-character content hash of names, classes and texts."""
    return config.digest([asdict(entry) for entry in entries])
