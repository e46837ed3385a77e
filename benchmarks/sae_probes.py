"""Tests whether our definition 1 of sae_probes gives the package's numbers, and times both.

    python benchmarks/peers.py --venv benchmarks/.sae_probes --requirements sae_probes.txt
    python benchmarks/sae_probes.py --datasets 114_nyc_borough_Manhattan,119_us_state_TX

A small SAE is trained on the embedded model (or on --model) and passed on in SAELens' format. The
activations at the last tokens are ours and passed on in the package's file format, so that both
sides have the same model, SAE and rows; the model's pass is not timed. The package then runs as a
user runs it, `run_sae_evals` and `run_baseline_evals` in a process of its own.

    difference  largest |ours - package's| of accuracy and AUC over data sets and k
    seconds     of the processor, for the probes of one SAE, reading of the activations and encoding
                included; for definition 2 all its draws
"""

from __future__ import annotations

import json
import subprocess
from argparse import Namespace
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from time import process_time
from typing import Any

import torch
from common import HERE, Section, Target, parser, run, save, scratch, table

import saelab
from saelab.data import language_model
from saelab.data.probing.last_tokens import LastTokens, prepare_last_tokens
from saelab.data.probing.sae_probes import MASTER, SaeProbesConfig
from saelab.errors import SettingError
from saelab.evals.base import Row, Subject
from saelab.evals.sae_probes import evaluate_sae_probes
from saelab.study.plan import BaseConfig

#: What the issue of this evaluation asks for.
MOST_DIFFERENCE, LEAST_FACTOR = 0.002, 20.0
NUMBERS = {"accuracy": "test_acc", "auc": "test_auc"}


def main() -> None:
    made = parser("sae-probes beside our definition 1, and the time of both definitions.")
    made.set_defaults(threads=1)
    made.add_argument(
        "--package", type=Path, default=HERE / ".sae_probes", help="its environment, see above"
    )
    made.add_argument("--datasets", default="short", help="'short', 'all' or names with commas")
    made.add_argument("--model", default="embedded", help="as model.path")
    made.add_argument("--hook", default="blocks.2.hook_resid_post")
    made.add_argument("--tokens", type=int, default=262_144, help="tokens to train the SAE on")
    made.add_argument("--setting", default="normal", choices=["normal", "scarcity", "imbalance"])
    made.add_argument("--k", default="1,2,4,8,16,32,64,128", help="numbers of latents")
    made.add_argument("--regularisation", default="l2", choices=["l2", "l1"], help="of the probes")
    made.add_argument("--l1_solver", default="newton", choices=["newton", "saga"], help="ours")
    made.add_argument("--rounding", type=float, default=1e-6, help="of codes, in a second run")
    made.add_argument("--baselines", default="logistic,knn", help="of logistic, pca, knn, mlp")
    options = made.parse_args()
    if options.quick:
        options.tokens, options.k = 25_600, "1,16"
    torch.set_num_threads(options.threads)
    with scratch() as folder:
        base = saelab.settings(
            HERE.parent / "configs" / "embedded.toml",
            {
                "model.path": options.model,
                "hook_name": options.hook,
                "train.tokens": options.tokens,
                "evaluation.probing.entries": "none",
            },
        )
        sae = saelab.train(base, seed=0, cache=folder)
        data = _data(options, base, folder)
        theirs = _theirs(options, base, sae, data, folder)
        again = None
        if options.rounding:
            without = replace(data, config=data.config.patched({"baselines": []}))
            again = _theirs(options, base, sae, without, folder / "again", options.rounding)
        save("sae_probes", options, _sections(sae, data, theirs, again), None)


