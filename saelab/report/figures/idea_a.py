"""Pictures of the measurements for idea A; each is drawn only for runs that have its data.

spread        how unequal feature variances are, over training and before and after scaling
thresholds    per-feature thresholds against variance, with the fitted slope
positions     FVU, L0, dead latents and probes by token position
sensitivity   elasticities of FVU, L0 and loss recovered to the scalars
regulariser   spread of the scalars over seeds against how far they moved, by strength
speed         loss over training by temperature, and when it is near its final value
temperature   the frontier by temperature, and FVU against temperature
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from saelab.report.figures.axes import (
    RANGE,
    arm_values_text,
    band,
    cells_of,
    changes_of,
    draw_against_l0,
    draw_over_training,
    draw_points,
    l0_text,
    legend,
    mean,
    means_of,
    seeds_text,
    seeds_text_of,
    token_unit,
    values_text,
)
from saelab.report.figures.style import Page, arm_styles, handle, legend_name, log_axis, wrap
from saelab.report.run_data import Run

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

#: Most panels of thresholds, and most scalars of elasticities: more can't be read on one page.
MOST_PANELS = 6
LOSS = "loss.reconstruction"
METRICS = {"fvu": "FVU", "l0": "L0", "loss_recovered": "loss recovered"}
BY_POSITION = {
    "fvu": ("Reconstruction", "FVU (share)"),
    "difference": ("Against the baseline", "FVU, arm minus baseline"),
    "l0": ("Sparsity", "L0 (latents)"),
    "dead_share": ("Never fire there", "share of latents (%)"),
    "sae_top_5_test_accuracy": ("Probes, k = 5", "test accuracy"),
}


# ---------------------------------------------------------------- spread


def spread(run: Run) -> Figure | str:
    """Standard deviation of log variance over features, while training and by scaling."""
    ends = {name: run.numbers(f"spread.{name}") for name in ("before", "after")}
    arms = [arm for arm in run.arms if all(arm in numbers for numbers in ends.values())]
    if not arms:
        return ""
    page = Page([["training", "scaling"]], 3.5)
    left, right = page.panels.values()
    draw_over_training(left, run, "spread")
    left.set(title="Of the variances that scale, over training", ylabel="sd of log variance")
    for arm in arms:
        points = {x: ends[name][arm] for x, name in enumerate(("before", "after"))}
        draw_points(right, arm_styles(run)[arm], points)
    right.set_xticks([0, 1], ["before", "after"])
    right.set_xlim(-0.25, 1.25)
    right.set(title="Scaled features, held-out text", ylabel="sd of log variance")
    for axes in (left, right):
        axes.set_ylim(0, 1.08 * axes.dataLim.y1)
    without = [legend_name(arm) for arm in arms if ("spread", arm) not in run.curves]
    note = f"No path over training, since they keep no running variance: {', '.join(without)}."
    return page.finish(
        f"{run.title} – spread of feature variance before and after scaling",
        [
            f"Mean over {seeds_text_of(run, ends['after'])} at {l0_text(run)}; {RANGE}. Features"
            " are the input's dimensions, or the latents' pre-activations where thresholds are"
            " tied. 0 is equal variances.",
            f"After scaling: {arm_values_text(run, means_of(ends['after']), '.2f')}.",
        ],
        legend(run, arms),
        [note] if without else [],
    )


# ---------------------------------------------------------------- thresholds


def thresholds(run: Run) -> Figure | str:
    """Draws a panel for each arm that has thresholds (or gains): points of a seed, all fits."""
    fits = run.numbers("consistency.temperature")
    arms = [arm for arm in run.arms if arm in fits][:MOST_PANELS]
    points = {arm: _points(run, arm) for arm in arms}
    arms = [arm for arm in arms if len(points[arm][0])]
    if not arms:
        return ""
    columns = min(3, len(arms))
    cells = [*arms, *["."] * (-len(arms) % columns)]
    mosaic = [cells[i : i + columns] for i in range(0, len(cells), columns)]
    page = Page(mosaic, 3.2 * len(mosaic))
    for arm in arms:
        axes, look = page.panels[arm], arm_styles(run)[arm]
        variance, threshold = points[arm]
        axes.plot(variance, threshold, ".", label=arm, color=look.color, markersize=4, alpha=0.6)
        ends = np.array([variance.min(), variance.max()])
        lines = zip(
            *(run.numbers(f"consistency.{n}")[arm] for n in ("slope", "intercept")), strict=True
        )
        for slope, intercept in lines:
            axes.plot(ends, np.exp(intercept) * ends**slope, color="black", linewidth=1)
        for which in ("x", "y"):
            log_axis(axes, which)
        r2 = mean(run.numbers("consistency.r2")[arm])
        title = f"{legend_name(arm)}: temperature {mean(fits[arm]):.2f}, R²\u00a0{r2:.2f}"
        axes.set_title("\n".join(wrap(title, 7.2 / columns - 0.7)))
        axes.set_xlabel("variance of the feature")
    for row in mosaic:
        page.panels[row[0]].set_ylabel("threshold (or gain)")
    return page.finish(
        f"{run.title} – per-feature thresholds against variance",
        [
            f"Dots: features of one seed, evenly by rank of variance; lines: fits of"
            f" {seeds_text_of(run, {arm: fits[arm] for arm in arms})} at {l0_text(run)}, log"
            " threshold on log variance. The slope is the temperature that one global pair would"
            " need (minus the slope for gains of the input); R² is what it would explain.",
        ],
        [],
    )


def _points(run: Run, arm: str) -> tuple[np.ndarray, np.ndarray]:
    """Variance and threshold of the features that are stored for the first seed of an arm."""
    seeds = [v.seed for v in run.at_target("consistency.temperature").get(arm, ())]
    pairs = []
    for (metric, slice), rows in run.values.items():
        if metric == "consistency.variance":
            others = run.values.get(("consistency.threshold", slice), ())
            pair = [
                next((v.value for v in values if _is_cell_at_target(run, v, arm, seeds[0])), None)
                for values in (rows, others)
            ]
            if None not in pair:
                pairs.append(pair)
    points = np.array(sorted(pairs), dtype=np.float64).reshape(-1, 2)
    return points[:, 0], points[:, 1]


def _is_cell_at_target(run: Run, value: Any, arm: str, seed: int) -> bool:
    return value.arm == arm and value.seed == seed and run.is_target(value.level)


# ---------------------------------------------------------------- positions


def positions(run: Run) -> Figure | str:
    """Metrics by bucket of token positions, with a line where the training of arms ends."""
    buckets = _buckets(run, "fvu")
    if len(buckets) < 2:
        return ""
    probed = _buckets(run, "sae_top_5_test_accuracy")
    third = "sae_top_5_test_accuracy" if probed else "dead_share"
    top = ["fvu"] * 3 + ["difference"] * 3
    page = Page([top, ["l0"] * 2 + ["dead_share"] * 2 + [third] * 2], 5.6)
    numbers = {name: _by_position(run, name) for name in page.panels if name != "difference"}
    numbers["difference"] = _differences_from_baseline(run, buckets)
    for name, axes in page.panels.items():
        of_arms = numbers[name]
        for i, (arm, points) in enumerate(of_arms.items()):
            dodge = 8 * ((i + 0.5) / len(of_arms) - 0.5)
            draw_points(axes, arm_styles(run)[arm], points, dodge)
        ends = probed if name == "sae_top_5_test_accuracy" else buckets
        axes.set_xticks([(low + high) / 2 for low, high in ends], [f"{a}-{b}" for a, b in ends])
        axes.tick_params(axis="x", labelsize=9.5 if name in ("fvu", "difference") else 8)
        axes.grid(axis="x", visible=False)
        title, label = BY_POSITION[name]
        axes.set(title=title, ylabel=label, xlabel="token position")
        if name == "difference":
            axes.axhline(0, color="black", linewidth=2.4, zorder=1)
    high = max(1.0, page.panels["dead_share"].get_ylim()[1])
    page.panels["dead_share"].set_ylim(-0.05 * high, high)  # markers at 0 stay whole
    stops = _stops(run)
    for name in ("fvu", "difference", "l0", "dead_share"):
        for stop in set(stops.values()):
            page.panels[name].axvline(
                stop - 0.5, color="#555555", linewidth=1, linestyle=(0, (2, 2))
            )
    cut = [f"{legend_name(arm)} ({stop} positions)" for arm, stop in stops.items()]
    notes = [f"Dashed: end of the training of these arms: {', '.join(cut)}."] if cut else []
    if probed:
        notes.append(
            f"Probes: texts end at position {probed[-1][1]}; only those that reach the last"
            " bucket, and entries with enough of them."
        )
    seeds = seeds_text_of(run, run.numbers("fvu"))
    late = run.numbers("position.fvu_late")
    late_text = f"FVU at positions 64-127: {values_text(run, means_of(late))}." if late else ""
    return page.finish(
        f"{run.title} – by token position",
        [f"Mean over {seeds} at {l0_text(run)}; {RANGE}. {late_text}"],
        legend(run, list(numbers["fvu"])),
        notes,
    )


def _buckets(run: Run, metric: str) -> list[tuple[int, int]]:
    """First and last position of the metric's buckets that have a number, ascending."""
    prefix, buckets = "position=", []
    for name, slice in run.values:
        whole = name == metric and slice.startswith(prefix) and "," not in slice
        if whole and any(arm in run.arms for arm in run.numbers(name, slice)):
            low, high = slice.removeprefix(prefix).split("-")
            buckets.append((int(low), int(high)))
    return sorted(buckets)


