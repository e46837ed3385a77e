"""Sparse probing accuracy by the number of latents, and entry by entry."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

from saelab.report.figures.axes import (
    draw_by_arm,
    draw_points,
    l0_text,
    lost_cells,
    mean,
    means_of,
    seeds_text,
    values_text,
)
from saelab.report.figures.style import ArmStyle, Page, arm_styles, handle, legend_name, wrap
from saelab.report.run_data import Run

if TYPE_CHECKING:
    from matplotlib.artist import Artist
    from matplotlib.figure import Figure

#: The k that is shown entry by entry.
ENTRY_K = 5


def _accuracies(run: Run, subject: str, k: int, slice: str = "") -> list[float]:
    """Test accuracies of an arm or control by seed; k = 0 is the probe of all columns."""
    part = f"top_{k}_" if k else ""
    for prefix in ("sae", "llm"):
        if accuracies := run.numbers(f"{prefix}_{part}test_accuracy", slice).get(subject):
            return accuracies
    return []


def _measured_ks(run: Run) -> list[int]:
    """Values of k that were measured, ascending, and 0 for the full probe at the end."""
    ks = set()
    for metric, slice in run.values:
        words = metric.split("_")
        if not slice and words[0] in ("sae", "llm") and words[-2:] == ["test", "accuracy"]:
            if words[1] == "top" and len(words) == 5:
                ks.add(int(words[2]))
            elif len(words) == 3:
                ks.add(0)
    return sorted(ks, key=lambda k: k or sys.maxsize)


def probing(run: Run) -> Figure | str:
    """Accuracy of k-sparse probes by k, for arms and controls."""
    ks = _measured_ks(run)
    by_subject = {
        subject: {x: numbers for x, k in enumerate(ks) if (numbers := _accuracies(run, subject, k))}
        for subject in (*run.arms, *run.controls)
    }
    by_subject = {subject: points for subject, points in by_subject.items() if points}
    if not any(subject in run.arms for subject in by_subject):
        return f"no arm was probed: {run.reason('sae_test_accuracy')}"
    page = Page([["by k"]], 3.9)
    axes = page.panels["by k"]
    for i, (subject, points) in enumerate(by_subject.items()):
        dodge = 0.6 * ((i + 0.5) / len(by_subject) - 0.5)
        draw_points(axes, arm_styles(run)[subject], points, dodge)
    axes.set_xticks(range(len(ks)), [f"{k}" if k else "all" for k in ks])
    axes.set_xlim(-0.5, len(ks) - 0.5)
    axes.grid(axis="x", visible=False)
    for x in range(len(ks) - 1):
        axes.axvline(x + 0.5, color="#EEEEEE", linewidth=0.8, zorder=0)
    axes.set_xlabel("k (latents, or channels of the model, that the probe may use)")
    axes.set_ylabel("test accuracy (mean over entries)")
    if axes.get_ylim()[0] < 0.53:
        axes.axhline(0.5, color="#555555", linewidth=1, linestyle=(0, (1, 2)))
        axes.annotate(
            "chance", (0.01, 0.5), (0, 3), xycoords=("axes fraction", "data"),
            textcoords="offset points", color="#555555",
        )  # fmt: skip
    k = ENTRY_K if ENTRY_K in ks else ks[0]
    means = means_of({s: values for s in by_subject if (values := _accuracies(run, s, k))})
    controls = [f"{legend_name(c)} {means[c]:.3f}" for c in run.controls if c in means]
    counts = [len(values) for s in run.arms for values in by_subject.get(s, {}).values()]
    at_k = f"At k = {k}: " if k else "All latents: "
    return page.finish(
        f"{run.title} – sparse probing accuracy by number of latents",
        [
            f"Mean over {seeds_text(counts)} at {l0_text(run)}; bars: lowest to highest seed.",
            f"{at_k}{', '.join([values_text(run, means), *controls])}.",
        ],
        [handle(subject, arm_styles(run)[subject]) for subject in by_subject],
        lost_cells(run, f"sae_top_{k}_test_accuracy" if k else "sae_test_accuracy"),
    )


def probing_entries(run: Run) -> Figure | str:
    """Accuracy at one k for every entry: one panel each, one line per arm."""
    entries = _entries(run)
    if not entries:
        return "metrics.parquet has no accuracies of single entries"
    columns = min(4, len(entries))
    cells = [*entries, *["."] * (-len(entries) % columns)]
    mosaic = [cells[i : i + columns] for i in range(0, len(cells), columns)]
    page = Page(mosaic, 1.95 * len(mosaic) + 0.1)
    style, metric = arm_styles(run), f"sae_top_{ENTRY_K}_test_accuracy"
    lines: dict[str, ArmStyle] = {}
    for entry, axes in page.panels.items():
        draw_by_arm(axes, run, run.numbers(metric, f"entry={entry}"), dots=False)
        for control in run.controls:
            if values := _accuracies(run, control, ENTRY_K, f"entry={entry}"):
                look = lines.setdefault(control, style[control])
                axes.axhline(
                    mean(values), label=look.name, color=look.color, linestyle=look.dashes,
                    linewidth=2,
                )  # fmt: skip
        axes.set_title("\n".join(wrap(entry.replace("_", " "), 1.35)))
        axes.locator_params(axis="y", nbins=4)
    for row in mosaic:
        page.panels[row[0]].set_ylabel("test accuracy")
    numbers = run.numbers(metric)
    counts = [len(numbers[arm]) for arm in run.arms if arm in numbers] or [1]
    return page.finish(
        f"{run.title} – sparse probing accuracy by entry, k\u00a0=\u00a0{ENTRY_K}",
        [
            f"Mean over {seeds_text(counts)} at {l0_text(run)}; bars: lowest to highest seed."
            " Each panel has its own axis."
        ],
        [
            *[handle(arm, style[arm], line=False) for arm in run.arms],
            *[_line_only(control, look) for control, look in lines.items()],
        ],
        lost_cells(run, metric),
    )


def _entries(run: Run) -> list[str]:
    """Entries on which an arm or control was probed at `ENTRY_K`, in the order of the file."""
    metric = f"sae_top_{ENTRY_K}_test_accuracy"
    return [
        slice.removeprefix("entry=")
        for name, slice in run.values
        if name == metric and slice.startswith("entry=") and run.numbers(metric, slice)
    ]


def _line_only(name: str, look: ArmStyle) -> Artist:
    from matplotlib.lines import Line2D

    return Line2D(
        [], [], color=look.color, linestyle=look.dashes, linewidth=2, label=legend_name(name)
    )
