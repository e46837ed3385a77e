"""Checkpoints of cells in training: what was interrupted goes on where it stopped, bit for bit.

    <folder>/00000120.safetensors   tensors of the cell's state after 120 steps
             00000120.json          its numbers, the stream's position, the tensors' checksum;
                                    sealed, written last

Every cell has a folder of its own, named after all that its bits depend on, so that cells may be
grouped otherwise when they go on. A cell on several ranks goes on on any number of them; only the
last bits depend on it. When a checkpoint is written depends on the clock; what is in it, and so
what comes of it, does not. The folder may have a twin at a URL, where each checkpoint is copied as
it is written, and from where a machine that has none takes them.
"""

from __future__ import annotations

import functools
import math
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from saelab.data.activations.stream import Batch, Position
from saelab.distributed.sharded_file import WHOLE, Shards
from saelab.errors import CellFailure, DamageError, SaelabError, SettingError
from saelab.runtime.signals import Interrupted, defer_signals
from saelab.storage.atomic import read_sealed, sha256, sweep, write_atomically, write_sealed
from saelab.storage.remote import Remote
from saelab.training.cell import TrainingCell
from saelab.training.loop import train
from saelab.training.state import State

FORMAT = 1
START = Position()
#: Checkpoints of a cell that are kept: the last one, and one for the case that it is damaged.
KEPT = 2
#: Seconds from one checkpoint to the next, whatever they cost; 0 writes one after every round.
SECONDS = "SAELAB_CHECKPOINT_SECONDS"
#: The largest share of the time that checkpoints may take, and how long the first one is thought
#: to take, in seconds for a file and for a byte. Our choice: a slow disk.
SHARE, FILE_COST, BYTE_COST = 0.02, 0.02, 1 / 100e6
#: Time from one checkpoint to the next: a share of the time so far, between bounds in seconds. Our
#: choice: an interruption costs at most a tenth of the work, and never more than a minute of it.
APART, LEAST, MOST = 0.1, 1.0, 60.0


# ---- files -----------------------------------------------------------------------------------


def write_checkpoint(
    folder: Path,
    state: State,
    step: int,
    position: Position,
    seconds: float = 0.0,
    shards: Shards = WHOLE,
) -> None:
    """Writes one checkpoint and removes all but the last `KEPT`.

    Args:
        state: of a cell between two steps.
        step: steps done.
        position: of the stream, after the last batch that the cell took.
        seconds: spent on training the cell so far.
        shards: how the state's tensors lie on the cell's ranks, all of which call this.
    """
    file = folder / f"{step:08d}.safetensors"
    record = {
        "format": FORMAT,
        "sha256": shards.write(file, state.tensors),
        "position": asdict(position),
        "seconds": seconds,
        "plain": state.plain,
    }
    shards.ranks.on_first(lambda: _seal(file.with_suffix(".json"), record))


def _seal(file: Path, record: dict[str, Any]) -> None:
    write_sealed(file, record)
    for old in _files(file.parent)[KEPT:]:
        _remove(old)


def read_checkpoint(file: Path, shards: Shards = WHOLE) -> tuple[State, Position, float]:
    """State, position and seconds as `write_checkpoint` had them.

    Args:
        file: a checkpoint's JSON.

    Raises: DamageError when a byte of either file is not what was written.
    """
    record = shards.ranks.on_first(lambda: read_record(file))
    state = State(shards.read(file.with_suffix(".safetensors")), record["plain"])
    return state, Position(**record["position"]), record["seconds"]


def read_record(file: Path) -> dict[str, Any]:
    """A checkpoint's JSON, after both files were compared with their checksums.

    Raises: DamageError when one of them is not what was written.
    """
    record, tensors = read_sealed(file), file.with_suffix(".safetensors")
    if record.get("format") != FORMAT:
        raise DamageError(f"{file} has another format")
    if not tensors.is_file() or sha256(tensors) != record["sha256"]:
        raise DamageError(f"{tensors} does not match its checksum")
    return record


def drop_damaged(folder: Path) -> None:
    """Removes the checkpoints of a cell that are damaged, and says so on stderr."""
    for file in _files(folder):
        with _dropping(file):
            read_record(file)


def push(folder: Path, twin: Remote) -> None:
    """Copies the last checkpoint to a URL, its JSON last, and removes there what is gone here."""
    there, last = twin.sizes(), _files(folder)[0]
    for file in (last.with_suffix(".safetensors"), last):
        (twin / file.name).put(file)
    for name in sorted(there.keys() - {file.name for file in folder.iterdir()}):
        (twin / name).unlink(missing_ok=True)


def pull(folder: Path, twin: Remote) -> None:
    """Copies the checkpoints at a URL to a folder that has none; they are checked when they are
    read."""
    if not _files(folder):
        for name in sorted(twin.sizes(), reverse=True):  # tensors before their JSON
            with suppress(FileNotFoundError):  # another machine has removed it
                data = (twin / name).read_bytes()
                write_atomically(folder / name, functools.partial(Path.write_bytes, data=data))


def remove_checkpoints(folder: Path, twin: Remote | None = None) -> None:
    """Removes a cell's folder, and what is at the URL; what another process may have in the folder
    stays."""
    for file in folder.glob("[0-9]*"):
        file.unlink(missing_ok=True)
    sweep(folder)
    if twin is not None:
        for name in sorted(twin.sizes()):
            (twin / name).unlink(missing_ok=True)
    with suppress(OSError):
        folder.rmdir()


def _files(folder: Path) -> list[Path]:
    """The checkpoints' JSON files, the last one first."""
    return sorted(folder.glob("[0-9]*.json"), reverse=True)


