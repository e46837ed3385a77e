"""Complete studies and latents with made-up numbers, for tests of the page.

Names and texts hold markup on purpose: on the page it must stay text.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import pyarrow.parquet as pq
from run_folders import ARMS, write_run

from saelab.analysis.latents import Browsed, HeldOut, Latent
from saelab.evals.latent_examples import GROUPS, Example, Lens
from saelab.runs.folder import RunFolder
from saelab.runs.schema import CellId
from saelab.storage.atomic import append_line, read_json, write_json
from saelab.study.plan import PlanConfig
from saelab.study.registry import plan_hash

HOSTILE = "<script>document.title='taken'</script>"
#: An arm's name is a folder's too, and has no slash.
HOSTILE_ARM = "<img src=x onerror=document.title='taken'>"
PLAN = {"study": "made-up", "seeds": 8, "seeds_other": 3, "levels": [16, 64], "target_l0": 32}
PROVENANCE = {
    "model_digest": "0123456789abcdef",
    "tokenizer": "of 4096",
    "hook_name": "blocks.2.hook_resid_post",
    "context": 128,
    "mask": "BOS left out",
    "dtype": "float32",
    "tokens": 32_632,
    "text_digest": "fedcba9876543210",
}
FACTS = {
    "l0": 32.1,
    "explained_variance": 0.83,
    "loss_recovered": 0.98,
    "dead_share": 0.01,
    "target_l0": 32.0,
    "d_sae": 1536,
    "d_in": 192,
    "steps": 977,
    "tokens": 500_224,
    "hook_sae": "blocks.2.hook_resid_post",
    "hook_activations": "blocks.2.hook_resid_post",
    "hook_evaluation": "blocks.2.hook_resid_post",
}


def write_study(
    root: Path, runs: int = 2, arms: Sequence[str] = (*ARMS, HOSTILE_ARM), **changes: Any
) -> list[Path]:
    """Run folders as a launch of this version leaves them, and the ledger beside them.

    Args:
        root: folder of the study.
        runs: how many; the last one is confirmatory, and deviates from the plan where there are
            two or more.
        arms: of every run; the second one fails the gate's check of steps in one cell.
        changes: of the plan.
    """
    folders = [write_run(root / f"run_{i}", arms, draw=i) for i in range(runs)]
    for i, folder in enumerate(folders):
        last = i == runs - 1 and runs > 1
        _complete(folder, PlanConfig.parse(PLAN | changes), last)
        ledger, number = root / ".saelab" / "attempts.jsonl", i + 1
        start = {"start": number, "run": f"run_{i}", "started": f"2026-01-0{number}"}
        end = {"end": number, "outcome": "complete", "seconds": 12.5}
        append_line(ledger, json.dumps(start))
        append_line(ledger, json.dumps(end | {"reason": "" if i else "made again"}))
    return folders


def open_runs(folders: Sequence[Path]) -> list[RunFolder]:
    """The runs of `write_study`, opened."""
    return [RunFolder(folder) for folder in folders]


def _complete(folder: Path, plan: PlanConfig, last: bool) -> None:
    file = folder / "metrics.parquet"
    table = pq.read_table(file)
    for name, value in PROVENANCE.items():
        table = table.append_column(name, [[value] * len(table)])
    pq.write_table(table, file)
    manifest = read_json(folder / "manifest.json")
    gates = {}
    found = table.select(["arm", "seed", "level"]).group_by(["arm", "seed", "level"]).aggregate([])
    for cell in found.to_pylist():
        if not cell["arm"].startswith("control:"):
            sick = cell["arm"] == ARMS[1] and cell["seed"] == 7
            facts = FACTS | ({"steps": 0} if sick else {})
            name = f"{cell['arm']}/seed {cell['seed']}/L0 {cell['level']:g}"
            gates[name] = cell | {"expected": [], "facts": facts}
    write_json(folder / "gate.json", gates)
    write_json(
        folder / "manifest.json",
        manifest
        | {
            "purpose": "confirm" if last else "explore",
            "plan": plan.model_dump(mode="json"),
            "plan_hash": plan_hash(plan),
            "deviations": ["seeds: 5 -> 8"] if last else [],
            "cells": dict.fromkeys(gates, "hash"),
            "seeds": list(range(8)),
            "versions": {"saelab": "0.1.0", "package_digest": "0" * 16},
            "data": {},
            "seconds": 12.5,
        },
    )


class MadeUpText:
    """Stands for `HeldOut`: 16 words over and over, one of them markup."""

    WORDS = (*(f" word{i}" for i in range(14)), "\n", HOSTILE)
    key, why_no_text = "made-up", ""

    def ids(self, context: int) -> list[int]:
        return [(context + position) % 16 for position in range(64)]

    def words(self, context: int) -> list[str]:
        return [self.WORDS[token] for token in self.ids(context)]

    def token(self, token: int) -> str:
        return self.WORDS[token]


def made_up_cells(n: int = 40, cells: int = 2) -> list[Browsed]:
    """Cells of `n` latents each; latent i has density (i + 1) / 1000 and fires on one word."""
    text = cast(HeldOut, MadeUpText())
    return [
        Browsed(
            run="run_0",
            id=CellId(("baseline", HOSTILE_ARM)[cell % 2], cell, 32.0),
            d_sae=1536,
            tokens=32_632,
            latents=[_latent(i, n, alive=cell == 0) for i in range(n)],
            steps=977,
            why_no_lens="" if cell == 0 else "the model has no language-model head",
            why_no_text="",
            why_no_life="" if cell == 0 else "this SAE has no part that follows lifetimes",
            texts=text,
        )
        for cell in range(cells)
    ]


def _latent(i: int, n: int, alive: bool) -> Latent:
    values = [0.0] * 25
    values[16], values[17] = 2.0 + i, 1.0
    shown = [Example(3 * j, (i % 16) + 16 - 3 * j % 16, 0, tuple(values)) for j in range(8)]
    shown = [Example(e.context, e.start, e.start + 16, e.values) for e in shown]
    lens = Lens(((i % 16, 1.5), ((i + 1) % 16, 1.0)), (((i + 2) % 16, -1.2),)) if alive else None
    life = {"birth": 10 * i, "last_fired": 970, "firings": 99, "resamplings": i % 3}
    return Latent(
        index=i,
        group=GROUPS[4 * i // n],
        density=(i + 1) / 1000,
        loss_share=(n - i) / 10_000,
        largest=2.0 + i,
        examples=shown,
        lens=lens,
        neighbours=[((i + 1) % n, 0.5), (1500, 0.4)],
        life=life if alive else {},
    )
