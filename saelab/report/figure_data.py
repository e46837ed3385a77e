"""Pictures as plain data, so that a page can draw them again with hover, toggled arms and zoom.

Data becomes lines and points in `figures` alone; this module reads the finished figure. Every
artist that belongs to an arm carries the arm's name as its label (`style.ArmStyle`). Panels keep
their places in the grid, axes their limits, scales and fixed ticks.

    mark      kind     fields
    line      "line"   x, y, joined, marker, size, width, dashed, every, opacity
    range     "bars"   x, y, x2, y2: a straight piece each
    band      "band"   x, low, high
    level     "level"  at, axis, faint: a line across the panel
    zone      "zone"   low, high, axis: a shaded stripe across the panel
    text      "text"   x, y, of: whether x and y are shares of the panel; dx, dy in points
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from saelab.report.figures.style import words_of

if TYPE_CHECKING:
    from matplotlib.artist import Artist
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis
    from matplotlib.collections import LineCollection, PolyCollection
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch
    from matplotlib.text import Text

#: Points of a joined line that are stored, evenly by index. Our choice: what a screen can show.
MOST_POINTS = 100
#: Significant digits of a coordinate.
DIGITS = 4
#: A line whose colour is lighter than this only divides a panel.
FAINT = 0.8

Mark = dict[str, Any]


class Arrays:
    """Coordinates of all scenes of a page, each stored once: marks name them by their index."""

    def __init__(self) -> None:
        self.stored: list[list[float | None]] = []
        self._index: dict[bytes, int] = {}

    def add(self, values: Any) -> int:
        """Stores numbers [n], null where not finite; returns their index."""
        numbers = np.asarray(values, dtype=np.float64)
        key = numbers.tobytes()
        if key not in self._index:
            self._index[key] = len(self.stored)
            self.stored.append([_short(value) for value in numbers.tolist()])
        return self._index[key]


def scene(figure: Figure, arms: Sequence[str], arrays: Arrays) -> dict[str, Any]:
    """Turns a figure into plain data.

    Args:
        figure: made by a picture of `figures.PICTURES`.
        arms: names of arms and controls; marks refer to them by their index.
        arrays: takes the coordinates.

    Returns: title, text and notes; panels; widths of the grid's columns.
    """
    words, index = words_of(figure), {arm: i for i, arm in enumerate(arms)}
    panels = [_panel(axes, index, arrays) for axes in figure.axes]
    spec = figure.axes[0].get_subplotspec()
    assert spec is not None
    grid = spec.get_gridspec()
    widths = cast(Any, grid.get_width_ratios()) or [1] * grid.ncols
    return {
        "title": words.title,
        "text": list(words.text),
        "notes": list(words.notes),
        "widths": [float(width) for width in widths],
        "panels": panels,
    }


def _panel(axes: Axes, arms: dict[str, int], arrays: Arrays) -> dict[str, Any]:
    spec = axes.get_subplotspec()
    assert spec is not None
    marks = sorted(_marks(axes, arms, arrays), key=lambda mark: mark.pop("z"))
    return {
        "title": " ".join((axes.get_title(loc="left") or axes.get_title()).split("\n")),
        "rows": [spec.rowspan.start, spec.rowspan.stop],
        "columns": [spec.colspan.start, spec.colspan.stop],
        "bare": not axes.spines["bottom"].get_visible() and not axes.get_xticks().size,
        "x": _axis(axes.xaxis, axes.get_xlim(), axes.get_xscale()),
        "y": _axis(axes.yaxis, axes.get_ylim(), axes.get_yscale()),
        "marks": marks,
    }


def _axis(axis: Axis, limits: tuple[float, float], scale: str) -> dict[str, Any]:
    """Label, limits and scale; ticks where they are fixed, null where a reader may choose them."""
    from matplotlib.ticker import FixedLocator

    locator, ticks = axis.get_major_locator(), None
    if isinstance(locator, FixedLocator):
        places = [float(place) for place in np.asarray(cast(Any, locator).locs, dtype=np.float64)]
        labels = axis.get_major_formatter().format_ticks(places)
        ticks = [[_short(place), label] for place, label in zip(places, labels, strict=True)]
    return {
        "label": " ".join(axis.get_label_text().split()),
        "limits": [_short(limit, 6) for limit in limits],
        "log": scale == "log",
        "ticks": ticks,
    }


def _marks(axes: Axes, arms: dict[str, int], arrays: Arrays) -> Iterator[Mark]:
    from matplotlib.collections import LineCollection, PolyCollection

    for line in axes.lines:
        yield from (_add_common_fields(line, arms, mark) for mark in _line(line, axes, arrays))
    for lines in axes.collections:
        if isinstance(lines, LineCollection):
            yield _add_common_fields(lines, arms, _bars(lines, arrays))
        elif isinstance(lines, PolyCollection):
            yield from (_add_common_fields(lines, arms, mark) for mark in _bands(lines, arrays))
    for patch in axes.patches:
        yield _add_common_fields(patch, arms, _patch(patch, axes, arrays))
    for text in axes.texts:
        yield _add_common_fields(text, arms, _text(text, axes))


def _add_common_fields(artist: Artist, arms: dict[str, int], mark: Mark) -> Mark:
    """Adds the fields of every mark: its arm, order and opacity."""
    common: Mark = {"z": artist.get_zorder()}
    name = artist.get_label()
    if name in arms:
        common["arm"] = arms[str(name)]
    if (alpha := artist.get_alpha()) is not None:
        common["opacity"] = _short(float(alpha))
    return mark | common


def _line(line: Line2D, axes: Axes, arrays: Arrays) -> Iterator[Mark]:
    from matplotlib.colors import to_rgb

    x, y = (np.asarray(line.get_data(orig=False)[i], dtype=np.float64) for i in (0, 1))
    x_is_data, y_is_data = line.get_transform().contains_branch_seperately(axes.transData)
    joined = line.get_linestyle() not in ("None", "none", " ", "")
    look: Mark = {"width": _short(line.get_linewidth()), "dashed": joined and line.is_dashed()}
    if not (x_is_data and y_is_data):
        if len(x):
            at, axis = (y[0], "y") if y_is_data else (x[0], "x")
            faint = min(to_rgb(cast(Any, line.get_color()))) > FAINT
            yield {"kind": "level", "at": _short(at), "axis": axis, "faint": faint} | look
        return
    points = len(x)
    if joined and line.get_drawstyle() == "steps-post":
        x, y = np.repeat(x, 2)[1:], np.repeat(y, 2)[:-1]
    chosen = _sample_indices(len(x)) if joined else np.arange(len(x))
    mark: Mark = {"kind": "line", "x": arrays.add(x[chosen]), "y": arrays.add(y[chosen])}
    if joined:
        mark |= {"joined": True} | look
    marker = line.get_marker()
    if marker not in ("None", "none", " ", "", None):
        mark |= {"marker": marker, "size": _short(line.get_markersize())}
        if isinstance(every := line.get_markevery(), tuple):
            share = len(chosen) / max(1, points)
            mark["every"] = [int(every[0] * share), max(1, round(every[1] * share))]
    if len(x):
        yield mark


def _sample_indices(n: int) -> np.ndarray:
    """Indices of the points of a line that are stored, out of n; both ends are among them."""
    return np.unique(np.linspace(0, max(0, n - 1), min(n, MOST_POINTS)).round().astype(int))


def _bars(lines: LineCollection, arrays: Arrays) -> Mark:
    ends = np.array([[piece[0], piece[-1]] for piece in lines.get_segments()]).reshape(-1, 2, 2)
    return {
        "kind": "bars",
        "x": arrays.add(ends[:, 0, 0]),
        "y": arrays.add(ends[:, 0, 1]),
        "x2": arrays.add(ends[:, 1, 0]),
        "y2": arrays.add(ends[:, 1, 1]),
        "width": _short(float(np.ravel(lines.get_linewidth())[0])),
    }


def _bands(polygons: PolyCollection, arrays: Arrays) -> Iterator[Mark]:
    """Reads `fill_between`: along one edge and back along the other, with a point at each turn."""
    for path in polygons.get_paths():
        corners = np.asarray(path.vertices)
        n = (len(corners) - 3) // 2
        forth, back = corners[1 : n + 1], corners[n + 2 : 2 * n + 2][::-1]
        chosen = _sample_indices(n)
        yield {
            "kind": "band",
            "x": arrays.add(forth[chosen, 0]),
            "low": arrays.add(np.minimum(forth[chosen, 1], back[chosen, 1])),
            "high": arrays.add(np.maximum(forth[chosen, 1], back[chosen, 1])),
        }


def _patch(patch: Patch, axes: Axes, arrays: Arrays) -> Mark:
    from matplotlib.patches import Rectangle, StepPatch

    if isinstance(patch, StepPatch):
        values, edges, _ = patch.get_data()
        return {
            "kind": "line",
            "x": arrays.add(np.repeat(np.asarray(edges), 2)[1:-1]),
            "y": arrays.add(np.repeat(np.asarray(values), 2)),
            "joined": True,
            "width": _short(patch.get_linewidth()),
            "dashed": patch.get_linestyle() not in ("-", "solid"),
        }
    assert isinstance(patch, Rectangle), f"a {type(patch).__name__} has no place on the page"
    x_is_data, _ = patch.get_data_transform().contains_branch_seperately(axes.transData)
    low, length = (
        (patch.get_x(), patch.get_width()) if x_is_data else (patch.get_y(), patch.get_height())
    )
    axis = "x" if x_is_data else "y"
    return {"kind": "zone", "low": _short(low), "high": _short(low + length), "axis": axis}


def _text(text: Text, axes: Axes) -> Mark:
    from matplotlib.text import Annotation

    if isinstance(text, Annotation):
        (x, y), (dx, dy) = text.xy, text.xyann
        coords = text.xycoords if isinstance(text.xycoords, tuple) else (text.xycoords,) * 2
        is_share = [place == "axes fraction" for place in coords]
    else:
        (x, y), dx, dy = text.get_position(), 0.0, 0.0
        in_data = text.get_transform().contains_branch_seperately(axes.transData)
        is_share = [not one for one in in_data]
    return {
        "kind": "text",
        "x": _short(x),
        "y": _short(y),
        "of": is_share,
        "dx": _short(dx),
        "dy": _short(dy),
        "text": " ".join(text.get_text().split("\n")),
        "anchor": text.get_horizontalalignment(),
        "base": text.get_verticalalignment(),
        "bold": text.get_fontweight() == "bold",
    }


def _short(value: Any, digits: int = DIGITS) -> float | int | None:
    """Rounds a number to few digits, a whole one to an int; None where it is not finite."""
    number = float(value)
    if not np.isfinite(number):
        return None
    number = float(f"{number:.{digits}g}")
    return int(number) if number.is_integer() and abs(number) < 1e9 else number