def _by_position(run: Run, metric: str) -> dict[str, dict[float, list[float]]]:
    """Arm -> middle of a bucket -> values of the seeds; dead latents in percent."""
    factor = 100 if metric == "dead_share" else 1
    by_arm: dict[str, dict[float, list[float]]] = {}
    for low, high in _buckets(run, metric):
        for arm, values in run.numbers(metric, f"position={low}-{high}").items():
            if arm in run.arms:
                by_arm.setdefault(arm, {})[(low + high) / 2] = [factor * value for value in values]
    return {arm: by_arm[arm] for arm in run.arms if arm in by_arm}


def _differences_from_baseline(
    run: Run, buckets: Sequence[tuple[int, int]]
) -> dict[str, dict[float, list[float]]]:
    """FVU of an arm minus that of the baseline of the same seed, ordered as by `_by_position`."""
    by_arm: dict[str, dict[float, list[float]]] = {}
    for low, high in buckets:
        rows = run.at_target("fvu", f"position={low}-{high}")
        base = {v.seed: v.value for v in rows.get(run.baseline, ()) if v.value is not None}
        for arm in run.arms[1:]:
            pairs = [(v.value, base.get(v.seed)) for v in rows.get(arm, ())]
            differences = [a - b for a, b in pairs if a is not None and b is not None]
            if differences:
                by_arm.setdefault(arm, {})[(low + high) / 2] = differences
    return {arm: by_arm[arm] for arm in run.arms if arm in by_arm}


