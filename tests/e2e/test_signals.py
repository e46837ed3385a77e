"""Any number of SIGINTs at any moment: exit code 130, one sentence, and no process is left."""

from __future__ import annotations

import multiprocessing
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
from projects import run

from saelab.launch.executors import JobSet, local
from saelab.progress import Progress
from saelab.runtime.signals import Interrupted

SENTENCE = "interrupted: the same command goes on where it stopped\n"
HEAD = """
import atexit, os, signal, sys
from saelab.runtime import signals
from saelab.runtime.signals import defer_signals, exit_on_signal

def again(*_):
    os.kill(os.getpid(), signal.SIGINT)

"""
SCRIPTS = {
    "in the cleaning up of the first": """
with exit_on_signal():
    try:
        again()
    finally:
        again()
""",
    "many, in nested cleaning up": """
with exit_on_signal():
    try:
        try:
            again()
        finally:
            again()
    finally:
        again()
        again()
""",
    "in a block that delays the first": """
with exit_on_signal(), defer_signals():
    again()
    again()
""",
    "while the sentence is printed": """
class Stream:
    def write(self, text):
        again()
        sys.__stderr__.write(text)
    def flush(self):
        again()
sys.stderr = Stream()
with exit_on_signal():
    again()
""",
    "while the handlers are taken away": """
restore = signal.signal
def slow(number, handler):
    before = restore(number, handler)
    if handler is signal.default_int_handler:
        again()
    return before
signal.signal = slow
with exit_on_signal():
    again()
""",
    "at the end of the interpreter": """
atexit.register(again)
with exit_on_signal():
    again()
""",
    "between two blocks": """
with exit_on_signal():
    pass
again()
""",
    "swallowed by code of others": """
with exit_on_signal():
    try:
        again()
    except KeyboardInterrupt:
        pass
    again()
""",
}


@pytest.mark.parametrize("when", SCRIPTS)
def test_one_sentence(when: str, tmp_path: Path) -> None:
    ended = run(tmp_path, "-c", HEAD + SCRIPTS[when])
    assert (ended.code, ended.err) == (130, SENTENCE)


def sleep_on(job: Any, advance: Any, state: Any) -> None:
    """A job that does not end by itself."""
    (Path(job) / "started").touch()
    time.sleep(600)


def test_a_second_signal_while_workers_are_stopped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is raised where it does most harm: before any worker was told to end."""

    def interrupted(*_: object, **__: object) -> None:
        raise Interrupted(2, at_once=True)

    def first(futures: object) -> None:
        while not (tmp_path / "started").exists():
            time.sleep(0.01)
        raise Interrupted(2)

    monkeypatch.setattr(local, "_stop", interrupted)
    monkeypatch.setattr(local, "_wait", first)
    job_set = JobSet(
        function=sleep_on,
        jobs=[str(tmp_path)],
        workers=1,
        logs=tmp_path / "logs",
        bar=nullcontext(Progress("", 1)),
    )
    with pytest.raises(Interrupted):
        local.run_jobs(job_set)
    for process in multiprocessing.active_children():
        process.join(30)
    assert not multiprocessing.active_children()
