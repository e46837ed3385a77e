"""Adapter for AI-Scientist v2, whose nodes are files that it executes as a whole.

A node's file has no `__main__` block, writes `working/experiment_data.npy` and pictures into
`working/`, and prints a validation loss. Several nodes are at work at once. To repeat a node with
other seeds, the driver puts lines in front of it that seed the global generators of Python, numpy
and torch. Nothing in saelab uses these, so every repeat would give the same numbers, with spread 0.
`run_candidate` therefore takes the global seed that it finds as the name of a further set of the
study's seeds:

    nothing seeded    the study's first seeds, as for `saelab try`
    seed S            the set 'global seed S': other seeds of baseline and candidate alike

Each repeat is then a try of its own (`tries`), and is accounted for like any other.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Iterator, Mapping
from contextlib import chdir, contextmanager
from pathlib import Path
from types import FrameType, ModuleType
from typing import Any

import numpy as np
import torch

from saelab.drivers.candidate import candidate_of
from saelab.drivers.tries import TRIES, Options, Try, try_candidate
from saelab.errors import SettingError, SourceError
from saelab.report.figures.common import draw_run
from saelab.report.run_data import Run, load
from saelab.storage.atomic import write_atomically
from saelab.study.plan import BASELINE

#: Seconds after which the driver stops a node are 3600; what takes longer is refused at once.
LIMIT = 3500.0
#: A generator that nobody has seeded starts from a random number of 64 bits, and the driver's seeds
#: are those that numpy takes, which have 32.
LARGEST_SEED = 2**32 - 1
DATA = "experiment_data.npy"
#: Pictures of a try.
PICTURES = ("verdict", "loss", "frontier")


def run_candidate(
    study: str | Path,
    changes: Mapping[str, Any],
    name: str = "candidate",
    working: str | Path = "working",
    seeds: int | None = None,
) -> dict[str, Any]:
    """Judges changes to the base settings of a study, and writes what the driver reads.

    To be called at the end of a node's file, which may register parts before.

    Args:
        study: the folder of plan.toml; the same for all nodes, and outside of their folders.
        changes: as those of an `Arm`.
        name: of the arm.
        working: folder for the results.
        seeds: of both sides, when the last decision was 'more-seeds N'.

    Returns: the content of experiment_data.npy.

    Raises: as `saelab try`.
    """
    if not (Path(study) / "plan.toml").is_file():
        raise SettingError("study", str(study), "holds no plan.toml: name the folder of a study")
    frame = inspect.currentframe()
    assert frame is not None and frame.f_back is not None
    root, out, seed = Path(study).resolve(), Path(working).resolve(), global_seed()
    seed_set = "" if seed is None else f"global seed {seed}"
    print(_seeds_text(seed))
    with _as_module(frame.f_back) as file, chdir(root):  # settings name paths relative to it
        candidate = candidate_of(changes, file, name, root)
        options = Options(seeds=seeds, seed_set=seed_set, limit=LIMIT, workers=0)
        done = try_candidate(candidate, options)
    run = load(root / TRIES / done.name)
    data = {"held-out text": _results(run, done)}
    out.mkdir(parents=True, exist_ok=True)
    write_atomically(out / DATA, lambda file: _save(file, data))
    for line, _ in draw_run(run, out, PICTURES):
        print(line)
    if done.value is not None:
        print(f"validation_loss = {done.value:.6f} ({run.manifest['primary']} of {name})")
    return data


def global_seed() -> int | None:
    """The seed that torch's global generator was given; None where nobody seeded it."""
    seed = torch.initial_seed()
    return seed if seed <= LARGEST_SEED else None


def _seeds_text(seed: int | None) -> str:
    if seed is None:
        return "no global seed is set: the study's first seeds are used"
    return (
        f"global seed {seed}: nothing here uses the global generators, so this repeat takes the "
        f"study's seeds of the set 'global seed {seed}', and counts as a try of its own"
    )


@contextmanager
def _as_module(frame: FrameType) -> Iterator[Path]:
    """Makes a module of code that was executed as a text, so that its parts have a file.

    Args:
        frame: of the code.

    Raises: SourceError when the code has no file.
    """
    file = Path(frame.f_code.co_filename).resolve()
    if not file.is_file():
        raise SourceError(f"{file} does not exist: call run_candidate from a file")
    name, names = "saelab_experiment", frame.f_globals
    module = ModuleType(name)
    module.__dict__.update({"RUNS": {}} | names | {"__name__": name, "__file__": str(file)})
    before = sys.modules.get(name)
    sys.modules[name] = module
    if names.get("__name__") is None:  # of code that `exec` was given with new globals
        for value in names.values():
            if isinstance(value, type) and value.__module__ == "builtins":
                _move_class(value, name)
    try:
        yield file
    finally:
        if before is None:
            del sys.modules[name]
        else:
            sys.modules[name] = before


def _move_class(value: type, module: str) -> None:
    """Names the module of a class, unless it is a built-in one, which can't be changed."""
    try:
        value.__module__ = module
    except TypeError:
        return


def _results(run: Run, done: Try) -> dict[str, Any]:
    """Results as the driver wants them for a data set; there is no prediction of a label."""
    primary, metrics = run.manifest["primary"], run.numbers(run.manifest["primary"])
    curves = run.curves.get(("loss.reconstruction", done.arm), {})
    course = next(iter(curves.values()), None)
    means = run.info[done.arm]["means"]
    return {
        "metrics": {"train": [], "val": metrics.get(done.arm, [])},
        "losses": {
            "train": [] if course is None else course.values.tolist(),
            "val": metrics.get(done.arm, []),
        },
        "predictions": np.zeros(0),
        "ground_truth": np.zeros(0),
        "tokens": [] if course is None else course.tokens.tolist(),
        "baseline": {"val": metrics.get(BASELINE, [])},
        "metric": primary,
        "decision": done.decision,
        "verdict": means[f"verdict.{primary}"],
        "difference": [means[f"diff.{primary}{end}"] for end in ("", ".low", ".high")],
        "seed_set": done.seed_set,
        "try": done.name,
    }


def _save(file: Path, data: dict[str, Any]) -> None:
    """Writes a dict as the driver reads it, by `np.load(allow_pickle=True)`: as a pickle."""
    with file.open("wb") as handle:
        np.save(handle, np.array(data, dtype=object), allow_pickle=True)
