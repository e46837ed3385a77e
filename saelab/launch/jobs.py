"""Messages from a launch to its workers: groups of cells, and the data that all of them share.

Settings travel as plain data, because an experiment.py may define parts of its own: a worker
imports that file first and parses the settings then.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from saelab.data.activations.joined import Paths
from saelab.data.activations.stream import Layout
from saelab.data.language_model import ModelConfig
from saelab.data.probing.last_tokens import LastTokens
from saelab.data.probing.saebench import Definition
from saelab.launch.cell_key import Key
from saelab.runs.schema import CellId, control_arm
from saelab.sae import SAEConfig
from saelab.storage.remote import Place
from saelab.study.plan import CellSpec
from saelab.training.optim import TrainConfig


@dataclass(frozen=True, kw_only=True)
class WorkerData:
    """Data that every job of a launch shares; plain data, so that it can be sent to a worker.

    `train_digest` is None while the activations to train on are still being harvested;
    `calibration` is None where L0 is not calibrated on held-out text; `read_ahead` is in bytes, see
    `HarvestConfig`; `output_hooks` are those whose activations are reconstructed; `extra` names
    evaluations, see `EvalConfig`.
    """

    train: Place | Paths
    train_digest: str | None
    held_out: Place | Paths
    calibration: Place | Paths | None
    foreign: bool
    probing: Path | None
    why_no_probing: str
    model: ModelConfig | None
    layout: Layout
    output_hooks: tuple[str, ...]
    loss_contexts: int
    snapshots: int
    k_values: tuple[int, ...]
    probing_seed: int
    definition: Definition
    missing_entries: dict[str, str]
    device: str
    provenance: dict[str, Any]
    read_ahead: int
    extra: tuple[str, ...] = ()
    sae_probes: LastTokens | None = None


@dataclass(frozen=True, kw_only=True)
class JobCell:
    """A cell, or a control subject, that a worker makes.

    Args:
        id: which cell; of a control subject the baseline's cell that it stands for.
        sae, train: settings as plain data.
        key: its content hash but for the training activations.
        own_module: whether the arm brings its own torch module instead of an SAE made of parts.
        at_target: whether it is at the plan's L0, where every evaluation is run.
        others: keys of the arm's other seeds that it is compared with.
        control: name of the control subject; '' for a cell.
    """

    id: CellId
    sae: dict[str, Any]
    train: dict[str, Any]
    key: Key
    own_module: bool = False
    at_target: bool = True
    others: tuple[Key, ...] = ()
    control: str = ""

    @classmethod
    def of(cls, spec: CellSpec, key: Key, **options: Any) -> JobCell:
        """The message for one cell of a plan."""
        return cls(
            id=spec.id,
            sae=spec.sae.model_dump(mode="json"),
            train=spec.train.model_dump(mode="json"),
            key=key,
            own_module=spec.module is not None,
            **options,
        )

    @property
    def display_id(self) -> CellId:
        """The cell as progress lines and rows name it: a control subject has an arm of its own."""
        return replace(self.id, arm=control_arm(self.control)) if self.control else self.id

    @property
    def sae_config(self) -> SAEConfig:
        """The parsed settings; parts of an experiment.py must be registered."""
        return SAEConfig.parse(self.sae)

    @property
    def train_config(self) -> TrainConfig:
        return TrainConfig.parse(self.train)


@dataclass(frozen=True, kw_only=True)
class Job:
    """Cells of one seed, or control subjects, that one worker makes together.

    Args:
        seed: of initialisation and data order.
        experiment: the file of the run table, which may define parts; None without one.
        run: name of the run in that table.
        code: hash of that file and all that it imports, as `study_code` returned it in the launch.
        modules: names of arms that bring modules, which count in it.
    """

    cells: list[JobCell]
    seed: int
    data: WorkerData
    cache: Path
    experiment: Path | None
    run: str
    code: str = ""
    modules: tuple[str, ...] = ()


#: Share of a cell's tokens that the progress bar counts when it is trained; the rest is counted
#: when it is evaluated, so that the bar adds up to the tokens. Our measurement.
TRAINING_SHARE = 2 / 3


def evaluation_cost(config: TrainConfig) -> float:
    """Tokens of the progress bar that evaluating a cell counts for."""
    return (1 - TRAINING_SHARE) * config.tokens
