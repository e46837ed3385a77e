"""Damage done to a finished run and to its cache: named, made again, never a wrong number."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from projects import BASELINE, RATE, Project, called, cli

from saelab.runs.folder import RunFolder

PLAN = "study = 'small'\nbase = 'configs/small.toml'\ntarget_l0 = 16\nlevels = []\nseeds = 2\n"


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Project:
    project = Project.make(
        tmp_path_factory.mktemp("damage") / "project", (BASELINE, RATE), plan=PLAN
    )
    for old, new in {"tokens = 8_192": "tokens = 2_048", "d_sae = 256": "d_sae = 64"}.items():
        project.replace("configs/small.toml", old, new)
    ended = project.call()
    assert ended.code == 0, ended.err
    return project


def flip(file: Path, at: float = 0.5) -> None:
    """One bit of one byte, in the middle or elsewhere."""
    content = bytearray(file.read_bytes())
    content[int(at * (len(content) - 1))] ^= 1
    file.unlink()  # files of a run may be hard links into the cache
    file.write_bytes(content)


def one_digit(file: Path) -> None:
    """Another digit in a number, so that the file is as readable as before."""
    text = file.read_text()
    found = re.search(r"(?<=0\.\d)\d", text)
    assert found
    i = found.start()
    file.write_text(text[:i] + str((int(text[i]) + 1) % 10) + text[i + 1 :])
    json.loads(file.read_text())


def other_value(file: Path) -> None:
    """A number in a table changed by hand, which is then written as any table is."""
    table = pq.read_table(file)
    values = [None if v is None else v + 0.01 for v in table["value"].to_pylist()]
    at = table.schema.get_field_index("value")
    pq.write_table(table.set_column(at, "value", pa.array(values, pa.float64())), file)


HARMS: dict[str, tuple[str, Callable[[Path], None]]] = {
    "a digit of final_info.json": ("final_info.json", one_digit),
    "a bit of metrics.parquet": ("metrics.parquet", flip),
    "a value of metrics.parquet": ("metrics.parquet", other_value),
    "a bit of manifest.json": ("manifest.json", flip),
    "a digit of manifest.json": ("manifest.json", one_digit),
    "an empty manifest.json": ("manifest.json", lambda file: file.write_bytes(b"") and None),
}


@pytest.mark.parametrize("harm", HARMS)
def test_a_damaged_run_is_named_by_all_that_read_it(
    tmp_path: Path, finished: Project, harm: str
) -> None:
    name, damage = HARMS[harm]
    project = finished.copied(tmp_path / "project")
    damage(project.folder / "run_1" / name)
    ends = [
        cli(project.folder, "verdict", "run_1"),
        cli(project.folder, "saebench", "run_1", "--out", "result.json"),
        called(project.folder, _draw),
    ]
    if name != "manifest.json":
        ends.append(cli(project.folder, "difference", "run_1", "rate", "baseline"))
    if name != "final_info.json":  # of which the table of probing takes nothing
        ends.append(cli(project.folder, "probing", "run_1"))
    for ended in ends[:1] + ends[2:]:
        assert ended.code == 1 and name in ended.last, ended.err
        assert "again" in ended.last and "Traceback" not in ended.err
    if name != "final_info.json":  # which SAEBench's file is not made of
        assert ends[1].code == 1 and name in ends[1].last
    assert not list(project.folder.glob("run_1_*.png"))


@pytest.mark.parametrize(
    "name, command",
    [
        ("documents.parquet", ("verdict", "run_1")),
        ("gate.json", ("report", "run_1")),
        ("metrics.parquet", ("eval", "run_1", "--arm", "baseline", "--evals", "core")),
    ],
)
def test_a_missing_file_is_named_where_another_answer_would_be_given_without_it(
    tmp_path: Path, finished: Project, name: str, command: tuple[str, ...]
) -> None:
    project = finished.copied(tmp_path / "project")
    (project.folder / "run_1" / name).unlink()
    ended = cli(project.folder, *command)
    assert ended.code == 1 and f"{name} is missing" in ended.last, ended.err


@pytest.mark.parametrize("name", ["gate.json", "cells/baseline/*/latents.parquet"])
def test_a_report_is_made_of_intact_files_alone(
    tmp_path: Path, finished: Project, name: str
) -> None:
    project = finished.copied(tmp_path / "project")
    for file in (project.folder / "run_1").glob(name):
        (one_digit if file.suffix == ".json" else flip)(file)
    ended = cli(project.folder, "report", "run_1")
    assert ended.code == 1 and "was changed after the run wrote it" in ended.last, ended.err
    assert "Traceback" not in ended.err


def _draw() -> None:
    from saelab.report.figures.common import draw

    draw({"run_1": "A run"})


def test_a_copied_moved_or_partly_copied_run_is_as_good(tmp_path: Path, finished: Project) -> None:
    """As an autonomous driver does it."""
    shutil.copytree(finished.folder / "run_1", tmp_path / "elsewhere" / "run_7")
    assert cli(tmp_path / "elsewhere", "verdict", "run_7").code == 0
    few = tmp_path / "few" / "run_1"
    few.mkdir(parents=True)
    for name in ("final_info.json", "manifest.json"):
        shutil.copy(finished.folder / "run_1" / name, few)
    assert RunFolder(few).info and RunFolder(few).sealed
    alone = tmp_path / "alone" / "run_1"
    alone.mkdir(parents=True)
    shutil.copy(finished.folder / "run_1" / "final_info.json", alone)
    ended = called(alone.parent, _draw)
    assert ended.code == 0, ended.err


def test_a_run_without_checksums_says_so(tmp_path: Path, finished: Project) -> None:
    project = finished.copied(tmp_path / "project")
    file = project.folder / "run_1" / "manifest.json"
    data = json.loads(file.read_text())
    del data["digest"]
    file.write_text(json.dumps(data))
    ended = cli(project.folder, "verdict", "run_1")
    assert ended.code == 1 and "manifest.json was changed after" in ended.last
    del data["sha256"]
    file.write_text(json.dumps(data))
    ended = cli(project.folder, "verdict", "run_1")
    assert ended.code == 0 and "carry no checksums" in ended.out
    assert "carry no checksums" not in cli(finished.folder, "verdict", "run_1").out


def test_a_damaged_cache_is_told_and_made_again(tmp_path: Path, finished: Project) -> None:
    """One damage of each kind, each in a cell or a pair of its own where there are enough."""
    project = finished.copied(tmp_path / "project")
    cache = project.folder / ".saelab"
    cells = sorted(file.parent for file in cache.glob("cells/*/sae.safetensors"))
    harmed = [
        cells[0] / "cell.json",
        cells[1] / "curves.parquet",
        cells[2] / "sae.safetensors",
        cells[3] / "latents.parquet",
        next(f for f in sorted(cache.glob("cells/*/cell.json")) if f.parent not in cells),
        sorted(cache.glob("pairs/*.json"))[0],
        sorted(cache.glob("activations/*/*/header.json"))[0],
    ]
    for file in harmed:
        (one_digit if file.name == "cell.json" else flip)(file)
    ended = project.again()
    assert ended.code == 0, ended.err
    for file in harmed:
        assert str(Path(*file.parts[-2:])) in ended.err, (file, ended.err)
    assert "Traceback" not in ended.err
    assert project.info() == finished.info() and project.weights() == finished.weights()
    again = project.again()
    assert "damaged" not in again.err and "changed after" not in again.err
    assert "to train" not in again.err


def test_a_cut_cell_is_trained_again(tmp_path: Path, finished: Project) -> None:
    project = finished.copied(tmp_path / "project")
    for i, cell in enumerate(project.finished_cells()):
        content = cell.read_bytes()
        cell.write_bytes(content[: i * len(content) // 8])
    ended = project.again()
    assert ended.code == 0, ended.err
    assert project.info() == finished.info() and project.weights() == finished.weights()
