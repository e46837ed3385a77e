"""Damaged and hostile files of every format that is read: the right value, or one sentence.

For files with a checksum a value must be the one that was written. By hand:

    SAELAB_FUZZ=20 python -m pytest tests/contract/test_fuzz.py -m slow
"""

from __future__ import annotations

import json
import shutil
import tomllib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from fuzzing import answer, as_json, as_toml, harm, other_json, profile
from hypothesis import given
from hypothesis import strategies as st
from published_saes import BY_NAME as LAYOUTS
from run_folders import write_run
from safetensors.torch import save, save_file

from saelab import checkpoint, formats
from saelab.analysis.difference import difference
from saelab.analysis.saebench import comparison_lines, run_result
from saelab.config import digest, read_toml
from saelab.data.activations.foreign import ForeignSource
from saelab.data.activations.growing import GrowingSource
from saelab.data.activations.store import FolderSource, FolderWriter, Shard
from saelab.data.probing.activations import ProbingData, ProbingEntry
from saelab.data.probing.tables import entries_from_table
from saelab.data.text.corpus import TextConfig, documents
from saelab.launch.cell_store import finish, is_finished
from saelab.launch.latent_table import read_density
from saelab.launch.seed_pairs import rows_of_seeds
from saelab.launch.synthetic.study import read_study as read_synthetic
from saelab.preflight.rates import RATES, read_rates
from saelab.report.run_data import load
from saelab.runs.folder import RunFolder, run_cells, seal_run
from saelab.sae import SAEConfig
from saelab.storage.atomic import read_json, write_json, write_sealed
from saelab.study.plan import (
    Arm,
    BaseConfig,
    PlanConfig,
    Run,
    base_of_run,
    cells,
    read_base,
    read_plan,
)
from saelab.study.registry import attempts, deviations, register
from saelab.study.tuning import read_tuned
from saelab.training.curves import read_curve
from saelab.verdict.review import review, text

#: Cases of one file in the fast tests, and in the slow ones.
FEW, MANY = 8, 260


@dataclass(frozen=True)
class Format:
    """One kind of file, with a valid copy of it.

    Args:
        make: fills an empty folder.
        read: gives comparable data.
        files: that are harmed one at a time.
        exact: whether a checksum finds every change.
        reseal: makes a folder whose JSON was changed consistent again, as its writer would.
        share: of the usual number of cases, for slow readers.
    """

    make: Callable[[Path], None]
    read: Callable[[Path], Any]
    files: tuple[str, ...]
    exact: bool = False
    reseal: Callable[[Path], None] | None = None
    share: float = 1.0


def _tensors(sae: Any) -> list[Any]:
    return [(name, t.dtype, t.tolist()) for name, t in sorted(sae.state_dict().items())]


# ---------------------------------------------------------------- ours


def make_checkpoint(folder: Path) -> None:
    parts = {"scaling": {"kind": "variance"}, "losses": ["reconstruction", "l1", "scalar_prior"]}
    sae = SAEConfig.parse({"d_sae": 12, **parts}).build(5)
    sae.initialise(torch.randn(40, 5, generator=torch.Generator().manual_seed(0)), 0)
    checkpoint.save(sae, folder, {"model": "m", "hook_name": "h"})


def read_checkpoint(folder: Path) -> Any:
    sae, provenance = checkpoint.load(folder)
    return _tensors(sae), provenance


def reseal_checkpoint(folder: Path) -> None:
    record = read_json(folder / "sae.json")
    if isinstance(record, dict):
        record.pop("digest", None)
        write_json(folder / "sae.json", record | {"digest": digest(record)})


def _shards() -> list[Shard]:
    draw = torch.Generator().manual_seed(1)
    mask = torch.tensor([[False, True, True]] * 4)
    ids = torch.arange(12, dtype=torch.int32).view(4, 3)
    return [Shard(torch.randn(4, 3, 6, generator=draw), mask, ids) for _ in range(2)]


