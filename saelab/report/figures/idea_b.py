"""Pictures of the measurements for idea B; each is drawn only for runs that have its data.

stability     loss over training, and spikes, rises, detrended spread and variation of the gradient
balance       alpha over training
similarity    both terms over training: raw, over their reference, and as a share of the gradient
latents       a moving k: latents in the similarity of codes, and latents per token of TopK
survival      lifetimes of latents, with the numbers at risk
consistency   decoder against its own past, and against other seeds by firing frequency
max_cosine    cosine of each latent's decoder row with the nearest other one
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from saelab.report.figures.agreement import agreements_text
from saelab.report.figures.axes import (
    RANGE,
    arm_values_text,
    counts_of,
    draw_by_arm,
    draw_over_training,
    draw_points,
    draw_seed_lines,
    l0_text,
    legend,
    mean,
    means_of,
    seeds_text,
    seeds_text_of,
    values_text,
)
from saelab.report.figures.style import Page, arm_styles, legend_name, log_axis
from saelab.report.run_data import Curve, Run
from saelab.runs.schema import PAIR

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

LOSS = "loss.reconstruction"
#: Metric -> title, label and factor of a panel of `stability`.
STEADY = {
    "spikes": ("Loss spikes", "number", 1.0),
    "stability.rise": ("Largest rise", "smoothed loss (%)", 100.0),
    "stability.detrended": ("Around the trend", "variance of log loss", 1.0),
    "stability.gradient_cv": ("Gradient norm", "sd / mean", 1.0),
}
#: Range outside of which a balance counts as collapsed (the gate's check).
INSIDE = (0.02, 0.98)
#: The penalty's reference window, as shares of the run: the defaults of `similarity`.
REFERENCE = (0.15, 0.2)
#: The two terms by the end of their names in the log.
TERMS = {"decoder": "decoder rows, S_w", "code": "codes, S_act"}
#: End of the names of logged numbers of latents, and unit of those that are an L0.
LATENTS, PER_TOKEN = ".k", "latents per token"
#: Panels of them at most.
MOST_LATENTS = 3
#: Ages whose numbers at risk are written, at most.
AGES = 6
GREY = "#555555"

#: Arm -> seed -> curve.
Curves = dict[str, dict[int, Curve]]


def _curves(run: Run, name: str) -> Curves:
    """Curves of the arms that log the scalar, in the run's order."""
    return {arm: run.curves[name, arm] for arm in run.arms if (name, arm) in run.curves}


def _moves(curves: Curves) -> bool:
    values = [curve.values for of_arm in curves.values() for curve in of_arm.values()]
    return any(np.ptp(of_cell) > 1e-6 * np.abs(of_cell).max() for of_cell in values)


def _draw_shared_line(axes: Axes, y: float, text: str) -> None:
    """Draws a dashed line with its name, for a value that all arms share."""
    axes.axhline(y, color=GREY, linewidth=1.2, linestyle=(0, (2, 2)), zorder=1)
    axes.annotate(
        text, (0.99, y), (0, -4), xycoords=("axes fraction", "data"), ha="right", va="top",
        textcoords="offset points", color=GREY,
    )  # fmt: skip


# ---------------------------------------------------------------- stability


def stability(run: Run) -> Figure | str:
    """Loss over training above, the measures of steadiness by arm below."""
    factors = {metric: factor for metric, (_, _, factor) in STEADY.items()}
    numbers = {
        metric: {arm: [factor * value for value in values] for arm, values in by_arm.items()}
        for metric, factor in factors.items()
        if (by_arm := _arm_numbers(run, metric))
    }
    curves = _curves(run, LOSS)
    if not numbers or not curves:
        return ""
    page = Page([["loss"] * len(numbers), list(numbers)], 6.0, height_ratios=(1.3, 1))
    axes = page.panels["loss"]
    draw_over_training(axes, run, LOSS, curves)
    log_axis(axes, "y")
    axes.set(title="Reconstruction loss", ylabel="FVU of the batch (share)")
    for metric, of_arms in numbers.items():
        axes, (title, label, _) = page.panels[metric], STEADY[metric]
        draw_by_arm(axes, run, of_arms)
        axes.set(title=title, ylabel=label)
        top = axes.dataLim.y1
        axes.set_ylim(-0.05 * (top or 1), 1.1 * (top or 1))  # markers at 0 stay whole
        axes.locator_params(axis="y", nbins=4)
    stopped = {arm: vs for arm, vs in _arm_numbers(run, "stability.nonfinite").items() if any(vs)}
    cells = [f"{legend_name(arm)}, {sum(vs):g} of {len(vs)} seeds" for arm, vs in stopped.items()]
    texts = [
        f"{name}: {values_text(run, means_of(numbers[metric]), form)}"
        for metric, name, form in (
            ("spikes", "Spikes", ".2g"),
            ("stability.rise", "largest rise in %", ".2g"),
        )
        if metric in numbers
    ]
    return page.finish(
        f"{run.title} – stability of training",
        [
            f"Line: mean over {seeds_text(counts_of(run, LOSS))} at {l0_text(run)}; band and"
            f" {RANGE}; dots: seeds. The measures leave out the first fifth of the run; a spike is"
            " above 5 median absolute deviations for at least 3 steps.",
            f"{'; '.join(texts)}.",
        ],
        legend(run, list(curves)),
        [f"Training stopped at a step that was not finite: {'; '.join(cells)}."] if cells else [],
    )


