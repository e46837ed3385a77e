"""What a launch will need, said before it starts: memory of its phases, and disk for activations.

    harvest  = process + weights + lanes x one pass's tensors + two shards + tokens
    training = process + workers x (process + weights + probing + a shard and the sample
               + cells of a job x (parameters, two moments) + the largest one's gradient
               + one chunk of dense code + snapshots + a matching
               + what is read ahead of activations at a URL)

A launch takes fewer workers where its need is above what this machine, its control group or
SAELAB_MEMORY leave it, and is refused where not even one fits.

The need is the larger one, or the sum (its process and weights once) where the launch trains beside
its harvest. Bytes are counted from the settings; only `process` was measured.
"""

from __future__ import annotations

import functools
import importlib.util
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

import torch

from saelab.data import language_model
from saelab.data.activations.harvest import HarvestConfig, bytes_needed
from saelab.data.activations.parallel_passes import AHEAD, lane_count
from saelab.data.language_model import Size
from saelab.errors import SettingError
from saelab.evals import core, probing
from saelab.evals.dictionary_matching import matching_bytes
from saelab.storage.cache import remote_cache
from saelab.study.plan import BaseConfig, CellSpec
from saelab.training.sample import SAMPLE_ROWS
from saelab.training.snapshots import snapshot_bytes

#: Variable that names how much memory a launch may take.
BUDGET = "SAELAB_MEMORY"
#: Bytes where nothing limits them.
ENDLESS = 2**62
#: A process with torch, transformers and the tokenizer, in bytes. Measured: 390 to 450 MB.
PROCESS = 420 * 2**20
#: What Triton adds where it is installed: transformers imports torch's compiler, which loads it.
#: Measured: 180 to 210 MB, of which the code (160 MB) is shared by all processes.
TRITON = 190 * 2**20
#: Tensors of [CHUNK, d_sae] alive while codes are evaluated.
CODES = 3
#: Probing texts are shorter than their context; the share that counts in the embedded entries, and
#: classes over all of them.
FILLED, CLASSES = 0.4, 21


@dataclass(frozen=True)
class Needs:
    """Bytes: memory of the harvest, memory of all processes while training, disk.

    `beside` is the harvest's share that comes on top of training when both are at work.
    """

    harvest: int
    training: int
    disk: int
    beside: int = 0

    @property
    def memory(self) -> int:
        return max(self.harvest, self.training + self.beside)

    def line(self) -> str:
        parts = (self.memory, self.harvest, self.training, self.disk)
        whole, harvest, training, disk = (f"{part / 1e9:.1f} GB" for part in parts)
        both = ", both at once" if self.beside else ""
        return (
            f"needs about {whole} of memory (harvest {harvest}, training {training}{both}) and "
            f"{disk} of disk for activations"
        )


def needs(base: BaseConfig, specs: Sequence[CellSpec], workers: int, group: int) -> Needs:
    """What a launch with nothing in the cache needs.

    Args:
        base: its settings.
        specs: its cells.
        workers: its processes; 0 trains in this one.
        group: cells in one job at most.

    Raises: SourceError when the language model can't be found.
    """
    if base.activations is not None:
        return Needs(process(), _processes(workers, 0), 0)
    size = language_model.size(base.model)
    harvested = harvest_bytes(
        size, base.context, base.train.tokens, base.harvest, base.model.device
    )
    shard = base.harvest.shard_tokens * size.d_model * 4
    rows = _probing_rows(base) * size.d_model * 2
    sample = SAMPLE_ROWS * size.d_model * 4
    cells = _cells(specs, size.d_model, group, base.evaluation.snapshots)
    worker = size.weights + rows + 2 * shard + sample + cells + _read_ahead(base, size.d_model)
    tokens = (base.train.tokens, base.evaluation.tokens)
    stored = sum(bytes_needed(n, base.context, size.d_model, base.harvest.dtype) for n in tokens)
    return Needs(
        process() + size.weights + harvested,
        _processes(workers, worker) + size.weights,
        stored + rows,
        harvested if base.harvest.overlaps(base.model.device) else 0,
    )


def fitting(base: BaseConfig, specs: Sequence[CellSpec], workers: int, group: int) -> int | None:
    """The largest number of workers, up to `workers`, that the memory here holds; None for none."""
    room = room_here()
    for n in range(workers, -1, -1):
        if needs(base, specs, n, group).memory <= room:
            return n
    return None


def refuse(base: BaseConfig, specs: Sequence[CellSpec], group: int) -> NoReturn:
    """Raises: SettingError that says what a launch needs at least, and what there is."""
    least, room = needs(base, specs, 0, group).memory, room_here()
    remedy = (
        f"only {room / 1e9:.2f} GB are free here: lower harvest.shard_tokens, harvest.batch or "
    )
    remedy += f"sae.d_sae, free memory, or set {BUDGET} (as in 8GB) to what may be used"
    raise SettingError("memory that is needed", f"{least / 1e9:.2f} GB", remedy)


