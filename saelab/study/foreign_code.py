"""Code outside the package that a cell runs: it is part of the cell's content hash.

    files    that define the cell's parts and module, and all that these import, as far as they are
             the user's own: neither the standard library nor the package nor other installed ones
    values   that a module is made with: arguments of a `functools.partial`, attributes of a
             callable object, variables of an enclosing function

A run table, `RUNS`, and a candidate, `ARM = Arm(...)`, are left out, but for the entry of an arm
that brings its own module.
"""

from __future__ import annotations

import ast
import functools
import hashlib
import importlib
import inspect
import pickle
import sys
import sysconfig
from collections.abc import Iterable, Iterator
from importlib.machinery import PathFinder
from pathlib import Path
from types import FunctionType, MethodType, ModuleType
from typing import Any

from saelab.config import digest
from saelab.errors import SettingError
from saelab.parts.base import Dims
from saelab.runtime.counting import count
from saelab.sae import SAEConfig
from saelab.storage.cache import PACKAGE

#: Folders of installed packages, which change by their versions.
INSTALLED = ("site-packages", "dist-packages")
#: Functions that import a module by its name as text.
IMPORTERS = ("import_module", "__import__")


def foreign_code(sae: SAEConfig, module: Any = None, arm: str = "") -> list[str]:
    """Returns the code outside the package that a cell runs, [] where there is none.

    Args:
        sae: settings of the cell's SAE.
        module: builds the cell's own torch module; None for an SAE that is made of parts.
        arm: name of the cell's arm.

    Raises: SettingError for code that can't be read or for a value that can't be hashed.
    """
    owners: list[Any] = []
    for part in sae.all_parts():
        if not type(part).__module__.startswith("saelab."):
            owners += [type(part), type(part.build(Dims(2, sae.d_sae)))]
    files = {_defining_file(owner) for owner in owners}
    values: list[str] = []
    if module is not None:
        values = list(_Values(files).of(module))
    texts = [_code(file, arm if module else None) for file in _with_imports(files)]
    return [*texts, *values]


def study_code(experiment: Path, arms: Iterable[str]) -> str:
    """Returns a hash of experiment.py and of all that it imports.

    Args:
        arms: names of those whose entries in the run table count, as they bring modules.
    """
    files = _with_imports([experiment])
    entries = [_code(experiment, arm) for arm in sorted(arms)]
    return digest([*(_code(file, None) for file in files), *entries])


# ---- values ----------------------------------------------------------------------------------


class _Values:
    """Describes what a callable is made of, and adds the files that define it to `files`."""

    def __init__(self, files: set[Path]) -> None:
        self._files = files
        self._seen: list[Any] = []  # holds them, so that no id is used twice

    def of(self, owner: Any) -> Iterator[str]:
        """Yields texts that decide what the callable does, besides the code of its files.

        Raises: SettingError as `foreign_code`.
        """
        if any(owner is other for other in self._seen):
            return
        self._seen.append(owner)
        if isinstance(owner, functools.partial):
            yield from self.of(owner.func)
            yield from self._values(enumerate(owner.args), owner.func)
            yield from self._values(owner.keywords.items(), owner.func)
        elif isinstance(owner, MethodType):
            yield from self.of(owner.__func__)
            yield from self.of(owner.__self__)
        elif isinstance(owner, (FunctionType, type)):
            self._files.add(_defining_file(owner))
            yield owner.__qualname__
            if isinstance(owner, FunctionType):
                yield from self._values(_variables(owner), owner)
        else:
            yield from self.of(type(owner))
            yield from self._values(_attributes(owner), owner)

    def _values(self, values: Iterable[tuple[Any, Any]], owner: Any) -> Iterator[str]:
        for name, value in values:
            yield str(name)
            yield from self._value(value, str(name), owner)

    def _value(self, value: Any, name: str, owner: Any) -> Iterator[str]:
        if isinstance(value, ModuleType):
            yield value.__name__
            self._files.update(_file_of_module(value))
        elif isinstance(value, (list, tuple)):
            yield count(len(value), "value")
            yield from self._values(enumerate(value), owner)
        elif isinstance(value, dict):
            yield f"{len(value)} names"
            yield from self._values(value.items(), owner)
        elif isinstance(value, (functools.partial, MethodType)):
            yield from self.of(value)
        elif isinstance(value, (FunctionType, type)):
            yield f"{value.__module__}.{value.__qualname__}"
            if _is_own_code(value):
                yield from self.of(value)
        elif _is_own_code(type(value)):
            yield from self.of(value)
        else:
            yield _hash_of(value, name, owner)