def write_harvest(folder: Path) -> FolderWriter:
    facts = {"d": 6, "context": 3, "n_tokens": 16, "n_contexts": 8, "shard_contexts": 4}
    writer = FolderWriter(folder, facts | {"hook_name": "h", "dtype": "float32"})
    for shard in _shards():
        writer.add(shard)
    return writer


def read_source(source: Any) -> Any:
    shards = [source.shard(i) for i in range(source.n_shards)]
    return [(s.x.tolist(), s.mask.tolist()) for s in shards], source.header, source.shard_counts


def read_harvest(folder: Path) -> Any:
    source = FolderSource.open(folder)
    source.verify()
    return read_source(source)


def reseal(name: str) -> Callable[[Path], None]:
    def sealed(folder: Path) -> None:
        data = read_json(folder / name)
        if isinstance(data, dict):
            write_sealed(folder / name, {n: v for n, v in data.items() if n != "digest"})

    return sealed


def make_probing(folder: Path) -> None:
    rows = torch.randn(6, 4, generator=torch.Generator().manual_seed(2)).half()
    offsets, labels = torch.tensor([0, 2, 4, 6]), torch.tensor([0, 1, 0])
    entry = ProbingEntry(
        name="e",
        classes=("a", "b"),
        rows=rows,
        offsets=offsets,
        labels=labels,
        is_train=torch.tensor([True, True, False]),
    )
    ProbingData((entry,), {"hook_name": "h"}).save(folder)


def read_probing(folder: Path) -> Any:
    found = ProbingData.load(folder, {"hook_name": "h"})
    return found.digest, found.header, [entry.rows.tolist() for entry in found.entries]


OF_CELL = ("curves.parquet", "latents.parquet")


def make_cell(folder: Path) -> None:
    names = {"step": [1, 2], "tokens": [128, 256], "name": ["loss", "loss"], "value": [2.0, 1.0]}
    pq.write_table(pa.table(names), folder / "curves.parquet")
    pq.write_table(pa.table({"density": [0.1, 0.2]}), folder / "latents.parquet")
    rows = [{"metric": "fvu", "value": 0.25, "slice": "", "reason": "", "definition": "core/1"}]
    finish(folder, {"rows": rows, "last": {"loss": 1.0}}, OF_CELL)


def read_cell(folder: Path) -> Any:
    """A damaged cell is trained again: here, it is the cell that was not damaged."""
    if not is_finished(folder):
        shutil.rmtree(folder)
        folder.mkdir()
        make_cell(folder)
    rows = read_json(folder / "cell.json")["rows"]
    return (
        rows,
        read_curve(folder / "curves.parquet", "loss"),
        read_density(folder / OF_CELL[1]).tolist(),
    )


def make_pair(folder: Path) -> None:
    sums = {name: {"-2.0": [1.5, 3]} for name in ("consistency.seeds", "consistency.seeds_signed")}
    for name in ("one", "two"):
        (folder / name).mkdir()
        for file in ("cell.json", "latents.parquet", "sae.safetensors"):
            (folder / name / file).write_bytes(b"")
    (folder / "pairs").mkdir()
    name = f"{digest(['one', 'two'])}.json"
    write_sealed(folder / "pairs" / name, {"one": sums, "two": sums})


PAIR = f"pairs/{digest(['one', 'two'])}.json"


def read_pair(folder: Path) -> Any:
    rows = rows_of_seeds(folder, folder / "one", [folder / "two"])
    return [row.as_dict() for row in rows]


# ---------------------------------------------------------------- finished runs


