"""An SAE inside a model: the bits of the evaluation's splice, edits, gradients, generation, and
clean removal."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from tiny_models import (
    GROUPED,
    IDS,
    SIZES,
    VOCABULARY,
    WIDTH,
    built,
    llama,
    save_tokenizer,
)
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedModel

import saelab
from saelab.analysis.attach import Attached
from saelab.data.activations.store import MemorySource, Shard
from saelab.data.language_model import LanguageModel, ModelConfig, load
from saelab.data.text.tokens import counted_positions
from saelab.errors import MismatchError, SettingError
from saelab.evals.core_data import CoreData, reconstruct
from saelab.evals.splices import splice_counted
from saelab.sae import SAE, SAEConfig
from saelab.seeding import torch_stream

HOOK, LAST = "blocks.1.hook_resid_post", "blocks.2.hook_resid_post"
INTO_MLP, OUT_OF_MLP = "blocks.1.mlp.hook_in", "blocks.1.hook_mlp_out"
D_SAE = 48
TEXT = "w5 w9 w11 w30 w7 w8"
PARTS: dict[str, dict[str, Any]] = {
    "topk": {"activation": {"kind": "topk", "k": 6}},
    "relu": {"activation": "relu"},
    "jumprelu": {"activation": "jumprelu"},
    "scaled": {"activation": "relu", "scaling": {"kind": "variance"}},
    "context": {
        "activation": {"kind": "tied_threshold", "beta": 0.5, "learned": ["theta", "beta"]},
        "constraints": ["unit_norm"],
    },
}


def sae_of(width: int, kind: str = "topk", d_out: int | None = None, skip: bool = False) -> SAE:
    """An SAE with weights of a stream of its own."""
    settings = {"d_sae": D_SAE, "losses": ["reconstruction"], "controllers": []} | PARTS[kind]
    if skip:
        settings |= {"skip": True}
    sae = SAEConfig.parse(settings).build(width, d_out=d_out)
    stream = torch_stream(0, "test attach", kind)
    with torch.no_grad():
        for weight in (sae.W_enc, sae.W_dec, sae.b_enc, sae.b_dec, sae.W_skip):
            if weight is not None:
                weight.copy_(0.4 * torch.randn(weight.shape, generator=stream))
        sae.scale.fill_(1.7)
    return sae.eval()


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("tokenizer")
    save_tokenizer(folder)
    return AutoTokenizer.from_pretrained(folder)


@pytest.fixture
def model() -> PreTrainedModel:
    return llama()


@pytest.fixture(scope="module")
def embedded() -> LanguageModel:
    return load(ModelConfig())


def random_ids(contexts: int = 3, positions: int = 12) -> Tensor:
    stream = torch_stream(1, "test attach")
    ids = torch.randint(3, VOCABULARY, (contexts, positions), generator=stream)
    ids[:, 0] = 0
    return ids


def logits(model: Any, ids: Tensor) -> Tensor:
    with torch.no_grad():
        return model(ids).logits


def bits_of_hooks(model: PreTrainedModel) -> list[int]:
    """Number of hooks of each module."""
    return [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()]


@pytest.mark.parametrize("kind", PARTS)
def test_the_replaced_activation_has_the_bits_of_the_evaluation(
    embedded: LanguageModel, kind: str
) -> None:
    """The losses of `CoreData`, which loss recovered is computed from, on held-out contexts."""
    ids = torch.randint(3, 400, (40, 24), generator=torch_stream(2, "test attach"))
    ids[:, 0] = embedded.tokenizer.bos_token_id or 0
    mask = counted_positions(ids, embedded.tokenizer)
    assert not mask[:, 0].any() and mask.sum() > 800
    x = embedded.activations(ids, None, [HOOK])[HOOK].float()
    data = CoreData(MemorySource([Shard(x, mask, ids.int())], {"hook_name": HOOK}), embedded, 40)
    sae = sae_of(embedded.d_model, kind)
    wanted = data.spliced_losses(sae, with_kl=False).ce
    with saelab.attach(embedded, sae, HOOK, error=False):
        actual = torch.cat([embedded.losses(part).cpu() for part in ids.split(32)])
    assert torch.equal(actual, wanted)
    assert not torch.equal(actual, data.reference_tokens["ce_clean"])


def transcoder_logits(model: LanguageModel, sae: SAE, ids: Tensor) -> Tensor:
    """Logits with the transcoder's reconstruction in the splice of the language model."""
    mask = counted_positions(ids, model.tokenizer)
    x = model.activations(ids, None, [INTO_MLP])[INTO_MLP]
    y_hat = torch.cat([y for _, y, _ in reconstruct(sae, x[mask].float(), None)])

    def splice(y: Tensor) -> Tensor:
        out = y.clone()
        out[mask] = y_hat
        return out

    return model.logits(ids, splice={OUT_OF_MLP: splice})


