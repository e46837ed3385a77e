"""FVU and loss recovered against L0."""

from __future__ import annotations

from typing import TYPE_CHECKING

from saelab.report.figures.axes import (
    cells_of,
    draw_against_l0,
    draw_by_arm,
    l0_text,
    lost_cells,
    means_of,
    values_text,
)
from saelab.report.figures.style import Page, arm_styles, explain, handle
from saelab.report.run_data import Run

if TYPE_CHECKING:
    from matplotlib.figure import Figure

#: Title and axis label of the metrics drawn against L0.
RECOVERED = "loss_recovered"
FRONTIER = {
    "fvu": ("Reconstruction (lower is better)", "FVU"),
    RECOVERED: ("Language-model loss (higher is better)", "loss recovered"),
}


def frontier(run: Run) -> Figure | str:
    """FVU and loss recovered against L0, a point per cell."""
    if not cells_of(run, "fvu"):
        return f"no cell has an FVU and an L0: {run.reason('fvu')}"
    both = bool(cells_of(run, RECOVERED))
    page = Page(
        [["fvu", RECOVERED], ["fvu at target", f"{RECOVERED} at target" if both else RECOVERED]],
        5.9,
        height_ratios=(1.7, 1),
        width_ratios=(1 if both else 2, 1),
    )
    notes = []
    for metric in ("fvu", *[RECOVERED] * both):
        axes = page.panels[metric]
        draw_against_l0(axes, run, metric)
        title, name = FRONTIER[metric]
        axes.set(title=title, ylabel=f"{name} (share)")
        below = page.panels[f"{metric} at target"]
        draw_by_arm(below, run, run.numbers(metric))
        below.locator_params(axis="y", nbins=4)
        below.set(title=f"At {l0_text(run)}, by arm", ylabel=f"{name} (share)")
        notes += [note for note in lost_cells(run, metric) if note not in notes]
    if not both:
        page.panels[RECOVERED].set_title("Language-model loss")
        explain(page.panels[RECOVERED], f"No loss recovered: {run.reason(RECOVERED)}", 1.8)
    arms = {cell.arm for cell in cells_of(run, "fvu")}
    return page.finish(
        f"{run.title} – reconstruction against sparsity",
        [
            "Small dots: one cell (arm and seed). Large: mean over seeds; bars: lowest to highest.",
            f"FVU at {l0_text(run)}: {values_text(run, means_of(run.numbers('fvu')))}.",
        ],
        [handle(arm, arm_styles(run)[arm]) for arm in run.arms if arm in arms],
        notes,
    )
