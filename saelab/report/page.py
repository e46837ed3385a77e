"""report.html: a study on one page that needs no network.

    verdicts, gate, plan    `verdict.review`, with the rules that the launch applied
    pictures                `figures.common.PICTURES`, drawn again by page.js from `figure_data`
    feature browser         `analysis.latents`, packed by feature_browser.py
    texts and layout        web/page.html (jinja2, everything escaped), page.css, page.js

The page's policy forbids every request and every script but its own, which it names by hash. Data
is in JSON blocks without the characters that could end them. The same runs give the same bytes.
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from saelab.analysis.latents import Browsed, primary_arms
from saelab.data.packaged.models import describe_source
from saelab.errors import SettingError
from saelab.report import verdict_table
from saelab.report.feature_browser import pack_cells
from saelab.report.figure_data import Arrays, scene
from saelab.report.figures.common import PICTURES
from saelab.report.figures.style import STYLE, ArmStyle, arm_styles, legend_name
from saelab.report.run_data import Run, run_data
from saelab.runs.folder import RunFolder
from saelab.runs.schema import CELLS, CONTROL, PLANTED, control_arm
from saelab.runtime.counting import count
from saelab.storage.atomic import write_text
from saelab.study.plan import PlanConfig
from saelab.study.registry import Attempt, attempts
from saelab.study.settings import OF_PLAN
from saelab.verdict.judge import COVERS, POWER
from saelab.verdict.review import CellNote, Review, differences_of, group_notes, review_run
from saelab.verdict.rivals import rivals_sentence
from saelab.verdict.summary import (
    COLUMNS,
    mean_and_half_width,
    question_of_one,
    too_few_planted,
)
from saelab.verdict.twin import planted_line, twin_line
from saelab.version import __version__

#: Bytes that a page may have. Our choice: small enough for a mail or a slow line.
LIMIT = 8_000_000
WEB = Path(__file__).parent / "web"
#: Pictures that are always shown, in this order; the others are behind tabs.
OPEN = ("forest", "verdict", "frontier", "probing", "placement")
TITLES = {
    "probing_entries": "probing by entry",
    "loss": "loss",
    "max_cosine": "nearest decoder rows",
    "latents": "moving k",
}
#: Settings of a plan whose names need an explanation.
SPELT = {"sesoi": "smallest effect of interest (sesoi)"}
OUTCOMES = {"invalid": "✕", "failed": "✕", "relabelled": "≈", "warning": "!"}


@dataclass(frozen=True)
class Study:
    """Content of a page.

    Args:
        runs: complete runs.
        cells: for the feature browser.
        why_no_cells: the reason where there is none.
        attempts: of the study's ledger.
    """

    runs: Sequence[RunFolder]
    cells: Sequence[Browsed] = ()
    why_no_cells: str = ""
    attempts: Sequence[Attempt] = ()


def ledger(runs: Sequence[RunFolder]) -> list[Attempt]:
    """The attempts of the study that the runs lie in."""
    return attempts(runs[0].folder.resolve().parent) if runs else []


def write(study: Study, out: Path) -> dict[str, Any]:
    """Writes the page.

    Returns: its content, as plain data.
    Raises: SettingError when it would be larger than `LIMIT`; errors of `review` and `load`.
    """
    text, content = render(study)
    size = len(text.encode())
    if size > LIMIT:
        remedy = "take fewer runs, or fewer cells or latents (--cells, --latents)"
        raise SettingError("size of the page", f"{size / 1e6:.1f} MB", f"over 8 MB: {remedy}")
    write_text(out, text)
    return {"page": str(out), "bytes": size} | content


def render(study: Study) -> tuple[str, dict[str, Any]]:
    """Renders the page; returns its text, and its content as plain data."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined
    from markupsafe import Markup

    arrays, reviews = Arrays(), [review_run(run) for run in study.runs]
    pictures, runs = {}, []
    for folder, checked in zip(study.runs, reviews, strict=True):
        run = run_data(folder, comparisons=checked.comparisons, across=checked.across)
        scenes, missing = _scenes(run, arrays)
        pictures[checked.run] = {"arms": _legend(run), "scenes": scenes}
        runs.append(_run(folder, checked, run, scenes, missing))
    script = (WEB / "page.js").read_text(encoding="utf-8")
    data = {"arrays": arrays.stored, "runs": pictures}
    environment = Environment(
        loader=FileSystemLoader(WEB), autoescape=True, undefined=StrictUndefined,
        trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    text = environment.get_template("page.html").render(
        page=_page(study, reviews, runs),
        style=Markup((WEB / "page.css").read_text(encoding="utf-8")),
        script=Markup(script),
        script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        pictures=Markup(as_block(data)),
        latents=Markup(as_block(pack_cells(study.cells))),
    )
    return text, _list_contents(study, reviews, pictures, runs)


def as_block(data: Any) -> str:
    """JSON for a script element: no character in it can end the element."""
    text = json.dumps(data, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    for character in "<>&\u2028\u2029":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text


def _list_contents(
    study: Study, reviews: Sequence[Review], pictures: Mapping[str, Any], runs: Sequence[Any]
) -> dict[str, Any]:
    return {
        "runs": [
            checked.as_dict()
            | {"pictures": list(pictures[checked.run]["scenes"]), "not_drawn": run["not_drawn"]}
            for checked, run in zip(reviews, runs, strict=True)
        ],
        "browser": [
            {"run": c.run, "arm": c.id.arm, "seed": c.id.seed, "latents": len(c.latents)}
            for c in study.cells
        ],
        "why_no_browser": study.why_no_cells,
        "attempts": len(study.attempts),
    }


# ---------------------------------------------------------------- pictures


def _scenes(run: Run, arrays: Arrays) -> tuple[dict[str, Any], dict[str, str]]:
    """Picture -> its scene; and for those that can't be drawn, picture -> reason."""
    import matplotlib

    arms, scenes, missing = [*run.arms, *run.controls], {}, {}
    for name, picture in PICTURES.items():
        with matplotlib.rc_context(cast(Any, STYLE)):
            figure = picture(run)
            if isinstance(figure, str):
                missing |= {name: figure} if figure else {}
            else:
                scenes[name] = _shorten_title(scene(figure, arms, arrays), run)
    return scenes, missing


def _shorten_title(picture: dict[str, Any], run: Run) -> dict[str, Any]:
    """Removes the run's title, which the page shows above all pictures of the run."""
    title = picture["title"].removeprefix(f"{run.title} – ")
    return picture | {"title": f"{title[:1].upper()}{title[1:]}"}


def _legend(run: Run) -> list[dict[str, Any]]:
    return [_look(name, look) for name, look in arm_styles(run).items()]


def _look(name: str, look: ArmStyle) -> dict[str, Any]:
    dashes = [] if look.dashes == "-" else [float(part) for part in look.dashes[1]]
    return {
        "name": name,
        "shown": legend_name(name),
        "control": name.startswith(CONTROL),
        "color": look.color,
        "marker": look.marker,
        "dashes": dashes,
        "width": look.width,
        "filled": look.filled,
    }


# ---------------------------------------------------------------- words


def _page(study: Study, reviews: Sequence[Review], runs: Sequence[Any]) -> dict[str, Any]:
    comparisons = [c for checked in reviews for c in checked.comparisons]
    studies = dict.fromkeys(checked.plan.study for checked in reviews)
    return {
        "study": ", ".join(studies),
        "version": __version__,
        "covers": COVERS,
        "power": round(100 * POWER),
        "words": verdict_table.count_words(comparisons),
        "arms": len(comparisons),
        "runs": runs,
        "plans": _plans(reviews),
        "unlike": _incomparable_runs(reviews),
        "browser": _browser(study),
        "attempts": [vars(attempt) for attempt in study.attempts],
    }


def _plans(reviews: Sequence[Review]) -> list[dict[str, Any]]:
    """Lists each plan once, with the runs that were made under it."""
    plans: dict[str, dict[str, Any]] = {}
    for one in reviews:
        plan = one.plan
        entry = plans.setdefault(
            one.plan_hash,
            {
                "hash": one.plan_hash,
                "runs": [],
                "question": question(plan, bool(one.comparisons)),
                "rows": _plan_rows(plan),
                "exclusions": list(plan.exclusions),
                "deviations": {},
            },
        )
        entry["runs"].append(one.run)
        for text in one.deviations:
            entry["deviations"].setdefault(text, []).append(one.run)
    return list(plans.values())


def question(plan: PlanConfig, compares: bool = True) -> str:
    """Question that a plan asks, as one sentence; of one arm alone how good it is."""
    if not compares:
        return question_of_one(plan.base)
    where = f"at L0 {plan.target_l0:g}" if plan.target_l0 else "at its own L0"
    name = verdict_table.metric_name(plan.primary)
    return (
        f"Does an arm change {name} ({plan.direction} is better) against the baseline of the same"
        f" seeds {where}, by at least {plan.sesoi:g}?"
    )


def _plan_rows(plan: PlanConfig) -> list[tuple[str, str]]:
    settings = plan.model_dump(mode="json", exclude={"exclusions", "settings"})
    if plan.settings:
        settings["settings"] = [OF_PLAN, *(each.name for each in plan.settings)]
    return [(SPELT.get(n, n.replace("_", " ")), _plain(value)) for n, value in settings.items()]


def _plain(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(map(_plain, value))
    return "–" if value is None else f"{value:g}" if isinstance(value, float) else str(value)


def _incomparable_runs(reviews: Sequence[Review]) -> list[str]:
    """Sentences on runs whose numbers may not be compared with those of the first, and why."""
    sentences = []
    for other in reviews[1:]:
        if texts := differences_of(reviews[0], other):
            sentences.append(f"{reviews[0].run} and {other.run} differ in {'; '.join(texts)}")
    return sentences


def _run(
    folder: RunFolder,
    checked: Review,
    run: Run,
    scenes: Mapping[str, Any],
    missing: Mapping[str, str],
) -> dict[str, Any]:
    manifest = run.manifest
    comments = {arm: entry.get("comment", "") for arm, entry in manifest["arms"].items()}
    bars = verdict_table.bars(checked.comparisons, checked.plan.sesoi)
    rows = [
        verdict_table.row(c, texts, bar, checked.plan, comments.get(c.arm, ""))
        for c, texts, bar in zip(checked.comparisons, checked.over_texts, bars, strict=True)
    ]
    primary = primary_arms(folder) if (folder.folder / CELLS).is_dir() else []
    return {
        "name": checked.run,
        "title": checked.title,
        "kind": "exploratory" if checked.exploratory else "confirmatory",
        "metric": verdict_table.metric_name(checked.plan.primary),
        "texts_notes": verdict_table.texts_notes(checked.comparisons, checked.over_texts),
        "direction": checked.plan.direction,
        "sesoi": f"{checked.plan.sesoi:g}",
        "across": [verdict_table.across_row(a) for a in checked.across],
        "verdicts": rows,
        "answers": [row for row in rows if row["arm"] in primary] or rows,
        "others": [row for row in rows if primary and row["arm"] not in primary],
        "secondary": [_secondary(d) for d in checked.differences],
        "heads": list(COLUMNS.values()),
        "losses": checked.losses.line() if checked.losses else "",
        "numbers": list(_numbers(run, comments)),
        "controls": list(_controls(run)),
        "rivals": rivals_sentence(checked.rivals),
        "planted": _planted_text(checked, run),
        "cells": len(manifest["cells"]),
        "outcomes": _outcomes(checked.cells),
        "gate": [_gate_row(*group) for group in group_notes(checked.cells)],
        "open": [_figure(name, scenes[name]) for name in OPEN if name in scenes],
        "more": [_figure(name, scenes[name]) for name in scenes if name not in OPEN],
        "not_drawn": dict(missing),
        "missing": _missing(run),
        "line": _source_line(checked, manifest),
        "provenance": list(_provenance(checked, manifest)),
        "definitions": _definitions(folder.metrics),
    }


def _figure(name: str, picture: Mapping[str, Any]) -> dict[str, Any]:
    label = TITLES.get(name, name)
    return {"name": name, "label": f"{label[:1].upper()}{label[1:]}", **picture}


def _secondary(d: Any) -> dict[str, Any]:
    return {
        "arm": d.arm,
        "metric": verdict_table.metric_name(d.metric),
        "pairs": d.n,
        "difference": verdict_table.format_signed(d.mean_diff),
        "interval": verdict_table.format_span(d.low, d.high),
        "reason": d.reason,
    }


def _numbers(run: Run, comments: Mapping[str, str]) -> Iterator[dict[str, Any]]:
    """Yields a row for each arm: mean and half width of the 95% interval over seeds."""
    for arm in run.arms:
        lists = run.info.get(arm, {}).get("final_info_dict", {})
        yield {
            "arm": arm,
            "comment": comments.get(arm, ""),
            "seeds": max((len(values) for values in lists.values()), default=0),
            "values": [mean_and_half_width(lists.get(metric, [])) for metric in COLUMNS],
        }


def _controls(run: Run) -> Iterator[dict[str, Any]]:
    """Yields a row for each control; probes of the model's channels have another name."""
    for name in run.controls:
        values = []
        for metric in COLUMNS:
            numbers = run.numbers(metric).get(name) or run.numbers(f"llm{metric[3:]}").get(name)
            values.append(f"{sum(numbers) / len(numbers):.4g}" if numbers else "–")
        yield {"name": name.removeprefix(CONTROL), "values": values}


def _planted_text(checked: Review, run: Run) -> str:
    """Returns what the A/A twin and the planted effect say of the verdict itself."""
    parts = [f"{twin_line(checked.twin)}."] if checked.twin else []
    if checked.planted:
        line = planted_line(checked.planted)
        parts.append(f"{line[0].upper()}{line[1:]}.")
    else:
        n = len(run.numbers("fvu").get(control_arm(PLANTED), ()))
        parts.append(f"{too_few_planted(n)}." if n else "No effect was planted.")
    return " ".join(parts)


def _outcomes(cells: Sequence[CellNote]) -> list[dict[str, Any]]:
    """Counts the cells by outcome, which is that of their worst unexpected finding."""
    worst = {}
    for note in reversed(cells):  # worst last
        if not note.expected:
            worst[note.cell] = note.outcome
    expected = len({note.cell for note in cells} - set(worst))
    counts = Counter(worst.values())
    rows = [
        {"outcome": name, "sign": sign, "count": counts[name]}
        for name, sign in OUTCOMES.items()
        if counts[name]
    ]
    if expected:
        rows.append({"outcome": "expected", "sign": "·", "count": expected})
    return rows


def _gate_row(arm: str, check: str, expected: bool, notes: Sequence[CellNote]) -> dict[str, Any]:
    return {
        "arm": arm,
        "check": check.replace("_", " "),
        "outcome": notes[0].outcome,
        "sign": OUTCOMES.get(notes[0].outcome, "·"),
        "expected": expected,
        "count": len(notes),
        "sentence": notes[0].sentence,
    }


def _missing(run: Run) -> list[str]:
    """Lists metrics over all data that were not measured at the target, one line for each reason
    and the arms that it holds for."""
    lost: Counter[tuple[str, str, str]] = Counter()
    for metric, slice in run.values:
        if not slice:
            for value in (v for vs in run.at_target(metric).values() for v in vs):
                if value.value is None:
                    lost[metric, value.arm, value.reason] += 1
    arms: dict[tuple[str, str], list[str]] = {}
    for (metric, arm, reason), n in lost.items():
        arms.setdefault((metric, reason), []).append(f"{legend_name(arm)} ({n})")
    metrics: dict[tuple[str, str], list[str]] = {}
    for (metric, reason), names in arms.items():
        metrics.setdefault((reason, ", ".join(names)), []).append(metric)
    return [f"{reason}: {', '.join(those)} of {of}" for (reason, of), those in metrics.items()]


def _source_line(checked: Review, manifest: Mapping[str, Any]) -> str:
    """Sources of the numbers of a run, in one line."""
    p = checked.provenance
    tokens = f"{p['tokens']:,} held-out tokens" if p.get("tokens") else "held-out rows"
    return (
        f"{checked.definition} · {p.get('hook_name') or 'hook not recorded'} · {tokens}"
        f" · text {p.get('text_digest')} · context {p.get('context')} · {p.get('mask')}"
        f" · {p.get('dtype')} · saelab {manifest['versions'].get('saelab')},"
        f" package {manifest['versions'].get('package_digest')}"
    )


def _provenance(checked: Review, manifest: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    yield "plan", checked.plan_hash
    yield "seeds", ", ".join(map(str, manifest.get("seeds", ())))
    for name, value in checked.provenance.items():
        yield name.replace("_", " "), _plain(value)
    if model := describe_source(manifest.get("model_source")):
        yield "model", model
    for part in ("train", "held_out", "calibration"):
        source = (manifest.get("data") or {}).get(part) or {}
        if isinstance(source, str):
            yield f"{part} text", f"none: {source}"
            continue
        corpus = source.get("corpus") or {}
        if source:
            text = corpus.get("corpus", source.get("text_digest", ""))
            digest = f", sha256 {corpus['sha256'][:16]}" if "sha256" in corpus else ""
            yield (
                f"{part} text".replace("_", " "),
                f"{text}, {count(source.get('n_tokens') or 0, 'token')}{digest}",
            )
    for name, value in manifest["versions"].items():
        yield name.replace("_", " "), _plain(value)
    yield "seconds", _plain(manifest.get("seconds"))


def _definitions(rows: Iterable[Mapping[str, Any]]) -> list[tuple[str, str]]:
    """Each definition with the metrics that are measured by it."""
    metrics: dict[str, list[str]] = {}
    for definition, metric in sorted({(row["definition"], row["metric"]) for row in rows}):
        metrics.setdefault(definition, []).append(metric)
    return [(definition, ", ".join(names)) for definition, names in metrics.items()]


def _browser(study: Study) -> dict[str, Any]:
    latents = sum(len(cell.latents) for cell in study.cells)
    return {"cells": len(study.cells), "latents": latents, "why_not": study.why_no_cells}
