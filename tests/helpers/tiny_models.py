"""Tiny random language models of many families, saved as transformers saves them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer
from tokenizers import models as tokenizer_models
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from saelab.data.language_model import LanguageModel, ModelConfig
from saelab.seeding import torch_stream

VOCABULARY, WIDTH, LAYERS, CONTEXT = 64, 16, 3, 24
IDS = {"vocab_size": VOCABULARY, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}
SIZES = IDS | {
    "hidden_size": WIDTH,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "max_position_embeddings": CONTEXT,
}
GROUPED = SIZES | {"num_key_value_heads": 1}


def built(config_name: str, model_name: str, **settings: Any) -> PreTrainedModel:
    """A model with every weight, norms included, drawn from a stream of its own."""
    config = getattr(transformers, config_name)(**settings)
    with torch.random.fork_rng():
        model = getattr(transformers, model_name)(config)
    stream = torch_stream(0, "tiny model")
    with torch.no_grad():
        for weight in model.parameters():
            weight.copy_(0.3 * torch.randn(weight.shape, generator=stream))
    return model.eval()


def save(model: PreTrainedModel, folder: Path, words: int = VOCABULARY) -> Path:
    """The model's folder with a tokenizer of so many words, the last of which may be unknown to
    the model."""
    model.save_pretrained(folder)
    save_tokenizer(folder, words)
    return folder


def save_tokenizer(folder: Path, words: int = VOCABULARY, pad: str = "<pad>") -> None:
    names = ["<s>", "</s>", "<pad>", *(f"w{i}" for i in range(3, words))]
    ids = {name: i for i, name in enumerate(names)}
    inner = Tokenizer(tokenizer_models.WordLevel(ids, "<pad>"))
    inner.pre_tokenizer = WhitespaceSplit()
    special = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": pad}
    PreTrainedTokenizerFast(tokenizer_object=inner, **special).save_pretrained(folder)


def llama(**settings: Any) -> PreTrainedModel:
    return built("LlamaConfig", "LlamaForCausalLM", **{**GROUPED, **settings})


def tiny_neox(width: int, inner: int, spread: float, layers: int = 3) -> LanguageModel:
    """A GPT-NeoX of 20 words, with weights of this spread; its BOS is w0, its EOS w1."""
    settings = transformers.GPTNeoXConfig(
        vocab_size=20,
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=2,
        intermediate_size=inner,
        max_position_embeddings=16,
    )
    with torch.random.fork_rng():
        network = transformers.GPTNeoXForCausalLM(settings).eval()
    stream = torch_stream(0, "test weights")
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.copy_(spread * torch.randn(parameter.shape, generator=stream))
    words = Tokenizer(tokenizer_models.WordLevel({f"w{i}": i for i in range(20)}, "w0"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, bos_token="w0", eos_token="w1")
    return LanguageModel(network, tokenizer, ModelConfig(path="tiny"), "0123", has_head=True)