def make_run(folder: Path) -> None:
    """A run of two arms with everything that verdict, report and SAEBench's file ask for."""
    write_run(folder / "run_1", ("baseline", "other"), seeds=2, entries=("theme",))
    run = folder / "run_1"
    table = pq.read_table(run / "metrics.parquet")
    told = {"model_digest": "m", "tokenizer": "t", "hook_name": "h", "context": 128}
    told |= {"mask": "none", "dtype": "float32", "tokens": 9, "text_digest": "d"}
    for name, value in told.items():
        table = table.append_column(name, pa.array([value] * len(table)))
    pq.write_table(table, run / "metrics.parquet")
    pq.write_table(pq.read_table(run / "curves.parquet").slice(0, 300), run / "curves.parquet")
    gates = {
        f"{arm}/seed {seed}/L0 32": {
            "arm": arm, "seed": seed, "level": 32.0, "expected": [],
            "facts": {"l0": 32.0, "target_l0": 32.0, "steps": 10, "tokens": 100, "d_sae": 64},
        }
        for arm in ("baseline", "other")
        for seed in range(2)
    }  # fmt: skip
    write_json(run / "gate.json", gates)
    plan = PlanConfig(study="shipped", levels=()).model_dump(mode="json")
    manifest = read_json(run / "manifest.json") | {
        "plan": plan,
        "purpose": "explore",
        "base": BaseConfig().model_dump(mode="json"),
        "deviations": [],
        "cells": dict.fromkeys(gates, "0123456789abcdef"),
    }
    for seed in range(2):
        (run / "cells" / "other" / f"seed{seed}-l0_32").mkdir(parents=True)
    seal_run(run, manifest, read_json(run / "final_info.json"))


def unseal(folder: Path) -> None:
    """A run whose manifest answers for nothing: of an older version, or of a stranger."""
    file = folder / "run_1" / "manifest.json"
    data = read_json(file)
    if isinstance(data, dict):
        for name in ("digest", "sha256"):
            data.pop(name, None)
        write_json(file, data)


def make_unsealed(folder: Path) -> None:
    make_run(folder)
    unseal(folder)


def read_report(folder: Path) -> Any:
    run = load(folder / "run_1")
    values = {key: [tuple(v) for v in found] for key, found in run.values.items()}
    points = {
        key: {seed: (c.tokens.tolist(), c.values.tolist()) for seed, c in found.items()}
        for key, found in run.curves.items()
    }
    return run.title, run.arms, run.target_l0, run.info, values, points


def read_verdict(folder: Path) -> Any:
    found = review(folder / "run_1")
    return found.as_dict(), text(found)


def read_difference(folder: Path) -> Any:
    return difference(folder / "run_1", "other", "baseline", "fvu")


def read_cells(folder: Path) -> Any:
    """Every cell lies inside the run."""
    run = folder / "run_1"
    found = run_cells(run) or []
    for cell in found:
        assert cell.folder.resolve().is_relative_to(run.resolve() / "cells"), cell
    assert base_of_run(RunFolder(run))
    return [(str(cell.id.folder), cell.id.seed, cell.id.level) for cell in found]


def read_as_saebench(folder: Path) -> Any:
    result = run_result(folder / "run_1")
    for name in ("datetime_epoch_millis", "eval_id"):
        result.pop(name)
    return result


RUN = tuple(f"run_1/{name}" for name in ("manifest.json", "final_info.json", "metrics.parquet"))
GATE, CURVES = "run_1/gate.json", "run_1/curves.parquet"


# ---------------------------------------------------------------- of others


def _weights() -> dict[str, torch.Tensor]:
    draw = torch.Generator().manual_seed(3)
    return {
        "W_enc": torch.randn(5, 12, generator=draw),
        "W_dec": torch.randn(12, 5, generator=draw),
        "b_enc": torch.zeros(12),
        "b_dec": torch.zeros(5),
    }


