"""Fifty steps of the peers' own trainers against ours: same weights, same batches.

    make test-peers         makes benchmarks/.peers first

or SAELAB_PEERS names a python that has sae-lens, eai-sparsify, dictionary-learning and
overcomplete. docs/zoo.md, "Training parity", has what comes out of it.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from peer_parts import PARTS, DirectJumpReLU
from peers import peers_python, run_worker
from safetensors.torch import load_file, save_file
from torch import Tensor
from trainers_worker import (
    ANNEALING,
    BANDWIDTH,
    L0,
    L1,
    LAST_P,
    LR,
    PREACTIVATION,
    RUNS,
    TARGET,
    THRESHOLD,
    WIDTHS,
    WINDOW,
    Head,
    K,
    tokens,
)

from saelab.data.activations.stream import Batch, Tokens
from saelab.parts.activations.jumprelu import JumpReLU
from saelab.sae import SAE, SAEConfig
from saelab.seeding import torch_stream
from saelab.training.loop import Cell
from saelab.training.optim import TrainConfig
from saelab.training.sample import Sample
from saelab.training.spliced_model import SplicedModel

pytestmark = pytest.mark.peers
WORKER = Path(__file__).with_name("trainers_worker.py")
D_IN, D_SAE, ROWS, STEPS = 8, 32, 64, 50
#: Of losses, relative; of weights, which are of size 1, absolute.
TOLERANCE = 1e-4
#: The least that a weight moves in a run, and that a named difference makes.
MOVED, DIFFERENT = 2e-2, 1e-3

ROOT_D = math.sqrt(D_IN)
UNIT = {"constraints": ["unit_norm"]}
TOPK = {"activation": {"kind": "topk", "k": K}}
BATCHTOPK = {"activation": {"kind": "batchtopk", "k": K}}
GATED = {"activation": {"kind": "gated"}, "encoder_bias": False}
FREE_GATED = {"activation": {"kind": "gated", "free_norms": True}, "encoder_bias": False}
#: The constraint is replaced by another one: see peer_parts.py.
NO_OFFSET = {"constraints": ["frozen"], "centre": False}
MATRYOSHKA = {"kind": "matryoshka", "widths": WIDTHS}
#: p moves at the same steps as theirs.
LP = {
    "kind": "lp",
    "coefficient": L1 / ROOT_D,
    "end": LAST_P,
    "begin": ANNEALING[0] / STEPS,
    "until": ANNEALING[1] / STEPS,
    "updates": ANNEALING[2] - 1,
    "smooth": 0.0,
    "decoder_norms": False,
}


def jumprelu(*losses: dict[str, Any], to_input: bool = False, **settings: Any) -> dict[str, Any]:
    activation = {"kind": "jumprelu", "threshold": THRESHOLD, "bandwidth": BANDWIDTH, "lr": None}
    return {"activation": activation | {"to_input": to_input}, "losses": list(losses)} | settings


def auxk(coefficient: float, rows: int = WINDOW * ROWS) -> dict[str, Any]:
    return {"kind": "auxk", "coefficient": coefficient, "dead_after": rows}


@dataclass(frozen=True)
class Case:
    """A run of a peer, and how ours is set to train as it does.

    Args:
        ours: settings of our SAE; `reconstruction` is added to its losses.
        scale: what the peer's loss is times, to be in our units.
        betas, decay: of our optimiser.
        difference: the parts of peer_parts.py with which ours computes what the peer does; '' where
            ours needs none.
        free: whether rows of the decoder start at unlike norms.
        small: whether a quarter of the latents starts too small to fire.
        target: whether y is reconstructed instead of x.
        spliced: whether the loss is that of a language model, instead of `reconstruction`.
    """

    ours: dict[str, Any] = field(default_factory=dict)
    scale: float = 1 / D_IN
    betas: tuple[float, float] = (0.9, 0.999)
    decay: float = 0.0
    difference: str = ""
    free: bool = False
    small: bool = False
    target: bool = False
    spliced: bool = False


def saelens(difference: str = "", small: bool = False, **ours: Any) -> Case:
    return Case(ours, difference=difference, free=True, small=small)


def dictionary_learning(momentum: float = 0.9, **ours: Any) -> Case:
    return Case(ours | UNIT, betas=(momentum, 0.999))


def sparsify(target: bool = False, **ours: Any) -> Case:
    ours = TOPK | ({"centre": False} if target else UNIT) | ours
    return Case(ours, scale=1.0, decay=1.0, target=target, free=target)


def l1(**settings: Any) -> dict[str, Any]:
    return {"kind": "l1", "coefficient": L1 / ROOT_D} | settings


def gate_l1(**settings: Any) -> dict[str, Any]:
    return {"kind": "gate_l1", "coefficient": L1 / ROOT_D} | settings


QUADRATIC = {"kind": "quadratic_l0", "target": TARGET, "coefficient": L0}
STEP = {"kind": "l0", "coefficient": L0 / D_IN}
PREACTIVATION_LOSS = {"kind": "preactivation", "coefficient": PREACTIVATION}
LIVE_GATE = [
    gate_l1(decoder_norms=True),
    {"kind": "gate_reconstruction", "frozen": False},
]

#: Ours trains as the peer does.
SAME: dict[str, Case] = {
    "saelens-standard": saelens(losses=[l1()]),
    "saelens-topk": saelens(**TOPK),
    "saelens-abstopk": saelens(activation={"kind": "abs_topk", "k": K}),
    "saelens-batchtopk": saelens(**BATCHTOPK),
    "saelens-gated": saelens(**FREE_GATED, losses=LIVE_GATE),
    "saelens-matryoshka": saelens(**BATCHTOPK, losses=[MATRYOSHKA]),
    "dictionary_learning-standard": dictionary_learning(losses=[l1(decoder_norms=False)]),
    "dictionary_learning-april": Case({"losses": [l1()]}, free=True),
    "dictionary_learning-gated": dictionary_learning(
        0.0, **GATED, losses=[gate_l1(), "gate_reconstruction"]
    ),
    "dictionary_learning-p_anneal": dictionary_learning(losses=[LP]),
    "dictionary_learning-gated_anneal": dictionary_learning(
        0.0, **GATED, losses=[LP | {"of": "gate"}, "gate_reconstruction"]
    ),
    "dictionary_learning-topk": dictionary_learning(**TOPK),
    "dictionary_learning-batchtopk": dictionary_learning(**BATCHTOPK),
    "dictionary_learning-matryoshka": dictionary_learning(**BATCHTOPK, losses=[MATRYOSHKA]),
    "sparsify-topk": sparsify(),
    "sparsify-kl": replace(sparsify(losses=["kl"]), spliced=True),
    "sparsify-ce": replace(sparsify(losses=["cross_entropy"]), spliced=True),
    "sparsify-transcode": sparsify(target=True),
    "sparsify-transcode-skip": sparsify(target=True, skip=True),
}


#: A peer does something else, and with that as a part of ours (peer_parts.py) it is the same
#: training; the second entry is what ours has at the side where it differs.
NAMED: dict[str, tuple[Case, str]] = {
    "saelens-topk-auxk": (
        saelens("auxk of saelens", small=True, **TOPK, losses=[auxk(1.0)]),
        "",
    ),
    **{
        f"saelens-jumprelu-{name}": (saelens("direct threshold", **settings), "")
        for name, settings in {
            "step": jumprelu(STEP),
            "tanh": jumprelu({"kind": "tanh", "coefficient": L0 / D_IN}, to_input=True),
            "quadratic": jumprelu(QUADRATIC),
        }.items()
    },
    "saelens-jumprelu-preactivation": (
        saelens("pre-activations of the dead", small=True, **jumprelu(STEP, PREACTIVATION_LOSS)),
        "direct threshold",
    ),
    "dictionary_learning-topk-auxk": (
        replace(
            dictionary_learning(**TOPK, losses=[auxk(1 / 32 / D_IN)]),
            difference="auxk of dictionary_learning",
            small=True,
        ),
        "",
    ),
    "dictionary_learning-jumprelu": (
        replace(
            dictionary_learning(0.0, **jumprelu(QUADRATIC | {"over": "batch"}, centre=False)),
            difference="step after the jump",
        ),
        "direct threshold",
    ),
    "sparsify-groupmax": (
        replace(sparsify(activation={"kind": "groupmax", "k": K}), difference="unmasked groupmax"),
        "",
    ),
    "sparsify-multi_topk": (
        replace(sparsify(losses=["multi_topk"]), difference="decoder-only multi_topk"),
        "",
    ),
    "sparsify-topk-auxk": (
        replace(sparsify(losses=[auxk(1 / 32)]), difference="auxk of sparsify", small=True),
        "",
    ),
    "overcomplete-topk": (
        Case(TOPK | UNIT | {"centre": False}, 1.0, difference="no offset, no projection"),
        "no offset, projected",
    ),
    "overcomplete-topk-free": (
        Case(TOPK | NO_OFFSET, 1.0, difference="no offset", free=True),
        "trained offset",
    ),
    "overcomplete-batchtopk-free": (
        Case(BATCHTOPK | NO_OFFSET, 1.0, difference="no offset", free=True),
        "trained offset",
    ),
}
#: These have a test of their own.
ALONE: dict[str, Case] = {
    "saelens-topk-rescaled": Case(TOPK),
    "dictionary_learning-p_anneal-queue": SAME["dictionary_learning-p_anneal"],
    "dictionary_learning-matryoshka-weights": replace(
        SAME["dictionary_learning-matryoshka"], scale=9 / D_IN
    ),
}
CASES = SAME | {name: case for name, (case, _) in NAMED.items()} | ALONE


def draw(*sizes: int, name: str) -> Tensor:
    return torch.randn(*sizes, generator=torch_stream(0, "parity", name))


def batches() -> dict[str, Tensor]:
    """Sparse sums of directions, and another map of them; both of mean 0 and variance 1 in every
    batch, so that our units are the peers'; float32 [STEPS, ROWS, D_IN]."""
    code = draw(STEPS, ROWS, D_SAE, name="code")
    code = code.relu() * (draw(STEPS, ROWS, D_SAE, name="support") > 1.2)
    y = torch.tanh(code @ draw(D_SAE, D_IN, name="directions y"))
    x = code @ draw(D_SAE, D_IN, name="directions x") + 0.1 * draw(STEPS, ROWS, D_IN, name="x")
    return {name: standardised(rows) for name, rows in {"x": x, "y": y}.items()}


