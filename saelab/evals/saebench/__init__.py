"""Result files of sparse probing in SAEBench's schema: rows -> file, and file -> rows.

    eval_result_metrics   {"llm": {...}, "sae": {...}}: means over the entries
    eval_result_details   one object an entry, "dataset_name": "<entry>_results": means over classes
    eval_result_unstructured  {"<entry>_results": {metric: {class: accuracy}}}

A k that was not run is null. Fields that the schema lacks (the definition, entries that are
missing, other k, intervals) are in `eval_result_unstructured` under "saelab". A file without it
was written by SAEBench and holds numbers of definition 1; it does not give SAEBench's version.

Source of the schema: SAEBench 0.6.0's SparseProbingEvalOutput; tests/evals/test_saebench.py
compares the files written here with it.
"""

from __future__ import annotations

import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import Field

from saelab.config import digest
from saelab.errors import SourceError
from saelab.evals.base import Row, missing, number
from saelab.evals.probing.saebench import DEFINITION
from saelab.storage.atomic import read_json, write_json
from saelab.storage.validation import Int64, Loose, Number, validate

TYPE = "sparse_probing"
#: Numbers of columns that the schema has fields for.
SCHEMA_K = (1, 2, 5, 10, 20, 50, 100)
OPTIONAL_TEXT = ("sae_lens_id", "sae_lens_release_id", "sae_lens_version")
OURS = "saelab"


def metric_names(prefix: str) -> tuple[str, ...]:
    """Names the schema's fields of one side, 'llm' or 'sae'."""
    return (f"{prefix}_test_accuracy", *(f"{prefix}_top_{k}_test_accuracy" for k in SCHEMA_K))


_LLM, _SAE = metric_names("llm"), metric_names("sae")
_NUMBER, _INTEGER, _TEXT = (int, float), (int,), (str,)
_CONFIG: dict[str, tuple[type, ...]] = {
    "random_seed": _INTEGER,
    "dataset_names": (list,),
    "probe_train_set_size": _INTEGER,
    "probe_test_set_size": _INTEGER,
    "context_length": _INTEGER,
    "sae_batch_size": _INTEGER,
    "llm_batch_size": (int, type(None)),
    "llm_dtype": _TEXT,
    "model_name": _TEXT,
    "k_values": (list,),
    "lower_vram_usage": (bool,),
}
_TOP: dict[str, tuple[type, ...]] = {
    "eval_type_id": _TEXT,
    "eval_config": (dict,),
    "eval_id": _TEXT,
    "datetime_epoch_millis": _INTEGER,
    "eval_result_metrics": (dict,),
    "eval_result_details": (list,),
    "sae_bench_commit_hash": _TEXT,
    **dict.fromkeys(OPTIONAL_TEXT, (str, type(None))),
    "sae_cfg_dict": (dict, type(None)),
}


@dataclass(frozen=True, kw_only=True)
class About:
    """Content of a result file besides its numbers.

    Args:
        model_name: of the language model.
        dtype: it ran in.
        sae: the SAE's configuration; d_in, d_sae, hook_name, hook_layer by SAELens' names.
        release, sae_id: names of the SAE.
        train_size, test_size: texts per class that were asked for; a task has twice as many.
        context: tokens per text, BOS included.
        k_values: numbers of columns.
        seed: of the examples.
        millis: time of the measurement, milliseconds since 1970.
        version: of the package.
        further: added under "saelab".
    """

    model_name: str
    dtype: str
    sae: Mapping[str, Any]
    release: str
    sae_id: str
    train_size: int
    test_size: int
    context: int
    k_values: Sequence[int]
    seed: int
    millis: int
    version: str
    further: Mapping[str, Any] = field(default_factory=dict)


