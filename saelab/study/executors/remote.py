"""What executors have in common whose workers may be on other machines.

They share nothing but a file system: the study's folder has the same path everywhere. A worker
reads the harvest and writes its cells there, and tells how far it is in a small file of its own.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from saelab.errors import SourceError
from saelab.files import write_text
from saelab.study.executors.local import POLL, one_thread

#: Variables that a worker is given as they are here.
KEPT = ("SAELAB_CACHE", "SAELAB_FAILPOINT")
#: What a worker keeps between its jobs.
_state: dict[str, Any] = {}


@dataclass(frozen=True)
class Task:
    """One job on its way: everything that a worker on another machine needs."""

    function: Callable[[Any, Callable[[float], None], dict[str, Any]], None]
    job: Any
    number: int
    folder: Path
    tally: Path
    variables: dict[str, str]

    @classmethod
    def of(cls, function: Any, job: Any, number: int, tally: Path) -> Task:
        variables = {name: os.environ[name] for name in KEPT if name in os.environ}
        return cls(function, job, number, Path.cwd(), tally, variables)

    def __call__(self) -> None:
        """Does the job, on one thread.

        Raises: what the job raises; SourceError on a machine that does not see the folder.
        """
        if not self.folder.is_dir():
            raise SourceError(
                f"{self.folder} is not there on {os.uname().nodename}: the study's folder must lie "
                "on a file system that all machines share"
            )
        os.chdir(self.folder)
        os.environ.update(self.variables, SAELAB_PROGRESS="off")
        with one_thread():
            self.function(self.job, Report(self.tally / str(self.number)), _state)


class Report:
    """A job's `advance`: what is done so far, in a file; from zero when the job starts again."""

    def __init__(self, file: Path) -> None:
        self.file, self.done, self._last = file, 0.0, 0.0

    def __call__(self, amount: float) -> None:
        self.done += amount
        if time.monotonic() - self._last >= POLL:
            self._last = time.monotonic()
            write_text(self.file, f"{self.done}")


def reported(tally: Path) -> float:
    """What all jobs have done."""
    return sum(float(file.read_text() or 0) for file in tally.glob("[0-9]*"))
