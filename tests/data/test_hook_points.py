"""The input of an MLP, inputs of modules by their path, and splices at several hook points."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from saelab.data.hook_names import blocks_before, blocks_run
from saelab.data.language_model import LanguageModel, ModelConfig, load
from saelab.errors import SettingError
from tests.data.test_language_model import FAMILIES, randomised, save, some_ids

HOOK_IN, HOOK_OUT = "blocks.1.mlp.hook_in", "blocks.1.hook_mlp_out"


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> dict[str, LanguageModel]:
    root = tmp_path_factory.mktemp("models")
    return {
        name: load(ModelConfig(path=str(save(randomised(build), root / name))))
        for name, build in FAMILIES.items()
    }


@pytest.mark.parametrize("family", ["neox", "gpt2", "llama", "gemma2"])
def test_the_mlps_output_is_computed_from_the_hooks_input(
    loaded: dict[str, LanguageModel], family: str
) -> None:
    lm, ids = loaded[family], some_ids()
    found = lm.activations(ids, None, [HOOK_IN, HOOK_OUT])
    x, y = found[HOOK_IN].clone(), found[HOOK_OUT].clone()
    seen: list[torch.Tensor] = []
    with torch.no_grad():
        handle = lm.blocks[1].mlp.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
        lm.model(ids)
        handle.remove()
        assert torch.equal(x, seen[0])  # the module's own input
        made = lm.blocks[1].mlp(x)
        if family == "gemma2":  # its output is normed before it is added
            made = lm.blocks[1].post_feedforward_layernorm(made)
    torch.testing.assert_close(made, y)
    assert not torch.allclose(x, y)
    module = "mlp" if family != "gemma2" else "post_feedforward_layernorm"
    assert lm.hook_identity(HOOK_IN) == {"hook_module": "mlp"}
    assert lm.hook_identity(HOOK_OUT) == {"hook_module": module}


def test_berts_last_layer_is_not_its_mlp(loaded: dict[str, LanguageModel]) -> None:
    with pytest.raises(SettingError, match=r"no module of this block has the MLP's input: name "):
        loaded["bert"].activations(some_ids(), None, [HOOK_IN])
    name = "encoder.layer.1.intermediate.input"  # which the remedy leads to
    x = loaded["bert"].activations(some_ids(), None, [name])[name]
    assert x.shape == (*some_ids().shape, loaded["bert"].d_model)


def test_the_input_of_any_module_has_a_name(loaded: dict[str, LanguageModel]) -> None:
    lm, ids = loaded["llama"], some_ids()
    path = "model.layers.1.mlp.down_proj"
    names = [f"{path}.input", f"{path}.output", path, "model.layers.1.mlp.input", HOOK_IN]
    found = lm.activations(ids, None, names)
    inner, out = found[names[0]].clone(), found[names[1]].clone()
    assert inner.shape[-1] == 24 and out.shape[-1] == lm.d_model
    with torch.no_grad():
        torch.testing.assert_close(lm.blocks[1].mlp.down_proj(inner), out)
    assert torch.equal(found[path], out) and torch.equal(found[names[3]], found[HOOK_IN])
    with pytest.raises(SettingError, match=r"did you mean 'model.layers.1.mlp'"):
        lm.activations(ids, None, ["model.layers.1.mpl.input"])


def test_a_module_that_is_called_output_stays_a_module(loaded: dict[str, LanguageModel]) -> None:
    lm, name = loaded["bert"], "encoder.layer.1.output"
    assert lm.hook_point(name).module is lm.blocks[1].output


def test_how_far_a_pass_runs() -> None:
    assert blocks_run(HOOK_IN, 3) == 2 and blocks_before(HOOK_IN) == 1
    assert blocks_run("model.layers.1.mlp.input", 3) == 3
    assert blocks_before("model.layers.1.mlp.input") == 0


@pytest.mark.parametrize("family", ["neox", "gemma2"])
def test_several_splices_of_one_pass(loaded: dict[str, LanguageModel], family: str) -> None:
    lm, ids = loaded[family], some_ids()
    first, last = "blocks.0.hook_mlp_out", "blocks.2.hook_mlp_out"
    halves = {first: lambda x: 0.5 * x, last: torch.zeros_like}
    both = lm.losses(ids, None, halves)
    start = lm.start(ids, None, HOOK_OUT)
    assert start is not None
    alone = [lm.losses(ids, None, {name: function}) for name, function in halves.items()]
    assert not any(torch.equal(both, one) for one in (*alone, lm.losses(ids)))

    handles = [
        lm.hook_point(name).module.register_forward_hook(lambda m, a, y, f=function: f(y))
        for name, function in halves.items()
    ]
    by_hand = lm.losses(ids)
    for handle in handles:
        handle.remove()
    assert torch.equal(both, by_hand)
    later = {HOOK_OUT: lambda x: 0.5 * x, last: torch.zeros_like}
    assert torch.equal(lm.losses(ids, None, later, start), lm.losses(ids, None, later))


def test_the_embedded_models_mlp_has_an_input(tmp_path: Path) -> None:
    lm = load(ModelConfig())
    found = lm.activations(torch.arange(5, 13)[None], None, [HOOK_IN, HOOK_OUT])
    assert {tuple(x.shape) for x in found.values()} == {(1, 8, lm.d_model)}