def standardised(rows: Tensor) -> Tensor:
    rows = rows - rows.mean(1, keepdim=True)
    return rows / rows.square().mean(1, keepdim=True).sqrt()


def start(case: Case) -> dict[str, Tensor]:
    """Weights by our names; a trainer takes those that it has."""
    sizes = {"b_enc": D_SAE, "b_dec": D_IN, "b_gate": D_SAE, "b_mag": D_SAE, "r_mag": D_SAE}
    found = {name: 0.1 * draw(size, name=name) for name, size in sizes.items()}
    found["threshold"] = THRESHOLD + 0.05 * draw(D_SAE, name="threshold")
    rows = torch.nn.functional.normalize(draw(D_SAE, D_IN, name="W_dec"), dim=1)
    found["W_enc"] = rows + 0.1 * draw(D_SAE, D_IN, name="W_enc")
    found["W_dec"] = rows * torch.linspace(0.7, 1.3, D_SAE)[:, None] if case.free else rows
    found["W_skip"] = 0.1 * draw(D_IN, D_IN, name="W_skip")
    if case.small:
        found["W_enc"][-D_SAE // 4 :] *= 0.02
        found["b_enc"][-D_SAE // 4 :] = 0
    if not case.ours.get("centre", True) and not case.target:
        found["b_dec"].zero_()  # overcomplete has none
    return found


def weights(sae: SAE) -> dict[str, Tensor]:
    """Ours by the names of the records."""
    found = {name: getattr(sae, name) for name in ("W_enc", "b_enc", "W_dec", "b_dec")}
    if sae.W_skip is not None:
        found["W_skip"] = sae.W_skip
    return found | {n: getattr(sae.activation, n) for n in sae.activation.per_latent}


@torch.no_grad()
def begin(sae: SAE, case: Case) -> None:
    """Puts an SAE where the peer's begins, in its units."""
    for scale in (sae.scale, sae.out_scale):
        scale.fill_(1)
    given = start(case)
    direct = isinstance(sae.activation, DirectJumpReLU)
    given["log_threshold"] = given["threshold"] if direct else given["threshold"].log()
    for name, weight in weights(sae).items():
        if name != "b_enc" or sae.config.encoder_bias:
            weight.copy_(given[name])


class TinyModel:
    """The language model of sparsify's runs, as a splice calls ours."""

    x: Tensor

    def __init__(self) -> None:
        self.model = Head(D_IN).requires_grad_(False)

    def logits(self, ids: Tensor, splice: Any = None, gradient: bool = False) -> Tensor:
        return self.model(splice["layer"](self.x) if splice else self.x)


def train_ours(case: Case, difference: str) -> dict[str, Tensor]:
    """Record of our run, in the form in which the worker records a run of a peer."""
    with pytest.MonkeyPatch.context() as patch:
        for config, build in PARTS.get(difference, {}).items():
            patch.setattr(config, "build", build)
        losses = [*([] if case.spliced else ["reconstruction"]), *case.ours.get("losses", [])]
        settings = {"d_sae": D_SAE, "precision": "float32", "controllers": []}
        training = TrainConfig(
            tokens=STEPS * ROWS,
            batch_size=ROWS,
            lr=LR,
            warmup=0,
            decay=case.decay,
            betas=case.betas,
            grad_clip=1e30,
        )
        data = batches()
        x, y = data["x"], data["y"]
        sample = Sample(x[0], y[0], targets=(D_IN,)) if case.target else Sample(x[0])
        config = SAEConfig.parse(settings | case.ours | {"losses": losses})
        cell = Cell("parity", config, training, sample, seed=0)
    begin(cell.sae, case)
    model = TinyModel()
    cell.use_model(SplicedModel(cast(Any, model), ["layer"]) if case.spliced else None)
    found, path = [], []
    for i in range(STEPS):
        positions = torch.arange(ROWS)
        batch = Batch(x[i], positions, y=y[i] if case.target else None)
        if case.spliced:
            ids, model.x = tokens(ROWS * i + positions)[None], x[i][None]
            batch = Batch(model.x, positions[None], tokens=Tokens(ids, torch.ones_like(ids).bool()))
        found.append(cell.step(batch)["loss"])
        path.append({name: w.detach().clone() for name, w in weights(cell.sae).items()})
        if isinstance(cell.sae.activation, JumpReLU):
            path[-1]["threshold"] = cell.sae.activation.threshold.detach().clone()
    stacked = {name: torch.stack([step[name] for step in path]) for name in path[0]}
    return {"loss": torch.tensor(found, dtype=torch.float64)} | stacked


@pytest.fixture(scope="module")
def records(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All trainings of the peers, in one process of theirs."""
    peers_python()
    folder = tmp_path_factory.mktemp("trainers")
    save_file(batches(), folder / "batches.safetensors")
    for name, case in CASES.items():
        (folder / name).mkdir()
        contiguous = {n: w.contiguous() for n, w in start(case).items()}
        save_file(contiguous, folder / name / "start.safetensors")
    run_worker(WORKER, folder)
    return folder


def differences(
    name: str, difference: str, records: Path, ours: Case | None = None
) -> tuple[Tensor, Tensor]:
    """Differences of each step between ours and the peer's: of losses, relative, and of weights."""
    case = ours or CASES[name]
    theirs, trained = load_file(records / name / "record.safetensors"), train_ours(case, difference)
    wanted = theirs.pop("loss") * case.scale
    assert set(theirs) <= set(trained)
    weights = [(trained[n] - w).abs().flatten(1).amax(1) for n, w in theirs.items()]
    return (trained["loss"] - wanted).abs() / wanted, torch.stack(weights).amax(0)


@pytest.mark.parametrize("name", [*SAME, *NAMED])
def test_ours_trains_as_theirs(name: str, records: Path) -> None:
    loss, weights = differences(name, CASES[name].difference, records)
    assert float(loss.max()) <= TOLERANCE
    assert float(weights.max()) <= TOLERANCE


@pytest.mark.parametrize("name", NAMED)
def test_the_named_difference_is_there(name: str, records: Path) -> None:
    """Ours as it is trains otherwise, by far more than the tolerance."""
    loss, weights = differences(name, NAMED[name][1], records)
    assert float(loss.max()) > DIFFERENT
    assert float(weights.max()) > DIFFERENT


@pytest.mark.parametrize("name", CASES)
def test_every_weight_learns(name: str, records: Path) -> None:
    theirs = load_file(records / name / "record.safetensors")
    assert len(theirs.pop("loss")) == STEPS
    for weight, path in theirs.items():
        assert float((path[-1] - start(CASES[name])[weight]).abs().max()) > MOVED, weight


def test_saelens_rescaled_topk_is_another_parametrisation(records: Path) -> None:
    """The same function while the decoder's rows have norm 1, as at the start, and not after it."""
    loss, weights = differences("saelens-topk-rescaled", "", records)
    assert float(loss[0]) <= TOLERANCE
    assert float(weights[-1]) > DIFFERENT


def test_saelens_trains_the_decoder_by_the_gates_term(records: Path) -> None:
    """With decoder and b_dec constant in that term, as in the paper's eq. 8, it is not the same."""
    frozen = saelens(**FREE_GATED, losses=[gate_l1(decoder_norms=True), "gate_reconstruction"])
    loss, weights = differences("saelens-gated", "", records, frozen)
    assert min(float(loss.max()), float(weights.max())) > DIFFERENT


def test_the_penalty_follows_the_mean_of_ten_batches_in_dictionary_learning(records: Path) -> None:
    """p moves at step 20 first: its penalty is then kept by one batch here, by ten there."""
    loss, _ = differences("dictionary_learning-p_anneal-queue", "", records)
    assert float(loss[:20].max()) <= TOLERANCE < float(loss[20:].max()) < 0.02


def test_dictionary_learning_divides_matryoshka_by_the_square_of_its_groups(records: Path) -> None:
    """With its own weights the loss is ours over 3 * 3 and d_in; Adam does not see the factor."""
    loss, weights = differences("dictionary_learning-matryoshka-weights", "", records)
    assert max(float(loss.max()), float(weights.max())) <= TOLERANCE


def test_faults_of_dictionary_learning(records: Path) -> None:
    """Annealing p ends in an error with its own defaults, and resampling moves no weight."""
    assert json.loads((records / "faults.json").read_text()) == {
        "p_anneal: defaults of p": "ZeroDivisionError",
        "p_anneal: resampling": "nothing moved",
        "gated_anneal: defaults of p": "",
        "gated_anneal: resampling": "TypeError",
    }


def test_all_runs_are_compared() -> None:
    assert set(CASES) == set(RUNS)
