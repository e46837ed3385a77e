"""Whatever a path of settings names: the settings, or one sentence at once."""

from __future__ import annotations

import itertools
import os
import socket
from collections.abc import Callable
from pathlib import Path

import pytest
from fuzzing import answer
from projects import run

from saelab import api
from saelab.config import Frozen, read_toml
from saelab.errors import SaelabError, SettingError, SourceError
from saelab.preflight.rates import read_rates
from saelab.storage.atomic import read_json
from saelab.study.plan import BaseConfig, PlanConfig, read_plan

#: Makes what lies at a path -> words of the sentence that names it.
PLACES: dict[str, tuple[Callable[[Path], object], str]] = {
    "nothing": (lambda path: None, "does not exist"),
    "a folder": (Path.mkdir, "it is a folder"),
    "a link to itself": (lambda path: path.symlink_to(path), "symbolic links"),
    "a link to nothing": (lambda path: path.symlink_to("nowhere"), "does not exist"),
    "a pipe": (os.mkfifo, "it is a pipe or a device"),
    "a device": (lambda path: path.symlink_to("/dev/zero"), "it is a pipe or a device"),
    "a terminal": (lambda path: path.symlink_to("/dev/tty"), ""),
    "not text": (lambda path: path.write_bytes(b"study = '\xff'"), "utf-8"),
    "too large": (lambda path: path.write_bytes(b"#" * 2**21), "over 1 MB"),
    "sparse and huge": (lambda path: os.truncate(_touched(path), 2**40), "MB"),
    "nested arrays": (lambda path: path.write_text("a = " + "[" * 5000), "nested"),
    "nested tables": (lambda path: path.write_text(f"[{'.'.join(5000 * 'a')}]"), "nested"),
    "a number of many digits": (lambda path: path.write_text("seeds = " + "9" * 9000), "digits"),
}


def _touched(path: Path) -> Path:
    path.touch()
    return path


@pytest.mark.parametrize("name", PLACES)
@pytest.mark.parametrize("read", [read_plan, read_toml, api.settings, read_json])
def test_every_place(name: str, read: Callable[[Path], object], tmp_path: Path) -> None:
    make, words = PLACES[name]
    path = tmp_path / "plan.toml"
    make(path)
    with pytest.raises(SaelabError) as raised:
        read(path)
    assert str(path) in str(raised.value)
    if read is not read_json:
        assert words in str(raised.value)


def test_a_socket(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # its address is short
    with socket.socket(socket.AF_UNIX) as server:
        server.bind("s.toml")
        with pytest.raises(SourceError, match=r"s\.toml can't be read"):
            read_toml(Path("s.toml"))


@pytest.mark.parametrize("length", [256, 5000])
def test_a_name_that_no_file_system_takes(length: int) -> None:
    assert answer(lambda: read_plan(Path("x" * length)))[0] == "told"


@pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="root may read everything")
def test_a_file_that_may_not_be_read(tmp_path: Path) -> None:
    (tmp_path / "plan.toml").write_text("study = 's'")
    (tmp_path / "plan.toml").chmod(0)
    with pytest.raises(SourceError, match="Permission denied"):
        read_plan(tmp_path / "plan.toml")


@pytest.mark.parametrize("kind", [PlanConfig, BaseConfig])
def test_numbers_and_texts_beyond_reason(kind: type[Frozen]) -> None:
    values = (2**53, -(2**63), 10**400, int("f" * 9000, 16), "x" * 10**5, ["x"] * 10**4)
    for name, value in itertools.product(kind.model_fields, values):
        try:
            kind.parse({"study": "s", name: value} if kind is PlanConfig else {name: value})
        except SettingError as error:
            assert 20 < len(str(error)) < 1500


@pytest.mark.parametrize("text", ["devices = 5", "devices = [1]", "[devices]\nh100 = 3", ""])
def test_tables_of_rates(text: str, tmp_path: Path) -> None:
    (tmp_path / "rates.toml").write_text(text)
    assert answer(lambda: read_rates("h100", tmp_path / "rates.toml"))[0] == "told"


def test_a_byte_order_mark_and_utf_8_in_every_locale(tmp_path: Path) -> None:
    (tmp_path / "plan.toml").write_bytes("\ufeffstudy = 'é'".encode())
    code = "from saelab.study.plan import read_plan; from pathlib import Path\n"
    code += "print(ascii(read_plan(Path('plan.toml')).study))"
    variables = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    ended = run(tmp_path, "-c", code, variables=variables)
    assert ended.out == "'\\xe9'\n", ended.err
