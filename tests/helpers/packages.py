"""Installed packages that hold files, and tiny language models as GGUF files."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import tiny_models
import torch
from transformers import PreTrainedModel

#: Sizes at which every matrix has rows of whole blocks, and llama.cpp's order of rows matters.
SIZES = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "tie_word_embeddings": True,
    "vocab_size": 260,
    "bos_token_id": 256,
    "eos_token_id": 257,
    "pad_token_id": 257,
}


def install(root: Path, name: str, files: Mapping[str, bytes], version: str = "1.0") -> Path:
    """An installed package, which must not be imported; returns its folder in `root`."""
    folder, record = root / name, root / f"{name}-{version}.dist-info"
    content = {f"{name}/__init__.py": b"raise RuntimeError('was imported')"}
    content |= {f"{name}/{place}": data for place, data in files.items()}
    content[f"{record.name}/METADATA"] = (
        f"Metadata-Version: 2.1\nName: {name.replace('_', '-')}\nVersion: {version}\n"
        "Requires-Dist: llama-cpp-python\n"
    ).encode()
    for place, data in content.items():
        (root / place).parent.mkdir(parents=True, exist_ok=True)
        (root / place).write_bytes(data)
    lines = [f"{place},," for place in content]
    (record / "RECORD").write_text("\n".join(lines) + "\n")
    return folder


def tiny_llama() -> PreTrainedModel:
    return tiny_models.llama(**SIZES)


def write_gguf(
    model: PreTrainedModel, file: Path, permute: bool = True, storage: str = "F32"
) -> None:
    """Writes a Llama model as llama.cpp's converter does, and puts what it stored into the model.

    Args:
        permute: whether the rows of queries and keys are reordered, as llama.cpp has them.
        storage: type of the matrices.
    """
    import gguf

    kind, config = gguf.GGMLQuantizationType[storage], model.config
    writer = gguf.GGUFWriter(file, "llama")
    _write_settings(writer, config)
    for name, weight in model.named_parameters():
        values = weight.detach().numpy().copy()
        heads = _heads(name, config)
        if heads and permute:
            values = to_llama_cpp(values, heads)
        if values.ndim == 1 or storage == "F32":
            writer.add_tensor(_gguf_name(name), values)
            continue
        blocks = gguf.quantize(values, kind)
        writer.add_tensor(_gguf_name(name), blocks, raw_dtype=kind)
        read = torch.from_numpy(gguf.dequantize(blocks, kind).copy())
        if heads and permute:
            read = torch.from_numpy(from_llama_cpp(read.numpy(), heads))
        with torch.no_grad():
            weight.copy_(read)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def to_llama_cpp(rows: np.ndarray, heads: int) -> np.ndarray:
    """Pairs each row of the first half of a head with one of the second half."""
    halves = rows.reshape(heads, 2, rows.shape[0] // heads // 2, -1)
    return np.ascontiguousarray(halves.swapaxes(1, 2).reshape(rows.shape))


def from_llama_cpp(rows: np.ndarray, heads: int) -> np.ndarray:
    pairs = rows.reshape(heads, rows.shape[0] // heads // 2, 2, -1)
    return np.ascontiguousarray(pairs.swapaxes(1, 2).reshape(rows.shape))


def _heads(name: str, config: Any) -> int:
    """Heads of a matrix whose rows llama.cpp reorders, 0 for all others."""
    if ".q_proj." in name:
        return config.num_attention_heads
    return config.num_key_value_heads if ".k_proj." in name else 0


def _gguf_name(name: str) -> str:
    for old, new in (
        ("model.embed_tokens", "token_embd"),
        ("model.norm", "output_norm"),
        ("model.layers", "blk"),
        ("self_attn.q_proj", "attn_q"),
        ("self_attn.k_proj", "attn_k"),
        ("self_attn.v_proj", "attn_v"),
        ("self_attn.o_proj", "attn_output"),
        ("mlp.gate_proj", "ffn_gate"),
        ("mlp.up_proj", "ffn_up"),
        ("mlp.down_proj", "ffn_down"),
        ("post_attention_layernorm", "ffn_norm"),
        ("input_layernorm", "attn_norm"),
    ):
        name = name.replace(old, new)
    return name


def _write_settings(writer: Any, config: Any) -> None:
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    writer.add_name("Tiny")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(10_000.0)
    writer.add_vocab_size(config.vocab_size)
    letters = bytes_to_unicode()
    tokens = [letters[byte] for byte in range(256)]
    tokens += ["<|start|>", "<|end|>", "ĠĠ", "he"]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(tokens)
    writer.add_token_types([1] * 256 + [3, 3, 1, 1])
    writer.add_token_merges(["Ġ Ġ", "h e"])
    writer.add_bos_token_id(config.bos_token_id)
    writer.add_eos_token_id(config.eos_token_id)
    writer.add_pad_token_id(config.pad_token_id)
