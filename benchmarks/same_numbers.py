"""Checks that a change of the code changes no number.

    python benchmarks/same_numbers.py record before      # on the old commit
    python benchmarks/same_numbers.py compare before     # on the new one

Trains small copies of the shipped run_0 and run_1, and runs with one cell of every registered
part; a digest of each tensor and each value of each table is kept, and `plan check`, `verdict`,
gate.json and final_info.json as they are. `compare` prints every item that differs, and ends with
exit code 1 where one was changed or removed; additions are listed, and allowed.

Texts are left out by default, because a reworded sentence changes no number (`--texts` compares
them too). Takes about three minutes on two cores.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]

BASE = """\
hook_name = "blocks.2.hook_resid_post"
context = 32
layout = "{layout}"

[train_text]
kind = "stdlib"
split = "train"

[eval_text]
kind = "stdlib"
split = "held_out"

[harvest]
dtype = "float32"

[sae]
d_sae = 256
initial_l0 = 16
activation = {{ kind = "relu" }}
losses = [{{ kind = "reconstruction" }}, {{ kind = "l1" }}]
controllers = [{{ kind = "l0_target", name = "sparsity", target = 16 }}]
observers = [{{ kind = "resampling" }}]

[train]
tokens = 16_384
batch_size = 128
lr = 8e-3
betas = [0.9, 0.99]
decay = 0.4

[evaluation]
tokens = 4_064
loss_contexts = 8

[evaluation.probing]
train_size = 40
test_size = 20
context = 32
k_values = [1, 5]
"""

PLAN = """\
study = "same numbers"
base = "configs/base.toml"
target_l0 = 16
levels = [8, 32]
tolerance = 0.9
seeds = {seeds}
seeds_other = 1
seeds_levels = 1
"""

#: One arm for every registered part, in the layout that all of them accept.
PARTS = """\
from saelab import Arm, Run
from saelab.parts import TABLE

RECON, UNIT = {"kind": "reconstruction"}, {"kind": "unit_norm"}
JUMPRELU = {"sae.activation": {"kind": "jumprelu"}, "sae.losses": [RECON, {"kind": "l0"}],
            "sae.controllers": [{"kind": "l0_target", "start": 1e-4}], "sae.constraints": [UNIT]}
TOPK = {"sae.activation": {"kind": "topk", "k": 16}, "sae.losses": [RECON, {"kind": "auxk"}],
        "sae.controllers": [], "sae.constraints": [UNIT]}
EVENTS = {"kind": "lifetimes", "base_steps": 10}
A1 = {"sae.scaling": {"kind": "variance", "tau": 0.5, "tying": "global"},
      "sae.losses+": {"kind": "scalar_prior", "c_beta": 1e-3, "c_theta": 1e-3, "beta_0": 1.0}}
ARMS = {
    "baseline": {},
    "variance": A1,
    "centring": {"sae.scaling": {"kind": "centring"}},
    "whitening": {"sae.scaling": {"kind": "whitening"}},
    "topk": TOPK,
    "batchtopk": TOPK | {"sae.activation": {"kind": "batchtopk", "k": 16}},
    "abs_topk": TOPK | {"sae.activation": {"kind": "abs_topk", "k": 16}},
    "jumprelu": JUMPRELU,
    "tied": JUMPRELU | {"sae.activation": {"kind": "tied_threshold",
                                           "learned": ["theta", "beta", "gamma", "rho", "T"]}},
    "similarity": {"sae.losses+": {"kind": "similarity", "balance": "minimax"}},
    "literal": {"sae.losses+": {"kind": "similarity_literal"}},
    "rounded": TOPK | {"sae.activation": {"kind": "topk", "k": "k"},
                       "sae.controllers": [{"kind": "rounded_k"}], "sae.observers": [EVENTS]},
    "annealed": TOPK | {"sae.activation": {"kind": "topk", "k": "k"},
                        "sae.controllers": [{"kind": "annealed_k"}]},
    "schedule": TOPK | {"sae.activation": {"kind": "batchtopk", "k": "k"},
                        "sae.controllers": [{"kind": "schedule", "name": "k", "start": 64,
                                             "end": 16, "until": 0.5, "shape": "geometric"}]},
    "frozen": {"sae.constraints": [{"kind": "frozen"}]},
}
ARMS |= {f"alone {kind}": {"sae.scaling": {"kind": kind}} for kind in TABLE["scaling"]
         if kind not in ("variance", "centring", "whitening")}