def make_saelens(folder: Path) -> None:
    save_file(_weights(), folder / "sae_weights.safetensors")
    fields = {"architecture": "topk", "k": 3, "d_in": 5, "d_sae": 12, "dtype": "float32"}
    fields |= {"apply_b_dec_to_input": True, "normalize_activations": "none", "device": "cpu"}
    fields |= {"rescale_acts_by_decoder_norm": True, "reshape_activations": "none"}
    described = {"sae_lens_version": "6.54.0", "model_name": "m", "hook_name": "h"}
    described |= {"seqpos_slice": [None], "model_from_pretrained_kwargs": {}}
    write_json(folder / "cfg.json", fields | {"metadata": described})


#: Layout of a published SAE -> the files that are harmed, as `path` of the layout begins them.
PUBLISHED = {
    "gemma_scope": ("/params.npz",),
    "gemma_scope_2": ("/params.safetensors", "/config.json"),
    "llama_scope": ("/checkpoints/final.safetensors", "/hyperparams.json"),
    "llama_scope_r1": ("/sae_weights.safetensors", "/config.json"),
    "openai-topk": ("",),
}
PUBLISHED = {
    name: tuple(str(LAYOUTS[name].path(Path())) + end for end in ends)
    for name, ends in PUBLISHED.items()
}


def make_published(name: str) -> Callable[[Path], None]:
    def make(folder: Path) -> None:
        LAYOUTS[name].make(folder, 0)

    return make


def read_published(name: str) -> Callable[[Path], Any]:
    layout = LAYOUTS[name]
    named = layout.format if formats.TABLE[layout.format].by_name else ""

    def read(folder: Path) -> Any:
        loaded = formats.load(layout.path(folder), named)
        return _tensors(loaded.sae), loaded.origin

    return read


def make_sparsify(folder: Path) -> None:
    w = _weights()
    own = {"encoder.weight": w["W_enc"].T.contiguous(), "encoder.bias": w["b_enc"]}
    save_file(own | {"W_dec": w["W_dec"], "b_dec": w["b_dec"]}, folder / "sae.safetensors")
    fields = {"k": 3, "d_in": 5, "activation": "topk", "num_latents": 12, "multi_topk": False}
    write_json(folder / "cfg.json", fields | {"transcode": False, "skip_connection": False})


def make_dictionary_learning(folder: Path) -> None:
    w = _weights()
    own = {"encoder.weight": w["W_enc"].T.contiguous(), "encoder.bias": w["b_enc"], "k": 3}
    own |= {"decoder.weight": w["W_dec"].T.contiguous(), "b_dec": w["b_dec"], "threshold": -1.0}
    torch.save({name: torch.as_tensor(value) for name, value in own.items()}, folder / "ae.pt")
    trainer = {"dict_class": "AutoEncoderTopK", "k": 3, "lm_name": "m", "submodule_name": "s"}
    write_json(folder / "config.json", {"trainer": trainer})


def read_format(name: str = "") -> Callable[[Path], Any]:
    def read(folder: Path) -> Any:
        found = formats.load(folder, name)
        return _tensors(found.sae), found.origin

    return read


def make_activations(folder: Path) -> None:
    (folder / "acts").mkdir()
    x = torch.randn(20, 4, generator=torch.Generator().manual_seed(4))
    (folder / "acts" / "a.safetensors").write_bytes(save({"x": x}))


def make_texts(folder: Path) -> None:
    rows = [{"text": f"some words {i}", "label": "ab"[i % 2], "split": "train"} for i in range(8)]
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")
    (folder / "plain.txt").write_text("some words\nand more, and é\n")
    for codec in ("snappy", "zstd", "gzip"):
        pq.write_table(pa.Table.from_pylist(rows), folder / f"{codec}.parquet", compression=codec)
    for side in ("train", "test"):
        texts = [row | {"text": f"{side} {row['text']}"} for row in rows]
        pq.write_table(pa.Table.from_pylist(texts), folder / f"{side}.parquet")
    (folder / "lines").mkdir()
    for side in ("train", "test"):
        lines = [json.dumps(row | {"text": f"{side} {row['text']}"}) for row in rows]
        (folder / "lines" / f"{side}.jsonl").write_text("\n".join(lines))


