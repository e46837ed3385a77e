"""Tests that memory and open files stay flat in a long training; measures checkpoints' cost.

    python benchmarks/soak.py [--quick] [--threads 1] [--folder benchmarks/.soak] [--seconds 60]

The soak test trains a small SAE on shards in a folder, each of which is read again whenever the
stream reaches it, and writes a checkpoint every few rounds. The same command continues after an
interruption; the new process starts its own count of memory. The cost of checkpoints is measured
with the launch's rule for when to write and the shipped settings: three cells trained on one stream
for `--seconds`.
"""

from __future__ import annotations

import gc
import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from common import HERE, Section, Target, parser, run, save, scratch, table
from rss import resident

from saelab.api import settings
from saelab.data.activations.store import FolderSource, FolderWriter, MemorySource, Shard
from saelab.data.activations.stream import Batch, Position, batches
from saelab.runtime.signals import Interrupted, defer_signals, exit_on_signal
from saelab.sae import SAEConfig
from saelab.seeding import torch_stream
from saelab.storage.atomic import read_json, write_json
from saelab.training import resume
from saelab.training.cell import TrainingCell
from saelab.training.loop import LONGEST_TURN, Cell, train
from saelab.training.optim import TrainConfig
from saelab.training.resume import ResumableCell, restore_cell, train_with_checkpoints

#: The soak: widths, rows of a batch, batches in a shard, shards on disk, rounds to a checkpoint.
D_IN, D_SAE, SIZE, IN_SHARD, SHARDS, ROUNDS = 16, 64, 32, 20, 8, 6
STEPS, QUICK_STEPS, SAMPLES = 200_000, 4_000, 40
#: What may be added after the first tenth, in bytes: two pages of every column of the log and what
#: the allocator keeps. Our choice.
FLAT = 4 << 20
#: Largest share of the time for checkpoints that is allowed.
LIMIT = 0.03
CONTEXT = 32


def main() -> None:
    own = parser(__doc__ or "")
    own.add_argument("--folder", type=Path, default=HERE / ".soak", help="folder to continue from")
    own.add_argument("--seconds", type=float, default=60, help="length of measuring the cost")
    options = own.parse_args()
    torch.set_num_threads(options.threads)
    with exit_on_signal():
        sections = [cost(5.0 if options.quick else options.seconds)]
        sections.append(soak(options.folder, QUICK_STEPS if options.quick else STEPS))
        save("soak", options, [section.show() for section in sections], None)


# ---- the soak --------------------------------------------------------------------------------


class Counted(FolderSource):
    """Shards on disk, with a count of reads."""

    reads = 0

    def shard(self, i: int) -> Shard:
        self.reads += 1
        return super().shard(i)


def soak(folder: Path, steps: int) -> Section:
    source = shards(folder / "shards")
    data = {"d_sae": D_SAE, "precision": "float32", "observers": [{"kind": "resampling"}]}
    training = TrainConfig(tokens=steps * SIZE, batch_size=SIZE)
    sample = source.shard(0).rows()[0]

    def build() -> Cell:
        return Cell("soak", SAEConfig.parse(data), training, sample, seed=0)

    member = restore_cell(build, folder / "checkpoints")
    kept, done = folder / "rows.json", member.cell.steps_done
    rows = [row for row in (read_json(kept) if done else []) if row["steps"] <= done]
    written, source.reads = (rows[-1]["checkpoints"], rows[-1]["shard_reads"]) if rows else (0, 0)
    rounds, start, last = 0, time.monotonic(), member.position

    def sample_row() -> None:
        gc.collect()
        rows.append(
            {
                "steps": member.cell.steps_done,
                "checkpoints": written,
                "shard_reads": source.reads,
                "resident": resident(),
                "open_files": len(list(Path("/proc/self/fd").iterdir())),
                "process": os.getpid(),
                "seconds": round(member.seconds + time.monotonic() - start, 1),
            }
        )
        write_json(kept, rows)

    def look(position: Position, living: list[TrainingCell]) -> None:
        nonlocal rounds, written, last
        rounds, last = rounds + 1, position
        if rounds % ROUNDS == 0 or member.cell.done:
            member.write(position, time.monotonic() - start)
            written += 1
        if (
            member.cell.steps_done * SAMPLES // steps
            > (rows[-1]["steps"] if rows else 0) * SAMPLES // steps
        ):
            sample_row()

    try:
        train([member.cell], batches(source, 0, SIZE, start=member.position), on_round=look)
    except Interrupted:
        with defer_signals():
            member.write(last, time.monotonic() - start)
        raise
    shutil.rmtree(folder)
    return section_of(rows)


