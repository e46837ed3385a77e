"""Forest plot: an arm's effect in every setting, their mean, and what a new setting may show."""

from __future__ import annotations

from typing import TYPE_CHECKING

from saelab.report.figures.axes import NAMES
from saelab.report.figures.style import Page, arm_styles, legend_name, wrap
from saelab.report.run_data import Run
from saelab.runtime.counting import count
from saelab.runtime.safe_text import visible

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from saelab.verdict.across_settings import AcrossSettings

#: Panels in a row at most.
COLUMNS = 3


def forest(run: Run) -> Figure | str:
    """Draws a panel for each arm: settings with their intervals, the mean, the prediction."""
    if not run.across:
        return ""
    names = [one.setting for one in run.across[0].settings]
    rows = -(-len(run.across) // COLUMNS)
    columns = min(COLUMNS, len(run.across))
    cells = [a.arm for a in run.across] + ["."] * (rows * columns - len(run.across))
    mosaic = [cells[i * columns : (i + 1) * columns] for i in range(rows)]
    page = Page(mosaic, rows * (0.26 * (len(names) + 2) + 1.0), sharex=True)
    for i, a in enumerate(run.across):
        axes = page.panels[a.arm]
        _draw_arm(axes, run, a)
        labels = [visible(name) for name in names] + ["mean", "a new setting"]
        shown = ["\n".join(wrap(label, 1.6)) for label in labels] if i % columns == 0 else []
        axes.set_yticks(range(len(labels)), shown or [""] * len(labels))
        axes.set_ylim(len(labels) - 0.4, -0.6)
    name = NAMES.get(run.across[0].metric, run.across[0].metric.replace("_", " "))
    better = {"lower": "left", "higher": "right"}.get(run.manifest.get("direction", ""))
    for row in mosaic[-1]:
        if row != ".":
            page.panels[row].set_xlabel(f"{name}, arm minus baseline")
    words = [a.word for a in run.across]
    counts = [f"{word} {words.count(word)}" for word in dict.fromkeys(words)]
    return page.finish(
        f"{run.title} – {name} over {count(len(names), 'setting')}, for a new one: "
        f"{', '.join(counts)}",
        [
            "Circles: the effect in each setting with its interval; diamond: their mean, every"
            " setting with the same weight, with Hartung and Knapp's interval; lowest line: the"
            " prediction interval of the effect in a new setting of this kind."
            + (f" {better.capitalize()} of 0 is better." if better else ""),
        ],
        [],
        _notes(run),
    )


def _draw_arm(axes: Axes, run: Run, a: AcrossSettings) -> None:
    look = arm_styles(run)[a.arm]
    for y, one in enumerate(a.settings):
        if one.mean_diff is not None:
            axes.plot(
                one.mean_diff, y, linestyle="", marker="o", markersize=5, label=a.arm,
                color=look.color,
            )  # fmt: skip
        _bar(axes, a, look.color, y, one.low, one.high, 1.6)
    y = len(a.settings)
    if a.mean is not None:
        axes.plot(a.mean, y, linestyle="", marker="D", markersize=8, label=a.arm, color=look.color)
        _bar(axes, a, look.color, y, a.low, a.high, 3.2)
        _bar(axes, a, look.color, y + 1, a.new_low, a.new_high, 2.2)
    if a.sesoi:
        axes.axvspan(-a.sesoi, a.sesoi, color="#BBBBBB", alpha=0.4, linewidth=0)
    axes.axvline(0, color="black", linewidth=1.2, zorder=2)
    axes.set_title("\n".join(wrap(f"{legend_name(a.arm)}: {a.word}", 3.0)))
    axes.locator_params(axis="x", nbins=5)
    axes.grid(axis="y", visible=False)


def _bar(
    axes: Axes,
    a: AcrossSettings,
    color: str,
    y: float,
    low: float | None,
    high: float | None,
    width: float,
) -> None:
    if low is not None and high is not None:
        axes.hlines(y, low, high, label=a.arm, color=color, linewidth=width, zorder=3)


def _notes(run: Run) -> list[str]:
    """Says which settings are missing, and why."""
    texts = [
        f"{legend_name(a.arm)} in {visible(one.setting)} ({visible(one.reason)})"
        for a in run.across
        for one in a.missing
    ]
    few = [f"{legend_name(a.arm)}: {a.reason}." for a in run.across if a.mean is None]
    return [*([f"Missing: {'; '.join(texts)}."] if texts else []), *map(visible, few)]
