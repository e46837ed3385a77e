"""The run table: which arms each run trains, as data.

    python experiment.py --out_dir=run_1

trains every arm of run_1 (and the baseline, on the same batches), judges them, and writes
run_1/final_info.json. An arm changes named settings of the base (configs/*.toml) and nothing else.
"""

from saelab.launch.entry import main
from saelab.study.plan import Arm, Confirmation, FromArm, Run

# ---- a new part may be written here: subclass PartConfig and LossTerm (saelab.parts.base), then
# register("loss", MyConfig); an arm uses it with {"sae.losses+": {"kind": "my_loss"}} -------------

# ---- settings that several arms share ------------------------------------------------------------
# fmt: off
RECON, UNIT, AUXK = {"kind": "reconstruction"}, {"kind": "unit_norm"}, {"kind": "auxk"}
BARE = {"sae.controllers": [], "sae.observers": [], "sae.constraints": [UNIT]}
TOPK = BARE | {"sae.activation": {"kind": "topk"}, "sae.losses": [RECON, AUXK]}
JUMPRELU = BARE | {"sae.activation": {"kind": "jumprelu"}, "sae.losses": [RECON, {"kind": "l0"}],
                   "sae.controllers": [{"kind": "l0_target", "start": 1e-4}]}
EARLY, FAST = {"train.positions": (0, 64)}, {"train.lr": 1.6e-2}
A1 = {"kind": "variance", "tau": 0.5, "statistics": "running", "tying": "global"}
PRIOR = {"kind": "scalar_prior", "c_beta": 1e-3, "c_theta": 1e-3, "beta_0": 1.0}
L1, PULLED = [RECON, {"kind": "l1"}], [RECON, {"kind": "l1"}, PRIOR]
A_LITERAL = {"sae.scaling": A1 | {"statistics": "batch", "literal": True}, "sae.centre": False,
             "sae.losses+": PRIOR | {"beta_0": 0.0}, "sae.encoder_bias": False}
SCALED = [RECON | {"space": "scaled"}, {"kind": "l1"}, PRIOR]
TIME = ["theta", "beta", "gamma", "rho", "T"]
FIXED, BY_AGE = {"kind": "resampling"}, {"kind": "lifetimes", "base_steps": 50}
COUNT = BY_AGE | {"resample": False}  # lifetimes are looked at, and no latent is resampled
def a1(prior=PRIOR, **changes):  # idea A at the input
    return {"sae.scaling": A1 | changes, "sae.losses+": prior}
def a2(*learned, **changes):  # idea A at the threshold, with these scalars learned
    return JUMPRELU | {"sae.activation": {"kind": "tied_threshold", "learned": learned} | changes}
def b(**changes):  # idea B's penalty
    return {"sae.losses+": {"kind": "similarity"} | changes}
def b_full(*observers, losses=L1, **changes):  # all of B: learned alpha, rounded k, ages
    penalty = {"kind": "similarity", "balance": "minimax", "k": "k"} | changes
    return {"sae.losses": [*losses, penalty], "sae.controllers+": {"kind": "rounded_k"},
            "sae.observers": [*observers] or [BY_AGE]}
def topk(**controller):  # TopK whose k moves
    return TOPK | {"sae.activation": {"kind": "topk", "k": "k"}, "sae.controllers": [controller]}

BASE = Arm("baseline", comment="ReLU with decoder-norm weighted L1")
MORE_THAN_A_RATE = [Arm("A1 scaled start", a1(start="scaled"), "A1, started in scaled space"),
                    Arm("baseline lr x2", FAST, "is A1 more than a learning rate?")]
