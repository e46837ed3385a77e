"""Paired differences of arms on synthetic activations, with their 95% t intervals.

One panel per metric, from the data of `saelab.launch.synthetic.table` or from its JSON file.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from saelab.errors import SettingError
from saelab.report.figures.style import (
    STYLE,
    ArmStyle,
    Page,
    arm_styles,
    handle,
    legend_name,
    save,
    wrap,
)
from saelab.report.run_data import Run
from saelab.runtime.counting import count

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

#: Metrics that are drawn where they were measured: title, and whether lower is better.
PANELS = {
    "fvu": ("FVU", True),
    "mcc": ("MCC with the true features", False),
    "firing_f1": ("F1 of firing with the true features", False),
    "dead_share": ("Share of dead latents", True),
}


def check_drawable(baseline: str | None, arms: Sequence[str]) -> None:
    """Raises: SettingError where there is nothing to draw."""
    if baseline is None or len(arms) < 2:
        remedy = "the picture shows arms against a baseline: name one, and have a second arm"
        raise SettingError("baseline", baseline, remedy)


def draw_table(table: Mapping[str, Any], stem: Path) -> None:
    """Writes <stem>.png and <stem>.svg.

    Raises: SettingError for a table without differences.
    """
    import matplotlib

    with matplotlib.rc_context(cast(Any, STYLE)):
        save(picture(table), stem)


def picture(table: Mapping[str, Any]) -> Figure:
    """Draws a table.

    Raises: SettingError for a table without differences.
    """
    config, values = table["config"], table["values"]
    check_drawable(config["baseline"], list(values))
    baseline, metrics = config["baseline"], [name for name in PANELS if name in config["metrics"]]
    style = arm_styles(Run("", "", {}, {"baseline": baseline, "arms": list(values)}))
    rows = [metrics[i : i + 2] for i in range(0, len(metrics), 2)]
    mosaic = [[*row, "."][:2] if len(metrics) > 1 else row for row in rows]
    arms = list(table["differences"])
    page = Page(mosaic, len(rows) * (0.36 * len(arms) + 1.1))
    for i, name in enumerate(metrics):
        axes = page.panels[name]
        for y, arm in enumerate(arms):
            pairs = zip(values[arm][name], values[baseline][name], strict=True)
            seeds = [a - b for a, b in pairs if a is not None and b is not None]
            _draw_difference(axes, y, table["differences"][arm][name], seeds, style[arm])
        title, lower = PANELS[name]
        axes.axvline(0, color="black", linewidth=1.2, zorder=2)
        names = ["\n".join(wrap(legend_name(arm), 1.9)) for arm in arms]
        axes.set_yticks(range(len(arms)), names if i % 2 == 0 else [""] * len(arms))
        axes.set_ylim(len(arms) - 0.5, -0.5)
        axes.locator_params(axis="x", nbins=4, steps=[1, 2, 5, 10])
        axes.grid(axis="y", visible=False)
        axes.set(title=title, xlabel=f"{'left' if lower else 'right'} of 0 is better")
    several = config["data_seed"] == "own"
    scope = "each on its own dictionary" if several else "all on one dictionary"
    return page.finish(
        f"{config['study']} – arm minus {legend_name(baseline)} at L0 {config['target_l0']:g}",
        [
            f"Mean difference paired by seed, with its 95% t interval; dots: {len(table['seeds'])}"
            f" seeds, {scope}."
        ],
        [handle(arm, style[arm], line=False) for arm in arms],
        [f"Missing: {count(len(table['missing']), 'value')}."] if table["missing"] else [],
    )


def _draw_difference(
    axes: Axes, y: float, paired: Mapping[str, Any], seeds: Sequence[float], look: ArmStyle
) -> None:
    if paired["mean"] is None:
        return
    if paired["low"] is not None:
        axes.hlines(y, paired["low"], paired["high"], color=look.color, linewidth=2.2, zorder=3)
    spread = y + 0.2 * np.linspace(-1, 1, len(seeds))
    axes.plot(seeds, spread, ".", markersize=4, color=look.color, alpha=0.5)
    axes.plot(paired["mean"], y, **look.marks(markersize=8))
