"""A trained SAE on disk: `sae.safetensors` (all tensors, running state included) and `sae.json`.

The JSON holds format, widths, configuration, provenance, the checksum of the tensors and a digest
of itself; it is written last, so a folder that has it is complete. The files do not depend on the
number of ranks that write them, and any number of ranks can read them.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from pydantic import Field, PositiveInt
from torch import Tensor

from saelab.distributed.ranks import ALONE, Ranks
from saelab.errors import DamageError, SettingError, SourceError
from saelab.row_norm import RowNorm
from saelab.sae import FORMAT, SAE, SAEConfig, Widths, computes
from saelab.storage.atomic import read_json, read_sealed, sha256
from saelab.storage.safetensors_file import read_shapes
from saelab.storage.validation import Loose, validate

REMEDY = "train the cell again, or take the folder from where it was copied"


class _Record(Loose):
    d_in: int = Field(ge=1)
    inputs: list[PositiveInt] = Field(default_factory=list)
    targets: list[PositiveInt] = Field(default_factory=list)
    sae: dict[str, Any]
    row_norm: RowNorm = "none"
    provenance: dict[str, Any]
    sha256: str


def save(sae: SAE, folder: Path, provenance: dict[str, Any]) -> None:
    """Writes the SAE; `provenance` is plain JSON data (model, hook_name, context, seed ...)."""
    sae.save(folder, provenance)


def load(folder: Path, device: str = "cpu", ranks: Ranks = ALONE) -> tuple[SAE, dict[str, Any]]:
    """Loads an SAE in evaluation mode, each rank with its own latents, and its provenance.

    Raises: SourceError when the folder holds no SAE; DamageError when a file has changed.
    """
    folder = Path(folder)
    if not (folder / "sae.json").is_file():
        raise SourceError(f"{folder} holds no sae.json: name the folder of a saved SAE")
    record = read_json(folder / "sae.json")
    format = record.get("format") if isinstance(record, dict) else None
    if isinstance(record, dict) and format != FORMAT:
        problem = f"{folder} has format {format!r}, this version reads {FORMAT}"
        raise SourceError(f"{problem}: {REMEDY}")
    record = validate(
        read_sealed(folder / "sae.json", REMEDY), _Record, folder / "sae.json", REMEDY
    )
    file = folder / "sae.safetensors"
    if not file.is_file() or sha256(file) != record["sha256"]:
        raise DamageError(f"{file} does not match its checksum: {REMEDY}")
    config = _parse(record["sae"], folder / "sae.json")
    widths = record.get("inputs") or record["d_in"], record.get("targets") or None
    _check_shapes(config, widths, file)
    sae = config.build(widths[0], d_out=widths[1], ranks=ranks)
    tensors = sae.shards().read(file)
    if config.tied:
        tensors["W_enc"] = tensors["W_dec"]
    sae.load_state_dict(_with_training_state(tensors, sae.state_dict()))
    sae.row_norm = record.get("row_norm", "none")
    sae.eval()
    return sae.to(torch.device(device)), record["provenance"]


def _parse(settings: dict[str, Any], file: Path) -> SAEConfig:
    """Reads the settings of a saved SAE.

    Raises: SettingError, which says how the file of a part that is not of this package is named.
    """
    try:
        return SAEConfig.parse(settings, where=str(file))
    except SettingError as error:
        if error.setting.rpartition(".")[2] != "kind":
            raise
        remedy = (
            "a part of a study needs the file that registers it: "
            "saelab.load(folder, experiment='experiment.py'), or --experiment experiment.py; "
            f"else it is an {error.remedy}"
        )
        raise SettingError(error.setting, error.value, remedy) from None


def _check_shapes(config: SAEConfig, widths: tuple[Widths, Widths | None], file: Path) -> None:
    """Checks the tensors' shapes against the configuration before any memory is allocated.

    Raises: DamageError when they do not fit.
    """
    try:
        expected = config.shapes(*widths)
    except (RuntimeError, ArithmeticError, ValueError, TypeError) as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise DamageError(
            f"{file} does not fit an SAE of these sizes ({reason}): {REMEDY}"
        ) from None
    actual = read_shapes(file, DamageError, REMEDY)
    if config.tied:
        del expected["W_enc"]
    for name in sorted({*actual, *expected}):
        if actual.get(name) != expected.get(name) and computes(name):
            problem = f"{name} is {actual.get(name)}, not {expected.get(name)}"
            raise DamageError(f"{file} does not fit its configuration ({problem}): {REMEDY}")


def _with_training_state(tensors: dict[str, Tensor], own: dict[str, Tensor]) -> dict[str, Tensor]:
    """Returns the stored tensors; training state that does not fit this version's is replaced: an
    SAE that is loaded does without it.

    Args:
        tensors: as stored.
        own: of an SAE that was built anew.
    """
    training = {name: tensor for name, tensor in own.items() if not computes(name)}
    fitting = {
        name: tensor
        for name, tensor in tensors.items()
        if computes(name) or (name in own and tensor.shape == own[name].shape)
    }
    return training | fitting
