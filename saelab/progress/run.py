"""Progress of a launch: every line goes to metrics.jsonl, to the one view, and to the tracker.

    with launch_progress(folder, about) as run:    # the launch
        with progress("harvest", n):               # any bar inside is a stage of the launch
            ...
        log_progress({"stage": ..., ...})          # any other line

One process writes, the one of the launch; its workers send their lines to it. Logging changes
nothing that is computed: a journal or tracker that fails is reported in one line and no longer
used, and the launch goes on.
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
from typing import TYPE_CHECKING, Any

from saelab.errors import UsageError
from saelab.progress.bar import Progress, display_mode, redirect_bars
from saelab.progress.journal import JOURNAL_FILE, Journal
from saelab.progress.state import CELLS, END, LAUNCH, State
from saelab.progress.trackers import Tracker, open_tracker
from saelab.runs.schema import CellId
from saelab.runtime.system import process_start_time
from saelab.storage.atomic import WriteError

if TYPE_CHECKING:
    from saelab.progress.view import NotebookView

#: Seconds between two lines of a stage in the journal. Our choice: a line is 130 bytes, so two
#: hours are half a megabyte.
STAGE_INTERVAL = 2.0


class RunProgress:
    """Progress of one launch; several threads may log to it.

    Args:
        folder: folder of the run.
        about: content of the launch's line besides its process.
        tracker: receives the values of cells too.
    """

    def __init__(self, folder: Path, about: Mapping[str, Any], tracker: Tracker) -> None:
        self.folder, self.state = folder, State()
        self._new = not folder.exists()
        self._journal: Journal | None = Journal(folder / JOURNAL_FILE)
        self._tracker: Tracker | None = tracker
        self.notebook: NotebookView | None = None
        self._lock = threading.RLock()
        pid = os.getpid()
        process = {
            "pid": pid,
            "host": socket.gethostname(),
            "started": process_start_time(pid),
        }
        self._waiting = [_with_time({"stage": LAUNCH, **about, **process})]
        self.state.fold(self._waiting[0])

    def log(self, line: Mapping[str, Any]) -> None:
        """Logs one line, to which the time is added."""
        with self._lock:
            line = _with_time(line)
            self.state.fold(line)
            self._waiting.append(line)
            self._write()
            self._track(line)

    def _write(self) -> None:
        """Writes the waiting lines; the launch's line waits until there is a second one.

        A launch that is refused at once therefore leaves no line.
        """
        while self._journal is not None and self._waiting:
            try:
                self._journal.write(self._waiting.pop(0))
            except (OSError, WriteError) as error:
                print(f"{error} (the run goes on without it)", file=sys.stderr)
                self._journal = None

    def _track(self, line: Mapping[str, Any]) -> None:
        """Sends the values of a cell's line to the tracker."""
        if "arm" not in line:
            return
        values = {name: v for name, v in line.get("values", {}).items() if v is not None}
        cell = str(CellId(line["arm"], line["seed"], line["level"]).folder)
        if values:
            self._call_tracker(lambda tracker: tracker.log(cell, int(line.get("step", 0)), values))

    def _call_tracker(self, call: Callable[[Tracker], None]) -> None:
        if self._tracker is None:
            return
        try:
            call(self._tracker)
        except Exception as error:  # whatever the tracker's package raises
            name = type(self._tracker).__name__
            print(f"{name} failed ({error}): the run goes on without it", file=sys.stderr)
            self._tracker = None

    def bar(self, title: str, total: float, unit: str) -> Progress:
        """Opens a bar that is a stage of the launch."""
        return _StageBar(self, title, total, unit)

    def stage(self, bar: Progress, name: str, ended: bool, write: bool) -> None:
        """Updates a stage in the view, and with `write` in the journal too."""
        line: dict[str, Any] = {"stage": name, "done": bar.done, "total": bar.total}
        line |= {"unit": bar.unit, "seconds": round(time.monotonic() - bar.start, 3)}
        line |= {"ended": True} if ended else {}
        with self._lock:
            if write:
                self.log(line)
            else:
                self.state.fold(_with_time(line))
            if self.notebook is not None:
                self.notebook.update(force=ended)

    def render(self) -> Any:
        """Returns the current view, for rich."""
        from saelab.progress.view import view

        with self._lock:
            return view(self.state, time.time())

    def end(self, outcome: str, reason: str) -> None:
        """Writes the last line, if there is any before it, and closes journal and tracker.

        A launch that is refused leaves no new folder.
        """
        with self._lock:
            if self._journal is not None and not self._waiting:
                self.log({"stage": END, "outcome": outcome, "reason": reason})
                self._journal.close()
            self._call_tracker(lambda tracker: tracker.close())
            if outcome == "refused" and self._new and _holds_only_journal(self.folder):
                shutil.rmtree(self.folder)


class _StageBar(Progress):
    """Bar inside a launch: plain lines as usual, or a row of the one view."""

    def __init__(self, run: RunProgress, title: str, total: float, unit: str) -> None:
        super().__init__(title, total, unit)
        self._run, self._plain = run, display_mode() == "plain"
        self._name = title.removeprefix(f"{run.state.run}: ")
        self._last_written = self.start
        run.stage(self, self._name, ended=False, write=True)

    def _show(self) -> None:
        if self._plain:
            super()._show()
        now = time.monotonic()
        write = now - self._last_written >= STAGE_INTERVAL
        self._last_written = now if write else self._last_written
        self._run.stage(self, self._name, ended=False, write=write)

    def close(self) -> None:
        self._run.stage(self, self._name, ended=True, write=True)


_runs: list[RunProgress] = []


def log_progress(line: Mapping[str, Any]) -> None:
    """Logs a line of the launch that is running in this process; does nothing without one."""
    if _runs:
        _runs[-1].log(line)


def log_cells(to_train: int, cached: int) -> None:
    """Logs how many cells a launch, or its next wave, has to train and how many are cached."""
    log_progress({"stage": CELLS, "open": to_train, "cached": cached})


@contextmanager
def launch_progress(
    folder: Path, about: Mapping[str, Any], tracker: str = "none"
) -> Iterator[RunProgress]:
    """Routes every progress line and bar inside the block to this launch.

    The last line says how the launch ended: 'complete', 'refused' (bad input), 'interrupted' or
    'failed'.

    Args:
        folder: folder of the run; the first line creates it.
        about: `run`, `title` and further facts about the launch.
        tracker: a name of `trackers.TRACKERS`.

    Raises: SettingError for an unknown tracker or one whose package is missing.
    """
    run = RunProgress(folder, about, open_tracker(tracker, folder, about))
    outcome, reason = "complete", ""
    with _activate(run):
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
def _activate(run: RunProgress) -> Iterator[None]:
    """Makes the run the one that receives lines, opens bars, and is shown on the terminal."""
    with ExitStack() as stack:
        _runs.append(run)
        stack.callback(_runs.remove, run)
        stack.enter_context(redirect_bars(run.bar))
        if display_mode() == "live":
            from saelab.progress.view import live

            stack.enter_context(live(run.render))
        elif display_mode() == "notebook":
            from saelab.progress.view import NotebookView

            run.notebook = NotebookView(run.render)
        yield


def _with_time(line: Mapping[str, Any]) -> dict[str, Any]:
    return {"time": round(time.time(), 3), **line}


def _holds_only_journal(folder: Path) -> bool:
    return folder.is_dir() and [file.name for file in folder.iterdir()] == [JOURNAL_FILE]
