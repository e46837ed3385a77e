"""`saelab watch run_3`: view of a launch that runs in another process.

It reads metrics.jsonl and nothing else, so it works from any terminal that can read the folder, and
on a finished run too. It ends when the run is complete, or when its process has ended before.
"""

from __future__ import annotations

import socket
import sys
import time
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from saelab.errors import SourceError, StudyFailure
from saelab.progress.bar import PLAIN_INTERVAL, clock, display_mode
from saelab.progress.journal import JOURNAL_FILE, Tail
from saelab.progress.state import State
from saelab.runtime.system import process_exists, process_start_time

#: Seconds between two reads of the file.
POLL_SECONDS = 0.5
FINAL_INFO = "final_info.json"


class WatchedRun:
    """Run folder whose journal is followed.

    Raises: SourceError when the folder or its journal does not exist.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self.state = folder, State()
        if not folder.is_dir():
            raise SourceError(f"{folder} does not exist: name the folder of a run, such as run_1")
        if not (folder / JOURNAL_FILE).is_file():
            raise SourceError(
                f"{folder} has no {JOURNAL_FILE}: it was not made by a launch that writes one"
            )
        self._tail = Tail(folder / JOURNAL_FILE)
        self._read()

    def _read(self) -> None:
        for line in self._tail.lines():
            self.state.fold(line)

    def update(self) -> str:
        """Reads the new lines and returns how the run ended, or '' while it is running.

        Returns: 'complete', 'failed', 'refused', 'interrupted', 'died', or 'gone' if its folder was
            deleted.
        """
        alive = is_alive(self.state)  # checked first: the last lines of a process are read below
        try:
            self._read()
        except FileNotFoundError:
            return "gone"
        if self.state.outcome or alive or is_alive(self.state):
            return self.state.outcome
        final = self.folder / FINAL_INFO
        return (
            "complete" if final.is_file() and final.stat().st_mtime >= self.state.began else "died"
        )

    def as_dict(self, outcome: str) -> dict[str, Any]:
        """Returns plain data, for programs."""
        return self.state.as_dict() | {"outcome": outcome or "running"}


def is_alive(state: State) -> bool:
    """Returns whether the launch's process exists; on another machine it counts as alive."""
    if not state.pid or state.host != socket.gethostname():
        return bool(state.pid)
    if state.started:
        return process_start_time(state.pid) == state.started
    return process_exists(state.pid)


def watch(folder: Path) -> None:
    """Shows the run until it ends: a live view on a terminal, plain lines elsewhere.

    Raises: SourceError when there is no such run; StudyFailure when it ended and is not complete.
    """
    watched = WatchedRun(folder)
    outcome = watched.update()
    screen = nullcontext()
    if display_mode() == "live":
        from saelab.progress.view import live, view

        screen = live(lambda: view(watched.state, None if outcome else time.time()))
    with screen:
        last = -PLAIN_INTERVAL
        while not outcome:
            if display_mode() == "plain" and time.monotonic() - last >= PLAIN_INTERVAL:
                last = time.monotonic()
                text = "\n".join(state_lines(watched.state, time.time()))
                print(text, file=sys.stderr, flush=True)
            time.sleep(POLL_SECONDS)
            outcome = watched.update()
    if display_mode() != "live":
        print("\n".join(state_lines(watched.state)))
    _report_outcome(folder, watched.state, outcome)


def _report_outcome(folder: Path, state: State, outcome: str) -> None:
    """Prints that the run is complete.

    Raises: StudyFailure when it is not.
    """
    if outcome == "complete":
        print(f"{folder} is complete")
        return
    why = f" ({state.reason})" if state.reason else ""
    sentences = {
        "died": f"its process {state.pid} has ended without finishing it",
        "gone": "its folder no longer exists: the launch was refused, or somebody deleted it",
        "failed": "it failed",
    }
    end = sentences.get(outcome, f"it was {outcome}")
    raise StudyFailure(f"{folder}: {end}{why}; the same command goes on with the finished cells")


def state_lines(state: State, now: float | None = None) -> Iterator[str]:
    """Yields the state as plain lines: the run, its stages, the cells at work."""
    seconds = (now or state.now) - state.began
    rate = f"  {state.rate:,.0f} tokens/s" if state.rate else ""
    failed = f", {state.failed} failed" if state.failed else ""
    yield f"{state.run}: {state.done}/{state.total} cells{failed}{rate}  after {clock(seconds)}"
    for stage in state.stages.values():
        left = "?" if stage.left is None else clock(stage.left)
        amount = f"{stage.done:,.0f}/{stage.total:,.0f} {stage.unit}"
        yield f"{stage.name}: {stage.share:4.0%}  {amount}  {left} left"
    for cell in state.cells.values():
        values = [f"{name} {value:.4g}" for name, value in cell.values.items() if value is not None]
        title = f"{cell.id.name}: {cell.stage}"
        yield "  ".join([f"  {title} {cell.step}/{cell.steps}", *values])
