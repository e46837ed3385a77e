"""The compiled kernels: built once, found damaged, built again; compilers of every form."""

from __future__ import annotations

import os
import stat
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from projects import run

from saelab.kernels import build, native

#: Stands for a compiler: writes its arguments to the output file, and a line to the log.
COMPILER = """\
#!{python}
import os, sys
from pathlib import Path
with open({log!r}, "a") as log:
    log.write("x")
if "--version" in sys.argv:
    print("a compiler 1.0")
else:
    Path(sys.argv[sys.argv.index("-o") + 1]).write_text(" ".join(sys.argv[1:3]))
"""


class Fake:
    """A compiler that counts its calls."""

    def __init__(self, folder: Path) -> None:
        self.file, self.log = folder / "my compiler", folder / "log"
        self.file.write_text(COMPILER.format(python=sys.executable, log=str(self.log)))
        self.file.chmod(self.file.stat().st_mode | stat.S_IXUSR)

    @property
    def calls(self) -> int:
        return len(self.log.read_text()) if self.log.exists() else 0


@pytest.fixture
def fake(tmp_path: Path) -> Fake:
    return Fake(tmp_path)


def overwrite(content: bytes) -> Callable[[Path, Path], object]:
    return lambda file, checksum: file.write_bytes(content)


DAMAGE: dict[str, Callable[[Path, Path], object]] = {
    "cut": lambda file, checksum: os.truncate(file, 5),
    "emptied": overwrite(b""),
    "another": overwrite(b"x" * 100),
    "no checksum": lambda file, checksum: checksum.unlink(),
    "emptied checksum": lambda file, checksum: checksum.write_text(""),
    "checksum of bytes": lambda file, checksum: checksum.write_bytes(b"\xff" * 64),
    "missing": lambda file, checksum: file.unlink(),
}


@pytest.mark.parametrize("harm", DAMAGE)
def test_a_damaged_library_is_built_again(
    harm: str, fake: Fake, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "cache" / "saelab.so"
    for _ in range(2):
        build.library_file(file, [str(fake.file)])
    assert fake.calls == 1 and not capsys.readouterr().err
    before = file.read_bytes()
    DAMAGE[harm](file, file.with_name("saelab.so.sha256"))
    for _ in range(2):
        assert build.library_file(file, [str(fake.file)]).read_bytes() == before
    assert fake.calls == 2
    assert ("does not match its checksum" in capsys.readouterr().err) == (harm != "missing")
    assert sorted(p.name for p in file.parent.iterdir()) == ["saelab.so", "saelab.so.sha256"]


def test_a_compiler_that_fails_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(build.Unavailable, match="false failed"):
        build.library_file(tmp_path / "cache" / "saelab.so", ["false"])
    assert not list((tmp_path / "cache").iterdir())


@pytest.mark.parametrize("arguments", ["", " -O2", " -O2 '-DNAME=a b'"])
def test_a_compiler_with_arguments(
    arguments: str, fake: Fake, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = tmp_path / "compiler"
    plain.symlink_to(fake.file)
    monkeypatch.setenv("CXX", f"{plain}{arguments}")
    command = build._compiler()
    assert command[0] == str(plain) and len(command) == 1 + arguments.count("-")
    text = build.library_file(tmp_path / "cache" / "saelab.so", command).read_text()
    assert text.startswith(arguments.split()[0] if arguments else "-O3")


@pytest.mark.parametrize(
    ("named", "command"),
    [
        ("ccache g++ -O2", ["ccache", "g++", "-O2"]),
        ("  clang++  ", ["clang++"]),
        ("env A='b c' g++", ["env", "A=b c", "g++"]),
    ],
)
def test_commands(named: str, command: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", named)
    assert build._compiler() == command


def test_a_path_with_spaces_and_a_quote_without_end(
    fake: Fake, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CXX", str(fake.file))
    assert build._compiler() == [str(fake.file)]
    monkeypatch.setenv("CXX", "g++ 'x")
    with pytest.raises(build.Unavailable, match="is not a command"):
        build._compiler()
    monkeypatch.setenv("CXX", " ")
    monkeypatch.setattr(build, "COMPILERS", ("nothing-of-the-kind",))
    with pytest.raises(build.Unavailable, match="no C\\+\\+ compiler"):
        build._compiler()


def test_a_second_folder_where_the_first_can_not_hold_it(
    fake: Fake, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    tried = []

    def load(name: str) -> str:
        tried.append(Path(name).parent)
        if len(tried) == 1:
            raise OSError("failed to map segment from shared object")
        return name

    monkeypatch.setenv("CXX", str(fake.file))
    monkeypatch.setattr(build.ctypes, "CDLL", load)
    folders = [tmp_path / "file" / "cache", tmp_path / "not executable", tmp_path / "third"]
    monkeypatch.setattr(build, "_folders", lambda: folders)
    assert Path(str(build.load_library())).parent == folders[2]
    assert tried == folders[1:]


@pytest.mark.slow
@pytest.mark.skipif(native.library() is None, reason=native.unavailable_reason())
@pytest.mark.parametrize("harm", ["cut", "emptied"])
def test_the_real_library_damaged(harm: str, tmp_path: Path) -> None:
    script = "from saelab.kernels import kernels_name; print(kernels_name())"
    for again in (False, True):
        ended = run(tmp_path, "-c", script, variables={"XDG_CACHE_HOME": str(tmp_path)})
        assert ended.out == "native\n" and ended.code == 0
        assert ("does not match its checksum" in ended.err) == again
        (file,) = (tmp_path / "saelab").glob("*.so")
        DAMAGE[harm](file, file)