@pytest.mark.parametrize("skip", [False, True])
def test_a_transcoder_reads_at_one_hook_and_replaces_at_its_target(
    model: PreTrainedModel, tokenizer: Any, skip: bool
) -> None:
    sae, ids = sae_of(WIDTH, d_out=WIDTH, skip=skip), random_ids()
    clean = logits(model, ids)
    whole = LanguageModel(model, tokenizer, ModelConfig(path="tiny"), "", has_head=True)
    wanted = transcoder_logits(whole, sae, ids)
    places = {"target": OUT_OF_MLP, "tokenizer": tokenizer}
    with saelab.attach(model, sae, INTO_MLP, error=False, **places):
        assert torch.equal(logits(model, ids), wanted)
    with saelab.attach(model, sae, INTO_MLP, **places) as inside:
        assert torch.equal(logits(model, ids), clean)
        inside.add(3, 2.0)
        assert not torch.equal(logits(model, ids), clean)
    assert not torch.equal(wanted, clean) and torch.equal(logits(model, ids), clean)


@pytest.mark.parametrize("kind", PARTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_with_the_error_the_logits_are_those_of_the_model_bit_for_bit(
    tokenizer: Any, kind: str, dtype: torch.dtype
) -> None:
    """Also where the pass is computed and recorded, and with an edit that changes nothing."""
    model, ids = llama().to(dtype), random_ids()
    clean, hooks = logits(model, ids), bits_of_hooks(model)
    with saelab.attach(model, sae_of(WIDTH, kind), HOOK, tokenizer=tokenizer) as inside:
        assert torch.equal(logits(model, ids), clean)
        assert torch.equal(model(ids).logits, clean)  # with gradients
        inside.record = True
        inside.scale(3, 1.0)
        assert torch.equal(logits(model, ids), clean)
        assert bits_of_hooks(model) != hooks
    assert torch.equal(logits(model, ids), clean) and bits_of_hooks(model) == hooks


def test_an_exception_inside_removes_it_too(model: PreTrainedModel, tokenizer: Any) -> None:
    ids, hooks = random_ids(), bits_of_hooks(model)
    clean = logits(model, ids)
    with (
        pytest.raises(ZeroDivisionError),
        saelab.attach(model, sae_of(WIDTH), HOOK, error=False, tokenizer=tokenizer),
    ):
        assert not torch.equal(logits(model, ids), clean)
        _ = 1 / 0
    with pytest.raises(SettingError), saelab.attach(model, sae_of(WIDTH), "blocks.9.hook_mlp_out"):
        pass
    assert bits_of_hooks(model) == hooks and torch.equal(logits(model, ids), clean)


@pytest.fixture
def inside(model: PreTrainedModel, tokenizer: Any) -> Iterator[Attached]:
    with saelab.attach(model, sae_of(WIDTH), HOOK, tokenizer=tokenizer) as attached:
        yield attached


def stream_after(inside: Attached, ids: Tensor) -> Tensor:
    """The activation as the next block gets it."""
    seen: list[Tensor] = []
    handle = inside.model.blocks[2].register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(args[0] if args else kwargs["hidden_states"]),
        with_kwargs=True,
    )
    logits(inside.model.model, ids)
    handle.remove()
    return seen[0]


