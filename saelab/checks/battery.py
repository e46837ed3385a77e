"""The battery of checks that every part passes: those of the package, and those of a study.

A check takes one example of a part and raises `PartMistake` with what is wrong and the remedy. What
a part raises by itself counts as a mistake too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from saelab.checks import functions, life
from saelab.checks.examples import Case, cases
from saelab.checks.mistakes import PartMistake
from saelab.checks.trials import D_SAE
from saelab.errors import SettingError, UsageError
from saelab.parts import TABLE

Check = Callable[[Case, int], None]
#: Checks of all parts, in the order in which a mistake is easiest to read.
OF_ALL: tuple[Check, ...] = (
    life.check_settings,
    life.check_pass,
    life.check_preactivations,
    life.check_loss,
    life.check_gradients,
    life.check_update,
    life.check_saved_state,
    life.check_resume,
    life.check_parameters,
    life.check_per_latent,
    life.check_forget,
    life.check_l0_rule,
    life.check_scalars,
    life.check_facts,
)
#: Further checks of activations.
OF_ACTIVATIONS: tuple[Check, ...] = (
    functions.check_paths,
    functions.check_rows,
    functions.check_encode,
    functions.check_thresholds,
    functions.check_export,
    functions.check_without_context,
)
#: What a part may raise by its own mistake.
RAISED = (ArithmeticError, AssertionError, AttributeError, LookupError, NameError, RuntimeError)
RAISED += (SettingError, TypeError, ValueError)


class PartError(UsageError):
    """Raised when parts break rules; its text has one line for each."""


@dataclass(frozen=True)
class Finding:
    """The result of one check of one example.

    Args:
        case: the example.
        check: name of the check, such as 'forget'.
        mistake: what is wrong and the remedy; '' where nothing is.
    """

    case: Case
    check: str
    mistake: str

    def as_dict(self) -> dict[str, str]:
        """Returns the finding as plain data."""
        part = {"seam": self.case.seam, "kind": self.case.kind, "example": str(self.case.index)}
        return part | {"check": self.check, "mistake": self.mistake}

    def line(self) -> str:
        """Returns one line for people."""
        state = "FAILS" if self.mistake else "ok"
        return f"{state:5}  {self.case}  {self.check}" + (f"  {self.mistake}" * bool(self.mistake))


def checks_of(case: Case) -> tuple[Check, ...]:
    """Returns the checks that an example of its seam passes."""
    return OF_ALL + (OF_ACTIVATIONS if case.seam == "activation" else ())


def name_of(check: Check) -> str:
    """Returns the name of a check: that of its function without 'check_'."""
    return check.__name__.removeprefix("check_")


def run_check(check: Check, case: Case, seed: int = 0) -> Finding:
    """Runs one check of one example."""
    try:
        check(case, seed)
    except PartMistake as mistake:
        return Finding(case, name_of(check), str(mistake))
    except RAISED as error:
        return Finding(case, name_of(check), f"{type(error).__name__}: {error}")
    return Finding(case, name_of(check), "")


def run_battery(case: Case, seed: int = 0) -> Iterator[Finding]:
    """Runs every check of an example, in order."""
    for check in checks_of(case):
        yield run_check(check, case, seed)


def check_new_parts(file: Path, load: Callable[[], object]) -> list[Finding]:
    """Runs the battery on every example of the parts that a file registers.

    Args:
        file: named in messages.
        load: imports the file.

    Raises: PartError when a check fails; SettingError when the file registers no part.
    """
    before = {seam: set(kinds) for seam, kinds in TABLE.items()}
    load()
    table = {
        seam: {kind: kinds[kind] for kind in kinds if kind not in before[seam]}
        for seam, kinds in TABLE.items()
    }
    new = cases(D_SAE, table=table)
    if not new:
        remedy = "registers no part: define one and call saelab.register(seam, Config) there"
        raise SettingError("file", str(file), remedy)
    findings = [finding for case in new for finding in run_battery(case)]
    failed = [finding for finding in findings if finding.mistake]
    if failed:
        lines = "\n".join(finding.line() for finding in failed)
        raise PartError(f"{lines}\n{len(failed)} of {len(findings)} checks fail: correct the part")
    return findings
