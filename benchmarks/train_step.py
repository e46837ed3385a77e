"""Times one training step of every side on the same batches and weights, and the encoder GEMM.

    python benchmarks/train_step.py [--quick] [--shape 768x12288x2048] [--variant topk]

The limit is the faster of the encoder's GEMMs in float32 and bfloat16: processors without bfloat16
emulate it. The settings of each side are listed in README.md.
"""

from __future__ import annotations

import gc
from pathlib import Path
from typing import Any

import torch
from common import (
    Contestant,
    PeerError,
    Peers,
    Section,
    Target,
    alternate,
    fastest,
    fastest_of,
    parser,
    peers_of,
    run,
    save,
    scratch,
    target_of,
    timing_table,
)
from ours import BASE_OF, BY_BIAS, VARIANTS, Runner, Shape, cell, gemm, l0_of, make_inputs

from saelab.errors import SettingError
from saelab.runtime.allocator import keep_freed_memory

K = 32
SHAPES = (
    Shape(192, 1536, 512, turns=7, steps=5, settle=2),
    Shape(192, 3072, 256, turns=7, steps=5, settle=2),
    Shape(192, 3072, 2048, turns=7, steps=1, settle=1),
    Shape(2304, 2304, 1024, turns=5),
    Shape(768, 12288, 2048, turns=4),
    Shape(2304, 18432, 1024, turns=3),
)
#: (name, peer, options) by variant: the settings that each peer documents, and plain float32.
LENS = [
    ("SAELens, float32", "saelens", {}),
    ("SAELens, bf16 autocast", "saelens", {"autocast": True}),
]
DICTIONARY = [("dictionary_learning, float32", "dictionary_learning", {})]
SPARSE = [
    ("SAELens, sparse activations", "saelens", {"sparse_activations": True}),
    ("sparsify, Adam", "sparsify", {}),
    ("sparsify, signum (its default)", "sparsify", {"optimiser": "signum"}),
]
ROSTER: dict[str, list[tuple[str, str, dict[str, Any]]]] = {
    "topk": [*LENS, *DICTIONARY, *SPARSE],
    "batchtopk": [*LENS, *DICTIONARY],
    "relu": [*LENS, *DICTIONARY],
    "jumprelu": [*LENS, *DICTIONARY],
    "gated": [*LENS, *DICTIONARY],
    "matryoshka": LENS,
}
#: Most times that a variant's step takes of that of the one it extends.
MOST_OF_BASE = 1.3


def main() -> None:
    options = _parser().parse_args()
    shapes = _chosen(options.shape, options.quick)
    variants = [options.variant] if options.variant else list(VARIANTS)
    torch.set_num_threads(options.threads)
    keep_freed_memory()  # as the workers of a launch do
    sections = []
    with peers_of(options) as peers, scratch() as folder:
        for shape in shapes:
            for variant in variants:
                sections.append(measure(shape, variant, peers, folder, options.quick).show())
        save("train_step", options, sections, peers)


def _parser() -> Any:
    made = parser("Seconds per training step, ours beside the peers'.")
    made.add_argument("--shape", help="one of " + ", ".join(map(_key, SHAPES)))
    made.add_argument("--variant", choices=VARIANTS)
    return made


def _key(shape: Shape) -> str:
    return f"{shape.d_in}x{shape.d_sae}x{shape.rows}"


def _chosen(name: str | None, quick: bool) -> list[Shape]:
    if name is None:
        return list(SHAPES[:1] if quick else SHAPES)
    found = [shape for shape in SHAPES if _key(shape) == name]
    if not found:
        raise SettingError("--shape", name, "use one of " + ", ".join(map(_key, SHAPES)))
    return found


def measure(shape: Shape, variant: str, peers: Peers | None, folder: Path, quick: bool) -> Section:
    """Measures one table: a shape and a variant."""
    l0 = l0_of(variant, K, shape.d_sae)
    inputs = make_inputs(shape, l0)
    runners = {p: Runner(cell(variant, inputs, l0, p), inputs) for p in ("auto", "float32")}
    limits = [
        Contestant("encoder GEMM, bfloat16", gemm(inputs, torch.bfloat16), "limit", shape.rows),
        Contestant("encoder GEMM, float32", gemm(inputs, torch.float32), "limit", shape.rows),
    ]
    ours = [Contestant(f"ours, {p}", r, "ours", shape.rows) for p, r in runners.items()]
    base = BASE_OF.get(variant)
    if base is not None:
        runners[base] = Runner(cell(base, inputs, l0, "auto"), inputs)
        ours.append(Contestant(f"ours, {base}", runners[base], "ours", shape.rows))
    unavailable: dict[str, str] = {}
    theirs: list[Contestant] = []
    if peers is not None:
        file = folder / "inputs.safetensors"
        inputs.save(file)
        peers.call("inputs", file=str(file))
        theirs = _build(peers, variant, l0, shape.rows, unavailable)
    everyone = [*limits, *ours, *theirs]
    for contestant in [*limits, *ours]:
        contestant.run(1)  # `_build` has done the same for the peers
    turns = 2 if quick else shape.turns
    alternate(everyone, turns, shape.steps, shape.settle, warm=False)
    for contestant, runner in zip(ours, runners.values(), strict=True):
        contestant.note = f"L0 {runner.l0:.1f}"
    for contestant in theirs:
        assert peers is not None
        contestant.note = f"L0 {peers.call('l0', name=contestant.name):.1f}"
    if peers is not None:
        peers.call("drop")
    gc.collect()
    limit = fastest_of(limits)
    return Section(
        f"{variant}, {shape}, L0 {l0}; limit: {limit.name}",
        timing_table(everyone, ours[0], limit),
        [contestant.plain() for contestant in everyone],
        _targets(variant, ours, limit, theirs),
        unavailable,
    )


def _build(
    peers: Peers, variant: str, l0: int, rows: int, unavailable: dict[str, str]
) -> list[Contestant]:
    """Returns the peers' trainers whose first step works, and the others with the reason."""
    made = []
    for name, peer, settings in ROSTER[variant]:
        try:
            peers.call("build", name=name, peer=peer, variant=variant, k=l0, options=settings)
            peers.call("steps", name=name, n=1)
        except PeerError as error:
            unavailable[name] = str(error)
            continue

        def steps(n: int, name: str = name) -> list[float]:
            return peers.call("steps", name=name, n=n)

        made.append(Contestant(name, steps, "peer", rows))
    return made


def _targets(
    variant: str, sides: list[Contestant], limit: Contestant, theirs: list[Contestant]
) -> list[Target]:
    """Returns the figures of the first target: each peer at its best settings."""
    found, ours = [], sides[0]
    wanted = {"SAELens": 5.0 if variant in BY_BIAS else 8.0, "dictionary_learning": 5.0}
    wanted |= {"sparsify": 2.5} if variant in ("topk", "batchtopk") else {}
    for peer, least in wanted.items():
        best = fastest([c for c in theirs if c.name.startswith(peer)])
        if best is not None:
            found.append(target_of(f"{best.name} / ours", best, ours, least))
    if variant in BASE_OF:
        name = f"ours / {sides[-1].name}"
        found.append(target_of(name, ours, sides[-1], MOST_OF_BASE, at_least=False))
    elif variant not in BY_BIAS:
        found.append(target_of(f"ours / {limit.name}", ours, limit, 2.0, at_least=False))
    return found


if __name__ == "__main__":
    run(main)
