"""Calls that only some systems offer, and their fallbacks."""

from __future__ import annotations

import os
import re
import signal
import sys
import time
from pathlib import Path

import pytest
from posix_tests import left_out, needs_posix

from saelab.errors import UsageError
from saelab.preflight import calibration
from saelab.runtime import system
from saelab.storage.validation import folder_name_problem

TESTS = Path(__file__).parents[1]


@pytest.mark.parametrize("name", ["a:b", "a?", "x<y", "what.", "blank ", "con", "LPT1", "nul.txt"])
def test_names_that_windows_lacks_are_refused_there_alone(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert system.name_problem(name, "win32").startswith("names a folder, and")
    assert not system.name_problem(name, "linux") and not system.name_problem(name, "darwin")
    assert not folder_name_problem(name)
    assert folder_name_problem("a/b") and folder_name_problem(".a")


@pytest.mark.parametrize("name", ["A1", "tau 0.1", "A2 permuted", "control", "console", "a.b"])
def test_usual_names_are_usable_everywhere(name: str) -> None:
    assert not system.name_problem(name, "win32")


def test_case_alone_names_two_files_on_linux_only() -> None:
    assert system.same_name("A", "a", "win32") and system.same_name("A", "a", "darwin")
    assert not system.same_name("A", "a", "linux")
    assert system.same_name("A", "A", "linux")


def test_a_target_that_another_process_has_open_is_tried_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, target = tmp_path / "new", tmp_path / "old"
    source.write_bytes(b"new")
    tries: list[Path] = []
    replace = Path.replace

    def in_use_twice(self: Path, other: Path) -> Path:
        tries.append(self)
        if len(tries) < 3:
            error = PermissionError(13, "in use")
            error.winerror = 32  # type: ignore[attr-defined]
            raise error
        return replace(self, other)

    monkeypatch.setattr(Path, "replace", in_use_twice)
    system.replace_file(source, target)
    assert target.read_bytes() == b"new" and len(tries) == 3


def test_a_folder_without_permission_is_not_tried_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(self: Path, other: Path) -> Path:
        raise PermissionError(13, "no permission")

    monkeypatch.setattr(Path, "replace", refuse)
    start = time.monotonic()
    with pytest.raises(PermissionError):
        system.replace_file(tmp_path / "a", tmp_path / "b")
    assert time.monotonic() - start < system.PATIENCE


def test_a_copy_stands_in_for_a_link(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: Path, target: Path) -> None:
        raise OSError(1314, "the user may make no links")

    (tmp_path / "a").write_bytes(b"content")
    monkeypatch.setattr(Path, "symlink_to", refuse)
    system.link_or_copy_file(tmp_path / "a", tmp_path / "b")
    assert (tmp_path / "b").read_bytes() == b"content" and not (tmp_path / "b").is_symlink()


def test_what_a_system_does_not_say_is_not_known(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(system, "resource", None)
    monkeypatch.delattr(os, "sysconf")
    assert system.peak_memory() is None and system.address_space_left() is None
    assert system.machine_memory() is None


def test_trials_are_refused_where_memory_is_not_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calibration, "peak_memory", lambda: None)
    with pytest.raises(UsageError, match=re.escape("leave out --trials")):
        calibration.run_trials(None, None)  # type: ignore[arg-type]


def test_workers_ignore_ctrl_c_where_they_inherit_no_mask(monkeypatch: pytest.MonkeyPatch) -> None:
    system.ignore_keyboard_interrupts()
    assert signal.getsignal(signal.SIGINT) != signal.SIG_IGN
    monkeypatch.delattr(signal, "pthread_sigmask")
    with system.block_keyboard_interrupts():
        system.ignore_keyboard_interrupts()
    assert signal.getsignal(signal.SIGINT) == signal.SIG_IGN


ORPHAN = """
import multiprocessing, os, sys, time
from saelab.runtime import system

def work(file):
    sys.platform = "darwin"
    system.end_with_parent(os.getppid(), lambda: False)
    open(file, "w", encoding="utf-8").write(str(os.getpid()))
    time.sleep(60)

if __name__ == "__main__":
    multiprocessing.get_context("spawn").Process(target=work, args=(sys.argv[1],)).start()
    while not os.path.exists(sys.argv[1]):
        time.sleep(0.02)
    time.sleep(0.2)
    os._exit(0)  # as if it were killed
"""


@pytest.mark.skipif(sys.platform != "linux", reason="stands in for macOS on Linux")
def test_a_worker_ends_with_its_parent_where_no_signal_tells_it(tmp_path: Path) -> None:
    import subprocess

    script = tmp_path / "orphan.py"
    script.write_text(ORPHAN, encoding="utf-8")
    subprocess.run([sys.executable, script, tmp_path / "pid"], check=True, timeout=60)
    pid = int((tmp_path / "pid").read_text(encoding="utf-8"))
    until = time.monotonic() + 10
    while system.process_start_time(pid) and time.monotonic() < until:
        time.sleep(0.02)
    assert not system.process_start_time(pid)


def test_files_of_tests_that_need_posix_are_left_out_elsewhere() -> None:
    files = {file.relative_to(TESTS).as_posix(): file for file in TESTS.rglob("test_*.py")}
    left = {name for name, file in files.items() if left_out(file, is_posix=False)}
    assert {"e2e/test_killed.py", "e2e/test_limits.py", "e2e/test_other_systems.py"} <= left
    assert "kernels/test_devices.py" not in left and len(left) < len(files) / 2
    assert not any(left_out(file, is_posix=True) for file in files.values())
    assert not needs_posix(TESTS / "conftest.py")
