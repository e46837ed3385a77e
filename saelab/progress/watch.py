"""`saelab watch run_3`: the view of a launch that goes on in another process.

It reads metrics.jsonl and nothing else, so it works from any terminal that sees the folder, and on
a finished run too. It ends when the run is complete, or when its process has ended without that.
"""

from __future__ import annotations

import os
import socket
import sys
import time
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from saelab.errors import SourceError, StudyFailure
from saelab.progress.bar import PLAIN_INTERVAL, clock, display
from saelab.progress.journal import NAME, Tail
from saelab.progress.run import start_of
from saelab.progress.state import State

#: Seconds between two looks at the file.
POLL = 0.5
FINAL = "final_info.json"


class Watched:
    """A run folder whose journal is followed.

    Raises: SourceError when there is none.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self.state = folder, State()
        if not folder.is_dir():
            raise SourceError(f"{folder} does not exist: name the folder of a run, such as run_1")
        if not (folder / NAME).is_file():
            raise SourceError(
                f"{folder} has no {NAME}: it was not made by a launch that writes one"
            )
        self._tail = Tail(folder / NAME)
        self._read()

    def _read(self) -> None:
        for line in self._tail.lines():
            self.state.fold(line)

    def look(self) -> str:
        """Takes in what is new; how the run ended, '' while it goes on.

        Returns: 'complete', 'failed', 'refused', 'interrupted', 'died', or 'gone' where its folder
            was deleted.
        """
        alive = alive_here(self.state)  # asked first: what a process wrote last is read below
        try:
            self._read()
        except FileNotFoundError:
            return "gone"
        if self.state.outcome or alive or alive_here(self.state):
            return self.state.outcome
        final = self.folder / FINAL
        return (
            "complete" if final.is_file() and final.stat().st_mtime >= self.state.began else "died"
        )

    def as_dict(self, outcome: str) -> dict[str, Any]:
        """Plain data, for programs."""
        return self.state.as_dict() | {"outcome": outcome or "running"}


def alive_here(state: State) -> bool:
    """Whether the launch's process is there; one on another machine is taken for alive."""
    if not state.pid or state.host != socket.gethostname():
        return bool(state.pid)
    if state.started:
        return start_of(state.pid) == state.started
    try:
        os.kill(state.pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def watch(folder: Path) -> None:
    """Shows the run until it ends: a live view on a terminal, plain lines elsewhere.

    Raises: SourceError when there is no such run; StudyFailure when it ended and is not complete.
    """
    watched = Watched(folder)
    outcome = watched.look()
    shown = nullcontext()
    if display() == "live":
        from saelab.progress.view import live, view

        shown = live(lambda: view(watched.state, None if outcome else time.time()))
    with shown:
        last = -PLAIN_INTERVAL
        while not outcome:
            if display() == "plain" and time.monotonic() - last >= PLAIN_INTERVAL:
                last = time.monotonic()
                print("\n".join(lines(watched.state, time.time())), file=sys.stderr, flush=True)
            time.sleep(POLL)
            outcome = watched.look()
    if display() != "live":
        print("\n".join(lines(watched.state)))
    _ended(folder, watched.state, outcome)


def _ended(folder: Path, state: State, outcome: str) -> None:
    """Raises: StudyFailure unless the run is complete."""
    if outcome == "complete":
        print(f"{folder} is complete")
        return
    why = f" ({state.reason})" if state.reason else ""
    went = {
        "died": f"its process {state.pid} has ended without finishing it",
        "gone": "its folder is no longer there: the launch was refused, or somebody deleted it",
    }
    said = went.get(outcome, f"it was {outcome}" if outcome != "failed" else "it failed")
    raise StudyFailure(f"{folder}: {said}{why}; the same command goes on with the finished cells")


def lines(state: State, now: float | None = None) -> Iterator[str]:
    """The state in plain lines: the run, its stages, the cells at work."""
    seconds = (now or state.now) - state.began
    rate = f"  {state.rate:,.0f} tokens/s" if state.rate else ""
    failed = f", {state.failed} failed" if state.failed else ""
    yield f"{state.run}: {state.done}/{state.total} cells{failed}{rate}  after {clock(seconds)}"
    for stage in state.stages.values():
        left = "?" if stage.left is None else clock(stage.left)
        amount = f"{stage.done:,.0f}/{stage.total:,.0f} {stage.unit}"
        yield f"{stage.name}: {stage.share:4.0%}  {amount}  {left} left"
    for cell in state.cells.values():
        known = [f"{name} {value:.4g}" for name, value in cell.values.items() if value is not None]
        where = f"{cell.arm}/seed {cell.seed}/L0 {cell.level:g}: {cell.stage}"
        yield "  ".join([f"  {where} {cell.step}/{cell.steps}", *known])
