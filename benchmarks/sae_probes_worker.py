"""The package's side of sae_probes.py: runs in its environment, once for each reply.

    python sae_probes_worker.py REQUEST.json

The request names an SAE in SAELens' format, activations in the package's file format, data sets,
setting, numbers of latents and a folder for results. The reply on stdout has the CPU seconds of
each data set. With "rounding" the SAE's codes are multiplied by 1 + that, or 1 - that, at random:
how far the package's numbers then move is the least difference that another program can have.
Nothing from saelab is imported here.
"""

from __future__ import annotations

import contextlib
import json
import sys
import warnings
from pathlib import Path
from time import process_time
from typing import Any

del sys.path[0]  # the benchmark's own name must not hide that of the package
warnings.filterwarnings("ignore")


def main() -> None:
    request = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    with contextlib.redirect_stdout(sys.stderr):
        reply = measure(request)
    print(json.dumps(reply))


def measure(request: dict[str, Any]) -> dict[str, Any]:
    import torch
    from sae_lens import SAE  # pyright: ignore[reportMissingImports]
    from sae_probes import run_baseline_evals, run_sae_evals  # pyright: ignore

    torch.set_num_threads(request["threads"])
    sae = SAE.load_from_disk(request["sae"], device="cpu")
    if request["rounding"]:
        _round(sae, request["rounding"])
    common = {
        "model_name": request["model_name"],
        "hook_name": request["hook_name"],
        "setting": request["setting"],
        "results_path": request["results"],
        "model_cache_path": request["activations"],
        "device": "cpu",
    }
    seconds = {}
    for name in request["datasets"]:
        start = process_time()
        run_sae_evals(
            sae=sae,
            reg_type=request["regularisation"],
            ks=request["k_values"],
            datasets=[name],
            **common,
        )
        seconds[name] = process_time() - start
        for method in request["baselines"]:
            run_baseline_evals(method=method, datasets=[name], **common)
    return {"seconds": seconds}


def _round(sae: Any, size: float) -> None:
    """Changes the last bits of the codes."""
    import torch

    encode, draw = sae.encode, torch.Generator().manual_seed(0)

    def rounded(x: Any) -> Any:
        code = encode(x)
        up = torch.randint(2, code.shape, generator=draw) * 2 - 1
        return code * (1 + size * up)

    sae.encode = rounded


if __name__ == "__main__":
    main()
