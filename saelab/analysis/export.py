"""Writes trained SAEs as directories of other tools.

Of a run, the cells at the plan's L0 are written, each in a folder of its arm and seed; any other
SAE that `formats` reads is written as it is. What the format can't hold is refused by name, and the
rest is written. Everything is written next to the target folder first and renamed at the end, so an
error leaves nothing.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from saelab import formats
from saelab.analysis.sharing.new_folder import new_folder
from saelab.analysis.sharing.public_names import public_data
from saelab.errors import SettingError, SourceError, UsageError
from saelab.formats import Loaded
from saelab.runs.folder import RunFolder, run_cells
from saelab.sae import SAE
from saelab.study.plan import base_of_run


@dataclass(frozen=True)
class Exported:
    """Result of an export.

    Args:
        written: the folders that now hold an SAE.
        refused: a sentence on each SAE that the format can't hold.
    """

    written: list[Path]
    refused: list[str]


def export(
    path: Path,
    out: Path,
    to: str = "saelens",
    source: str = "",
    arms: Sequence[str] = (),
    seeds: Sequence[int] = (),
    without_trace: bool = False,
) -> Exported:
    """Writes a run's SAEs, or one SAE, in another format.

    Args:
        path: a run folder, or the directory of one SAE.
        out: new or empty.
        to, source: formats; '' recognises that of the source.
        arms, seeds: of a run, which cells; all by default.
        without_trace: write an adapting threshold with beta = 0, which is another function.

    Returns: the folders that now hold an SAE, and the refusals.
    Raises: SettingError or SourceError when nothing can be written, SourceError when `out` is not
        empty.
    """
    save = formats.saver(to)
    written: list[Path] = []
    errors: dict[Path, UsageError] = {}
    with new_folder(out) as fresh:
        cells = run_cells(path, arms, seeds)
        places = {Path(cell.id.folder): cell.folder for cell in cells} if cells else {Path(): path}
        for place, folder in places.items():
            try:
                loaded = formats.load(folder, source)
                with _naming(folder, loaded.sae):
                    sae = without_context(loaded.sae) if without_trace else loaded.sae
                    save(sae, fresh / place, about(loaded, folder, without_trace))
            except (SettingError, SourceError) as error:
                errors[place] = error
                shutil.rmtree(fresh / place, ignore_errors=True)
            else:
                written.append(out / place)
        if not written:
            raise next(iter(errors.values()))
    return Exported(written, [f"{place} is not written: {e}" for place, e in errors.items()])


def about(loaded: Loaded, folder: Path, without_trace: bool = False) -> dict[str, Any]:
    """Metadata of an SAE without places of this disk: model, hook_name, context and dataset, as far
    as they are recorded."""
    run = RunFolder.of(folder)
    base = base_of_run(run) if run else None
    text = base.train_text if base and base.activations is None else None
    dataset = str(text.path or text.kind) if text else str(loaded.about.get("dataset") or "")
    model = _without_folders(loaded.origin.model)
    named = {"model": model, "hook_name": loaded.origin.hook_name}
    named |= {"dataset": _without_folders(dataset)}
    mark = {"without_trace": True} if without_trace and loaded.sae.needs_contexts else {}
    return public_data({**loaded.about, **named, **mark})


def _without_folders(name: str) -> str:
    """The last part of a place on this disk; a name on the hub as it is."""
    path = Path(name).expanduser()
    return path.name if path.is_absolute() or path.exists() else name


@torch.no_grad()
def without_context(sae: SAE) -> SAE:
    """The SAE with codes that don't follow the context, where its activation has such a form (beta
    = 0 of adapting thresholds); else the SAE itself."""
    activation = sae.activation.without_context() if sae.needs_contexts else None
    if activation is None:
        return sae
    twin = sae.config.patched({"activation": activation}).build(
        sae.dims.input_blocks, d_out=sae.dims.targets or None
    )
    twin.load_state_dict(sae.state_dict())
    twin.origin = sae.origin
    return twin.eval()


@contextmanager
def _naming(folder: Path, sae: SAE) -> Iterator[None]:
    """Names the SAE in the error about a part that can't be written."""
    try:
        yield
    except SettingError as error:
        remedy = error.remedy
        follows = sae.needs_contexts and sae.activation.without_context() is not None
        if follows and error.setting == "activation":
            remedy += "; --without-trace writes it with beta = 0, which is another function"
        raise SettingError(f"{folder}: {error.setting}", error.value, remedy) from None
