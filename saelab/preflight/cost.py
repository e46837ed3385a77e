"""Time, memory and disk of harvests, trainings and launches, counted from the settings.

    harvest   tokens x (2 W L/B + 4 c a L) / model rate          or bytes written / store rate
    step      (2 N d F / (R matrix rate) + bytes / (R memory rate)) / efficiency
              + 8 N d / link [R > 1] + overhead
    bytes     36 P + 8 N F + 16 N L0 d,    P = 2 d F + F + d     [one device: P/R, F/R, L0/R]

    memory
    SAEs      4 (3 sum P + max P) + CODES 4 N F                  trained in turns in one job
    device    (SAE + its codes) / R + sample + language model
    harvest   process + weights + lanes x one pass's tensors + two shards + tokens
    training  process + workers x (process + weights + probing + a shard and the sample
              + SAEs of a job + snapshots + a matching + what is read ahead of a URL
              + logits of a pass, one context's in float32, and those stored for the KL divergence)
    launch    the larger of harvest and training; their sum (process and weights once) where the
              launch trains alongside its harvest

W: weights of the model's blocks, of which L of B are run; c: context; a: width of the attention;
N: rows a step; R: devices that share a dictionary's latents. Of a parameter Adam reads and writes
28 bytes, its gradient 4, the copy for the GEMM 4; a pre-activation is written and read; of an
active latent four rows are read (decode, gradient of its value, both weights). That is the step of
sparse codes (docs/decisions/0001): a code that is not sparse costs five times the GEMM.

The formulas count; rates are read from a table or measured (rates.py), and `calibration.py` checks
the formulas against runs. Of the memory only `process_bytes` was measured.
"""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from saelab.data import language_model
from saelab.data.activations.harvest import bytes_needed
from saelab.data.activations.parallel_passes import AHEAD, lane_count
from saelab.data.language_model import Size
from saelab.evals import core, core_data, probing
from saelab.evals.dictionary_matching import matching_bytes
from saelab.preflight.rates import Rates
from saelab.preflight.sae_probes_cost import sae_probes_cost
from saelab.sae import SAEConfig
from saelab.storage.cache import remote_cache
from saelab.study.calibration import calibration_tokens
from saelab.study.plan import BaseConfig, CellSpec
from saelab.training.sample import SAMPLE_ROWS
from saelab.training.snapshots import snapshot_bytes

#: Active latents a row where the settings name no number. Our choice.
L0 = 64
#: Bytes moved per parameter, per pre-activation, and per active latent and channel, in a step.
PARAMETER_BYTES, CODE_BYTES, ACTIVE_BYTES = 36, 8, 16
#: A process with torch, transformers and the tokenizer, in bytes. Measured: 390 to 450 MB.
PROCESS = 420 * 2**20
#: What Triton adds where it is installed: transformers imports torch's compiler, which loads it.
#: Measured: 180 to 210 MB, of which the code (160 MB) is shared by all processes.
TRITON = 190 * 2**20
#: Tensors of [CHUNK, d_sae] alive while codes are evaluated.
CODES = 3
#: Probing texts are shorter than their context; the share that counts in the embedded entries, and
#: classes over all of them.
TEXT_SHARE, CLASSES = 0.4, 21


def parameters(d: int, d_sae: int) -> int:
    """Number of parameters of an SAE of d channels and d_sae latents."""
    return 2 * d * d_sae + d_sae + d


def active_latents(sae: SAEConfig) -> float:
    """The L0 that the settings name, or our choice."""
    return sae.target_l0 or float(L0)


def _itemsize(dtype: str) -> int:
    return getattr(torch, dtype).itemsize


# ---- time ------------------------------------------------------------------------------------


def harvest_flops(size: Size, base: BaseConfig) -> float:
    """FLOP of one position in the blocks up to the hook point."""
    weights = size.weights / _itemsize(base.model.dtype)
    of_block = max(0.0, weights - size.vocabulary * size.d_model) / size.blocks
    run = max(language_model.blocks_run(hook, size.blocks) for hook in base.hooks)
    return run * (2 * of_block + 4 * base.context * size.attention)


