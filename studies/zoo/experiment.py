"""The zoo on trial: every kind of SAE at its own best learning rate, next to a tuned TopK.

    saelab tune run_0 --experiment studies/zoo/experiment.py
    python studies/zoo/experiment.py --out_dir=studies/zoo/run_0

run_0 has the kinds that cost about as much as TopK, run_1 those that need whole contexts, run_2 the
iterative encoders. docs/zoo.md has the results.
"""

from saelab.launch.entry import main
from saelab.study.plan import Arm, Run

BASE = Arm("baseline", comment="TopK with AuxK")
KINDS = {
    "standard": "ReLU, L1 weighted with decoder norms",
    "bricken": "ReLU, L1, decoder rows of norm 1",
    "p_annealing": "p of the penalty falls from 1 to 0.2",
    "tilted": "hard rows count more",
    "gated": "which latents fire is learned apart from how much",
    "gated_p_annealing": "both",
    "jumprelu": "a learned threshold per latent, step L0",
    "jumprelu_tanh": "tanh penalty, pre-activation loss",
    "jumprelu_quadratic": "the L0 itself is pulled to the target",
    "batchtopk": "k N latents per batch",
    "multi_topk": "also with 4 k latents",
    "groupmax": "one latent of each of k groups",
    "abs_topk": "signed codes",
    "feature_choice": "each latent picks its rows",
    "matryoshka": "prefixes of the latents reconstruct, too",
    "matryoshka_drawn": "prefixes drawn at each step, latents ordered by energy",
    "matryoshka_detached": "each ring fits what the inner one leaves",
    "orthogonality": "BatchTopK, near decoder rows are pushed apart",
}


def arms(kinds):
    """Arms of the presets of these names."""
    return [Arm(name, {"sae.preset": name}, comment) for name, comment in kinds.items()]


RUNS = {
    "run_0": Run("Kinds of SAE, each tuned", [BASE, *arms(KINDS)], tuned=True),
    "run_1": Run(
        "Kinds that need whole contexts, each tuned",
        [BASE, *arms({"t_sae": "codes of adjacent tokens are alike"})],
        {"layout": "contexts"},
        tuned=True,
    ),
    "run_2": Run(
        "Iterative encoders, each tuned",
        [BASE, *arms({"matching_pursuit": "one latent after the other", "ista": "one more step"})],
        {"sae.initial_l0": None},  # it sets a bias that a pursuit does not have
        tuned=True,
    ),
}

if __name__ == "__main__":
    main(RUNS, __file__)
