"""The plan as first registered, its deviations, and the ledger of attempts."""

from __future__ import annotations

import json
import multiprocessing
import os
import resource
import signal
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from saelab.errors import DamageError, SettingError, StudyFailure
from saelab.storage.atomic import WriteError
from saelab.study.plan import Arm, BaseConfig, Confirmation, FromArm, PlanConfig, Run
from saelab.study.registry import attempt, attempts, deviations, plan_hash, register

PLAN = PlanConfig(study="test")


def test_the_first_plan_is_kept_and_later_ones_are_compared_with_it(tmp_path: Path) -> None:
    assert deviations(tmp_path, PLAN.patched({"seeds": 3})) == ()
    assert register(tmp_path, PLAN) == ()
    changed = PLAN.patched({"seeds": 4, "primary": "mse"})
    for _ in range(2):  # the first one stays
        assert register(tmp_path, changed) == ('primary: "fvu" -> "mse"', "seeds: 8 -> 4")
    assert register(tmp_path, PLAN) == ()


@pytest.mark.parametrize(
    "change",
    [
        {"study": "other"},
        {"primary": "mse"},
        {"direction": "higher"},
        {"sesoi": 0.01},
        {"family": 9},
        {"seeds": 5},
        {"seeds_other": 5},
        {"target_l0": 16},
        {"exclusions": ("cells on the old text",)},
        {"alpha": 0.01},
    ],
)
def test_the_hash_covers_what_decides_a_verdict(change: dict) -> None:
    assert plan_hash(PLAN.patched(change)) != plan_hash(PLAN)


def test_the_hash_does_not_cover_the_place_of_the_base() -> None:
    assert plan_hash(PLAN.patched({"base": "elsewhere.toml"})) == plan_hash(PLAN)


def test_the_ledger_says_how_each_attempt_ended(tmp_path: Path) -> None:
    with attempt(tmp_path, "run_1") as number:
        assert number == 1 and attempts(tmp_path)[0].outcome == "no end"
    errors = {
        "refused": SettingError("lr", -1, "must be positive"),
        "failed": StudyFailure("no valid baseline"),
        "interrupted": KeyboardInterrupt(),
    }
    for error in [*errors.values(), ZeroDivisionError("division by zero")]:
        with pytest.raises(type(error)), attempt(tmp_path, "run_2"):
            raise error
    found = attempts(tmp_path)
    assert [a.number for a in found] == [1, 2, 3, 4, 5]
    assert [a.run for a in found] == ["run_1", *["run_2"] * 4]
    assert [a.outcome for a in found] == ["complete", *errors, "failed"]
    assert found[1].reason == "lr = -1: must be positive"
    assert found[4].reason == "ZeroDivisionError: division by zero"
    assert all(a.seconds is not None and a.seconds >= 0 for a in found)
    assert "refused" in found[1].line() and "must be positive" in found[1].line()


def test_the_ledger_names_no_place_of_the_disk(tmp_path: Path) -> None:
    """Its reasons stand in summaries and reports, which are shared."""
    error = StudyFailure(f"see {tmp_path}/.saelab/logs, and {Path.home()}/texts is missing")
    with pytest.raises(StudyFailure), attempt(tmp_path, "run_1"):
        raise error
    (one,) = attempts(tmp_path)
    assert one.reason == "see .saelab/logs, and ~/texts is missing"


def killed(folder: Path) -> None:
    with attempt(folder, "run_3"):
        os.kill(os.getpid(), signal.SIGKILL)


def test_a_killed_attempt_has_no_end_and_the_next_one_its_own_number(tmp_path: Path) -> None:
    process = multiprocessing.get_context("fork").Process(target=killed, args=(tmp_path,))
    process.start()
    process.join()
    with attempt(tmp_path, "run_3") as number:
        assert number == 2
    assert [(a.outcome, a.seconds is None) for a in attempts(tmp_path)] == [
        ("no end", True),
        ("complete", False),
    ]


def test_attempts_that_start_together_have_numbers_of_their_own(tmp_path: Path) -> None:
    def start(i: int) -> int:
        with attempt(tmp_path, f"run_{i}") as number:
            return number

    with ThreadPoolExecutor(8) as pool:
        numbers = list(pool.map(start, range(24)))
    assert sorted(numbers) == list(range(1, 25))
    runs = {one.number: one.run for one in attempts(tmp_path)}
    assert runs == {number: f"run_{i}" for i, number in enumerate(numbers)}


def test_a_full_disk_leaves_no_half_line(tmp_path: Path) -> None:
    """The ledger is read by the next launch, which must go on once there is room."""
    with attempt(tmp_path, "run_1"):
        pass
    whole = (tmp_path / ".saelab" / "attempts.jsonl").read_bytes()
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(whole) + 20, before[1]))
    try:
        with pytest.raises(WriteError, match="the disk is full"), attempt(tmp_path, "run_2"):
            pass
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert (tmp_path / ".saelab" / "attempts.jsonl").read_bytes() == whole
    with attempt(tmp_path, "run_2") as number:
        assert number == 2


def test_no_ledger_is_no_attempt_and_a_damaged_one_is_told(tmp_path: Path) -> None:
    assert attempts(tmp_path) == []
    with attempt(tmp_path, "run_1"):
        pass
    with (tmp_path / ".saelab" / "attempts.jsonl").open("a") as file:
        file.write('{"end": 7, "outcome": "complete"}\n')
    with pytest.raises(DamageError, match=r"attempts.jsonl:3 is damaged"):
        attempts(tmp_path)


