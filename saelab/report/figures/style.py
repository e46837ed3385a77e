"""Style of all pictures, and the page that each is drawn on; without pyplot and its global state.

An arm looks the same in all pictures of a run: the baseline is black, the others differ in colour
(Okabe and Ito 2008, safe for colour-blind readers), marker and line style; controls are grey. The
second round of colours has hollow markers. Title, explanation, legend and notes are measured before
they are placed, so that none of them overlaps another or a panel.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast
from weakref import WeakKeyDictionary

import numpy as np

from saelab.report.run_data import Run
from saelab.runs.schema import CONTROL
from saelab.runtime.safe_text import visible
from saelab.storage.atomic import write_atomically

if TYPE_CHECKING:
    from matplotlib.artist import Artist
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

#: Inches across, and points: readable at half size. Our choice.
WIDTH = 8.0
TEXT, TITLE = 11.0, 13.0
#: Inches that a line of text takes, and around the page.
LINE, TITLE_LINE, MARGIN = 0.205, 0.25, 0.12
DPI = 150
#: Letters of an arm's name that are shown.
LONGEST = 44

STYLE: dict[str, Any] = {
    "font.family": "DejaVu Sans",
    "font.size": TEXT,
    "axes.titlesize": TEXT,
    "axes.titlelocation": "left",
    "axes.labelsize": TEXT,
    "xtick.labelsize": TEXT,
    "ytick.labelsize": TEXT,
    "legend.fontsize": TEXT,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#DDDDDD",
    "grid.linewidth": 0.7,
    "lines.linewidth": 1.6,
    "lines.markersize": 6,
    "savefig.facecolor": "white",
    "svg.hashsalt": "saelab",
    "text.parse_math": False,
    "figure.dpi": DPI,
}


@dataclass(frozen=True, kw_only=True)
class ArmStyle:
    """Colour, marker and line of an arm or control, whose name is the label of its artists."""

    name: str
    color: str
    marker: str
    dashes: Any
    width: float
    filled: bool = True
    zorder: float = 3.0

    def marks(self, **changes: Any) -> dict[str, Any]:
        """Arguments of `plot` for markers alone."""
        return {
            "label": self.name,
            "color": self.color,
            "marker": self.marker,
            "markerfacecolor": self.color if self.filled else "white",
            "markeredgecolor": self.color,
            "zorder": self.zorder,
            "linestyle": "",
            **changes,
        }

    def line(self, **changes: Any) -> dict[str, Any]:
        """Arguments of `plot` for a line with markers."""
        return self.marks(linestyle=self.dashes, linewidth=self.width) | changes


COLORS = ("#0072B2", "#D55E00", "#009E73", "#E69F00", "#CC79A7", "#56B4E9")
MARKERS = ("s", "^", "D", "v", "P", "X", "<", ">")
DASHES = (
    (0, (5, 1.5)),
    (0, (1.2, 1.2)),
    (0, (6, 1.5, 1.2, 1.5)),
    (0, (9, 2)),
    (0, (3, 1.2)),
    (0, (6, 1.2, 1.2, 1.2, 1.2, 1.2)),
    "-",
)
#: One for each control, no two combinations alike.
GREYS = ("#777777", "#999999", "#555555", "#AAAAAA", "#888888", "#666666", "#999999")
GREY_DASHES = (
    *((0, (4, 2)), (0, (1, 1.5)), (0, (7, 2, 1, 2)), (0, (2, 2))),
    *((0, (1, 3)), (0, (3, 1, 1, 1)), (0, (8, 3))),
)
GREY_MARKERS = ("x", "+", "1", "2", "3", "4", "|")


def arm_styles(run: Run) -> dict[str, ArmStyle]:
    """Styles of all arms and controls; the baseline is the widest line and lies underneath."""
    styles = {
        run.baseline: ArmStyle(
            name=run.baseline, color="black", marker="o", dashes="-", width=2.4, zorder=2.5
        )
    }
    for i, arm in enumerate(run.arms[1:]):
        styles[arm] = ArmStyle(
            name=arm,
            color=COLORS[i % len(COLORS)],
            marker=MARKERS[i % len(MARKERS)],
            dashes=DASHES[i % len(DASHES)],
            width=1.6,
            filled=i < len(COLORS),
        )
    for i, control in enumerate(run.controls):
        styles[control] = ArmStyle(
            name=control, color=GREYS[i % len(GREYS)], marker=GREY_MARKERS[i % len(GREY_MARKERS)],
            dashes=GREY_DASHES[i % len(GREY_DASHES)], width=1.6, zorder=2,
        )  # fmt: skip
    return styles


def legend_name(name: str) -> str:
    """Name of an arm or control in the legend."""
    if name.startswith(CONTROL):
        return f"control: {visible(name.removeprefix(CONTROL).strip())}"
    name = visible(f" {name}" if name.startswith("_") else name)  # legends leave out "_..."
    return name if len(name) <= LONGEST else f"{name[: LONGEST - 1]}…"


def handle(name: str, look: ArmStyle, line: bool = True) -> Artist:
    """Entry of the legend: a marker, on its line or alone."""
    from matplotlib.lines import Line2D

    named = {"label": legend_name(name)}
    return Line2D([], [], **(look.line(**named) if line else look.marks(**named)))


@dataclass(frozen=True)
class Words:
    """Texts around the panels of a picture, as given to `Page.finish`."""

    title: str
    text: tuple[str, ...]
    notes: tuple[str, ...]


#: Texts of every finished figure, for readers that show it in another way than `save`.
_words: WeakKeyDictionary[Figure, Words] = WeakKeyDictionary()


def words_of(figure: Figure) -> Words:
    """Texts that `Page.finish` was given for this figure."""
    return _words[figure]


class Page:
    """Panels with a title and a sentence above, and legend and notes below.

    The text is placed by its size, so that it never overlaps the panels.

    Args:
        mosaic: names of the panels, row by row; one may span cells, '.' leaves a cell empty.
        height: of the panels together, in inches.
        grid: more for `Figure.subplot_mosaic`.
    """

    def __init__(self, mosaic: list[list[str]], height: float, **grid: Any) -> None:
        from matplotlib.figure import Figure

        self.height = height
        self.figure = Figure(figsize=(WIDTH, height))
        self.panels: dict[str, Axes] = self.figure.subplot_mosaic(cast(Any, mosaic), **grid)

    def finish(
        self, title: str, text: Sequence[str], handles: Sequence[Artist], notes: Sequence[str] = ()
    ) -> Figure:
        """Adds the texts around the panels.

        Args:
            title: of the picture.
            text: paragraphs: how to read it, and its main numbers.
            handles: of the legend.
            notes: on what is missing, and why.
        """
        _words[self.figure] = Words(title, tuple(part for part in text if part), tuple(notes))
        titles = wrap(title, WIDTH - 2 * MARGIN, TITLE, bold=True)
        above = [line for part in text for line in wrap(part, WIDTH - 2 * MARGIN)]
        below = [line for part in notes for line in wrap(part, WIDTH - 2 * MARGIN)]
        columns, rows = _legend_shape([str(handle.get_label()) for handle in handles])
        top = MARGIN + len(titles) * TITLE_LINE + len(above) * LINE + 0.08
        foot = MARGIN + len(below) * LINE
        bottom = foot + rows * (LINE + 0.045) + (0.12 if rows else 0)
        total = top + self.height + bottom
        self.figure.set_size_inches(WIDTH, total)

        def write(lines: Sequence[str], y: float, va: str, **style: Any) -> None:
            x = MARGIN / WIDTH
            self.figure.text(x, y / total, "\n".join(lines), va=va, linespacing=1.2, **style)

        write(titles, total - MARGIN, "top", fontsize=TITLE, fontweight="bold")
        write(above, total - MARGIN - len(titles) * TITLE_LINE, "top", color="#333333")
        write(below, MARGIN, "bottom", color="#333333")
        if rows:
            self.figure.legend(
                handles=list(handles), loc="lower left", ncols=columns, frameon=False,
                bbox_to_anchor=(MARGIN / WIDTH, (foot + 0.04) / total), borderaxespad=0,
                handlelength=3.2, columnspacing=1.6, labelspacing=0.35, borderpad=0,
            )  # fmt: skip
        rect = (0.005, bottom / total, 0.99, self.height / total)
        self.figure.set_layout_engine(
            "constrained", rect=rect, w_pad=0.06, h_pad=0.06, wspace=0.03, hspace=0.03
        )
        return self.figure


@functools.cache
def text_width(text: str, size: float = TEXT, bold: bool = False) -> float:
    """Width of a line in the font of the pictures, in inches."""
    from matplotlib.font_manager import FontProperties
    from matplotlib.textpath import text_to_path

    font = FontProperties("DejaVu Sans", weight="bold" if bold else "normal", size=size)
    return text_to_path.get_text_width_height_descent(text, font, ismath=False)[0] / 72


def wrap(text: str, inches: float, size: float = TEXT, bold: bool = False) -> list[str]:
    """Breaks a text at its spaces into lines that are not wider; a longer word stands alone."""
    lines: list[str] = []
    for word in visible(text).split(" "):
        longer = f"{lines[-1]} {word}" if lines else word
        if lines and text_width(longer, size, bold) <= inches:
            lines[-1] = longer
        else:
            lines.append(word)
    return lines


def _legend_shape(labels: Sequence[str]) -> tuple[int, int]:
    """Columns and rows of the flattest legend that is not wider than the page."""
    if not labels:
        return 1, 0
    widths = [text_width(label) + 0.9 for label in labels]  # with the line and the gap
    for columns in range(len(labels), 1, -1):
        filled = [max(column) for column in np.array_split(widths, columns)]
        if sum(filled) <= WIDTH - 2 * MARGIN + 0.25:
            return columns, -(-len(labels) // columns)
    return 1, len(labels)


def explain(axes: Axes, text: str, inches: float = 2.4) -> None:
    """Writes into an empty panel why it is empty, in lines of that width."""
    axes.set_xticks([])
    axes.set_yticks([])
    axes.set_facecolor("#F5F5F5")
    axes.spines[:].set_visible(False)
    axes.text(
        0.5, 0.5, "\n".join(wrap(text, inches)), ha="center", va="center",
        transform=axes.transAxes, color="#444444",
    )  # fmt: skip


def log_axis(axes: Axes, which: Literal["x", "y"], ticks: Sequence[float] = ()) -> None:
    """Makes an axis logarithmic with plain numbers, at `ticks` or else at round numbers.

    It stays linear where no number is positive.
    """
    from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, MaxNLocator, NullLocator

    axis = axes.xaxis if which == "x" else axes.yaxis
    if not max(axis.get_data_interval()) > 0:
        return
    axes.set(**{f"{which}scale": "log"})
    low, high = sorted(axis.get_view_interval())
    if ticks:
        axis.set_major_locator(FixedLocator(list(ticks)))
    elif high > 6 * low:
        axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    else:
        axis.set_major_locator(MaxNLocator(5))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))


def save(figure: Figure, stem: Path) -> None:
    """Writes <stem>.png and <stem>.svg; the same figure gives the same bytes."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.image import imsave

    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    pixels = np.asarray(canvas.buffer_rgba())
    write_atomically(
        stem.with_name(f"{stem.name}.png"),
        lambda file: imsave(file, pixels, format="png", dpi=DPI),
    )
    figure.set_layout_engine("none")  # the layout is done
    write_atomically(
        stem.with_name(f"{stem.name}.svg"),
        lambda file: FigureCanvasSVG(figure).print_svg(file, metadata={"Date": None}),
    )
