"""Experiment trackers to which a launch logs in addition to metrics.jsonl (setting `tracker`).

Each is one class here and one line in `TRACKERS`; its package comes with the extra `tracking`. All
work offline: nothing is sent anywhere, and nobody is asked for a key, unless the tracker's
environment variables request it.

    tensorboard   run_3/tensorboard/<arm>/seed<s>-l0_<level>/     tensorboard --logdir run_3
    wandb         run_3/wandb/offline-run-*                       wandb sync; WANDB_MODE=online
    trackio       trackio's own folder (TRACKIO_DIR)              trackio show
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from saelab.errors import SettingError, nearest


class Tracker:
    """Receiver of the values of cells; this base class ignores them.

    Args:
        folder: folder of the run; nothing is written before the first `log`.
        about: `run`, `study` and further facts about the launch.
    """

    def __init__(self, folder: Path, about: Mapping[str, Any]) -> None:
        self.folder, self.about = folder, about

    def log(self, cell: str, step: int, values: Mapping[str, float]) -> None:
        """Logs values of a cell ('<arm>/seed<s>-l0_<level>') after a step of its training."""

    def close(self) -> None:
        """Ends the tracker; no `log` follows."""


class TensorBoard(Tracker):
    """Event files, one folder per cell, so that cells are curves of one chart."""

    def __init__(self, folder: Path, about: Mapping[str, Any]) -> None:
        super().__init__(folder, about)
        from torch.utils.tensorboard import SummaryWriter

        self._new, self._writers = SummaryWriter, {}

    def log(self, cell: str, step: int, values: Mapping[str, float]) -> None:
        if cell not in self._writers:
            self._writers[cell] = self._new(str(self.folder / "tensorboard" / cell))
        for name, value in values.items():
            self._writers[cell].add_scalar(name, value, step)

    def close(self) -> None:
        for writer in self._writers.values():
            writer.close()


class Wandb(Tracker):
    """One run of Weights & Biases for a launch; each cell counts its own steps."""

    def __init__(self, folder: Path, about: Mapping[str, Any]) -> None:
        super().__init__(folder, about)
        import wandb  # pyright: ignore[reportMissingImports] # an extra

        self._wandb, self._run, self._cells = wandb, None, set()

    def log(self, cell: str, step: int, values: Mapping[str, float]) -> None:
        self._run = self._run or self._wandb.init(
            project=self.about.get("study") or "saelab",
            name=self.about.get("run"),
            config=dict(self.about),
            dir=str(self.folder),
            mode=os.environ.get("WANDB_MODE", "offline"),
            settings=self._wandb.Settings(console="off", silent=True, x_disable_stats=True),
        )
        if cell not in self._cells:
            self._cells.add(cell)
            self._run.define_metric(f"{cell}/*", step_metric=f"{cell}/step")
        self._run.log({f"{cell}/{name}": v for name, v in values.items()} | {f"{cell}/step": step})

    def close(self) -> None:
        if self._run is not None:
            self._run.finish()


class Trackio(Tracker):
    """One run of Trackio for each cell, grouped by launch, in its local database."""

    def __init__(self, folder: Path, about: Mapping[str, Any]) -> None:
        super().__init__(folder, about)
        import trackio  # pyright: ignore[reportMissingImports] # an extra

        self._trackio, self._runs = trackio, {}

    def log(self, cell: str, step: int, values: Mapping[str, float]) -> None:
        if cell not in self._runs:
            launch = self.about.get("run", "")
            self._runs[cell] = self._trackio.init(
                project=self.about.get("study") or "saelab", name=f"{launch}/{cell}", group=launch
            )
        self._runs[cell].log(dict(values), step=step)

    def close(self) -> None:
        for run in self._runs.values():
            run.finish()


TRACKERS: dict[str, Callable[[Path, Mapping[str, Any]], Tracker]] = {
    "none": Tracker,
    "tensorboard": TensorBoard,
    "wandb": Wandb,
    "trackio": Trackio,
}


def open_tracker(name: str, folder: Path, about: Mapping[str, Any]) -> Tracker:
    """Opens the named tracker, which writes nothing before its first `log`.

    Raises: SettingError for an unknown name, or when the tracker's package is missing.
    """
    if name not in TRACKERS:
        remedy = f"no such tracker{nearest(name, TRACKERS)}: use one of {', '.join(TRACKERS)}"
        raise SettingError("tracker", name, remedy)
    try:
        return TRACKERS[name](folder, about)
    except ImportError as error:
        remedy = f"its package is missing ({error}): pip install 'saelab[tracking]'"
        raise SettingError("tracker", name, remedy) from None