def _stops(run: Run) -> dict[str, int]:
    """Arms that are trained on the first positions alone -> number of these positions."""
    ranges = {arm: changes_of(run, arm).get("train.positions") for arm in run.arms}
    return {arm: int(positions[1]) for arm, positions in ranges.items() if positions}


# ---------------------------------------------------------------- sensitivity


def sensitivity(run: Run) -> Figure | str:
    """Elasticity of each metric (rows) to each scalar (columns) at each change."""
    elasticities = _elasticities(run)
    scalars = list(dict.fromkeys(scalar for scalar, _ in elasticities))[:MOST_PANELS]
    metrics = [m for m in METRICS if any(metric == m for _, metric in elasticities)]
    if not scalars:
        return ""
    mosaic = [[f"{scalar} {metric}" for scalar in scalars] for metric in metrics]
    page = Page(mosaic, 2.0 * len(metrics) + 0.4, sharex=True)
    series = [points for by_arm in elasticities.values() for points in by_arm.values()]
    steps = sorted({change for points in series for change in points})
    drawn: dict[str, None] = {}
    for (scalar, metric), of_arms in elasticities.items():
        axes = page.panels.get(f"{scalar} {metric}")
        for i, (arm, points) in enumerate(of_arms.items() if axes else ()):
            assert axes is not None
            places = {steps.index(change): values for change, values in points.items()}
            dodge = 0.5 * ((i + 0.5) / len(of_arms) - 0.5)
            draw_points(axes, arm_styles(run)[arm], places, dodge, joined=False)
            drawn[arm] = None
    for axes in page.panels.values():
        axes.axhline(0, color="black", linewidth=1.2, zorder=1)
        axes.set_xticks(range(len(steps)), [f"{change:+d}" for change in steps])
        axes.set_xlim(-0.5, len(steps) - 0.5)
        axes.locator_params(axis="y", nbins=5)
        axes.grid(axis="x", visible=False)
    for scalar in scalars:
        page.panels[f"{scalar} {metrics[0]}"].set_title(scalar)
        page.panels[f"{scalar} {metrics[-1]}"].set_xlabel("change (%)")
    for metric in metrics:
        page.panels[f"{scalars[0]} {metric}"].set_ylabel(f"{METRICS[metric]} (% per %)")
    largest = {s: means_of(run.numbers(f"sensitivity.{s}")) for s in scalars}
    texts = [f"{s} {_extremes_text(values)}" for s, values in largest.items() if values]
    seeds = seeds_text_of(run, run.numbers(f"sensitivity.{scalars[0]}"))
    return page.finish(
        f"{run.title} – elasticities to the scalars, without training again",
        [
            f"Change of the metric in % for 1% more of the scalar. Mean over {seeds} at"
            f" {l0_text(run)}; {RANGE}. Each panel has its own axis.",
            f"Largest for FVU, by arm: {'; '.join(texts)}.",
        ],
        legend(run, list(drawn)),
    )


