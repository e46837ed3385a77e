"""The confirming run finds its arm in earlier runs, and repeats it with both sides tuned."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from projects import BASE, Project, cli

from saelab.errors import SettingError
from saelab.launch.confirmation import candidates
from saelab.runs.folder import RunFolder
from saelab.seeding import study_seeds
from saelab.storage.atomic import read_json
from saelab.study.plan import Arm, BaseConfig, FromArm, PlanConfig, Run, cells, references
from saelab.study.tuning import FACTORS
from saelab.verdict.review import review

PLAN = "study = 'small'\nbase = 'configs/small.toml'\ntarget_l0 = 16\nlevels = []\nseeds = 2\n"
TABLE = """\
from saelab.launch.entry import main
from saelab.study.plan import Arm, Confirmation, Run

BASE = Arm("baseline")
RUNS = {
    "run_1": Run("Rates", [
        BASE,
        Arm("slow", {"train.lr": 1e-3}, "a quarter of the rate", primary=True),
        Arm("slower", {"train.lr": 5e-4}, "an eighth"),
    ]),
    "run_2": Run("Broken", [BASE, Arm("broken", {"train.lr": 1e9})]),
    "run_3": Run("Rates of their own", [BASE, Arm("half", {"train.lr": 2e-3})], tuned=True),
    "run_10": Confirmation("Confirmation", [BASE], leave=("control",)),
}

if __name__ == "__main__":
    main(RUNS, __file__)