def _remove(file: Path) -> None:
    for part in (file, file.with_suffix(".safetensors")):  # the JSON first: it makes it complete
        part.unlink(missing_ok=True)


@contextmanager
def _dropping(file: Path) -> Iterator[None]:
    """A checkpoint that turns out to be damaged within the block is named and removed."""
    try:
        yield
    except SaelabError as error:
        _remove(file)
        others = _files(file.parent)
        instead = "the checkpoint before it is used" if others else "the cell starts afresh"
        print(f"{error}: {instead}", file=sys.stderr, flush=True)


# ---- training --------------------------------------------------------------------------------


@dataclass(eq=False)
class Kept:
    """A cell and where it stands.

    Args:
        cell: which.
        folder: of its checkpoints; None for a module of a user's own whose state no file can hold.
        position: of the stream, from which it goes on.
        seconds: spent on training it.
        twin: of the folder, at a URL.
    """

    cell: TrainingCell
    folder: Path | None
    position: Position = START
    seconds: float = 0.0
    twin: Remote | None = None

    def write(self, position: Position, seconds: float) -> None:
        """Writes a checkpoint after `seconds` more."""
        if self.folder is None:
            return
        state, step = self.cell.state(), self.cell.steps_done
        try:
            took, shards = self.seconds + seconds, self.cell.shards()
            write_checkpoint(self.folder, state, step, position, took, shards)
            if self.twin is not None:
                shards.ranks.on_first(functools.partial(push, self.folder, self.twin))
        except (TypeError, ValueError, KeyError) as error:  # of JSON, and of `KINDS`
            name, self.folder = self.cell.name, None
            print(f"{name} has no checkpoints, its state can't be kept: {error}", file=sys.stderr)


def restore_cell(
    build: Callable[[], TrainingCell], folder: Path, twin: Remote | None = None
) -> Kept:
    """The cell as its last checkpoint that is intact has it, a fresh one where there is none."""
    cell = build()
    for file in cell.ranks.on_first(lambda: _found(folder, twin)):
        with _dropping(file):
            state, position, seconds = read_checkpoint(file, cell.shards())
            cell.restore(state)
            return Kept(cell, folder, position, seconds, twin)
        cell = build()
    return Kept(cell, folder, twin=twin)


def _found(folder: Path, twin: Remote | None) -> list[Path]:
    if twin is not None:
        pull(folder, twin)
    return _files(folder)


def train_kept(
    members: Sequence[Kept],
    stream: Callable[[Position], Iterable[tuple[Batch, Position]]],
    on_step: Callable[[int, list[TrainingCell]], None],
) -> dict[str, CellFailure]:
    """`train` with checkpoints; cells whose streams stand at the same position go on together.

    An `Interrupted` leaves a checkpoint behind before it goes on its way.

    Args:
        members: of one seed.
        stream: that goes on from a position.
        on_step: as for `train`; called first with the steps done before.
    """
    failures: dict[str, CellFailure] = {}
    groups: dict[Position, list[Kept]] = {}
    for member in members:
        groups.setdefault(member.position, []).append(member)
        if member.cell.steps_done:
            on_step(member.cell.steps_done, [member.cell])
    for position, group in groups.items():
        failures |= _train_group(group, stream(position), on_step)
    return failures


def _train_group(
    group: Sequence[Kept],
    stream: Iterable[tuple[Batch, Position]],
    on_step: Callable[[int, list[TrainingCell]], None],
) -> dict[str, CellFailure]:
    pace, start, ranks = Pace(), time.monotonic(), group[0].cell.ranks
    last: tuple[Position, list[Kept]] | None = None

    def write(position: Position, living: Sequence[Kept]) -> None:
        with pace.spending():
            for member in living:
                member.write(position, (time.monotonic() - start) / len(group))

    def look(position: Position, living: list[TrainingCell]) -> None:
        nonlocal last
        members = [member for member in group if member.cell in living]
        last = position, members
        if ranks.on_first(lambda: pace.due(members)):
            write(*last)
            last = None

    try:
        failures = train([member.cell for member in group], stream, on_step, look)
    except Interrupted as stop:
        if last is not None and not stop.at_once and ranks.alone:  # others may be elsewhere
            with defer_signals():
                write(*last)
        raise
    for member in group:
        member.seconds += (time.monotonic() - start) / len(group)
    return failures


class Pace:
    """When checkpoints are due: they take at most `SHARE` of the time."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self.clock, self.every = clock, _seconds()
        self.start = self.last = clock()
        self.spent, self.cost = 0.0, math.nan

    def due(self, members: Sequence[Kept]) -> bool:
        """Whether to write checkpoints of these cells now."""
        now = self.clock()
        if self.every is not None:
            return now - self.last >= self.every
        so_far = now - self.start
        if now - self.last < min(max(LEAST, APART * so_far), MOST):
            return False
        if math.isnan(self.cost):
            self.cost = sum(_first_cost(member.cell.state()) for member in members)
        return self.spent + self.cost <= SHARE * so_far

    @contextmanager
    def spending(self) -> Iterator[None]:
        """Within it checkpoints are written."""
        before = self.clock()
        yield
        self.last = self.clock()
        self.cost = self.last - before
        self.spent += self.cost


def _first_cost(state: State) -> float:
    size = sum(tensor.numel() * tensor.element_size() for tensor in state.tensors.values())
    return 2 * FILE_COST + BYTE_COST * size


def _seconds() -> float | None:
    """Raises: SettingError when the variable is no number of seconds."""
    named = os.environ.get(SECONDS, "")
    try:
        seconds = float(named) if named else None
    except ValueError:
        seconds = math.nan
    if seconds is not None and not seconds >= 0:
        raise SettingError(SECONDS, named, "use a number of seconds, 0 for after every round")
    return seconds
