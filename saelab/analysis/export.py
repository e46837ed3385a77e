"""Writes trained SAEs as directories of other tools, all of them or none.

Of a run, the cells at the plan's L0 are written, each in a folder of its arm and seed; any other
SAE that `formats` reads is written as it is. Everything is written next to the target folder first
and renamed at the end.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from saelab import formats
from saelab.errors import SettingError, SourceError
from saelab.formats import Loaded
from saelab.runs.folder import RunFolder, run_cells
from saelab.sae import SAE
from saelab.storage.atomic import explain_write_errors
from saelab.study.plan import base_of_run


def export(
    path: Path,
    out: Path,
    to: str = "saelens",
    source: str = "",
    arms: Sequence[str] = (),
    seeds: Sequence[int] = (),
    without_trace: bool = False,
) -> list[Path]:
    """Writes a run's SAEs, or one SAE, in another format.

    Args:
        path: a run folder, or the directory of one SAE.
        out: new or empty.
        to, source: formats; '' recognises that of the source.
        arms, seeds: of a run, which cells; all by default.
        without_trace: write an adapting threshold with beta = 0, which is another function.

    Returns: the folders that now hold an SAE.
    Raises: SettingError when a part can't be written, SourceError when `out` is not empty.
    """
    save = formats.saver(to)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise SourceError(f"{out} exists and is not empty: name a new folder")
    cells = run_cells(path, arms, seeds)
    places = {Path(cell.id.folder): cell.folder for cell in cells} if cells else {Path(): path}
    with _all_or_nothing(out) as fresh:
        for place, folder in places.items():
            loaded = formats.load(folder, source)
            with _naming(folder, loaded.sae):
                sae = without_context(loaded.sae) if without_trace else loaded.sae
                save(sae, fresh / place, about(loaded, folder, without_trace))
    return [out / place for place in places]


def about(loaded: Loaded, folder: Path, without_trace: bool = False) -> dict[str, Any]:
    """Metadata of an SAE: model, hook_name, context and dataset, as far as they are recorded."""
    run = RunFolder.of(folder)
    base = base_of_run(run) if run else None
    text = base.train_text if base and base.activations is None else None
    dataset = str(text.path or text.kind) if text else loaded.about.get("dataset", "")
    named = {"model": loaded.origin.model, "hook_name": loaded.origin.hook_name, "dataset": dataset}
    mark = {"without_trace": True} if without_trace and loaded.sae.needs_contexts else {}
    return {**loaded.about, **named, **mark}


@torch.no_grad()
def without_context(sae: SAE) -> SAE:
    """The SAE with codes that don't follow the context, where its activation has such a form (beta
    = 0 of adapting thresholds); else the SAE itself."""
    activation = sae.activation.without_context() if sae.needs_contexts else None
    if activation is None:
        return sae
    twin = sae.config.patched({"activation": activation}).build(sae.d_in)
    twin.load_state_dict(sae.state_dict())
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


@contextmanager
def _all_or_nothing(out: Path) -> Iterator[Path]:
    """Yields a folder to fill; it becomes `out` at the end and is removed on failure."""
    fresh = out.absolute().with_name(f".{out.absolute().name}.{os.getpid()}.tmp")
    try:
        yield fresh
        with explain_write_errors(out):
            fresh.replace(out)
    finally:
        shutil.rmtree(fresh, ignore_errors=True)
