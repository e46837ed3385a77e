"""A trained SAE on disk: `sae.safetensors` (all tensors, running state included) and `sae.json`.

The JSON holds format, d_in, configuration, provenance, the checksum of the tensors and a digest of
itself; it is written last, so a folder with it is complete.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from saelab.errors import DamageError, SourceError
from saelab.files import read_json, read_sealed, sha256, write_atomically, write_sealed
from saelab.sae import SAE, SAEConfig

FORMAT = 1


def save(sae: SAE, folder: Path, provenance: dict[str, Any]) -> None:
    """Writes the SAE; `provenance` is plain JSON data (model, hook_name, context, seed ...)."""
    tensors = {
        name: tensor.detach().cpu().contiguous() for name, tensor in sae.state_dict().items()
    }
    if sae.config.tied:  # one matrix, stored once
        del tensors["W_enc"]
    file = folder / "sae.safetensors"
    write_atomically(file, lambda temporary: save_file(tensors, temporary))
    record = {
        "format": FORMAT,
        "d_in": sae.d_in,
        "sae": sae.config.model_dump(mode="json"),
        "provenance": provenance,
        "sha256": sha256(file),
    }
    write_sealed(folder / "sae.json", record)


def load(folder: Path, device: str = "cpu") -> tuple[SAE, dict[str, Any]]:
    """The SAE in evaluation mode, and its provenance.

    Raises: SourceError when the folder holds no SAE, DamageError when the bytes do not match.
    """
    folder = Path(folder)
    if not (folder / "sae.json").is_file():
        raise SourceError(f"{folder} holds no sae.json: name the folder of a saved SAE")
    found = read_json(folder / "sae.json").get("format")
    if found != FORMAT:
        raise SourceError(f"{folder} has format {found!r}, this version reads {FORMAT}")
    record = read_sealed(folder / "sae.json")
    file = folder / "sae.safetensors"
    if not file.is_file() or sha256(file) != record["sha256"]:
        raise DamageError(f"{file} does not match its checksum: train the cell again")
    sae = SAEConfig.parse(record["sae"]).build(int(record["d_in"]))
    try:
        tensors = load_file(file)
        if sae.config.tied and "W_dec" in tensors:
            tensors["W_enc"] = tensors["W_dec"]
        sae.load_state_dict(tensors)
    except (SafetensorError, RuntimeError) as error:
        raise DamageError(f"{file} does not fit its configuration ({error})") from None
    sae.eval()
    return sae.to(torch.device(device)), record["provenance"]
