"""Checkpoints of cells in training: interrupted work resumes where it stopped, bit for bit.

    <folder>/00000120.safetensors   tensors of the cell's state after 120 steps
             00000120.json          its numbers, the stream's position, the checksum of the tensors,
                                    the name of the folder; sealed, written last

Every cell has its own folder, named after everything that its bits depend on, so that cells may be
grouped differently when they resume. A cell on several ranks can resume on any number of ranks;
only its last bits depend on that number. The clock decides when a checkpoint is written, but not
what is in it, and so it changes no result. The folder may have a twin at a URL: each checkpoint is
copied there when it is written, and a machine without checkpoints copies them from there.
"""

from __future__ import annotations

import functools
import math
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import KW_ONLY, asdict, dataclass
from pathlib import Path
from typing import Any

from saelab.data.activations.stream import Batch, Position
from saelab.distributed.sharded_file import WHOLE, Shards
from saelab.errors import CellFailure, DamageError, SaelabError, SettingError
from saelab.runtime.signals import Interrupted, defer_signals
from saelab.storage.atomic import (
    check_key,
    read_sealed,
    remove_leftovers,
    sha256,
    write_atomically,
    write_sealed,
)
from saelab.storage.remote import Remote
from saelab.training.cell import TrainingCell
from saelab.training.loop import train
from saelab.training.state import State

FORMAT = 1
START = Position()
#: Checkpoints stored of each cell: the last one, and the one before in case the last is damaged.
CHECKPOINTS_PER_CELL = 2
#: Environment variable: seconds from one checkpoint to the next, whatever they cost; 0 writes one
#: after every round.
INTERVAL_VARIABLE = "SAELAB_CHECKPOINT_SECONDS"
#: The largest share of the time that checkpoints may take, and the assumed cost of the first one,
#: in seconds for each file and each byte. Our choice: a slow disk.
TIME_SHARE, FILE_COST, BYTE_COST = 0.02, 0.02, 1 / 100e6
#: Time from one checkpoint to the next: a share of the time so far, between bounds in seconds. Our
#: choice: an interruption costs at most a tenth of the work, and never more than a minute of it.
INTERVAL_SHARE, SHORTEST_INTERVAL, LONGEST_INTERVAL = 0.1, 1.0, 60.0


# ---- files -----------------------------------------------------------------------------------


def write_checkpoint(
    folder: Path,
    state: State,
    step: int,
    position: Position,
    seconds: float = 0.0,
    shards: Shards = WHOLE,
) -> None:
    """Writes one checkpoint and removes all but the last `CHECKPOINTS_PER_CELL`.

    Args:
        state: of a cell between two steps.
        step: number of steps done.
        position: of the stream, after the last batch that the cell took.
        seconds: spent on training the cell so far.
        shards: how the state's tensors are split over the cell's ranks, all of which call this.
    """
    file = folder / f"{step:08d}.safetensors"
    record = {
        "format": FORMAT,
        "key": _key_of(file),
        "sha256": shards.write(file, state.tensors),
        "position": asdict(position),
        "seconds": seconds,
        "plain": state.plain,
    }
    shards.ranks.on_first(lambda: _seal(file.with_suffix(".json"), record))


def _seal(file: Path, record: dict[str, Any]) -> None:
    """Writes a checkpoint's JSON, which completes it, and removes the oldest checkpoints."""
    write_sealed(file, record)
    for old in _files(file.parent)[CHECKPOINTS_PER_CELL:]:
        _remove(old)


def read_checkpoint(file: Path, shards: Shards = WHOLE) -> tuple[State, Position, float]:
    """Reads state, position and seconds as they were given to `write_checkpoint`.

    Args:
        file: a checkpoint's JSON.

    Raises: DamageError when a byte of either file has changed.
    """
    record = shards.ranks.on_first(lambda: read_record(file))
    state = State(shards.read(file.with_suffix(".safetensors")), record["plain"])
    return state, Position(**record["position"]), record["seconds"]


def read_record(file: Path) -> dict[str, Any]:
    """Reads a checkpoint's JSON after comparing both files with their checksums.

    Raises: DamageError when one of them has changed, or belongs to another cell or step.
    """
    record, tensors = read_sealed(file), file.with_suffix(".safetensors")
    if record.get("format") != FORMAT:
        raise DamageError(f"{file} has another format")
    check_key(record.get("key"), _key_of(file), file)
    if not tensors.is_file() or sha256(tensors) != record["sha256"]:
        raise DamageError(f"{tensors} does not match its checksum")
    return record


