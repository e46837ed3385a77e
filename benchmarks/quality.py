"""Tests whether the fast path costs quality: trains the same cells by plain float32 autograd too.

    python benchmarks/quality.py [--quick] [--seeds 5] [--variants relu topk batchtopk jumprelu]

Each variant is trained twice per seed on the embedded default, on the same batches and from the
same start: as shipped (sparse kernels, selection in bfloat16 if the CPU supports it), and with
every step as dense float32 torch operations under autograd, without any of our kernels. Both are
evaluated in the same way. The table shows both means and the 95% t interval of the paired
differences; "equal" means that the interval contains 0.

Plain cells take about four times as long: with two processes, about 12 minutes for all variants.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack, contextmanager
from multiprocessing import get_context
from pathlib import Path
from time import perf_counter
from typing import Any
from unittest import mock

import numpy as np
import torch
from common import Section, parser, run, save, table
from torch import Tensor
from torch.nn.functional import linear

import saelab
from saelab import sae as model
from saelab import stats
from saelab.launch.prepare import prepare
from saelab.parts import base as seams
from saelab.parts.losses import reconstruction
from saelab.runtime.allocator import keep_freed_memory
from saelab.storage.cache import cache_folder

ROOT = Path(__file__).parent.parent
VARIANTS: dict[str, dict[str, Any]] = {
    "relu": {},
    "topk": {"activation": {"kind": "topk", "k": 32}, "losses": ["reconstruction", "auxk"]},
    "batchtopk": {
        "activation": {"kind": "batchtopk", "k": 32},
        "losses": ["reconstruction", "auxk"],
    },
    "jumprelu": {"activation": "jumprelu", "losses": ["reconstruction", "l0"]},
}
METRICS = ("fvu", "l0", "loss_recovered", "sae_top_5_test_accuracy", "sae_test_accuracy")


def main() -> None:
    options = _options()
    base = _base(options, "relu")
    prepare(base, cache_folder(Path()), base.model.device)
    jobs = [
        (variant, plain, seed, options.quick)
        for variant in options.variants
        for seed in range(options.seeds)
        for plain in (True, False)
    ]
    with ProcessPoolExecutor(options.threads, get_context("spawn")) as pool:
        found = dict(zip(jobs, pool.map(_cell, jobs), strict=True))
    sections = [_section(v, found, options).show() for v in options.variants]
    save("quality", options, sections, None)


def _options() -> argparse.Namespace:
    made = parser(__doc__ or "")
    made.add_argument("--seeds", type=int, default=5)
    made.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    options = made.parse_args()
    if options.quick:
        options.seeds, options.variants = 2, options.variants[:1]
    return options


def _base(options: Any, variant: str) -> Any:
    quick = options if isinstance(options, bool) else options.quick
    small = {"train.tokens": 51_200, "evaluation.probing.entries": "none"} if quick else {}
    sae = VARIANTS[variant] | ({"controllers": []} if "topk" in variant else {})
    changes = {f"sae.{name}": value for name, value in sae.items()}
    return saelab.settings(ROOT / "configs" / "embedded.toml", changes | small)


def _cell(job: tuple[str, bool, int, bool]) -> dict[str, float]:
    """Trains and evaluates one cell; returns its metrics and its seconds of training."""
    variant, plain, seed, quick = job
    torch.set_num_threads(1)
    keep_freed_memory()
    base = _base(quick, variant)
    with _plain_autograd(plain):
        start = perf_counter()
        sae = saelab.train(base, seed)
        seconds = perf_counter() - start
    scores = saelab.evaluate(sae, base, ("core",) if quick else ("core", "probing"))
    return {name: scores.get(name, np.nan) for name in METRICS} | {"seconds": seconds}


@contextmanager
def _plain_autograd(wanted: bool) -> Iterator[None]:
    """Replaces each of our operations in a training step by torch's, dense, in float32."""
    plain: list[tuple[Any, str, Any]] = [
        (model, "encode_all", _encode),
        (model.SAE, "_support", lambda self, z, starts: None),
        (model, "selection_dtype", lambda precision, device: torch.float32),
        (seams, "row_norms", lambda w: torch.linalg.vector_norm(w, dim=1)),
        (reconstruction, "mean_square", lambda a, b: (a - b).square().mean()),
    ]
    with ExitStack() as patches:
        for place, name, replacement in plain if wanted else ():
            patches.enter_context(mock.patch.object(place, name, replacement))
        yield


def _encode(u: Tensor, w: Tensor, b: Tensor, centre: Tensor | None = None) -> Tensor:
    if centre is not None:  # give the input its gradient to the centre back
        u = u + (centre.detach() - centre)
    return linear(u, w, b)


def _section(variant: str, found: dict[Any, dict[str, float]], options: Any) -> Section:
    def of(plain: bool, name: str) -> np.ndarray:
        seeds = range(options.seeds)
        return np.array([found[variant, plain, seed, options.quick][name] for seed in seeds])

    rows, raw = [], []
    for name in (*METRICS, "seconds"):
        fast, plain = of(False, name), of(True, name)
        if np.isnan([fast, plain]).any():
            continue  # a smoke run does not probe
        raw.append({"metric": name, "fast": fast.tolist(), "plain": plain.tolist()})
        cells = [name, f"{fast.mean():.5g}", f"{plain.mean():.5g}"]
        if name == "seconds":
            rows.append([*cells, f"{(plain / fast).mean():.2f} times", ""])
            continue
        low, high = (float(x) for x in stats.t_interval(fast - plain))
        word = "equal" if low <= 0 <= high else "differs"
        rows.append([*cells, f"{(fast - plain).mean():+.5f} [{low:+.5f}, {high:+.5f}]", word])
    columns = ["", "fast", "plain float32", "difference [95%]", ""]
    title = f"{variant}: {options.seeds} seeds, {_base(options, variant).train.tokens:,} tokens"
    return Section(title, table(columns, rows), raw)


if __name__ == "__main__":
    run(main)
