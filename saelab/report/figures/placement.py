"""Ideas on a scale from "frozen random" to "baseline".

    place = (m - m_frozen) / (m_baseline - m_frozen)

m: the metric's value; m_frozen: that of the baseline trained with a decoder that stays random;
m_baseline: the mean over the baseline's seeds. 0 is reached without a learned decoder and 1 by the
baseline; beyond 1 is better than the baseline. Other controls are on the same scale.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from saelab.report.figures.axes import l0_text, mean, seeds_text
from saelab.report.figures.style import Page, arm_styles, legend_name, wrap
from saelab.report.run_data import Run
from saelab.runs.schema import CONTROL

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

#: Names of `launch/controls`, which would load torch.
FROZEN, PLANTED = f"{CONTROL}frozen decoder", f"{CONTROL}planted effect"
#: Metric -> title, and its name for the model's own channels where that is another.
SCALES = {
    "fvu": ("FVU", ""),
    "loss_recovered": ("Loss recovered", ""),
    "sae_top_5_test_accuracy": ("Probes, k = 5", "llm_top_5_test_accuracy"),
}
#: Places outside of these are written at the border. Our choice.
LIMITS = (-0.75, 1.5)


def places(run: Run, metric: str) -> dict[str, list[float]]:
    """Arm or control -> places of its seeds; {} where the ends of the scale are not known."""
    numbers = dict(run.numbers(metric))
    if other := SCALES[metric][1]:
        numbers |= run.numbers(other)
    frozen, baseline = numbers.get(FROZEN), numbers.get(run.baseline)
    if not frozen or not baseline or mean(frozen) == mean(baseline):
        return {}
    zero, one = mean(frozen), mean(baseline)
    return {
        name: [(value - zero) / (one - zero) for value in numbers[name]]
        for name in (*run.arms, *run.controls)
        if name in numbers
    }


def placement(run: Run) -> Figure | str:
    """Draws a row for each arm and control and a panel for each metric, given a frozen decoder."""
    panels = {metric: of_arms for metric in SCALES if (of_arms := places(run, metric))}
    if not panels:
        return ""
    rows = [
        name
        for name in (*run.arms, *run.controls)
        if name != PLANTED and any(name in of_arms for of_arms in panels.values())
    ]
    page = Page([list(panels)], 0.34 * len(rows) + 0.9)
    for i, (metric, of_arms) in enumerate(panels.items()):
        axes = page.panels[metric]
        for y, name in enumerate(rows):
            _draw_row(axes, run, y, name, of_arms.get(name, []))
        axes.axvspan(0, 1, color="#BBBBBB", alpha=0.25, linewidth=0)
        axes.set_xticks([0, 1], ["frozen\nrandom", "baseline"])
        axes.set_xlim(*LIMITS)
        axes.set_ylim(len(rows) - 0.4, -0.6)
        names = ["\n".join(wrap(legend_name(name), 2.2)) for name in rows]
        axes.set_yticks(range(len(rows)), names if i == 0 else [""] * len(rows))
        axes.grid(axis="y", visible=False)
        axes.set(title=SCALES[metric][0])
    metric, shown = next(iter(panels.items()))
    shares = [
        f"{legend_name(arm)} {100 * mean(shown[arm]):.1f}%" for arm in run.arms[1:] if arm in shown
    ]
    counts = [len(shown[arm]) for arm in run.arms if arm in shown] or [1]
    return page.finish(
        f"{run.title} – placed between a frozen random decoder and the baseline",
        [
            f"Mean over {seeds_text(counts)} at {l0_text(run)}; bars: lowest to highest seed."
            " Right is better; an arrow at the border stands for a place outside of it.",
            f"{SCALES[metric][0]}, share of the way to the baseline: {', '.join(shares)}."
            if shares
            else "",
            "The rise of the loss in nats and the share of the way from the random code give the"
            " same places as loss recovered."
            if "loss_recovered" in panels
            else "",
        ],
        [],
    )


def _draw_row(axes: Axes, run: Run, y: int, name: str, values: list[float]) -> None:
    if not values:
        return
    look, middle = arm_styles(run)[name], mean(values)
    low, high = LIMITS
    if low < middle < high:
        axes.hlines(y, min(values), max(values), label=name, color=look.color, linewidth=1.6)
        axes.plot(middle, y, **look.marks(markersize=8))
        return
    at_border, arrow = (low, "<") if middle <= low else (high, ">")
    side = "left" if arrow == "<" else "right"
    axes.plot(at_border, y, **look.marks(marker=arrow, markersize=8))
    axes.annotate(
        f"{100 * middle:.0f}%", (at_border, y), (8 if side == "left" else -8, 0), ha=side,
        va="center", textcoords="offset points", label=name, color=look.color,
    )  # fmt: skip
