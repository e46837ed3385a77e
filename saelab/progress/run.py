"""Progress of a launch: every line goes to metrics.jsonl, to the one view, and to the tracker.

    with told(folder, about) as run:    # the launch
        with progress("harvest", n):    # any bar inside is a stage of the launch
            ...
        tell({"stage": ..., ...})       # anything else that is to be known

One process writes: that of the launch, to which its workers send what they have to say. Telling
changes nothing that is computed: a journal or tracker that fails is left, in one line, and the
launch goes on.
"""

from __future__ import annotations

import os
import shutil
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from saelab.errors import UsageError
from saelab.progress.bar import Progress, bars_made_by, display
from saelab.progress.journal import NAME, Journal
from saelab.progress.state import CELLS, END, LAUNCH, State
from saelab.progress.trackers import Tracker, open_tracker
from saelab.storage.atomic import WriteError

#: Seconds between two lines of a stage in the journal. Our choice: a line is 130 bytes, so that two
#: hours are half a megabyte.
STAGE_INTERVAL = 2.0


class RunProgress:
    """Of one launch; may be told from several threads.

    Args:
        folder: of the run.
        about: what the line of the launch says besides its process.
        tracker: what else is told.
    """

    def __init__(self, folder: Path, about: Mapping[str, Any], tracker: Tracker) -> None:
        self.folder, self.state = folder, State()
        self._new = not folder.exists()
        self._journal: Journal | None = Journal(folder / NAME)
        self._tracker: Tracker | None = tracker
        self._lock = threading.RLock()
        me = {"pid": os.getpid(), "host": socket.gethostname(), "started": start_of(os.getpid())}
        self._waiting = [_stamped({"stage": LAUNCH, **about, **me})]
        self.state.fold(self._waiting[0])

    def tell(self, line: Mapping[str, Any]) -> None:
        """One line; its time is added."""
        with self._lock:
            line = _stamped(line)
            self.state.fold(line)
            self._waiting.append(line)
            self._write()
            self._track(line)

    def _write(self) -> None:
        """The line of the launch waits for a second one: a launch refused at once leaves none."""
        while self._journal is not None and self._waiting:
            try:
                self._journal.write(self._waiting.pop(0))
            except (OSError, WriteError) as error:
                print(f"{error} (the run goes on without it)", file=sys.stderr)
                self._journal = None

    def _track(self, line: Mapping[str, Any]) -> None:
        if "arm" not in line:
            return
        values = {name: v for name, v in line.get("values", {}).items() if v is not None}
        cell = f"{line['arm']}/seed{line['seed']}-l0_{line['level']:g}"
        if values:
            self._ask(lambda tracker: tracker.log(cell, int(line.get("step", 0)), values))

    def _ask(self, do: Callable[[Tracker], None]) -> None:
        if self._tracker is None:
            return
        try:
            do(self._tracker)
        except Exception as error:  # whatever the tracker's package raises
            name = type(self._tracker).__name__
            print(f"{name} failed ({error}): the run goes on without it", file=sys.stderr)
            self._tracker = None

    def bar(self, title: str, total: float, unit: str) -> Progress:
        """A stage of the launch."""
        return _StageBar(self, title, total, unit)

    def stage(self, bar: Progress, name: str, ended: bool, write: bool) -> None:
        """Where a stage is; only the view is told where `write` is false."""
        line: dict[str, Any] = {"stage": name, "done": bar.done, "total": bar.total}
        line |= {"unit": bar.unit, "seconds": round(time.monotonic() - bar.start, 3)}
        line |= {"ended": True} if ended else {}
        with self._lock:
            if write:
                self.tell(line)
            else:
                self.state.fold(_stamped(line))

    def render(self) -> Any:
        """The view of this moment."""
        from saelab.progress.view import view

        with self._lock:
            return view(self.state, time.time())

    def end(self, outcome: str, reason: str) -> None:
        """The last line, if any was written; a launch that is refused leaves no new folder."""
        with self._lock:
            if self._journal is not None and not self._waiting:
                self.tell({"stage": END, "outcome": outcome, "reason": reason})
                self._journal.close()
            self._ask(lambda tracker: tracker.close())
            if outcome == "refused" and self._new and _holds_nothing_else(self.folder):
                shutil.rmtree(self.folder)


class _StageBar(Progress):
    """A bar inside a launch: plain lines as ever, or a row of the one view."""

    def __init__(self, run: RunProgress, title: str, total: float, unit: str) -> None:
        super().__init__(title, total, unit)
        self._run, self._plain = run, display() == "plain"
        self._name = title.removeprefix(f"{run.state.run}: ")
        self._told = self.start
        run.stage(self, self._name, ended=False, write=True)

    def _show(self) -> None:
        if self._plain:
            super()._show()
        now = time.monotonic()
        write = now - self._told >= STAGE_INTERVAL
        self._told = now if write else self._told
        self._run.stage(self, self._name, ended=False, write=write)

    def close(self) -> None:
        self._run.stage(self, self._name, ended=True, write=True)


_runs: list[RunProgress] = []


def tell(line: Mapping[str, Any]) -> None:
    """Tells the launch that is going on in this process; nothing without one."""
    if _runs:
        _runs[-1].tell(line)


def tell_cells(to_train: int, cached: int) -> None:
    """How many cells a launch, or the next wave of it, has: to train, and there already."""
    tell({"stage": CELLS, "open": to_train, "cached": cached})


@contextmanager
def launch_progress(
    folder: Path, about: Mapping[str, Any], tracker: str = "none"
) -> Iterator[RunProgress]:
    """A launch: whatever is told and every bar inside the block is of it.

    Its last line says how it ended: 'complete', 'refused' (bad input), 'interrupted' or 'failed'.

    Args:
        folder: of the run; made by the first line.
        about: `run`, `title` and whatever else is to be known of it.
        tracker: a name of `trackers.TRACKERS`.

    Raises: SettingError for an unknown tracker or one whose package is missing.
    """
    run = RunProgress(folder, about, open_tracker(tracker, folder, about))
    outcome, reason = "complete", ""
    with _open(run):
        try:
            yield run
        except Exception as error:
            outcome = "refused" if isinstance(error, UsageError) else "failed"
            reason = (str(error) or type(error).__name__).splitlines()[-1]
            raise
        except BaseException:
            outcome = "interrupted"
            raise
        finally:
            run.end(outcome, reason)


@contextmanager
def _open(run: RunProgress) -> Iterator[None]:
    """The run is the one that is told, that makes the bars, and that the terminal shows."""
    with ExitStack() as opened:
        _runs.append(run)
        opened.callback(_runs.remove, run)
        opened.enter_context(bars_made_by(run.bar))
        if display() == "live":
            from saelab.progress.view import live

            opened.enter_context(live(run.render))
        yield


def start_of(pid: int) -> str:
    """What tells a process from a later one with its number; '' where the system does not say, or
    where the process has ended."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return ""
    return "" if fields[0] in "ZX" else fields[19]


def _stamped(line: Mapping[str, Any]) -> dict[str, Any]:
    return {"time": round(time.time(), 3), **line}


def _holds_nothing_else(folder: Path) -> bool:
    return folder.is_dir() and [file.name for file in folder.iterdir()] == [NAME]
