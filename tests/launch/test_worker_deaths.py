"""Workers that end by themselves, and scripts that each worker would run again."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from saelab.errors import StudyFailure
from saelab.launch.executors import JobSet
from saelab.launch.executors.local import run_jobs
from saelab.progress import progress

ROOT = Path(__file__).parents[2]
SCRIPT = """\
from pathlib import Path
from saelab.errors import UsageError
from saelab.launch.executors import JobSet
from saelab.launch.executors.local import run_jobs
from saelab.progress import progress

def work(job, advance, state):
    pass

def call():
    bar, logs = progress("", 1), Path("logs")
    try:
        run_jobs(JobSet(function=work, jobs=[1, 2], workers=2, logs=logs, bar=bar))
    except UsageError as error:
        raise SystemExit(f"told: {error}")

"""


def die(job: Any, advance: Any, state: dict[str, Any]) -> None:
    """Ends the process by a signal, or with an exit code if the job is a text."""
    if isinstance(job, str):
        os._exit(int(job))
    os.kill(os.getpid(), job)


@pytest.mark.parametrize(
    ("job", "words"),
    [
        (signal.SIGKILL, "was killed, as it happens when memory is used up.*SAELAB_WORKERS"),
        (signal.SIGSEGV, "was ended by SIGSEGV: its log in .* says why"),
        ("3", "ended with exit code 3: its log in .* says why"),
    ],
)
def test_a_worker_that_dies_is_not_always_out_of_memory(
    tmp_path: Path, job: Any, words: str
) -> None:
    bar = progress("", 1)
    with pytest.raises(StudyFailure, match=words) as caught:
        run_jobs(JobSet(function=die, jobs=[job], workers=1, logs=tmp_path, bar=bar))
    assert ("memory" in str(caught.value)) == (job == signal.SIGKILL)


def run_script(folder: Path, end: str) -> subprocess.CompletedProcess[str]:
    (folder / "script.py").write_text(SCRIPT + end)
    return subprocess.run(
        [sys.executable, "script.py"],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(ROOT), "SAELAB_PROGRESS": "off"},
        capture_output=True,
        text=True,
        check=False,
    )


def test_a_script_that_workers_would_run_again_is_one_sentence(tmp_path: Path) -> None:
    ended = run_script(tmp_path, "call()\n")
    assert ended.returncode == 1
    assert ended.stderr.startswith("told: the script starts worker processes, and each of them")
    assert 'if __name__ == "__main__"' in ended.stderr and len(ended.stderr.splitlines()) == 1


def test_a_script_with_the_guard_runs(tmp_path: Path) -> None:
    ended = run_script(tmp_path, 'if __name__ == "__main__":\n    call()\n')
    assert (ended.returncode, ended.stderr) == (0, "")