def test_codes_of_a_text_are_those_of_its_activations(inside: Attached) -> None:
    result = inside.codes(TEXT)
    assert [token.strip() for token in result.tokens] == ["<s>", *TEXT.split()]
    x = inside.model.activations(result.ids[None], None, [HOOK])[HOOK][0].float()
    wanted = inside.sae.encode(x)
    assert not result.code[0].any()
    torch.testing.assert_close(result.code[1:], wanted[1:])
    assert ((result.code[1:] != 0).sum(1) <= 6).all()


EDITS = [
    ("add", lambda inside, at: inside.add(7, 3.0, at), lambda f: f + 3),
    ("set", lambda inside, at: inside.set(7, 3.0, at), lambda f: torch.full_like(f, 3)),
    ("scale", lambda inside, at: inside.scale(7, -2.0, at), lambda f: -2 * f),
    ("ablate", lambda inside, at: inside.ablate(7, at), torch.zeros_like),
]


@pytest.mark.parametrize(
    ("edit", "change"), [case[1:] for case in EDITS], ids=[e[0] for e in EDITS]
)
@pytest.mark.parametrize(
    ("at", "places"),
    [
        (None, range(1, 12)),
        (4, [4]),
        (slice(5, 9, 2), [5, 7]),
        ([2, 3], [2, 3]),
        (slice(8, None), range(8, 12)),
    ],
    ids=["all", "one", "slice", "several", "rest"],
)
def test_an_edit_moves_the_stream_along_the_decoder_row(
    model: PreTrainedModel, tokenizer: Any, edit: Any, change: Any, at: Any, places: Any
) -> None:
    """By its change of the code, at its positions and nowhere else."""
    sae, ids = sae_of(WIDTH, "relu"), random_ids()
    with saelab.attach(model, sae, HOOK, tokenizer=tokenizer) as inside:
        before = stream_after(inside, ids)
        edit(inside, at)
        after = stream_after(inside, ids)
        inside.clear()
        assert torch.equal(stream_after(inside, ids), before)
    f = sae.encode(before.flatten(0, 1)).view(3, 12, D_SAE)[..., 7]
    assert bool((f != 0).any())
    moved = torch.zeros(12, dtype=torch.bool)
    moved[list(places)] = True
    added = (change(f) - f)[..., None] * (sae.W_dec[7] * sae.scale)
    wanted = torch.where(moved[:, None], before + added, before)
    torch.testing.assert_close(after, wanted.detach(), rtol=1e-4, atol=1e-4)
    assert torch.equal(after[:, ~moved], before[:, ~moved])
    with saelab.attach(model, sae, HOOK, tokenizer=tokenizer, error=False) as inside:
        edit(inside, at)
        replaced = stream_after(inside, ids)
    changed = sae.encode(before.flatten(0, 1)).view(3, 12, D_SAE)
    changed[:, moved, 7] = change(changed[:, moved, 7])
    wanted = sae.decode(changed.flatten(0, 1)).view(before.shape)
    torch.testing.assert_close(replaced[:, 1:], wanted[:, 1:], rtol=1e-4, atol=1e-4)
    assert torch.equal(replaced[:, 0], before[:, 0])


@pytest.mark.parametrize("cache", [True, False])
@pytest.mark.parametrize("error", [True, False])
def test_generation_is_the_same_with_and_without_the_cache(
    model: PreTrainedModel, tokenizer: Any, error: bool, cache: bool
) -> None:
    """With the cache each step sees the new position alone; edits are counted from the start."""
    with saelab.attach(model, sae_of(WIDTH), HOOK, tokenizer=tokenizer, error=error) as inside:
        plain = inside.generate(TEXT, 12)
        inside.add(7, 6.0, slice(8, None)).scale(2, 0.5)
        steered = inside.generate(TEXT, 12, cache=cache)
        ids = inside.encode_text(TEXT)
        for _ in range(12):  # the whole text again for each token
            ids = torch.cat([ids, logits(model, ids)[:, -1:].argmax(-1)], dim=1)
            if int(ids[0, -1]) == 1:
                break
        assert steered == tokenizer.decode(ids[0, 1:], skip_special_tokens=True)
    assert plain.startswith(TEXT) and steered.startswith(TEXT)
    assert plain != steered


