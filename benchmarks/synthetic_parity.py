"""Tests whether our scores against known features, and our tree generator, agree with SAELens'.

    python benchmarks/synthetic_parity.py [--quick] [--threads 1] [--rows 40000]

Scores: SAELens makes a smaller model of the kind of SynthSAEBench-16k and draws from it. We train
SAEs narrower and wider than the number of features on these rows and pass them on as plain tensors.
Then `eval_sae_on_synthetic_data` of SAELens, whose generator replays the same codes, and our
`truth` and `core` score the same SAEs on the same rows.

Generator: ours draws as many rows with SAELens' directions, loadings and standard deviations, so
that only the process and chance can differ.

    z_i = (r_i - r'_i) / sqrt((v_i + v'_i) / n)         r_i the rate or the mean value of feature i

If both are the same process, z has mean square 1 over features.
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from common import Peers, Section, Target, parser, peers_of, run, save, scratch, table
from safetensors.torch import load_file, save_file
from torch import Tensor

from saelab.data.activations.store import MemorySource, Shard
from saelab.data.synthetic.trees import ForestConfig, ForestTruth
from saelab.evals.base import Row
from saelab.evals.core import CoreData, evaluate_core
from saelab.evals.known_features import evaluate_truth
from saelab.launch.synthetic.training import Conditions, train_on
from saelab.sae import SAE, SAEConfig
from saelab.training.optim import TrainConfig

#: SynthSAEBench-16k, made smaller: 8 trees of 21 nodes, and 88 features that stand alone.
CONFIG = ForestConfig(
    d=64, features=256, highest=0.3, lowest=5e-3, roots=8, depth=2, positions=1,
    apart_steps=50, apart_lr=3e-3,
)  # fmt: skip
#: Latents of the SAEs: fewer and more than features.
WIDTHS = (96, 384)
#: Ours, SAELens' name, and by how much they may differ: float32 on their side.
SCORES = (
    ("mcc", "mcc", 1e-5),
    ("uniqueness", "uniqueness", 1e-5),
    ("latent_f1", "classification.f1_score", 1e-5),
    ("latent_precision", "classification.precision", 1e-5),
    ("latent_recall", "classification.recall", 1e-5),
    ("explained_variance", "explained_variance", 1e-5),
    ("l0", "sae_l0", 1e-3),
    ("oracle_l0", "true_l0", 1e-3),
    ("dead_latents", "dead_latents", 0.5),
)
#: The mean square of z over features may be so large: with 256 features it is 1 +- .09.
Z_LIMIT = 1.4


def main() -> None:
    made = parser("Scores against known features and the forest generator, beside SAELens.")
    made.set_defaults(threads=1)
    made.add_argument("--rows", type=int, default=40_000, help="rows drawn by each side")
    made.add_argument("--steps", type=int, default=400, help="steps of training each SAE")
    options = made.parse_args()
    if options.quick:
        options.rows, options.steps = 4000, 20
    torch.set_num_threads(options.threads)
    with peers_of(options) as peers, scratch() as folder:
        if peers is None:
            raise SystemExit("nothing to compare with: --peers none")
        theirs = _drawn_by_saelens(peers, options, folder)
        sections = [_scores(peers, options, theirs, folder).show(), _generators(theirs).show()]
        save("synthetic_parity", options, sections, peers)


def _drawn_by_saelens(peers: Peers, options: Namespace, folder: Path) -> dict[str, Tensor]:
    """Lets SAELens draw: directions, bias, loadings, deviations, means, rows x [n, d] and codes."""
    file = folder / "drawn.safetensors"
    peers.call("synthetic_draw", settings=CONFIG.model_dump(), rows=options.rows, out=str(file))
    return load_file(file)


class GivenTruth:
    """The truth behind rows that were drawn elsewhere."""

    def __init__(self, drawn: Mapping[str, Tensor]) -> None:
        self.config, self.contexts = CONFIG, len(drawn["codes"])
        self.directions, self.offset = drawn["directions"], drawn["bias"]
        self._codes = drawn["codes"]

    def chunks(self, shard: int) -> Iterator[Tensor]:
        yield from self._codes[:, None].split(2048)


def _source(x: Tensor) -> MemorySource:
    shard = Shard(x[:, None].contiguous(), torch.ones(len(x), 1, dtype=torch.bool))
    return MemorySource([shard], {"hook_name": None})


# ---------------------------------------------------------------- scores


def _scores(peers: Peers, options: Namespace, drawn: Mapping[str, Tensor], folder: Path) -> Section:
    source = _source(drawn["x"])
    lines, raw, worst = [], [], 0.0
    for width in WIDTHS:
        sae = _trained(source, width, options.steps)
        weights = folder / f"sae-{width}.safetensors"
        save_file({name: part.contiguous() for name, part in sae.fold().items()}, weights)
        found = peers.call(
            "synthetic_scores", drawn=str(folder / "drawn.safetensors"), weights=str(weights)
        )
        ours = _ours(sae, source, drawn)
        for name, their_name, limit in SCORES:
            apart = ours[name] - found[their_name]
            worst = max(worst, abs(apart) / limit)
            numbers = [f"{ours[name]:.6f}", f"{found[their_name]:.6f}", f"{apart:+.1e}"]
            lines.append([f"{width} latents, {name}", their_name, *numbers])
            raw.append({"d_sae": width, "metric": name, "ours": ours[name],
                        "saelens": found[their_name], "difference": apart,
                        "limit": limit})  # fmt: skip
    columns = ["ours", "SAELens", "ours", "SAELens", "difference"]
    target = Target("largest difference of a score, in units of its limit", worst, 1.0, False)
    return Section(
        f"scores of the same SAEs on the same {options.rows} rows, {CONFIG.features} features",
        table(columns, lines), raw, [target],
    )  # fmt: skip


def _trained(source: MemorySource, width: int, steps: int) -> SAE:
    config = SAEConfig.parse({"d_sae": width, "initial_l0": 20})
    training = TrainConfig(tokens=512 * steps, batch_size=512, lr=2e-3)
    (outcome,) = train_on(
        source, source, {"relu": config}, Conditions(seeds=[0], training=training, evals=())
    )
    return outcome.sae


def _ours(sae: SAE, source: MemorySource, drawn: Mapping[str, Tensor]) -> dict[str, float]:
    truth: Any = GivenTruth(drawn)
    rows: list[Row] = [
        *evaluate_core(sae, CoreData(source, None)),
        *evaluate_truth(sae, source, truth),
    ]
    found = {row.metric: row.value for row in rows if not row.slice and row.value is not None}
    return found | {"dead_latents": round(found["dead_share"] * sae.d_sae)}


# ---------------------------------------------------------------- generator


def _generators(drawn: Mapping[str, Tensor]) -> Section:
    n = len(drawn["codes"])
    truth = ForestTruth(CONFIG, 0, "train", n)
    for name in ("loadings", "deviations"):  # the process alone is compared
        vars(truth)[name] = drawn[name]
    ours = truth.codes()[:, 0]
    theirs = drawn["codes"]
    z = {
        "rate": _z(ours != 0, theirs != 0),
        "value": _z(ours, theirs),
        "square of the value": _z(ours.square(), theirs.square()),
        "pair of features of neighbouring families": _z(*(_pairs(x) for x in (ours, theirs))),
    }
    lines, raw = [], []
    for name, values in z.items():
        square, largest = float(values.square().mean()), float(values.abs().max())
        lines.append([f"{name}: mean square of z over {len(values)}", "", "", f"{square:.3f}"])
        raw.append({"statistic": name, "mean_square_z": square, "largest_z": largest,
                    "n": len(values)})  # fmt: skip
    own = ForestTruth(CONFIG, 0, "train", 1)
    for name, mine, yours in (
        ("L0, mean", _l0(ours).mean(), _l0(theirs).mean()),
        ("L0, sd", _l0(ours).std(), _l0(theirs).std()),
        ("sum of p", CONFIG.probabilities.sum(), drawn["probabilities"].sum()),
        ("|x|, mean", _norm(ours, drawn).mean(), drawn["x"].norm(dim=1).mean()),
        ("|x|, sd", _norm(ours, drawn).std(), drawn["x"].norm(dim=1).std()),
        ("RMS correlation of firings", _correlation(ours), _correlation(theirs)),
        ("RMS product of loadings", _loading(own.loadings), _loading(drawn["loadings"])),
        ("mean of the largest |cos|", _crowd(own.directions), _crowd(drawn["directions"])),
        ("mean standard deviation of values", own.deviations.mean(), drawn["deviations"].mean()),
    ):
        lines.append([name, f"{float(mine):.4f}", f"{float(yours):.4f}",
                      f"{float(mine) - float(yours):+.4f}"])  # fmt: skip
        raw.append({"statistic": name, "ours": float(mine), "saelens": float(yours)})
    difference = CONFIG.unsilenced_probabilities - drawn["own_probabilities"].double()
    same = float(difference.abs().max())
    raw.append({"statistic": "largest difference of a firing probability", "value": same})
    worst = max(float(values.square().mean()) for values in z.values())
    return Section(
        f"the two generators, {n} rows each",
        table(["", "ours", "SAELens", "difference"], lines), raw,
        [
            Target("largest mean square of z", worst, Z_LIMIT, False),
            Target("largest difference of a firing probability", same, 1e-5, False),
        ],
    )  # fmt: skip


def _z(ours: Tensor, theirs: Tensor) -> Tensor:
    """Returns z for each column that varies."""
    a, b = ours.double(), theirs.double()
    spread = ((a.var(0) + b.var(0)) / len(a)).sqrt()
    return ((a.mean(0) - b.mean(0)) / spread)[spread > 0]


def _pairs(codes: Tensor) -> Tensor:
    """Marks rows in which a child fires together with the child `children` further on, which is in
    the next family, and with the parent of that child; bool [n, 2 children]."""
    on, parent = codes != 0, CONFIG.parent_of
    children = (parent != torch.arange(len(parent))).nonzero().squeeze(1)
    across = (children + CONFIG.children).clamp(max=int(children.max()))
    return torch.cat([on[:, children] & on[:, parent[across]], on[:, children] & on[:, across]], 1)


def _l0(codes: Tensor) -> Tensor:
    return (codes != 0).sum(1).double()


def _norm(codes: Tensor, drawn: Mapping[str, Tensor]) -> Tensor:
    return (codes @ drawn["directions"] + drawn["bias"]).norm(dim=1)


def _correlation(codes: Tensor) -> Tensor:
    """Returns the root mean square correlation between the firings of different features."""
    return _off((codes != 0).double().T.corrcoef())


def _loading(loadings: Tensor) -> Tensor:
    return _off(loadings @ loadings.T)


def _off(matrix: Tensor) -> Tensor:
    apart = ~torch.eye(len(matrix), dtype=torch.bool)
    return matrix[apart].nan_to_num().square().mean().sqrt()


def _crowd(directions: Tensor) -> Tensor:
    return (directions @ directions.T).abs().fill_diagonal_(0).max(1).values.mean()


if __name__ == "__main__":
    run(main)
