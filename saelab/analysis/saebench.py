"""SAEBench results next to ours: a recorded file, a run's rows, and what kind of SAE each is.

A recorded file is shown with its own numbers, with what the gate says about its SAE, and next to
ours. Differences are only taken between numbers of one definition.
"""

from __future__ import annotations

import re
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from saelab.data.probing.embedded import SAMPLING_SEED
from saelab.errors import MismatchError, SettingError, SourceError, nearest
from saelab.evals.base import Row, Subject, check_one_definition
from saelab.evals.probing.saebench import DEFINITION
from saelab.evals.saebench import About, build_result, definition_of, read_result, rows_of
from saelab.runs import schema
from saelab.runs.folder import MANIFEST, METRICS, RunFolder
from saelab.sae import SAE
from saelab.storage.atomic import read_json
from saelab.study.plan import BaseConfig
from saelab.verdict.gate import GateResult, gate
from saelab.version import __version__

CHANNELS = schema.control_arm(schema.CHANNELS)
#: Metrics shown for each entry.
SHOWN = ("llm_test_accuracy", "sae_top_1_test_accuracy", "sae_top_5_test_accuracy")
SHOWN += ("sae_test_accuracy",)
#: Checks of the gate that, together, say that nobody trained the SAE.
UNTRAINED = {"no_steps", "no_tokens"}


def about(base: BaseConfig, sae: Mapping[str, Any], name: str, seed: int) -> About:
    """Describes a measurement with these settings as a result file does.

    Args:
        sae: further entries of the SAE's configuration.
        name: of the SAE.
        seed: of the examples.
    """
    if base.target_hook is not None:
        remedy = "SAEBench's results are of SAEs that reconstruct their input: name another SAE"
        raise SettingError("target_hook", base.target_hook, remedy)
    probing = base.evaluation.probing
    layer = re.search(r"\d+", base.hook_text)
    subject = {
        "model_name": base.model.path,
        "hook_name": base.hook_text,
        "hook_layer": int(layer[0]) if layer else None,
        "context_size": base.context,
        "dtype": "float32",
    }
    entries = {"train_size": probing.train_size, "test_size": probing.test_size}
    sizes = {
        name: {side: value for side in entries if (value := getattr(source, side))}
        for name, source in probing.sources.items()
        if source.train_size or source.test_size
    }
    return About(
        model_name=base.model.path,
        dtype=base.model.dtype,
        sae=subject | dict(sae),
        release="saelab",
        sae_id=name,
        train_size=probing.train_size,
        test_size=probing.test_size,
        context=min(probing.context, base.context),
        k_values=probing.k_values,
        seed=seed,
        millis=int(time.time() * 1000),
        version=__version__,
        further={"sizes": sizes},
    )


def result_of(
    rows: Sequence[Row], subject: Subject, base: BaseConfig, name: str, seed: int
) -> dict[str, Any]:
    """Builds SAEBench's result of a subject, from its rows and those of the model's channels.

    Args:
        name: of the SAE.
        seed: of the examples; definition 1 has SAEBench's own.

    Raises: SourceError when the rows lack what the schema asks for.
    """
    sae: dict[str, Any] = {"d_in": subject.d_in, "d_sae": subject.d_sae}
    if isinstance(subject, SAE):
        sae["architecture"] = subject.config.activation.kind
        sae["saelab"] = subject.config.model_dump(mode="json")
    of_saebench = DEFINITION in {row.definition for row in rows}
    return build_result(rows, about(base, sae, name, SAMPLING_SEED if of_saebench else seed))


