"""SAELens' transcoders: four architectures, with and without a threshold and a skip connection.

    transcoder, skip_transcoder                      W_enc [d_in, d_sae], W_dec [d_sae, d_out],
    jumprelu_transcoder, jumprelu_skip_transcoder    b_enc, b_dec [d_out], threshold [d_sae],
                                                     W_skip [d_out, d_in]

Nothing is subtracted from the input: SAELens refuses apply_b_dec_to_input for them.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from saelab.data.hook_names import describe_hooks, split_hooks
from saelab.errors import SettingError
from saelab.formats.base import MATRICES, Plain, take
from saelab.sae import SAE

JUMPRELU, SKIP, TRANSCODER = "jumprelu_", "skip_", "transcoder"
ARCHITECTURES = tuple(f"{j}{s}{TRANSCODER}" for j in ("", JUMPRELU) for s in ("", SKIP))
#: Fields of a transcoder alone; those of an attention head stay refused.
FIELDS = ("d_out", "hook_name_out", "hook_layer_out", "hf_hook_name_out")


def without_fields(architecture: str, values: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the fields that are treated as those of any SAE."""
    own = FIELDS if architecture in ARCHITECTURES else ()
    return {name: value for name, value in values.items() if name not in own}


def read(tensors: Mapping[str, Tensor], fields: Mapping[str, Any], where: Path) -> Plain:
    """Reads a transcoder's tensors.

    Raises: SettingError for a field that no transcoder has, SourceError for other tensors.
    """
    architecture, config = str(fields["architecture"]), where.parent / "cfg.json"
    for name, unused in (("apply_b_dec_to_input", False), ("normalize_activations", "none")):
        if fields.get(name, unused) != unused:
            remedy = f"is not read of a transcoder: only {unused!r} is"
            raise SettingError(f"{config}: {name}", fields[name], remedy)
    jumprelu, skip = architecture.startswith(JUMPRELU), SKIP in architecture
    further = (*(["threshold"] if jumprelu else []), *(["W_skip"] if skip else []))
    tensors = take(tensors, (*MATRICES, *further), where)
    w_enc, b_enc, w_dec, b_dec = (tensors[name] for name in MATRICES)
    plain = Plain(
        *(w_enc.mT, b_enc, w_dec, b_dec),
        centre=False,
        threshold=tensors.get("threshold"),
        target=True,
        W_skip=tensors.get("W_skip"),
    )
    if fields.get("d_out", plain.d_out) != plain.d_out:
        raise SettingError(f"{config}: d_out", fields["d_out"], f"the weights have {plain.d_out}")
    return plain


def hooks(metadata: Mapping[str, Any]) -> str:
    """Returns the hook points of an SAE or a transcoder as `describe_hooks` names them."""
    names = [str(metadata.get(name) or "") for name in ("hook_name", "hook_name_out")]
    return describe_hooks(*([name] if name else [] for name in names))


def check_writable(sae: SAE) -> None:
    """Raises: SettingError for what SAELens has no form of."""
    several = len(sae.dims.input_blocks) > 1 or len(sae.dims.targets) > 1
    if several:
        blocks = sae.dims.input_blocks + sae.dims.targets
        remedy = "SAELens 6.54 has no SAE of several hook points: it stays in saelab's own format"
        raise SettingError("hook points", len(blocks), remedy)


def architecture(plain: Plain) -> str:
    """Returns the architecture of a transcoder.

    Raises: SettingError for TopK, which SAELens has no transcoder of.
    """
    if plain.k is not None:
        remedy = "SAELens 6.54 has no TopK transcoder: train BatchTopK or JumpReLU"
        raise SettingError("k", plain.k, remedy)
    jumprelu = JUMPRELU if plain.threshold is not None else ""
    return f"{jumprelu}{SKIP if plain.W_skip is not None else ''}{TRANSCODER}"


def config(plain: Plain) -> dict[str, Any]:
    """Returns the fields in which a transcoder's cfg.json differs from an SAE's."""
    return {"d_out": plain.d_out, "apply_b_dec_to_input": False} if plain.target else {}


def metadata(hook_text: str) -> dict[str, Any]:
    """Returns the metadata that name the hook points."""
    inputs, targets = split_hooks(hook_text)
    out = {"hook_name_out": targets[0]} if targets else {}
    return {"hook_name": ", ".join(inputs) or None, **out}
