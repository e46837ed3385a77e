"""Jobs on other machines, for executors whose workers may run there.

The machines share nothing but a file system: the study's folder has the same path everywhere. A
worker reads the harvest and writes its cells there, and reports its progress in a small file.
"""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from saelab.errors import SourceError
from saelab.launch.executors import Work
from saelab.launch.executors.local import POLL
from saelab.progress import Progress
from saelab.progress.journal import Journal, Tail
from saelab.progress.run import log_progress
from saelab.runtime.torch_defaults import one_thread

#: Environment variables that are passed on to workers.
FORWARDED_VARIABLES = ("SAELAB_CACHE", "SAELAB_CHECKPOINT_SECONDS", "SAELAB_KERNELS")
#: What a worker process keeps between its jobs.
_state: dict[str, Any] = {}


@dataclass(frozen=True, kw_only=True)
class Task:
    """One job with everything that a worker on another machine needs.

    Args:
        function, job: as in `JobSet`.
        number: of the job in its set.
        folder: working directory of the launch, which must exist on all machines.
        tally: folder of the files in which jobs report their progress.
        variables: environment variables for the worker.
    """

    function: Work
    job: Any
    number: int
    folder: Path
    tally: Path
    variables: dict[str, str]

    @classmethod
    def of(cls, function: Any, job: Any, number: int, tally: Path) -> Task:
        """Builds the task of a job, with the folder and the variables of this process."""
        variables = {name: os.environ[name] for name in FORWARDED_VARIABLES if name in os.environ}
        return cls(
            function=function,
            job=job,
            number=number,
            folder=Path.cwd(),
            tally=tally,
            variables=variables,
        )

    def __call__(self) -> None:
        """Does the job, on one thread.

        Raises: what the job raises; SourceError on a machine that does not have the folder.
        """
        if not self.folder.is_dir():
            raise SourceError(
                f"{self.folder} does not exist on {platform.node()}: the study's folder must "
                "lie on a file system that all machines share"
            )
        os.chdir(self.folder)
        os.environ.update(self.variables, SAELAB_PROGRESS="off")
        with one_thread():
            advance = FileReporter(self.tally / f"{self.number}.jsonl")
            self.function(self.job, advance, _state)
            advance.close()


class FileReporter:
    """The `advance` of a job on another machine; writes what the job reports to a file.

    Each line of the file is JSON: `done`, all work so far, which begins at zero again when the job
    is started again, and `line`, a line for metrics.jsonl or null.
    """

    def __init__(self, file: Path) -> None:
        self._journal, self._done, self._written = Journal(file), 0.0, 0.0
        self._write(None)

    def __call__(self, amount: float, line: Mapping[str, Any] | None = None) -> None:
        self._done += amount
        if line is not None or time.monotonic() - self._written >= POLL:
            self._write(line)

    def close(self) -> None:
        """Writes the total and closes the file."""
        self._write(None)
        self._journal.close()

    def _write(self, line: Mapping[str, Any] | None) -> None:
        self._written = time.monotonic()
        self._journal.write({"done": self._done, "line": line})


class Tally:
    """Collects, in the process of the launch, what all its jobs report.

    Args:
        folder: of the jobs' files.
        bar: set to the sum of the work of all jobs.
    """

    def __init__(self, folder: Path, bar: Progress) -> None:
        self.folder, self.bar = folder, bar
        self._tails: dict[str, Tail] = {}
        self._done: dict[str, float] = {}

    def read_new(self) -> None:
        """Reads the new lines of all files and reports them."""
        for file in sorted(self.folder.glob("*.jsonl")):
            for record in self._tails.setdefault(file.name, Tail(file)).lines():
                self._done[file.name] = record["done"]
                if record["line"] is not None:
                    log_progress(record["line"])
        self.bar.advance(sum(self._done.values()) - self.bar.done)
