"""The benchmarks' arithmetic: ratios are paired within turns, tables say what is so."""

from __future__ import annotations

import importlib.util
import json
import sys
from argparse import Namespace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from saelab.errors import SettingError

FILE = Path(__file__).parents[2] / "benchmarks" / "common.py"


@pytest.fixture(scope="module")
def common() -> Any:
    spec = importlib.util.spec_from_file_location("benchmarks_common", FILE)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    yield module
    del sys.modules[spec.name]


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