def _arm_numbers(run: Run, metric: str, slice: str = "") -> dict[str, list[float]]:
    """Numbers of the arms at the target L0, in the run's order, without the controls."""
    numbers = run.numbers(metric, slice)
    return {arm: numbers[arm] for arm in run.arms if arm in numbers}


# ---------------------------------------------------------------- balance


def balance(run: Run) -> Figure | str:
    """Alpha of every arm over training, between the two terms that its ends stand for.

    No bands: that of a frozen random alpha would cover all between its seeds' numbers.
    """
    curves = _curves(run, "alpha")
    if not _moves(curves):
        return ""
    page = Page([["alpha"]], 3.8)
    axes = page.panels["alpha"]
    last = draw_over_training(axes, run, "alpha", curves, banded=False)
    draw_seed_lines(axes, run, "alpha")
    axes.set_ylim(-0.02, 1.02)
    for low, high in ((-0.02, INSIDE[0]), (INSIDE[1], 1.02)):
        axes.axhspan(low, high, color="#BBBBBB", alpha=0.5, linewidth=0, zorder=0)
    axes.set(ylabel="alpha: 0 is decoder rows alone,\n1 is codes alone")
    return page.finish(
        f"{run.title} – the balance of both similarities over training",
        [
            f"Line: mean over {seeds_text(counts_of(run, 'alpha'))} at {l0_text(run)}; thin: seeds."
            " Grey: collapsed.",
            f"At the end: {arm_values_text(run, last, '.2f')}.",
        ],
        legend(run, list(curves)),
    )


# ---------------------------------------------------------------- similarity


def similarity(run: Run) -> Figure | str:
    """Draws a column for each term; rows: as logged, over the reference, share of the gradient."""
    raw = {term: _curves(run, f"similarity.{term}") for term in TERMS}
    raw = {term: curves for term, curves in raw.items() if curves}
    if not raw:
        return ""
    rows = ("raw", "relative", "share")
    page = Page([[f"{row} {term}" for term in raw] for row in rows], 8.1)
    last: dict[str, dict[str, float]] = {}
    for term, curves in raw.items():
        name = f"similarity.{term}"
        axes = page.panels[f"raw {term}"]
        draw_over_training(axes, run, name, curves)
        _start_axis_at_zero(axes, curves)
        axes.set_title(f"Similarity of {TERMS[term]}")
        axes = page.panels[f"relative {term}"]
        relative = _divide_by_reference(curves)
        last[term] = draw_over_training(axes, run, name, relative)
        _start_axis_at_zero(axes, relative)
        axes.axhline(1, color=GREY, linewidth=1.2, linestyle=(0, (2, 2)), zorder=1)
        axes.set_title("Over its reference")
        axes = page.panels[f"share {term}"]
        weights = "W_dec" if term == "decoder" else "W_enc"
        draw_over_training(axes, run, name, _to_percent(_curves(run, f"penalty_share.{term}")))
        axes.set_title(f"Of the gradient at {weights}")
    labels = ("mean squared", "share of reference", "penalty's share (%)")
    for row, label in zip(rows, labels, strict=True):
        page.panels[f"{row} {next(iter(raw))}"].set_ylabel(label)
    ends = [f"{TERMS[term]} {arm_values_text(run, means, '.2f')}" for term, means in last.items()]
    arms = [arm for arm in run.arms if any(arm in curves for curves in raw.values())]
    counts = [count for term in raw for count in counts_of(run, f"similarity.{term}")]
    return page.finish(
        f"{run.title} – the similarity penalty and its terms",
        [
            f"Line: mean over {seeds_text(counts)} at {l0_text(run)}; band: lowest to highest seed."
            " S_w: the squared cosine of a decoder row with its nearest; S_act: squared"
            " correlation of codes, by the arm's own statistics. The reference is the mean from"
            f" {100 * REFERENCE[0]:g}% to {100 * REFERENCE[1]:g}% of the run; from there on the"
            " penalty acts. Axes fit the time since then.",
            f"At the end, as a share of the reference: {'; '.join(ends)}.",
        ],
        legend(run, arms),
    )


