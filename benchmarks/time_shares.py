"""Where the processor time of a launch goes: harvest, steps, evaluations, files, pictures.

    python benchmarks/time_shares.py [--quick] [--run run_1]

makes `python experiment.py --out_dir=run_1` and `python plot.py` in a fresh folder with an empty
cache, while py-spy (a sampling profiler that reads the processes from outside; `pip install
py-spy`) notes what every thread that is at work does, 100 times a second. A sample belongs to the
first stage of `STAGES` that one of its frames names; those are ordered from the special to the
general, so that the reconstruction that a control needs counts as control.

    share      samples of the stage over all samples
    seconds    share x processor time of all processes
"""

from __future__ import annotations

import os
import re
import resource
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path
from time import perf_counter

from common import HERE, Section, Target, parser, run, save, scratch, table

from saelab.errors import SourceError

ROOT = HERE.parent
#: Stage -> patterns of frames, 'function (file:line)'; the first stage that matches has the sample.
STAGES: dict[str, tuple[str, ...]] = {
    "pictures": (r"\(plot\.py", r"saelab/report/"),
    "compiling the kernels": (r"kernels/build\.py",),
    "imports": (r"<frozen importlib",),
    "agreement of seeds": (r"launch/seed_pairs\.py",),
    "texts and tokens": (r"data/text/", r"data/clean_loss\.py"),
    "harvest of probing texts": (r"harvest_probing",),
    "harvest": (r"data/activations/harvest\.py", r"data/activations/parallel_passes\.py"),
    "calibration of L0": (r"training/calibration_text\.py",),
    "snapshots": (r"training/snapshots\.py",),
    "checkpoints": (r"write_checkpoint", r"read_checkpoint", r"remove_checkpoints"),
    "steps": (r"training/loop\.py", r"training/module_cell\.py"),
    "batches": (r"data/activations/stream\.py",),
    "controls": (r"launch/controls\.py",),
    "probing": (r"evals/probing/", r"evals/measure\.py.*probing"),
    "spliced passes": (r"evals/core_data\.py.*losses", r"token_losses", r"spliced_losses"),
    "core": (r"evals/core\.py", r"evals/core_data\.py"),
    "other evaluations": (r"saelab/evals/", r"largest_cosines"),
    "files": (r"saelab/storage/", r"saelab/runs/", r"_write", r"safetensors/"),
    "verdict": (r"saelab/verdict/",),
    "launch": (r"saelab/launch/", r"saelab/"),
}


def main() -> None:
    made = parser("Where the processor time of a launch goes.")
    made.add_argument("--run", default="run_1", help="the run of experiment.py")
    options = made.parse_args()
    spy = shutil.which("py-spy", path=f"{Path(sys.executable).parent}:{os.environ.get('PATH', '')}")
    if spy is None:
        raise SourceError("py-spy is not installed: pip install py-spy")
    with scratch() as folder:
        for name in ("experiment.py", "plan.toml", "plot.py"):
            shutil.copyfile(ROOT / name, folder / name)
        shutil.copytree(ROOT / "configs", folder / "configs")
        command = [sys.executable, "experiment.py", f"--out_dir={options.run}"]
        if options.quick:
            command = [sys.executable, "-m", "saelab", "run", options.run, "--quick"]
        measured = [_profile(spy, folder, c) for c in (command, [sys.executable, "plot.py"])]
    samples, seconds, wall = Counter[str](), 0.0, []
    for stacks, processor, elapsed in measured:
        samples += count_stages(stacks)
        seconds += processor
        wall.append(elapsed)
    total = sum(samples.values())
    rows = [
        {"stage": stage, "share": n / total, "seconds": seconds * n / total}
        for stage, n in samples.most_common()
    ]
    lines = [[r["stage"], f"{r['share']:.1%}", f"{r['seconds']:.1f}"] for r in rows]
    steps = Target("share of the steps", samples["steps"] / total, 2 / 3)
    launch, pictures = wall
    times = f"launch {launch:.0f} s, pictures {pictures:.0f} s, processor {seconds:.0f} s"
    title = f"{options.run}: {times}"
    section = Section(title, table(["stage", "share", "seconds"], lines), rows, [steps])
    save("time_shares", options, [section.show()], None)


def _profile(spy: str, folder: Path, command: list[str]) -> tuple[str, float, float]:
    """Returns the sampled stacks of a command and its children, their processor time, and its time
    by the clock."""
    out = folder / "stacks.txt"
    before, start = _children_seconds(), perf_counter()
    options = ["record", "--subprocesses", "--format", "raw", "--rate", "100", "--output", str(out)]
    subprocess.run([spy, *options, "--", *command], cwd=folder, check=True)
    return out.read_text(encoding="utf-8"), _children_seconds() - before, perf_counter() - start


def _children_seconds() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def count_stages(stacks: str) -> Counter[str]:
    """Returns the samples of each stage in stacks as py-spy writes them, 'frame;frame;frame n'."""
    samples = Counter[str]()
    for line in stacks.splitlines():
        stack, _, number = line.rpartition(" ")
        samples[_stage(stack)] += int(number)
    return samples


def _stage(stack: str) -> str:
    for stage, patterns in STAGES.items():
        if any(re.search(pattern, stack) for pattern in patterns):
            return stage
    return "elsewhere"


if __name__ == "__main__":
    run(main)
