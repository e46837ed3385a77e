"""Settings over which a study asks whether an idea holds: `[[settings]]` of plan.toml.

[[settings]]
name = "pythia"
base = "configs/pythia.toml"          # other base settings than the plan's

[[settings]]
name = "wide"
changes = {"sae.d_sae" = 1024}        # the plan's base with these changes
"""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import AfterValidator, Field

from saelab.config import Frozen
from saelab.storage.validation import folder_name_problem

#: Name of the plan's own base among the settings.
OF_PLAN = "base"
#: Most further settings. Our choice: final_info.json has an entry for the word of each.
MOST_SETTINGS = 15


def _check_name(name: str) -> str:
    if name == OF_PLAN:
        raise ValueError(f"{OF_PLAN!r} is the plan's own base: use another name")
    if problem := folder_name_problem(name):
        raise ValueError(problem)
    return name


class SettingConfig(Frozen):
    """Base settings, besides the plan's own, in which every arm of a run is trained.

    Args:
        name: as it is shown; the setting's run folder is `run_i/settings/<name>`.
        base: path of the base settings, relative to plan.toml; None takes the plan's.
        changes: dotted settings of that base and their values.
    """

    name: Annotated[str, AfterValidator(_check_name)]
    base: str | None = Field(default=None, min_length=1)
    changes: dict[str, Any] = Field(default_factory=dict)
