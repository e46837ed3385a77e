"""Models of many kinds: which are read, what their hook names give, and what is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import (
    CONTEXT,
    GROUPED,
    IDS,
    LAYERS,
    SIZES,
    VOCABULARY,
    WIDTH,
    built,
    llama,
    save,
    save_tokenizer,
)
from torch import Tensor
from transformers import PreTrainedModel

from saelab.data.activations.harvest import harvest
from saelab.data.devices import check_device
from saelab.data.language_model import LanguageModel, ModelConfig, load, size
from saelab.data.text.corpus import TextConfig
from saelab.data.text.tokens import Tokens, tokenize, tokenize_texts
from saelab.errors import SettingError, SourceError
from saelab.seeding import torch_stream

KINDS = ("hook_resid_pre", "hook_attn_out", "hook_mlp_out", "hook_resid_post")
OLD = IDS | {"hidden_size": WIDTH, "n_layer": LAYERS, "n_head": 2}

#: Families whose attention and MLP add to the stream, in sequence or in parallel.
ADDITIVE: dict[str, Callable[[], PreTrainedModel]] = {
    "bloom": lambda: built("BloomConfig", "BloomForCausalLM", **OLD),
    "mpt": lambda: built(
        *("MptConfig", "MptForCausalLM"),
        **IDS,
        d_model=WIDTH,
        n_layers=LAYERS,
        n_heads=2,
        expansion_ratio=2,
        max_seq_len=CONTEXT,
    ),
    "falcon, parallel": lambda: built("FalconConfig", "FalconForCausalLM", **SIZES, alibi=False),
    "opt": lambda: built(
        "OPTConfig", "OPTForCausalLM", **SIZES, ffn_dim=24, word_embed_proj_dim=WIDTH
    ),
    "phi": lambda: built("PhiConfig", "PhiForCausalLM", **SIZES),
    "olmo2": lambda: built("Olmo2Config", "Olmo2ForCausalLM", **GROUPED),
    "glm4": lambda: built("Glm4Config", "Glm4ForCausalLM", **GROUPED, head_dim=8),
    "gemma2": lambda: built("Gemma2Config", "Gemma2ForCausalLM", **GROUPED, head_dim=8),
    "gemma3": lambda: built("Gemma3TextConfig", "Gemma3ForCausalLM", **GROUPED, head_dim=8),
    "mixtral": lambda: built("MixtralConfig", "MixtralForCausalLM", **GROUPED, num_local_experts=2),
    "llama": llama,
    "codegen": lambda: built(
        *("CodeGenConfig", "CodeGenForCausalLM"),
        **IDS | {"n_embd": WIDTH, "n_layer": LAYERS, "n_head": 4},
        n_positions=CONTEXT,
        rotary_dim=4,
    ),
}
#: Families in which a norm follows each sum.
NORMED: dict[str, Callable[[], PreTrainedModel]] = {
    "roberta": lambda: built("RobertaConfig", "RobertaModel", **SIZES),
    "openai gpt, whose blocks return lists": lambda: built(
        *("OpenAIGPTConfig", "OpenAIGPTLMHeadModel"),
        **IDS | {"n_embd": WIDTH, "n_layer": LAYERS, "n_head": 2, "n_positions": CONTEXT},
    ),
    "distilbert": lambda: built(
        *("DistilBertConfig", "DistilBertModel"),
        vocab_size=VOCABULARY,
        dim=WIDTH,
        n_layers=LAYERS,
        n_heads=2,
        hidden_dim=24,
        max_position_embeddings=CONTEXT,
        pad_token_id=2,
    ),
}


def loaded(model: PreTrainedModel, folder: Path, **settings: Any) -> LanguageModel:
    return load(ModelConfig(path=str(save(model, folder)), **settings))


def ids(contexts: int = 2, positions: int = 11) -> Tensor:
    stream = torch_stream(0, "test ids")
    return torch.randint(3, VOCABULARY, (contexts, positions), generator=stream)


def of_block(lm: LanguageModel, n: int = 1) -> list[Tensor]:
    """The four tensors of a block, each from a pass of its own."""
    names = [f"blocks.{n}.{kind}" for kind in KINDS]
    return [lm.activations(ids(), None, [name])[name].clone() for name in names]


# ---------------------------------------------------------------- hook names


@pytest.mark.parametrize("family", ADDITIVE)
def test_attention_and_mlp_are_what_is_added_to_the_stream(tmp_path: Path, family: str) -> None:
    lm = loaded(ADDITIVE[family](), tmp_path)
    for n in range(LAYERS):
        before, attention, mlp, after = of_block(lm, n)
        torch.testing.assert_close(before + attention + mlp, after, rtol=1e-4, atol=1e-5)
        assert attention.norm() > 0.01 * after.norm() and mlp.norm() > 0.01 * after.norm()
        paths = [lm.block_runs[n].attention, lm.block_runs[n].mlp]
        assert "att" in paths[0] and not torch.equal(attention, mlp)


@pytest.mark.parametrize("family", ADDITIVE)
def test_several_hooks_of_a_pass_give_what_each_gives_alone(tmp_path: Path, family: str) -> None:
    """Falcon adds the attention to the output of its MLP in place."""
    lm = loaded(ADDITIVE[family](), tmp_path)
    names = [f"blocks.1.{kind}" for kind in KINDS]
    together = lm.activations(ids(), None, names)
    for name, alone in zip(names, of_block(lm), strict=True):
        assert torch.equal(together[name], alone), name


@pytest.mark.parametrize("family", ADDITIVE)
@pytest.mark.parametrize("kind", ["hook_attn_out", "hook_mlp_out"])
def test_a_splice_replaces_what_is_added(tmp_path: Path, family: str, kind: str) -> None:
    lm = loaded(ADDITIVE[family](), tmp_path)
    before, attention, mlp, _ = of_block(lm)
    other = mlp if kind == "hook_attn_out" else attention
    name, seen = f"blocks.1.{kind}", []
    handle = lm.blocks[1].register_forward_hook(lambda m, a, y: seen.append(y))
    lm.logits(ids(), None, {name: torch.zeros_like})
    handle.remove()
    after = seen[0][0] if isinstance(seen[0], tuple) else seen[0]
    if kind == "hook_mlp_out":  # nothing after it depends on it
        torch.testing.assert_close(after, before + other, rtol=1e-4, atol=1e-5)
    else:
        assert not torch.allclose(after, before + attention + other, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("family", ["llama", "gemma2", "olmo2", "bloom"])
def test_the_modules_do_not_depend_on_the_dtype(tmp_path: Path, family: str, dtype: str) -> None:
    folder = save(ADDITIVE[family](), tmp_path)
    full, half = (load(ModelConfig(path=str(folder), dtype=d)) for d in ("float32", dtype))
    assert full.block_runs == half.block_runs and full.block_runs[0].mlp


@pytest.mark.parametrize("family", NORMED)
def test_a_norm_may_follow_each_sum(tmp_path: Path, family: str) -> None:
    lm = loaded(NORMED[family](), tmp_path)
    before, attention, mlp, after = of_block(lm)
    block: Any = lm.blocks[1]
    if family == "roberta":
        first, second = block.attention.output.LayerNorm, block.output.LayerNorm
    elif family.startswith("openai"):
        first, second = block.ln_1, block.ln_2
        spliced = lm.logits(ids(), None, {"blocks.1.hook_resid_post": lambda x: x})
        assert torch.equal(spliced, lm.logits(ids()))
    else:
        first, second = block.sa_layer_norm, block.output_layer_norm
    torch.testing.assert_close(second(first(before + attention) + mlp), after)


def test_where_no_module_gives_the_summand_the_names_are_refused(tmp_path: Path) -> None:
    model = built("GraniteConfig", "GraniteForCausalLM", **GROUPED, residual_multiplier=0.22)
    lm = loaded(model, tmp_path)
    for kind in ("attn_out", "mlp_out"):
        with pytest.raises(SettingError, match="what is added to the stream") as caught:
            lm.activations(ids(), None, [f"blocks.1.hook_{kind}"])
        assert "model.layers.1.self_attn, model.layers.1.mlp" in str(caught.value)
    assert lm.activations(ids(), None, ["model.layers.1.mlp"])  # by the module's own name


def test_stored_activations_say_which_module_gave_them(tmp_path: Path) -> None:
    lm = loaded(ADDITIVE["gemma2"](), tmp_path)
    tokens = Tokens(ids(), torch.ones(2, 11, dtype=torch.bool))
    names = ["blocks.1.hook_mlp_out", "blocks.1.hook_resid_post"]
    sources = harvest(lm, tokens, names)
    assert sources[names[0]].header["hook_module"] == "post_feedforward_layernorm"
    assert "hook_module" not in sources[names[1]].header


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("model", "is BaseModelOutputWithPast, not a tensor: name another module"),
        ("model.layers.1.self_attn.q_proj", ""),
        ("model.rotary_emb", "has shape"),
    ],
)
def test_modules_without_a_tensor_are_refused(tmp_path: Path, name: str, message: str) -> None:
    lm = loaded(llama(), tmp_path)
    if not message:
        assert lm.activations(ids(), None, [name])[name].shape == (2, 11, WIDTH)
        return
    with pytest.raises(SettingError, match=f"hook_name = '{name}'.*{message}"):
        lm.activations(ids(), None, [name])


# ---------------------------------------------------------------- kinds of models

ENCODER_DECODER = {
    "t5": lambda: built(
        *("T5Config", "T5ForConditionalGeneration"),
        vocab_size=VOCABULARY,
        d_model=WIDTH,
        d_kv=8,
        d_ff=24,
        num_layers=LAYERS,
        num_heads=2,
        decoder_start_token_id=0,
    ),
    "t5 encoder": lambda: built(
        *("T5Config", "T5EncoderModel"),
        vocab_size=VOCABULARY,
        d_model=WIDTH,
        d_kv=8,
        d_ff=24,
        num_layers=LAYERS,
        num_heads=2,
    ),
    "bart": lambda: built(
        *("BartConfig", "BartForConditionalGeneration"),
        **IDS,
        d_model=WIDTH,
        encoder_layers=LAYERS,
        decoder_layers=LAYERS,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=24,
        decoder_ffn_dim=24,
        max_position_embeddings=CONTEXT,
        decoder_start_token_id=0,
    ),
}


@pytest.mark.parametrize("family", ENCODER_DECODER)
def test_encoder_decoder_models_are_refused(tmp_path: Path, family: str) -> None:
    folder = save(ENCODER_DECODER[family](), tmp_path)
    for read in (load, size):
        with pytest.raises(SourceError, match="is an encoder-decoder model.*: name a causal"):
            read(ModelConfig(path=str(folder)))


def test_a_head_that_sees_later_tokens_is_refused(tmp_path: Path) -> None:
    model = built("BertConfig", "BertLMHeadModel", **SIZES)
    with pytest.raises(SourceError, match="positions see later ones: set is_decoder to true"):
        loaded(model, tmp_path / "both ways")
    causal = built("BertConfig", "BertLMHeadModel", **SIZES, is_decoder=True)
    assert loaded(causal, tmp_path / "causal").has_head


def test_blocks_that_swap_contexts_and_positions_are_refused(tmp_path: Path) -> None:
    sizes = {"d_model": WIDTH, "n_layer": LAYERS, "n_head": 2, "d_inner": 24}
    model = built("XLNetConfig", "XLNetModel", **IDS, **sizes)
    with pytest.raises(SourceError, match=r"block 0 has an output of shape \[6, 2, 16\]"):
        loaded(model, tmp_path)


def gemma3(vision_layers: int, vision_width: int) -> PreTrainedModel:
    text = GROUPED | {"head_dim": 8, "sliding_window": 8}
    vision = {
        "hidden_size": vision_width,
        "num_hidden_layers": vision_layers,
        "num_attention_heads": 2,
        "intermediate_size": 24,
        "image_size": 28,
        "patch_size": 14,
    }
    return built(
        *("Gemma3Config", "Gemma3ForConditionalGeneration"),
        text_config=text,
        vision_config=vision,
        mm_tokens_per_image=4,
        image_token_index=VOCABULARY - 1,
        boi_token_index=VOCABULARY - 2,
        eoi_token_index=VOCABULARY - 3,
    )


@pytest.mark.parametrize(("layers", "width"), [(2, 16), (3, 64)])
def test_the_text_blocks_of_a_multimodal_model_are_read(
    tmp_path: Path, layers: int, width: int
) -> None:
    model = gemma3(layers, width)
    lm = loaded(model, tmp_path)
    assert lm.blocks is lm.model.get_submodule("model.language_model.layers")
    assert lm.has_head and (lm.n_layers, lm.d_model, lm.max_context) == (LAYERS, WIDTH, CONTEXT)
    before, attention, mlp, after = of_block(lm)
    torch.testing.assert_close(before + attention + mlp, after, rtol=1e-4, atol=1e-5)
    tokens = ids().clamp_max(VOCABULARY - 4)
    with torch.no_grad():
        logits = model(input_ids=tokens).logits
    expected = torch.nn.functional.cross_entropy(
        logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten(), reduction="none"
    )
    torch.testing.assert_close(lm.losses(tokens).flatten(), expected)
    assert size(lm.config).d_model == WIDTH


# ---------------------------------------------------------------- contexts


@pytest.mark.parametrize(
    ("family", "most"),
    [("roberta", CONTEXT - 3), ("opt", CONTEXT), ("distilbert", CONTEXT), ("mpt", CONTEXT)],
)
def test_the_longest_context_is_what_the_model_takes(
    tmp_path: Path, family: str, most: int
) -> None:
    lm = loaded((ADDITIVE | NORMED)[family](), tmp_path)
    name = "blocks.1.hook_resid_post"
    assert lm.max_context == most
    lm.check_context(most)
    assert lm.activations(ids(1, most), None, [name])[name].shape == (1, most, WIDTH)
    with pytest.raises(SettingError, match=f"context = {most + 1}: .*at most {most} positions"):
        lm.check_context(most + 1)


def test_a_limit_that_no_setting_names_is_found_before_a_harvest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lm = loaded(llama(), tmp_path)
    forward = lm.blocks[0].forward

    def limited(x: Tensor, *args: Any, **kwargs: Any) -> Any:
        if x.shape[1] > 9:
            raise IndexError("index out of range in self")
        return forward(x, *args, **kwargs)

    monkeypatch.setattr(lm.blocks[0], "forward", limited)
    lm.check_context(9)
    with pytest.raises(SettingError, match="context = 10: .*on so many positions.*lower the con"):
        lm.check_context(10)


# ---------------------------------------------------------------- tokenizer and vocabulary


def texts(tmp_path: Path, *words: str) -> TextConfig:
    file = tmp_path / "texts.jsonl"
    rows = [{"text": " ".join((*words, "w7", "w9") * n)} for n in range(1, 30)]
    file.write_text("\n".join(map(json.dumps, rows)))
    return TextConfig(kind="files", path=str(file), joined=False)


def test_a_padding_token_beyond_the_embeddings_is_replaced(tmp_path: Path) -> None:
    folder = save(llama(), tmp_path / "model")
    save_tokenizer(folder, VOCABULARY + 2, pad=f"w{VOCABULARY}")
    lm = load(ModelConfig(path=str(folder)))
    padded, attention, _ = tokenize_texts(["w7", "w7 w8 w9"], lm.tokenizer, 8)
    assert not attention.all() and int(padded.max()) < VOCABULARY
    name = "blocks.1.hook_resid_post"
    assert lm.activations(padded, attention, [name])[name].isfinite().all()
    tokens = tokenize(texts(tmp_path), lm.tokenizer, 12, 200)
    assert tokens.lengths is not None and harvest(lm, tokens, [name])[name].d == WIDTH


def test_tokens_that_the_model_does_not_have_are_named(tmp_path: Path) -> None:
    folder = save(llama(), tmp_path / "model", words=VOCABULARY + 1)
    lm = load(ModelConfig(path=str(folder)))
    tokens = tokenize(texts(tmp_path, f"w{VOCABULARY}"), lm.tokenizer, 12, 200)
    message = rf"token 'w{VOCABULARY}' \(id {VOCABULARY}\).*embeddings for {VOCABULARY} ids"
    with pytest.raises(SourceError, match=message):
        harvest(lm, tokens, ["blocks.1.hook_resid_post"])
    with pytest.raises(SourceError, match=message):
        lm.losses(tokens.ids[:1])


def test_a_model_without_the_token_that_begins_a_context_is_refused(tmp_path: Path) -> None:
    folder = save(llama(), tmp_path / "model", words=VOCABULARY + 1)
    file = folder / "tokenizer_config.json"
    settings = json.loads(file.read_text()) | {"bos_token": f"w{VOCABULARY}"}
    file.write_text(json.dumps(settings))
    with pytest.raises(SourceError, match=rf"bos_token 'w{VOCABULARY}' with the id {VOCABULARY}"):
        load(ModelConfig(path=str(folder)))


# ---------------------------------------------------------------- config.json and weights


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"intermediate_size": 20},
            r"0\.mlp\.down_proj\.weight has the shape \[16, 24\] in its files, and \[16, 20\]",
        ),
        (
            {"vocab_size": 60},
            r"(lm_head|embed_tokens)\.weight has the shape \[64, 16\].*\[60, 16\]",
        ),
        ({"num_hidden_layers": 2}, r"has 2 layers, but its files hold one more \(.*layers\.2\."),
        ({"num_hidden_layers": 4}, r"lacks \d+ weights"),
        ({"attention_bias": True}, r"lacks \d+ weights"),
    ],
)
def test_weights_that_the_settings_do_not_describe_are_refused(
    tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    folder = save(llama(), tmp_path)
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    with pytest.raises(SourceError, match=message) as caught:
        load(ModelConfig(path=str(folder)))
    assert "\n" not in str(caught.value)


def test_a_bias_that_would_be_left_out_is_refused_and_a_mask_is_not(tmp_path: Path) -> None:
    folder = save(llama(), tmp_path)
    weights = load_file(folder / "model.safetensors")
    extras = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}
    save_file(weights | extras, folder / "model.safetensors", {"format": "pt"})
    assert load(ModelConfig(path=str(folder))).n_layers == LAYERS
    extras = {"model.layers.0.self_attn.q_proj.bias": torch.ones(16)}
    save_file(weights | extras, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(SourceError, match=r"q_proj\.bias, which its config.json does not describe"):
        load(ModelConfig(path=str(folder)))


def test_the_body_of_a_model_with_another_head_is_read(tmp_path: Path) -> None:
    lm = loaded(built("BertConfig", "BertForMaskedLM", **SIZES), tmp_path)
    assert not lm.has_head and lm.n_layers == LAYERS


# ---------------------------------------------------------------- devices


@pytest.mark.parametrize("name", ["mps", "xpu", "meta", "cuda:99", "cpu:3", "gpu", "", "cpu:x"])
def test_devices_that_can_not_be_used_are_refused(name: str) -> None:
    with pytest.raises(SettingError, match=f"model.device = '{name}': .*'?cpu"):
        check_device(name)
    check_device("cpu")
