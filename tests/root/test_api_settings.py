"""The functions of the API take settings in any of their forms."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import saelab
from saelab.errors import SettingError, SourceError
from saelab.seeding import torch_stream

TOML = """\
activations = "{folder}"
[sae]
d_sae = 32
[train]
tokens = 256
batch_size = 64
[evaluation]
tokens = 128
"""


@pytest.fixture
def toml(tmp_path: Path) -> Path:
    folder = tmp_path / "activations"
    folder.mkdir()
    for i in range(2):
        x = torch.randn(512, 8, generator=torch_stream(i, "test rows"))
        save_file({"x": x}, folder / f"{i}.safetensors")
    file = tmp_path / "x.toml"
    file.write_text(TOML.format(folder=folder))
    return file


def as_dict(file: Path) -> dict[str, Any]:
    return saelab.settings(file).model_dump(mode="json")


def test_a_path_a_dict_and_settings_give_the_same_sae(toml: Path, tmp_path: Path) -> None:
    forms: list[Any] = [saelab.settings(toml), str(toml), toml, as_dict(toml)]
    saes = [saelab.train(form, cache=tmp_path) for form in forms]
    assert all(torch.equal(sae.W_enc, saes[0].W_enc) for sae in saes)
    scores = [saelab.evaluate(saes[0], form, ["core"], cache=tmp_path) for form in forms]
    assert all(one == scores[0] for one in scores) and scores[0]["explained_variance"] < 1


@pytest.mark.parametrize("base", [None, 3, ["x.toml"], b"x.toml"])
def test_anything_else_is_one_sentence(base: Any) -> None:
    message = "base = '.*': give settings: .*the path of a TOML file, or a dict"
    for call in (
        lambda: saelab.train(base),
        lambda: saelab.evaluate(None, base, ["core"]),  # type: ignore[arg-type]
        lambda: saelab.compare(base, {"A": {}}),
    ):
        with pytest.raises(SettingError, match=message):
            call()


def test_what_is_wrong_in_them_is_named(tmp_path: Path) -> None:
    with pytest.raises(SettingError, match="sae.d_say = 3: .*did you mean 'd_sae'"):
        saelab.train({"sae": {"d_say": 3}})
    with pytest.raises(SourceError, match="nowhere.toml"):
        saelab.train(str(tmp_path / "nowhere.toml"))


@pytest.mark.parametrize("device", ["mps", "xpu", "meta"])
def test_a_device_that_torch_can_not_use_here_is_one_sentence(toml: Path, device: str) -> None:
    base = saelab.settings(toml, {"model.device": device})
    with pytest.raises(SettingError, match=f"model.device = '{device}': .*use 'cpu'"):
        saelab.train(base)
