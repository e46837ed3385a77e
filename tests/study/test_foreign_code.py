"""The user's own code in a cell's key: every file and value that decides what the cell computes."""

from __future__ import annotations

import contextlib
import sys
from pathlib import Path

import pytest
from projects import HELPED_LOSS, TWO_SEEDS, Project, as_if_fresh

from saelab.errors import SettingError
from saelab.sae import SAEConfig
from saelab.study.experiment_file import load_experiment
from saelab.study.foreign_code import foreign_code

FILES = {
    "experiment.py": """
import functools, importlib
import helper
from package import part
import package.deep.inner as inner

def make(k):
    def build(d_in, d_sae, seed):
        return helper.build(k)
    return build

class Builder:
    __slots__ = ("k",)
    def __init__(self, k):
        self.k = k
    def __call__(self, d_in, d_sae, seed):
        return helper.build(self.k)
    def method(self, d_in, d_sae, seed):
        return helper.build(self.k)

def lazily(d_in, d_sae, seed):
    import late
    return importlib.import_module("by_name").build(late.K)

MODULES = {
    "function": lazily,
    "lambda": lambda d_in, d_sae, seed: helper.build(1),
    "enclosed": make(1),
    "partial": functools.partial(helper.build, k=1),
    "object": Builder(1),
    "method": Builder(1).method,
    "nested": functools.partial(helper.build, [{"k": (1, make(1))}]),
}
RUNS = {}
""",
    "helper.py": "from other import K\n\ndef build(k):\n    return k + K\n",
    "other.py": "K = 1\n",
    "late.py": "K = 1\n",
    "by_name.py": "def build(k):\n    return k\n",
    "package/__init__.py": "from .sibling import K\n",
    "package/sibling.py": "K = 1\n",
    "package/part.py": "from .deep import inner\n",
    "package/deep/inner.py": "from ..sibling import K\n",
    "unused.py": "K = 1\n",
}
#: Edits of experiment.py that change the value which the module is made with.
VALUES = {
    "enclosed": ('"enclosed": make(1)', '"enclosed": make(2)'),
    "partial": ("functools.partial(helper.build, k=1)", "functools.partial(helper.build, k=2)"),
    "object": ('"object": Builder(1)', '"object": Builder(2)'),
    "method": ("Builder(1).method", "Builder(2).method"),
    "nested": ("(1, make(1))", "(1, make(2))"),
}
SAE = SAEConfig.parse({"d_sae": 16})


def write(folder: Path) -> Path:
    for name, text in FILES.items():
        (folder / name).parent.mkdir(exist_ok=True, parents=True)
        (folder / name).write_text(text)
    return folder


def code_of(folder: Path, module: str, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What goes into a key of a process that has just been started."""
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    with contextlib.chdir(folder), as_if_fresh():
        modules = load_experiment(folder / "experiment.py").MODULES
        return foreign_code(SAE, modules[module], "arm")


@pytest.mark.parametrize("name", [name for name in FILES if name != "unused.py"])
def test_every_file_that_is_imported_is_in_the_key(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write(tmp_path)
    before = code_of(folder, "function", monkeypatch)
    assert code_of(folder, "function", monkeypatch) == before
    (folder / name).write_text(FILES[name] + "\n# a remark\n")
    assert code_of(folder, "function", monkeypatch) == before
    (folder / name).write_text(FILES[name] + "\nADDED = 1\n")
    assert code_of(folder, "function", monkeypatch) != before


def test_files_that_nothing_imports_leave_the_key(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write(tmp_path)
    before = code_of(folder, "function", monkeypatch)
    (folder / "unused.py").write_text("K = 2\n")
    assert code_of(folder, "function", monkeypatch) == before


def test_files_with_each_others_content_change_the_key(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write(tmp_path)
    (folder / "late.py").write_text("K = 3\n")
    before = code_of(folder, "function", monkeypatch)
    (folder / "late.py").write_text("K = 1\n")
    (folder / "other.py").write_text("K = 3\n")
    assert code_of(folder, "function", monkeypatch) != before


@pytest.mark.parametrize("module", VALUES)
def test_the_values_that_a_module_is_made_with_are_in_the_key(
    tmp_path: Path, module: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where the module is defined in another file than the value."""
    folder, (old, new) = write(tmp_path), VALUES[module]
    before = code_of(folder, module, monkeypatch)
    assert code_of(folder, module, monkeypatch) == before
    moved = folder.with_name(f"{folder.name}-moved")
    write(moved)
    assert code_of(moved, module, monkeypatch) == before
    text = FILES["experiment.py"]
    assert text.count(old) == 1

    (folder / "experiment.py").write_text(text.replace(old, new))
    assert code_of(folder, module, monkeypatch) != before


def test_a_value_that_can_not_be_hashed_is_refused() -> None:
    import functools
    import threading

    module = functools.partial(write, threading.Lock())
    with pytest.raises(SettingError, match="make the module from plain values"):
        foreign_code(SAE, module, "arm")


@pytest.mark.slow
def test_a_changed_helper_trains_its_cells_again(tmp_path: Path) -> None:
    """In worker processes, which import it as well; the baseline is taken from the cache."""
    arm = 'Arm("square", {"sae.losses+": {"kind": "square"}}, primary=True)'
    project = Project.make_smallest(tmp_path / "project", plan=TWO_SEEDS)
    project.table(('Arm("baseline")', arm), HELPED_LOSS)
    project.write("helper.py", "STRENGTH = 0.5\n")
    first = project.call(workers=1)
    assert first.code == 0, first.err
    before = project.weights()
    project.write("helper.py", "STRENGTH = 0.25  # weaker\n")
    second = project.again()
    assert second.code == 0 and "2 cells to train" in second.err, second.err
    changed = {name for name, weights in project.weights().items() if weights != before[name]}
    assert {name.split("/")[0] for name in changed} == {"square"}


@pytest.mark.parametrize("edited", ["the table", "the helper"])
def test_code_that_was_changed_during_the_launch_is_refused(
    tmp_path: Path, edited: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is not what the launch has imported; the run table may be edited meanwhile."""
    from saelab.launch import waves

    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    project = Project.make_smallest(tmp_path / "project")
    project.table(('Arm("baseline")', 'Arm("rate", {"train.lr": 1e-3})'), "import helper")
    project.write("helper.py", "STRENGTH = 2")
    prepare = waves.prepare

    def edit_and_prepare(*arguments: object, **options: object) -> object:
        if edited == "the helper":
            project.write("helper.py", "STRENGTH = 3")
        else:
            project.replace("experiment.py", '"rate"', '"another"')
        return prepare(*arguments, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(waves, "prepare", edit_and_prepare)
    ended = project.call()
    if edited == "the table":
        assert ended.code == 0, ended.err
    else:
        assert ended.code == 2 and "was changed after the launch had begun" in ended.last
        assert "Traceback" not in ended.err and not project.finished_cells()