def run_result(folder: Path, arm: str = "baseline", seed: int | None = None) -> dict[str, Any]:
    """Builds SAEBench's result of one cell of a complete run, from its metrics.parquet.

    Args:
        arm, seed: of the cell at the plan's L0; None for the arm's first seed.

    Raises: SourceError when the run is not complete; SettingError for an unknown arm or seed.
    """
    run = RunFolder(folder)
    if not run.has(METRICS, MANIFEST):
        raise SourceError(f"{folder} holds no metrics.parquet: name the folder of a complete run")
    manifest, level = run.required("target_l0", "base", "arms", "study"), run.target_level
    rows = [Row(**{name: row[name] for name in Row.__dataclass_fields__}) for row in run.metrics]
    arms = [name for name in dict.fromkeys(row.arm for row in rows) if name != CHANNELS]
    if arm not in arms:
        raise SettingError("arm", arm, f"no such arm{nearest(arm, arms)}; has {', '.join(arms)}")
    at_target = [row for row in rows if row.arm == arm and row.level == level]
    seeds = list(dict.fromkeys(row.seed for row in at_target))
    if not seeds or (seed is not None and seed not in seeds):
        raise SettingError("seed", seed, f"{arm} has the seeds {', '.join(map(str, seeds))}")
    chosen = seeds[0] if seed is None else seed
    base = BaseConfig.parse(manifest["base"], where=str(folder / MANIFEST))
    changes = manifest["arms"].get(arm, {}).get("changes", {})
    base = base.patched(changes)
    sae = {
        "architecture": base.sae.activation.kind,
        "d_sae": base.sae.d_sae,
        "training_tokens": base.train.tokens,
        "saelab": base.sae.model_dump(mode="json"),
    }
    as_saebench = base.evaluation.probing.definition == 1
    examples = SAMPLING_SEED if as_saebench else run.probing_seed
    description = about(base, sae, f"{folder.name}/{arm}/seed {chosen}", examples)
    channels = [row for row in rows if row.arm == CHANNELS]
    return build_result([row for row in at_target if row.seed == chosen] + channels, description)


def result_at(path: Path, arm: str = "baseline", seed: int | None = None) -> dict[str, Any]:
    """Reads a result file, or builds that of a run's cell."""
    return run_result(path, arm, seed) if path.is_dir() else read_result(path)


def gate_lines(result: GateResult) -> list[str]:
    """Sums up the gate's view of a recorded SAE; its findings follow, one per line."""
    wrong = {finding.check: finding.sentence for finding in result.findings}
    if result.outcome != "invalid":
        word = "The gate has nothing against this SAE, as far as the file says."
    elif "probing_constant" in wrong and UNTRAINED & set(wrong):
        word = "An untrained SAE: all its accuracies are exactly .5, the class prior."
    elif "probing_constant" in wrong:
        word = "An SAE whose code tells the probes nothing: all its accuracies are exactly .5."
    else:
        word = "Not to be compared with anything."
    return [word, *(f"  {check}: {sentence}" for check, sentence in wrong.items())]


def comparison_lines(path: Path, other: Mapping[str, Any] | None = None) -> list[str]:
    """Lines of text for a recorded file: kind of SAE, means and entries, with ours next to them.

    Args:
        path: the file.
        other: another result, as `result_at` gives it.
    """
    result = read_result(path)
    config = result["eval_config"]
    tasks = f"{config['probe_train_set_size']} / {config['probe_test_set_size']}"
    checked = gate(read_saebench_result(path))
    lines = [
        f"{path.name}: {config['model_name']}, {_hook(result)}, {tasks} texts a task, "
        f"{config['context_length']} tokens a text, definition {definition_of(result)}",
        *gate_lines(checked),
    ]
    theirs = rows_of(result)
    ours = rows_of(other) if other else []
    why_not = "" if other is None else _why_not_compared(checked, result, other)
    lines += ["", *_means(theirs, ours, differences=bool(other) and not why_not)]
    if other is not None:
        lines += ["", f"No differences: {why_not}." if why_not else _compared(result, other)]
    return [*lines, "", *_entries(theirs)]


def _hook(result: Mapping[str, Any]) -> str:
    return str((result.get("sae_cfg_dict") or {}).get("hook_name") or "hook not recorded")


def _why_not_compared(
    checked: GateResult, result: Mapping[str, Any], other: Mapping[str, Any]
) -> str:
    """Reason why no difference between the two is taken; '' if one may be."""
    definitions = {"the file": definition_of(result), "ours": definition_of(other)}
    try:
        check_one_definition("sparse probing", definitions)
    except MismatchError as error:
        return str(error)
    return "the file's SAE is invalid, as said above" if checked.outcome == "invalid" else ""