def _start_axis_at_zero(axes: Axes, curves: Curves) -> None:
    """Limits the y axis to 0 and the largest value since the reference window."""
    late = [
        curve.values[curve.tokens > REFERENCE[0] * curve.tokens[-1]].max()
        for cells in curves.values()
        for curve in cells.values()
    ]
    top = max([*late, 1e-12])
    axes.set_ylim(-0.04 * top, 1.08 * top)


def _divide_by_reference(curves: Curves) -> Curves:
    """Divides each curve by its mean in the reference window."""
    relative: Curves = {}
    for arm, cells in curves.items():
        for seed, curve in cells.items():
            share = curve.tokens / curve.tokens[-1] - 1e-3  # a point is the end of its bin
            inside = (share > REFERENCE[0]) & (share <= REFERENCE[1])
            level = float(curve.values[inside].mean()) if inside.any() else 0.0
            if level > 0:
                relative.setdefault(arm, {})[seed] = Curve(curve.tokens, curve.values / level)
    return relative


def _to_percent(curves: Curves) -> Curves:
    return {
        arm: {seed: Curve(curve.tokens, 100 * curve.values) for seed, curve in cells.items()}
        for arm, cells in curves.items()
    }


# ---------------------------------------------------------------- latents


def latents(run: Run) -> Figure | str:
    """Draws a panel for each k that moves in at least one arm."""
    names = sorted({name for name, _ in run.curves if name.endswith(LATENTS)})
    all_moving = [name for name in names if _moves(_curves(run, name))]
    moving = {name: _curves(run, name) for name in all_moving[:MOST_LATENTS]}
    if not moving:
        return ""
    page = Page([list(moving)], 3.6)
    ends, arms = [], []
    for name, curves in moving.items():
        axes = page.panels[name]
        last = draw_over_training(axes, run, name, curves)
        draw_seed_lines(axes, run, name)
        meaning = run.meaning(name)
        axes.set(title=f"{meaning[0].upper()}{meaning[1:]}", ylabel="k (latents)")
        axes.set_ylim(bottom=0)
        ends.append(f"{meaning}: {arm_values_text(run, last, '.0f')}")
        arms += list(curves)
        if run.unit(name) == PER_TOKEN and run.target_l0:
            _draw_shared_line(axes, run.target_l0, f"L0 {run.target_l0:g}")
    counts = [count for name in moving for count in counts_of(run, name)]
    return page.finish(
        f"{run.title} – k over training",
        [
            f"Line: mean over {seeds_text(counts)} at {l0_text(run)}; thin: seeds; band: their"
            " range.",
            f"At the end, {'; '.join(ends)}.",
        ],
        legend(run, arms),
    )


# ---------------------------------------------------------------- survival


