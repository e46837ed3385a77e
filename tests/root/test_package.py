"""The digest of the package's code, and whether that code is what was released."""

from __future__ import annotations

import base64
import hashlib
from importlib.metadata import PathDistribution
from pathlib import Path

import pytest

import saelab
from saelab.storage import cache


@pytest.fixture
def installed(tmp_path: Path) -> Path:
    """A package as pip leaves it: files, and their checksums in RECORD."""
    info, root = tmp_path / "saelab-0.1.0.dist-info", tmp_path / "saelab"
    info.mkdir()
    (root / "study").mkdir(parents=True)
    lines = []
    for name in ("__init__.py", "study/gate.py"):
        (root / name).write_text(f"# {name}\n", encoding="utf-8")
        digest = base64.urlsafe_b64encode(hashlib.sha256((root / name).read_bytes()).digest())
        lines.append(f"saelab/{name},sha256={digest.rstrip(b'=').decode()},9")
    (info / "RECORD").write_text("\n".join([*lines, "saelab-0.1.0.dist-info/RECORD,,"]))
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: saelab\nVersion: 0.1.0\n")
    return tmp_path


def state(installed: Path) -> str:
    files = PathDistribution(installed / "saelab-0.1.0.dist-info").files or ()
    return cache._package_state(installed / "saelab", files)


def test_the_digest_covers_the_whole_package_but_rooms_without_numbers(tmp_path: Path) -> None:
    assert Path(saelab.__file__).parent == cache.PACKAGE
    for name in ("sae.py", "training/loop.py", "kernels/native.cpp", "storage/remote.py"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    before = cache.digest_of_code(tmp_path)
    (tmp_path / "storage/remote.py").write_text("changed", encoding="utf-8")
    assert cache.digest_of_code(tmp_path) == before
    for name in ("sae.py", "training/loop.py", "kernels/native.cpp"):
        (tmp_path / name).write_text("changed", encoding="utf-8")
        assert cache.digest_of_code(tmp_path) != before
        before = cache.digest_of_code(tmp_path)


def test_a_release_is_told_from_one_that_was_edited(installed: Path) -> None:
    assert state(installed) == "as released"
    gate = installed / "saelab" / "study" / "gate.py"
    gate.write_text("THRESHOLD = 9\n", encoding="utf-8")
    assert state(installed) == "differs from the released files: study/gate.py"
    gate.unlink()
    (installed / "saelab" / "more.py").touch()
    assert state(installed) == "differs from the released files: more.py, study/gate.py"


def test_code_that_was_not_installed_is_a_source_tree(installed: Path, tmp_path: Path) -> None:
    files = PathDistribution(installed / "saelab-0.1.0.dist-info").files or ()
    other = tmp_path / "checkout"
    other.mkdir()
    (other / "gate.py").touch()
    assert cache._package_state(other, files) == cache.SOURCE_TREE


def test_code_that_can_alter_a_number_changes_the_digest(tmp_path: Path) -> None:
    for name in ("sae.py", "kernels/native.cpp", "storage/cache.py", "report/page.py"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("# one\n", encoding="utf-8")
    digests = [cache.digest_of_code(tmp_path)]
    for name in ("sae.py", "kernels/native.cpp", "storage/cache.py"):
        (tmp_path / name).write_text("# another\n", encoding="utf-8")
        digests.append(cache.digest_of_code(tmp_path))
    assert len(set(digests)) == 4
    for name in ("report/page.py", "storage/remote.py", "cli/run.py", "api.py", "__main__.py"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("# another\n", encoding="utf-8")
    assert cache.digest_of_code(tmp_path) == digests[-1]


def test_the_digest_is_of_this_package() -> None:
    assert (cache.PACKAGE / "training" / "loop.py").is_file()
    assert cache.package_digest() == cache.digest_of_code(Path(saelab.__file__).parent)