def shards(folder: Path) -> Counted:
    if not (folder / "header.json").is_file():
        writer, draw = FolderWriter(folder, {"made": "soak", "d": D_IN}), torch_stream(0, "soak")
        for _ in range(SHARDS - writer.done):
            x = torch.randn(SIZE * IN_SHARD // CONTEXT, CONTEXT, D_IN, generator=draw)
            writer.add(Shard(x, torch.ones(x.shape[:2], dtype=torch.bool)))
        writer.finish()
    source = Counted.open(folder)
    assert isinstance(source, Counted)
    return source


def section_of(rows: list[dict[str, Any]]) -> Section:
    columns = ["steps", "checkpoints", "shard reads", "resident, MB", "open files", "process, s"]
    shown = [
        [
            f"{row['steps']:,}",
            f"{row['checkpoints']:,}",
            f"{row['shard_reads']:,}",
            f"{row['resident'] / 1e6:.1f}",
            str(row["open_files"]),
            f"{row['seconds']:.0f}",
        ]
        for row in rows
    ]
    last = [row for row in rows if row["process"] == rows[-1]["process"]]
    settled = last[len(last) // 10 :]
    grown = max(row["resident"] for row in settled) - settled[0]["resident"]
    files = max(row["open_files"] for row in settled) - settled[0]["open_files"]
    targets = [
        Target("resident memory added after the first tenth, MB", grown / 1e6, FLAT / 1e6, False),
        Target("open files added after the first tenth", files, 0, False),
    ]
    title = f"soak: d_in {D_IN}, d_sae {D_SAE}, batches of {SIZE} rows"
    return Section(
        title, table(columns, shown[:: max(1, len(shown) // 12)] + shown[-1:]), rows, targets
    )


# ---- the cost --------------------------------------------------------------------------------


def cost(seconds: float) -> Section:
    """Measures checkpoints of three cells of configs/embedded.toml, on random activations."""
    base, draw = settings(HERE.parent / "configs" / "embedded.toml"), torch_stream(0, "cost")
    x = torch.randn(512, base.context, 192, generator=draw)
    source = MemorySource([Shard(x, torch.ones(x.shape[:2], dtype=torch.bool))], {})
    training = base.train.patched({"tokens": 10**9})
    spent = {"wall": 0.0, "cpu": 0.0, "bytes": 0, "written": 0}
    original = resume.write_checkpoint

    def timed(folder: Path, *arguments: Any) -> None:
        wall, cpu = time.perf_counter(), time.process_time()
        original(folder, *arguments)
        spent["wall"] += time.perf_counter() - wall
        spent["cpu"] += time.process_time() - cpu
        spent["bytes"] += max(f.stat().st_size for f in folder.glob("*.safetensors"))
        spent["written"] += 1

    def limited() -> Iterator[tuple[Batch, Position]]:
        while time.perf_counter() - began < seconds:
            yield from (next(stream) for _ in range(LONGEST_TURN))

    with scratch() as folder:
        sample = source.shard(0).rows()[0]
        cells = [Cell(f"cell {i}", base.sae, training, sample, seed=i) for i in range(3)]
        members = [ResumableCell(cell, folder / str(i)) for i, cell in enumerate(cells)]
        stream = batches(source, 0, training.batch_size)
        began, cpu = time.perf_counter(), time.process_time()
        resume.write_checkpoint = timed
        try:
            train_with_checkpoints(members, lambda _: limited(), lambda *_: None)
        finally:
            resume.write_checkpoint = original
        whole_wall, whole_cpu = time.perf_counter() - began, time.process_time() - cpu
    share = {"wall": spent["wall"] / whole_wall, "cpu": spent["cpu"] / whole_cpu}
    each = spent["written"] or 1
    rows = [
        ["checkpoints of one cell", f"{spent['written']:.0f}"],
        ["MB each", f"{spent['bytes'] / each / 1e6:.1f}"],
        ["ms each", f"{spent['wall'] / each * 1e3:.0f}"],
        ["steps of each cell", f"{cells[0].steps_done:,}"],
        ["seconds in all", f"{whole_wall:.1f}"],
    ]
    targets = [
        Target(f"share of {name} time for checkpoints", value, LIMIT, False)
        for name, value in share.items()
    ]
    raw = {**spent, "whole_wall": whole_wall, "whole_cpu": whole_cpu}
    title = "cost of checkpoints: three cells of configs/embedded.toml"
    return Section(title, table(["", "found"], rows), [raw], targets)


if __name__ == "__main__":
    run(main)
