"""Summary of a run: the printed table and summary.md."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from saelab import stats
from saelab.runs import schema
from saelab.runs.random_code import SHARE
from saelab.runs.schema import QUICK
from saelab.runtime.counting import count
from saelab.runtime.safe_text import markdown
from saelab.study.plan import BASELINE, PlanConfig, describe_probing
from saelab.study.registry import Attempt, plan_hash
from saelab.verdict.agreement import agreement_text, coverage_text
from saelab.verdict.judge import COVERS, Comparison
from saelab.verdict.losses_in_nats import HEADS, Losses, losses_of_run
from saelab.verdict.rivals import Rival, control_values, rivals_sentence
from saelab.verdict.twin import Planted, planted_line, twin_line

if TYPE_CHECKING:
    from saelab.study.task import Launch
    from saelab.verdict.across_settings import AcrossSettings
    from saelab.verdict.arms import ArmResult
    from saelab.verdict.error_budget.ledger import Budget
    from saelab.verdict.review import Judged

#: Columns of the printed table: metric -> heading.
COLUMNS = {
    "fvu": "FVU",
    "l0": "L0",
    "loss_recovered": "loss recovered",
    "ce_spliced": "loss (nats)",
    "ce_rise": "rise (nats)",
    SHARE: "from random",
    "sae_top_1_test_accuracy": "probe k=1",
    "sae_top_5_test_accuracy": "probe k=5",
    "sae_test_accuracy": "probe full",
    "sae_probes_top_1_auc": "AUC k=1",
    "sae_probes_top_16_auc": "AUC k=16",
    "dead_share": "dead",
}

#: Columns that stand there only where some subject has a number: probing may be left out.
PROBES = frozenset(name for name, head in COLUMNS.items() if head.startswith(("probe", "AUC")))

#: Meaning of the columns of losses.
MEANINGS = (
    "Loss: with the SAE's reconstruction in place of the activation; rise: above the clean loss; "
    "loss recovered: share of the way from zeros to clean; from the random code: share of the way "
    "from an untrained SAE to clean."
)

#: The metric of pairs of seeds that the summary shows.
AGREEMENT = "consistency.seeds"


def table(
    info: Mapping[str, Any],
    comparisons: Sequence[Comparison],
    plan: PlanConfig,
    rows: Sequence[Mapping[str, Any]] = (),
    rivals: Sequence[Rival] = (),
    probed: str = "",
) -> str:
    """Table of arms x metrics: mean and 95% t interval (half width) over seeds, and the verdict;
    then the controls among the rows, with means alone, a line on what was probed (`probed`), and
    the controls that are as good as an arm."""
    words = {c.arm: c.word for c in comparisons}
    verdict = [f"verdict on {plan.primary}"] if comparisons else []
    controls = control_values(rows)
    measured = {name for values in controls.values() for name in values}
    for group in info.values():
        numbers = group["final_info_dict"].items()
        measured |= {name for name, v in numbers if any(x is not None for x in v)}
    columns = [name for name in COLUMNS if name in measured or name not in PROBES]
    shown = [COLUMNS[name] for name in columns]
    lines = [["arm" if comparisons else "SAE", "seeds", *shown, *verdict]]
    for arm, group in info.items():
        seeds = max((len(v) for v in group["final_info_dict"].values()), default=0)
        values = group["final_info_dict"]
        cells = [mean_and_half_width(values.get(metric, [])) for metric in columns]
        name = arm if comparisons else f"{arm} ({plan.base})"
        lines.append([name, str(seeds), *cells, *([words.get(arm, "")] if verdict else [])])
    for name, means in controls.items():
        cells = [f"{means[metric]:.4g}" if metric in means else "-" for metric in columns]
        lines.append([name, "", *cells, *([""] if verdict else [])])
    losses, loud = losses_of_run(rows), rivals_sentence(rivals)
    below = [*([losses.line()] if losses else []), *([probed] if probed else [])]
    below += [loud] if loud else []
    return "\n\n".join([align_columns(lines), *below])


def align_columns(lines: Sequence[Sequence[str]]) -> str:
    """Aligns the columns of a table of text whose first line is its heading."""
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    text = [
        "  ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)).rstrip() for line in lines
    ]
    return "\n".join([text[0], "-" * len(text[0]), *text[1:]])


def mean_and_half_width(values: Sequence[float | None]) -> str:
    """'0.1848 ±0.0004' with the 95% t interval of two or more numbers; '-' without any."""
    numbers = [value for value in values if value is not None]
    if not numbers:
        return "-"
    mean = sum(numbers) / len(numbers)
    if len(numbers) < 2:
        return f"{mean:.4g}"
    low, high = (float(bound) for bound in stats.t_interval(numbers))
    return f"{mean:.4g} ±{(high - low) / 2:.2g}"


def summary_text(
    task: Launch,
    judged: Judged,
    missing: Sequence[str],
    deviations: Sequence[str] = (),
    earlier: Sequence[Attempt] = (),
    rows: Sequence[Mapping[str, Any]] = (),
    budget: Budget | None = None,
) -> str:
    """Text of summary.md: question, plan, verdict, cells that do not count, next steps.

    Args:
        judged: the run, judged from its files.
        missing: metrics that could not be measured, and why.
        deviations: of the plan from the registered one.
        earlier: attempts at this run before the present one.
        rows: of all subjects, of which those of controls are shown.
        budget: the study's error budget after this run.
    """
    plan, arms, comparisons = task.plan, judged.arms, judged.comparisons
    loud = rivals_sentence(judged.rivals)
    of_controls = control_lines(rows, judged.planted, judged.twin)
    lines = [
        f"# {markdown(f'{task.label}: {task.run.title}')}",
        "",
        f"**Question.** {_question(plan, bool(comparisons))}",
        "",
        f"**Plan.** {plan_hash(plan)}, {_registration_text(task, deviations)}",
        *(f"- deviation: {markdown(text)}" for text in deviations),
        *(f"- left out on purpose: {markdown(text)}" for text in plan.exclusions),
        "",
        *([f"**{markdown(loud)}.**", ""] if loud else []),
        *_across_lines(judged.across),
        "**Verdict.**" + (" Exploratory." if task.purpose != "confirm" else " Confirmatory."),
        "",
        "| arm | what it is | verdict | difference | over seeds | over texts | cells |",
        "|---|---|---|---|---|---|---|",
    ]
    comments = {arm.name: arm.comment for arm in task.run.arms}
    for c, texts in zip(comparisons, judged.over_texts, strict=True):
        interval = f"{span_text(c.low, c.high)} | {span_text(texts.low, texts.high)}"
        difference = "-" if c.mean_diff is None else f"{c.mean_diff:+.4f}"
        arm = c.arm if c.against == BASELINE else f"{c.arm}, against {c.against}"
        names = f"{markdown(arm)} | {markdown(comments.get(c.arm, ''))}"
        lines.append(f"| {names} | {c.word} | {difference} | {interval} | {c.n}/{c.n_baseline} |")
    if comparisons:
        lines += ["", *_covers(comparisons), "", "**Why.**", ""]
        lines += [
            f"- {markdown(f'{c.arm}: {c.reason}; {texts.sentence(c)}')}"
            for c, texts in zip(comparisons, judged.over_texts, strict=True)
        ]
    else:
        lines[-2:] = [f"There is one arm, {BASELINE}, and nothing to compare it with.", ""]
        lines += [f"- {COLUMNS[name]}: {value}" for name, value in _mean_values(arms[BASELINE])]
    if losses := losses_of_run(rows, arms):
        lines += ["", "**Losses.**", "", *_loss_lines(losses)]
    if budget:
        lines += ["", f"**Error budget.** {budget.line().partition(': ')[2]}."]
    lines += ["", "**Gate.**", "", *_gate_lines(arms)]
    if of_controls:
        lines += ["", "**Controls.**", "", *of_controls]
    if probed := describe_probing(task.base.patched(dict(task.run.changes))):
        lines += ["", f"**Probing.** {markdown(probed[0].upper() + probed[1:])}."]
    if agreements := agreement_lines(arms):
        lines += ["", "**Agreement between seeds.**", "", *agreements]
    if earlier:
        lines += ["", f"**Earlier attempts at {task.name}.**", ""]
        lines += [f"- {markdown(attempt.line())}" for attempt in earlier]
    if missing:
        lines += ["", "**Missing.**", "", *(f"- {markdown(text)}" for text in missing)]
    lines += ["", "**What to try next.**", "", *_next_steps(comparisons, arms)]
    return "\n".join(lines) + "\n"


def span_text(low: float | None, high: float | None) -> str:
    """An interval as it is printed; '-' where there is none."""
    return "-" if low is None or high is None else f"{low:+.4f} to {high:+.4f}"


def _across_lines(across: Sequence[AcrossSettings]) -> list[str]:
    """Markdown table of every arm over the settings; [] without further settings."""
    if not across:
        return []
    names = " | ".join(markdown(one.setting) for one in across[0].settings)
    lines = [
        "**Over settings.**",
        "",
        f"| arm | {names} | over these settings | mean | for a new setting | prediction |",
        "|---" * (len(across[0].settings) + 5) + "|",
    ]
    for a in across:
        words = " | ".join(one.word for one in a.settings)
        mean = "-" if a.mean is None else f"{a.mean:+.4f} [{a.low:+.4f}, {a.high:+.4f}]"
        new = span_text(a.new_low, a.new_high)
        lines.append(f"| {markdown(a.arm)} | {words} | {a.mean_word} | {mean} | {a.word} | {new} |")
    lines += ["", *(f"- {markdown(f'{a.arm}: {a.reason}')}" for a in across)]
    return [*lines, "", "What follows is of the plan's own base alone.", ""]


def question_of_one(base: str) -> str:
    """Question of a run with one arm, whose settings are the base's."""
    return f"How good is the SAE that {base} describes?"


