"""Shared elements of pictures: texts, arms side by side, curves over training, cells by L0."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from saelab.report.figures.style import ArmStyle, arm_styles, handle, legend_name, log_axis
from saelab.report.run_data import Curve, Run
from saelab.runtime.counting import count

if TYPE_CHECKING:
    from matplotlib.axes import Axes

#: Metrics that are called by another name in texts.
NAMES = {
    **{"fvu": "FVU", "l0": "L0", "mse": "MSE"},
    "ce_rise": "rise of the loss (nats)",
    "loss_recovered_random": "loss recovered from the random code",
}
#: Share of training after which differences from the baseline set their axis; early ones are large.
SETTLED = 0.2

RANGE = "bars: lowest to highest seed"

# ---------------------------------------------------------------- words


def l0_text(run: Run) -> str:
    """Names the L0 at which the arms of a run are compared."""
    return "the run's L0" if not run.target_l0 else f"L0 {run.target_l0:g}"


def seeds_text(counts: Sequence[int]) -> str:
    """Says how many seeds there are: '3 to 8 seeds'."""
    low, high = min(counts), max(counts)
    if high == 1:
        return "one seed"
    return f"{count(high, 'seed')}" if low == high else f"{low} to {count(high, 'seed')}"


def values_text(run: Run, means: Mapping[str, float], form: str = ".3f") -> str:
    """'baseline 0.171, others 0.166 (A) to 0.180 (B)'; '-' without any."""
    parts = []
    if run.baseline in means:
        parts.append(f"{legend_name(run.baseline)} {means[run.baseline]:{form}}")
    others = sorted((mean, arm) for arm, mean in means.items() if arm in run.arms[1:])
    if len(others) > 1:
        (low, first), (high, last) = others[0], others[-1]
        parts.append(
            f"others {low:{form}} ({legend_name(first)}) to {high:{form}} ({legend_name(last)})"
        )
    elif others:
        parts.append(f"{legend_name(others[0][1])} {others[0][0]:{form}}")
    return ", ".join(parts) or "-"


def arm_values_text(run: Run, means: Mapping[str, float], form: str) -> str:
    """`values_of`, where the baseline may have no value."""
    return values_text(run, means, form).removeprefix("others ")


def seeds_text_of(run: Run, numbers: Mapping[str, Sequence[float]]) -> str:
    """Says how many seeds the arms have numbers of."""
    return seeds_text([len(values) for arm, values in numbers.items() if arm in run.arms] or [1])


def legend(run: Run, arms: Sequence[str]) -> list[Any]:
    """Entries of the legend for these arms, in the run's order."""
    return [handle(arm, arm_styles(run)[arm]) for arm in run.arms if arm in arms]


def changes_of(run: Run, arm: str) -> dict[str, Any]:
    """Settings of the base that an arm changes; {} where the manifest does not record them."""
    arms = run.manifest.get("arms", {})
    entry = arms.get(arm, {}) if isinstance(arms, dict) else {}
    return entry.get("changes", {})


def lost_cells(run: Run, metric: str, slice: str = "") -> list[str]:
    """Makes one note on the cells at the target L0 that have no value; [] when all have one."""
    parts = []
    for arm, rows in run.at_target(metric, slice).items():
        lost = [row for row in rows if row.value is None]
        if lost and arm in run.arms:
            count = f"{len(lost)} of {len(rows)} seeds"
            parts.append(f"{legend_name(arm)}, {count} ({lost[0].reason})")
    return [f"Not in the picture: {'; '.join(parts)}."] if parts else []


def mean(values: Sequence[float]) -> float:
    """Mean of one or more numbers."""
    return sum(values) / len(values)


def means_of(numbers: Mapping[str, Sequence[float]]) -> dict[str, float]:
    """Mean of the numbers of each arm."""
    return {arm: mean(values) for arm, values in numbers.items()}


# ---------------------------------------------------------------- side by side


