"""Model card of pushed SAEs: verdict, controls, gate, provenance and the commands that made them.

The verdict is that of the run's summary.md, which the run's checksums cover: the same words and
numbers, with nothing left out but what to try next. No path of this disk is in it.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from saelab.analysis.sharing.public_names import public
from saelab.errors import SourceError
from saelab.formats.hub.reference import is_reference
from saelab.runs.folder import SUMMARY, Member, RunFolder
from saelab.runs.schema import PROVENANCE, QUICK
from saelab.runtime.counting import count
from saelab.runtime.safe_text import markdown
from saelab.study.plan import BASELINE, base_of_run
from saelab.verdict.judge import Comparison
from saelab.verdict.review import Review, review_run
from saelab.verdict.rivals import rivals_sentence
from saelab.version import __version__

README, VERDICT = "README.md", "verdict.json"
#: Metrics of each SAE that its row shows -> heading.
COLUMNS = {"fvu": "FVU", "l0": "L0", "loss_recovered": "loss recovered", "dead_share": "dead"}
#: Purpose of a run in its manifest -> the word for it; others are shown as they are.
PURPOSES = {"explore": "exploratory", "confirm": "confirmatory"}
NO_RUN = "No run belongs to them, and so no verdict."
#: A name on the hub.
_HUB = re.compile(r"[\w.-]+/[\w.-]+", re.ASCII)
#: Where the advice to the run's author begins in summary.md.
_ADVICE = "\n**What to try next.**"


@dataclass(frozen=True, kw_only=True)
class One:
    """An SAE of the card.

    Args:
        place: its folder in the repository; '' for the repository itself.
        d_in, d_sae: its sizes.
        cell: of a run; None for any other SAE.
        about: its metadata, as the format writes it.
    """

    place: str
    d_in: int
    d_sae: int
    cell: Member | None
    about: Mapping[str, Any]


def card(saes: Sequence[One], run: RunFolder | None, where: str, command: str) -> str:
    """Returns the text of README.md.

    Args:
        saes: at least one.
        run: that they are of; None for other SAEs, of which there is no verdict.
        where: 'hub:owner/name' of the repository, or the name of a folder that is sent nowhere.
        command: that pushes them.

    Raises: SourceError for a run without its summary.
    """
    review = review_run(run) if run else None
    model, hook = (str(saes[0].about.get(key) or "") for key in ("model", "hook_name"))
    parts = [
        _front_matter(model, saes[0].about.get("dataset")),
        f"# {_title(review, where)}",
        _first_sentence(saes, model, hook),
        *(_verdict_lines(review, run) if run and review else [NO_RUN]),
        _use(saes, where),
        "## SAEs",
        "\n".join(_table(saes, run)),
        *(_of_run(run) if run else []),
        "## Provenance",
        "\n".join(f"- {line}" for line in _provenance(saes, run, review)),
        "## How they were made",
        "\n".join(f"    {line}" for line in _commands(run, command)),
    ]
    return public("\n\n".join(parts) + "\n")


def _front_matter(model: str, dataset: object) -> str:
    """Returns the YAML that the hub reads; only names on the hub are in it."""
    lines = ["---", "library_name: saelab", "tags:", "- sparse-autoencoder", "- saelens"]
    for key, value in (("base_model", model), ("datasets", str(dataset or ""))):
        if _HUB.fullmatch(value) and not Path(value).exists():
            lines += [f"{key}:", f"- {value}"]
    return "\n".join([*lines, "---"])


def _title(review: Review | None, where: str) -> str:
    return markdown(review.title if review else where.rpartition("/")[2])


def _first_sentence(saes: Sequence[One], model: str, hook: str) -> str:
    where = " at ".join(f"`{each}`" for each in (model, hook) if each)
    kind = "Sparse autoencoders" if len(saes) > 1 else "A sparse autoencoder"
    on = f" on {where}" if where else ""
    return (
        f"{kind}{on} ({count(len(saes), 'SAE')}), written by saelab {__version__} in the layout "
        "of SAELens."
    )


def _verdict_lines(review: Review, run: RunFolder) -> list[str]:
    """Says the word on each arm with its interval, before all else."""
    purpose = str(run.manifest.get("purpose"))
    kind = PURPOSES.get(purpose, purpose)
    lines = [f"**Verdict** ({kind}, on {review.plan.primary}, {review.plan.direction} is better):"]
    lines += ["\n".join(f"- {_sentence(c)}" for c in review.comparisons)]
    if not review.comparisons:
        lines = [f"There is one arm, {BASELINE}, and so no verdict."]
    if loud := rivals_sentence(review.rivals):
        lines += [f"**{markdown(loud)}.**"]
    if not review.sealed:
        lines += ["The run's files carry no checksums."]
    return lines


def _sentence(c: Comparison) -> str:
    other = "" if c.against == BASELINE else f" against {markdown(c.against)}"
    words = f"{markdown(c.arm)}{other}: **{c.word}**"
    if c.mean_diff is None or c.low is None or c.high is None:
        return f"{words} ({markdown(c.reason)})"
    interval = f"{c.low:+.4f} to {c.high:+.4f}, coverage {1 - c.level:.2%}"
    return f"{words}, difference {c.mean_diff:+.4f} ({interval}, {count(c.n, 'cell')})"


def _use(saes: Sequence[One], where: str) -> str:
    between = ":" if is_reference(where) else "/"
    first = between.join(part for part in (where, saes[0].place) if part)
    return "\n".join(
        [
            "```python",
            "import saelab",
            "",
            f'sae = saelab.load("{first}")',
            "x_hat = sae.complete(sae.decode(sae.encode(x)), x)  # x: rows of activations",
            "```",
        ]
    )


def _table(saes: Sequence[One], run: RunFolder | None) -> list[str]:
    """Markdown table with a row for each SAE; its numbers are those of the run's cell."""
    measured = _measured(run) if run else {}
    heads = ["folder", "arm", "seed", "d_in", "d_sae", *COLUMNS.values()]
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for one in saes:
        cell = one.cell.id if one.cell else None
        values = measured.get((cell.arm, cell.seed, cell.level), {}) if cell else {}
        numbers = [f"{values[m]:.4g}" if m in values else "-" for m in COLUMNS]
        which = [markdown(cell.arm), str(cell.seed)] if cell else ["-", "-"]
        place = markdown(one.place or "(this repository)")
        row = [place, *which, str(one.d_in), str(one.d_sae), *numbers]
        lines.append(f"| {' | '.join(row)} |")
    return lines


