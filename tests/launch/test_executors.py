"""Executors: chosen by name, with their settings checked before anything is trained."""

from __future__ import annotations

import inspect
import sys
from pathlib import Path

import pytest

from saelab.errors import SettingError, SourceError
from saelab.launch import executors
from saelab.launch.executors import EXECUTORS, JobSet, executor, local
from saelab.launch.executors.remote import FileReporter, Tally, Task
from saelab.launch.executors.slurm import settings
from saelab.progress import progress


def square(job: int, advance, state: dict) -> None:
    state["sum"] = state.get("sum", 0) + job
    advance(job)


def test_every_executor_is_called_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SAELAB_EXECUTOR", raising=False)
    signatures = {name: str(inspect.signature(executor(name))) for name in EXECUTORS}
    assert set(signatures.values()) == {"(job_set: 'JobSet') -> 'None'"}
    assert executor() is local.run_jobs


def test_the_variable_names_the_default(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SAELAB_EXECUTOR", "ray")
    assert executors.executor_name() == "ray"
    monkeypatch.setenv("SAELAB_EXECUTOR", "rya")
    with pytest.raises(SettingError, match=r"SAELAB_EXECUTOR = 'rya'.*did you mean 'ray'"):
        executor()
    with pytest.raises(SettingError, match=r"^executor = 'cloud': use one of local, ray, slurm"):
        executor("cloud")


@pytest.mark.parametrize(("name", "package"), [("ray", "ray"), ("slurm", "submitit")])
def test_a_missing_package_is_named_with_its_extra(
    name: str, package: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(SettingError, match=rf"pip install 'saelab\[{name}\]'"):
        executor(name)(
            JobSet(function=square, jobs=[1], workers=1, logs=tmp_path, bar=progress("", 1))
        )


def test_a_task_does_its_job_in_its_folder_and_tells_how_far_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "tally"
    for number, job in enumerate((3, 4)):
        Task.of(square, job, number, folder)()
    with progress("", 10) as bar:
        tally = Tally(folder, bar)
        tally.read_new()
        assert bar.done == 7
        again = FileReporter(folder / "0.jsonl")  # the job has started again: it counts from zero
        tally.read_new()
        assert bar.done == 4
        again(2)
        again.close()
        tally.read_new()
        assert bar.done == 6


def test_what_a_job_says_of_a_cell_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[object] = []
    monkeypatch.setattr("saelab.launch.executors.remote.log_progress", told.append)
    words = FileReporter(tmp_path / "0.jsonl")
    words(1.0, {"stage": "train", "values": {"loss": 0.5}})
    words.close()
    with progress("", 10) as bar:
        Tally(tmp_path, bar).read_new()
    assert told == [{"stage": "train", "values": {"loss": 0.5}}]


def test_a_machine_without_the_folder_says_so(tmp_path: Path) -> None:
    task = Task(
        function=square,
        job=1,
        number=0,
        folder=tmp_path / "elsewhere",
        tally=tmp_path,
        variables={},
    )
    with pytest.raises(SourceError, match="must lie on a file system that all machines share"):
        task()


def test_slurm_settings() -> None:
    assert settings("partition=gpu, timeout_min=30,mem_gb=16,cluster=local") == {
        "slurm_partition": "gpu",
        "timeout_min": 30,
        "mem_gb": 16,
        "cluster": "local",
    }
    assert settings("") == {}


@pytest.mark.parametrize("text", ["partition", "=gpu", "partition=", "a b=1"])
def test_slurm_settings_written_otherwise_are_refused(text: str) -> None:
    with pytest.raises(SettingError, match="write name=value, with commas between them"):
        settings(text)
