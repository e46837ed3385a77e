"""Compares our sparse probing of one SAE with SAEBench's functions, stage by stage.

    python benchmarks/probing.py [--quick] [--threads 1]

Both sides get the same activations of the embedded language model on the same labelled texts, and
the same ReLU SAE, which is trained for this purpose. Stages:

    encode and pool   activations -> mean code of every text, train and test
    k-sparse probes   all tasks, k in 1, 2, 5, 10, 20, 50
    full probes       all tasks, all columns

Our probes are timed through `probe_rows` on codes that are already pooled, like SAEBench's; the
k-sparse ones are the difference from a run without them. The pass of the language model, which both
sides cache, is not included. SAEBench's texts are padded to the longest that ours may have (64
positions; its own default is 128) and encoded 125 at a time, its default.
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import (
    HERE,
    Contestant,
    Peers,
    Section,
    Target,
    alternate,
    parser,
    peers_of,
    quartiles,
    run,
    save,
    scratch,
    table,
    target_of,
    timed,
)
from ours import one_row_each
from safetensors.torch import save_file
from torch import Tensor

import saelab
from saelab.data import language_model
from saelab.data.probing.activations import ProbingData, ProbingEntry, harvest_probing
from saelab.data.probing.embedded import embedded_entries
from saelab.evals.base import Row
from saelab.evals.probing import K_VALUES, evaluate_probing, mean_codes, probe_rows
from saelab.evals.probing.tasks import build_tasks
from saelab.sae import SAE

CONTEXT = 64
#: Texts per class: all classes of the embedded entries have so many, as SAEBench needs.
TRAIN_SIZE, TEST_SIZE = 500, 150
SAE_BATCH = 125  # SparseProbingEvalConfig.sae_batch_size


def main() -> None:
    made = parser("Seconds of sparse probing by stage.")
    made.set_defaults(threads=1)
    made.add_argument("--entries", type=int, default=4, help="how many of the embedded entries")
    options = made.parse_args()
    options.entries = 1 if options.quick else options.entries
    torch.set_num_threads(options.threads)
    with peers_of(options) as peers, scratch() as folder:
        sae, data = _subject_and_data(options, folder)
        codes = one_row_each(sae, data)
        sections = [
            _times(options, sae, data, codes, peers, folder).show(),
            _accuracies(codes, options.quick).show(),
        ]
        save("probing", options, sections, peers)


def _subject_and_data(options: Namespace, folder: Path) -> tuple[SAE, ProbingData]:
    """Returns a trained ReLU SAE and the activations of the language model in float32."""
    tokens = 25_600 if options.quick else 256_000
    changes = {"train.tokens": tokens, "evaluation.tokens": 4000, "sae.observers": []}
    changes |= {"evaluation.probing": {"entries": "none"}}
    base = saelab.settings(HERE.parent / "configs" / "embedded.toml", changes)
    sae = saelab.train(base, seed=0, cache=folder)
    entries = embedded_entries(TRAIN_SIZE, TEST_SIZE)[: options.entries]
    model = language_model.load(base.model)
    return sae, harvest_probing(model, base.hook_text, entries, CONTEXT, torch.float32)


# ---------------------------------------------------------------- times


def _times(
    options: Namespace,
    sae: SAE,
    data: ProbingData,
    codes: ProbingData,
    peers: Peers | None,
    folder: Path,
) -> Section:
    turns = 1 if options.quick else 3
    ours = _our_stages(sae, data, codes)
    theirs: dict[str, Contestant] = {}
    accuracy: dict[str, float] = {}
    if peers is not None:
        _open(peers, sae, data, folder)
        theirs = _their_stages(peers, accuracy)
    alternate([*ours.values(), *theirs.values()], turns, 1)
    _subtract(ours)
    stages = ["encode and pool", "k-sparse probes", "full probes", "all"]
    _add_up(ours)
    if theirs:
        _add_up(theirs)
    rows, targets = [], []
    wanted = {"k-sparse and full probes": 20.0, "all": 4.0}
    for stage in [*stages[:3], "k-sparse and full probes", "all"]:
        cells = [stage, _seconds(ours[stage])]
        if theirs:
            found = target_of(
                f"SAEBench / ours, {stage}", theirs[stage], ours[stage], wanted.get(stage, 0)
            )
            cells += [_seconds(theirs[stage]), f"{found.value:.1f}"]
            targets += [found] if stage in wanted else []
        rows.append([*cells, *([""] * (4 - len(cells)))])
    tasks = sum(len(entry.classes) for entry in data.entries)
    texts = sum(len(entry.labels) for entry in data.entries)
    tokens = sum(len(entry.rows) for entry in data.entries)
    shape = f"d {sae.d_in}, F {sae.d_sae}, {texts} texts, {tokens} tokens, {tasks} tasks"
    columns = ["s (quartiles)", "ours", "SAEBench", "SAEBench / ours"]
    raw = [
        {"stage": stage, **contestant.plain()}
        for side in (ours, theirs)
        for stage, contestant in side.items()
    ]
    return Section(
        f"sparse probing, {shape}, {options.threads} threads",
        table(columns, rows) + _their_accuracy(accuracy),
        raw,
        targets,
    )


def _our_stages(sae: SAE, data: ProbingData, codes: ProbingData) -> dict[str, Contestant]:
    def pool() -> None:
        for entry in data.entries:
            mean_codes(sae, entry.rows, entry.offsets)

    centred = [entry.rows.clone() for entry in codes.entries]

    def refill() -> None:
        for code, entry in zip(centred, codes.entries, strict=True):
            code.copy_(entry.rows)

    def probes(k_values: Sequence[int]) -> Callable[[int], list[float]]:
        def work() -> None:
            for code, entry in zip(centred, codes.entries, strict=True):
                probe_rows(code, entry, 0, k_values)

        return timed(work, refill)

    return {
        "encode and pool": Contestant("ours", timed(pool)),
        "k-sparse and full probes": Contestant("ours", probes(K_VALUES)),
        "full probes": Contestant("ours", probes(())),
    }


def _subtract(ours: dict[str, Contestant]) -> None:
    """Subtracts the full probes from all probes; what is left is the k-sparse probes."""
    both, full = ours["k-sparse and full probes"], ours["full probes"]
    rest = [
        [max(a - b, 1e-6) for a, b in zip(x, y, strict=True)]
        for x, y in zip(both.turns, full.turns, strict=True)
    ]
    ours["k-sparse probes"] = Contestant("ours", both.run, turns=rest)


def _add_up(stages: dict[str, Contestant]) -> None:
    """Returns the sums over stages, turn by turn."""
    one = stages["encode and pool"]
    for name, parts in {
        "k-sparse and full probes": ("k-sparse probes", "full probes"),
        "all": ("encode and pool", "k-sparse probes", "full probes"),
    }.items():
        if name not in stages:
            lists = zip(*(stages[part].turns for part in parts), strict=True)
            sums = [[float(sum(s)) for s in zip(*turn, strict=True)] for turn in lists]
            stages[name] = Contestant(one.name, one.run, one.side, turns=sums)


def _seconds(contestant: Contestant) -> str:
    low, middle, high = quartiles(contestant.samples)
    return f"{middle:.3g} ({low:.3g}-{high:.3g})"


# ---------------------------------------------------------------- SAEBench


def _open(peers: Peers, sae: SAE, data: ProbingData, folder: Path) -> None:
    weights = folder / "sae.safetensors"
    save_file({name: tensor.contiguous() for name, tensor in sae.fold().items()}, weights)
    files = {}
    for entry in data.entries:
        files[entry.name] = str(folder / f"{entry.name}.safetensors")
        save_file(_padded(entry), files[entry.name])
    peers.call("probing_open", weights=str(weights), files=files)


def _padded(entry: ProbingEntry) -> dict[str, Tensor]:
    """Returns 'side/class' -> [texts, positions, d], zero at positions that do not count."""
    lengths = entry.offsets.diff()
    texts = torch.zeros(len(lengths), CONTEXT, entry.rows.shape[1])
    inside = torch.arange(CONTEXT) < lengths[:, None]
    texts[inside] = entry.rows
    found = {}
    for label, name in enumerate(entry.classes):
        for side, wanted in (("train", True), ("test", False)):
            chosen = (entry.labels == label) & (entry.is_train == wanted)
            found[f"{side}/{name}"] = texts[chosen].contiguous()
    return found


def _their_stages(peers: Peers, accuracy: dict[str, float]) -> dict[str, Contestant]:
    def pool(n: int) -> list[float]:
        return [peers.call("probing_pool", batch=SAE_BATCH) for _ in range(n)]

    def probes(k_values: Sequence[int | None]) -> Callable[[int], list[float]]:
        def times(n: int) -> list[float]:
            return [sum(_probe(peers, k, accuracy) for k in k_values) for _ in range(n)]

        return times

    return {
        "encode and pool": Contestant("SAEBench", pool, "peer"),
        "k-sparse probes": Contestant("SAEBench", probes(K_VALUES), "peer"),
        "full probes": Contestant("SAEBench", probes([None]), "peer"),
    }


def _probe(peers: Peers, k: int | None, accuracy: dict[str, float]) -> float:
    found = peers.call("probing_probes", k=k)
    accuracy[f"k {k}" if k else "full"] = found["accuracy"]
    return found["seconds"]


def _their_accuracy(accuracy: dict[str, float]) -> str:
    if not accuracy:
        return ""
    means = ", ".join(f"{name} {value:.3f}" for name, value in accuracy.items())
    return f"\nSAEBench's mean test accuracies (its own negatives; full is its best epoch): {means}"


# ---------------------------------------------------------------- accuracy


def _accuracies(codes: ProbingData, quick: bool) -> Section:
    """Compares ours with scikit-learn's LogisticRegression on the same examples and columns."""
    k_values = (1, 5, 50) if quick else K_VALUES
    ours = evaluate_probing(None, codes, 0, k_values, prefix="sae")
    rows, plain = [], []
    for k in [*k_values, 0]:
        pairs = [
            (_ours(ours, entry, task.name, k), _sklearn(entry, task, k))
            for entry in codes.entries
            for task in build_tasks(entry, 0)
        ]
        mine, theirs = (np.array(side) for side in zip(*pairs, strict=True))
        worst, mean = float(abs(mine - theirs).max()), float(mine.mean() - theirs.mean())
        name = f"k {k}" if k else "full"
        numbers = [f"{mine.mean():.4f}", f"{theirs.mean():.4f}", f"{mean:+.4f}", f"{worst:.4f}"]
        rows.append([name, *numbers])
        plain.append({"probe": name, "ours": mine.tolist(), "sklearn": theirs.tolist()})
    columns = ["test accuracy", "ours", "scikit-learn", "difference", "largest of a task"]
    means = [abs(float(np.mean(p["ours"]) - np.mean(p["sklearn"]))) for p in plain]
    return Section(
        "accuracy beside scikit-learn (lbfgs, C 1, tol 1e-8, 10,000 iterations; same examples); "
        f"one of a task's {2 * TEST_SIZE} test texts is {0.5 / TEST_SIZE:.4f}",
        table(columns, rows),
        plain,
        [Target("largest difference of a mean over tasks", max(means), 0.002, at_least=False)],
    )


def _ours(rows: list[Row], entry: ProbingEntry, task: str, k: int) -> float:
    metric = f"sae_top_{k}_test_accuracy" if k else "sae_test_accuracy"
    where = f"entry={entry.name},class={task}"
    value = next(row.value for row in rows if (row.metric, row.slice) == (metric, where))
    assert value is not None, where
    return value


def _sklearn(entry: ProbingEntry, task: Any, k: int) -> float:
    """Fits scikit-learn on the k columns with the largest |difference of class means|."""
    from sklearn.linear_model import LogisticRegression

    train, test = entry.rows[task.train.index], entry.rows[task.test.index]
    positive = task.train.positive
    gap = (train[positive].mean(0) - train[~positive].mean(0)).abs()
    columns = gap.argsort(descending=True, stable=True)[:k] if k else slice(None)
    probe = LogisticRegression(C=1.0, tol=1e-8, max_iter=10_000)
    probe.fit(train[:, columns].double().numpy(), positive.numpy())
    right = probe.predict(test[:, columns].double().numpy()) == task.test.positive.numpy()
    return float(right.mean())


if __name__ == "__main__":
    run(main)
