"""Pictures of a run, and what is drawn in them."""

from __future__ import annotations

from typing import Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure

from saelab.report.figures import common, style
from saelab.report.run_data import Run


def picture(run: Run, name: str) -> Figure:
    with matplotlib.rc_context(style.STYLE):
        figure = common.PICTURES[name](run)
    assert isinstance(figure, Figure), (name, figure)
    return figure


def panel(figure: Figure, title: str) -> Any:
    (axes,) = (axes for axes in figure.axes if axes.get_title(loc="left").startswith(title))
    return axes


def words(figure: Figure) -> str:
    return " ".join(text.get_text() for text in figure.texts).replace("\n", " ")


def marked(axes: Any, arm: str, run: Run) -> tuple[np.ndarray, np.ndarray]:
    """The points that are drawn with the arm's marker."""
    look = style.arm_styles(run)[arm]
    line = next(
        line
        for line in axes.lines
        if line.get_color() == look.color and line.get_marker() == look.marker
    )
    return np.asarray(line.get_xdata()), np.asarray(line.get_ydata())
