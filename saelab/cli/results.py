"""Commands that show finished runs: verdict, difference, probing, report."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from typer import Argument, Option

from saelab.cli.common import Folders, Json, OwnParts, register_parts, show
from saelab.runtime.counting import count


def verdict(
    folders: Folders = None,
    json_: Json = False,
    simulate: Annotated[
        bool, Option("--simulate", help="Check the rules on simulated cells instead.")
    ] = False,
    simulations: Annotated[int, Option(help="Simulated runs per row, at least 100.")] = 20_000,
) -> None:
    """Judge finished runs from their files: differences, intervals, p and the four words."""
    if simulate:
        _simulate(simulations, json_)
        return
    from saelab.verdict.review import chosen_runs, counted, review_all, text

    reviews = review_all(chosen_runs(folders))
    texts = [*map(text, reviews), *filter(None, [counted(reviews)])]
    show(json_, [review.as_dict() for review in reviews], texts, "\n\n")


def _simulate(simulations: int, json_: bool) -> None:
    from dataclasses import asdict

    from saelab.errors import SettingError, StudyFailure
    from saelab.verdict.simulation.promises import all_promises
    from saelab.verdict.simulation.rows import HEADING, summary_lines

    if simulations < 100:
        raise SettingError("simulations", simulations, "at least 100 are needed")
    rows = list(all_promises(simulations))
    data = [{**asdict(row), "kept": row.is_kept} for row in rows]
    table = [HEADING, *(row.line() for row in rows)]
    show(json_, data, [*table, "", *summary_lines(rows)])
    if not all(row.is_kept for row in rows):
        raise StudyFailure("a promise of the verdict is broken: see the row that says so")


def difference(
    folder: Annotated[Path, Argument(help="A complete run, 'run_4'.")],
    arm: Annotated[str, Argument(help="The arm in question.")],
    other: Annotated[str, Argument(help="The arm that it is compared with.")],
    metric: Annotated[str, Option(help="A metric's name in final_info.json.")] = "fvu",
    json_: Json = False,
) -> None:
    """Print the paired difference of two arms of a run, over the seeds that both have."""
    from dataclasses import asdict

    from saelab.analysis.difference import difference, difference_line

    found = difference(folder, arm, other, metric)
    show(json_, asdict(found), [difference_line(found, arm, other)])


def probing(
    folder: Annotated[Path, Argument(help="A complete run, 'run_1'.")],
    table: Annotated[
        Path | None, Option(help="JSON file for what is printed, with every seed's value.")
    ] = None,
    json_: Json = False,
) -> None:
    """Print a run's sparse probing by entry: arms, controls, the model's own channels."""
    from saelab.analysis.probing_table import by_entry, table_lines
    from saelab.storage.atomic import write_json

    data = by_entry(folder)
    if table is not None:
        write_json(table, data)
    show(json_, data, table_lines(data))


def report(
    folders: Folders = None,
    out: Annotated[Path, Option(help="File of the page.")] = Path("report.html"),
    folder: Annotated[
        Path | None,
        Option(help="Write the page as FOLDER/index.html instead, for any host of static files."),
    ] = None,
    features: Annotated[
        list[str] | None,
        Option(
            help="An arm whose first seed the feature browser shows. May be repeated; see --cells."
        ),
    ] = None,
    cells: Annotated[
        int,
        Option(
            min=0, help="Cells of each run in the feature browser: baseline, then primary arms."
        ),
    ] = 2,
    latents: Annotated[
        int, Option(min=1, help="Latents of each cell in the feature browser.")
    ] = 200,
    json_: Json = False,
    experiment: OwnParts = None,
) -> None:
    """Write report.html: verdicts, figures, gate, controls, plan and latents on one page.

    saelab report run_1 run_3 --out x.html

    saelab report run_1 --folder site

    One file that needs no network. Nothing is trained; the held-out activations for the latents
    are harvested again if they are not cached.
    """
    from saelab.analysis.latents import browse, chosen_cells
    from saelab.report.page import Study, ledger, write
    from saelab.runs.folder import RunFolder
    from saelab.storage.cache import cache_folder
    from saelab.verdict.review import chosen_runs

    register_parts(experiment)
    runs = [RunFolder(folder) for folder in chosen_runs(folders)]
    chosen = chosen_cells(runs, features or (), cells)
    out = out if folder is None else folder / "index.html"
    why_not = "none was asked for" if not (cells or features) else "the runs keep no cells"
    browsed = list(browse(chosen, latents, 8, cache_folder(Path())))
    content = write(Study(runs, browsed, "" if browsed else why_not, ledger(runs)), out)
    show(json_, content, [f"{out}: {count(len(runs), 'run')}, {content['bytes'] / 1e6:.1f} MB"])