def _question(plan: PlanConfig, compares: bool) -> str:
    if not compares:
        return question_of_one(markdown(plan.base))
    where = f"at L0 {plan.target_l0:g}" if plan.target_l0 else "at its own L0"
    return (
        f"Does an arm change {plan.primary} ({plan.direction} is better) against the baseline "
        f"{where}, by at least {plan.sesoi:g}?"
    )


def control_lines(
    rows: Sequence[Mapping[str, Any]], planted: Planted | None, twin: Comparison | None = None
) -> list[str]:
    """Markdown table of the control subjects, the A/A twin's word, and whether the planted effect
    was found."""
    by_control = control_values(rows)
    measured = {name for values in by_control.values() for name in values}
    probes = ("sae_top_5_test_accuracy", "sae_probes_top_16_auc")
    shown = [
        "fvu",
        "l0",
        "loss_recovered",
        "ce_rise",
        SHARE,
        *(name for name in probes if name in measured),
    ]
    heads = " | ".join(COLUMNS[metric] for metric in shown)
    lines = [f"| control | {heads} |", "|---" * (len(shown) + 1) + "|"]
    for name, values in by_control.items():
        cells = [f"{values[metric]:.4g}" if metric in values else "-" for metric in shown]
        lines.append(f"| {name.removeprefix(schema.CONTROL)} | {' | '.join(cells)} |")
    turned = [row for row in rows if row["arm"] == schema.control_arm(schema.PLANTED)]
    n = len({row["seed"] for row in turned if row["metric"] == "fvu"})
    of_twin = ["", f"{markdown(twin_line(twin))}."] if twin else []
    return [*lines, *of_twin, *_planted_lines(planted, n)] if by_control else []