def _measured(run: RunFolder) -> dict[tuple[str, int, float], dict[str, float]]:
    measured: dict[tuple[str, int, float], dict[str, float]] = {}
    for row in run.metrics:
        if row["value"] is not None and not row["slice"]:
            cell = (row["arm"], row["seed"], row["level"])
            measured.setdefault(cell, {})[row["metric"]] = row["value"]
    return measured


def _of_run(run: RunFolder) -> list[str]:
    """Returns the run's summary: question, plan, verdict, losses, gate, controls, what is missing.

    Raises: SourceError where it is not there.
    """
    file = run.file(SUMMARY)
    if not file.is_file():
        remedy = "name the folder of a complete run"
        raise SourceError(f"{run.folder} holds no {SUMMARY}, the words of its verdict: {remedy}")
    text = file.read_text(encoding="utf-8").partition(_ADVICE)[0]
    _, _, body = text.partition("\n")
    return ["## The run that they are of", body.strip()]


def _provenance(saes: Sequence[One], run: RunFolder | None, review: Review | None) -> Iterable[str]:
    """Yields the facts by which the numbers can be made again."""
    about = saes[0].about
    for name in ("model", "model_digest", "hook_name", "dataset", "context", "hub"):
        if about.get(name):
            yield f"{name}: {markdown(str(about[name]))}"
    if run is None or review is None:
        return
    manifest = run.manifest
    yield f"run: {markdown(review.run)} of the study {markdown(str(manifest.get('study')))}"
    yield f"plan: {review.plan_hash}, {'sealed' if review.sealed else 'without checksums'}"
    yield f"{review.plan.primary} as defined by {review.definition}"
    settings = base_of_run(run)
    yield f"training tokens: {settings.train.tokens:,}, batch size {settings.train.batch_size:,}"
    measured = {name: review.provenance.get(name) for name in PROVENANCE}
    yield "measured on: " + ", ".join(
        f"{name} {markdown(str(value))}" for name, value in measured.items() if value is not None
    )
    versions = manifest.get("versions", {})
    yield "made with: " + ", ".join(
        f"{name} {markdown(str(value))}"
        for name, value in versions.items()
        if name in ("saelab", "package_digest", "python", "torch", "transformers", "kernels")
    )


def _commands(run: RunFolder | None, command: str) -> list[str]:
    return [*([_command_of(run)] if run else []), command]


def _command_of(run: RunFolder) -> str:
    """Returns the command that made a run, as far as its manifest says."""
    name, manifest = run.folder.resolve().name, run.manifest
    plan = manifest.get("plan", {})
    if len(manifest.get("arms", ())) == 1 and plan.get("target_l0") is None:  # of saelab train
        words = ["saelab", "train", Path(str(plan.get("base", ""))).name, "--out_dir", name]
        seeds = int(plan.get("seeds", 1))
        return shlex.join([*words, *(["--seeds", str(seeds)] if seeds > 1 else [])])
    quick = ["--quick"] if manifest.get("purpose") == QUICK else []
    return shlex.join(["saelab", "run", name, *quick])
