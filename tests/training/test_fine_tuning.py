"""Training that starts from an SAE, and losses of the language model with it spliced in."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from projects import ROOT
from torch import Tensor
from torch.nn.functional import log_softmax

import saelab
from saelab import checkpoint
from saelab.data import language_model
from saelab.data.activations.stream import Batch, Tokens
from saelab.errors import SettingError
from saelab.evals.core import CoreData, evaluate_core
from saelab.formats.base import Plain
from saelab.launch.prepare import prepare
from saelab.sae import SAE, SAEConfig
from saelab.seeding import torch_stream
from saelab.study.plan import BaseConfig
from saelab.training.fine_tuning import digest_of, fine_tuning_settings
from saelab.training.loop import Cell
from saelab.training.optim import TrainConfig
from saelab.training.spliced_model import SplicedModel

D_IN, D_SAE, N = 8, 24, 256
TRAINING = TrainConfig(tokens=40 * N, batch_size=N, lr=3e-3)


def rows(seed: int = 0) -> Tensor:
    """Raw activations with a mean, a scale and structure; float32 [n, d]."""
    stream = torch_stream(seed, "fine-tuning")
    f = torch.rand(2048, 12, generator=stream) * (torch.rand(2048, 12, generator=stream) < 0.2)
    return 3 + 7 * f @ torch.randn(12, D_IN, generator=torch_stream(0, "directions"))


def plain(**settings: Any) -> SAE:
    """An SAE as another tool stores it, in raw units."""
    stream = torch_stream(1, "published")
    w = torch.randn(D_SAE, D_IN, generator=stream)
    w_dec = torch.nn.functional.normalize(w, dim=1)
    kept: dict[str, Any] = {"threshold": None, "k": None} | settings
    return Plain(0.3 * w_dec, torch.full((D_SAE,), -0.5), w_dec, rows().mean(0), **kept).build()


def tuned(start: SAE, steps: int = 0, **settings: Any) -> Cell:
    parts = {"losses": ["reconstruction"], "controllers": [], "observers": []} | settings
    config = fine_tuning_settings(start, SAEConfig.parse({"d_sae": 99, **parts}))
    cell = Cell("c", config, TRAINING, rows(), 0)
    cell.start_from(start)
    for i in range(steps):
        x = rows(i + 1)[:N]
        cell.step(Batch(x, torch.zeros(N, dtype=torch.int64)))
    return cell


FORMS: dict[str, dict[str, Any]] = {
    "relu": {},
    "jumprelu": {"threshold": torch.full((D_SAE,), 0.4)},
    "topk": {"k": 4},
    "uncentred": {"centre": False},
}


@pytest.mark.parametrize("form", list(FORMS))
def test_it_starts_as_the_same_function_in_the_units_of_training(form: str) -> None:
    start = plain(**FORMS[form])
    sae, x = tuned(start).sae.eval(), rows(5)
    assert sae.config.activation == start.config.activation and sae.d_sae == D_SAE
    power = (rows() - rows().mean(0)).square().sum(1).mean()
    assert float(sae.scale) == pytest.approx(float((power / D_IN).sqrt()))
    f = start.encode(x)
    assert (f != 0).float().mean() > 0.02
    torch.testing.assert_close(sae.encode(x), f, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(sae.decode(f), start.decode(f), rtol=1e-4, atol=1e-4)


def test_an_sae_of_ours_goes_on_with_its_scale_and_statistics(tmp_path: Path) -> None:
    settings = {"d_sae": D_SAE, "scaling": "variance", "activation": {"kind": "batchtopk", "k": 3}}
    parts = {"losses": ["reconstruction"], "controllers": []}
    first = Cell("c", SAEConfig.parse({**settings, **parts}), TRAINING, rows(), 0)
    for i in range(5):
        first.step(Batch(rows(i)[:N], torch.zeros(N, dtype=torch.int64)))
    checkpoint.save(first.sae.eval(), tmp_path, {})
    start = saelab.load(tmp_path)
    sae, x = tuned(start).sae.eval(), rows(5)
    assert torch.equal(sae.encode(x), start.encode(x))
    assert torch.equal(sae.decode(sae.encode(x)), start.decode(start.encode(x)))


@pytest.mark.parametrize("form", list(FORMS))
def test_training_goes_on_and_leaves_the_start_as_it_was(form: str) -> None:
    start = plain(**FORMS[form])
    before = {name: tensor.clone() for name, tensor in start.state_dict().items()}
    cell = tuned(start, steps=40)
    errors = cell.log.columns["loss.reconstruction"]
    assert errors[-1] < 0.8 * errors[0]
    assert all(torch.equal(before[n], t) for n, t in start.state_dict().items())


def test_the_same_start_gives_the_same_bits() -> None:
    one, other = (tuned(plain(), steps=5).sae.state_dict() for _ in range(2))
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert digest_of(plain()) == digest_of(plain()) != digest_of(plain(k=4))


def test_other_widths_are_refused() -> None:
    config = fine_tuning_settings(plain(), SAEConfig(losses=(), controllers=()))
    cell = Cell("c", config, TRAINING, torch.randn(64, D_IN + 1), 0)
    with pytest.raises(SettingError, match="d_in = 8: the activations have 9"):
        cell.start_from(plain())


# ---- losses of the spliced model -------------------------------------------------------------


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> BaseConfig:
    folder = tmp_path_factory.mktemp("text")
    lines = [f"def f_{i}(x_{i % 7}):\n    return {i * 7919 % 1003}\n" for i in range(1500)]
    (folder / "train.txt").write_text("".join(lines[:1100]))
    (folder / "held_out.txt").write_text("".join(lines[1100:]))
    changes = {
        "context": 32,
        "layout": "contexts",
        "train_text": {"kind": "files", "path": str(folder / "train.txt")},
        "eval_text": {"kind": "files", "path": str(folder / "held_out.txt")},
        "train": {"tokens": 8192, "batch_size": 256, "lr": 2e-3},
        "evaluation": {"tokens": 1000, "loss_contexts": 8, "probing": {"entries": "none"}},
        "sae": {
            "d_sae": 256,
            "activation": {"kind": "topk", "k": 8},
            "losses": ["reconstruction"],
            "controllers": [],
            "observers": [],
        },
    }
    return saelab.settings(ROOT / "configs" / "embedded.toml", {"sae.initial_l0": None} | changes)


@pytest.fixture(scope="module")
def spliced(base: BaseConfig) -> SplicedModel:
    return SplicedModel(language_model.load(base.model), base.output_hooks)


def tokens_of(spliced: SplicedModel, count: int = 3) -> tuple[Tokens, Tensor]:
    """Contexts of which some positions do not count, and the activations of the others."""
    ids = torch.randint(3, 200, (count, 16), generator=torch_stream(0, "ids"))
    mask = torch.rand(ids.shape, generator=torch_stream(1, "mask")) < 0.8
    acts = spliced.model.activations(ids, None, list(spliced.hook_names))[spliced.hook_names[0]]
    return Tokens(ids, mask), acts[mask].float().clone()


def sae_for(base: BaseConfig, loss: str | dict[str, Any]) -> SAE:
    return base.sae.patched({"losses": [loss]}).build(192)


def test_exact_reconstructions_leave_the_logits_as_they_are(
    base: BaseConfig, spliced: SplicedModel
) -> None:
    tokens, x = tokens_of(spliced)
    place = spliced.on(sae_for(base, "kl"), tokens)
    torch.testing.assert_close(place.spliced_logits(x), place.clean_logits())
    wrong = place.spliced_logits(x * torch.linspace(-1, 1, 192))
    first = int(tokens.mask[0].nonzero()[0])
    torch.testing.assert_close(wrong[0, :first], place.clean_logits()[0, :first])
    assert (wrong[0, first] - place.clean_logits()[0, first]).abs().max() > 0.01


def test_kl_and_cross_entropy_are_their_equations_with_gradients_to_the_rows(
    base: BaseConfig, spliced: SplicedModel
) -> None:
    tokens, x = tokens_of(spliced)
    recon = (x + 0.3 * torch.randn(x.shape, generator=torch_stream(2, "noise"))).requires_grad_()
    place = spliced.on(sae_for(base, "kl"), tokens)
    p, q = log_softmax(place.clean_logits(), -1), log_softmax(place.spliced_logits(recon), -1)
    wanted = (p.exp() * (p - q)).sum(-1)[tokens.mask].mean()
    kl, ce = (sae_for(base, kind).losses[kind] for kind in ("kl", "cross_entropy"))
    found = kl.compare(place.spliced_logits(recon), place)
    assert float(found.detach()) == pytest.approx(float(wanted.detach()), rel=1e-4)
    assert float(found.detach()) > 1e-3
    (gradient,) = torch.autograd.grad(found, recon)
    (expected,) = torch.autograd.grad(wanted, recon)
    torch.testing.assert_close(gradient, expected, rtol=1e-3, atol=1e-7)
    nats = -q[:, :-1].gather(-1, tokens.ids[:, 1:, None]).squeeze(-1)[tokens.mask[:, 1:]].mean()
    entropy = ce.compare(place.spliced_logits(recon), place).detach()
    assert float(entropy) == pytest.approx(float(nats.detach()))
    assert not any(parameter.requires_grad for parameter in spliced.model.model.parameters())


@pytest.mark.parametrize("loss", ["kl", "cross_entropy"])
def test_fine_tuning_by_the_model_lowers_its_loss(
    base: BaseConfig, tmp_path: Path, loss: str
) -> None:
    """From a trained SAE, on held-out text, against as much further training without the term."""
    start = saelab.train(base, seed=1, cache=tmp_path)
    held_out = prepare(base, tmp_path / ".saelab", "cpu").held_out
    core = CoreData(held_out, language_model.load(base.model), 8)
    ended = {}
    for name, losses in {"plain": ["reconstruction"], loss: [loss]}.items():
        further = base.patched({"sae.losses": losses})
        sae = saelab.fine_tune(start, further, seed=2, cache=tmp_path)
        rows = {row.metric: row.value for row in evaluate_core(sae, core)}
        ended[name] = rows["ce_spliced"], rows["fvu"]
    assert ended[loss][0] < ended["plain"][0] - 0.005
    assert ended[loss][1] > ended["plain"][1]


def test_what_can_not_work_is_said_in_one_sentence(base: BaseConfig, tmp_path: Path) -> None:
    with pytest.raises(SettingError, match="needs whole contexts"):
        saelab.compare(
            base.patched({"layout": "rows"}), {"kl": {"sae.losses": ["kl"]}}, out_dir=tmp_path / "r"
        )
    kl = base.sae.patched({"losses": ["kl"]})
    cell = Cell("c", kl, TRAINING, torch.randn(64, 192), 0)
    with pytest.raises(SettingError, match="needs the language model"):
        cell.use_model(None)
    some = TrainConfig(tokens=40 * N, batch_size=N, positions=(0, 4))
    cell = Cell("c", kl, some, torch.randn(64, 192), 0)
    with pytest.raises(SettingError, match="needs all positions"):
        cell.use_model(SplicedModel(language_model.load(base.model), base.output_hooks))