def test_padding_on_the_left_is_left_alone(model: PreTrainedModel, tokenizer: Any) -> None:
    ids = random_ids(2, 6)
    ids[0, :3] = torch.tensor([2, 2, 0])
    attention = (ids != 2).long()
    options = {"attention_mask": attention, "max_new_tokens": 4, "do_sample": False}
    with saelab.attach(model, sae_of(WIDTH), HOOK, tokenizer=tokenizer, error=False):
        texts = [model.generate(ids, use_cache=c, pad_token_id=2, **options) for c in (True, False)]
    assert torch.equal(*texts)


def test_a_code_that_follows_the_context_refuses_the_cache(
    model: PreTrainedModel, tokenizer: Any
) -> None:
    sae = sae_of(WIDTH, "context")
    assert sae.needs_contexts
    with saelab.attach(model, sae, HOOK, tokenizer=tokenizer, error=False) as inside:
        ids = inside.encode_text(TEXT)
        with pytest.raises(SettingError, match="use_cache=False"):
            model.generate(ids, max_new_tokens=3, use_cache=True, do_sample=False)
        assert inside.generate(TEXT, 3).startswith(TEXT)


@pytest.mark.parametrize("kind", ["topk", "relu", "jumprelu", "scaled"])
def test_gradients_go_through_the_sae(tokenizer: Any, kind: str) -> None:
    """To the embeddings, as finite differences measure it; weights of the SAE get none."""
    model, sae = llama().requires_grad_(False), sae_of(WIDTH, kind)
    embeds = model.get_input_embeddings()(random_ids(1, 6)).detach()
    direction = torch.randn(embeds.shape, generator=torch_stream(3, "test attach"))
    direction /= direction.norm()

    def value(x: Tensor) -> Tensor:
        return model(inputs_embeds=x).logits[0, -1].log_softmax(-1)[5]

    with saelab.attach(model, sae, HOOK, error=False):
        x = embeds.clone().requires_grad_()
        value(x).backward()
        assert x.grad is not None
        slope = float((x.grad * direction).sum())
        step = 2e-3
        with torch.no_grad():
            rise = float(value(embeds + step * direction) - value(embeds - step * direction))
    assert abs(slope) > 1e-3
    assert rise / (2 * step) == pytest.approx(slope, rel=0.05, abs=2e-3)
    assert all(weight.grad is None for weight in sae.parameters())
    assert all(weight.requires_grad for weight in (sae.W_enc, sae.W_dec))


def test_attribution_is_the_slope_of_an_edit(inside: Attached) -> None:
    """f * slope of each latent and position, as a small scaling of it measures."""
    ids = inside.encode_text(TEXT)

    def metric(logits: Tensor) -> Tensor:
        return logits[-1].float().log_softmax(-1)[9]

    scores = inside.attribution(TEXT, metric)
    assert scores.code.shape == (7, D_SAE) and not scores.code[0].any()
    strongest = scores.code.abs().flatten().topk(5).indices.tolist()
    for position, latent in (divmod(i, D_SAE) for i in strongest):
        ends = []
        for by in (1.01, 0.99):
            inside.clear().scale(latent, by, position)
            ends.append(float(metric(logits(inside.model.model, ids)[0])))
        slope = (ends[0] - ends[1]) / 0.02
        assert slope == pytest.approx(float(scores.code[position, latent]), rel=0.03, abs=1e-3)
    with pytest.raises(SettingError, match="metric"):
        inside.attribution(TEXT, lambda logits: logits[-1])


def test_several_at_once(model: PreTrainedModel, tokenizer: Any) -> None:
    """Two SAEs and a transcoder: each alone is undone by itself, and all act together."""
    ids, options = random_ids(), {"tokenizer": tokenizer, "error": False}
    first, second, between = sae_of(WIDTH), sae_of(WIDTH, "relu"), sae_of(WIDTH, d_out=WIDTH)
    clean = logits(model, ids)
    with saelab.attach(model, first, HOOK, **options):
        one = logits(model, ids)
        with (
            saelab.attach(model, between, INTO_MLP, target=OUT_OF_MLP, **options),
            saelab.attach(model, second, LAST, **options) as last,
        ):
            every = logits(model, ids)
            x = last.codes(TEXT)
        assert torch.equal(logits(model, ids), one)
    with saelab.attach(model, second, LAST, **options) as alone:
        assert not torch.equal(alone.codes(TEXT).code, x.code)  # those before it change its input
        assert not torch.equal(logits(model, ids), every)
    assert torch.equal(logits(model, ids), clean) and not torch.equal(one, clean)