def _loss_lines(losses: Losses) -> list[str]:
    """Markdown table of the losses of the arms, and the losses that they share."""
    table = [HEADS, ("---",) * len(HEADS), *losses.lines()]
    rows = [f"| {' | '.join(markdown(cell) for cell in row)} |" for row in table]
    line = losses.line()
    return [f"{markdown(line[0].upper() + line[1:])}. {MEANINGS}", "", *rows]


def agreement_lines(arms: Mapping[str, ArmResult]) -> list[str]:
    """One line for each arm whose seeds were compared: mean over their pairs and its interval."""
    lines = []
    for name, arm in arms.items():
        if (result := arm.agreement(AGREEMENT)) is not None:
            lines.append(f"- {markdown(name)}: {agreement_text(result)}")
    what = "Mean matched |cosine| of two dictionaries (PW-MCC)"
    head = f"{what}, {coverage_text()} interval by the jackknife over seeds."
    return [head, "", *lines] if lines else []


def _covers(comparisons: Sequence[Comparison]) -> list[str]:
    """Says what the intervals hold, and that they hold together."""
    level = min(c.level for c in comparisons)
    together = f"Each interval has coverage {1 - level:.2%}, so that all of them hold together."
    return [f"{together} {COVERS}"]


def _mean_values(arm: ArmResult) -> Iterator[tuple[str, str]]:
    """Yields each measured metric of the printed table with its mean over seeds."""
    for metric in COLUMNS:
        value = stats.mean_stderr(arm.metric(metric).values())[0]
        if value is not None:
            yield metric, f"{value:.4g}"