def build_result(rows: Sequence[Row], about: About) -> dict[str, Any]:
    """Builds the content of SAEBench's result file.

    Args:
        rows: of one subject (prefix 'sae') and of the model's channels ('llm'), as `probing_rows`
            gives them; others are ignored.

    Raises: SourceError when they lack required numbers, or have several definitions.
    """
    rows = [row for row in rows if row.definition.startswith(f"{TYPE}/")]
    definitions = sorted({row.definition for row in rows})
    if len(definitions) != 1:
        present = " and ".join(definitions) or "no sparse probing"
        raise SourceError(f"a SAEBench result holds one definition, these rows have {present}")
    values: dict[str, dict[str, float | None]] = {}
    for row in rows:
        values.setdefault(row.slice, {})[row.metric] = row.value
    names = [where.removeprefix("entry=") for where in values if _is_entry(where)]
    accuracies = {name: values[f"entry={name}"].get("llm_test_accuracy") for name in names}
    measured = [name for name in names if accuracies[name] is not None]
    overall = values.get("", {})
    named = {*_LLM, *_SAE}
    result = {
        "eval_type_id": TYPE,
        "eval_config": _config(about, measured),
        "eval_id": str(uuid.uuid5(uuid.NAMESPACE_OID, digest([row.as_dict() for row in rows]))),
        "datetime_epoch_millis": about.millis,
        "eval_result_metrics": {
            "llm": {name: overall.get(name) for name in _LLM},
            "sae": {name: overall.get(name) for name in _SAE},
        },
        "eval_result_details": [
            {"dataset_name": f"{name}_results"}
            | {metric: values[f"entry={name}"].get(metric) for metric in (*_LLM, *_SAE)}
            for name in measured
        ],
        "sae_bench_commit_hash": f"none: saelab {about.version}",
        "sae_lens_id": about.sae_id,
        "sae_lens_release_id": about.release,
        "sae_lens_version": None,
        "sae_cfg_dict": dict(about.sae),
        "eval_result_unstructured": _by_class(values)
        | {
            OURS: {
                "definition": definitions[0],
                "version": about.version,
                "missing": _missing(rows, set(names) - set(measured)),
                "metrics": {name: v for name, v in overall.items() if name not in named},
                **about.further,
            }
        },
    }
    if overall.get("llm_test_accuracy") is None:
        raise SourceError(
            "a SAEBench result needs the accuracy of the model's channels, which these rows "
            f"lack ({_reason(rows, 'llm_test_accuracy')}): evaluate 'model_channels' too"
        )
    check_result(result, "the new result")
    return result


def _config(about: About, names: list[str]) -> dict[str, Any]:
    return {
        "random_seed": about.seed,
        "dataset_names": names,
        "probe_train_set_size": 2 * about.train_size,
        "probe_test_set_size": 2 * about.test_size,
        "context_length": about.context,
        "sae_batch_size": 0,
        "llm_batch_size": None,
        "llm_dtype": about.dtype,
        "model_name": about.model_name,
        "k_values": list(about.k_values),
        "lower_vram_usage": False,
    }


def _is_entry(where: str) -> bool:
    return where.startswith("entry=") and "," not in where


def _by_class(values: Mapping[str, Mapping[str, float | None]]) -> dict[str, Any]:
    made: dict[str, Any] = {}
    for where, metrics in values.items():
        entry, comma, label = where.removeprefix("entry=").partition(",class=")
        if comma and where.startswith("entry="):
            for metric, value in metrics.items():
                made.setdefault(f"{entry}_results", {}).setdefault(metric, {})[label] = value
    return made


def _missing(rows: Sequence[Row], names: set[str]) -> dict[str, str]:
    slices = {f"entry={name}": name for name in sorted(names)}
    return {slices[row.slice]: row.reason for row in rows if row.slice in slices and row.reason}


def _reason(rows: Sequence[Row], metric: str) -> str:
    reasons = (row.reason for row in rows if row.metric == metric and not row.slice)
    return next((reason for reason in reasons if reason), "they were not measured")


def write_result(path: Path, rows: Sequence[Row], about: About) -> None:
    """Writes the result file of `build_result`."""
    write_json(path, build_result(rows, about))


# ---------------------------------------------------------------- reading


def read_result(path: Path) -> dict[str, Any]:
    """Reads a result file and checks it.

    Raises: SourceError when it is missing or not of the schema; DamageError when it is not JSON.
    """
    data = read_json(path)
    if not isinstance(data, dict) or data.get("eval_type_id") != TYPE:
        raise SourceError(f"{path} is not a SAEBench sparse_probing result: name the file it wrote")
    check_result(data, str(path))
    return data


def check_result(data: Mapping[str, Any], where: str) -> None:
    """Checks a result against the fields and types of SAEBench 0.6.0.

    Raises: SourceError that names the first field that is missing or of another type.
    """
    _check(data, _TOP, where)
    _check(data["eval_config"], _CONFIG, f"{where}: eval_config")
    metrics = data["eval_result_metrics"]
    _check(metrics, {"llm": (dict,), "sae": (dict,)}, f"{where}: eval_result_metrics")
    _check(metrics["llm"], {"llm_test_accuracy": _NUMBER}, f"{where}: eval_result_metrics.llm")
    groups = [(metrics["llm"], _LLM, "llm"), (metrics["sae"], _SAE, "sae")]
    for i, detail in enumerate(data["eval_result_details"]):
        place = f"eval_result_details.{i}"
        needed = {"dataset_name": _TEXT, "llm_test_accuracy": _NUMBER}
        _check(detail, needed, f"{where}: {place}")
        groups.append((detail, (*_LLM, *_SAE), place))
    _check_further(data, where)
    for group, names, place in groups:
        optional = {name: (*_NUMBER, type(None)) for name in names if name in group}
        _check(group, optional, f"{where}: {place}")