def _extremes_text(values: Mapping[str, float]) -> str:
    low, high = min(values.values()), max(values.values())
    return f"{low:.2f}" if len(values) == 1 else f"{low:.2f} to {high:.2f}"


#: Arm -> change in percent -> values of the seeds.
Changes = dict[str, dict[int, list[float]]]


def _elasticities(run: Run) -> dict[tuple[str, str], Changes]:
    """(scalar, metric) -> elasticities."""
    changes: dict[tuple[str, str], Changes] = {}
    for name, slice in run.values:
        words = name.split(".")
        if words[0] != "sensitivity" or len(words) != 3 or not slice.startswith("change="):
            continue
        change = int(slice.removeprefix("change=").removesuffix("%"))
        for arm, values in run.numbers(name, slice).items():
            if arm in run.arms:
                of_arm = changes.setdefault((words[1], words[2]), {}).setdefault(arm, {})
                of_arm[change] = values
    return {
        key: {arm: dict(sorted(arms[arm].items())) for arm in run.arms if arm in arms}
        for key, arms in changes.items()
    }


# ---------------------------------------------------------------- regulariser


def regulariser(run: Run) -> Figure | str:
    """Draws a point for each strength: distance that a scalar moved, sd of its seeds at the end."""
    strengths = _strengths(run)
    if len({c for of_arm in strengths.values() for c in of_arm.values()}) < 2:
        return ""
    names = dict.fromkeys(name for of_arm in strengths.values() for name in of_arm)
    panels = {name: points for name in names if (points := _distances_moved(run, name, strengths))}
    if not panels:
        return "no arm with a regulariser has two seeds whose scalars moved"
    page = Page([list(panels)], 3.6)
    for name, points in panels.items():
        axes = page.panels[name]
        line = sorted({strengths[arm][name]: points[arm] for arm in reversed(points)}.items())
        axes.plot(*zip(*(point for _, point in line), strict=True), color="#999999", linewidth=1)
        for arm, (x, y) in points.items():
            axes.plot(x, y, **arm_styles(run)[arm].marks(markersize=9))
            axes.annotate(f"{strengths[arm][name]:g}", (x, y), (7, 5), textcoords="offset points")
        axes.margins(x=0.25, y=0.25)
        axes.set_ylim(bottom=0)
        axes.set(title=name, xlabel="distance moved (mean)", ylabel="sd over seeds at the end")
    arms = [arm for arm in run.arms if any(arm in points for points in panels.values())]
    drawn = {(name, arm) for name, points in panels.items() for arm in points}
    counts = [len(cells) for key, cells in run.curves.items() if key in drawn]
    return page.finish(
        f"{run.title} – effect of the regulariser's strength on its scalars",
        [
            f"A point for each arm, with its strength next to it; {seeds_text(counts or [1])} at"
            f" {l0_text(run)}. Distance from the first step to the last. The line joins the first"
            " arm of each strength."
        ],
        [handle(arm, arm_styles(run)[arm], line=False) for arm in arms],
    )


