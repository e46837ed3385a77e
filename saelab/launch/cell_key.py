"""The content hash of a cell: settings, seed, data, and the code that computes it."""

from __future__ import annotations

import os
import platform
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from saelab.config import digest
from saelab.data.activations.store import Source
from saelab.distributed.ranks import Ranks
from saelab.errors import MismatchError
from saelab.kernels import kernels_kind, kernels_name, selection_dtype
from saelab.storage.cache import package_digest
from saelab.study.foreign_code import foreign_code
from saelab.study.plan import CellSpec

#: Remedies for what differs between a worker and its launch.
REMEDIES = {
    "saelab": "install the same version there",
    "torch": "install the same version there",
    "kernels": "see that the same C++ compiler works there, or set SAELAB_KERNELS=eager for all",
}


@dataclass(frozen=True, kw_only=True)
class Key:
    """Contents of a cell's hash, except for the training activations.

    Their digest is known once they are complete, so a worker may train first and hash then.

    Args:
        settings: of the SAE and its training, seed and level.
        data: what else the cell's numbers depend on.
        code: of the user that computes them.
        machine: what computes them, as `machine` of the launch's process returns it.
        control: name of a control subject, '' for a cell.
    """

    settings: list[Any]
    data: dict[str, Any]
    code: list[str]
    machine: dict[str, str]
    control: str = ""

    def hash(self, train: str) -> str:
        """The content hash, with the digest of the training activations."""
        data = self.data | {"train": train}
        own = digest([*self.settings, data, self.code, self.machine])
        return digest([self.control, own]) if self.control else own


def cell_key(spec: CellSpec, data: dict[str, Any], device: str) -> Key:
    """The key of a cell: settings, seed, data, and the code that computes it.

    Args:
        device: on which it is trained.
    """
    sae, training = spec.sae.model_dump(mode="json"), spec.train.model_dump(mode="json")
    return Key(
        settings=[sae, training, spec.id.seed, spec.id.level],
        data=data,
        code=foreign_code(spec.sae, spec.module, spec.id.arm),
        machine=machine(device),
    )


def machine(device: str) -> dict[str, str]:
    """Returns what this process computes with on a device, as far as bits depend on it."""
    here = torch.device(device)
    gpu = {"GPU": torch.cuda.get_device_name(here)} if here.type == "cuda" else {}
    return gpu | {
        "saelab": package_digest(),
        "torch": torch.__version__,
        "kernels": kernels_kind(here),
        "selection": str(selection_dtype("auto", here)).removeprefix("torch."),
        "CPU": torch.backends.cpu.get_cpu_capability(),
    }


def check_ranks(ranks: Ranks, device: str) -> None:
    """Compares what the processes of a job compute with; all of them call it.

    Raises: MismatchError on all of them when there is a difference.
    """
    here = machine(device)
    number = int(digest(here)[:15], 16)
    numbers = ranks.gather(
        torch.tensor([number], dtype=torch.int64, device=ranks.device), everywhere=True
    )
    if not bool((numbers == number).all()):
        described = ", ".join(f"{name} = {value}" for name, value in here.items())
        raise MismatchError(
            f"the processes compute with different versions or kernels (process {ranks.rank} on "
            f"{platform.node()} has {described}): start them on machines of one kind"
        )


def check_machine(launched: Mapping[str, str], device: str) -> None:
    """Compares what a worker process computes with, with that of the launch's process.

    Raises: MismatchError naming the first difference.
    """
    here = machine(device)
    for name, needed in launched.items():
        actual = here.get(name, "none")
        if actual == needed:
            continue
        if name == "kernels":
            actual = kernels_name(torch.device(device))
        worker = f"worker process {os.getpid()} on {platform.node()}"
        raise MismatchError(
            f"{worker} has {name} = {actual}, but the launch has {needed}, which gives other bits: "
            f"{REMEDIES.get(name, 'train on machines of one kind')}"
        )


def cell_folder(cache: Path, key: Key, train: str) -> Path:
    """A cell's place in the cache, with the digest of the training activations."""
    return cache / "cells" / key.hash(train)


def resume_folder(cache: Path, key: Key, train: Source, foreign: bool) -> Path:
    """Folder of a cell's checkpoints while it is trained; known before its training activations
    are complete, by all that decides them."""
    return cache / "resume" / key.hash(train.digest if foreign else digest(train.header))
