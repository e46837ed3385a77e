"""A folder of its own for a study, complete for autonomous drivers too (docs/drivers.md).

experiment.py, plot.py           the two files that AI-Scientist v1's model sees and edits
plan.toml, configs/              what is registered, and the base settings
prompt.json                      `system` and `task_description`
seed_ideas.json, ideas.json      A and B; `novel` in the second
latex/template.tex               sections to fill
candidate.py, try.py             the one file that an agent edits, and what judges it
program.md, SKILL.md             how an agent works here
ai_scientist_v2/sae_variants.*   topic (.md), ideas (.json) and code (.py) for AI-Scientist v2
run_0/                           the baseline's results, where there are some
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path

from saelab import assets
from saelab.errors import MismatchError, SettingError
from saelab.runs.folder import RunFolder
from saelab.storage.atomic import write_json, write_text
from saelab.storage.links import refuse_links
from saelab.study.plan import read_base, read_plan
from saelab.study.registry import changes, register
from saelab.verdict.review import review_run

SOURCE = Path(assets.__file__).parent / "template"
#: File of the template -> where it goes.
FILES = {
    "experiment.py.txt": "experiment.py",
    "plot.py.txt": "plot.py",
    "plan.toml": "plan.toml",
    "embedded.toml": "configs/embedded.toml",
    "prompt.json": "prompt.json",
    "ideas.json": "ideas.json",
    "template.tex": "latex/template.tex",
    "candidate.py.txt": "candidate.py",
    "try.py.txt": "try.py",
    "program.md": "program.md",
    "SKILL.md": "SKILL.md",
    "v2_topic.md": "ai_scientist_v2/sae_variants.md",
    "v2_ideas.json": "ai_scientist_v2/sae_variants.json",
    "v2_node.py.txt": "ai_scientist_v2/sae_variants.py",
}
#: The same for a study with nothing but its question.
MINIMAL = {
    "minimal_experiment.py.txt": "experiment.py",
    "minimal_plan.toml": "plan.toml",
    "embedded.toml": "configs/embedded.toml",
}
#: Stands in a file for the name of the folder, as a text in quotation marks.
NAME = '"{NAME}"'
#: Stands in a file for the absolute path of the folder, as a text in quotation marks.
STUDY = '"{STUDY}"'
BASELINE_RUN = "run_0"


def write_minimal(folder: Path) -> None:
    """Fills a new folder with the three files that a study needs.

    Args:
        folder: made where it is missing, empty otherwise.

    Raises: SettingError for a folder that holds something.
    """
    _check_empty(folder)
    _write_files(folder, MINIMAL)


def write_template(folder: Path, run_0: Path | None = None) -> None:
    """Fills a new folder.

    Args:
        folder: made where it is missing, empty otherwise.
        run_0: a complete run of the baselines under the same plan, copied.

    Raises: SettingError for a folder that holds something; MismatchError for a run_0 of another
        plan or base; SourceError for one that is not complete.
    """
    _check_empty(folder)
    if run_0 is not None:
        _check_baseline(run_0)
    _write_files(folder, FILES)
    ideas = json.loads((SOURCE / "ideas.json").read_text(encoding="utf-8"))
    seeds = [{name: value for name, value in idea.items() if name != "novel"} for idea in ideas]
    write_json(folder / "seed_ideas.json", seeds)
    if run_0 is not None:
        shutil.copytree(run_0, folder / BASELINE_RUN)
        register(folder, read_plan(folder / "plan.toml"))


def _check_empty(folder: Path) -> None:
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise SettingError("folder", str(folder), "is there and not empty: name another")


def _write_files(folder: Path, files: Mapping[str, str]) -> None:
    whole = folder.resolve()
    for name, place in files.items():
        text = (SOURCE / name).read_text(encoding="utf-8")
        text = text.replace(STUDY, json.dumps(str(whole))).replace(NAME, json.dumps(whole.name))
        write_text(folder / place, text)


def _check_baseline(run_0: Path) -> None:
    """Checks that a run can stand as the baseline of what will be compared with it."""
    refuse_links(run_0)
    run = RunFolder(run_0)
    found = review_run(run)
    if texts := changes(read_plan(SOURCE / "plan.toml"), found.plan):
        raise MismatchError(f"{run_0} was made under another plan ({'; '.join(texts)}): leave it")
    used = run.required("base")["base"]
    if used != read_base(SOURCE / "embedded.toml").model_dump(mode="json"):
        raise MismatchError(f"{run_0} was made from other base settings: leave it")
