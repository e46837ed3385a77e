"""An SAE is used where it was trained: what Python functions refuse, and what lets them go on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import saelab
from saelab.errors import MismatchError
from saelab.formats.own import load as load_own
from saelab.origin import Origin, origin_of
from saelab.sae import SAE, SAEConfig
from saelab.study.plan import BaseConfig

HOOK, OTHER = "blocks.2.hook_resid_post", "blocks.1.hook_resid_post"
D_SAE = 64
SMALL = {
    "train.tokens": 2048,
    "train.batch_size": 256,
    "evaluation.tokens": 4096,
    "sae.d_sae": D_SAE,
}


@pytest.fixture(scope="module")
def base() -> BaseConfig:
    return saelab.settings({}, SMALL)


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def trained(base: BaseConfig, cache: Path) -> SAE:
    return saelab.train(base, cache=cache)


def moved(sae: SAE, **origin: Any) -> SAE:
    """The SAE as one that says that it is from elsewhere."""
    twin = SAEConfig.parse(sae.config).build(sae.d_in)
    twin.load_state_dict(sae.state_dict())
    twin.origin = Origin(**origin)
    return twin.eval()


def test_a_trained_sae_knows_where_and_says_so(trained: SAE, tmp_path: Path) -> None:
    assert trained.origin == Origin("embedded", HOOK)
    assert f"trained at {HOOK} of embedded" in repr(trained)
    trained.save(tmp_path / "own")
    again = saelab.load(tmp_path / "own")
    assert again.origin == trained.origin
    trained.save(tmp_path / "named", {"model": "mine", "note": 1})
    assert saelab.load(tmp_path / "named").origin == Origin("mine", HOOK)


def test_peculiarities_survive_our_own_format(trained: SAE, tmp_path: Path) -> None:
    odd = moved(trained, model="embedded", hook_name=HOOK, peculiarities=("is half of one",))
    odd.save(tmp_path)
    assert load_own(tmp_path).origin == odd.origin


@pytest.mark.parametrize(
    ("origin", "words"),
    [
        (
            {"model": "embedded", "hook_name": OTHER},
            f"was trained at {OTHER}, but hook_name = {HOOK}",
        ),
        (
            {"model": "gpt2", "hook_name": HOOK},
            "was trained on the model gpt2, but model.path = emb",
        ),
        ({"peculiarities": ("is half of one",)}, "the SAE is half of one"),
    ],
)
def test_python_functions_refuse_another_place(
    trained: SAE, base: BaseConfig, cache: Path, origin: dict[str, Any], words: str
) -> None:
    sae, where = moved(trained, **origin), {"cache": cache}
    remedy = "use it where it was trained, or set allow_mismatch=True"
    for call in (
        lambda **more: saelab.evaluate(sae, base, ["core"], **where, **more),
        lambda **more: saelab.evaluate(saelab.LeaveOneOut(sae), base, ["core"], **where, **more),
        lambda **more: saelab.latent(sae, 3, base, examples=1, **where, **more),
        lambda **more: saelab.attach("embedded", sae, HOOK, **more).__enter__(),
    ):
        with pytest.raises(MismatchError, match=words) as caught:
            call()
        assert remedy in str(caught.value) and "\n" not in str(caught.value)
    with saelab.attach("embedded", sae, HOOK, allow_mismatch=True) as inside:
        assert inside.hook == HOOK
    odd = saelab.evaluate(sae, base, ["core"], allow_mismatch=True, **where)
    plain = saelab.evaluate(trained, base, ["core"], **where)
    assert dict(odd) == dict(plain)
    assert words.removeprefix("the SAE ") in odd.mismatch and odd.mismatch in repr(odd)
    assert plain.mismatch == "" and "the SAE" not in repr(plain)
    assert saelab.latent(sae, 3, base, examples=1, allow_mismatch=True, **where)


def test_attach_takes_the_hook_point_from_the_sae_by_any_of_its_names(trained: SAE) -> None:
    with saelab.attach("embedded", trained) as inside:
        assert inside.hook == HOOK
        model = inside.model
    block = next(name for name, module in model.model.named_modules() if module is model.blocks[2])
    with saelab.attach(model, trained, block) as inside:  # another name of the same place
        assert inside.hook == block
    with pytest.raises(MismatchError, match="hook_name"), saelab.attach(model, trained, OTHER):
        pass


def test_what_has_no_origin_is_taken_anywhere(base: BaseConfig, cache: Path) -> None:
    sae = SAEConfig.parse({"d_sae": D_SAE}).build(192)
    torch.nn.init.normal_(sae.W_enc)
    assert origin_of(sae) == origin_of(object()) == Origin()
    assert saelab.evaluate(sae.eval(), base, ["core"], cache=cache).mismatch == ""