def read_texts(name: str) -> Callable[[Path], Any]:
    return lambda folder: list(documents(TextConfig(kind="files", path=str(folder / name))))


def read_entry(where: str) -> Callable[[Path], Any]:
    return lambda folder: entries_from_table("e", folder / where, "text", "label", 2, 2)


def make_saebench(folder: Path) -> None:
    group = {"llm_test_accuracy": 0.9, "sae_test_accuracy": 0.8, "sae_top_5_test_accuracy": None}
    config = {"random_seed": 42, "dataset_names": ["d"], "probe_train_set_size": 4000,
              "probe_test_set_size": 1000, "context_length": 128, "sae_batch_size": 125,
              "llm_batch_size": 32, "llm_dtype": "float32", "model_name": "m",
              "k_values": [1, 2, 5], "lower_vram_usage": False}  # fmt: skip
    llm = {"llm_test_accuracy": 0.9}
    write_json(folder / "result.json", {
        "eval_type_id": "sparse_probing", "eval_config": config, "eval_id": "e",
        "datetime_epoch_millis": 1, "sae_bench_commit_hash": "c", "sae_lens_id": None,
        "sae_lens_release_id": None, "sae_lens_version": None,
        "eval_result_metrics": {"llm": llm, "sae": {"sae_test_accuracy": 0.8}},
        "eval_result_details": [{"dataset_name": "d_results", **group}],
        "eval_result_unstructured": {"d_results": {"sae_test_accuracy": {"0": 0.7, "1": 0.9}},
                                     "saelab": {"definition": "sparse_probing/2", "missing": {}}},
        "sae_cfg_dict": {"d_in": 5, "d_sae": 12, "hook_name": "blocks.1.x", "hook_layer": 1,
                         "training_tokens": 100},
    })  # fmt: skip


# ---------------------------------------------------------------- of the study

TUNED = {"plan_hash": "h", "primary": "fvu"}
TUNED |= {"baseline": {"train.lr": 0.008, "trials": {"0.004": 0.2, "0.008": 0.1, "0.016": None}}}


def make_study(folder: Path) -> None:
    write_json(folder / "tuned.json", {"run_10": TUNED})
    register(folder, PlanConfig(study="s"))
    lines = [{"start": 1, "run": "run_1", "started": "2026-01-01T00:00:00Z", "pid": 1}]
    lines += [{"end": 1, "outcome": "failed", "reason": "x", "seconds": 1.5}]
    file = folder / ".saelab" / "attempts.jsonl"
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "plan.toml").write_text("study = 's'\nlevels = [16, 64]\nseeds = 8\n")
    base = "context = 32\n[sae]\nd_sae = 256\nactivation = { kind = 'topk', k = 16 }\n"
    (folder / "base.toml").write_text(base + "[train]\ntokens = 16_384\nlr = 4e-3\n")
    (folder / "whole.toml").write_bytes(
        as_toml(_without_none(BaseConfig().model_dump(mode="json")))
    )
    (folder / "numbers.toml").write_bytes(
        as_toml(PlanConfig(study="s").model_dump(exclude_none=True))
    )
    (folder / "synthetic.toml").write_text(SYNTHETIC)
    (folder / "rates.toml").write_bytes(RATES.read_bytes())
    write_json(folder / "base.json", BaseConfig().model_dump(mode="json"))
    write_json(folder / "plan.json", PlanConfig(study="s").model_dump(mode="json"))


#: A small comparison on synthetic activations.
SYNTHETIC = """
target_l0 = 4
levels = [2, 8]
evals = ["core"]
[data]
d = 8
features = 16
l0 = 2.0
[arms.a]
d_sae = 16
[arms.b]
d_sae = 16
activation = { kind = "topk", k = 4 }
controllers = []
"""