def _compared(result: Mapping[str, Any], other: Mapping[str, Any]) -> str:
    """Sentence that says between which models, hooks and entries the differences are."""
    places = [(r["eval_config"]["model_name"], _hook(r)) for r in (result, other)]
    sets = [set(r["eval_config"]["dataset_names"]) for r in (result, other)]
    notes = []
    if places[0] != places[1]:
        notes.append(" against ".join(f"{model} at {hook}" for model, hook in places))
    if sets[0] != sets[1]:
        notes.append(f"over {len(sets[0])} against {len(sets[1])} entries")
    return "The differences are between " + ("; ".join(notes) or "SAEs in the same place") + "."


def _means(theirs: Sequence[Row], ours: Sequence[Row], differences: bool) -> list[str]:
    other = {row.metric: row for row in ours if not row.slice}
    head = ["mean over entries", "file", *(["ours"] if ours else [])]
    cells = [[*head, *(["difference"] if differences else [])]]
    for row in theirs:
        if row.slice or (row.value is None and other.get(row.metric, row).value is None):
            continue
        line = [row.metric, _number(row.value)]
        if ours:
            mine = other[row.metric].value if row.metric in other else None
            line.append(_number(mine))
            both = row.value is not None and mine is not None
            line += [f"{mine - row.value:+.4f}" if both else "-"] if differences else []  # type: ignore[operator]
        cells.append(line)
    return align_right(cells)


def _entries(rows: Sequence[Row]) -> list[str]:
    slices = [w for w in dict.fromkeys(row.slice for row in rows) if w and "," not in w]
    values = {(row.slice, row.metric): row for row in rows}
    cells = [["entry", *(m.removesuffix("_test_accuracy") for m in SHOWN)]]
    for where in slices:
        shown = [values.get((where, metric)) for metric in SHOWN]
        name = where.removeprefix("entry=")
        cells.append([name, *(_number(row.value if row else None) for row in shown)])
    return align_right(cells)


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"


def align_right(cells: Sequence[Sequence[str]]) -> list[str]:
    """Formats a table as lines: the first column aligned left, the others right."""
    widths = [max(len(line[i]) for line in cells) for i in range(len(cells[0]))]
    return [
        "  ".join(
            cell.rjust(width) if i else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        )
        for line in cells
    ]


def read_saebench_result(path: Path) -> dict[str, float | str | None]:
    """Reads the facts that a SAEBench `sparse_probing` result file holds about its SAE.

    Hooks are given by layer: that of the SAE's own configuration, that of the hook which SAEBench
    read for the evaluation, and that which the experiment wrote next to the result. SAEBench writes
    -100000 training tokens where nobody recorded any.

    Raises: SourceError when the file is missing or not such a result; DamageError when it is not
        JSON.
    """
    data = read_json(path)
    if not isinstance(data, dict) or data.get("eval_type_id") != "sparse_probing":
        raise SourceError(f"{path} is not a SAEBench sparse_probing result: name the file it wrote")
    config: dict[str, Any] = data.get("sae_cfg_dict") or {}
    scores = (data.get("eval_result_metrics") or {}).get("sae") or {}
    layer_of_hook = re.search(r"\d+", str(config.get("hook_name") or ""))
    return {
        "d_in": config.get("d_in"),
        "d_sae": config.get("d_sae"),
        "steps": data.get("training_steps"),
        "tokens": config.get("training_tokens"),
        "hook_sae": _layer(config.get("hook_layer")),
        "hook_activations": _layer(data.get("layer")),
        "hook_evaluation": _layer(layer_of_hook and layer_of_hook[0]),
        "probing_accuracy": scores.get("sae_test_accuracy"),
        "probing_constant": _all_at_chance(data.get("eval_result_details") or []),
    }


def _layer(value: object) -> str | None:
    return None if value is None else f"layer {value}"


def _all_at_chance(details: list[dict[str, Any]], chance: float = 0.5) -> float | None:
    """Returns 1 if every accuracy of the SAE is exactly the class prior, else 0; None without any
    accuracy."""
    accuracies = [
        value
        for entry in details
        for name, value in entry.items()
        if name.startswith("sae_") and name.endswith("_accuracy") and value is not None
    ]
    return float(all(value == chance for value in accuracies)) if accuracies else None
