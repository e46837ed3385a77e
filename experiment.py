"""The run table: which arms each run trains, as data.

    python experiment.py --out_dir=run_1

trains every arm of run_1 (and the baseline, on the same batches), judges them, and writes
run_1/final_info.json. An arm changes named settings of the base (configs/*.toml) and nothing else.
"""

from saelab.study.front import main
from saelab.study.plan import Arm, Run

# ---- a new part may be written here --------------------------------------------------------------
# Subclass PartConfig and LossTerm (saelab.parts.base), then register("loss", MyConfig); an arm uses
# it with {"sae.losses+": {"kind": "my_loss"}}.
# --------------------------------------------------------------------------------------------------

A1 = {"kind": "variance", "tau": 0.5, "statistics": "running", "tying": "global"}
PRIOR = {"kind": "scalar_prior", "c_beta": 1e-3, "c_theta": 1e-3, "beta_0": 1.0}
A1_CORE = {"sae.scaling": A1, "sae.losses+": PRIOR}

TOPK = {
    "sae.activation": {"kind": "topk"},
    "sae.losses": [{"kind": "reconstruction"}, {"kind": "auxk"}],
    "sae.controllers": [],
    "sae.constraints": [{"kind": "unit_norm"}],
    "sae.observers": [],
}
JUMPRELU = {
    "sae.activation": {"kind": "jumprelu"},
    "sae.losses": [{"kind": "reconstruction"}, {"kind": "l0"}],
    "sae.controllers": [{"kind": "l0_target", "start": 1e-4}],
    "sae.constraints": [{"kind": "unit_norm"}],
    "sae.observers": [],
}
A_LITERAL = {
    "sae.scaling": A1 | {"statistics": "batch", "literal": True},
    "sae.losses+": PRIOR | {"beta_0": 0.0},
    "sae.encoder_bias": False,
    "sae.centre": False,
}

RUNS = {
    "run_0": Run(
        "Baselines: ReLU with L1, TopK and JumpReLU over sparsity levels",
        [
            Arm("baseline", comment="ReLU with decoder-norm weighted L1"),
            Arm("TopK", TOPK, "exactly k latents per token, with AuxK", primary=True),
            Arm("JumpReLU", JUMPRELU, "a learned threshold per latent"),
        ],
    ),
    "run_1": Run(
        "Idea A: variance scaling of the input with global beta and theta",
        [
            Arm("baseline", comment="ReLU with decoder-norm weighted L1"),
            Arm("A1", A1_CORE, "tau 0.5, global beta and theta, same start", primary=True),
            Arm(
                "A1 scaled start",
                {**A1_CORE, "sae.scaling": A1 | {"start": "scaled"}},
                "the same, started with W_enc = W_dec in scaled space",
            ),
            Arm("A literal", A_LITERAL, "the first sketch: batch variance, no biases, beta_0 = 0"),
            Arm("baseline lr x2", {"train.lr": 1.6e-2}, "is A1 more than a learning rate?"),
            Arm("baseline pos 0-63", {"train.positions": (0, 64)}, "trained on early positions"),
            Arm("A1 pos 0-63", {**A1_CORE, "train.positions": (0, 64)}, "A1 on early positions"),
        ],
    ),
}

if __name__ == "__main__":
    main(RUNS, __file__)
