"""SAEs that normalise each row: read, written, trained further and measured as a whole."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from saes import D_IN, D_SAE, N, clear, random_weights, rows, same, trained, write
from test_saelens import LINEAR, WEIGHTS, config, decoded, relu, topk
from torch import Tensor

from saelab import checkpoint, formats
from saelab.errors import SettingError
from saelab.evals import latent_examples
from saelab.evals.core import CoreData, measure_reconstruction
from saelab.row_norm import normalise_rows, restore_rows
from saelab.sae import SAE


def layer_norm(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    mean, spread = x.mean(1, keepdim=True), x.std(1, keepdim=True)
    return (x - mean) / (spread + 1e-5), spread, mean


def constant_norm(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    length = x.norm(dim=1, keepdim=True) / D_IN**0.5
    return x / length, length, torch.zeros_like(length)


NORMS = {"layer_norm": layer_norm, "constant_norm_rescale": constant_norm}


def normed(kind: str = "layer_norm") -> SAE:
    """An SAE as a reader leaves it."""
    sae = trained(activation={"kind": "topk", "k": 3}, centre=True)
    sae.row_norm = "layer_norm" if kind == "layer_norm" else "norm"
    return sae


@pytest.mark.parametrize("architecture", ["standard", "topk"])
@pytest.mark.parametrize("kind", list(NORMS))
@pytest.mark.parametrize("centre", [True, False])
def test_it_is_read_written_and_read_again(
    kind: str, architecture: str, centre: bool, tmp_path: Path, global_random_seed: int
) -> None:
    more = {"k": 3} if architecture == "topk" else {}
    cfg = config(architecture, normalize_activations=kind, apply_b_dec_to_input=centre, **more)
    tensors = random_weights(global_random_seed, *LINEAR)
    write(tmp_path / "a", cfg, WEIGHTS, tensors)
    formats.saver("saelens")(formats.load(tmp_path / "a").sae, tmp_path / "b", {})
    for name in ("a", "b"):
        sae = formats.load(tmp_path / name).sae
        x = clear(sae, rows(global_random_seed))
        assert len(x) > N // 2
        u, factor, mean = NORMS[kind](x)
        shift = tensors["b_dec"] if centre else torch.zeros(D_IN)
        f = {"standard": relu, "topk": topk}[architecture](u - shift + tensors["b_dec"], tensors)
        assert 0 < float((f > 0).float().mean()) < 1
        same(sae.encode(x), f)
        same(sae.complete(sae.decode(f), x), decoded(f, tensors) * factor + mean)
        for part, code in sae.codes(x):
            same(code.dense(), f[part])


@pytest.mark.parametrize("kind", ["none", "layer_norm", "norm"])
def test_what_was_taken_is_given_back(kind: Any, global_random_seed: int) -> None:
    x = torch.cat([rows(global_random_seed), torch.zeros(1, D_IN), torch.full((1, D_IN), 3.0)])
    u = normalise_rows(x, kind)
    assert bool(u.isfinite().all())
    assert torch.allclose(restore_rows(u, x, kind), x, rtol=1e-4, atol=1e-5)
    if kind != "none":
        assert torch.allclose(u[:N].norm(dim=1), u[0].norm(), rtol=1e-4)
    if kind == "none":
        assert u is x and restore_rows(u, x, kind) is u


def test_other_saes_take_nothing_from_the_row() -> None:
    x_hat = torch.randn(3, D_IN)
    assert trained().complete(x_hat, rows(0)[:3]) is x_hat


def test_it_trains_on_normalised_rows_and_is_stored(tmp_path: Path) -> None:
    sae, x = normed(), rows(1)
    p = sae(x)
    same(p.target * sae.scale, normalise_rows(x, "layer_norm"))
    same(p.recon.detach() * sae.scale, sae.decode(sae.encode(x)))
    checkpoint.save(sae, tmp_path / "a", {})
    again, _ = checkpoint.load(tmp_path / "a")
    assert again.row_norm == "layer_norm"
    assert torch.equal(again.encode(x), sae.encode(x))
    checkpoint.save(trained(), tmp_path / "b", {})
    assert "row_norm" not in (tmp_path / "b" / "sae.json").read_text()
    assert checkpoint.load(tmp_path / "b")[0].row_norm == "none"


@pytest.mark.parametrize("dense", [True, False])
@pytest.mark.parametrize("kind", list(NORMS))
def test_the_error_is_that_of_the_whole_reconstruction(kind: str, dense: bool) -> None:
    sae, x = normed(kind), rows(1)
    subject: Any = sae
    if dense:
        names = ("d_in", "d_sae", "encode", "decode", "complete")
        subject = SimpleNamespace(**{name: getattr(sae, name) for name in names})
    shard = SimpleNamespace(
        rows=lambda: (x, torch.arange(N)), ids=None, mask=torch.ones(1, N), documents=None
    )
    source: Any = SimpleNamespace(shard=lambda _: shard, n_shards=1, header={"hook_name": "h"})
    measured = measure_reconstruction(subject, CoreData(source, None))
    u, factor, mean = NORMS[kind](x)
    x_hat = sae.decode(topk_code(sae, u)) * factor + mean
    same(measured.error, (x - x_hat).square().sum(1))


def topk_code(sae: SAE, u: Tensor) -> Tensor:
    """The code of rows that are normalised already."""
    raw = trained(activation={"kind": "topk", "k": 3}, centre=True)
    raw.load_state_dict(sae.state_dict())
    return raw.encode(u)


def test_a_survey_of_decoder_rows_is_refused() -> None:
    with pytest.raises(SettingError, match="row_norm"):
        latent_examples.survey(normed(), SimpleNamespace())  # type: ignore[arg-type]


def test_the_sizes_are_those_of_the_tests() -> None:
    assert (normed().d_in, normed().d_sae) == (D_IN, D_SAE)