RUNS = {
    "run_0": Run("Baselines: ReLU with L1, TopK and JumpReLU over sparsity levels", [
        BASE,
        Arm("TopK", TOPK, "exactly k latents per token, with AuxK", primary=True),
        Arm("JumpReLU", JUMPRELU, "a learned threshold per latent", primary=True),
    ]),
    "run_1": Run("Idea A: variance scaling of the input with global beta and theta", [
        BASE,
        Arm("A1", a1(), "tau 0.5, global beta and theta, same start", primary=True),
        *MORE_THAN_A_RATE,
        Arm("A literal", A_LITERAL, "the first sketch: batch variance, no biases, beta_0 = 0"),
        Arm("baseline pos 0-63", EARLY, "trained on early positions"),
        Arm("A1 pos 0-63", a1() | EARLY, "A1 on early positions"),
    ]),
    "run_2": Run("Idea A: temperature", [
        BASE,
        Arm("tau 0.1", a1(tau=0.1), "hardly any scaling"),
        Arm("tau 0.5", a1(), "unit variance", primary=True),
        Arm("tau 1", a1(tau=1.0), "over-corrects"),
        *MORE_THAN_A_RATE,
    ]),
    "run_3": Run("Idea A: regulariser", [
        BASE,
        *(Arm(f"c {c:g}", a1(PRIOR | {"c_beta": c, "c_theta": c}), "pull of beta and theta",
              primary=c == 1e-3) for c in (1e-4, 1e-3, 1e-2)),
        Arm("beta_0 0", a1(PRIOR | {"beta_0": 0.0}), "beta is pulled to 0, as first sketched"),
        *MORE_THAN_A_RATE,
    ]),
    "run_4": Run("Idea A: schedules of tau, and thresholds that follow the context", [
        BASE,
        Arm("A1 static", a1(), "tau stays at 0.5"),
        Arm("A1 annealed", a1(temperature="annealed"), "tau falls from 0.5 to 0"),
        Arm("A1 learned", a1(temperature="learned"), "tau by gradient"),
        Arm("A1 schedule", a1(temperature="learned_schedule", tau_end=0.1), "rate and end learned"),
        Arm("A1 found", a1(tau=FromArm("A1 learned", "tau")), "fixed at the tau that was learned"),
        *MORE_THAN_A_RATE,
        Arm("JumpReLU", JUMPRELU, "a threshold per latent"),
        Arm("A2 beta 0", a2("theta"), "one theta for all thresholds"),
        Arm("A2", a2(*TIME), "thresholds follow the context", primary=True),
        Arm("A2 permuted", a2(*TIME, trace="permuted"), "another context's trace", primary=True),
        Arm("A2 mean", a2("theta", "gamma", trace="mean"), "the static twin", primary=True),
    ], {"layout": "contexts"}),
    "run_5": Run("Idea A: taken apart, and where its gauge is fixed", [
        BASE,
        Arm("A1", a1(), "as in run_1", primary=True),
        *MORE_THAN_A_RATE,
        Arm("no scaling", a1(tau=0.0), "beta and theta alone"),
        Arm("no scalars", a1(tying="off"), "variance scaling alone"),
        Arm("per feature", a1(tying="per_feature"), "vectors for beta and theta, same rate"),
        Arm("centring", {"sae.scaling": {"kind": "centring"}}, "the running mean taken off"),
        Arm("one scale", a1(tau=0.0, tying="scale"), "beta alone"),
        Arm("whitening", {"sae.scaling": {"kind": "whitening"}}, "correlations scaled too"),
        Arm("A1 scaled loss", a1() | {"sae.losses": SCALED}, "errors in scaled space too"),
        Arm("A1 unit encoder", a1() | {"sae.constraints": [UNIT | {"weight": "encoder"}]}, "gauge"),
        Arm("A1 tied", a1() | {"sae.tied": True}, "the encoder is the decoder's transpose"),
    ]),
    "run_6": Run("Idea B: similarity of decoder rows and of codes", [
        BASE,
        Arm("B", b(), "alpha 0.5, running statistics of each latent", primary=True),
        Arm("batch", b(statistics="batch"), "the batch's own statistics"),
        Arm("per product", b(statistics="per_product"), "running statistics of the products"),
        Arm("constant", b(gradient="constant"), "a gradient that shrinking pays"),
        Arm("running norm", b(norm="running"), "terms that never fade"),
        Arm("alpha 0", b(alpha=0.0), "decoder rows only"),
        Arm("alpha 1", b(alpha=1.0), "codes only"),
        Arm("B literal", {"sae.losses+": {"kind": "similarity_literal"}}, "the first sketch"),
    ]),
    "run_7": Run("Idea B: a trainable balance", [
        BASE,
        Arm("descent", b(balance="descent"), "alpha on the loss: the sketch"),
        Arm("uncertainty", b(balance="uncertainty"), "log-variance weighting"),
        Arm("minimax", b(balance="minimax"), "weight to the worse term", primary=True),
        Arm("gradnorm", b(balance="gradnorm"), "equal gradients"),
        Arm("replay", b(balance="replay", path=FromArm("minimax", "alpha", path=True)),
            "minimax's alpha of another seed"),
        Arm("frozen random", b(balance="frozen_random"), "alpha drawn once"),
    ]),
    "run_8": Run("Idea B: rounded k, lifetimes and resampling by age, on TopK (ReLU: none die)", [
        Arm("baseline", comment="TopK, dead latents stay dead"),
        Arm("B full", b_full(losses=[RECON]), "minimax, rounded k, resets by age", primary=True),
        Arm("B auxk", b_full(COUNT, losses=[RECON, AUXK]), "AuxK instead"),
        Arm("B fixed", b_full(FIXED, COUNT, losses=[RECON]), "at fixed intervals instead"),
        Arm("B neither", b_full(COUNT, losses=[RECON]), "dead latents stay dead"),
        Arm("B k 100", b(balance="minimax") | {"sae.observers": [BY_AGE]}, "k does not move"),
        Arm("B weight 0", b_full(losses=[RECON], coefficient=0.0), "all of it but the penalty"),
        Arm("adaptive topk", topk(kind="rounded_k", over="rows", cover=0.904), "k follows rows"),
        Arm("annealed k", topk(kind="annealed_k", end=FromArm("adaptive topk", "k")), "same end"),
    ], TOPK | {"sae.losses": [RECON], "sae.observers": [COUNT]}),
    "run_9": Run("Ideas A and B together", [
        BASE,
        Arm("A", a1(), "A1 as in run_1", primary=True),
        Arm("B", b_full(), "B full as in run_8", primary=True),
        Arm("both", {"sae.scaling": A1} | b_full(losses=PULLED), "A1 and B full", primary=True),
        Arm("scaling, B", {"sae.scaling": A1 | {"tying": "off"}} | b_full(), "no scalars"),
        Arm("both, weight 0", {"sae.scaling": A1} | b_full(losses=PULLED, coefficient=0.0), "A1"),
        *MORE_THAN_A_RATE,
    ]),
    "run_10": Confirmation("Confirmation of the best valid arm", [BASE],
                           leave=("baseline lr x2", "baseline pos 0-63")),
}

if __name__ == "__main__":
    main(RUNS, __file__)