"""


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Project:
    base = BASE.replace("16_384", "8_192")
    made = Project.make(tmp_path_factory.mktemp("confirm") / "p", plan=PLAN, base=base)
    made.write("experiment.py", TABLE)
    ended = cli(made.folder, "plan", "check")
    assert ended.code == 0 and "run_10: none of run_1, run_2, run_3 is finished" in ended.err
    ended = made.call("--out_dir=run_10")
    assert ended.code == 2 and "run one of them first" in ended.last
    for name in ("run_1", "run_2"):
        assert made.call(f"--out_dir={name}").code == 0
    return made


def test_the_best_arm_is_a_valid_one(project: Project) -> None:
    assert {c.arm for c in candidates(review(project.folder / "run_2"))} == set()
    found = {c.arm: c for c in candidates(review(project.folder / "run_1"))}
    assert set(found) == {"slow", "slower"}
    c = next(c for c in review(project.folder / "run_1").comparisons if c.arm == "slow")
    assert c.high is not None and found["slow"].worst == -c.high  # lower is better
    (checked,) = json.loads(cli(project.folder, "plan", "check", "run_10", "--json").out)
    best = max(found.values(), key=lambda candidate: candidate.worst).arm
    assert [arm["name"] for arm in checked["arms"]] == ["baseline", f"{best} (run_1)"]
    assert checked["purpose"] == "confirm"


def test_tuning_is_equal_and_its_seeds_are_its_own(project: Project, tmp_path: Path) -> None:
    shutil.copytree(project.folder, tmp_path / "p")
    tuned = Project(tmp_path / "p")
    ended = cli(tuned.folder, "tune", "run_10", "--json")
    assert ended.code == 0, ended.err
    found = json.loads(ended.out)
    assert read_json(tuned.folder / "tuned.json") == {"run_10": found}
    arms = {name: known for name, known in found.items() if isinstance(known, dict)}
    assert len(arms) == 2 and all(len(a["trials"]) == len(FACTORS) for a in arms.values())
    for known in arms.values():  # the best of its trials
        rate = min(known["trials"], key=lambda r: known["trials"][r])
        assert known["train.lr"] == pytest.approx(float(rate))
    trials = read_json(tuned.folder / ".saelab" / "tuning" / "run_10" / "manifest.json")
    assert set(trials["seeds"]) == set(study_seeds("small", "tune", 2))

    ended = tuned.call("--out_dir=run_10")
    assert ended.code == 0, ended.err
    info, manifest = tuned.info("run_10"), tuned.manifest("run_10")
    label = next(name for name in info if name.endswith("(run_1)"))
    assert list(info) == ["baseline", label, "baseline tuned", f"{label} tuned"]
    assert set(manifest["seeds"]) == set(study_seeds("small", "confirm", 2))
    by_arm = {c["arm"]: c for c in manifest["comparisons"]}
    last = by_arm[f"{label} tuned"]
    assert last["against"] == "baseline tuned" and not last["exploratory"]
    fvu = {name: info[name]["final_info_dict"]["fvu"] for name in info}
    pairs = zip(fvu[f"{label} tuned"], fvu["baseline tuned"], strict=True)
    assert last["mean_diff"] == pytest.approx(sum(a - b for a, b in pairs) / 2)
    assert info[f"{label} tuned"]["means"]["against"] == "baseline tuned"
    (again,) = json.loads(cli(tuned.folder, "verdict", "run_10", "--json").out)
    assert again["comparisons"] == manifest["comparisons"] and not again["exploratory"]
    assert f"{label} tuned - baseline tuned" in cli(tuned.folder, "verdict", "run_10").out
    assert [a["run"] for a in json.loads(cli(tuned.folder, "attempts", "--json").out)] == [
        *("run_1", "run_2", "run_10")
    ]


def test_an_arm_that_was_changed_or_taken_out_is_not_confirmed(
    project: Project, tmp_path: Path
) -> None:
    shutil.copytree(project.folder, tmp_path / "p")
    changed = Project(tmp_path / "p")
    (checked,) = json.loads(cli(changed.folder, "plan", "check", "run_10", "--json").out)
    best = checked["arms"][1]["name"].removesuffix(" (run_1)")
    old = {"slow": "1e-3", "slower": "5e-4"}[best]
    changed.replace("experiment.py", f'"train.lr": {old}', '"train.lr": 3e-3')
    ended = cli(changed.folder, "plan", "check", "run_10")
    assert ended.code == 2 and "was changed after run_1" in ended.last
    changed.replace("experiment.py", f'Arm("{best}"', 'Arm("renamed"')
    ended = cli(changed.folder, "plan", "check", "run_10")
    assert ended.code == 2 and "no longer in the run table" in ended.last


def test_what_an_arm_is_compared_with_is_checked() -> None:
    plan, base = PlanConfig(study="test"), BaseConfig()
    for against in ("basline", "a"):
        run = Run("x", [Arm("baseline"), Arm("a", {"train.lr": 1e-3}, against=against)])
        with pytest.raises(SettingError, match="is no other arm"):
            cells(plan, base, run)


def test_what_an_arm_waits_for_is_found_anywhere_in_its_changes() -> None:
    a, b = FromArm("x", "tau"), FromArm("y", "alpha", path=True)
    assert references({"p": [{"q": a}], "r": (b, 1), "s": 2}) == [a, b]


def test_a_tuned_run_trains_every_arm_at_its_best_rate(project: Project, tmp_path: Path) -> None:
    shutil.copytree(project.folder, tmp_path / "p")
    tuned = Project(tmp_path / "p")
    ended = tuned.call("--out_dir=run_3")
    assert ended.code == 2 and "run_3: learning rate of baseline = 'not tuned'" in ended.last
    assert "run `saelab tune run_3`" in ended.last and not (tuned.folder / "run_3").exists()
    (check,) = json.loads(cli(tuned.folder, "plan", "check", "run_3", "--json").out)
    assert [arm["name"] for arm in check["arms"]] == ["baseline", "half"]
    found = json.loads(cli(tuned.folder, "tune", "run_3", "--json").out)
    assert tuned.call("--out_dir=run_3").code == 0
    arms = RunFolder(tuned.folder / "run_3").required("arms")["arms"]
    for name in ("baseline", "half"):
        assert arms[name]["changes"] == {"train.lr": found[name]["train.lr"]}
        assert f"lr {found[name]['train.lr']:g} is the best of" in arms[name]["comment"]
    assert (tuned.info("run_3")["half"]["means"]["fvu"] or 0) > 0
