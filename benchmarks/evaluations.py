"""Measures the cost of the evaluations of one SAE on text, except probing (benchmarks/probing.py).

    python benchmarks/evaluations.py [--quick] [--threads 1]

Uses the embedded model, 128 contexts of 128 random tokens and an untrained SAE with 1,024 latents:
the cost of an evaluation does not depend on its result. Reports CPU seconds of this thread, the
least of `REPEATS`. `positions` and the others come on top of `core`, as in a launch, and use the
model's own predictions, which all cells of a worker share.
"""

from __future__ import annotations

import time

import torch
from common import Section, Target, parser, run, save, table

from saelab.data.activations.store import MemorySource, Shard
from saelab.data.language_model import ModelConfig, load
from saelab.evals.core import CoreData
from saelab.evals.measure import EvalData, evaluate
from saelab.sae import SAE, SAEConfig
from saelab.seeding import torch_stream

NAMES = ("positions", "sensitivity", "consistency", "truth", "absorption")
HOOK = "blocks.2.hook_resid_post"
REPEATS = 3
#: Seconds of `core` that `positions` may add; a cell's training takes more than ten times as long
#: as its `core`.
SHARE = 0.3


def main() -> None:
    made = parser("CPU seconds of each evaluation of one SAE.")
    made.set_defaults(threads=1, peers="none")
    options = made.parse_args()
    torch.set_num_threads(options.threads)
    sae, data = _subject(8 if options.quick else 128)
    evaluate(sae, data, ["core", "positions"])  # what all cells share is made here
    core = _seconds(sae, data, ["core"])
    rows = [{"name": "core", "cpu_s": core}]
    for name in NAMES:
        rows.append({"name": name, "cpu_s": _seconds(sae, data, ["core", name]) - core})
    lines = [[row["name"], f"{row['cpu_s']:.3f}", f"{row['cpu_s'] / core:.1%}"] for row in rows]
    added = next(row["cpu_s"] for row in rows if row["name"] == "positions") / core
    section = Section(
        "CPU seconds of one SAE; all but core: what is added to it",
        table(["evaluation", "seconds", "of core"], lines),
        rows,
        [Target("positions, as a share of core", added, SHARE, False)],
    )
    save("evaluations", options, [section.show()], None)


def _subject(contexts: int) -> tuple[SAE, EvalData]:
    model = load(ModelConfig())
    ids = torch.randint(3, 4000, (contexts, 128), generator=torch_stream(0, "bench evaluations"))
    mask = torch.ones(ids.shape, dtype=torch.bool)
    mask[:, 0] = False
    x = torch.cat([model.activations(some, None, [HOOK])[HOOK].float() for some in ids.split(32)])
    source = MemorySource([Shard(x, mask, ids.int())], {"hook_name": HOOK})
    sae = SAEConfig.parse({"d_sae": 1024, "initial_l0": 32}).build(model.d_model, 1, 0)
    sae.initialise(x[mask], 0)
    return sae.eval(), EvalData(CoreData(source, model), None)


def _seconds(sae: SAE, data: EvalData, names: list[str]) -> float:
    found = []
    for _ in range(REPEATS):
        start = time.thread_time()
        evaluate(sae, data, names)
        found.append(time.thread_time() - start)
    return min(found)


if __name__ == "__main__":
    run(main)