def drop_damaged(folder: Path) -> None:
    """Removes the damaged checkpoints of a cell and reports each on stderr."""
    for file in _files(folder):
        with _drop_if_damaged(file):
            read_record(file)


def push(folder: Path, twin: Remote) -> None:
    """Copies the last checkpoint to a URL, its JSON last, and removes files there that the folder
    no longer has."""
    remote_names, last = twin.sizes().keys(), _files(folder)[0]
    for file in (last.with_suffix(".safetensors"), last):
        (twin / file.name).put(file)
    for name in sorted(remote_names - {file.name for file in folder.iterdir()}):
        (twin / name).unlink(missing_ok=True)


def pull(folder: Path, twin: Remote) -> None:
    """Copies the checkpoints at a URL to the folder if it has none; reading checks them."""
    if not _files(folder):
        for name in sorted(twin.sizes(), reverse=True):  # tensors before their JSON
            with suppress(FileNotFoundError):  # another machine has removed it
                data = (twin / name).read_bytes()
                write_atomically(folder / name, functools.partial(Path.write_bytes, data=data))


def remove_checkpoints(folder: Path, twin: Remote | None = None) -> None:
    """Removes a cell's checkpoints, also those at the URL, and the folder unless another process
    has files in it."""
    for file in folder.glob("[0-9]*"):
        file.unlink(missing_ok=True)
    remove_leftovers(folder)
    if twin is not None:
        for name in sorted(twin.sizes()):
            (twin / name).unlink(missing_ok=True)
    with suppress(OSError):
        folder.rmdir()


def _key_of(file: Path) -> str:
    """Returns what a checkpoint's place stands for: the folder's name and the step."""
    return f"{file.parent.name}/{file.stem}"


def _files(folder: Path) -> list[Path]:
    """Lists the JSON files of the checkpoints, the last one first."""
    return sorted(folder.glob("[0-9]*.json"), reverse=True)


def _remove(file: Path) -> None:
    for part in (file, file.with_suffix(".safetensors")):  # without JSON it counts as incomplete
        part.unlink(missing_ok=True)


@contextmanager
def _drop_if_damaged(file: Path) -> Iterator[None]:
    """Reports and removes the checkpoint if the block finds it damaged."""
    try:
        yield
    except SaelabError as error:
        _remove(file)
        older = _files(file.parent)
        instead = "the checkpoint before it is used" if older else "the cell starts afresh"
        print(f"{error}: {instead}", file=sys.stderr, flush=True)


# ---- training --------------------------------------------------------------------------------


@dataclass(eq=False)
class ResumableCell:
    """A cell in training with its checkpoints.

    Args:
        cell: in the state of its last checkpoint, or fresh.
        folder: of its checkpoints; None for a user's own module whose state no file can hold.
        position: of the stream, from which the cell continues.
        seconds: spent on training it until then.
        twin: copy of the folder at a URL.
    """

    cell: TrainingCell
    folder: Path | None
    _: KW_ONLY
    position: Position = START
    seconds: float = 0.0
    twin: Remote | None = None

    def write(self, position: Position, seconds: float) -> None:
        """Writes a checkpoint after another `seconds` of training."""
        if self.folder is None:
            return
        state, step = self.cell.state(), self.cell.steps_done
        try:
            total, shards = self.seconds + seconds, self.cell.shards()
            write_checkpoint(self.folder, state, step, position, total, shards)
            if self.twin is not None:
                shards.ranks.on_first(functools.partial(push, self.folder, self.twin))
        except (TypeError, ValueError, KeyError) as error:  # not JSON, or a dtype that no file has
            name, self.folder = self.cell.name, None
            print(f"{name} has no checkpoints, its state can't be saved: {error}", file=sys.stderr)


def restore_cell(
    build: Callable[[], TrainingCell], folder: Path, twin: Remote | None = None
) -> ResumableCell:
    """Builds a cell and restores its last intact checkpoint; without one the cell is fresh."""
    cell = build()
    for file in cell.ranks.on_first(lambda: _checkpoint_files(folder, twin)):
        with _drop_if_damaged(file):
            state, position, seconds = read_checkpoint(file, cell.shards())
            cell.restore(state)
            return ResumableCell(cell, folder, position=position, seconds=seconds, twin=twin)
        cell = build()
    return ResumableCell(cell, folder, twin=twin)


