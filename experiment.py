"""The run table: which arms each run trains, as data.

`python experiment.py --out_dir=run_1` trains every arm of run_1 next to the baseline, on the same
batches and from the same seeds, judges the arms and writes run_1/final_info.json. An arm changes
named settings of the base (configs/*.toml) and nothing else: {"train.lr": 1e-3} replaces a setting,
{"sae.losses+": {"kind": "l1"}} adds a part to a list of parts.
"""

from typing import Literal

import saelab
from saelab.launch.entry import main
from saelab.parts.base import Dims, LossTerm, PartConfig, Pass
from saelab.study.plan import Arm, Confirmation, FromArm, Run

# ---- a new part may be written here: its configuration, its class and a line that registers it ---


class SquaredCodeConfig(PartConfig):
    kind: Literal["squared_code"] = "squared_code"
    coefficient: float | str = 1e-3  # a number, or the name of a controller

    def build(self, dims: Dims) -> "SquaredCode":
        return SquaredCode(self.coefficient)


class SquaredCode(LossTerm):
    """An example: coefficient * sum_i f_i^2 of the code f, mean over the rows of the batch."""

    def __init__(self, coefficient: float | str) -> None:
        super().__init__()
        self.coefficient = coefficient

    def loss(self, p: Pass):
        return p.setting(self.coefficient) * p.code.values.square().sum() / p.n


saelab.register("loss", SquaredCodeConfig)
# An arm that uses it: Arm("small codes", {"sae.losses+": {"kind": "squared_code"}}, "an example")

# ---- settings that several arms share ------------------------------------------------------------

RECONSTRUCTION, L1, AUXK = {"kind": "reconstruction"}, {"kind": "l1"}, {"kind": "auxk"}

# Other architectures than the base's: decoder rows have norm 1, and no latent is resampled.
PLAIN = {"sae.controllers": [], "sae.observers": [], "sae.constraints": [{"kind": "unit_norm"}]}
TOPK = PLAIN | {"sae.activation": {"kind": "topk"}, "sae.losses": [RECONSTRUCTION, AUXK]}
JUMPRELU = PLAIN | {
    "sae.activation": {"kind": "jumprelu"},
    "sae.losses": [RECONSTRUCTION, {"kind": "l0"}],
    "sae.controllers": [{"kind": "l0_target", "start": 1e-4}],
}

# Idea A: variance scaling with two learned scalars, and a loss that pulls these to their priors.
SCALING = {"kind": "variance", "tau": 0.5, "statistics": "running", "tying": "global"}
PRIOR = {"kind": "scalar_prior", "c_beta": 1e-3, "c_theta": 1e-3, "beta_0": 1.0}
PULLED = [RECONSTRUCTION, L1, PRIOR]
SCALED = {"sae.scaling": SCALING}
SCALED_LOSS = {"sae.losses": [RECONSTRUCTION | {"space": "scaled"}, L1, PRIOR]}
UNIT_ENCODER = {"sae.constraints": [{"kind": "unit_norm", "weight": "encoder"}]}

# Idea B: dead latents are counted and left alone, resampled by age, or resampled at intervals.
COUNTED = [{"kind": "lifetimes", "base_steps": 50, "resample": False}]
BY_AGE = [{"kind": "lifetimes", "base_steps": 50}]
AT_INTERVALS = [{"kind": "resampling"}, *COUNTED]


def idea_a1(pull=1e-3, beta_0=1.0, **scaling):
    """Idea A at the input: dimensions are scaled by their variance; beta and theta are learned."""
    prior = PRIOR | {"c_beta": pull, "c_theta": pull, "beta_0": beta_0}
    return {"sae.scaling": SCALING | scaling, "sae.losses+": prior}


def idea_a2(learned=("theta", "beta", "gamma", "rho", "T"), **activation):
    """Idea A at the threshold: all latents share one threshold, which follows the context."""
    activation = {"kind": "tied_threshold", "learned": learned} | activation
    return JUMPRELU | {"sae.activation": activation}


def idea_b(**penalty):
    """Idea B's penalty on decoder rows that are alike and on latents that fire together."""
    return {"sae.losses+": {"kind": "similarity"} | penalty}


def full_idea_b(losses=(RECONSTRUCTION, L1), observers=BY_AGE, **penalty):
    """All of idea B: the penalty with a learned balance, a rounded k, and resampling by age."""
    penalty = {"kind": "similarity", "balance": "minimax", "k": "k"} | penalty
    changes = {"sae.losses": [*losses, penalty], "sae.controllers+": {"kind": "rounded_k"}}
    return changes | {"sae.observers": observers}