def _without_none(data: Any) -> Any:
    """The data without what TOML has no word for."""
    if isinstance(data, dict):
        return {k: _without_none(v) for k, v in data.items() if v is not None}
    return [_without_none(v) for v in data] if isinstance(data, list) else data


def read_cells_of_plan(folder: Path) -> Any:
    """The cells of a study, as `saelab plan check` works them out."""
    plan, base = read_plan(folder / "numbers.toml"), read_base(folder / "whole.toml")
    specs = cells(plan, base, Run("", [Arm("baseline"), Arm("a", {"train.lr": 1e-4})]))
    return [(spec.id, spec.sae.target_l0, spec.train.steps) for spec in specs]


def read_study(folder: Path) -> Any:
    return [attempt.line() for attempt in attempts(folder)]


def settings_of(kind: Any, name: str) -> Callable[[Path], Any]:
    def read(folder: Path) -> Any:
        file = folder / name
        data = read_json(file) if file.suffix == ".json" else read_toml(file)
        return kind.parse(data, where=name).model_dump(mode="json")

    return read


FORMATS: dict[str, Format] = {
    "checkpoint": Format(
        make_checkpoint, read_checkpoint, ("sae.json", "sae.safetensors"), exact=True
    ),
    "checkpoint of a stranger": Format(
        make_checkpoint, read_checkpoint, ("sae.json",), reseal=reseal_checkpoint
    ),
    "harvest": Format(
        lambda folder: write_harvest(folder).finish() and None,
        read_harvest,
        ("header.json", "shard-00001.safetensors"),
        exact=True,
    ),
    "harvest of a stranger": Format(
        lambda folder: write_harvest(folder).finish() and None,
        lambda folder: read_source(FolderSource.open(folder)),
        ("header.json",),
        reseal=reseal("header.json"),
    ),
    "shard that is not verified": Format(
        lambda folder: write_harvest(folder).finish() and None,
        lambda folder: read_source(FolderSource.open(folder)),
        ("shard-00000.safetensors",),
    ),
    "growing harvest": Format(
        lambda folder: write_harvest(folder) and None,
        lambda folder: GrowingSource(folder, lambda: False).shard(1).x.tolist(),
        ("partial.json",),
        exact=True,
    ),
    "probing": Format(
        make_probing, read_probing, ("probing.json", "probing.safetensors"), exact=True
    ),
    "cell": Format(make_cell, read_cell, ("cell.json", *OF_CELL), exact=True),
    "pair": Format(make_pair, read_pair, (PAIR,), exact=True),
    "report": Format(make_run, read_report, (*RUN, CURVES), exact=True, share=0.3),
    "verdict": Format(make_run, read_verdict, (*RUN, GATE), exact=True, share=0.3),
    "report of a stranger": Format(
        make_unsealed, read_report, (*RUN, CURVES), reseal=unseal, share=0.3
    ),
    "verdict of a stranger": Format(
        make_unsealed, read_verdict, (*RUN, GATE), reseal=unseal, share=0.3
    ),
    "difference": Format(make_unsealed, read_difference, RUN[1:], share=0.5),
    "cells of a run": Format(make_unsealed, read_cells, RUN[:1], reseal=unseal),
    "run as SAEBench's": Format(make_unsealed, read_as_saebench, RUN[::2], share=0.3),
    "saelens": Format(make_saelens, read_format(), ("cfg.json", "sae_weights.safetensors")),
    "sparsify": Format(make_sparsify, read_format(), ("cfg.json", "sae.safetensors")),
    "dictionary_learning": Format(
        make_dictionary_learning, read_format("dictionary_learning"), ("config.json", "ae.pt")
    ),
    **{
        name: Format(make_published(name), read_published(name), files)
        for name, files in PUBLISHED.items()
    },
    "activations": Format(
        make_activations,
        lambda folder: read_source(ForeignSource.open(folder / "acts")),
        ("acts/a.safetensors",),
    ),
    "jsonl": Format(make_texts, read_texts("rows.jsonl"), ("rows.jsonl",)),
    "text": Format(make_texts, read_texts("plain.txt"), ("plain.txt",)),
    **{
        f"parquet {codec}": Format(
            make_texts, read_texts(f"{codec}.parquet"), (f"{codec}.parquet",)
        )
        for codec in ("snappy", "zstd", "gzip")
    },
    "table": Format(make_texts, read_entry("."), ("train.parquet",)),
    "table of lines": Format(make_texts, read_entry("lines"), ("lines/test.jsonl",)),
    "SAEBench": Format(
        make_saebench, lambda folder: comparison_lines(folder / "result.json"), ("result.json",)
    ),
    "tuned": Format(make_study, read_tuned, ("tuned.json",)),
    "attempts": Format(make_study, read_study, (".saelab/attempts.jsonl",)),
    "registered plan": Format(
        make_study,
        lambda folder: deviations(folder, PlanConfig(study="s")),
        (".saelab/plan.json",),
        exact=True,
    ),
    "plan.toml": Format(make_study, settings_of(PlanConfig, "plan.toml"), ("plan.toml",)),
    "base.toml": Format(make_study, settings_of(BaseConfig, "base.toml"), ("base.toml",)),
    "cells of a plan": Format(make_study, read_cells_of_plan, ("numbers.toml", "whole.toml")),
    "synthetic.toml": Format(
        make_study,
        lambda folder: read_synthetic(folder / "synthetic.toml").model_dump(mode="json"),
        ("synthetic.toml",),
    ),
    "rates.toml": Format(
        make_study, lambda folder: read_rates("h100", folder / "rates.toml"), ("rates.toml",)
    ),
    "settings": Format(make_study, settings_of(BaseConfig, "base.json"), ("base.json",)),
    "plan": Format(make_study, settings_of(PlanConfig, "plan.json"), ("plan.json",)),
}


