"""The battery of checks that every part passes: those of the package, and those of a study.

A check takes one example of a part and raises `PartMistake` with what is wrong and the remedy. What
a part raises by itself counts as a mistake too.
"""

from __future__ import annotations

import traceback
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from saelab.checks import functions, life
from saelab.checks.examples import Case, cases
from saelab.checks.mistakes import PartMistake
from saelab.checks.trials import D_SAE
from saelab.errors import SettingError
from saelab.parts import TABLE

Check = Callable[[Case, int], None]
#: Folder of this package, whose frames are not a part's own.
PACKAGE = Path(__file__).parents[1]
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


@dataclass(frozen=True)
class Finding:
    """The result of one check of one example.

    Args:
        case: the example.
        check: name of the check, such as 'forget'.
        mistake: what is wrong and the remedy; '' where nothing is.
        place: 'file:line' of the part's code that raised it; '' where a check found it.
    """

    case: Case
    check: str
    mistake: str
    place: str = ""

    def as_dict(self) -> dict[str, str]:
        """Returns the finding as plain data."""
        part = {"seam": self.case.seam, "kind": self.case.kind, "example": str(self.case.index)}
        return part | {"check": self.check, "mistake": self.mistake, "place": self.place}


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
        mistake = " ".join(f"{type(error).__name__}: {error}".split())
        return Finding(case, name_of(check), mistake, _place(error))
    return Finding(case, name_of(check), "")


def _place(error: BaseException) -> str:
    """Returns file and line of the innermost frame outside this package and those installed."""
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if not Path(frame.filename).is_relative_to(PACKAGE)]
    own = [frame for frame in own if "site-packages" not in Path(frame.filename).parts]
    return f"{Path(own[-1].filename).name}:{own[-1].lineno}" if own else ""


def lines_of(findings: Iterable[Finding]) -> Iterator[str]:
    """Yields lines for people: one for each check that passes, and one for each mistake, with all
    checks of an example that it stops."""
    together: dict[tuple[str, str, str], list[str]] = {}
    for one in findings:
        same = str(one.case), one.mistake, one.place if one.mistake else one.check
        together.setdefault(same, []).append(one.check)
    for (case, mistake, place), checks in together.items():
        if not mistake:
            yield f"ok     {case}  {checks[0]}"
            continue
        at = f" ({place})" if place else ""
        yield f"FAILS  {case}  {', '.join(checks)}  {mistake}{at}"


def run_battery(case: Case, seed: int = 0) -> Iterator[Finding]:
    """Runs every check of an example, in order."""
    for check in checks_of(case):
        yield run_check(check, case, seed)


def check_new_parts(file: Path, load: Callable[[], object]) -> list[Finding]:
    """Runs the battery on every example of the parts that a file registers.

    Args:
        file: named in messages.
        load: imports the file.

    Raises: SettingError when the file registers no part.
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
    return [finding for case in new for finding in run_battery(case)]