USED = repr(ARMS) + "relu l1 reconstruction resampling l0_target ramp {elsewhere}"
MISSING = [kind for seam in TABLE.values() for kind in seam if kind not in USED]
assert not MISSING, f"no arm trains {MISSING}"
RUNS = {"run_1": Run("Every part", [Arm(name, changes) for name, changes in ARMS.items()])}
"""

#: Parts that came later: a study of their own, since the number of arms decides the words.
ZOO = (
    PARTS.split("ARMS = {")[0]
    + """\
GATES = [{"kind": "gate_l1"}, {"kind": "gate_reconstruction"}]
LATER = [{"kind": "matryoshka", "order": "energy"}, {"kind": "multi_topk"},
         {"kind": "orthogonality", "chunk": 64}, {"kind": "temporal_contrast"}]
PURSUIT = {"sae.tied": True, "sae.encoder_bias": False, "sae.initial_l0": None,
           "sae.losses": [RECON], "sae.controllers": [], "sae.constraints": [UNIT]}
ARMS = {
    "baseline": {},
    "gated": {"sae.activation": {"kind": "gated"}, "sae.losses": [RECON, *GATES],
              "sae.constraints": [UNIT]},
    "penalties": JUMPRELU | {
        "sae.losses": [RECON, {"kind": "lp"}, {"kind": "tanh"}, {"kind": "preactivation"}]},
    "quadratic": JUMPRELU | {"sae.losses": [RECON, {"kind": "quadratic_l0", "target": 16}],
                             "sae.controllers": []},
    "groupmax": TOPK | {"sae.activation": {"kind": "groupmax", "k": 16},
                        "sae.losses": [RECON, *LATER]},
    "feature choice": TOPK | {"sae.activation": {"kind": "feature_choice", "k": 16},
                              "sae.losses": [RECON]},
    "matching pursuit": PURSUIT | {"sae.activation": {"kind": "matching_pursuit", "k": 16}},
    "orthogonal pursuit": PURSUIT | {
        "sae.activation": {"kind": "orthogonal_matching_pursuit", "k": 16}},
    "ista": {"sae.initial_l0": None,
             "sae.activation": {"kind": "ista", "steps": 2, "step_size": 0.05}},
}
RUNS = {"run_1": Run("Later parts", [Arm(name, changes) for name, changes in ARMS.items()])}
"""
)
PARTS = PARTS.replace("{elsewhere}", " ".join(re.findall(r'"kind": "(\w+)"', ZOO)))

#: The same study without a target: a fixed penalty sets no L0.
FIXED = """\
import saelab
from saelab.api import settings

saelab.compare(settings("configs/base.toml"),
               {"ramp": {"sae.controllers": [{"kind": "ramp", "value": 0.02}]}}, seeds=2,
               out_dir="run_2", study="same numbers", target_l0=None)
