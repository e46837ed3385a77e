"""Progress display of a long job: a live bar on a terminal or in a notebook, plain lines elsewhere.

Everything goes to stderr, so that a table on stdout can be piped. `SAELAB_PROGRESS=off` shows
nothing. In a notebook a bar is one output that is replaced, through IPython alone (no widgets).
"""

from __future__ import annotations

import html
import math
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from saelab.runtime.variables import is_set_to

#: Seconds between two plain lines when stderr is not a terminal. Our choice: a log stays short.
PLAIN_INTERVAL = 15.0
#: Seconds between two updates in a notebook. Our choice: each is a message to the browser.
NOTEBOOK_INTERVAL = 0.25


class Progress:
    """Counts `done` of `total` units and prints plain lines; `advance` may be called often."""

    def __init__(self, title: str, total: float, unit: str = "") -> None:
        self.title, self.total, self.unit = title, max(float(total), 1e-9), unit
        self.done = 0.0
        self.note = ""
        self.start = time.monotonic()
        self._last = self.start

    def advance(self, amount: float = 1.0, note: str = "") -> None:
        """Adds an amount of finished work; a note replaces the one before."""
        self.done += amount
        self.note = note or self.note
        self._show()

    def _show(self) -> None:
        now = time.monotonic()
        if now - self._last >= PLAIN_INTERVAL:
            self._last = now
            print(self.line(now), file=sys.stderr, flush=True)

    def line(self, now: float | None = None) -> str:
        """Returns one line: title, share, amount, rate, time left."""
        elapsed = (now or time.monotonic()) - self.start
        share = min(self.done / self.total, 1.0)
        rate = self.done / elapsed if elapsed > 0 else 0.0
        seconds_left = (self.total - self.done) / rate if rate > 0 else float("nan")
        note = f"  {self.note}" if self.note else ""
        return (
            f"{self.title}: {share:4.0%}  {self.done:,.0f}/{self.total:,.0f} {self.unit}"
            f"  {rate:,.0f}/s  {clock(seconds_left)} left{note}"
        )

    def close(self) -> None:
        """Ends the display."""


class LiveProgress(Progress):
    """Bar on a terminal, drawn by rich."""

    def __init__(self, title: str, total: float, unit: str = "") -> None:
        super().__init__(title, total, unit)
        from rich.console import Console
        from rich.progress import BarColumn, TextColumn, TimeRemainingColumn
        from rich.progress import Progress as Bar

        self._bar = Bar(
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            TextColumn("{task.percentage:3.0f}%"),
            TimeRemainingColumn(),
            TextColumn("{task.fields[note]}", style="dim", markup=False),
            console=Console(stderr=True),
        )
        self._task = self._bar.add_task(title, total=self.total, note="")
        self._bar.start()

    def _show(self) -> None:
        self._bar.update(self._task, completed=self.done, note=self.note)

    def close(self) -> None:
        self._bar.stop()


def in_notebook() -> bool:
    """Returns True in a process that a notebook's kernel runs (Jupyter, VS Code, Colab)."""
    module = sys.modules.get("IPython")
    get_ipython = getattr(module, "get_ipython", None)
    shell = get_ipython() if get_ipython is not None else None
    return shell is not None and getattr(shell, "kernel", None) is not None


class Output:
    """One output of a notebook's cell, whose content is replaced."""

    def __init__(self) -> None:
        self._handle: Any = None
        self._last = 0.0

    def show(self, text: Callable[[], str], html_text: Callable[[], str], force: bool) -> None:
        """Replaces the content, unless the last update was a moment ago."""
        now = time.monotonic()
        if self._handle is not None and not force and now - self._last < NOTEBOOK_INTERVAL:
            return
        self._last = now
        data = {"text/plain": text(), "text/html": html_text()}
        if self._handle is None:
            from IPython.display import display  # type: ignore[import-not-found]

            self._handle = display(data, raw=True, display_id=True)
        else:
            self._handle.update(data, raw=True)


class NotebookProgress(Progress):
    """Bar in a notebook."""

    def __init__(self, title: str, total: float, unit: str = "") -> None:
        super().__init__(title, total, unit)
        self._output = Output()
        self._draw(force=True)

    def _show(self) -> None:
        self._draw(force=False)

    def close(self) -> None:
        self._draw(force=True)

    def _draw(self, force: bool) -> None:
        self._output.show(self.line, self._bar, force)

    def _bar(self) -> str:
        share = min(self.done / self.total, 1.0)
        return f'<progress value="{share:.4f}"></progress> {html.escape(self.line())}'


class Silent(Progress):
    """Counter that shows nothing."""

    def _show(self) -> None: ...


def display_mode() -> str:
    """Returns how progress is shown: 'off', 'live' on a terminal, 'notebook', or 'plain'.

    Raises: SettingError when SAELAB_PROGRESS has another value than 'off'.
    """
    if is_set_to("SAELAB_PROGRESS", "off"):
        return "off"
    if in_notebook():
        return "notebook"
    return "live" if is_terminal(sys.stderr) else "plain"


def is_terminal(stream: object) -> bool:
    """Returns True for a terminal; a stream that some program put in its place may not say."""
    return bool(getattr(stream, "isatty", lambda: False)())


#: Constructor of a bar: title, total, unit -> bar.
Maker = Callable[[str, float, str], Progress]
_makers: list[Maker] = []


@contextmanager
def redirect_bars(maker: Maker) -> Iterator[None]:
    """Uses the maker for every bar that is opened inside the block."""
    _makers.append(maker)
    try:
        yield
    finally:
        _makers.remove(maker)


def _maker(mode: str) -> Maker:
    """Returns the constructor of a bar that stands alone."""
    by_mode: dict[str, Maker] = {
        "off": Silent,
        "live": LiveProgress,
        "notebook": NotebookProgress,
        "plain": Progress,
    }
    return by_mode[mode]


@contextmanager
def progress(title: str, total: float, unit: str = "") -> Iterator[Progress]:
    """Opens a progress display for `total` units of work and closes it in any case."""
    bar = (_makers[-1] if _makers else _maker(display_mode()))(title, total, unit)
    try:
        yield bar
    finally:
        bar.close()


def clock(seconds: float) -> str:
    """Formats seconds as h:mm:ss or m:ss, and an unknown time as '?'."""
    if not math.isfinite(seconds):
        return "?"
    whole = int(seconds + 0.5)
    hours, rest = divmod(whole, 3600)
    minutes, secs = divmod(rest, 60)
    return f"{hours}:{minutes:02d}:{secs:02d}" if hours else f"{minutes}:{secs:02d}"