def attacked(name: str, folder: Path, cases: int) -> None:
    """Harms the files of a format `cases` times in all, each time from a fresh copy."""
    kind = FORMATS[name]
    good = folder / "good"
    good.mkdir()
    kind.make(good)
    before = answer(lambda: kind.read(good))
    assert before[0] == "value", before
    for file in kind.files:
        _attack(kind, folder, file, max(2, int(cases * kind.share)), before)


def _attack(kind: Format, folder: Path, file: str, cases: int, before: tuple[str, str]) -> None:
    good, bad = folder / "good", folder / "bad"
    content = (good / file).read_bytes()
    attack = harm(content)
    if file.endswith(".toml"):
        settings = other_json(tomllib.loads(content.decode())).map(as_toml)
        attack = st.one_of(attack, settings, settings, harm(content, text=True))
    if file.endswith(".json"):
        others = other_json(json.loads(content)).map(as_json)
        attack = others if kind.reseal else st.one_of(attack, others)

    @profile(cases)
    @given(attack)
    def attacked_once(damaged: bytes) -> None:
        shutil.rmtree(bad, ignore_errors=True)
        shutil.copytree(good, bad, symlinks=True)
        (bad / file).write_bytes(damaged)
        if kind.reseal is not None:
            answer(lambda: kind.reseal(bad))  # type: ignore[misc]
        found = answer(lambda: kind.read(bad))
        if kind.exact and found[0] == "value":
            assert found == before, f"a wrong value from a damaged {file}"

    attacked_once()


@pytest.mark.parametrize("name", FORMATS)
def test_a_damaged_file_gives_its_value_or_one_sentence(name: str, tmp_path: Path) -> None:
    attacked(name, tmp_path, FEW)


@pytest.mark.slow
@pytest.mark.parametrize("name", FORMATS)
def test_many_damaged_files_give_their_value_or_one_sentence(name: str, tmp_path: Path) -> None:
    attacked(name, tmp_path, MANY)