def room_here() -> int:
    """Bytes that a launch may take: SAELAB_MEMORY where it is set; otherwise what the machine has
    free, swap included, and what control groups and limits of the process leave.

    Raises: SettingError for a budget that is no size.
    """
    named = os.environ.get(BUDGET, "").strip()
    if not named:
        return min([_free(), *_of_groups(), *_of_process()])
    found = re.fullmatch(r"(\d{1,15}(?:\.\d{1,9})?) ?([KMGT]?)B?", named, re.IGNORECASE | re.ASCII)
    if not found:
        raise SettingError(BUDGET, named, "is no amount of memory: write it as in 8GB")
    return int(float(found[1]) * 1000 ** " KMGT".index(found[2].upper() or " "))


def _free() -> int:
    """Of the machine."""
    try:
        text = Path("/proc/meminfo").read_text()
    except OSError:  # not Linux: nothing is known
        return ENDLESS
    found = dict(re.findall(r"^(MemAvailable|SwapFree):\s+(\d+) kB", text, re.MULTILINE))
    return 1024 * sum(map(int, found.values())) if "MemAvailable" in found else ENDLESS


def _of_groups() -> Iterator[int]:
    """What each memory control group of this process and those above it leave; version 2 or 1."""
    try:
        lines = Path("/proc/self/cgroup").read_text().splitlines()
    except OSError:
        return
    for line in lines:
        number, controllers, path = line.split(":", 2)
        if number == "0":
            root, names = Path("/sys/fs/cgroup"), ("memory.max", "memory.current")
        elif "memory" in controllers.split(","):
            root = Path("/sys/fs/cgroup/memory")
            names = ("memory.limit_in_bytes", "memory.usage_in_bytes")
        else:
            continue
        place = root / path.strip("/")
        for folder in (place, *place.parents):
            with suppress(OSError, ValueError):
                limit, used = (int((folder / name).read_text()) for name in names)
                yield max(0, limit - used + _cached(folder))
            if folder == root:
                break


def _cached(folder: Path) -> int:
    """Bytes of files in memory that a control group counts and gives back when asked."""
    text = (folder / "memory.stat").read_text()
    found = re.search(r"^(?:total_)?inactive_file (\d+)$", text, re.MULTILINE)
    return int(found[1]) if found else 0


def _of_process() -> Iterator[int]:
    """What a limit on address space leaves; a worker has the same one for itself."""
    with suppress(ImportError, OSError, ValueError, IndexError):
        import resource

        limit, _ = resource.getrlimit(resource.RLIMIT_AS)
        if limit != resource.RLIM_INFINITY:
            pages = int(Path("/proc/self/statm").read_text().split()[0])
            yield max(0, limit - pages * resource.getpagesize())


@functools.cache
def process() -> int:
    """Memory of a process before it does anything, in bytes."""
    return PROCESS + (TRITON if importlib.util.find_spec("triton") else 0)


def harvest_bytes(size: Size, context: int, tokens: int, config: HarvestConfig, device: str) -> int:
    """Memory of a harvest into a folder, besides process and weights.

    Args:
        size: of the model.
        context: positions.
        tokens: how many are harvested.
        config: how.
        device: of the model; its own memory is counted like the host's.
    """
    n, one_pass = lane_count(device, size.d_model), config.batch * context
    tokens = -(-tokens // context) * context
    live = one_pass * (10 * size.d_model + 2 * size.inner) * 4
    shard = min(tokens, config.shard_tokens) * size.d_model * getattr(torch, config.dtype).itemsize
    ahead = min(tokens, config.shard_tokens + AHEAD * n * one_pass)
    shards = 2 if ahead > config.shard_tokens else 1
    return n * live + shards * shard + 9 * tokens


def _read_ahead(base: BaseConfig, d: int) -> int:
    """What a worker holds of activations at a URL, which are not mapped: those read ahead, and of
    the training and the held-out ones a shard each, with its bytes while it is read."""
    stored = base.harvest.shard_tokens * d * getattr(torch, base.harvest.dtype).itemsize
    return 0 if remote_cache() is None else base.harvest.read_ahead + 4 * stored


def _probing_rows(base: BaseConfig) -> int:
    """Rows of probing activations, about."""
    settings = base.evaluation.probing
    groups = (CLASSES if settings.entries == "embedded" else 0) + 2 * len(settings.tables)
    texts = groups * (settings.train_size + settings.test_size)
    return int(texts * FILLED * min(settings.context, base.context))


def _cells(specs: Sequence[CellSpec], d: int, group: int, snapshots: int) -> int:
    """The largest job: weights and two moments of its cells, the gradient of the one whose turn it
    is, one chunk of codes, the cells' snapshots, and a matching of two dictionaries."""
    widest = sorted((spec.sae.d_sae for spec in specs), reverse=True)[:group]
    weights = [4 * (2 * d * width + width + d) for width in widest]
    chunk = max(core.CHUNK, probing.CHUNK, *(spec.train.batch_size for spec in specs))
    codes = CODES * chunk * max(widest, default=0) * 4
    kept = sum(snapshot_bytes(snapshots, width, d) for width in widest)
    matching = max((matching_bytes(width, d) for width in widest), default=0)
    return 3 * sum(weights) + max(weights, default=0) + codes + kept + matching


def _processes(workers: int, worker: int) -> int:
    return process() + (workers * (process() + worker) if workers else worker)