"""

#: Columns of tables and names in records that differ between two launches or are prose.
CHANGING = ("seconds", "versions", "sha256", "digest", "reason", "cells", "comment")
TEXTS = ("reason", "sentence", "summary", "gate", "note", "needs", "warnings", "text")


def project(folder: Path, experiment: str, layout: str, seeds: int) -> Path:
    (folder / "configs").mkdir(parents=True)
    (folder / "experiment.py").write_text(experiment, encoding="utf-8")
    (folder / "plan.toml").write_text(PLAN.format(seeds=seeds), encoding="utf-8")
    (folder / "configs/base.toml").write_text(BASE.format(layout=layout), encoding="utf-8")
    return folder


def saelab(folder: Path, *arguments: str) -> str:
    return python(folder, "-m", "saelab", *arguments)


def python(folder: Path, *arguments: str) -> str:
    known = os.environ | {"PYTHONPATH": str(ROOT), "SAELAB_CACHE": str(folder.parent / "cache")}
    done = subprocess.run(
        [sys.executable, *arguments],
        cwd=folder,
        env=known,
        stdout=subprocess.PIPE,
        text=True,
        check=False,
    )
    if done.returncode:
        sys.exit(f"python {' '.join(arguments)} ended with {done.returncode} in {folder}")
    return done.stdout


def hashed(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:16]


def tensors(file: Path) -> dict[str, str]:
    from safetensors.torch import load_file

    found = {}
    for name, x in load_file(file).items():
        kind = f"{x.dtype} {tuple(x.shape)} "
        found[name] = kind + hashed(
            x.contiguous().flatten().view(__import__("torch").uint8).numpy().tobytes()
        )
    return found


def values(file: Path) -> dict[str, Any]:
    """Reads the rows of a table: names -> numbers."""
    import pyarrow.parquet as pq

    keys = ("arm", "seed", "level", "metric", "slice", "name", "step", "latent")
    found: dict[str, Any] = {}
    for i, row in enumerate(pq.read_table(file).to_pylist()):
        named = [str(row[key]) for key in keys if key in row]
        name = "/".join(named) if named else str(i)
        found[name] = {k: plain(v) for k, v in row.items() if k not in (*keys, *CHANGING)}
    return found


def plain(value: Any) -> Any:
    return repr(value) if isinstance(value, float) and not math.isfinite(value) else value


def of_run(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for file in sorted(folder.rglob("*.safetensors")):
        found[file.relative_to(folder).as_posix()] = tensors(file)
    for file in sorted(folder.rglob("*.parquet")):
        name = file.relative_to(folder).as_posix()
        found |= {f"{name}:{row}": known for row, known in values(file).items()}
    for name in ("gate.json", "final_info.json", "manifest.json"):
        found[name] = cleaned(json.loads((folder / name).read_text(encoding="utf-8")))
    return found


def cleaned(data: Any) -> Any:
    if isinstance(data, dict):
        return {name: cleaned(value) for name, value in data.items() if name not in CHANGING}
    return [cleaned(value) for value in data] if isinstance(data, list) else plain(data)


def record(out: Path) -> None:
    shutil.rmtree(out, ignore_errors=True)
    with tempfile.TemporaryDirectory() as temporary:
        place = Path(temporary)
        shipped = (ROOT / "experiment.py").read_text(encoding="utf-8")
        small = project(place / "shipped", shipped, "rows", 2)
        every = project(place / "parts", PARTS, "contexts", 2)
        later = project(place / "later", ZOO, "contexts", 1)
        found: dict[str, Any] = {}
        plans = [
            json.loads(saelab(small, "plan", "check", f"run_{i}", "--json")) for i in range(10)
        ]
        found["plan check"] = cleaned(plans)
        saelab(small, "run", "run_0", "run_1")
        saelab(every, "run", "run_1")
        saelab(later, "run", "run_1")
        (every / "fixed.py").write_text(FIXED, encoding="utf-8")
        python(every, "fixed.py")
        runs = ((small, ("run_0", "run_1")), (every, ("run_1", "run_2")), (later, ("run_1",)))
        for folder, names in runs:
            for name in names:
                for item, known in of_run(folder / name).items():
                    found[f"{folder.name}/{name}/{item}"] = known
                verdict = json.loads(saelab(folder, "verdict", name, "--json"))
                found[f"{folder.name}/{name}/verdict"] = cleaned(verdict)
    out.mkdir(parents=True)
    (out / "numbers.json").write_text(json.dumps(found, indent=1), encoding="utf-8")
    print(f"{out}: {len(found)} items of {commit()}")


def commit() -> str:
    asked = ["git", "-C", str(ROOT), "rev-parse", "--short", "HEAD"]
    return subprocess.run(asked, capture_output=True, text=True, check=False).stdout.strip()


def flat(data: Any, name: str = "") -> dict[str, Any]:
    """Flattens nested records: 'gate.json/baseline/seed 3/facts/l0' -> value."""
    if isinstance(data, dict):
        return {
            k: v for key, value in data.items() for k, v in flat(value, f"{name}/{key}").items()
        }
    if isinstance(data, list):
        return {k: v for i, value in enumerate(data) for k, v in flat(value, f"{name}/{i}").items()}
    return {name: data}


def compare(before: Path, texts: bool) -> int:
    with tempfile.TemporaryDirectory() as temporary:
        now = Path(temporary) / "now"
        record(now)
        old, new = (
            flat(json.loads((folder / "numbers.json").read_text(encoding="utf-8")))
            for folder in (before, now)
        )
    if not texts:
        for known in (old, new):
            for name in [n for n in known if n.rsplit("/", 1)[-1] in TEXTS]:
                del known[name]
    gone = [name for name in old if name not in new]
    changed = [name for name in old if name in new and old[name] != new[name]]
    added = [name for name in new if name not in old]
    for word, names in (("removed", gone), ("changed", changed), ("added", added)):
        for name in names[:40]:
            print(f"{word}: {name}  {old.get(name)!r} -> {new.get(name)!r}")
    print(
        f"{len(old)} values before: {len(gone)} removed, {len(changed)} changed, {len(added)} added"
    )
    return 1 if gone or changed else 0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("what", choices=("record", "compare"))
    parser.add_argument("folder", type=Path, help="folder of the recorded numbers")
    parser.add_argument("--texts", action="store_true", help="compare sentences too")
    asked = parser.parse_args()
    if asked.what == "record":
        record(asked.folder)
    else:
        sys.exit(compare(asked.folder, asked.texts))


if __name__ == "__main__":
    main()
