"""The number of cores: what this process may run on, and its container's quota."""

from __future__ import annotations

import math
import os
from pathlib import Path

import pytest

from saelab.launch.executors.local import worker_count
from saelab.runtime import cores

V2, V1 = "0::/job/step\n", "5:cpu,cpuacct:/job\n4:memory:/job\n"


def groups(folder: Path, memberships: str, files: dict[str, str] | None = None) -> float:
    """The quota where the control groups have these files."""
    for name, text in (files or {}).items():
        file = folder / "groups" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    (folder / "memberships").write_text(memberships)
    return cores.core_quota(folder / "groups", folder / "memberships")


def test_version_2(tmp_path: Path) -> None:
    assert groups(tmp_path, V2, {"job/step/cpu.max": "max 100000\n"}) == math.inf
    assert groups(tmp_path, V2, {"job/cpu.max": "150000 100000\n"}) == 1.5  # a group above counts
    assert groups(tmp_path, V2, {"cpu.max": "50000 100000\n"}) == 0.5


def test_version_1(tmp_path: Path) -> None:
    period, quota = "cpu/job/cpu.cfs_period_us", "cpu/job/cpu.cfs_quota_us"
    assert groups(tmp_path, V1, {period: "100000\n", quota: "-1\n"}) == math.inf
    assert groups(tmp_path, V1, {quota: "400000\n"}) == 4


@pytest.mark.parametrize("text", ["", "nonsense", "0::", "5:cpu:/\n", "0::/../..\n", "::::\n"])
def test_what_is_no_quota_limits_nothing(text: str, tmp_path: Path) -> None:
    assert groups(tmp_path, text) == math.inf
    assert groups(tmp_path, text, {"cpu.max": "five of ten\n"}) == math.inf
    assert groups(tmp_path, text, {"cpu.max": "100000 0\n"}) == math.inf
    assert cores.core_quota(tmp_path, tmp_path / "missing") == math.inf


@pytest.mark.parametrize(("quota", "expected"), [(0.2, 1), (1.0, 1), (1.5, 2), (math.inf, 3)])
def test_cores(quota: float, expected: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: {0, 1, 5}, raising=False)
    monkeypatch.setattr(cores, "core_quota", lambda: quota)
    monkeypatch.delenv("SAELAB_WORKERS", raising=False)
    assert cores.usable_cores() == expected
    assert worker_count("cpu") == expected and worker_count("cuda") == 1