def _strengths(run: Run) -> dict[str, dict[str, float]]:
    """Arm -> scalar -> strength of its prior, for arms in whose changes the manifest has a part
    with a setting c_<scalar>."""
    strengths_of: dict[str, dict[str, float]] = {}
    for arm in run.arms:
        for part in _parts(changes_of(run, arm)):
            own = {s: float(part[f"c_{s}"]) for s in run.scalars if f"c_{s}" in part}
            if own:
                strengths_of[arm] = own
    return strengths_of


def _parts(value: Any) -> Iterator[dict[str, Any]]:
    """Yields every mapping inside plain data."""
    if isinstance(value, dict):
        yield value
    for child in value.values() if isinstance(value, dict) else value:
        if isinstance(child, (dict, list)):
            yield from _parts(child)


def _distances_moved(
    run: Run, name: str, arms: Mapping[str, Any]
) -> dict[str, tuple[float, float]]:
    """Arm -> mean distance that the scalar moved, and the sd of its last values over seeds."""
    points = {}
    for arm, moved in run.numbers(f"moved.{name}").items():
        last = [curve.values[-1] for curve in run.curves.get((name, arm), {}).values()]
        if name in arms.get(arm, {}) and len(last) > 1:
            points[arm] = (mean([abs(value) for value in moved]), float(np.std(last, ddof=1)))
    return {arm: points[arm] for arm in run.arms if arm in points}


# ---------------------------------------------------------------- temperature


def _end_temperatures(run: Run) -> dict[str, float]:
    """Arm -> its temperature at the end, mean over seeds; {} unless two arms differ in it."""
    taus = {
        arm: mean([float(curve.values[-1]) for curve in run.curves["tau", arm].values()])
        for arm in run.arms
        if ("tau", arm) in run.curves
    }
    return taus if len({round(tau, 3) for tau in taus.values()}) > 1 else {}


def _draw_against_temperature(
    axes: Axes, run: Run, taus: Mapping[str, float], numbers: Mapping[str, Sequence[float]]
) -> None:
    """Draws mean and range of each arm at its temperature, the baseline as a line and a band."""
    for arm, tau in taus.items():
        if arm in numbers:
            draw_points(axes, arm_styles(run)[arm], {tau: numbers[arm]})
    if run.baseline in numbers and run.baseline not in taus:
        values = numbers[run.baseline]
        axes.axhline(mean(values), color="black", linewidth=2.4, zorder=1)
        axes.axhspan(min(values), max(values), color="black", alpha=0.12, linewidth=0, zorder=0)
    axes.set_xlabel("temperature at the end")
    axes.margins(x=0.12, y=0.12)


