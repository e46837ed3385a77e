"""Terminal table of a run's state, with at most a dozen rows."""

from __future__ import annotations

import html
import io
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from saelab.progress.bar import Output, clock, is_terminal
from saelab.progress.state import TRAIN, CellState, State
from saelab.runtime.counting import count

#: Rows of each kind, and redraws per second. Our choice.
STAGES, RUNNING, FINISHED, REDRAWS = 2, 5, 2, 2
#: Columns of the view in a notebook. Our choice: those of a cell of usual width.
COLUMNS = 110
#: Columns of a cell: value -> heading.
VALUES = {
    "loss": "loss",
    "reconstruction": "reconstr.",
    "fvu": "FVU",
    "l0": "L0",
    "dead": "dead",
}


def view(state: State, now: float | None = None) -> RenderableType:
    """Returns the table of a state.

    Args:
        state: state of the run.
        now: seconds since 1970; by default the time of the state's last line.
    """
    return Group(_head(state, now or state.now), _stages(state), *_cells(state))


def _head(state: State, now: float) -> Text:
    facts = [f"{state.run}: {clock(max(0.0, now - state.began))}"]
    if state.total:
        failed = f", {state.failed} failed" if state.failed else ""
        cached = f" ({state.cached} from the cache)" if state.cached else ""
        facts.append(f"{state.done}/{state.total} cells{cached}{failed}")
    if state.rate:
        facts.append(f"{state.rate:,.0f} tokens/s")
    if state.outcome:
        facts.append(f"{state.outcome}{f': {state.reason}' if state.reason else ''}")
    return Text("  ".join(facts), style="bold", overflow="fold")


def _stages(state: State) -> Table:
    table = Table.grid(padding=(0, 2))
    for stage in list(state.stages.values())[-STAGES:]:
        left = "?" if stage.left is None else clock(stage.left)
        bar = ProgressBar(total=1.0, completed=stage.share, width=24)
        amount = Text(f"{stage.done:,.0f}/{stage.total:,.0f} {stage.unit}", overflow="fold")
        table.add_row(stage.name, bar, f"{stage.share:4.0%}", amount, f"{left} left")
    return table


def _cells(state: State) -> Iterator[Table | Text]:
    running = list(state.cells.values())[:RUNNING]
    finished = state.finished[-FINISHED:]
    if not running and not finished:
        return
    table = Table(box=None, padding=(0, 1), pad_edge=False, header_style="dim")
    # on a narrow terminal a text goes on below; nothing is cut
    for heading, least in (("arm", 8), ("seed", 6), ("at L0", 5), ("stage", 6)):
        table.add_column(heading, overflow="fold", min_width=least)
    for heading in VALUES.values():
        table.add_column(heading, justify="right", no_wrap=True)
    for cell in running:
        table.add_row(*_cell_row(cell))
    for cell in finished:
        table.add_row(*_cell_row(cell), style="red" if cell.failure else "dim")
    yield table
    more = len(state.cells) - len(running)
    if more:
        yield Text(f"and {count(more, 'more cell')} at work", style="dim")


def _cell_row(cell: CellState) -> list[str]:
    share = f" {cell.step / cell.steps:.0%}" if cell.stage == TRAIN and cell.steps else ""
    stage = "failed" if cell.failure else f"{cell.stage}{share}"
    numbers = [cell.values.get(name) for name in VALUES]
    texts = ["" if number is None else f"{number:.4g}" for number in numbers]
    return [cell.arm, str(cell.seed), cell.id.level_text.removeprefix("L0 "), stage, *texts]


class NotebookView:
    """View of a launch in a notebook: the table that a terminal shows, as text.

    Args:
        render: returns the view, for rich.
    """

    def __init__(self, render: Callable[[], RenderableType]) -> None:
        self._render, self._output = render, Output()

    def update(self, force: bool = False) -> None:
        """Shows the current view, unless the last update was a moment ago."""
        self._output.show(self._text, lambda: f"<pre>{html.escape(self._text())}</pre>", force)

    def _text(self) -> str:
        stream = io.StringIO()
        Console(file=stream, width=COLUMNS, color_system=None).print(self._render())
        return stream.getvalue()


@contextmanager
def live(render: Callable[[], RenderableType]) -> Iterator[None]:
    """Redraws a view on the terminal until the block ends; the last drawing stays.

    Lines that are printed meanwhile appear above it.

    Args:
        render: returns the view; another thread calls it.
    """
    with Live(
        get_renderable=render,
        console=Console(stderr=True),
        refresh_per_second=REDRAWS,
        redirect_stdout=is_terminal(sys.stdout),
    ):
        yield