def _data(options: Namespace, base: BaseConfig, folder: Path) -> LastTokens:
    """Harvests the last tokens of the data sets."""
    found = sorted(options.package.glob(f"lib/*/site-packages/sae_probes/data/{MASTER}"))
    if not found:
        remedy = "is not an environment with sae-probes: make it as the script's docstring says"
        raise SettingError("--package", str(options.package), remedy)
    names = options.datasets
    config = SaeProbesConfig.parse(
        {
            "definition": 1,
            "path": str(found[0].parent),
            "datasets": names if names in ("short", "all") else names.split(","),
            "settings": [options.setting],
            "regularisation": options.regularisation,
            "l1_solver": options.l1_solver,
            "k_values": [int(k) for k in options.k.split(",")],
            "baselines": [name for name in options.baselines.split(",") if name],
        }
    )
    model = language_model.load(base.model)
    return prepare_last_tokens(config, model, base.input_hooks[0], folder)


# ---------------------------------------------------------------- the package


class Theirs:
    """Results of the package: its files, and the seconds of each data set."""

    def __init__(self, results: Path, seconds: dict[str, float]) -> None:
        self.seconds = seconds
        self.numbers: dict[tuple[str, str], list[dict[str, Any]]] = {}
        for file in sorted(results.rglob("*.json")):
            for record in json.loads(file.read_text(encoding="utf-8")):
                method = record.get("method")
                probe = f"channels_{_ours_of(method)}" if method else f"top_{record['k']}"
                self.numbers.setdefault((record["dataset"], probe), []).append(record)


#: Names of the package's baselines, where they differ from ours.
METHODS = {"logistic": "logreg"}


def _ours_of(method: str) -> str:
    return next((ours for ours, theirs in METHODS.items() if theirs == method), method)


def _theirs(
    options: Namespace,
    base: BaseConfig,
    sae: Any,
    data: LastTokens,
    folder: Path,
    rounding: float = 0.0,
) -> Theirs:
    """Runs the package on the same SAE, activations and data sets.

    Args:
        rounding: relative size of a change of the SAE's codes.
    """
    activations = folder / "activations" / "model_activations_model"
    activations.mkdir(parents=True)
    for name in data.names:
        torch.save(data.load(name).rows, activations / f"{name}_{base.hook_name}.pt")
    saelab.save(sae, folder / "sae")
    request = {
        "sae": str(folder / "sae"),
        "model_name": "model",
        "hook_name": base.hook_name,
        "setting": options.setting,
        "regularisation": data.config.regularisation,
        "k_values": list(data.config.k_values),
        "datasets": data.names,
        "baselines": [METHODS.get(name, name) for name in data.config.baselines],
        "activations": str(activations.parent),
        "results": str(folder / "results"),
        "threads": options.threads,
        "rounding": rounding,
    }
    file = folder / "request.json"
    file.write_text(json.dumps(request), encoding="utf-8")
    python, worker = options.package / "bin" / "python", HERE / "sae_probes_worker.py"
    ended = subprocess.run([python, worker, file], capture_output=True, text=True, check=False)
    if ended.returncode:
        last = (ended.stderr.strip().splitlines() or ["no message"])[-1]
        raise SettingError("--package", str(options.package), f"the package failed ({last})")
    reply = json.loads(ended.stdout.strip().splitlines()[-1])
    return Theirs(folder / "results", reply["seconds"])


# ---------------------------------------------------------------- tables


def _timed(subject: Subject | None, data: LastTokens) -> tuple[list[Row], float]:
    start = process_time()
    rows = evaluate_sae_probes(subject, data)
    return rows, process_time() - start


