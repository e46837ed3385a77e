"""A launch where parts of Linux are missing: as on Windows, and without a compiler.

The first is simulated (helpers/like_windows): saelab has run on Linux alone so far.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from projects import ROOT, Ended, Project, environment

from saelab.runtime.system import DEVICES, RESERVED

LIKE_WINDOWS = Path(__file__).parents[1] / "helpers" / "like_windows"
#: Why the eager kernels are used.
EAGER = "the slower eager kernels are used: "


def run_python(folder: Path, *arguments: str, **variables: str) -> Ended:
    """Runs Python in a folder with no command to find and an empty cache of kernels."""
    nothing = folder / "nothing"
    nothing.mkdir(exist_ok=True)
    around = environment(PATH=str(nothing), XDG_CACHE_HOME=str(nothing / "cache"), **variables)
    around.pop("CXX", None)
    done = subprocess.run(
        [sys.executable, *arguments],
        cwd=folder,
        env=around,
        encoding="utf-8",
        capture_output=True,
        check=False,
    )
    return Ended(done.returncode, done.stdout, done.stderr)


def as_on_windows(folder: Path, *arguments: str, workers: int = 1) -> Ended:
    paths = os.pathsep.join([str(LIKE_WINDOWS), str(ROOT)])
    return run_python(folder, *arguments, PYTHONPATH=paths, SAELAB_WORKERS=str(workers))


@pytest.fixture(scope="module")
def launched(tmp_path_factory: pytest.TempPathFactory) -> tuple[Project, Ended]:
    """A launch with a worker process as on Windows."""
    project = Project.make_smallest(tmp_path_factory.mktemp("windows") / "project")
    return project, as_on_windows(project.folder, "experiment.py", "--out_dir=run_1")


def test_a_launch_as_on_windows_is_complete(launched: tuple[Project, Ended]) -> None:
    project, ended = launched
    assert ended.code == 0, ended.err
    assert "Traceback" not in ended.err
    assert EAGER + "they are not built on Windows" in ended.err
    assert list(project.info()) == ["baseline", "rate"]


def test_files_have_names_that_windows_and_macos_accept(launched: tuple[Project, Ended]) -> None:
    for folder, folders, files in os.walk(launched[0].folder):
        names = [*folders, *files]
        assert len({name.casefold() for name in names}) == len(names), folder
        for name in names:
            assert not set(name) & set(RESERVED) and not name.endswith((".", " ")), name
            assert name.partition(".")[0].upper() not in DEVICES, name
            assert len(str(Path(folder, name).relative_to(launched[0].folder))) < 160


def test_no_lock_or_temporary_file_is_left(launched: tuple[Project, Ended]) -> None:
    left = [file.name for file in launched[0].folder.rglob(".*") if file.is_file()]
    assert not [name for name in left if name.endswith((".lock", ".tmp"))]


def test_later_commands_read_the_run_as_on_windows(launched: tuple[Project, Ended]) -> None:
    folder = launched[0].folder
    for command in (["verdict", "run_1"], ["watch", "run_1"], ["report", "run_1", "--cells", "1"]):
        ended = as_on_windows(folder, "-m", "saelab", *command)
        assert ended.code == 0, (command, ended.err)
    (folder / "run_1" / "final_info.json").unlink()
    again = as_on_windows(folder, "experiment.py", "--out_dir=run_1")
    assert again.code == 0, again.err
    assert "to train" not in again.err, "every cell is in the cache"


def test_a_launch_without_a_compiler_says_so_and_is_complete(tmp_path: Path) -> None:
    project = Project.make_smallest(tmp_path / "project")
    ended = run_python(
        project.folder,
        *("experiment.py", "--out_dir=run_1"),
        PYTHONPATH=str(ROOT),
        SAELAB_WORKERS="0",
    )
    assert ended.code == 0, ended.err
    assert EAGER + "no C++ compiler (g++, clang++, c++) is installed" in ended.err
    assert list(project.info()) == ["baseline", "rate"]