class _Gate(Loose):
    """Fields of the SAE's configuration that the gate reads."""

    d_in: Number | None = None
    d_sae: Number | None = None
    training_tokens: Number | None = None
    hook_name: str | None = None
    hook_layer: Int64 | None = None


class _Ours(Loose):
    """Fields under "saelab"."""

    definition: str = DEFINITION
    missing: dict[str, str] = Field(default_factory=dict)


def _check_further(data: Mapping[str, Any], where: str) -> None:
    """Checks values that the schema leaves open but that are read here."""
    remedy = "take the file that SAEBench wrote"
    steps = data.get("training_steps")
    validate(data["sae_cfg_dict"] or {}, _Gate, f"{where}: sae_cfg_dict", remedy, SourceError)
    validate(steps, Number | None, f"{where}: training_steps", remedy, SourceError)
    names = data["eval_config"]["dataset_names"]
    validate(names, list[str], f"{where}: dataset_names", remedy, SourceError)
    validate(_ours(data), _Ours, f"{where}: {OURS}", remedy, SourceError)
    further = data.get("eval_result_unstructured")
    for entry, metrics in further.items() if isinstance(further, Mapping) else ():
        if entry.endswith("_results"):
            kind = dict[str, dict[str, Number | None]]
            validate(metrics, kind, f"{where}: {entry}", remedy, SourceError)


def _check(data: Any, fields: Mapping[str, tuple[type, ...]], where: str) -> None:
    if not isinstance(data, Mapping):
        raise SourceError(f"{where} is not an object: SAEBench 0.6.0's schema requires one")
    for name, kinds in fields.items():
        if name not in data:
            raise SourceError(f"{where} lacks {name!r}, which SAEBench 0.6.0's schema requires")
        value = data[name]
        if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
            expected = " or ".join("null" if k is type(None) else k.__name__ for k in kinds)
            remedy = f"SAEBench 0.6.0's schema has {expected}"
            raise SourceError(f"{where}: {name} = {repr(value)[:60]}: {remedy}")


def definition_of(result: Mapping[str, Any]) -> str:
    """Definition id of a file's numbers; files of SAEBench have definition 1."""
    return str(_ours(result).get("definition", DEFINITION))


def _ours(result: Mapping[str, Any]) -> Mapping[str, Any]:
    further = result.get("eval_result_unstructured")
    return further.get(OURS) or {} if isinstance(further, Mapping) else {}


def rows_of(result: Mapping[str, Any]) -> list[Row]:
    """Reads the rows of a checked result: means over entries, of entries, and of classes.

    A value of null, or -1 as SAEBench writes under `lower_vram_usage`, becomes a missing one.
    """
    definition = definition_of(result)

    def rows(group: Mapping[str, Any], names: Sequence[str], where: str) -> list[Row]:
        return [_row(name, group[name], definition, where) for name in names if name in group]

    metrics = result["eval_result_metrics"]
    made = rows(metrics["llm"], _LLM, "") + rows(metrics["sae"], _SAE, "")
    for detail in result["eval_result_details"]:
        name = str(detail["dataset_name"]).removesuffix("_results")
        made += rows(detail, (*_LLM, *_SAE), f"entry={name}")
    for name, reason in _ours(result).get("missing", {}).items():
        made += [missing(metric, definition, reason, f"entry={name}") for metric in _SAE[:1]]
    return made + _class_rows(result.get("eval_result_unstructured"), definition)


def _class_rows(further: Any, definition: str) -> list[Row]:
    rows: list[Row] = []
    for entry, metrics in further.items() if isinstance(further, Mapping) else ():
        if entry == OURS or not entry.endswith("_results") or not isinstance(metrics, Mapping):
            continue
        for metric, by_class in metrics.items():
            where = f"entry={entry.removesuffix('_results')},class="
            rows += [_row(metric, v, definition, where + label) for label, v in by_class.items()]
    return rows


def _row(metric: str, value: float | None, definition: str, where: str) -> Row:
    if value is None or value < 0:
        return missing(metric, definition, "not run", where)
    return number(metric, value, definition, where)
