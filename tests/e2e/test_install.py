"""The package as people install it: an sdist and a wheel, used away from the checkout."""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest

import saelab

REPOSITORY = Path(__file__).parents[2]
BUILD = "from setuptools import build_meta; print(build_meta.build_{kind}({folder!r}))"


def build(kind: str, source: Path, folder: Path) -> Path:
    """Builds a distribution as pip would, without fetching the build tools again."""
    code = BUILD.format(kind=kind, folder=str(folder))
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=source, text=True, capture_output=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return folder / done.stdout.splitlines()[-1]


def tracked(*under: str) -> set[str]:
    """Files of the repository, as git lists them."""
    command = ["git", "-c", "safe.directory=*", "ls-files", *under]
    listed = subprocess.run(command, cwd=REPOSITORY, text=True, capture_output=True, check=True)
    return set(listed.stdout.splitlines())


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built from what the sdist holds and nothing else."""
    if not (REPOSITORY / ".git").exists():
        pytest.skip("needs the list of files that git has")
    folder = tmp_path_factory.mktemp("built")
    source = folder / "source"
    for name in tracked():
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        (source / name).write_bytes((REPOSITORY / name).read_bytes())
    sdist = build("sdist", source, folder)
    with tarfile.open(sdist) as archive:
        archive.extractall(folder / "unpacked", filter="data")
    return build("wheel", folder / "unpacked" / sdist.name.removesuffix(".tar.gz"), folder)


def test_the_wheel_has_every_file_of_the_package_and_no_other(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
        metadata = archive.read(f"saelab-{saelab.__version__}.dist-info/METADATA").decode()
    assert names == tracked("saelab")
    assert f"\nVersion: {saelab.__version__}\n" in metadata


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Scripts of an environment that has the wheel, and its dependencies from this environment."""
    folder = tmp_path_factory.mktemp("environment")
    venv.create(folder, with_pip=False)
    python = folder / "bin" / "python"
    subprocess.run(
        [sys.executable, "-m", "pip", "--python", python, "install", "--no-deps", "-q", wheel],
        check=True,
    )
    ask = "import sysconfig; print(sysconfig.get_path('purelib'))"
    place = subprocess.run([python, "-c", ask], text=True, capture_output=True, check=True)
    borrowed = Path(place.stdout.strip()) / "borrowed.pth"
    borrowed.write_text(sysconfig.get_path("purelib") + "\n", encoding="utf-8")
    return folder / "bin"


def call(scripts: Path, folder: Path, *command: str) -> str:
    """Runs a command of the installed package; returns what it prints."""
    around = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        [scripts / command[0], *command[1:]],
        cwd=folder,
        env=around | {"SAELAB_PROGRESS": "off", "SAELAB_CACHE": str(folder / "cache")},
        text=True,
        capture_output=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
def test_the_quick_form_runs_away_from_the_checkout(installed: Path, tmp_path: Path) -> None:
    where = call(installed, tmp_path, "python", "-c", "import saelab; print(saelab.__file__)")
    assert str(installed.parent) in where and str(REPOSITORY) not in where
    assert saelab.__version__ in call(installed, tmp_path, "saelab", "--version")
    call(installed, tmp_path, "saelab", "template", "mine")
    mine = tmp_path / "mine"
    call(installed, mine, "saelab", "run", "run_1", "--quick")
    summary = (mine / "quick" / "run_1" / "summary.md").read_text(encoding="utf-8")
    assert "quick" in summary and "| arm |" in summary
    call(installed, mine, "saelab", "verdict", "quick/run_1")
    call(installed, mine, "saelab", "report", "quick/run_1", "--out", "page.html", "--cells", "1")
    assert (mine / "page.html").stat().st_size > 100_000
