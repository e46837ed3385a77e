"""Checkpoints of cells in training: written, damaged, read, and what goes on from them."""

from __future__ import annotations

import itertools
import os
import shutil
import signal
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from test_state import D_IN, D_SAE, OBSERVED, SIZE, STEPS, TRAIN, Own, assert_same

from saelab.data.activations.store import MemorySource, Shard
from saelab.data.activations.stream import Position, batches
from saelab.distributed.sharded_file import WHOLE
from saelab.errors import DamageError, SettingError
from saelab.runtime import signals
from saelab.runtime.signals import Interrupted, defer_signals, exit_on_signal
from saelab.sae import SAEConfig
from saelab.seeding import torch_stream
from saelab.training import loop, resume
from saelab.training.loop import Cell
from saelab.training.module_cell import ModuleCell
from saelab.training.resume import (
    Pace,
    ResumableCell,
    drop_damaged,
    read_checkpoint,
    remove_checkpoints,
    restore_cell,
    train_with_checkpoints,
    write_checkpoint,
)


@pytest.fixture(scope="module")
def activations() -> MemorySource:
    stream, shards = torch_stream(1, "resumed activations"), []
    for _ in range(3):
        x = torch.randn(20, 16, D_IN, generator=stream) + 0.5
        shards.append(Shard(x, torch.ones(20, 16, dtype=torch.bool)))
    return MemorySource(shards, {})


@pytest.fixture(autouse=True)
def short_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three batches a round, and a checkpoint after each."""
    monkeypatch.setattr(loop, "LONGEST_TURN", 3)
    monkeypatch.setenv(resume.INTERVAL_VARIABLE, "0")


def build(source: MemorySource, name: str = "a") -> Cell:
    data = {"d_sae": D_SAE, "precision": "float32", "activation": {"kind": "batchtopk", "k": 4}}
    data |= {"losses": ["reconstruction"], "controllers": []} | OBSERVED
    data |= {"scaling": "variance"} if name == "b" else {}
    return Cell(name, SAEConfig.parse(data), TRAIN, source.shard(0).rows()[0], 3, 4)


def kept(source: MemorySource, folder: Path, names: Sequence[str] = "ab") -> list[ResumableCell]:
    return [restore_cell(lambda n=n: build(source, n), folder / n) for n in names]


def trained(
    source: MemorySource,
    members: Sequence[ResumableCell],
    at: Callable[[int], None] = lambda steps: None,
) -> list[ResumableCell]:
    """`at` is called with the steps done, after each round."""

    def on_step(steps: int, living: list[Cell]) -> None:
        at(living[0].steps_done)

    assert not train_with_checkpoints(
        members, lambda start: batches(source, 3, SIZE, "rows", start), on_step
    )
    return list(members)


def signalled(number: int, step: int) -> Callable[[int], None]:
    def at(steps: int) -> None:
        if steps == step:
            os.kill(os.getpid(), number)

    return at


@pytest.fixture(scope="module")
def whole_run(
    activations: MemorySource, tmp_path_factory: pytest.TempPathFactory
) -> list[ResumableCell]:
    return trained(activations, kept(activations, tmp_path_factory.mktemp("whole")))


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_leaves_a_checkpoint_and_the_rest_follows_exactly(
    number: int,
    code: int,
    activations: MemorySource,
    whole_run: list[ResumableCell],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv(resume.INTERVAL_VARIABLE, "1000")  # the signal's is the only one
    with pytest.raises(SystemExit) as ended, exit_on_signal():
        trained(activations, kept(activations, tmp_path), signalled(number, 9))
    assert ended.value.code == code and signal.getsignal(number) is signal.SIG_IGN
    assert capsys.readouterr().err.splitlines()[-1].endswith("goes on where it stopped")
    again = kept(activations, tmp_path)
    assert [member.cell.steps_done for member in again] == [9, 9]
    assert all(member.seconds > 0 for member in again)
    for one, other in zip(trained(activations, again), whole_run, strict=True):
        assert_same(one.cell.state(), other.cell.state())


def test_cells_may_be_grouped_otherwise(
    activations: MemorySource, whole_run: list[ResumableCell], tmp_path: Path
) -> None:
    """One cell stopped early, one late, one not begun."""
    for name, step in (("a", 6), ("b", 15)):
        with signals.preserve_handlers(), pytest.raises(SystemExit), exit_on_signal():
            trained(activations, kept(activations, tmp_path, name), signalled(signal.SIGTERM, step))
    again = kept(activations, tmp_path)
    assert [member.cell.steps_done for member in again] == [6, 15]
    for one, other in zip(trained(activations, again), whole_run, strict=True):
        assert_same(one.cell.state(), other.cell.state())


def test_a_second_interrupt_does_not_wait() -> None:
    reached = False
    with pytest.raises(SystemExit) as ended, exit_on_signal(), defer_signals():
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGTERM)  # changes nothing
        reached = True
        os.kill(os.getpid(), signal.SIGINT)
        reached = False
    assert ended.value.code == 130 and reached


def test_a_late_second_signal_is_not_the_first_once_more(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Where something has swallowed the first one, the process can still be ended."""
    monkeypatch.setattr(signals, "SOON", 0.0)
    swallowed = False
    with pytest.raises(SystemExit) as ended, exit_on_signal():
        try:
            os.kill(os.getpid(), signal.SIGTERM)
        except Interrupted:
            swallowed = True
        os.kill(os.getpid(), signal.SIGTERM)
    assert ended.value.code == 143 and swallowed


