"""Run folders as a launch leaves them, with made-up numbers of realistic size and spread."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from saelab.storage.atomic import write_json

KS = (1, 2, 5, 10, 20, 50)
ENTRIES = (
    "theme",
    "prose",
    "expression_role",
    "assignment_scope",
    "block",
    "function_name",
    "function_part",
)
ARMS = ("baseline", "A1 core", "A1 scaled start", "A literal", "baseline lr x2")
TARGET, LEVELS = 32.0, (16.0, 32.0, 64.0)
TOKENS, STEPS = 524_288, 2048
#: Learned scalars.
SCALARS = ("beta", "theta", "tau")
CHANNELS, UNTRAINED = "control:model channels", "control:untrained"


class Rows:
    """Rows of one Parquet file."""

    def __init__(self) -> None:
        self.rows: list[dict[str, Any]] = []

    def add(self, **row: Any) -> None:
        self.rows.append(row)

    def write(self, path: Path) -> None:
        pq.write_table(pa.Table.from_pylist(self.rows), path)


def write_run(
    folder: Path,
    arms: Sequence[str] = ARMS,
    *,
    seeds: int = 8,
    seeds_other: int = 3,
    entries: Sequence[str] = ENTRIES,
    loss_recovered: bool = True,
    invalid: Sequence[tuple[str, int]] = (),
    scalars: bool = True,
    curves: bool = True,
    metrics: bool = True,
    manifest: bool = True,
    draw: int = 0,
) -> Path:
    """Writes a run folder whose first arm is the baseline and whose second is the primary arm.

    Args:
        folder: to be made.
        arms: their names.
        seeds, seeds_other: of the first two arms, and of the others, which have no more.
        entries: of the probing tasks.
        loss_recovered: false for a source without a language-model head.
        invalid: cells (arm, seed) whose metrics are missing.
        scalars: whether arms after the first have beta, theta and tau.
        curves, metrics, manifest: whether that file is written.
        draw: of the made-up numbers.
    """
    folder.mkdir(parents=True)
    rng = np.random.default_rng(draw)
    shift = {arm: 0.0 if i == 0 else rng.normal(0, 0.008) for i, arm in enumerate(arms)}
    n_seeds = {arm: seeds if i < 2 else min(seeds, seeds_other) for i, arm in enumerate(arms)}
    table, trace = Rows(), Rows()
    fvu: dict[str, list[float | None]] = {arm: [] for arm in arms}  # by seed, at the target
    probing: dict[str, list[float | None]] = {arm: [] for arm in arms}
    for i, arm in enumerate(arms):
        for seed in range(n_seeds[arm]):
            luck = np.random.default_rng([draw, seed]).normal(0, 0.003) + rng.normal(0, 0.0015)
            for level in LEVELS:
                if level != TARGET and (i > 1 or seed > 1):
                    continue
                lost = "loss not finite at step 120" if (arm, seed) in invalid else ""
                value = 0.17 * (TARGET / level) ** 0.45 + shift[arm] + luck
                _metrics(table, rng, arm, seed, level, value, lost, loss_recovered)
                _settling(table, arm, seed, level, scalars and i > 0)
                if level == TARGET:
                    fvu[arm].append(None if lost else value)
                    five = _probing(table, rng, arm, seed, entries, 0.3 * shift[arm], lost)
                    probing[arm].append(None if lost else five)
                    _curves(
                        trace, rng, arm, seed, value, scalars and i > 0, tau=(0.5, 0.1, 1.0)[i % 3]
                    )
    _probing(table, rng, CHANNELS, -1, entries, 0.04, "", prefix="llm")
    _probing(table, rng, UNTRAINED, 0, entries, 0.11, "")
    info = {arm: _info(fvu, probing, arm, arms[0]) for arm in arms}
    write_json(folder / "final_info.json", info)
    if metrics:
        table.write(folder / "metrics.parquet")
    if curves:
        trace.write(folder / "curves.parquet")
    if manifest:
        write_json(folder / "manifest.json", _manifest(folder.name, arms))
    return folder


def _manifest(name: str, arms: Sequence[str]) -> dict[str, Any]:
    return {
        "run": name,
        "title": f"Title of {name}",
        "study": "shipped",
        "baseline": arms[0],
        "target_l0": TARGET,
        "levels": list(LEVELS),
        "primary": "fvu",
        "direction": "lower",
        "sesoi": 0.005,
        "arms": {arm: {"comment": f"what {arm} is"} for arm in arms},
        "scalars": {name: {"meaning": f"what {name} is", "unit": ""} for name in SCALARS},
        "units": {"fvu": "share of variance"},
    }


def _metrics(
    table: Rows,
    rng: np.random.Generator,
    arm: str,
    seed: int,
    level: float,
    fvu: float,
    lost: str,
    loss_recovered: bool,
) -> None:
    cell = {"arm": arm, "seed": seed, "level": level}
    no_head = "" if loss_recovered else "the model has no language-model head"
    clean, zero = 1.21, 9.4
    recovered = 1 - 0.25 * fvu + rng.normal(0, 0.001)
    of_head = {
        "loss_recovered": recovered,
        "ce_clean": clean,
        "ce_zero": zero,
        "ce_spliced": zero - recovered * (zero - clean),
    }
    of_code = {
        "l0": level * rng.uniform(0.97, 1.03),
        "fvu": fvu,
        "explained_variance": 1 - fvu,
        "mse": 3.1 * fvu,
        "cosine": math.sqrt(1 - fvu),
    }
    dead = min(0.9, 0.1 + 0.05 * (len(arm) % 5) + rng.normal(0, 0.01))
    histogram = _density(rng, level, dead)
    for values, definition, reason in (
        (of_code, "core/1", lost),
        (of_head, "loss_recovered/1", lost or no_head),
    ):
        for metric, value in values.items():
            _row(table, metric, value, definition, "", reason, cell)
    for where, share in histogram.items():
        _row(table, "density_histogram", share, "core/1", f"log10_density={where}", lost, cell)


def _settling(table: Rows, arm: str, seed: int, level: float, scalars: bool) -> None:
    """Rows that say when each scalar settles."""
    cell = {"arm": arm, "seed": seed, "level": level}
    for name in SCALARS:
        still = "" if scalars and name != "tau" else f"{name} does not change"
        _row(table, f"convergence.{name}", 0.8, "convergence/1", "", still, cell)


def _density(rng: np.random.Generator, level: float, dead: float) -> dict[str, float]:
    """Shares of 1536 latents by log10 of how often they fire."""
    centre = math.log10(level / 1536) - 0.3
    edges = np.arange(-4.5, 0, 0.25)
    weights = np.exp(-0.5 * ((edges + 0.125 - centre) / 0.55) ** 2) * rng.uniform(
        0.9, 1.1, len(edges)
    )
    shares = (1 - dead) * weights / weights.sum()
    return {"never": dead, **{f"{e:.2f}": float(s) for e, s in zip(edges, shares, strict=True)}}


def _probing(
    table: Rows,
    rng: np.random.Generator,
    arm: str,
    seed: int,
    entries: Sequence[str],
    penalty: float,
    lost: str,
    prefix: str = "sae",
) -> float:
    """Adds accuracies by entry and class; returns the mean at k = 5."""
    cell = {"arm": arm, "seed": seed, "level": TARGET}
    means = {}
    for k in (*KS, 0):
        metric = f"{prefix}_top_{k}_test_accuracy" if k else f"{prefix}_test_accuracy"
        found = []
        for i, entry in enumerate(entries):
            top = 0.74 + 0.03 * i
            value = 0.55 + (top - 0.55) * (1 - math.exp(-0.55 * ((k or 400) ** 0.55)))
            value += rng.normal(0, 0.004) - penalty * (1 if k else 0.3)
            found.append(value)
            where = f"entry={entry}"
            _row(table, metric, value, "sparse_probing/2", where, lost, cell)
            for c in "ab":
                _row(table, metric, value, "sparse_probing/2", f"{where},class={c}", lost, cell)
        means[k] = sum(found) / len(found)
        _row(table, metric, means[k], "sparse_probing/2", "", lost, cell)
    return means[5]


def _row(
    table: Rows, metric: str, value: float, definition: str, slice: str, reason: str, cell: dict
) -> None:
    table.add(
        metric=metric,
        value=None if reason else float(value),
        definition=definition,
        slice=slice,
        reason=reason,
        **cell,
    )


def _curves(
    trace: Rows,
    rng: np.random.Generator,
    arm: str,
    seed: int,
    fvu: float,
    scalars: bool,
    tau: float,
) -> None:
    shared = np.random.default_rng(seed)  # the same batches for all arms of a seed
    speed = shared.uniform(7, 9) + rng.uniform(-0.1, 0.1)
    goals = {"beta": 1 + rng.normal(0.15, 0.02), "theta": rng.normal(0.03, 0.008)}
    for i in range(200):
        u = i / 199
        noise = math.exp(shared.normal(0, 0.02) + rng.normal(0, 0.003))
        values = {
            "loss.reconstruction": (fvu + (1.2 - fvu) * math.exp(-speed * u)) * noise,
            "l0": (TARGET + 700 * math.exp(-2.2 * speed * u)) * noise,
            "grad_norm": 0.3 * noise,
            "dead": 0.1 * u,
        }
        values["loss"] = values["loss.reconstruction"] * 1.2
        if scalars:
            grown = 1 - math.exp(-3 * u)
            values["beta"] = 1 + (goals["beta"] - 1) * grown
            values["theta"] = goals["theta"] * grown
            values["tau"] = tau
        for name, value in values.items():
            trace.add(
                arm=arm, seed=seed, level=TARGET, step=round(u * STEPS), tokens=round(u * TOKENS),
                name=name, value=float(value),
            )  # fmt: skip


def _info(
    fvu: dict[str, list[float | None]],
    probing: dict[str, list[float | None]],
    arm: str,
    baseline: str,
) -> dict[str, Any]:
    l0 = [TARGET] * len(fvu[arm])
    lists = {"l0": l0, "fvu": fvu[arm], "sae_top_5_test_accuracy": probing[arm]}
    numbers = {metric: np.array([v for v in vs if v is not None]) for metric, vs in lists.items()}
    means: dict[str, Any] = {
        metric: float(found.mean()) if len(found) else None for metric, found in numbers.items()
    }
    stderrs = {
        metric: float(found.std(ddof=1) / math.sqrt(len(found))) if len(found) > 1 else None
        for metric, found in numbers.items()
    }
    if arm != baseline:
        means |= _verdict(fvu[arm], fvu[baseline])
    return {"means": means, "stderrs": stderrs, "final_info_dict": lists}


def _verdict(arm: list[float | None], baseline: list[float | None]) -> dict[str, Any]:
    """Paired difference with a t interval; the words are near enough for a picture."""
    pairs = zip(arm, baseline[: len(arm)], strict=True)
    d = np.array([a - b for a, b in pairs if a is not None and b is not None])
    if len(d) < 2:
        return {
            "verdict.fvu": "refused",
            "diff.fvu": None,
            "diff.fvu.low": None,
            "diff.fvu.high": None,
        }
    half = {2: 12.7, 3: 4.3, 8: 2.36}.get(len(d), 2.5) * d.std(ddof=1) / math.sqrt(len(d))
    low, high = d.mean() - half, d.mean() + half
    word = "helps" if high < 0 else "hurts" if low > 0 else "cannot tell yet"
    if word == "cannot tell yet" and max(abs(low), abs(high)) < 0.005:
        word = "equivalent"
    return {
        "verdict.fvu": word,
        "diff.fvu": float(d.mean()),
        "diff.fvu.low": float(low),
        "diff.fvu.high": float(high),
    }