def survival(run: Run) -> Figure | str:
    """Kaplan-Meier curves by arm, and below them the lives at risk."""
    curves = _by_number(run, "lifetime.survival")
    at_risk = _by_number(run, "lifetime.at_risk")
    if not curves:
        return ""
    page = Page([["survival"], ["risk"]], 4.0 + 0.22 * len(curves),
                height_ratios=(3.4, 0.5 + 0.22 * len(curves)), sharex=True)  # fmt: skip
    axes, below = page.panels.values()
    ends = {}
    for i, (arm, points) in enumerate(curves.items()):
        look, ages = arm_styles(run)[arm], np.array([0.0, *points])
        middle = np.array([1.0, *(mean(values) for values in points.values())])
        low, high = (np.array([1.0, *map(end, points.values())]) for end in (min, max))
        every = max(1, len(ages) // 6)
        axes.step(
            100 * ages, 100 * middle, where="post",
            **look.line(markevery=(i * every // len(curves), every)),
        )  # fmt: skip
        axes.fill_between(
            100 * ages, 100 * low, 100 * high, step="post", label=arm, color=look.color,
            alpha=0.14, linewidth=0,
        )  # fmt: skip
        ends[arm] = 100 * float(middle[-1])
    axes.set_ylim(0, 102)
    axes.set_ylabel("latents' lives not ended (%)")
    _draw_numbers_at_risk(below, run, {arm: at_risk[arm] for arm in curves if arm in at_risk})
    counts = [len(values) for points in curves.values() for values in points.values()]
    return page.finish(
        f"{run.title} – lifetimes of latents",
        [
            f"Kaplan-Meier estimate: mean over {seeds_text(counts)} at {l0_text(run)}; band: lowest"
            " to highest seed. A life begins with the run or with a resampling, and ends after a"
            " silence longer than the patience that its age gives.",
            f"At the last age, in %: {arm_values_text(run, ends, '.0f')}.",
        ],
        legend(run, list(curves)),
    )


def _draw_numbers_at_risk(axes: Axes, run: Run, numbers: Mapping[str, Mapping[float, Any]]) -> None:
    """Writes a row of numbers for each arm, in its colour, at up to `AGES` ages."""
    ages = sorted({age for points in numbers.values() for age in points})
    for y, (arm, points) in enumerate(numbers.items()):
        for age in ages[:: -(-len(ages) // AGES)]:
            if age in points:
                axes.text(100 * age, y, f"{mean(points[age]):.0f}", va="center", ha="center",
                          fontsize=9.5, label=arm, color=arm_styles(run)[arm].color)  # fmt: skip
    axes.set_yticks(range(len(numbers)), [legend_name(arm) for arm in numbers])
    axes.tick_params(axis="y", length=0, labelsize=9.5)
    axes.set_ylim(len(numbers) - 0.4, -0.6)
    axes.set(title="Lives at risk (mean over seeds)", xlabel="age (% of the run)")
    axes.set_xlim(-2, 102)
    axes.grid(visible=False)
    axes.spines["left"].set_visible(False)


# ---------------------------------------------------------------- slices that are numbers


def _slices(run: Run, metric: str) -> dict[float, str]:
    """Number -> slice, ascending, of the slices 'name=number' of a metric."""
    slices = {}
    for name, slice in run.values:
        if name == metric and "=" in slice and "," not in slice and not slice.startswith(PAIR):
            value = slice.partition("=")[2]
            try:
                slices[float(value)] = slice
            except ValueError:  # a bin with a name
                continue
    return dict(sorted(slices.items()))


def _by_number(run: Run, metric: str) -> dict[str, dict[float, list[float]]]:
    """Arm -> number of the slice -> values of the seeds."""
    by_arm: dict[str, dict[float, list[float]]] = {}
    for x, slice in _slices(run, metric).items():
        for arm, values in _arm_numbers(run, metric, slice).items():
            by_arm.setdefault(arm, {})[x] = values
    return {arm: by_arm[arm] for arm in run.arms if arm in by_arm}


# ---------------------------------------------------------------- consistency


def consistency(run: Run) -> Figure | str:
    """Matched cosine of snapshots with the end of the run, and of seeds with each other."""
    past, seeds = _by_number(run, "consistency.snapshots"), _frequencies(run)
    if not past and not seeds:
        return ""
    page = Page([[*["past"] * bool(past), *["seeds"] * bool(seeds)]], 3.8)
    chance = [v for values in _arm_numbers(run, "consistency.chance").values() for v in values]
    if past:
        axes = page.panels["past"]
        tokens = [x for points in past.values() for x in points]
        unit, name = (1e6, "million") if max(tokens) >= 2e5 else (1e3, "thousand")
        for arm, points in past.items():
            scaled = {x / unit: values for x, values in points.items()}
            draw_points(axes, arm_styles(run)[arm], scaled)
        axes.set(title="Snapshot against the end of the run", ylabel="matched |cosine| (mean)")
        axes.set_xlabel(f"snapshot taken at ({name} tokens)")
    if seeds:
        axes, bins = page.panels["seeds"], list(seeds)
        drawn = [arm for arm in run.arms if any(arm in numbers for numbers in seeds.values())]
        for i, arm in enumerate(drawn):
            points = {x: seeds[b][arm] for x, b in enumerate(bins) if arm in seeds[b]}
            draw_points(axes, arm_styles(run)[arm], points, 0.5 * ((i + 0.5) / len(drawn) - 0.5))
        axes.set_xticks(range(len(bins)), bins)
        axes.tick_params(axis="x", labelsize=9 if len(bins) > 6 else 11)
        axes.grid(axis="x", visible=False)
        axes.set(title="Between seeds, by firing frequency", xlabel="log10 of firing share, from")
        if not past:
            axes.set_ylabel("matched |cosine| (mean)")
    for axes in page.panels.values():
        axes.set_ylim(0, 1.04)
        if chance:
            _draw_shared_line(axes, mean(chance), "chance")
    whole = _arm_numbers(run, "consistency.seeds")
    overall = values_text(run, means_of(whole))
    chances = f" Chance, {mean(chance):.3f}: random dictionaries of that shape." if chance else ""
    counts = [len(vs) for points in past.values() for vs in points.values()]
    counts += [len(vs) for numbers in seeds.values() for vs in numbers.values()]
    return page.finish(
        f"{run.title} – consistency of the decoder",
        [
            "Rows of two decoders are assigned to each other, each at most once. Mean over"
            f" {seeds_text(counts)} at {l0_text(run)}; {RANGE}.{chances}",
            f"Between seeds, over all latents: {overall}"
            f"{agreements_text(run, 'consistency.seeds')}."
            if whole
            else "",
        ],
        legend(run, [*past, *(arm for numbers in seeds.values() for arm in numbers)]),
    )


def _frequencies(run: Run) -> dict[str, dict[str, list[float]]]:
    """Name of a bin -> arm -> values; latents that never fire come first."""
    metric, prefix = "consistency.seeds", "frequency="
    numbered = {f"{x:g}": slice for x, slice in _slices(run, metric).items()}
    others = [
        slice
        for name, slice in run.values
        if name == metric and slice.startswith(prefix) and slice not in numbered.values()
    ]
    named = {slice.removeprefix(prefix): slice for slice in others}
    bins = {name: _arm_numbers(run, metric, slice) for name, slice in (named | numbered).items()}
    return {name: numbers for name, numbers in bins.items() if numbers}


# ---------------------------------------------------------------- largest cosine


def max_cosine(run: Run) -> Figure | str:
    """Share of latents by the cosine of their decoder row with its nearest."""
    bins = _by_number(run, "decoder.max_cosine")
    if not bins:
        return ""
    lows = sorted({low for points in bins.values() for low in points})
    width = min(np.diff(lows)) if len(lows) > 1 else 0.05
    grid = np.arange(lows[0], lows[-1] + width / 2, width)
    page = Page([["cosine"]], 3.8)
    axes, near = page.panels["cosine"], {}
    for i, (arm, points) in enumerate(bins.items()):
        look = arm_styles(run)[arm]
        by_bin = {round(low / width): 100 * mean(values) for low, values in points.items()}
        shares = np.array([by_bin.get(round(low / width), 0.0) for low in grid])
        axes.stairs(
            shares, np.append(grid, grid[-1] + width), baseline=None, label=arm,
            color=look.color, linestyle=look.dashes, linewidth=look.width, zorder=look.zorder,
        )  # fmt: skip
        marked = (np.arange(len(grid)) % 3 == i % 3) & (shares > 0.03 * shares.max())
        axes.plot(grid[marked] + width * (i + 0.5) / len(bins), shares[marked], **look.marks())
        near[arm] = float(sum(shares[grid > 0.5 - width / 2]))
    numbers = _arm_numbers(run, "decoder.max_cosine") or _first_values(bins)
    axes.set_ylim(bottom=0)
    axes.set(xlabel="largest cosine with another decoder row",
             ylabel=f"latents per bin of {width:.2g} (%)")  # fmt: skip
    return page.finish(
        f"{run.title} – cosines of decoder rows with their nearest",
        [
            f"Mean over {seeds_text_of(run, numbers)} at {l0_text(run)}.",
            "Latents with a neighbour of cosine 0.5 or more, in %:"
            f" {values_text(run, near, '.1f')}.",
        ],
        legend(run, list(bins)),
    )


def _first_values(
    points: Mapping[str, Mapping[float, Sequence[float]]],
) -> dict[str, Sequence[float]]:
    return {arm: next(iter(of_arm.values())) for arm, of_arm in points.items()}


#: Pictures of idea B by the name in their file names.
B_PICTURES: dict[str, Callable[[Run], Any]] = {
    "stability": stability,
    "balance": balance,
    "similarity": similarity,
    "latents": latents,
    "survival": survival,
    "consistency": consistency,
    "max_cosine": max_cosine,
}
