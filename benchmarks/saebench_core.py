"""SAEBench's `core` beside ours, on the same tokens: sections of the benchmark saebench_parity.

SAEBench runs as a whole (`multiple_evals`) on a table of tokens and says which batches it took, in
which order; `measure_core` then measures these. Our definition, `core/1`, is shown next to both.
The result files that are written here are read by SAEBench's own classes and by the readers of its
graphs.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from common import Peers, Section, Target, table
from safetensors.torch import load_file
from torch import Tensor

from saelab import __version__
from saelab.analysis.saebench import result_of
from saelab.data import language_model
from saelab.data.language_model import LanguageModel
from saelab.data.text.tokens import tokenize
from saelab.evals.base import Row
from saelab.evals.core import evaluate_core
from saelab.evals.core_data import CoreData
from saelab.evals.saebench.core import (
    CoreAbout,
    CoreResult,
    CoreTokens,
    build_core_result,
    measure_core,
)
from saelab.sae import SAE
from saelab.storage.atomic import write_json
from saelab.study.plan import BaseConfig

#: Contexts of a batch.
BATCH = 8
#: Largest difference of a metric, as a share of SAEBench's value. Our choice: float32.
RELATIVE = 1e-3
#: Largest difference of two logits, as the issue asks.
LOGITS = 1e-3
#: SAEBench's name of a metric -> ours in core/1, where there is one for the same thing.
OUR_NAMES = {
    "ce_loss_score": "loss_recovered",
    "ce_loss_with_ablation": "ce_zero",
    "ce_loss_with_sae": "ce_spliced",
    "ce_loss_without_sae": "ce_clean",
    "explained_variance": "explained_variance",
    "mse": "mse",
    "cossim": "cosine",
    "l0": "l0",
}


@dataclass(frozen=True)
class Place:
    """Model, hook and SAE that both sides measure.

    Args:
        base: settings of the SAE.
        sae: the SAE.
        weights: its file, as the peers read it.
        model: folder of the model.
        layer: of the hook.
        folder: for inputs and results.
    """

    base: BaseConfig
    sae: SAE
    weights: Path
    model: Path
    layer: int
    folder: Path


def core_sections(place: Place, peers: Peers, batches: int, rows: Sequence[Row]) -> list[Section]:
    """Runs both sides.

    Args:
        batches: of `BATCH` contexts.
        rows: of sparse probing by definition 1, for our result file of it.

    Returns: one section of the metrics, one of the latents' numbers, one of the files.
    """
    model = language_model.load(place.base.model)
    ids = _contexts(place.base, model, batches * BATCH)
    tokens = place.folder / "tokens"
    tokens.mkdir()
    pq.write_table(pa.table({"tokens": ids.tolist()}), tokens / "train.parquet")
    theirs = peers.call(
        "saebench_core", model=str(place.model), hook=place.base.hook_text, layer=place.layer,
        weights=str(place.weights), tokens=str(tokens), batches=batches, batch=BATCH,
        positions=ids.shape[1], out=str(place.folder / "saebench_core"),
    )  # fmt: skip
    given = load_file(theirs["batches"])
    logits = given.pop("logits")
    taken = [given[name] for name in sorted(given)]
    same = [model.logits(taken[0][:1]), logits]
    apart = float((same[0] - same[1]).abs().max())
    chosen = CoreTokens(
        loss_batches=taken[:batches], row_batches=taken[batches:], special=_special(model)
    )
    start = time.process_time()
    result = measure_core(place.sae, place.sae.fold(), model, place.base.hook_text, chosen)
    seconds = {"ours": time.process_time() - start, "saebench": theirs["seconds"]["cpu"]}
    written = json.loads(Path(theirs["result"]).read_text())
    by_ours = _by_core_1(place, model, chosen)
    files = _write(place, result, rows)
    return [
        _metrics(result, written["eval_result_metrics"], by_ours, apart, seconds).show(),
        _latents(result, written["eval_result_details"]).show(),
        _reread(peers.call("read_results", files=files), files, result).show(),
    ]


def _contexts(base: BaseConfig, model: LanguageModel, count: int) -> Tensor:
    """Returns the first full contexts of the held-out text, int64 [count, positions]."""
    found = tokenize(base.eval_text, model.tokenizer, base.context, count * base.context)
    return found.ids[:count].long()


def _special(model: LanguageModel) -> frozenset[int]:
    t = model.tokenizer
    ids = (t.pad_token_id, t.eos_token_id, t.bos_token_id)
    return frozenset(int(i) for i in ids if isinstance(i, int))


def _by_core_1(place: Place, model: LanguageModel, tokens: CoreTokens) -> dict[str, float]:
    """Returns the metrics of our definition on the batches of the rows."""
    ids, hook = torch.cat(list(tokens.row_batches)), place.base.hook_text
    mask = tokens.counted(ids)
    x = torch.cat([model.activations(part, None, [hook])[hook] for part in tokens.row_batches])
    positions = torch.arange(ids.shape[1]).expand_as(ids)
    shard = SimpleNamespace(
        rows=lambda: (x[mask].float(), positions[mask]), x=x, ids=ids, mask=mask, documents=None
    )
    source: Any = SimpleNamespace(shard=lambda _: shard, n_shards=1, header={"hook_name": hook})
    data = CoreData(source, model, len(ids))
    return {
        row.metric: row.value
        for row in evaluate_core(place.sae, data)
        if row.value is not None and not row.slice
    }


def _metrics(
    result: CoreResult,
    theirs: Mapping[str, Mapping[str, float]],
    by_ours: Mapping[str, float],
    logits: float,
    seconds: Mapping[str, float],
) -> Section:
    lines, raw = [], []
    for group, metrics in theirs.items():
        for name, value in metrics.items():
            mine = result.metrics[group][name]
            other = by_ours.get(OUR_NAMES.get(name, ""))
            gap = mine - value
            share = abs(gap) / max(abs(value), 1e-12)
            shown = "" if other is None else f"{other:.6g}"
            lines.append([name, f"{value:.6g}", f"{mine:.6g}", f"{gap:+.1e}", shown])
            raw.append({"group": group, "metric": name, "saebench": value, "ours": mine,
                        "difference": gap, "share": share, "core/1": other})  # fmt: skip
    largest = max(raw, key=lambda row: row["share"])
    return Section(
        "core: SAEBench, ours by its formulas, and our definition core/1, on the same tokens; "
        f"processor seconds: SAEBench {seconds['saebench']:.1f}, ours {seconds['ours']:.1f}",
        table(["metric", "SAEBench", "ours", "difference", "core/1"], lines),
        [*raw, {"cpu_seconds": dict(seconds)}],
        [
            Target("logits, largest difference", logits, LOGITS, False),
            Target("core, largest share of SAEBench's value", largest["share"], RELATIVE, False,
                   f"({largest['metric']})"),
        ],
    )  # fmt: skip


def _latents(result: CoreResult, theirs: Sequence[Mapping[str, float]]) -> Section:
    lines, raw = [], []
    for name in theirs[0]:
        gaps = [abs(a[name] - b[name]) for a, b in zip(result.latents, theirs, strict=True)]
        lines.append([name, f"{max(gaps):.1e}"])
        raw.append({"metric": name, "largest": max(gaps)})
    most = max(row["largest"] for row in raw)
    title = f"core: numbers of {len(theirs)} latents"
    text = table(["metric", "largest difference"], lines)
    return Section(title, text, raw, [Target("largest difference", most, 1e-2, False)])


def _write(place: Place, result: CoreResult, rows: Sequence[Row]) -> dict[str, str]:
    """Writes both of our result files; type -> file."""
    sae, base = place.sae, place.base
    about = CoreAbout(
        model_name=str(base.model.path),
        dtype=base.model.dtype,
        dataset=Path(str(base.eval_text.path)).name,
        sae={
            "architecture": "standard", "d_in": sae.d_in, "d_sae": sae.d_sae,
            "hook_name": base.hook_text, "hook_layer": place.layer,
            "training_tokens": base.train.tokens,
        },
        release="saelab", sae_id="parity", millis=int(time.time() * 1000), version=__version__,
    )  # fmt: skip
    contents = {
        "core": build_core_result(result, about),
        "sparse_probing": result_of(rows, sae, base, "parity", 42),
    }
    files = {}
    for kind, content in contents.items():
        file = place.folder / "written" / kind / "saelab_parity_eval_results.json"
        file.parent.mkdir(parents=True)
        write_json(file, content)
        files[kind] = str(file)
    return files


def _reread(found: Mapping[str, Any], files: Mapping[str, str], result: CoreResult) -> Section:
    """Compares what SAEBench's readers got with what was written."""
    lines, raw = [], []
    for kind, reply in found.items():
        written = json.loads(Path(files[kind]).read_text())["eval_result_metrics"]
        groups = [written["sae"]] if kind == "sparse_probing" else list(written.values())
        wanted = {name: value for group in groups for name, value in group.items()}
        equal = sum(reply["metrics"].get(name) == value for name, value in wanted.items())
        if kind == "core":
            score = result.metrics["model_performance_preservation"]["ce_loss_score"]
            wanted["get_core_results"] = 0.0
            equal += reply["core"] == {
                "l0": result.metrics["sparsity"]["l0"],
                "ce_loss_score": score,
            }
        lines.append([kind, reply["class"], f"{equal} of {len(wanted)}"])
        raw.append({"type": kind, "class": reply["class"], "equal": equal, "of": len(wanted)})
    share = sum(row["equal"] for row in raw) / sum(row["of"] for row in raw)
    return Section(
        "our result files, read by SAEBench",
        table(["type", "class", "numbers read as written"], lines),
        raw,
        [Target("share of numbers read as written", share, 1.0)],
    )