def test_two_on_one_hook_point_act_in_their_order(model: PreTrainedModel, tokenizer: Any) -> None:
    sae = sae_of(WIDTH, "relu")
    with (
        saelab.attach(model, sae, HOOK, tokenizer=tokenizer) as first,
        saelab.attach(model, sae, HOOK, tokenizer=tokenizer) as second,
    ):
        before = [one.codes(TEXT).code for one in (first, second)]
        assert torch.equal(*before)
        first.add(7, 5.0)
        assert torch.equal(first.codes(TEXT).code, before[0])
        assert not torch.equal(second.codes(TEXT).code, before[1])


ERRORS: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"hook": "blocks.1.hook_resid_pots"}, SettingError, "did you mean 'hook_resid_post'"),
    ({"hook": "block.1.hook_resid_post"}, SettingError, "did you mean 'blocks.1.hook_resid_post'"),
    ({"hook": "blocks.7.hook_resid_post"}, SettingError, "the model has 3 layers"),
    ({"hook": None}, SettingError, "name the hook point"),
    ({"sae": sae_of(8)}, MismatchError, "has 8 channels, but the activations at .* have 16"),
    ({"target": OUT_OF_MLP}, SettingError, "reconstructs its input: leave it out"),
    ({"sae": sae_of(WIDTH, d_out=WIDTH)}, SettingError, "is a transcoder of 1 target"),
    ({"model": 3}, SettingError, "give a transformers model"),
]


@pytest.mark.parametrize(("changed", "kind", "words"), ERRORS, ids=[e[2][:24] for e in ERRORS])
def test_bad_input_is_one_sentence(
    tokenizer: Any, changed: dict[str, Any], kind: type[Exception], words: str
) -> None:
    given = {"model": llama(), "sae": sae_of(WIDTH), "hook": HOOK, "tokenizer": tokenizer}
    with pytest.raises(kind, match=words) as caught, saelab.attach(**(given | changed)):
        pass
    assert "\n" not in str(caught.value)


def test_bad_edits_are_one_sentence(inside: Attached) -> None:
    for edit, words in (
        (lambda: inside.add(D_SAE, 1.0), "latent = 48: the SAE has 48 latents, .* the last is 47"),
        (lambda: inside.ablate(-1), "latent = -1"),
        (lambda: inside.set(3, float("nan")), "finite number"),
        (lambda: inside.add(3, 1.0, -1), "count positions from 0"),
        (lambda: inside.add(3, 1.0, slice(-2, None)), "count positions from 0"),
        (lambda: inside.code, "run the model first"),
        (lambda: inside.generate(TEXT, 60), "the model takes 24 positions"),
    ):
        with pytest.raises(SettingError, match=words):
            edit()
    assert not inside.edits


def test_a_target_before_the_hook_is_refused(model: PreTrainedModel, tokenizer: Any) -> None:
    sae, places = sae_of(WIDTH, d_out=WIDTH), {"target": "blocks.0.hook_mlp_out"}
    with (
        saelab.attach(model, sae, INTO_MLP, tokenizer=tokenizer, **places),
        pytest.raises(SettingError, match="reaches it before"),
    ):
        logits(model, random_ids())


