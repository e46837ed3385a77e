"""SAEs that reconstruct other activations than they read: weights, gradients, training, files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from in_ranks import alone, in_ranks
from pairs import READ, WRITTEN, pair_sample, pair_source, rows_of
from torch import Tensor
from torch.nn.functional import linear, normalize

from saelab import checkpoint
from saelab.data.activations.stream import batches
from saelab.distributed.ranks import Ranks
from saelab.errors import DamageError, SettingError
from saelab.parts.base import Pass
from saelab.parts.resets import draw_reset
from saelab.sae import SAE, SAEConfig
from saelab.seeding import torch_stream
from saelab.training.loop import Cell, train
from saelab.training.optim import Optimiser, TrainConfig
from saelab.training.resume import restore_cell, train_with_checkpoints
from saelab.training.sample import Sample

D_SAE, ROWS = 32, 40
TOPK: dict[str, Any] = {
    "d_sae": D_SAE,
    "activation": {"kind": "topk", "k": 4},
    "losses": ["reconstruction"],
    "controllers": [],
    "precision": "float32",
}
RELU: dict[str, Any] = TOPK | {
    "activation": "relu",
    "losses": ["reconstruction", {"kind": "l1", "coefficient": 0.1}],
    "initial_l0": 6,
}
#: Widths of the inputs' and the targets' hook points.
KINDS: dict[str, tuple[tuple[int, ...], tuple[int, ...]]] = {
    "transcoder": ((READ,), (WRITTEN,)),
    "crosscoder": ((READ, 5), ()),
    "several targets": ((READ,), (WRITTEN, 4)),
    "several of both": ((READ, 5), (WRITTEN, 4)),
}
every_kind = pytest.mark.parametrize("kind", list(KINDS))


def built(data: dict[str, Any], kind: str = "transcoder", **changes: Any) -> tuple[SAE, Sample]:
    sample = pair_sample(*KINDS[kind])
    sae = SAEConfig.parse(data | changes).build(sample.d_in, d_out=sample.d_out)
    sae.initialise(sample.x, 1, sample.y)
    return sae, sample


def disturbed(sae: SAE) -> SAE:
    """The SAE with weights that differ from those at its start."""
    stream = torch_stream(2, "disturbance")
    with torch.no_grad():
        for parameter in sae.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=stream))
    return sae


def channels(scale: Tensor, widths: tuple[int, ...]) -> Tensor:
    """The scale of each channel."""
    return scale if scale.dim() else scale.expand(sum(widths))


def by_hand(sae: SAE, x: Tensor, y: Tensor | None) -> tuple[dict[str, Tensor], Tensor, Tensor]:
    """Weights, code and loss of a topk or relu SAE with plain autograd."""
    w = {name: p.detach().clone().requires_grad_() for name, p in sae.named_parameters()}
    x_n = x / sae.scale
    if y is None:
        target, centre = x_n, w["b_dec"]
    else:
        target, centre = y / sae.target_scale, sae.centre
    u = x_n - centre if sae.config.centre else x_n
    inner = u
    if sae.scaling is not None:
        gain, shift = sae.scaling.fold()
        inner = u * gain + shift
    z = inner @ w["W_enc"].T + w["b_enc"]
    f = torch.relu(z)
    if sae.config.activation.kind == "topk":
        f = f * torch.zeros_like(z).scatter(1, z.topk(4, dim=1).indices, 1)
    recon = f @ w["W_dec"] + w["b_dec"]
    if "W_skip" in w:
        recon = recon + u @ w["W_skip"].T
    loss = (recon - target).square().mean()
    if len(sae.losses) > 1:
        blocks = w["W_dec"].split(sae.dims.target_blocks, dim=1)
        norms = torch.stack([block.norm(dim=1) for block in blocks]).sum(0)
        loss = loss + 0.1 * (f * norms).sum(1).mean() / sae.d_out**0.5
    loss.backward()
    return w, f, loss


@every_kind
@pytest.mark.parametrize("data", [TOPK, RELU], ids=["topk", "relu"])
@pytest.mark.parametrize("changes", [{}, {"skip": True}, {"centre": False, "skip": True}])
def test_gradients_are_those_of_plain_autograd(
    kind: str, data: dict[str, Any], changes: dict[str, Any]
) -> None:
    if not KINDS[kind][1]:
        changes = {name: value for name, value in changes.items() if name != "skip"}
    sae, sample = built(data, kind, **changes)
    disturbed(sae).train()
    x, y = rows_of(sample, ROWS)
    p = sae(x, y=y)
    loss = torch.stack([term.loss(p) for term in sae.loss_terms().values()]).sum()
    loss.backward()
    weights, f, wanted = by_hand(sae, x, y)
    torch.testing.assert_close(loss, wanted)
    torch.testing.assert_close(p.code.dense(), f.detach())
    assert 0 < float((f > 0).float().mean()) < 0.9
    for name, parameter in sae.named_parameters():
        torch.testing.assert_close(parameter.grad, weights[name].grad, rtol=1e-4, atol=1e-6)
        assert bool(parameter.grad.any()), name


@pytest.mark.parametrize("scaling", ["whitening", {"kind": "variance"}, "centring"])
def test_input_scalings_see_the_input_alone(scaling: Any) -> None:
    sae, sample = built(TOPK, scaling=scaling)
    sae.train()
    x, y = rows_of(sample, ROWS)
    p = sae(x, y=y)
    sae.loss_terms()["reconstruction"].loss(p).backward()
    assert p.u.shape == (ROWS, READ) and bool(sae.W_enc.grad.any())
    for part in sae.parts():
        part.update(p)
    if scaling == "centring":  # the running mean is of x_n - a
        left = (sample.x / sae.scale - sae.centre).mean(0)
        torch.testing.assert_close(sae.scaling.mean, left.lerp(p.u.mean(0), 0.01), atol=0.1, rtol=1)


@every_kind
def test_the_start(kind: str) -> None:
    sae, sample = built(RELU, kind)
    inputs, targets = KINDS[kind]
    first = 0
    for width in inputs:
        block = slice(first, first + width)
        x = sample.x[:, block] / channels(sae.scale, inputs)[block]
        power = (x - x.mean(0)).square().sum(1).mean()
        torch.testing.assert_close(power, torch.tensor(float(width)))
        first += width
    torch.testing.assert_close(sae.W_enc.norm(dim=1), torch.ones(D_SAE))
    torch.testing.assert_close(sae.W_dec.norm(dim=1), torch.ones(D_SAE))
    outward = (sample.target / sae.out_scale).mean(0)
    torch.testing.assert_close(sae.b_dec, outward)
    error = sample.target / sae.out_scale - outward
    torch.testing.assert_close(error.square().mean(), torch.tensor(1.0))  # every block counts alike
    if targets:
        torch.testing.assert_close(sae.centre, (sample.x / sae.scale).mean(0))
    else:
        assert torch.equal(sae.W_enc, sae.W_dec)
    code = sae.eval().encode(sample.x)
    assert 5 < float((code > 0).sum(1).float().mean()) < 7


def test_an_encoder_without_centre_starts_like_one_with_it() -> None:
    (one, sample), (other, _) = built(RELU), built(RELU, centre=False)
    codes = [sae.eval().encode(sample.x) for sae in (one, other)]
    torch.testing.assert_close(codes[0], codes[1], atol=1e-4, rtol=1e-4)
    assert not torch.equal(one.b_enc, other.b_enc)


def test_a_decoder_of_zeros_moves_first() -> None:
    sae, sample = built(TOPK, decoder_start="zeros", skip=True)
    assert not sae.W_dec.any() and sae.W_enc.any()
    x, y = rows_of(sample, ROWS)
    sae.train()
    sae.loss_terms()["reconstruction"].loss(sae(x, y=y)).backward()
    assert not sae.W_enc.grad.any() and sae.W_dec.grad.any() and sae.W_skip.grad.any()


@every_kind
@pytest.mark.parametrize("changes", [{}, {"skip": True}, {"skip": True, "centre": False}])
@pytest.mark.parametrize("scaling", [None, "variance", "whitening"])
def test_folded_weights_compute_the_same(
    kind: str, changes: dict[str, Any], scaling: str | None
) -> None:
    if not KINDS[kind][1]:
        changes = {name: value for name, value in changes.items() if name != "skip"}
    sae, sample = built(RELU, kind, scaling=scaling, **changes)
    disturbed(sae).eval()
    x, _ = rows_of(sample, ROWS)
    w = sae.fold()
    inner = x if sae.has_target else x - w["b_dec"]
    f = torch.relu(linear(inner, w["W_enc"], w["b_enc"]))
    torch.testing.assert_close(f, sae.encode(x), rtol=1e-3, atol=1e-4)
    y_hat = f @ w["W_dec"] + w["b_dec"]
    if "W_skip" in w:
        y_hat = y_hat + x @ w["W_skip"].T
    assert ("W_skip" in w) == bool(changes.get("skip"))
    torch.testing.assert_close(sae.complete(sae.decode(f), x), y_hat, rtol=1e-3, atol=1e-3)
    for block, code in sae.codes(x):
        torch.testing.assert_close(sae.decode_code(code), sae.decode(f[block]))


def test_a_reset_follows_the_row_on_both_sides() -> None:
    sae, sample = built(TOPK)
    sae.train()
    x, y = rows_of(sample, ROWS)
    p: Pass = sae(x, y=y)
    p.recon = p.target + torch.eye(ROWS)[:, :1] * 5  # all error in row 0
    reset = draw_reset(p, torch.tensor([3, 5]), 0.5, torch_stream(0, "reset"))
    sae.reset_latents(reset)
    inward = normalize(x[0] / sae.scale - sae.centre, dim=0)
    outward = normalize(y[0] / sae.target_scale - sae.b_dec, dim=0)
    for latent in (3, 5):
        torch.testing.assert_close(normalize(sae.W_enc[latent], dim=0), inward)
        torch.testing.assert_close(sae.W_dec[latent], outward)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tied": True}, "tied = True.*target_hook"),
        ({"losses": [{"kind": "reconstruction", "space": "scaled"}], "scaling": "variance"}, "raw"),
    ],
)
def test_settings_that_need_the_input_as_target(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(SettingError, match=message):
        built(TOPK, **changes)
    SAEConfig.parse(TOPK | changes).build(READ)


@pytest.mark.parametrize("changes", [{"skip": True}, {"decoder_start": "zeros"}])
def test_settings_that_need_a_target(changes: dict[str, Any]) -> None:
    with pytest.raises(SettingError, match="needs a target: set target_hook"):
        SAEConfig.parse(TOPK | changes).build(READ)


def test_targets_of_another_width_are_refused() -> None:
    sae, sample = built(TOPK)
    for y in (None, sample.y[:ROWS, 1:], sample.y[: ROWS - 1]):
        with pytest.raises(ValueError, match="targets of shape"):
            sae(sample.x[:ROWS], y=y)


def test_settings_of_before_have_the_digest_of_before() -> None:
    """Written down before there were targets."""
    assert SAEConfig().digest() == "20ca981462ddcb5d"
    dumped = json.loads(SAEConfig().model_dump_json())
    assert "skip" not in dumped and SAEConfig.parse(dumped) == SAEConfig()
    changed = SAEConfig().patched({"skip": True})
    assert changed.skip and changed.digest() != SAEConfig().digest()
    assert SAEConfig.parse(json.loads(changed.model_dump_json())) == changed


# ---- training --------------------------------------------------------------------------------

STEPS, SIZE = 60, 48
TRAIN = TrainConfig(tokens=STEPS * SIZE, batch_size=SIZE, lr=3e-3)
OBSERVED: dict[str, Any] = {"observers": [{"kind": "resampling", "every": 0.1, "patience": 96}]}
AUXK: dict[str, Any] = TOPK | {"losses": ["reconstruction", {"kind": "auxk", "dead_after": 96}]}


def cell(ranks: Ranks, kind: str, **changes: Any) -> Cell:
    sample = pair_sample(*KINDS[kind])
    return Cell("cell", SAEConfig.parse(AUXK | changes), TRAIN, sample, 3, 2, ranks=ranks)


@every_kind
@pytest.mark.parametrize("layout", ["rows", "contexts"])
def test_training_learns_the_target(kind: str, layout: Any) -> None:
    one = cell(Ranks(), kind, **OBSERVED)
    source = pair_source(*KINDS[kind])
    assert not train([one], batches(source, 3, SIZE, layout))
    loss = one.log.columns["loss.reconstruction"]
    assert loss[-5:].mean() < 0.7 * loss[:5].mean()
    blocks = KINDS[kind][1] or KINDS[kind][0]
    names = [f"fvu.block.{i}" for i in range(len(blocks))] if len(blocks) > 1 else []
    assert [name for name in one.log.columns if name.startswith("fvu.")] == names
    if names:
        parts = sum(one.log.columns[n] * w for n, w in zip(names, blocks, strict=True))
        torch.testing.assert_close(
            torch.from_numpy(parts / sum(blocks)), torch.from_numpy(loss), rtol=1e-4, atol=1e-5
        )


@pytest.mark.parametrize("data", [TOPK, RELU], ids=["topk", "relu"])
def test_with_the_input_as_target_it_is_the_sae(data: dict[str, Any]) -> None:
    sample = pair_sample((READ,), ())
    one = SAEConfig.parse(data).build(READ)
    other = SAEConfig.parse(data).build(READ, d_out=READ)
    one.initialise(sample.x, 1)
    other.initialise(sample.x, 1, sample.x)
    disturbed(one)
    other.load_state_dict(
        other.state_dict() | one.state_dict() | {"centre": one.b_dec.detach().clone()}
    )
    x = sample.x[:ROWS]
    passes = [one.train()(x), other.train()(x, y=x)]
    for sae, p in zip((one, other), passes, strict=True):
        torch.stack([term.loss(p) for term in sae.loss_terms().values()]).sum().backward()
    torch.testing.assert_close(passes[0].recon, passes[1].recon)
    for name in ("W_enc", "W_dec", "b_enc"):
        torch.testing.assert_close(getattr(one, name).grad, getattr(other, name).grad)


def curves(ranks: Ranks, kind: str, changes: dict[str, Any]) -> dict[str, Any]:
    one = cell(ranks, kind, **changes)
    assert not train([one], batches(pair_source(*KINDS[kind]), 3, SIZE))
    whole = {n: p.detach().numpy() for n, p in one.sae.named_parameters() if n in WHOLE}
    names = ("loss", "grad_norm", "l0")
    return {name: one.log.columns[name] for name in names} | whole


WHOLE = ("b_dec", "W_skip")


def kinds_over_ranks(ranks: Ranks) -> list[dict[str, Any]]:
    return [
        curves(ranks, "transcoder", {"skip": True} | OBSERVED),
        curves(ranks, "several of both", {"skip": True}),
        curves(ranks, "crosscoder", RELU | {"losses": RELU["losses"], "skip": False}),
    ]


def test_two_by_two_ranks_are_one_process() -> None:
    wanted, found = alone(kinds_over_ranks), in_ranks(2, 2, kinds_over_ranks)
    for i, one in enumerate(wanted):
        for name, values in one.items():
            for other in found[1:]:
                assert (other[i][name] == found[0][i][name]).all(), name
            loose = {"rtol": 1e-3, "atol": 1e-4} if name in WHOLE else {"rtol": 1e-4, "atol": 1e-5}
            torch.testing.assert_close(
                torch.from_numpy(found[0][i][name]), torch.from_numpy(values), **loose
            )


def test_the_norm_of_the_skips_gradient_is_counted_once() -> None:
    sae, sample = built(TOPK, skip=True)
    x, y = rows_of(sample, ROWS)
    optimiser = Optimiser(sae.train(), TRAIN)
    sae.loss_terms()["reconstruction"].loss(sae(x, y=y)).backward()
    squares = [p.grad.square().sum() for p in sae.parameters()]
    assert optimiser.clip() == pytest.approx(float(sum(squares)) ** 0.5, rel=1e-5)
    assert "W_skip" in optimiser.norms


@every_kind
def test_a_saved_sae_comes_back(kind: str, tmp_path: Path) -> None:
    skip = bool(KINDS[kind][1])
    one = cell(Ranks(), kind, skip=skip)
    assert not train([one], batches(pair_source(*KINDS[kind]), 3, SIZE))
    checkpoint.save(one.sae, tmp_path, {})
    again, _ = checkpoint.load(tmp_path)
    assert again.dims.target_blocks == one.sae.dims.target_blocks
    assert again.dims.input_blocks == one.sae.dims.input_blocks
    x, _ = rows_of(pair_sample(*KINDS[kind]), ROWS)
    outputs = [sae.complete(sae.decode(sae.encode(x)), x) for sae in (one.sae, again)]
    assert torch.equal(outputs[0], outputs[1])
    record = json.loads((tmp_path / "sae.json").read_text())
    assert ("targets" in record, "inputs" in record) == (skip, len(KINDS[kind][0]) > 1)


def test_weights_of_other_widths_are_refused(tmp_path: Path) -> None:
    sae, _ = built(TOPK)
    other, _ = built(TOPK, "several targets")
    checkpoint.save(sae.eval(), tmp_path / "a", {})
    checkpoint.save(other.eval(), tmp_path / "b", {})
    record = json.loads((tmp_path / "b" / "sae.json").read_text())
    record["sha256"] = json.loads((tmp_path / "a" / "sae.json").read_text())["sha256"]
    record.pop("seal", None)
    (tmp_path / "b" / "sae.safetensors").write_bytes(
        (tmp_path / "a" / "sae.safetensors").read_bytes()
    )
    with pytest.raises(DamageError):
        checkpoint.load(tmp_path / "b")


@every_kind
@pytest.mark.parametrize("layout", ["rows", "contexts"])
def test_a_run_that_was_cut_in_two_ends_with_the_same_bits(
    kind: str, layout: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SAELAB_CHECKPOINT_SECONDS", "0")
    source, changes = pair_source(*KINDS[kind]), OBSERVED | {"skip": bool(KINDS[kind][1])}

    class Cut(Exception):
        pass

    def run(folder: Path, cut: int | None) -> Cell:
        member = restore_cell(lambda: cell(Ranks(), kind, **changes), folder)

        def on_step(steps: int, living: list[Any]) -> None:
            if cut is not None and living[0].steps_done >= cut:
                raise Cut

        stream = lambda start: batches(source, 3, SIZE, layout, start)  # noqa: E731
        assert not train_with_checkpoints([member], stream, on_step)
        return member.cell  # type: ignore[return-value]

    whole = run(tmp_path / "whole", None)
    with pytest.raises(Cut):
        run(tmp_path / "cut", 32)
    again = run(tmp_path / "cut", None)
    for name, tensor in whole.sae.state_dict().items():
        assert torch.equal(tensor, again.sae.state_dict()[name]), name