@pytest.mark.parametrize("torn", [b'{"end": 2, "outc', b'{"start": 3', b"\0" * 40, b"\xff"])
def test_a_line_cut_short_by_a_loss_of_power_is_none(tmp_path: Path, torn: bytes) -> None:
    file = tmp_path / ".saelab" / "attempts.jsonl"
    for run in ("run_1", "run_2"):
        with attempt(tmp_path, run):
            pass
    whole = file.read_bytes()
    file.write_bytes(whole[: whole.rindex(b"{")] + torn)
    assert [a.outcome for a in attempts(tmp_path)] == ["complete", "no end"]
    with attempt(tmp_path, "run_3") as number:
        assert number == 3
    assert [a.outcome for a in attempts(tmp_path)] == ["complete", "no end", "complete"]
    assert all(map(json.loads, file.read_text().splitlines()))


def test_a_whole_last_line_counts_without_its_end(tmp_path: Path) -> None:
    """As an editor leaves it."""
    file = tmp_path / ".saelab" / "attempts.jsonl"
    for run in ("run_1", "run_2"):
        with attempt(tmp_path, run) as number:
            pass
        file.write_bytes(file.read_bytes().removesuffix(b"\n"))
        assert len(attempts(tmp_path)) == number
    assert [a.outcome for a in attempts(tmp_path)] == ["complete"] * 2


def test_a_broken_line_in_the_middle_is_refused(tmp_path: Path) -> None:
    file = tmp_path / ".saelab" / "attempts.jsonl"
    for run in ("run_1", "run_2"):
        with attempt(tmp_path, run):
            pass
    first, _, *rest = file.read_bytes().splitlines(keepends=True)
    for broken in (b'{"end": 1, "outc\n', b"\n"):
        file.write_bytes(b"".join([first, broken, *rest]))
        with pytest.raises(DamageError, match=r"attempts.jsonl:2 is damaged"):
            attempts(tmp_path)


def test_a_plan_cut_short_is_told_with_what_deleting_it_means(tmp_path: Path) -> None:
    file, longer = tmp_path / ".saelab" / "plan.json", PLAN.patched({"seeds": PLAN.seeds + 1})
    register(tmp_path, PLAN)
    file.write_bytes(file.read_bytes()[:40])
    with pytest.raises(DamageError, match=r"take it from a copy.*registers the plan anew"):
        register(tmp_path, longer)
    file.unlink()  # and so it is
    assert register(tmp_path, longer) == () and deviations(tmp_path, PLAN)
    assert json.loads(file.read_text())["hash"] == plan_hash(longer)


BASE = BaseConfig()
LATE = Arm("late", {"train.lr": FromArm("a", "b")})
ARMS = [Arm("baseline"), Arm("rate", {"train.lr": 2e-3}), LATE]
RUNS = {"run_1": Run("first", ARMS), "run_10": Confirmation("last", [Arm("baseline")])}


def test_base_settings_and_run_table_are_registered_too(tmp_path: Path) -> None:
    assert register(tmp_path, PLAN, BASE, RUNS) == ()
    assert register(tmp_path, PLAN, BASE, RUNS) == ()
    faster = BASE.patched({"train.lr": 0.5, "train.tokens": 4096, "tracker": "tensorboard"})
    tokens, rate = BASE.train.tokens, BASE.train.lr
    lines = register(tmp_path, PLAN.patched({"seeds": 4}), faster, RUNS)
    assert lines[0] == "seeds: 8 -> 4"
    assert set(lines[1:]) == {
        f"base.train.tokens: {tokens} -> 4096",
        f"base.train.lr: {rate} -> 0.5",
    }


def test_changed_arms_and_runs_are_deviations(tmp_path: Path) -> None:
    register(tmp_path, PLAN, BASE, RUNS)
    changed = [Arm("baseline", comment="other words"), Arm("rate", {"train.lr": 3e-3}), Arm("new")]
    table = {"run_1": Run("another title", changed), "run_2": Run("more", ARMS)}
    assert deviations(tmp_path, PLAN, BASE, table) == (
        "added after registration: run_2",
        "no longer in the run table: run_10",
        "run_1: arm 'rate' changed",
        "run_1: arm 'late' removed",
        "run_1: arm 'new' added after registration",
    )
    whole = {"run_1": Run("first", ARMS, {"layout": "contexts"}), "run_10": RUNS["run_10"]}
    (text,) = deviations(tmp_path, PLAN, BASE, whole)
    assert text == 'run_1.changes.layout: "none" -> "contexts"'
    other = RUNS | {"run_10": Confirmation("last", [Arm("baseline")], leave=("rate",))}
    assert deviations(tmp_path, PLAN, BASE, other) == ('run_10.leave: [] -> ["rate"]',)


def test_what_an_older_file_lacks_is_no_deviation_and_is_registered_then(tmp_path: Path) -> None:
    register(tmp_path, PLAN)
    file = tmp_path / ".saelab" / "plan.json"
    old = {name: json.loads(file.read_text())[name] for name in ("hash", "plan", "at")}
    file.write_text(json.dumps(old))
    assert deviations(tmp_path, PLAN, BASE.patched({"train.lr": 0.5}), RUNS) == ()
    assert register(tmp_path, PLAN, BASE, RUNS) == ()
    assert deviations(tmp_path, PLAN, BASE.patched({"train.lr": 0.5}), RUNS) != ()
    assert json.loads(file.read_text())["at"] == old["at"]


def test_a_registered_base_that_was_edited_is_refused(tmp_path: Path) -> None:
    register(tmp_path, PLAN, BASE, RUNS)
    file = tmp_path / ".saelab" / "plan.json"
    stored = json.loads(file.read_text())
    stored["base"]["train"]["lr"] = 0.5
    file.write_text(json.dumps(stored))
    with pytest.raises(DamageError, match="was changed after it was written"):
        deviations(tmp_path, PLAN, BASE, RUNS)
