"""Files of language models, checked and hashed before they are loaded."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from saelab.config import digest
from saelab.errors import SourceError
from saelab.runtime.counting import count
from saelab.storage.atomic import parse_json, sha256
from saelab.storage.safetensors_file import read_shapes

#: Endings of architecture names that have a next-token head.
HEADS = ("ForCausalLM", "LMHeadModel")
#: The ending for models of images and text, whose head is found by the type of their settings.
MULTIMODAL = "ForConditionalGeneration"
#: Fields of a model's config.json that are numbers of blocks or experts, and their limit.
COUNTS = ("num_hidden_layers", "num_experts", "num_local_experts", "n_routed_experts")
MOST_PARTS = 1024
#: Endings of files in a model's folder that nothing reads: weights in other formats, texts about
#: the model.
UNREAD = (
    *(".bin", ".ckpt", ".gguf", ".h5", ".msgpack", ".onnx", ".ot", ".pickle", ".pkl", ".pt"),
    *(".pth", ".tflite", ".md"),
)
#: Weights in the blocks of older files that models compute themselves: masks and rotations; and the
#: scales of a quantised cache, which is never used.
UNUSED = re.compile(r"(inv_freq|masked_bias|(attn|attention)\.bias|\.[kv]_scale)$")


def read_settings(
    name: str, location: str, revision: str | None
) -> tuple[Any, Any, dict[str, Any]]:
    """Reads a model's settings; returns them, the model's class, and options for all readers.

    Args:
        name: `ModelConfig.path`.
        location: result of `model_location.locate_model`.
        revision: of a model on the hub.

    Raises: SourceError for a kind of model that is not supported.
    """
    from transformers import AutoConfig

    options: dict[str, Any] = {"trust_remote_code": False}
    if revision is not None:
        options["revision"] = revision
    settings = AutoConfig.from_pretrained(location, **options)
    check_counts(settings)
    check_kind(settings, name)
    return settings, _model_class(settings), options


def _model_class(settings: Any) -> Any:
    """Returns the class of transformers that builds the model with its head, if it has one."""
    import transformers
    from transformers.models.auto import modeling_auto

    names = getattr(settings, "architectures", None) or []
    if any(name.endswith(HEADS) for name in names):
        return transformers.AutoModelForCausalLM
    multimodal = type(settings) in modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING
    if multimodal and any(name.endswith(MULTIMODAL) for name in names):
        return transformers.AutoModelForImageTextToText
    return transformers.AutoModel


def check_counts(settings: Any) -> None:
    """Checks the numbers of blocks and experts, so that building the model ends.

    Raises: SourceError for a number beyond the limit.
    """
    text = settings.get_text_config()
    for name in COUNTS:
        value = getattr(text, name, None)
        if value is not None and not (isinstance(value, int) and 0 < value <= MOST_PARTS):
            problem = f"{name} = {repr(value)[:40]}, and from 1 to {MOST_PARTS} are read"
            raise SourceError(f"config.json of the model has {problem}: fix it")


def check_kind(settings: Any, name: str) -> None:
    """Checks that a model is one stack of blocks that reads tokens.

    Raises: SourceError for an encoder-decoder model, whose decoder reads other tokens than its
        encoder, and whose blocks see both.
    """
    kind = (getattr(settings, "architectures", None) or [settings.model_type])[0]
    usual = False  # of a stack alone, which has no class of its own
    if not kind.endswith(HEADS):
        with suppress(Exception):  # most settings have defaults
            usual = bool(type(settings)().is_encoder_decoder)
    if usual or getattr(settings, "is_encoder_decoder", False):
        raise SourceError(
            f"model {name} ({kind}) is an encoder-decoder model, and its two stacks read different "
            "tokens: name a causal language model or a text encoder"
        )


def check_loaded_weights(name: str, info: Mapping[str, Any], blocks: str, layers: int) -> None:
    """Compares the weights in the files of a model with those that its config.json describes.

    Args:
        name: of the model.
        info: what transformers says of the loading: its missing, unexpected and mismatched keys.
        blocks: path of the list of blocks in the model.
        layers: number of blocks.

    Raises: SourceError for a weight that is missing, has another shape, or belongs to a block but
        is not used.
    """
    remedy = "complete its folder or download it again"
    for key, stored, described in sorted(info["mismatched_keys"]):
        shapes = f"{list(stored)} in its files, and {list(described)} by its config.json"
        raise SourceError(f"model {name}: the weight {key} has the shape {shapes}: {remedy}")
    missing = sorted(key for key in info["missing_keys"] if "pooler" not in key)
    if missing:
        raise SourceError(
            f"model {name} lacks {len(missing)} weights (the first is {missing[0]!r}): {remedy}"
        )
    block = re.compile(rf"(?:^|\.){re.escape(blocks.rpartition('.')[2])}\.(\d+)\.")
    for key in sorted(info["unexpected_keys"]):
        match = block.search(key)
        if match is None or UNUSED.search(key):
            continue
        if int(match[1]) >= layers:
            problem = (
                f"config.json has {count(layers, 'layer')}, but its files hold one more ({key})"
            )
        else:
            problem = f"its files hold the weight {key}, which its config.json does not describe"
        raise SourceError(f"model {name}: {problem}: {remedy}")


def fit_tokenizer(tokenizer: Any, rows: int | None, name: str) -> None:
    """Gives the tokenizer a padding token that the model has an embedding for.

    Args:
        tokenizer: changed where its padding id lies beyond the embeddings.
        rows: number of ids that the model has embeddings for.
        name: of the model.

    Raises: SourceError when the model has no embedding for the token that begins a context or ends
        a document.
    """
    if rows is None:
        return
    for kind in ("bos_token", "eos_token", "cls_token", "sep_token"):
        number = getattr(tokenizer, f"{kind}_id")
        if number is not None and number >= rows:
            token = f"{kind} {getattr(tokenizer, kind)!r} with the id {number}"
            raise SourceError(
                f"model {name} has embeddings for {rows} ids, but its tokenizer has the {token}: "
                "take the tokenizer that it was trained with, or enlarge its embeddings"
            )
    if tokenizer.pad_token_id is not None and tokenizer.pad_token_id >= rows:
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.sep_token or tokenizer.bos_token


def check_stored_weights(model_class: Any, settings: Any, folder: Path) -> None:
    """Compares the number of weights in a folder with its config.json.

    Weights that are only described would otherwise be allocated.

    Raises: SourceError when the files hold less than half of the described weights.
    """
    with torch.device("meta"):
        expected = sum(weight.numel() for weight in model_class.from_config(settings).parameters())
    remedy = "complete its folder or download it again"
    files = sorted(folder.glob("*.safetensors"))
    sizes = [
        math.prod(s) for file in files for s in read_shapes(file, SourceError, remedy).values()
    ]
    if sizes and expected > 2 * sum(sizes):  # tied weights are stored once
        problem = f"config.json describes {expected:,} weights, and its files hold {sum(sizes):,}"
        raise SourceError(f"model {folder}: {problem}: {remedy}")


def folder_digest(folder: Path) -> str:
    """Returns a content hash of the files that decide the model's numbers, wherever they are.

    These are the weights and all other files at the top of the folder, whatever their names, since
    a tokenizer may read any of them; not hidden files and those that end as in `UNREAD`.
    """
    top = {file for file in folder.glob("[!.]*") if file.is_file() and file.suffix not in UNREAD}
    files = sorted(top | _indexed_weights(folder))
    names = [file.relative_to(folder).as_posix() for file in files]
    sizes = [file.stat().st_size for file in files]
    return digest(list(zip(names, sizes, map(sha256, files), strict=True)))


def _indexed_weights(folder: Path) -> set[Path]:
    """Returns the files of weights that the folder's index names, also those in subfolders."""
    index = folder / "model.safetensors.index.json"
    try:
        names = set(parse_json(index)["weight_map"].values())
    except (OSError, ValueError, TypeError, KeyError, AttributeError):  # it has none that is read
        return set()
    return {folder / name for name in names if (folder / name).is_file()}


def load_error(name: str, location: str, error: Exception) -> SourceError:
    """Returns an error of a library that could not load a model as one sentence with the remedy.

    Args:
        name: `ModelConfig.path`.
        location: result of `model_location.locate_model`.
        error: raised by the library.
    """
    reason = (str(error).strip() or type(error).__name__).splitlines()[0]
    if Path(location).is_dir():
        remedy = "its folder needs config.json, tokenizer files and weights as .safetensors"
    else:
        remedy = "check its name; where the hub is not reached, name a local folder instead"
    return SourceError(f"model {name} can't be loaded ({reason}): {remedy}")