FAMILIES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "GPT-2": (
        "GPT2Config",
        "GPT2LMHeadModel",
        IDS | {"n_embd": WIDTH, "n_layer": 3, "n_head": 2, "n_positions": 24},
    ),
    "OPT": (
        "OPTConfig",
        "OPTForCausalLM",
        SIZES | {"ffn_dim": 24, "word_embed_proj_dim": WIDTH, "do_layer_norm_before": True},
    ),
    "Gemma 3, sliding windows": (
        "Gemma3TextConfig",
        "Gemma3ForCausalLM",
        GROUPED
        | {
            "head_dim": 8,
            "sliding_window": 4,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        },
    ),
    "Qwen 3": ("Qwen3Config", "Qwen3ForCausalLM", GROUPED | {"head_dim": 8}),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_models_of_other_families(tokenizer: Any, family: str) -> None:
    config, name, settings = FAMILIES[family]
    model, sae, ids = built(config, name, **settings), sae_of(WIDTH), random_ids()
    clean = logits(model, ids)
    with saelab.attach(model, sae, HOOK, tokenizer=tokenizer) as inside:
        assert torch.equal(logits(model, ids), clean)
        inside.add(7, 6.0, slice(8, None))
        texts = [inside.generate(TEXT, 10, cache) for cache in (True, False)]
        assert texts[0] == texts[1]
    with saelab.attach(model, sae, HOOK, tokenizer=tokenizer, error=False) as inside:
        mask = counted_positions(ids, tokenizer)
        splice = splice_counted(
            lambda x, starts: torch.cat([y for _, y, _ in reconstruct(sae, x, starts)]), mask
        )
        replaced = logits(model, ids)
    assert torch.equal(replaced, inside.model.logits(ids, splice={HOOK: splice}))
    assert torch.equal(logits(model, ids), clean) and not torch.equal(replaced, clean)


def test_a_part_of_the_model_may_run_by_itself(model: PreTrainedModel, tokenizer: Any) -> None:
    """The counted positions are those of the ids of the pass, whatever ran before; embeddings have
    no special tokens."""
    ids, sae = random_ids(), sae_of(WIDTH)
    other = ids.flip(1)
    embeds = model.get_input_embeddings()(ids).detach()
    with saelab.attach(model, sae, HOOK, tokenizer=tokenizer) as inside, torch.no_grad():
        inside.record = True
        for run, first in (
            (lambda: model(ids), False),
            (lambda: model.base_model(other), True),
            (lambda: model(input_ids=ids), False),
            (lambda: model(inputs_embeds=embeds), True),
            (lambda: model.base_model(input_ids=ids), False),
            (lambda: model.base_model(inputs_embeds=embeds), True),
        ):
            run()
            assert bool(inside.code[:, 0].any()) is first
            assert bool(inside.code[:, 1:-1].any())


def test_after_its_block_it_says_so(model: PreTrainedModel, tokenizer: Any) -> None:
    with saelab.attach(model, sae_of(WIDTH), HOOK, tokenizer=tokenizer) as inside:
        before = inside.codes(TEXT).code
        assert not inside.codes("").code.any() and len(inside.codes("").code) == 1
        with pytest.raises(SettingError, match="has no token that counts"):
            inside.attribution("", lambda logits: logits[-1, 3])
    assert bool(before.any())
    for call in (inside.codes, inside.generate):
        with pytest.raises(SettingError, match="use it inside its with block"):
            call(TEXT)


def test_the_mode_of_each_module_stays(model: PreTrainedModel, tokenizer: Any) -> None:
    model.train()
    model.lm_head.eval()
    modes = [module.training for module in model.modules()]
    with saelab.attach(model, sae_of(WIDTH).train(), HOOK, tokenizer=tokenizer) as inside:
        assert inside.sae.training and bool(inside.codes(TEXT).code.any())
        assert [module.training for module in model.modules()] == modes
    assert [module.training for module in model.modules()] == modes


def test_a_nested_one_may_bring_the_tokenizer(model: PreTrainedModel, tokenizer: Any) -> None:
    sae = sae_of(WIDTH)
    with (
        saelab.attach(model, sae, HOOK, error=False) as first,
        saelab.attach(model, sae, LAST, tokenizer=tokenizer) as second,
    ):
        assert second.codes(TEXT).code.shape == (7, D_SAE)
        with pytest.raises(SettingError, match="tokenizer"):
            first.codes(TEXT)


def test_a_text_needs_a_tokenizer_and_ids_do_not(model: PreTrainedModel) -> None:
    with saelab.attach(model, sae_of(WIDTH), HOOK) as inside:
        inside.record = True
        logits(model, random_ids())
        assert inside.code.shape == (3, 12, D_SAE) and bool(inside.code[:, 0].any())
        with pytest.raises(SettingError, match="tokenizer"):
            inside.codes(TEXT)