def topk_with(**controller):
    """TopK whose k is set by a controller."""
    return TOPK | {"sae.activation": {"kind": "topk", "k": "k"}, "sae.controllers": [controller]}


BASE = Arm("baseline", comment="ReLU with decoder-norm weighted L1")
MORE_THAN_A_RATE = (
    Arm("A1 scaled start", idea_a1(start="scaled"), "A1, started in scaled space"),
    Arm("baseline lr x2", {"train.lr": 1.6e-2}, "is A1 more than a learning rate?"),
)


def compare(title, *arms, baseline=BASE, changes=None):
    """A run of the baseline and these arms; `changes` of the base hold for all of them."""
    return Run(title, [baseline, *arms], changes or {})


# ---- the runs ------------------------------------------------------------------------------------

RUNS: dict[str, Run] = {}
RUNS["run_0"] = compare(
    "Baselines: ReLU with L1, TopK and JumpReLU over sparsity levels",
    Arm("TopK", TOPK, "exactly k latents per token, with AuxK", primary=True),
    Arm("JumpReLU", JUMPRELU, "a learned threshold per latent", primary=True),
)
NO_BIASES = {"sae.centre": False, "sae.encoder_bias": False}
FIRST_SKETCH = NO_BIASES | idea_a1(beta_0=0.0, statistics="batch", literal=True)
RUNS["run_1"] = compare(
    "Idea A: variance scaling of the input with global beta and theta",
    Arm("A1", idea_a1(), "tau 0.5, global beta and theta, same start", primary=True),
    *MORE_THAN_A_RATE,
    Arm("A literal", FIRST_SKETCH, "the first sketch: batch variance, no biases, beta_0 = 0"),
    Arm("baseline pos 0-63", {"train.positions": (0, 64)}, "trained on early positions"),
    Arm("A1 pos 0-63", idea_a1() | {"train.positions": (0, 64)}, "A1 on early positions"),
)
RUNS["run_2"] = compare(
    "Idea A: temperature",
    Arm("tau 0.1", idea_a1(tau=0.1), "hardly any scaling"),
    Arm("tau 0.5", idea_a1(), "unit variance", primary=True),
    Arm("tau 1", idea_a1(tau=1.0), "over-corrects"),
    *MORE_THAN_A_RATE,
)
RUNS["run_3"] = compare(
    "Idea A: regulariser",
    Arm("c 0.0001", idea_a1(pull=1e-4), "pull of beta and theta"),
    Arm("c 0.001", idea_a1(pull=1e-3), "pull of beta and theta", primary=True),
    Arm("c 0.01", idea_a1(pull=1e-2), "pull of beta and theta"),
    Arm("beta_0 0", idea_a1(beta_0=0.0), "beta is pulled to 0, as first sketched"),
    *MORE_THAN_A_RATE,
)
LEARNED_SCHEDULE = {"temperature": "learned_schedule", "tau_end": 0.1}
RUNS["run_4"] = compare(
    "Idea A: schedules of tau, and thresholds that follow the context",
    Arm("A1 static", idea_a1(), "tau stays at 0.5"),
    Arm("A1 annealed", idea_a1(temperature="annealed"), "tau falls from 0.5 to 0"),
    Arm("A1 learned", idea_a1(temperature="learned"), "tau by gradient"),
    Arm("A1 schedule", idea_a1(**LEARNED_SCHEDULE), "the rate and the end of tau are learned"),
    Arm("A1 found", idea_a1(tau=FromArm("A1 learned", "tau")), "fixed at the tau that was learned"),
    *MORE_THAN_A_RATE,
    Arm("JumpReLU", JUMPRELU, "a threshold per latent"),
    Arm("A2 beta 0", idea_a2(("theta",)), "one theta for all thresholds"),
    Arm("A2", idea_a2(), "thresholds follow the context", primary=True),
    Arm("A2 permuted", idea_a2(trace="permuted"), "another context's trace", primary=True),
    Arm("A2 mean", idea_a2(("theta", "gamma"), trace="mean"), "the static twin", primary=True),
    changes={"layout": "contexts"},
)
RUNS["run_5"] = compare(
    "Idea A: taken apart, and where its gauge is fixed",
    Arm("A1", idea_a1(), "as in run_1", primary=True),
    *MORE_THAN_A_RATE,
    Arm("no scaling", idea_a1(tau=0.0), "beta and theta alone"),
    Arm("no scalars", idea_a1(tying="off"), "variance scaling alone"),
    Arm("per feature", idea_a1(tying="per_feature"), "vectors for beta and theta, same rate"),
    Arm("centring", {"sae.scaling": {"kind": "centring"}}, "the running mean taken off"),
    Arm("one scale", idea_a1(tau=0.0, tying="scale"), "beta alone"),
    Arm("whitening", {"sae.scaling": {"kind": "whitening"}}, "correlations scaled too"),
    Arm("A1 scaled loss", idea_a1() | SCALED_LOSS, "errors in scaled space too"),
    Arm("A1 unit encoder", idea_a1() | UNIT_ENCODER, "rows of norm 1 fix the gauge"),
    Arm("A1 tied", idea_a1() | {"sae.tied": True}, "the encoder is the decoder's transpose"),
)
RUNS["run_6"] = compare(
    "Idea B: similarity of decoder rows and of codes",
    Arm("B", idea_b(), "alpha 0.5, running statistics of each latent", primary=True),
    Arm("batch", idea_b(statistics="batch"), "the batch's own statistics"),
    Arm("per product", idea_b(statistics="per_product"), "running statistics of the products"),
    Arm("constant", idea_b(gradient="constant"), "codes may pay the penalty by shrinking"),
    Arm("running norm", idea_b(norm="running"), "terms that never fade"),
    Arm("alpha 0", idea_b(alpha=0.0), "decoder rows only"),
    Arm("alpha 1", idea_b(alpha=1.0), "codes only"),
    Arm("B literal", {"sae.losses+": {"kind": "similarity_literal"}}, "the first sketch"),
)
MINIMAX_PATH = FromArm("minimax", "alpha", path=True)
RUNS["run_7"] = compare(
    "Idea B: a trainable balance",
    Arm("descent", idea_b(balance="descent"), "alpha by gradient on the loss, as first sketched"),
    Arm("uncertainty", idea_b(balance="uncertainty"), "log-variance weighting"),
    Arm("minimax", idea_b(balance="minimax"), "weight to the worse term", primary=True),
    Arm("gradnorm", idea_b(balance="gradnorm"), "equal gradients"),
    Arm("replay", idea_b(balance="replay", path=MINIMAX_PATH), "minimax's alpha of another seed"),
    Arm("frozen random", idea_b(balance="frozen_random"), "alpha drawn once"),
)
RUNS["run_8"] = compare(
    "Idea B: rounded k, lifetimes and resampling by age, on TopK (ReLU: none die)",
    Arm("B full", full_idea_b([RECONSTRUCTION]), "minimax, rounded k, resets by age", primary=True),
    Arm("B auxk", full_idea_b([RECONSTRUCTION, AUXK], COUNTED), "AuxK instead"),
    Arm("B fixed", full_idea_b([RECONSTRUCTION], AT_INTERVALS), "at fixed intervals instead"),
    Arm("B neither", full_idea_b([RECONSTRUCTION], COUNTED), "dead latents stay dead"),
    Arm("B k 100", idea_b(balance="minimax") | {"sae.observers": BY_AGE}, "k does not move"),
    Arm("B weight 0", full_idea_b([RECONSTRUCTION], coefficient=0.0), "all of it but the penalty"),
    Arm("adaptive topk", topk_with(kind="rounded_k", over="rows", cover=0.904), "k follows rows"),
    Arm("annealed k", topk_with(kind="annealed_k", end=FromArm("adaptive topk", "k")), "same end"),
    baseline=Arm("baseline", comment="TopK, dead latents stay dead"),
    changes=TOPK | {"sae.losses": [RECONSTRUCTION], "sae.observers": COUNTED},
)
RUNS["run_9"] = compare(
    "Ideas A and B together",
    Arm("A", idea_a1(), "A1 as in run_1", primary=True),
    Arm("B", full_idea_b(), "B full as in run_8", primary=True),
    Arm("both", SCALED | full_idea_b(PULLED), "A1 and B full", primary=True),
    Arm("scaling, B", {"sae.scaling": SCALING | {"tying": "off"}} | full_idea_b(), "no scalars"),
    Arm("both, weight 0", SCALED | full_idea_b(PULLED, coefficient=0.0), "without the penalty"),
    *MORE_THAN_A_RATE,
)
RUNS["run_10"] = Confirmation(
    "Confirmation of the best valid arm", [BASE], leave=("baseline lr x2", "baseline pos 0-63")
)

if __name__ == "__main__":
    main(RUNS, __file__)