def harvest_seconds(size: Size, base: BaseConfig, tokens: int, rates: Rates) -> float:
    """Seconds of the language model on one device for so many tokens."""
    positions = tokens * base.context / max(1, base.context - 1)
    return positions * harvest_flops(size, base) / rates.model


def step_seconds(rates: Rates, n: int, d: int, d_sae: int, l0: float, ranks: int = 1) -> float:
    """Seconds of one training step of n rows.

    Args:
        d, d_sae: channels and latents.
        l0: active latents a row.
        ranks: devices that share the latents.
    """
    moved = PARAMETER_BYTES * parameters(d, d_sae) + CODE_BYTES * n * d_sae
    moved += ACTIVE_BYTES * n * l0 * d
    seconds = 2 * n * d * d_sae / rates.matrix + moved / rates.memory
    seconds /= ranks * rates.step_efficiency
    if ranks > 1:
        seconds += 8 * n * d / rates.link
    return seconds + rates.step_seconds


# ---- memory of a harvest and of SAEs ---------------------------------------------------------


@functools.cache
def process_bytes() -> int:
    """Memory of a process before it does anything."""
    return PROCESS + (TRITON if importlib.util.find_spec("triton") else 0)


def harvest_bytes(size: Size, base: BaseConfig, tokens: int) -> int:
    """Memory of a harvest of so many tokens into a folder, besides process and weights.

    The memory of the model's device is counted like the host's.
    """
    config, context = base.harvest, base.context
    n, one_pass = lane_count(base.model.device, size.d_model), config.batch * context
    tokens = -(-tokens // context) * context
    live = one_pass * (10 * size.d_model + 2 * size.inner) * 4
    shard = min(tokens, config.shard_tokens) * size.d_model * _itemsize(config.dtype)
    ahead = min(tokens, config.shard_tokens + AHEAD * n * one_pass)
    shards = (2 if ahead > config.shard_tokens else 1) * len(base.hooks)
    return n * live + shards * shard + 9 * tokens


def state_bytes(n: int, d: int, widths: Sequence[int]) -> int:
    """Memory of SAEs that are trained in turns on batches of n rows.

    All have their parameters and two moments; the widest one's gradient and dense codes are
    counted, since one SAE at a time takes its step.

    Args:
        d: channels.
        widths: latents of each.
    """
    sizes = [parameters(d, width) for width in widths]
    widest = max(widths, default=0)
    return 4 * (3 * sum(sizes) + max(sizes, default=0)) + 4 * CODES * n * widest


def sample_bytes(d: int) -> int:
    """Memory of the rows that initialise SAEs."""
    return 4 * SAMPLE_ROWS * d


def device_bytes(n: int, d: int, width: int, ranks: int = 1) -> float:
    """Memory of one SAE in training on each of the devices that share it, without the model."""
    return state_bytes(n, d, [width]) / ranks + sample_bytes(d)


def shard_bytes(tokens: int, d: int, dtype: str) -> tuple[int, int]:
    """Memory of a shard as it is stored, and of its rows in float32 with their copy."""
    return tokens * d * _itemsize(dtype), 8 * tokens * d


# ---- needs of a launch -----------------------------------------------------------------------


@dataclass(frozen=True)
class Needs:
    """Bytes: memory of the harvest, memory of all processes while training, disk.

    `overlap` is the harvest's share that comes on top of training when both are at work.
    """

    harvest: int
    training: int
    disk: int
    overlap: int = 0

    @property
    def memory(self) -> int:
        return max(self.harvest, self.training + self.overlap)

    def line(self) -> str:
        parts = (self.memory, self.harvest, self.training, self.disk)
        whole, harvest, training, disk = (f"{part / 1e9:.1f} GB" for part in parts)
        both = ", both at once" if self.overlap else ""
        return (
            f"needs about {whole} of memory (harvest {harvest}, training {training}{both}) and "
            f"{disk} of disk for activations"
        )


def launch_needs(base: BaseConfig, specs: Sequence[CellSpec], workers: int, group: int) -> Needs:
    """Counts what a launch with nothing in the cache needs.

    Args:
        base: its settings.
        specs: its cells.
        workers: its processes; 0 trains in this one.
        group: cells in one job at most.

    Raises: SourceError when the language model can't be found.
    """
    if base.activations is not None:
        return Needs(process_bytes(), _training_bytes(workers, 0), 0)
    size = language_model.size(base.model)
    d = size.d_model
    harvested = harvest_bytes(size, base, base.train.tokens)
    probed = 2 * probing_rows(base) * d * len(base.input_hooks)
    inputs, hooks = len(base.input_hooks), len(base.hooks)
    shard, rows = shard_bytes(base.harvest.shard_tokens, hooks * d, base.harvest.dtype)
    if remote_cache() is not None:  # not mapped: read ahead, and a shard of training and held-out
        rows += base.harvest.read_ahead + 4 * shard  # activations each, with its bytes while read
    widest = d * max(inputs, len(base.target_hooks))
    job = _job_bytes(specs, widest, group, base.evaluation.snapshots)
    last, widest_sae = sae_probes_cost(base), max((spec.sae.d_sae for spec in specs), default=0)
    worker = size.weights + probed + rows + sample_bytes(hooks * d) + job
    worker += last.memory(d, widest_sae) + loss_bytes(size, base)
    tokens = [(base.train.tokens, hooks), (base.evaluation.tokens, hooks)]
    tokens.append((calibration_tokens(base), inputs))  # which is only read
    stored = sum(h * bytes_needed(n, base.context, d, base.harvest.dtype) for n, h in tokens)
    return Needs(
        process_bytes() + size.weights + harvested,
        _training_bytes(workers, worker) + size.weights,
        stored + probed + last.disk(d),
        harvested if base.harvest.overlaps(base.model.device) else 0,
    )


def loss_bytes(size: Size, base: BaseConfig) -> int:
    """Memory of measuring the language model's losses: logits of a pass in the model's dtype, of
    one context in float32 twice (as they are and as log-probabilities), and what is stored of the
    unchanged model."""
    contexts = base.evaluation.loss_contexts
    if not size.has_head:
        return 0
    of_context = base.context * size.vocabulary
    at_once = min(contexts, core_data.contexts_per_pass(base.context, size.vocabulary))
    stored = of_context * min(contexts, max(1, core_data.STORED_LOG_PROBS // of_context))
    starts = contexts * base.context * size.d_model * _itemsize(base.model.dtype)
    return (
        at_once * of_context * _itemsize(base.model.dtype) + 4 * (2 * of_context + stored) + starts
    )


def probing_classes(base: BaseConfig) -> int:
    """Classes of all probing entries, about."""
    settings = base.evaluation.probing
    return (CLASSES if settings.entries == "embedded" else 0) + 2 * len(settings.tables)


def probing_rows(base: BaseConfig) -> int:
    """Rows of probing activations, about."""
    settings = base.evaluation.probing
    texts = probing_classes(base) * (settings.train_size + settings.test_size)
    return int(texts * TEXT_SHARE * min(settings.context, base.context))


def _job_bytes(specs: Sequence[CellSpec], d: int, group: int, snapshots: int) -> int:
    """Memory of the largest job: its SAEs, their snapshots, and a matching of two dictionaries."""
    widest = sorted((spec.sae.d_sae for spec in specs), reverse=True)[:group]
    rows = max(core.CHUNK, probing.CHUNK, *(spec.train.batch_size for spec in specs))
    saved = sum(snapshot_bytes(snapshots, width, d) for width in widest)
    matching = max((matching_bytes(width, d) for width in widest), default=0)
    return state_bytes(rows, d, widest) + saved + matching


def _training_bytes(workers: int, worker: int) -> int:
    process = process_bytes()
    return process + (workers * (process + worker) if workers else worker)