def too_few_planted(n: int) -> str:
    """Says that an effect was planted in n SAEs, which are too few for a verdict on it."""
    return f"An effect was planted in {count(n, 'SAE')}: a verdict on it needs two with numbers"


def _planted_lines(planted: Planted | None, n: int) -> list[str]:
    if planted is None:
        return ["", f"{too_few_planted(n)}."] if n else []
    line = planted_line(planted)
    return ["", f"{markdown(line[0].upper() + line[1:])}."]


def _registration_text(task: Launch, deviations: Sequence[str]) -> str:
    if task.purpose == QUICK:
        return "registered nowhere: a quick form is no part of the study."
    return "changed since the first run of the study:" if deviations else "as registered."


def _gate_lines(arms: Mapping[str, ArmResult]) -> list[str]:
    lines = []
    for name, arm in arms.items():
        by_check: dict[tuple[str, bool], dict[int, str]] = {}  # of a cell the first finding
        for seed, result in arm.gates.items():
            for finding in result.findings:
                cells = by_check.setdefault((finding.check, finding.expected), {})
                cells.setdefault(seed, finding.sentence)
        for (check, expected), cells in by_check.items():
            note = " (expected)" if expected else ""
            first = next(iter(cells.values()))
            line = f"{name}, {check}{note}, {count(len(cells), 'cell')}: {first}"
            lines.append(f"- {markdown(line)}")
    return lines or ["- no findings"]


def _open_findings(arms: Mapping[str, ArmResult]) -> list[str]:
    """One line for each check of the gate that was not expected: how many cells, and the remedy."""
    by_check: dict[str, tuple[list[str], str]] = {}
    for name, arm in arms.items():
        for result in arm.gates.values():
            unexpected = {f.check: f for f in result.findings if not f.expected}
            for check, finding in unexpected.items():
                remedy = finding.sentence.rpartition("; ")[2]
                by_check.setdefault(check, ([], remedy))[0].append(name)
    lines = []
    for check, (names, remedy) in by_check.items():
        where = ", ".join(dict.fromkeys(names))
        text = f"{check} in {count(len(names), 'cell')} of {where}: {remedy}."
        lines.append(f"- {markdown(text)}")
    return lines


def _next_steps(comparisons: Sequence[Comparison], arms: Mapping[str, ArmResult]) -> list[str]:
    lines = []
    if not comparisons:
        lines = ["- add an arm to compare it with (`experiment.py`, or `saelab.compare`)."]
    for c in comparisons:
        if c.word == "cannot tell yet" and c.needed_seeds:
            lines.append(
                f"- {markdown(c.arm)}: about {count(c.needed_seeds, 'seed')} would decide it."
            )
        elif c.word == "helps":
            lines.append(f"- {markdown(c.arm)}: confirm it on seeds that no other run uses.")
        elif c.word == "refused":
            lines.append(f"- {markdown(f'{c.arm}: {c.reason}.')}")
    lines += _open_findings(arms)
    return lines or [f"- nothing: every arm differs from {BASELINE} or is shown to be as good."]