def draw_by_arm(
    axes: Axes, run: Run, numbers: Mapping[str, Sequence[float]], dots: bool = True
) -> None:
    """Draws mean and range of every arm side by side in their order, and seeds as dots."""
    style = arm_styles(run)
    for x, arm in enumerate(run.arms):
        if values := numbers.get(arm):
            color = style[arm].color
            if dots and len(values) > 1:
                spread = x + 0.24 * np.linspace(-1, 1, len(values))
                axes.plot(spread, values, ".", markersize=5, label=arm, color=color, alpha=0.5)
            axes.vlines(
                x, min(values), max(values), label=arm, color=color, linewidth=1.6, zorder=3
            )
            axes.plot(x, mean(values), **style[arm].marks(markersize=8))
    axes.set_xlim(-0.7, len(run.arms) - 0.3)
    axes.set_xticks([])
    axes.margins(y=0.1)


def draw_points(
    axes: Axes,
    look: ArmStyle,
    points: Mapping[Any, Sequence[float]],
    dodge: float = 0.0,
    joined: bool = True,
) -> None:
    """Draws mean and range of the seeds at each x, joined by a line; `dodge` shifts them."""
    x = [place + dodge for place in points]
    means = [mean(values) for values in points.values()]
    low = [min(values) for values in points.values()]
    high = [max(values) for values in points.values()]
    axes.plot(x, means, **(look.line() if joined else look.marks()))
    axes.vlines(x, low, high, label=look.name, color=look.color, linewidth=1.4, zorder=look.zorder)


# ---------------------------------------------------------------- over training


def token_unit(run: Run, name: str) -> tuple[float, str]:
    """Tokens in one unit of the axis, and the unit's name."""
    longest = max(
        (
            curve.tokens[-1]
            for (n, _), cells in run.curves.items()
            if n == name
            for curve in cells.values()
        ),
        default=0,
    )
    return (1e6, "million tokens") if longest >= 2e5 else (1e3, "thousand tokens")


