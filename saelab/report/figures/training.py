"""Reconstruction loss and L0 over training."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from saelab.report.figures.axes import (
    counts_of,
    draw_over_training,
    l0_text,
    limit_to_late,
    seeds_text,
    values_text,
)
from saelab.report.figures.style import Page, arm_styles, explain, handle, log_axis
from saelab.report.run_data import Curve, Run

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def _relative_to_baseline(run: Run, name: str) -> dict[str, dict[int, Curve]]:
    """100 * (arm / baseline - 1), seed by seed, for seeds that both have."""
    base = run.curves.get((name, run.baseline), {})
    relative: dict[str, dict[int, Curve]] = {}
    for arm in run.arms[1:]:
        for seed, curve in run.curves.get((name, arm), {}).items():
            if seed in base:
                other = np.interp(curve.tokens, *base[seed], left=np.nan, right=np.nan)
                usable = np.isfinite(other) & (other > 0)
                ratio = 100 * (curve.values[usable] / other[usable] - 1)
                if len(ratio):
                    relative.setdefault(arm, {})[seed] = Curve(curve.tokens[usable], ratio)
    return relative


def loss(run: Run) -> Figure | str:
    """Reconstruction loss (FVU in normalised space) and L0 over training."""
    name = "loss.reconstruction"
    if not (counts := counts_of(run, name)):
        return "curves.parquet has no loss.reconstruction at the target L0"
    relative = _relative_to_baseline(run, name)
    mosaic = [["loss", "l0"], ["relative", "relative"]] if relative else [["loss", "l0"]]
    page = Page(mosaic, 5.6 if relative else 3.4, height_ratios=(1.25, 1) if relative else (1,))
    last = draw_over_training(page.panels["loss"], run, name)
    log_axis(page.panels["loss"], "y")
    page.panels["loss"].set(title="Reconstruction loss", ylabel="FVU of the batch (share)")
    _draw_l0(page.panels["l0"], run)
    if relative:
        draw_over_training(page.panels["relative"], run, name, relative)
        limit_to_late(page.panels["relative"], relative)
        page.panels["relative"].axhline(0, color="black", linewidth=2.4, zorder=1)
        page.panels["relative"].set(
            title="Reconstruction loss against the baseline of the same seed; spikes may be cut",
            ylabel="difference (%)",
        )
    return page.finish(
        f"{run.title} – reconstruction loss and sparsity over training",
        [
            f"Line: mean over {seeds_text(counts)}; band: lowest to highest seed;"
            f" cells of {l0_text(run)}.",
            f"FVU of the last batch: {values_text(run, last)}.",
        ],
        [handle(arm, arm_styles(run)[arm]) for arm in last],
    )


def _draw_l0(axes: Axes, run: Run) -> None:
    axes.set_title("Sparsity")
    if not counts_of(run, "l0"):
        explain(axes, "curves.parquet has no l0")
        return
    draw_over_training(axes, run, "l0")
    log_axis(axes, "y")
    axes.set_ylabel("L0 (latents per token)")
    if run.target_l0:
        axes.axhline(run.target_l0, color="#555555", linewidth=1, linestyle=(0, (2, 2)))
        axes.set_ylim(bottom=min(axes.get_ylim()[0], 0.6 * run.target_l0))
        axes.annotate(
            f"target {run.target_l0:g}", (0.98, run.target_l0), (0, -6), va="top", ha="right",
            xycoords=("axes fraction", "data"), textcoords="offset points", color="#555555",
        )  # fmt: skip