def _checkpoint_files(folder: Path, twin: Remote | None) -> list[Path]:
    """Lists the checkpoints' JSON files, copied from the URL if need be, the last one first."""
    if twin is not None:
        pull(folder, twin)
    return _files(folder)


def train_with_checkpoints(
    members: Sequence[ResumableCell],
    stream: Callable[[Position], Iterable[tuple[Batch, Position]]],
    on_step: Callable[[int, list[TrainingCell]], None],
) -> dict[str, CellFailure]:
    """Trains cells as `train` does, with checkpoints; cells at one position are trained together.

    If an `Interrupted` is raised meanwhile, a checkpoint is written before it propagates.

    Args:
        members: cells of one seed.
        stream: position -> batches from there on.
        on_step: as for `train`; called first with the steps that a cell had done before.

    Returns: failures by cell name.
    """
    failures: dict[str, CellFailure] = {}
    groups: dict[Position, list[ResumableCell]] = {}
    for member in members:
        groups.setdefault(member.position, []).append(member)
        if member.cell.steps_done:
            on_step(member.cell.steps_done, [member.cell])
    for position, group in groups.items():
        failures |= _train_group(group, stream(position), on_step)
    return failures


def _train_group(
    group: Sequence[ResumableCell],
    stream: Iterable[tuple[Batch, Position]],
    on_step: Callable[[int, list[TrainingCell]], None],
) -> dict[str, CellFailure]:
    """Trains cells that are at the same position of the stream."""
    pace, start, ranks = Pace(), time.monotonic(), group[0].cell.ranks
    last: tuple[Position, list[ResumableCell]] | None = None

    def write(position: Position, living: Sequence[ResumableCell]) -> None:
        with pace.count_writing():
            for member in living:
                member.write(position, (time.monotonic() - start) / len(group))

    def on_round(position: Position, living: list[TrainingCell]) -> None:
        nonlocal last
        members = [member for member in group if member.cell in living]
        last = position, members
        if ranks.on_first(lambda: pace.due(members)):
            write(*last)
            last = None

    try:
        failures = train([member.cell for member in group], stream, on_step, on_round)
    except Interrupted as stop:
        # not on several ranks: the others may be in another round
        if last is not None and not stop.at_once and ranks.alone:
            with defer_signals():
                write(*last)
        raise
    for member in group:
        member.seconds += (time.monotonic() - start) / len(group)
    return failures


class Pace:
    """Decides when checkpoints are due; they take at most `TIME_SHARE` of the time."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self.clock, self.interval = clock, fixed_interval()
        self.start = self.last = clock()
        self.spent, self.cost = 0.0, math.nan

    def due(self, members: Sequence[ResumableCell]) -> bool:
        """Returns whether to write checkpoints of these cells now."""
        now = self.clock()
        if self.interval is not None:
            return now - self.last >= self.interval
        elapsed = now - self.start
        if now - self.last < min(
            max(SHORTEST_INTERVAL, INTERVAL_SHARE * elapsed), LONGEST_INTERVAL
        ):
            return False
        if math.isnan(self.cost):
            self.cost = sum(_first_cost(member.cell.state()) for member in members)
        return self.spent + self.cost <= TIME_SHARE * elapsed

    @contextmanager
    def count_writing(self) -> Iterator[None]:
        """Counts the time of the block, which writes checkpoints."""
        before = self.clock()
        yield
        self.last = self.clock()
        self.cost = self.last - before
        self.spent += self.cost


def _first_cost(state: State) -> float:
    """Estimates the seconds that the first checkpoint of a state takes."""
    size = sum(tensor.numel() * tensor.element_size() for tensor in state.tensors.values())
    return 2 * FILE_COST + BYTE_COST * size


def fixed_interval() -> float | None:
    """Returns the seconds between checkpoints that the environment asks for, None if it does not.

    Raises: SettingError when the variable is not a number of seconds.
    """
    value = os.environ.get(INTERVAL_VARIABLE, "").strip()
    try:
        seconds = float(value) if value else None
    except ValueError:
        seconds = math.nan
    if seconds is not None and not seconds >= 0:
        remedy = "use a number of seconds, 0 for after every round"
        raise SettingError(INTERVAL_VARIABLE, value, remedy)
    return seconds