def speed(run: Run) -> Figure | str:
    """Loss against tokens of the arms that have a temperature, and the share of steps until it is
    near its end."""
    taus, steps = _end_temperatures(run), run.numbers("convergence.steps")
    arms = [arm for arm in run.arms if arm in {*taus, run.baseline} and (LOSS, arm) in run.curves]
    if not taus or not arms:
        return ""
    page = Page([["loss", "steps"]], 3.9, width_ratios=(1.6, 1))
    left, right = page.panels.values()
    draw_over_training(left, run, LOSS, {arm: run.curves[LOSS, arm] for arm in arms})
    log_axis(left, "y")
    unit, _ = token_unit(run, LOSS)
    for arm in arms:
        if arm in steps:
            tokens, middle, *_ = band(run.curves[LOSS, arm])
            reached = mean(steps[arm]) * tokens[-1]
            left.plot(
                reached / unit, np.interp(reached, tokens, middle),
                **arm_styles(run)[arm].marks(markersize=12, zorder=5),
            )  # fmt: skip
    left.set(title="Reconstruction loss", ylabel="FVU of the batch (share)")
    percent = {arm: [100 * value for value in steps[arm]] for arm in arms if arm in steps}
    _draw_against_temperature(right, run, taus, percent)
    right.set(title="Until within 2% of the end", ylabel="share of the steps (%)")
    return page.finish(
        f"{run.title} – loss against tokens by temperature",
        [
            f"Line: mean over {seeds_text([len(run.curves[LOSS, arm]) for arm in arms])} at"
            f" {l0_text(run)}; band and {RANGE}. Large marker: from there on the smoothed loss"
            " stays within 2% of its final value.",
            f"In % of the steps: {values_text(run, means_of(percent), '.0f')}.",
        ],
        legend(run, arms),
    )


def temperature(run: Run) -> Figure | str:
    """FVU against L0 of the arms that have a temperature, and FVU against temperature."""
    taus, numbers = _end_temperatures(run), run.numbers("fvu")
    arms = [arm for arm in run.arms if arm in {*taus, run.baseline} and arm in numbers]
    if not taus or not any(cell.arm in arms for cell in cells_of(run, "fvu")):
        return ""
    page = Page([["frontier", "tau"]], 3.9)
    left, right = page.panels.values()
    draw_against_l0(left, run, "fvu", arms)
    left.set(title="Frontier (lower is better)", ylabel="FVU (share)")
    _draw_against_temperature(right, run, taus, {arm: numbers[arm] for arm in arms})
    right.set(title=f"At {l0_text(run)}", ylabel="FVU (share)")
    texts = [f"{taus[arm]:.2g}: {mean(numbers[arm]):.4f}" for arm in sorted(
        (arm for arm in arms if arm in taus), key=lambda arm: taus[arm])]  # fmt: skip
    base = f"; baseline {mean(numbers[run.baseline]):.4f}" if run.baseline in numbers else ""
    return page.finish(
        f"{run.title} – reconstruction by temperature",
        [
            f"Small dots: cells; large: mean over {seeds_text_of(run, numbers)}; {RANGE}. Line"
            " and grey band: the baseline.",
            f"FVU by temperature: {', '.join(texts)}{base}.",
        ],
        legend(run, arms),
    )


#: Pictures of idea A by the name in their file names.
A_PICTURES: dict[str, Callable[[Run], Any]] = {
    "spread": spread,
    "thresholds": thresholds,
    "positions": positions,
    "sensitivity": sensitivity,
    "regulariser": regulariser,
    "speed": speed,
    "temperature": temperature,
}
