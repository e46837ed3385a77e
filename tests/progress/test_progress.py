"""metrics.jsonl, what is read from it, the view, and bars inside and outside a launch."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import time
from contextlib import nullcontext
from pathlib import Path

import pytest
from rich.console import Console

from saelab.errors import SettingError, SourceError, StudyFailure
from saelab.progress import bar, progress
from saelab.progress.journal import JOURNAL_FILE, Journal, Tail
from saelab.progress.run import launch_progress, log_cells, log_progress
from saelab.progress.state import State
from saelab.progress.view import view
from saelab.progress.watch import WatchedRun, watch
from saelab.runtime.system import process_start_time

ABOUT = {"run": "run_3", "title": "A run", "study": "small"}
CELL = {"arm": "baseline", "seed": 5, "level": 16.0, "step": 30, "steps": 120, "tokens": 3840}
TRAINING = {"stage": "train", **CELL, "rate": 1000.0, "values": {"loss": 0.25, "l0": 16.0}}
DONE = {"stage": "done", **CELL, "values": {"fvu": 0.125}, "failure": ""}


def read(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / JOURNAL_FILE).read_text().splitlines()]


def stages(folder: Path) -> list[str]:
    return [line["stage"] for line in read(folder)]


def shown(state: State, width: int = 120) -> str:
    console = Console(width=width, file=open(os.devnull, "w"), record=True)  # noqa: SIM115, PTH123
    console.print(view(state))
    return console.export_text()


def state_of(*lines: dict) -> State:
    state = State()
    for i, line in enumerate(lines):
        state.fold({"time": 100.0 + i, **line})
    return state


@pytest.mark.parametrize("width", [76, 80, 120, 200])
def test_no_column_is_cut(width: int) -> None:
    """Texts go on below on a narrow terminal; the width of a wide one is used."""
    long = {"arm": "baseline with a long name", "seed": 1_017_997_229}
    values = {"loss": 1234.5, "reconstruction": 0.00012345, "fvu": 0.23456, "l0": 32.123}
    cells = {"stage": "train and evaluate", "done": 1e6, "total": 2e6, "unit": "tokens"}
    text = shown(state_of(cells, TRAINING | long | {"values": values | {"dead": 0.1234}}), width)
    assert "…" not in text and max(map(len, text.splitlines())) <= width
    for number in ("1234", "0.0001234", "0.2346", "32.12", "0.1234"):
        assert number in text
    assert ("baseline with a long name  1017997229" in text) == (width >= 120)


# ---------------------------------------------------------------- journal


def test_a_number_that_is_not_finite_is_null(tmp_path: Path) -> None:
    journal = Journal(tmp_path / JOURNAL_FILE)
    journal.write({"values": {"loss": math.nan, "l0": math.inf, "dead": 0.5}, "more": [math.nan]})
    assert read(tmp_path) == [{"values": {"loss": None, "l0": None, "dead": 0.5}, "more": [None]}]


def test_a_reader_sees_each_line_at_once_and_only_once(tmp_path: Path) -> None:
    journal, tail = Journal(tmp_path / JOURNAL_FILE), Tail(tmp_path / JOURNAL_FILE)
    journal.write({"a": 1})
    assert list(tail.lines()) == [{"a": 1}]
    journal.write({"a": 2})
    journal.write({"a": 3})
    assert list(tail.lines()) == [{"a": 2}, {"a": 3}]
    assert list(tail.lines()) == []


def test_half_a_line_is_waited_for_and_one_that_stays_half_is_passed_over(tmp_path: Path) -> None:
    file = tmp_path / JOURNAL_FILE
    tail = Tail(file)
    file.write_bytes(b'{"a": 1}\n{"a"')
    assert list(tail.lines()) == [{"a": 1}]
    with file.open("ab") as more:
        more.write(b': 2}\n{"a": 3')
    assert list(tail.lines()) == [{"a": 2}]
    Journal(file).write({"a": 4})  # the next launch, after a kill
    assert list(tail.lines()) == [{"a": 4}]
    assert file.read_bytes().endswith(b'{"a": 3\n{"a": 4}\n')


# ---------------------------------------------------------------- launch


def test_bars_inside_a_launch_are_its_stages(tmp_path: Path, capsys) -> None:
    folder = tmp_path / "run_3"
    with launch_progress(folder, ABOUT) as run:
        with progress("harvest", 10, "tokens") as shown_bar:
            shown_bar.advance(4)
            assert run.state.stages["harvest"].share == 0.4
        assert not run.state.stages
        log_cells(2, 1)
        log_progress(TRAINING)
    assert stages(folder) == ["launch", "harvest", "harvest", "cells", "train", "end"]
    first, *_, last = read(folder)
    assert (first["run"], first["pid"], last["outcome"]) == ("run_3", os.getpid(), "complete")
    assert read(folder)[2] | {"time": 0, "seconds": 0} == {
        **{"time": 0, "stage": "harvest", "done": 4.0, "total": 10.0, "unit": "tokens"},
        **{"seconds": 0, "ended": True},
    }
    log_progress(TRAINING)  # of no launch
    assert len(read(folder)) == 6
    assert capsys.readouterr().err == ""  # too short for a plain line


def test_plain_lines_are_those_of_a_bar_without_a_launch(
    tmp_path: Path, capsys, monkeypatch
) -> None:
    monkeypatch.setattr(bar, "PLAIN_INTERVAL", 0.0)
    monkeypatch.delenv("SAELAB_PROGRESS", raising=False)
    said = []
    for inside in (False, True):
        launch = launch_progress(tmp_path / "a", ABOUT) if inside else nullcontext()
        with launch, progress("run_3: train", 200, "tokens") as one:
            one.start -= 10
            one.advance(100)
        said.append(capsys.readouterr().err)
    assert said[0] == said[1] == "run_3: train:  50%  100/200 tokens  10/s  0:10 left\n"


def test_switched_off_shows_nothing_and_writes_all_the_same(
    tmp_path: Path, capsys, monkeypatch
) -> None:
    monkeypatch.setattr(bar, "PLAIN_INTERVAL", 0.0)
    monkeypatch.setenv("SAELAB_PROGRESS", "off")
    with launch_progress(tmp_path, ABOUT), progress("harvest", 10) as one:
        one.advance(5)
    assert capsys.readouterr().err == ""
    assert stages(tmp_path) == ["launch", "harvest", "harvest", "end"]


@pytest.mark.parametrize(
    ("error", "outcome", "reason"),
    [
        (StudyFailure("no baseline"), "failed", "no baseline"),
        (KeyboardInterrupt(), "interrupted", ""),
        (ValueError("a\nb"), "failed", "b"),
    ],
)
def test_the_last_line_says_how_it_ended(
    tmp_path: Path, error: BaseException, outcome: str, reason: str
) -> None:
    with pytest.raises(type(error)), launch_progress(tmp_path, ABOUT):
        log_cells(1, 0)
        raise error
    last = read(tmp_path)[-1]
    assert (last["stage"], last["outcome"], last["reason"]) == ("end", outcome, reason)


def test_a_refused_launch_leaves_no_folder_but_keeps_one_that_was_there(tmp_path: Path) -> None:
    folder = tmp_path / "run_3"
    for early in (True, False):
        with pytest.raises(SourceError), launch_progress(folder, ABOUT):
            if not early:
                log_cells(1, 0)
            raise SourceError("no texts")
        assert not folder.exists()
    with pytest.raises(ValueError), launch_progress(folder, ABOUT):
        log_cells(1, 0)
        raise ValueError
    with pytest.raises(SourceError), launch_progress(folder, ABOUT):
        log_cells(1, 0)
        raise SourceError("no texts")
    assert stages(folder) == ["launch", "cells", "end"] * 2


def test_a_journal_that_can_not_be_written_stops_nothing(tmp_path: Path, capsys) -> None:
    (tmp_path / "file").write_text("no folder")
    with launch_progress(tmp_path / "file" / "run_3", ABOUT) as run:
        log_progress(TRAINING)
        log_progress(DONE)
    assert run.state.finished[0].values == {"fvu": 0.125}
    assert capsys.readouterr().err.count("the run goes on without it") == 1


def test_the_same_command_again_appends(tmp_path: Path) -> None:
    for _ in range(2):
        with launch_progress(tmp_path, ABOUT):
            log_cells(1, 0)
    assert stages(tmp_path) == ["launch", "cells", "end"] * 2


# ---------------------------------------------------------------- state


def test_cells_are_counted_over_both_waves_and_controls_are_not() -> None:
    launch_line = {"stage": "launch", **ABOUT, "pid": 1}
    control = DONE | {"arm": "control:PCA"}
    other = DONE | {"arm": "rate", "failure": "not finite"}
    state = state_of(
        launch_line, {"stage": "cells", "open": 2, "cached": 1}, TRAINING, DONE, control, other
    )
    assert (state.done, state.total, state.failed, state.cells) == (3, 3, 1, {})
    state.fold({"time": 200.0, "stage": "cells", "open": 1, "cached": 3})
    assert (state.done, state.total) == (3, 4)
    state.fold({"time": 201.0, **launch_line})
    assert (state.done, state.total, state.finished, state.began) == (0, 0, [], 201.0)


def test_rate_and_time_left() -> None:
    stage = {"stage": "train and evaluate", "done": 30.0, "total": 120.0, "seconds": 10.0}
    state = state_of(TRAINING, TRAINING | {"seed": 6}, stage)
    assert (state.rate, state.left) == (2000.0, 30.0)
    state.fold({"time": 1.0, **TRAINING, "stage": "evaluate", "rate": None})
    assert state.rate == 1000.0


@pytest.mark.parametrize("line", [{}, {"stage": "train", "arm": "a"}, {"stage": "x", "done": "y"}])
def test_a_line_that_can_not_be_read_changes_nothing(line: dict) -> None:
    state = state_of(TRAINING)
    before = state.as_dict()
    state.fold({"time": 999.0, **line})
    assert state.as_dict() == before


# ---------------------------------------------------------------- view


def test_the_view_is_a_dozen_rows_at_most() -> None:
    cells = [TRAINING | {"seed": i} for i in range(20)]
    done = [DONE | {"seed": i} for i in range(40, 60)]
    bars = [{"stage": f"s{i}", "done": 1, "total": 4, "unit": "tokens"} for i in range(4)]
    launch_line = {"stage": "launch", **ABOUT}
    state = state_of(launch_line, {"stage": "cells", "open": 60, "cached": 2}, *cells, *done, *bars)
    text = shown(state)
    assert len(text.rstrip().splitlines()) <= 12
    for words in ("run_3", "22/62 cells", "20,000 tokens/s", "25%", "train 25%", "0.25", "0.125"):
        assert words in text
    assert "and 15 more" in text


# ---------------------------------------------------------------- watch


def of_dead_process(folder: Path, *lines: dict) -> Path:
    """A journal as a killed launch leaves it: its process has ended."""
    process = subprocess.Popen([sys.executable, "-c", "pass"])
    pid, started = process.pid, process_start_time(process.pid)
    process.wait()
    journal, host = Journal(folder / JOURNAL_FILE), os.uname().nodename
    me = {"pid": pid, "host": host, "started": started or "1"}
    for line in ({"stage": "launch", **ABOUT, **me}, *lines):
        journal.write({"time": time.time(), **line})
    return folder


def test_a_run_that_does_not_exist_or_writes_none(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="run_9 does not exist"):
        watch(tmp_path / "run_9")
    with pytest.raises(SourceError, match=JOURNAL_FILE):
        watch(tmp_path)


def test_a_process_that_has_died_is_told(tmp_path: Path, capsys) -> None:
    folder = of_dead_process(tmp_path / "run_3", TRAINING)
    with (folder / JOURNAL_FILE).open("ab") as file:
        file.write(b'{"stage": "tra')  # torn
    with pytest.raises(StudyFailure, match="its process .* has ended without finishing"):
        watch(folder)
    assert "baseline/seed 5/L0 16: train 30/120  loss 0.25  l0 16" in capsys.readouterr().out


def test_a_finished_run_shows_its_last_state(tmp_path: Path, capsys) -> None:
    folder = tmp_path / "run_3"
    with launch_progress(folder, ABOUT):
        log_cells(1, 0)
        log_progress(DONE)
    watch(folder)
    assert "run_3: 1/1 cells" in capsys.readouterr().out
    watched = WatchedRun(folder)
    found = watched.as_dict(watched.update())
    assert (found["outcome"], found["cells"]["done"]) == ("complete", 1)
    assert found["finished"][0]["values"] == {"fvu": 0.125}


def test_killed_after_its_last_file_is_complete_and_before_it_is_not(tmp_path: Path) -> None:
    folder = of_dead_process(tmp_path / "run_3", DONE)
    final = folder / "final_info.json"
    final.write_text("{}")
    assert WatchedRun(folder).update() == "complete"
    os.utime(final, (1.0, 1.0))  # of a run that was being replaced
    assert WatchedRun(folder).update() == "died"


def test_a_run_that_goes_on_is_followed_until_its_folder_is_gone(tmp_path: Path) -> None:
    folder = tmp_path / "run_3"
    with pytest.raises(SourceError), launch_progress(folder, ABOUT):
        log_cells(2, 0)
        watched = WatchedRun(folder)
        assert (watched.update(), watched.state.total) == ("", 2)
        log_progress(TRAINING)
        assert (watched.update(), len(watched.state.cells)) == ("", 1)
        raise SourceError("no texts")
    assert watched.update() == "gone"


def test_an_unknown_tracker_is_refused_with_the_nearest(tmp_path: Path) -> None:
    with (
        pytest.raises(SettingError, match="did you mean 'wandb'"),
        launch_progress(tmp_path, ABOUT, "wanbd"),
    ):
        pass