def _is_own_code(owner: Any) -> bool:
    """Returns whether a class or a function is defined in a file of the user's own."""
    try:
        return _is_own(Path(inspect.getfile(owner)))
    except (TypeError, OSError):  # a built-in one
        return False


def _attributes(owner: Any) -> Iterator[tuple[str, Any]]:
    """Yields the attributes of an object, those in slots too."""
    yield from getattr(owner, "__dict__", {}).items()
    for kind in type(owner).__mro__:
        slots = kind.__dict__.get("__slots__", ())
        for name in (slots,) if isinstance(slots, str) else slots:
            if hasattr(owner, name) and name != "__dict__":
                yield name, getattr(owner, name)


def _variables(function: FunctionType) -> Iterator[tuple[str, Any]]:
    """Yields the defaults of a function and the variables that it has from an enclosing one."""
    yield from ((f"default {i}", value) for i, value in enumerate(function.__defaults__ or ()))
    yield from (function.__kwdefaults__ or {}).items()
    for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
        try:
            yield name, cell.cell_contents
        except ValueError:  # it is not set yet
            continue


def _hash_of(value: Any, name: str, owner: Any) -> str:
    """Returns a hash of a value.

    Raises: SettingError when the value can't be written as bytes.
    """
    try:
        return hashlib.sha256(pickle.dumps(value, protocol=4)).hexdigest()
    except Exception as error:  # `__reduce__` of any class may raise any kind
        qualified = getattr(owner, "__qualname__", type(owner).__qualname__)
        reason = (str(error) or type(error).__name__).splitlines()[0]
        remedy = f"it can't be hashed ({reason}), so cells could be mistaken for older ones: "
        remedy += "make the module from plain values"
        raise SettingError(f"module {qualified}: {name}", type(value).__name__, remedy) from None


# ---- files -----------------------------------------------------------------------------------


def _defining_file(owner: Any) -> Path:
    """Returns the file that defines a class or a function.

    Raises: SettingError when there is none, as for code typed into an interpreter.
    """
    try:
        return Path(inspect.getfile(owner)).resolve(strict=True)
    except (TypeError, OSError):
        remedy = "its source can't be read, so its cells could be mistaken for older ones: keep it "
        raise SettingError("code", owner.__qualname__, f"{remedy}in a file") from None


def _file_of_module(module: ModuleType) -> set[Path]:
    """Returns the file of a module if it is the user's own."""
    name = getattr(module, "__file__", None)
    return {Path(name).resolve()} if name and _is_own(Path(name)) else set()


def _with_imports(files: Iterable[Path]) -> list[Path]:
    """Returns the files and all others that they import, sorted."""
    importlib.invalidate_caches()
    waiting, complete = list(files), set[Path]()
    while waiting:
        file = waiting.pop()
        if file not in complete:
            complete.add(file)
            waiting += _imported(file)
    return sorted(complete)


def _imported(file: Path) -> Iterator[Path]:
    """Yields the user's own files that a file imports, anywhere in it."""
    package = _package(file)
    installed = any(part in INSTALLED for part in file.parts)
    for level, name in _import_names(file.read_bytes()):
        if level > len(file.parents):
            continue
        folder = file.parents[level - 1] if level else package.parent
        for target in _resolved(name, [str(folder), *([] if level else sys.path)]):
            if _is_own(target) or (installed and target.is_relative_to(package)):
                yield target


def _parsed(content: bytes) -> ast.Module | None:
    """Returns the tree of a source file; None for a file that is no source that can be read."""
    try:
        return ast.parse(content)
    except (SyntaxError, ValueError, RecursionError):
        return None