def band(curves: Mapping[int, Curve]) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Tokens, mean, lowest and highest value over the seeds that reached these tokens."""
    tokens = np.unique(np.concatenate([curve.tokens for curve in curves.values()]))
    rows = np.array(
        [
            np.interp(tokens, curve.tokens, curve.values, left=np.nan, right=np.nan)
            for curve in curves.values()
        ]
    )
    return tokens, np.nanmean(rows, 0), np.nanmin(rows, 0), np.nanmax(rows, 0)


def plot_band(
    axes: Axes, look: ArmStyle, curves: Mapping[int, Curve], unit: float, turn: float, banded: bool
) -> float:
    """Draws the mean line of one arm, and the band of its seeds if `banded`; `turn` in [0, 1)
    shifts its markers. Returns the last mean."""
    tokens, mean, low, high = band(curves)
    every = max(1, len(tokens) // 6)
    axes.plot(tokens / unit, mean, markevery=(int(turn * every), every), **look.line())
    if banded:
        axes.fill_between(
            tokens / unit, low, high, label=look.name, color=look.color, alpha=0.14, linewidth=0,
            zorder=1.5,
        )  # fmt: skip
    return float(mean[-1])


def draw_over_training(
    axes: Axes,
    run: Run,
    name: str,
    curves: Mapping[str, Mapping[int, Curve]] | None = None,
    banded: bool = True,
) -> dict[str, float]:
    """Draws one scalar of all arms, or the given curves, with bands of their seeds or without.
    Returns the last mean of each arm."""
    unit, unit_name = token_unit(run, name)
    if curves is None:
        curves = {arm: run.curves[name, arm] for arm in run.arms if (name, arm) in run.curves}
    style, last = arm_styles(run), {}
    for i, (arm, of_arm) in enumerate(curves.items()):
        last[arm] = plot_band(axes, style[arm], of_arm, unit, (i + 0.5) / len(curves), banded)
    axes.set_xlabel(f"training ({unit_name})")
    axes.margins(x=0.02)
    return last


def counts_of(run: Run, name: str) -> list[int]:
    """Number of cells of each arm that logged the scalar."""
    return [len(cells) for (n, _), cells in run.curves.items() if n == name]


def limit_to_late(axes: Axes, curves: Mapping[str, Mapping[int, Curve]]) -> None:
    """Limits the y axis to values after training has settled; spikes may leave it."""
    late = [
        curve.values[curve.tokens >= SETTLED * curve.tokens[-1]]
        for of_arm in curves.values()
        for curve in of_arm.values()
    ]
    ends = [values[-1] for values in late if len(values)]
    usual = np.percentile(np.concatenate([*late, [0.0]]), [2, 98])
    low, high = min(0.0, *usual, *ends), max(0.0, *usual, *ends)
    pad = 0.06 * max(high - low, 0.1)
    axes.set_ylim(low - pad, high + pad)


def draw_seed_lines(axes: Axes, run: Run, name: str) -> None:
    """Draws a line per seed, since seeds may settle at different signs and none at the mean."""
    style, (unit, _) = arm_styles(run), token_unit(run, name)
    for arm in run.arms:
        for curve in run.curves.get((name, arm), {}).values():
            axes.plot(
                curve.tokens / unit, curve.values, label=arm, color=style[arm].color, linewidth=0.7,
                alpha=0.6, zorder=2,
            )  # fmt: skip


# ---------------------------------------------------------------- against L0


@dataclass(frozen=True)
class Cell:
    """Trained cell with its measured L0 (latents per token) and metric."""

    arm: str
    level: float
    l0: float
    value: float


def cells_of(run: Run, metric: str) -> list[Cell]:
    """Cells of the arms, at all levels, that have the metric and an L0."""
    l0 = {(v.arm, v.seed, v.level): v.value for v in run.values.get(("l0", ""), ())}
    cells = []
    for v in run.values.get((metric, ""), ()):
        x = l0.get((v.arm, v.seed, v.level), v.level)
        if v.value is not None and x is not None and x > 0 and v.arm in run.arms:
            cells.append(Cell(v.arm, v.level, x, v.value))
    return cells


def draw_against_l0(axes: Axes, run: Run, metric: str, arms: Sequence[str] = ()) -> None:
    """Draws a dot per cell, a line through the means of the levels, and a marker at the target L0;
    for the given arms, or for all."""
    arms = arms or run.arms
    cells, style = [cell for cell in cells_of(run, metric) if cell.arm in arms], arm_styles(run)
    for arm in arms:
        of_arm = [cell for cell in cells if cell.arm == arm]
        look = style[arm]
        axes.plot(
            [cell.l0 for cell in of_arm], [cell.value for cell in of_arm], linestyle="",
            marker=".", markersize=5, label=arm, color=look.color, alpha=0.5, zorder=2,
        )  # fmt: skip
        levels = sorted({cell.level for cell in of_arm})
        means = [_centre([cell for cell in of_arm if cell.level == level]) for level in levels]
        axes.plot(*_columns(means), **look.line(marker=""))
        target = [mean for mean, level in zip(means, levels, strict=True) if run.is_target(level)]
        axes.plot(*_columns(target), **look.marks(markersize=8))
    axes.set_xlabel("L0 (latents per token)")
    axes.margins(x=0.08, y=0.08)
    log_axis(axes, "x", sorted({cell.level for cell in cells if cell.level > 0}))
    values = [cell.value for cell in cells]
    if min(values) > 0 and max(values) > 4 * min(values):
        log_axis(axes, "y")


def _centre(cells: Sequence[Cell]) -> tuple[float, float]:
    return mean([cell.l0 for cell in cells]), mean([cell.value for cell in cells])


def _columns(points: Sequence[tuple[float, float]]) -> tuple[list[float], list[float]]:
    return [x for x, _ in points], [y for _, y in points]
