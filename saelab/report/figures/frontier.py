"""FVU, loss recovered and the rise of the loss against L0."""

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
from saelab.runs.random_code import RANDOM, SHARE

if TYPE_CHECKING:
    from matplotlib.figure import Figure

#: Title and axis label of the metrics drawn against L0.
RECOVERED, RISE = "loss_recovered", "ce_rise"
FRONTIER = {
    "fvu": ("Reconstruction\n(lower is better)", "FVU (share)"),
    RECOVERED: ("Loss recovered\n(higher is better)", "loss recovered (share)"),
    RISE: ("Rise of the loss\n(lower is better)", "rise (nats per token)"),
}


def frontier(run: Run) -> Figure | str:
    """FVU, loss recovered and the rise of the loss against L0, a point per cell."""
    if not cells_of(run, "fvu"):
        return f"no cell has an FVU and an L0: {run.reason('fvu')}"
    both = bool(cells_of(run, RECOVERED))
    shown = [metric for metric in FRONTIER if both and cells_of(run, metric)] or ["fvu"]
    below = [f"{metric} at target" for metric in shown]
    page = Page(
        [shown, below] if both else [["fvu", RECOVERED], [*below, RECOVERED]],
        5.9,
        height_ratios=(1.7, 1),
        width_ratios=[1] * len(shown) if both else (2, 1),
    )
    notes = []
    for metric in shown:
        axes = page.panels[metric]
        draw_against_l0(axes, run, metric)
        title, name = FRONTIER[metric]
        axes.set(title=title, ylabel=name)
        at_target = page.panels[f"{metric} at target"]
        draw_by_arm(at_target, run, run.numbers(metric))
        at_target.locator_params(axis="y", nbins=4)
        at_target.set(title=f"At {l0_text(run)}, by arm", ylabel=name)
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
            *_loss_sentences(run),
        ],
        [handle(arm, arm_styles(run)[arm]) for arm in run.arms if arm in arms],
        notes,
    )


def _loss_sentences(run: Run) -> list[str]:
    """Sentences on the losses that the scale of loss recovered hides; [] without them."""
    if not cells_of(run, RECOVERED):
        return []
    names = {"ce_clean": "clean", "ce_zero": "zeros", RANDOM: "random code"}
    of_arms = {name: next(iter(run.numbers(name).values()), []) for name in names}
    ends = [f"{names[name]} {values[0]:.3f}" for name, values in of_arms.items() if values]
    shares = means_of(run.numbers(SHARE))
    way = values_text(run, shares) if shares else f"missing ({run.reason(SHARE)})"
    return [
        f"Loss in nats per token: {', '.join(ends)}. Share of the way from the random code to the"
        f" clean model: {way}."
    ]
