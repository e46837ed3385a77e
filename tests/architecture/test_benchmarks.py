"""The benchmarks' arithmetic: ratios are paired within turns, tables say what is so."""

from __future__ import annotations

import importlib.util
import json
import re
import sys
from argparse import Namespace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from saelab.errors import SettingError

FILE = Path(__file__).parents[2] / "benchmarks" / "common.py"


def load(name: str, file: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, file)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def common() -> Any:
    yield load("benchmarks_common", FILE)
    del sys.modules["benchmarks_common"]


@pytest.fixture
def time_shares(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(FILE.parent)
    yield load("benchmarks_time_shares", FILE.with_name("time_shares.py"))
    del sys.modules["benchmarks_time_shares"], sys.modules["common"]


def contestant(common: ModuleType, name: str, side: str, scale: float) -> Any:
    """Its k-th step takes `scale` * (k + 1) seconds."""
    count = iter(range(1000))
    return common.Contestant(name, lambda n: [scale * (next(count) + 1) for _ in range(n)], side)


def test_quartiles(common: Any) -> None:
    assert common.quartiles([4, 1, 3, 2, 5]) == (2, 3, 4)


def test_ratio_is_paired_within_turns(common: Any) -> None:
    slow, fast = [[2.0, 4.0, 2.0], [200.0], [3.0]], [[1.0, 1.0, 9.0], [100.0], [1.0]]
    found = common.ratio(slow, fast)
    assert (found.value, found.low, found.high) == (2.0, 2.0, 2.5)


def test_turns_drop_warm_up_and_settling(common: Any) -> None:
    a, b = contestant(common, "a", "ours", 1), contestant(common, "b", "peer", 3)
    common.alternate([a, b], turns=2, steps=2, settle=1)
    assert a.turns == [[5, 6], [8, 9]]
    assert common.ratio(b.turns, a.turns).value == 3
    assert common.fastest([a, b]) is b
    assert common.fastest([a]) is None


@pytest.mark.parametrize(("wanted", "at_least", "met"), [(2, True, True), (2, False, False)])
def test_target(common: Any, wanted: float, at_least: bool, met: bool) -> None:
    target = common.Target("x", 3.0, wanted, at_least)
    assert target.met is met
    assert ("MISSED" in str(target)) is not met


def test_table_is_aligned(common: Any) -> None:
    lines = common.table(["name", "ms"], [["a", "1.5"], ["long name", "12.25"]]).splitlines()
    assert lines[0] == "name          ms"
    assert lines[2] == "a            1.5"
    assert {len(line) for line in lines} == {len("long name  12.25")}


def test_timing_table(common: Any) -> None:
    ours, limit = common.Contestant("ours", list), common.Contestant("gemm", list, work=10)
    ours.turns, limit.turns = [[0.2], [0.2]], [[0.1], [0.1]]
    text = common.timing_table([limit, ours], ours, limit)
    assert text.splitlines()[2].split() == ["gemm", "100", "100-100", "100", "0.50", "1.00"]
    assert text.splitlines()[3].split() == ["ours", "200", "200-200", "1.00", "2.00"]


def test_the_limit_is_the_fastest_gemm_of_the_machine(common: Any) -> None:
    emulated, plain = common.Contestant("bfloat16", list), common.Contestant("float32", list)
    emulated.turns, plain.turns = [[3.9], [0.31]], [[0.3], [0.3]]
    assert common.fastest_of([emulated, plain]) is plain
    plain.turns = [[4.0], [4.0]]
    assert common.fastest_of([emulated, plain]) is emulated


def test_the_processor_is_printed_first(common: Any, capsys: pytest.CaptureFixture[str]) -> None:
    common.run(lambda: print("the table"))
    first, second = capsys.readouterr().out.splitlines()
    assert first.startswith("processor: ") and "cores; features: " in first
    assert second == "the table"


def test_raw_numbers_are_written_without_places(common: Any, tmp_path: Path) -> None:
    a = contestant(common, "a", "ours", 1)
    common.alternate([a], turns=3, steps=1)
    target = common.Target("x", 3.0, 2.0)
    section = common.Section("title", "text", [a.plain()], [target])
    options = Namespace(quick=True, threads=1, peers="/somewhere", results=tmp_path, shape=None)
    common.save("demo", options, [section], None)
    text = (tmp_path / "demo-quick.json").read_text(encoding="utf-8")
    record = json.loads(text)
    assert record["command"] == "python benchmarks/demo.py --quick --threads 1"
    assert record["sections"][0]["rows"][0]["turns_s"] == [[2], [3], [4]]
    assert record["sections"][0]["targets"][0]["met"] is True
    assert record["machine"]["cores"] and record["versions"]["ours"]["torch"]
    assert "somewhere" not in text


def test_peers_that_are_not_there(common: Any, tmp_path: Path) -> None:
    with pytest.raises(SettingError, match="make peers"):
        common.Peers(tmp_path, 1)


def test_a_sample_belongs_to_the_first_stage_that_a_frame_names(time_shares: Any) -> None:
    worker = "process 7;run (saelab/launch/worker.py:130)"
    stacks = [
        f"{worker};train (saelab/training/loop.py:240);_step (saelab/training/loop.py:170) 5",
        f"{worker};evaluate (saelab/evals/measure.py:80);rows (saelab/evals/probing/probes.py:9) 3",
        "process 9;main (experiment.py:3);<module> (<frozen importlib._bootstrap>:1) 2",
        "process 9;rows (saelab/launch/controls.py:3);codes (saelab/evals/core.py:3) 1",
        "process 9;elsewhere (a.py:1) 4",
    ]
    found = time_shares.count_stages("\n".join(stacks))
    assert found == {"steps": 5, "probing": 3, "imports": 2, "controls": 1, "elsewhere": 4}


def test_stages_name_files_that_exist(time_shares: Any) -> None:
    root, named = FILE.parents[1] / "saelab", set()
    for pattern in (p for patterns in time_shares.STAGES.values() for p in patterns):
        named |= {part for part in re.findall(r"[a-z_]+(?:/[a-z_]+)+(?:\\\.py|/)", pattern)}
    places = {name.replace("\\", "").removeprefix("saelab/") for name in named}
    assert len(places) > 12
    assert not [place for place in places if not (root / place).exists()]
