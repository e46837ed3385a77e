"""Tries: a candidate is trained next to the baseline and judged, and the decision is printed.

    tries/try_3/            the run folder of the third try
    .saelab/tries.jsonl     one line for each that ended: what it was and what was decided

A try that asks for more seeds is extended by a new one with more: the cells that both have are in
the cache, so only the others are trained. Tries are numbered once, whether their folder is still
there or not, and each is an attempt of the study (`registry`).
"""

from __future__ import annotations

import json
import re
from contextlib import ExitStack, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from saelab.drivers.candidate import Candidate
from saelab.errors import DamageError, SettingError
from saelab.launch.entry import start, task_of
from saelab.runs.folder import RunFolder
from saelab.storage.atomic import LINE_REMEDY, append_line, read_lines
from saelab.storage.validation import Loose, Number, validate
from saelab.study.registry import FOLDER, attempts
from saelab.study.task import LONGEST
from saelab.verdict.decision import MOST_TIMES

TRIES, LEDGER = "tries", "tries.jsonl"
#: Comparisons that are planned in a study whose plan does not say how many, when its first one is a
#: try. Our choice.
PLANNED = 100
NAME = re.compile(r"try_(\d+)")


class _Line(Loose):
    name: str
    candidate: str
    arm: str
    seeds: int
    seed_set: str
    decision: str
    value: Number | None


@dataclass(frozen=True, kw_only=True)
class Try:
    """One try that ended.

    Args:
        name: 'try_3'.
        candidate: its hash, see `Candidate.digest`.
        arm: as the candidate was called.
        seeds: of both sides.
        seed_set: '' for the study's first seeds.
        decision: 'keep', 'discard' or 'more-seeds N'.
        value: the metric of the candidate, as measured.
    """

    name: str
    candidate: str
    arm: str
    seeds: int
    seed_set: str
    decision: str
    value: float | None

    @property
    def asked_seeds(self) -> int | None:
        """Number of seeds that the decision asked for."""
        word, _, number = self.decision.partition(" ")
        return int(number) if word == "more-seeds" and number.isdigit() else None


@dataclass(frozen=True, kw_only=True)
class Options:
    """Settings of a try.

    Args:
        seeds: of both sides, when an earlier try of this candidate asked for more.
        seed_set: further set of seeds of the study that is used instead of its first.
        limit: seconds that it may be expected to take.
        workers: processes; 0 works in this one, None takes one per core.
        executor: as for a launch.
    """

    seeds: int | None = None
    seed_set: str = ""
    limit: float = LONGEST
    workers: int | None = None
    executor: str = ""


def try_candidate(candidate: Candidate, options: Options = Options()) -> Try:
    """Trains a candidate next to the baseline, judges it and prints the decision last.

    Raises: as a launch; SettingError for seeds that no earlier try asked for.
    """
    code = candidate.digest()
    ended = read_tries(candidate.root)
    same = [t for t in ended if (t.candidate, t.seed_set) == (code, options.seed_set)]
    if options.seeds is not None:
        _check_asked(same, options.seeds)
    elif same:
        print(f"{same[-1].name} was the same candidate, and was decided: {same[-1].decision}")
    with ExitStack() as undo:
        folder = _new_folder(candidate.root)
        undo.callback(_remove_empty, folder)
        plan_file = candidate.root / "plan.toml"
        task = task_of({folder.name: candidate.run}, candidate.file, folder, False, plan_file)
        if options.seeds is not None and options.seeds <= task.plan.seeds:
            raise SettingError("seeds", options.seeds, f"the plan has {task.plan.seeds}: name more")
        start(
            replace(
                task,
                seeds=options.seeds,
                seed_set=options.seed_set,
                limit=options.limit,
                workers=options.workers,
                executor=options.executor,
                planned=PLANNED,
                table={},  # candidates are not registered: each is a comparison of the ledger
            )
        )
    means = RunFolder(folder).info[candidate.arm.name]["means"]
    done = Try(
        name=folder.name,
        candidate=code,
        arm=candidate.arm.name,
        seeds=options.seeds or task.plan.seeds,
        seed_set=options.seed_set,
        decision=means["decision"],
        value=means.get(task.plan.primary),
    )
    append_line(candidate.root / FOLDER / LEDGER, json.dumps(asdict(done)))
    return done


def read_tries(root: Path) -> list[Try]:
    """Every try of the study in `root` that ended, in order.

    Raises: DamageError when the file can't be read.
    """
    tries = []
    for where, line in read_lines(root / FOLDER / LEDGER, DamageError):
        fields = validate(line, _Line, where, LINE_REMEDY)
        tries.append(Try(**{name: fields[name] for name in _Line.model_fields}))
    return tries


def _check_asked(same: list[Try], seeds: int) -> None:
    """Raises: SettingError when no try of this candidate asked for so many seeds."""
    asked = [t.asked_seeds for t in same if t.asked_seeds is not None]
    if not asked:
        remedy = "no try of this candidate asked for more seeds: run it without --seeds first"
        raise SettingError("seeds", seeds, remedy)
    if seeds > max(asked):
        remedy = f"the decision asked for {max(asked)} (at most {MOST_TIMES} times the plan's)"
        raise SettingError("seeds", seeds, f"{remedy}: name no more")


def _new_folder(root: Path) -> Path:
    """Makes the folder of the next try; two programs never get the same."""
    used = [int(m[1]) for a in attempts(root) if (m := NAME.fullmatch(a.run))]
    folder = root / TRIES
    used += [int(m[1]) for p in folder.glob("try_*") if (m := NAME.fullmatch(p.name))]
    number = max(used, default=0)
    while True:
        number += 1
        with suppress(FileExistsError):
            (folder / f"try_{number}").mkdir(parents=True)
            return folder / f"try_{number}"


def _remove_empty(folder: Path) -> None:
    """Removes the folder of a try that was refused, if nothing is in it."""
    with suppress(OSError):
        folder.rmdir()