@functools.lru_cache(maxsize=1024)
def _import_names(content: bytes) -> tuple[tuple[int, str], ...]:
    """Returns (level, dotted name) of everything that a source file imports; the level is the
    number of leading dots. `from a import b` gives a.b, which may be a module or not."""
    names: dict[tuple[int, str], None] = {}
    tree = _parsed(content)
    for node in ast.walk(tree) if tree else ():
        if isinstance(node, ast.Import):
            names.update({(0, alias.name): None for alias in node.names})
        elif isinstance(node, ast.ImportFrom):
            for alias in node.names:
                name = ".".join(filter(None, (node.module, alias.name)))
                names[node.level, name] = None
        elif isinstance(node, ast.Call) and node.args:
            function, argument = node.func, node.args[0]
            called = function.attr if isinstance(function, ast.Attribute) else None
            called = function.id if isinstance(function, ast.Name) else called
            if called in IMPORTERS and isinstance(argument, ast.Constant):
                name = str(argument.value).lstrip(".")
                names[len(str(argument.value)) - len(name), name] = None
    return tuple(names)


def _resolved(name: str, places: list[str]) -> Iterator[Path]:
    """Yields the file of each module along a dotted name, as far as there are any.

    Args:
        places: folders in which the first part of the name is looked for.
    """
    inside: list[str] | None = places
    parts = name.split(".")
    for i, part in enumerate(parts, start=1):
        spec = PathFinder.find_spec(part, inside) if inside else None
        # one that is already imported may have been found by a finder of its own
        spec = spec or getattr(sys.modules.get(".".join(parts[:i])), "__spec__", None)
        if spec is None:
            return
        if spec.origin and spec.has_location:
            yield Path(spec.origin).resolve()
        inside = list(spec.submodule_search_locations or ())


@functools.cache
def _library() -> tuple[Path, ...]:
    """Folders whose files are not the user's own."""
    paths = sysconfig.get_paths()
    return (PACKAGE.resolve(), *(Path(paths[name]).resolve() for name in ("stdlib", "platstdlib")))


def _is_own(file: Path) -> bool:
    """Returns whether a file belongs to the user: neither to Python nor to an installed package."""
    file = file.resolve()
    installed = any(part in INSTALLED for part in file.parts)
    return not installed and not any(file.is_relative_to(folder) for folder in _library())


def _package(file: Path) -> Path:
    """Returns the outermost package that a file lies in; the file itself where there is none."""
    package = file
    while (package.parent / "__init__.py").is_file():
        package = package.parent
    return package


# ---- source ----------------------------------------------------------------------------------


def _code(file: Path, arm: str | None) -> str:
    """Returns a file's code without comments and without its run table; of that, the entry of
    `arm`; a hash of a compiled file."""
    content = file.read_bytes()
    tree = _parsed(content)
    if tree is None:
        return hashlib.sha256(content).hexdigest()
    kept: list[ast.AST] = []
    for node in tree.body:
        if not _of_table(node):
            kept.append(node)
        elif arm is not None:
            calls = [call for call in ast.walk(node) if isinstance(call, ast.Call)]
            kept += [call for call in calls if _names(call, arm)] or [node]
    return "\n".join(map(ast.unparse, kept))


def _of_table(node: ast.stmt) -> bool:
    """Returns True if a statement fills RUNS, makes the candidate ARM, or is the file's
    `if __name__ == "__main__"`."""
    if isinstance(node, ast.Assign) and ast.unparse(node).startswith("ARM = Arm("):
        return True
    places = [getattr(node, name, None) for name in ("target", "test")]
    places += getattr(node, "targets", [])
    inside = [part for place in places if place is not None for part in ast.walk(place)]
    return any(isinstance(part, ast.Name) and part.id in ("RUNS", "__name__") for part in inside)


def _names(call: ast.Call, arm: str) -> bool:
    values = [*call.args, *(keyword.value for keyword in call.keywords)]
    return any(isinstance(value, ast.Constant) and value.value == arm for value in values)
