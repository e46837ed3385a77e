"""A candidate: one change of the study's baseline that a program wants judged.

    ARM = Arm("candidate", {"train.lr": 1.6e-2}, "what it isolates")

stands in `candidate.py` next to plan.toml, together with the parts that it brings; changes may also
come from the command line. The baseline is the plan's base settings, which no candidate can change.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from saelab.config import digest
from saelab.errors import SettingError
from saelab.study.experiment_file import load_experiment
from saelab.study.foreign_code import foreign_code
from saelab.study.plan import BASELINE, Arm, Run, arm_settings, read_base, read_plan, references

#: The file that an agent edits.
FILE = "candidate.py"


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """One arm to be judged.

    Args:
        arm: it is compared with the baseline and has as many seeds.
        file: that defines its parts; the plan lies next to it, or in `root`.
        root: folder of plan.toml.
    """

    arm: Arm
    file: Path
    root: Path

    @property
    def run(self) -> Run:
        """The run that trains it."""
        title = f"Try of {self.arm.name}" + (f": {self.arm.comment}" if self.arm.comment else "")
        return Run(title, [Arm(BASELINE, comment="as the base says"), self.arm])

    def digest(self) -> str:
        """Returns a hash of what it is, whatever it is called: settings and code."""
        base = read_base(self.root / read_plan(self.root / "plan.toml").base)
        settings = arm_settings(base, self.run, self.arm)
        code = foreign_code(settings.sae, self.arm.module, self.arm.name)
        return digest([settings.digest(), code])


def read_candidate(file: Path) -> Candidate:
    """Reads the candidate of a file.

    Raises: SourceError for a file that is missing; SettingError for one without a usable `ARM`.
    """
    file = file.resolve()
    arm = getattr(load_experiment(file), "ARM", None)
    if not isinstance(arm, Arm):
        remedy = 'define the candidate in this file: ARM = Arm("name", {"train.lr": 1e-3}, "why")'
        raise SettingError(f"{file.name}: ARM", arm, remedy)
    return Candidate(arm=_checked(arm), file=file, root=file.parent)


def candidate_of(
    changes: Mapping[str, Any], file: Path, name: str = "", root: Path | None = None
) -> Candidate:
    """Makes a candidate of changes to the base settings.

    Args:
        file: that defines the parts that the changes name.
        name: of the arm.
        root: folder of plan.toml; by default that of the file.

    Raises: SettingError without any change; SourceError for a file that is missing.
    """
    if not changes:
        raise SettingError("changes", {}, "a candidate changes at least one setting of the base")
    load_experiment(file)
    arm = Arm(name or "candidate", changes, "settings as given")
    return Candidate(arm=_checked(arm), file=file, root=root or file.parent)


def _checked(arm: Arm) -> Arm:
    """The arm with all seeds, compared with the baseline.

    Raises: SettingError for one that can't stand alone.
    """
    if arm.name == BASELINE:
        raise SettingError("ARM", arm.name, "is the name of the other arm: choose another")
    for setting, value, usual in (
        ("against", arm.against, BASELINE),
        ("twin_of", arm.twin_of, None),
        ("changes", references(arm.changes), []),
    ):
        if value != usual:
            remedy = "refers to another arm, and a candidate stands alone: leave it out"
            raise SettingError(f"{arm.name}: {setting}", value, remedy)
    return replace(arm, primary=True)
