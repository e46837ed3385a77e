"""What executors have in common whose workers may be on other machines.

They share nothing but a file system: the study's folder has the same path everywhere. A worker
reads the harvest and writes its cells there, and tells how far it is in a small file of its own.
"""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from saelab.errors import SourceError
from saelab.launch.executors import Work
from saelab.launch.executors.local import POLL, one_thread
from saelab.progress import Progress
from saelab.progress.journal import Journal, Tail
from saelab.progress.run import log_progress

#: Variables that a worker is given as they are here.
KEPT = ("SAELAB_CACHE", "SAELAB_CHECKPOINT_SECONDS")
#: What a worker keeps between its jobs.
_state: dict[str, Any] = {}


@dataclass(frozen=True)
class Task:
    """One job on its way: everything that a worker on another machine needs."""

    function: Work
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
            words = Words(self.tally / f"{self.number}.jsonl")
            self.function(self.job, words, _state)
            words.close()


class Words:
    """A job's `advance`: one line of JSON in a file of its own for what it says, [done, line], with
    all that is done so far; from zero when the job starts again."""

    def __init__(self, file: Path) -> None:
        self._journal, self._done, self._said = Journal(file), 0.0, 0.0
        self._say(None)

    def __call__(self, amount: float, line: Mapping[str, Any] | None = None) -> None:
        self._done += amount
        if line is not None or time.monotonic() - self._said >= POLL:
            self._say(line)

    def close(self) -> None:
        self._say(None)
        self._journal.close()

    def _say(self, line: Mapping[str, Any] | None) -> None:
        self._said = time.monotonic()
        self._journal.write({"done": self._done, "line": line})


class Tally:
    """What all jobs of a launch say, in the process of the launch."""

    def __init__(self, folder: Path, bar: Progress) -> None:
        self.folder, self.bar = folder, bar
        self._tails: dict[str, Tail] = {}
        self._done: dict[str, float] = {}

    def hear(self) -> None:
        """Takes in what is new."""
        for file in sorted(self.folder.glob("*.jsonl")):
            for said in self._tails.setdefault(file.name, Tail(file)).lines():
                self._done[file.name] = said["done"]
                if said["line"] is not None:
                    log_progress(said["line"])
        self.bar.advance(sum(self._done.values()) - self.bar.done)
