"""Workers that compute with something else than their launch refuse; each difference is named."""

from __future__ import annotations

from pathlib import Path

import pytest
from projects import Project

from saelab.errors import MismatchError
from saelab.kernels import native
from saelab.launch.cell_key import check_machine, machine


def test_a_process_agrees_with_itself() -> None:
    check_machine(machine("cpu"), "cpu")


@pytest.mark.parametrize("name", [*machine("cpu"), "a fact of a later version"])
def test_every_difference_is_refused_and_named(name: str) -> None:
    with pytest.raises(MismatchError, match=f"has {name} = .*, but the launch has another") as e:
        check_machine(machine("cpu") | {name: "another"}, "cpu")
    assert "\n" not in str(e.value)


@pytest.mark.slow
@pytest.mark.skipif(native.library() is None, reason=native.unavailable_reason())
def test_a_worker_with_other_kernels_refuses(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """This process has loaded the compiled kernels, its workers are told to use the eager ones."""
    project = Project.make_smallest(tmp_path / "project")
    monkeypatch.setenv("SAELAB_KERNELS", "eager")
    ended = project.call(workers=1)
    assert ended.code == 2 and "Traceback" not in ended.err, ended.err
    assert "has kernels = eager (SAELAB_KERNELS=eager asks for the plain ones)" in ended.last
    assert "but the launch has native" in ended.last
    assert not project.finished_cells()
    monkeypatch.delenv("SAELAB_KERNELS")
    assert project.call(workers=1).code == 0
    assert project.manifest()["versions"]["kernels"] == "native"