def test_a_librarys_own_interrupt_keeps_the_number_of_the_signal() -> None:
    """Ray raises KeyboardInterrupt where a handler raised something while it waited."""
    with pytest.raises(SystemExit) as ended, exit_on_signal():
        try:
            os.kill(os.getpid(), signal.SIGTERM)
        except Interrupted:
            raise KeyboardInterrupt from None
    assert ended.value.code == 143


def test_a_librarys_handlers_do_not_stay() -> None:
    with pytest.raises(SystemExit) as ended, exit_on_signal():
        with signals.preserve_handlers():
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGTERM)
    assert ended.value.code == 143


def test_at_once_writes_nothing(
    activations: MemorySource, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the middle of a round there is no state to go on from."""
    monkeypatch.setenv(resume.INTERVAL_VARIABLE, "1000")

    def twice(steps: int) -> None:
        for _ in range(2):
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(SystemExit), exit_on_signal():
        trained(activations, kept(activations, tmp_path), twice)
    assert not list(tmp_path.glob("*/*"))


def test_nothing_listens_outside() -> None:
    with defer_signals():
        pass
    with pytest.raises(Interrupted, match="terminated"):
        signals.handle_signal(signal.SIGTERM, None)
    signals._Pending.number, signals._Pending.raised = None, False


# ---- files -----------------------------------------------------------------------------------


def test_the_last_two_are_kept_and_gone_in_the_end(
    activations: MemorySource, tmp_path: Path
) -> None:
    (member,) = trained(activations, kept(activations, tmp_path, "a"))
    names = sorted(file.name for file in member.folder.iterdir())  # type: ignore[union-attr]
    last = [f"{step:08d}" for step in (STEPS - 3, STEPS)]
    assert names == sorted(f"{s}.{end}" for s in last for end in ("json", "safetensors"))
    left = tmp_path / "a" / ".00000012.json.999999999.tmp"  # of a process that is gone
    left.write_text("")
    (tmp_path / "a" / "00000012.safetensors").write_text("")  # killed before its JSON
    remove_checkpoints(tmp_path / "a")
    assert not (tmp_path / "a").exists()


def test_tensors_are_what_the_library_reads(tmp_path: Path) -> None:
    x = torch.arange(6.0)
    tensors = {
        "half": x.to(torch.bfloat16).view(2, 3),
        "strided": x.view(2, 3).T,
        "flags": x > 2,
        "count": torch.tensor(7),
        "none": torch.zeros(0, 4),
        "same": x,
        "double": x.double(),
    }
    checksum = WHOLE.write(tmp_path / "x.safetensors", tensors)
    assert checksum == resume.sha256(tmp_path / "x.safetensors")
    found = load_file(tmp_path / "x.safetensors")
    assert found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert torch.equal(found[name], tensor) and found[name].dtype == tensor.dtype, name


@pytest.mark.parametrize("end", ["json", "safetensors"])
@pytest.mark.parametrize("harm", ["bit", "cut", "gone"])
def test_a_damaged_checkpoint_is_named_and_the_one_before_is_used(
    end: str,
    harm: str,
    activations: MemorySource,
    whole_run: list[ResumableCell],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(SystemExit), exit_on_signal():
        trained(activations, kept(activations, tmp_path, "b"), signalled(signal.SIGTERM, 12))
    damage(tmp_path / "b" / f"00000012.{end}", harm)
    if (end, harm) != ("json", "gone"):  # without its JSON it was never complete
        with pytest.raises(DamageError):
            read_checkpoint(tmp_path / "b" / "00000012.json")
        drop_damaged(tmp_path / "b")
        said = capsys.readouterr().err
        assert "00000012" in said and "the checkpoint before it is used" in said
    (member,) = kept(activations, tmp_path, "b")
    assert member.cell.steps_done == 9
    assert_same(trained(activations, [member])[0].cell.state(), whole_run[1].cell.state())


@pytest.mark.parametrize("move", ["folders are swapped", "files are swapped", "it is renamed"])
def test_a_checkpoint_of_another_cell_or_step_is_named_and_not_used(
    move: str,
    activations: MemorySource,
    whole_run: list[ResumableCell],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Each is as sealed as before."""
    with pytest.raises(SystemExit), exit_on_signal():
        trained(activations, kept(activations, tmp_path), signalled(signal.SIGTERM, 12))
    moved = tmp_path / "moved"
    if move == "folders are swapped":
        swaps = [(tmp_path / "a", tmp_path / "b")]
    elif move == "files are swapped":
        swaps = [(f, tmp_path / "b" / f.name) for f in (tmp_path / "a").iterdir()]
    else:
        swaps = []
        for file in [*(tmp_path / "a").iterdir(), *(tmp_path / "b").iterdir()]:
            file.rename(file.with_name(f"1{file.name[1:]}"))
    for one, other in swaps:
        one.rename(moved)
        other.rename(one)
        moved.rename(other)
    members = kept(activations, tmp_path)
    assert [member.cell.steps_done for member in members] == [0, 0]
    assert "belongs to" in capsys.readouterr().err
    for member, whole in zip(trained(activations, members), whole_run, strict=False):
        assert_same(member.cell.state(), whole.cell.state())


def test_where_all_are_damaged_the_cell_starts_afresh(
    activations: MemorySource, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit), exit_on_signal():
        trained(activations, kept(activations, tmp_path, "a"), signalled(signal.SIGTERM, 12))
    for file in (tmp_path / "a").glob("*.safetensors"):
        damage(file, "bit")
    (member,) = kept(activations, tmp_path, "a")
    assert member.cell.steps_done == 0 and member.position == Position()
    assert_same(member.cell.state(), build(activations).state())
    assert "the cell starts afresh" in capsys.readouterr().err


def damage(file: Path, harm: str) -> None:
    content = bytearray(file.read_bytes())
    if harm == "gone":
        file.unlink()
        return
    if harm == "bit":
        content[len(content) // 2] ^= 1
    file.write_bytes(content if harm == "bit" else content[:-7])


def test_a_checkpoint_of_another_cell_is_not_used(
    activations: MemorySource, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    state = build(activations, "a").state()
    state.tensors["fired_at"] = state.tensors["fired_at"][:-1]
    write_checkpoint(tmp_path / "a", state, 3, Position(1, 32))
    (member,) = kept(activations, tmp_path, "a")
    assert member.cell.steps_done == 0
    assert "fired_at has another shape" in capsys.readouterr().err
    assert not list((tmp_path / "a").iterdir())


def test_a_module_whose_state_no_file_holds_has_no_checkpoints(
    activations: MemorySource, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    class Odd(Own):
        def get_extra_state(self) -> Any:
            return {1, 2}

        def set_extra_state(self, state: Any) -> None: ...

    sample = activations.shard(0).rows()[0]
    cell = ModuleCell("odd", Odd, D_SAE, TRAIN, sample, 3)
    trained(activations, [ResumableCell(cell, tmp_path / "odd")])
    assert cell.done and not list(tmp_path.glob("odd/*.json"))
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 1 and said[0].startswith("odd has no checkpoints")
    shutil.rmtree(tmp_path / "odd", ignore_errors=True)


# ---- when ------------------------------------------------------------------------------------


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.mark.parametrize("cost", [0.001, 0.05, 2.0])
def test_checkpoints_take_no_more_than_their_share(
    cost: float, activations: MemorySource, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(resume.INTERVAL_VARIABLE)
    clock, member = Clock(), ResumableCell(build(activations), tmp_path)
    pace, written = Pace(clock), []
    while clock.now < 2100:
        clock.now += 0.25
        if pace.due([member]):
            with pace.count_writing():
                clock.now += cost
            written.append(clock.now)
    assert cost * (len(written) - 1) <= 0.02 * 2000 + cost
    assert len(written) >= min(40, 0.5 * 0.02 * 2000 / cost)
    gaps = [b - a for a, b in itertools.pairwise(written)]
    assert min(gaps) >= 1 and max(gaps) <= 61 + 100 * cost


def test_a_pace_that_is_no_number(monkeypatch: pytest.MonkeyPatch) -> None:
    for named in ("often", "-1", "nan"):
        monkeypatch.setenv(resume.INTERVAL_VARIABLE, named)
        with pytest.raises(SettingError, match="number of seconds"):
            Pace()
