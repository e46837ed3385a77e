"""A trained SAE on disk: `sae.safetensors` (all tensors, running state included) and `sae.json`.

The JSON holds format, d_in, configuration, provenance, the checksum of the tensors and a digest of
itself; it is written last, so a folder with it is complete. How many ranks wrote it does not show,
and any number of them reads it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from saelab.config import digest
from saelab.errors import DamageError, SourceError
from saelab.files import read_json, sha256, write_atomically, write_json
from saelab.ranks import ALONE, Ranks
from saelab.sae import SAE, SAEConfig
from saelab.shards import read_shard, write_shards

FORMAT = 1


def save(sae: SAE, folder: Path, provenance: dict[str, Any]) -> None:
    """Writes the SAE; `provenance` is plain JSON data (model, hook_name, context, seed ...).

    The ranks of one SAE call it together.
    """
    tensors: dict[str, Tensor] = dict(sae.state_dict())
    if sae.config.tied:  # one matrix, stored once
        del tensors["W_enc"]
    file = folder / "sae.safetensors"
    if sae.ranks.alone:
        tensors = {name: t.detach().cpu().contiguous() for name, t in tensors.items()}
        write_atomically(file, lambda temporary: save_file(tensors, temporary))
    else:
        write_shards(file, tensors, sae.per_latent(), sae.d_sae, sae.ranks)
    sae.ranks.on_first(lambda: _write_record(sae, folder, file, provenance))


def _write_record(sae: SAE, folder: Path, file: Path, provenance: dict[str, Any]) -> None:
    record = {
        "format": FORMAT,
        "d_in": sae.d_in,
        "sae": sae.config.model_dump(mode="json"),
        "provenance": provenance,
        "sha256": sha256(file),
    }
    write_json(folder / "sae.json", record | {"digest": digest(record)})


def load(folder: Path, device: str = "cpu", ranks: Ranks = ALONE) -> tuple[SAE, dict[str, Any]]:
    """The SAE in evaluation mode, each rank with its own latents, and its provenance.

    Raises: SourceError when the folder holds no SAE, DamageError when the bytes do not match.
    """
    folder = Path(folder)
    if not (folder / "sae.json").is_file():
        raise SourceError(f"{folder} holds no sae.json: name the folder of a saved SAE")
    record = read_json(folder / "sae.json")
    if record.get("format") != FORMAT:
        raise SourceError(
            f"{folder} has format {record.get('format')!r}, this version reads {FORMAT}"
        )
    if record.pop("digest", None) != digest(record):
        raise DamageError(f"{folder / 'sae.json'} was changed after it was written: train again")
    file = folder / "sae.safetensors"
    if not file.is_file() or sha256(file) != record["sha256"]:
        raise DamageError(f"{file} does not match its checksum: train the cell again")
    sae = SAEConfig.parse(record["sae"]).build(int(record["d_in"]), ranks=ranks)
    try:
        tensors = read_shard(file, sae.per_latent(), sae.d_sae, ranks)
        if sae.config.tied and "W_dec" in tensors:
            tensors["W_enc"] = tensors["W_dec"]
        sae.load_state_dict(tensors)
    except (SafetensorError, RuntimeError) as error:
        raise DamageError(f"{file} does not fit its configuration ({error})") from None
    sae.eval()
    return sae.to(torch.device(device)), record["provenance"]