def _sections(
    sae: Subject, data: LastTokens, theirs: Theirs, again: Theirs | None
) -> list[Section]:
    small = replace(data, folders=dict(list(data.folders.items())[:1]))
    _timed(sae, small)  # imports scikit-learn
    rows, seconds = _timed(sae, data)
    channels, _ = _timed(None, data)
    second, of_second = _timed(sae, replace(data, config=data.config.patched({"definition": 2})))
    setting = data.config.settings[0]
    ours = {(row.metric, row.slice): row.value for row in [*rows, *channels]}
    title = "Largest difference of definition 1 from the package"
    shown = [_parity(title, ours, theirs, setting)]
    if again is not None:
        title = "Largest difference of the package from itself on codes with other last bits"
        shown.append(_parity(title, _by_name(theirs, setting), again, setting))
        shown[-1].targets.clear()
    total = sum(theirs.seconds.values())
    lines = [
        ["package", f"{total:.2f}", "1"],
        ["definition 1", f"{seconds:.2f}", f"{total / seconds:.2f}"],
        [
            f"definition 2, {data.config.draws} draws",
            f"{of_second:.2f}",
            f"{total / of_second:.2f}",
        ],
    ]
    timing = Section(
        f"Seconds of one SAE on {len(data.names)} data sets, the model's pass cached",
        table(["", "seconds", "package / this"], lines),
        [{"package": theirs.seconds, "definition_1": seconds, "definition_2": of_second}],
        [
            Target("package / definition 1", total / seconds, LEAST_FACTOR),
            Target("package / definition 2", total / of_second, LEAST_FACTOR),
        ],
    )
    means = [
        [row.metric, f"{row.value:.4f}"]
        for row in second
        if not row.slice and row.value is not None and row.metric.endswith("auc")
    ]
    other = Section("Mean AUC by definition 2", table(["metric", "mean"], means), [])
    return [each.show() for each in (*shown, timing, other)]


def _by_name(theirs: Theirs, setting: str) -> dict[tuple[str, str], float | None]:
    """Returns the package's numbers by our metric and slice."""
    return {
        (f"sae_probes_{probe}_{ours}", _slice(setting, record, dataset)): record[name]
        for (dataset, probe), records in theirs.numbers.items()
        for record in records
        for ours, name in NUMBERS.items()
    }


def _parity(
    title: str, ours: dict[tuple[str, str], float | None], theirs: Theirs, setting: str
) -> Section:
    raw: list[dict[str, Any]] = []
    for (metric, where), number in _by_name(theirs, setting).items():
        own = ours.get((metric, where))
        off = abs(own - number) if own is not None and number is not None else float("inf")
        raw.append({"slice": where, "metric": metric, "ours": own, "package": number, "off": off})
    worst: dict[str, dict[str, float]] = {}
    for record in raw:
        entry = worst.setdefault(record["slice"], dict.fromkeys(NUMBERS, 0.0))
        name = record["metric"].rsplit("_", 1)[1]
        entry[name] = max(entry[name], record["off"])
    lines = [[where, *(f"{entry[n]:.2g}" for n in NUMBERS)] for where, entry in worst.items()]
    most = max((record["off"] for record in raw), default=float("inf"))
    within = sum(record["off"] <= MOST_DIFFERENCE for record in raw)
    return Section(
        f"{title}; {within} of {len(raw)} numbers within {MOST_DIFFERENCE}",
        table(["", *NUMBERS], [*lines, *_spread(raw)]),
        raw,
        [Target("largest difference", most, MOST_DIFFERENCE, at_least=False)],
    )


def _spread(raw: Sequence[dict[str, Any]]) -> list[list[str]]:
    """Returns lines of quantiles over all probes, a column for each number."""
    lines = []
    for name, share in (("median", 0.5), ("90%", 0.9), ("99%", 0.99), ("largest", 1.0)):
        line = [f"all: {name}"]
        for number in NUMBERS:
            offs = [r["off"] for r in raw if r["metric"].endswith(number)]
            values = torch.tensor(offs, dtype=torch.float64)
            line.append(f"{float(values.quantile(share)):.2g}")
        lines.append(line)
    return lines


def _slice(setting: str, record: dict[str, Any], dataset: str) -> str:
    """Returns the slice of our row for a result of the package."""
    if setting == "imbalance":
        return f"setting=imbalance,positives={record['frac']:g},dataset={dataset}"
    if setting == "scarcity":
        return f"setting=scarcity,rows={record['num_train']},dataset={dataset}"
    return f"dataset={dataset}"


if __name__ == "__main__":
    run(main)
