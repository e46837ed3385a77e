"""Pictures of a study, drawn from its run folders alone; plot.py calls `draw`.

    loss             reconstruction loss and L0 over training
    frontier         FVU, loss recovered and the rise of the loss, against L0
    probing          sparse probing accuracy by k, next to the model's own channels
    probing_entries  the same at k = 5, entry by entry
    density          how often latents fire
    scalars          learned scalars over training
    verdict          paired difference from the baseline
    forest           effects in every setting, their mean, and what a new one may show
    placement        arms and controls between a frozen random decoder and the baseline
    ...              measurements of the ideas: idea_a.py, idea_b.py

Bands and bars go from the lowest to the highest seed, except in the verdict (95% t interval). The
texts above the panels hold the main numbers. A note in the picture says what is missing, and why.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from saelab.errors import SaelabError, SourceError
from saelab.report.figures.axes import (
    NAMES,
    counts_of,
    draw_by_arm,
    draw_over_training,
    draw_seed_lines,
    l0_text,
    lost_cells,
    means_of,
    seeds_text,
    values_text,
)
from saelab.report.figures.forest import forest
from saelab.report.figures.frontier import frontier
from saelab.report.figures.idea_a import A_PICTURES
from saelab.report.figures.idea_b import B_PICTURES
from saelab.report.figures.placement import placement
from saelab.report.figures.probing import probing, probing_entries
from saelab.report.figures.style import (
    STYLE,
    Page,
    arm_styles,
    handle,
    legend_name,
    save,
    wrap,
)
from saelab.report.figures.training import loss
from saelab.report.run_data import Run, load
from saelab.runs.schema import OLD_WORDS
from saelab.runtime.cores import usable_cores
from saelab.runtime.safe_text import visible
from saelab.runtime.signals import exit_on_signal

if TYPE_CHECKING:
    from matplotlib.artist import Artist
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

#: Width of a bin of the density histogram, in log10 of the firing share.
BIN = 0.25
#: Panels of scalars at most: more can't be read on one page.
MOST_SCALARS = 12
#: Runs from which on further processes are worth their start. Our choice.
MANY = 4
WORDS = ("helps", "hurts", "equivalent", "cannot tell yet", "refused")

#: Draws a figure, or returns the reason why there is none; '' where nobody would expect one.
Picture = Callable[[Run], "Figure | str"]

# ---------------------------------------------------------------- the front door


@exit_on_signal()
def draw(labels: Mapping[str, str]) -> None:
    """Draws all runs of the current directory; this is the whole of plot.py.

    Prints a line for every picture; the line of one that can't be drawn goes to stderr.

    Args:
        labels: run folder -> title; other runs are left out.

    Raises: SystemExit with code 2 when there is no run, or the error's code when a run is damaged.
    """
    code = 0
    try:
        folders = find_runs(Path(), labels)
    except SaelabError as error:
        print(error, file=sys.stderr)
        raise SystemExit(error.exit_code) from None
    for lines, error, exit_code in _draw_runs([(f, labels[f.name]) for f in folders]):
        for line, drawn in lines:
            print(visible(line), file=sys.stdout if drawn else sys.stderr, flush=True)
        if exit_code:
            print(error, file=sys.stderr)
            code = exit_code
    if code:
        raise SystemExit(code)


#: Lines of one run as `draw_run` yields them; the error that ended it, and its exit code.
Drawn = tuple[list[tuple[str, bool]], str, int]


def _draw_runs(work: Sequence[tuple[Path, str]]) -> Iterator[Drawn]:
    """Draws runs (folder and title) in their order; many of them on all cores, a run on one."""
    processes = min(len(work), usable_cores())
    if len(work) < MANY or processes < 2:
        yield from map(_draw_with_errors, work)
        return
    with ProcessPoolExecutor(processes, get_context("spawn")) as pool:
        yield from pool.map(_draw_with_errors, work)


def _draw_with_errors(run: tuple[Path, str]) -> Drawn:
    folder, title = run
    lines: list[tuple[str, bool]] = []
    try:
        for line in draw_run(load(folder, title), Path()):
            lines.append(line)
    except SaelabError as error:
        return lines, str(error), error.exit_code
    return lines, "", 0


def find_runs(where: Path, labels: Mapping[str, str]) -> list[Path]:
    """Lists the run folders that hold a final_info.json and are in `labels`, in that order.

    Raises: SourceError when there is none.
    """
    complete = {file.parent.name: file.parent for file in where.glob("run_*/final_info.json")}
    if folders := [complete[name] for name in labels if name in complete]:
        return folders
    remedy = (
        f"add one of {', '.join(sorted(complete))} to `labels` in plot.py"
        if complete
        else "start `python experiment.py --out_dir=run_0` here first"
    )
    raise SourceError(f"no run_* folder with a final_info.json that is in `labels`: {remedy}")


def draw_run(run: Run, where: Path, names: Collection[str] = ()) -> Iterator[tuple[str, bool]]:
    """Draws one run as <run>_<picture>.png and .svg.

    Args:
        run: read from its folder.
        where: folder for the files.
        names: of the pictures; all of them where none is named.

    Yields: for each picture one line to print, and whether it was written.
    """
    import matplotlib

    for name, picture in PICTURES.items():
        if names and name not in names:
            continue
        with matplotlib.rc_context(cast(Any, STYLE)):
            figure = picture(run)
            if not isinstance(figure, str):
                save(figure, where / f"{run.name}_{name}")
        if figure == "":
            continue
        if isinstance(figure, str):
            yield f"{run.name}: no {name} picture, {figure}", False
        else:
            yield f"{run.name}_{name}.png", True


# ---------------------------------------------------------------- over training


def scalars(run: Run) -> Figure | str:
    """Learned scalars over training; a constant one is given as a number in a note."""
    moving, still = [], []
    for name in run.scalars:
        values = [
            curve.values
            for (n, arm), cells in run.curves.items()
            if n == name and arm in run.arms
            for curve in cells.values()
        ]
        if any(np.ptp(of_cell) > 1e-6 * np.abs(of_cell).max() for of_cell in values):
            moving.append(name)
        elif values:
            low, high = (f(of_cell[0] for of_cell in values) for f in (min, max))
            still.append(f"{name} ({low:.3g}{f' to {high:.3g}, by arm' if high > low else ''})")
    if not moving:
        logged = f"logged: {', '.join(run.scalars) or 'none'}"
        return f"no learned scalar moves in any arm ({logged}{_moving_by_rule(run)})"
    moving, others = moving[:MOST_SCALARS], moving[MOST_SCALARS:]
    rows = -(-len(moving) // 3)
    columns = -(-len(moving) // rows)
    cells = [*moving, *["."] * (rows * columns - len(moving))]
    page = Page([cells[i * columns : (i + 1) * columns] for i in range(rows)], 3.4 * rows)
    arms: dict[str, None] = {}
    ends = []
    for name, axes in page.panels.items():
        last = draw_over_training(axes, run, name)
        draw_seed_lines(axes, run, name)
        axes.set_title(visible(name))
        axes.set_ylabel(f"{visible(name)} ({run.unit(name) or 'no unit'})")
        arms |= dict.fromkeys(last)
        ends.append(f"{name} {values_text(run, last, '.3g').removeprefix('others ')}")
    counts = [count for name in moving for count in counts_of(run, name)]
    texts = {visible(name): run.meaning(name) for name in moving}
    said = [f"{name}: {text}" for name, text in texts.items() if text != name]
    return page.finish(
        f"{run.title} – learned scalars over training",
        [
            f"Line: mean over {seeds_text(counts)} at {l0_text(run)}; thin: seeds; band: their"
            " range.",
            f"At the end: {'; '.join(ends)}.",
        ],
        [handle(arm, arm_styles(run)[arm]) for arm in run.arms if arm in arms],
        [
            *[f"Constant over training and not drawn: {', '.join(still)}."] * bool(still),
            *[f"Not drawn for lack of room: {visible(', '.join(others))}."] * bool(others),
            *[f"{'; '.join(said)}."] * bool(said),
        ],
    )


def _moving_by_rule(run: Run) -> str:
    """Names the k that a rule moves without being learned, with its first and last values."""
    ends: dict[str, tuple[float, float]] = {}
    for (name, arm), cells in run.curves.items():
        values = next(iter(cells.values())).values
        others = name not in run.scalars and arm in run.arms and run.unit(name)
        if others and np.ptp(values) > 1e-6 * np.abs(values).max():
            ends.setdefault(name, (float(values[0]), float(values[-1])))
    texts = [f"{name} from {first:.4g} to {last:.4g}" for name, (first, last) in ends.items()]
    return f"; moved by a rule: {', '.join(texts)}" if texts else ""


# ---------------------------------------------------------------- density


def density(run: Run) -> Figure | str:
    """Share of latents by how often they fire, and the share that never fires."""
    never, bins = _histograms(run)
    if not bins:
        return f"no histogram: {run.reason('density_histogram', 'log10_density=never')}"
    page = Page([["never", "fired"]], 3.7, width_ratios=(1, 2.6))
    left, right = page.panels.values()
    style = arm_styles(run)
    percent = {arm: [100 * share for share in never[arm]] for arm in bins if arm in never}
    draw_by_arm(left, run, percent)
    edges = [edge for of_arm in bins.values() for edge in of_arm]
    grid = np.arange(min(edges), max(edges) + BIN / 2, BIN)
    for i, arm in enumerate(bins):
        shares = np.array([100 * bins[arm].get(round(edge, 2), 0.0) for edge in grid])
        look = style[arm]
        right.stairs(
            shares, np.append(grid, grid[-1] + BIN), baseline=None, label=look.name,
            color=look.color, linestyle=look.dashes, linewidth=look.width, zorder=look.zorder,
        )  # fmt: skip
        marked = (np.arange(len(grid)) % 4 == i % 4) & (shares > 0.03 * shares.max())
        where = grid[marked] + BIN * (i + 0.5) / len(bins)
        right.plot(where, shares[marked], **look.marks())
    left.set_title("Never fired")
    left.set_ylabel("share of latents (%)")
    highest = max((max(values) for values in percent.values()), default=0)
    left.set_ylim(bottom=-0.04 * (highest or 1))  # room for the marker of an arm at 0
    right.set_ylim(bottom=0)
    right.set_title("Fired at least once")
    right.set_xlabel("log10 of the share of tokens on which a latent fires")
    right.set_ylabel(f"share of latents per bin of {BIN:g} (%)")
    counts = [len(values) for values in percent.values()] or [1]
    return page.finish(
        f"{run.title} – how often latents fire",
        [
            f"Mean over {seeds_text(counts)} at {l0_text(run)}; dots: seeds; bars: lowest to"
            " highest.",
            f"Never fired, in % of latents: {values_text(run, means_of(percent), '.1f')}.",
        ],
        [handle(arm, style[arm]) for arm in bins],
        lost_cells(run, "density_histogram", "log10_density=never"),
    )


def _histograms(run: Run) -> tuple[dict[str, list[float]], dict[str, dict[float, float]]]:
    """Share that never fires, by arm and seed; mean share, by arm and left edge of the bin.

    A bin that a cell has no row for is empty.
    """
    metric, prefix = "density_histogram", "log10_density="
    by_edge = {
        slice.removeprefix(prefix): run.numbers(metric, slice)
        for name, slice in run.values
        if name == metric and slice.startswith(prefix)
    }
    never = by_edge.pop("never", {})
    bins: dict[str, dict[float, float]] = {}
    for arm in run.arms:
        seeds = max((len(numbers.get(arm, ())) for numbers in by_edge.values()), default=0)
        if seeds:
            bins[arm] = {
                round(float(edge), 2): sum(numbers.get(arm, ())) / seeds
                for edge, numbers in by_edge.items()
            }
    return never, bins


# ---------------------------------------------------------------- verdict


def verdict(run: Run) -> Figure | str:
    """Paired difference of the primary metric from the baseline, with its 95% interval."""
    metric = _primary(run)
    arms = [
        arm for arm in run.arms if f"verdict.{metric}" in run.info.get(arm, {}).get("means", {})
    ]
    if not arms:
        return "final_info.json holds no verdict"
    page = Page([["differences"]], max(1.9, 0.42 * len(arms) + 1.0))
    axes = page.panels["differences"]
    words = []
    for y, arm in enumerate(arms):
        means, look = run.info[arm]["means"], arm_styles(run)[arm]
        word = str(means[f"verdict.{metric}"] or "no word")
        words.append(OLD_WORDS.get(word, word))
        middle, low, high = (means.get(f"diff.{metric}{end}") for end in ("", ".low", ".high"))
        if middle is not None:
            axes.plot(middle, y, **look.marks(markersize=9))
        if low is not None and high is not None:
            axes.hlines(y, low, high, label=arm, color=look.color, linewidth=2.2, zorder=3)
            axes.plot(
                [low, high], [y, y], linestyle="", marker="|", markersize=10, label=arm,
                color=look.color,
            )  # fmt: skip
        axes.text(1.02, y, words[-1], label=arm, transform=axes.get_yaxis_transform(), va="center",
                  fontweight="bold" if words[-1] in ("helps", "hurts") else "normal")  # fmt: skip
    axes.axvline(0, color="black", linewidth=1.2, zorder=2)
    handles = _shade_interest(axes, run)
    axes.set_yticks(range(len(arms)), ["\n".join(wrap(legend_name(arm), 2.7)) for arm in arms])
    axes.set_ylim(len(arms) - 0.5, -0.5)
    axes.margins(x=0.06)
    axes.locator_params(axis="x", nbins=6)
    axes.grid(axis="y", visible=False)
    name = NAMES.get(metric, metric.replace("_", " "))
    better = {"lower": "; left of 0 is better", "higher": "; right of 0 is better"}
    axes.set_xlabel(
        f"{name}, arm minus baseline{better.get(run.manifest.get('direction', ''), '')}"
    )
    counts = [f"{word} {words.count(word)}" for word in WORDS if word in words]
    return page.finish(
        f"{run.title} – {name} against the baseline: {', '.join(counts)}",
        [
            f"Mean difference at {l0_text(run)} with the interval that the word is chosen by, which"
            " covers SAE initialisation and data order, not other models or texts. All intervals"
            " of the run hold together."
        ],
        handles,
    )


def _primary(run: Run) -> str:
    """Name of the metric that was judged."""
    if recorded := run.manifest.get("primary"):
        return recorded
    keys = [key for arm in run.arms for key in run.info.get(arm, {}).get("means", {})]
    return next((key.removeprefix("verdict.") for key in keys if key.startswith("verdict.")), "fvu")


def _shade_interest(axes: Axes, run: Run) -> list[Artist]:
    """Shades the smallest effect of interest where the manifest has one."""
    sesoi = run.manifest.get("sesoi")
    if not sesoi:
        return []
    label = f"smaller than the smallest effect of interest (±{sesoi:g})"
    return [axes.axvspan(-sesoi, sesoi, color="#BBBBBB", alpha=0.4, linewidth=0, label=label)]


#: File name of a picture, without run and ending -> the picture.
PICTURES: dict[str, Picture] = {
    "loss": loss,
    "frontier": frontier,
    "probing": probing,
    "probing_entries": probing_entries,
    "density": density,
    "scalars": scalars,
    "verdict": verdict,
    "forest": forest,
    "placement": placement,
    **A_PICTURES,
    **B_PICTURES,
}
