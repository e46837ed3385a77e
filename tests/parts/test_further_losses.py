"""Orthogonality in chunks and the contrast of adjacent tokens against plain autograd."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn.functional import log_softmax
from twins import D_IN, D_SAE, ROWS, Twin, assert_same_loss, relu, rows, small

from saelab.data.activations.stream import Batch
from saelab.errors import SettingError
from saelab.parts.losses.orthogonality import Orthogonality
from saelab.parts.losses.temporal_contrast import TemporalContrast
from saelab.sae import SAE, SAEConfig
from saelab.training.loop import Cell
from saelab.training.optim import TrainConfig


def orthogonality(seed: int, **settings: float) -> tuple[SAE, Orthogonality]:
    sae = small(seed, losses=["reconstruction", {"kind": "orthogonality", **settings}])
    term = sae.loss_terms()["orthogonality"]
    assert isinstance(term, Orthogonality)
    return sae, term


@pytest.mark.parametrize("chunk", [7, 12, 1000])
def test_orthogonality(chunk: int, global_random_seed: int) -> None:
    sae, term = orthogonality(global_random_seed, chunk=chunk)
    chunks = term.chunks(3)
    assert torch.equal(torch.cat(chunks).sort().values, torch.arange(D_SAE))
    assert max(map(len, chunks)) <= chunk

    def theirs(t: Twin) -> Tensor:
        unit = t.W_dec / t.norms[:, None]
        total = torch.zeros((), dtype=torch.float64)
        for latents in chunks:
            cosines = unit[latents] @ unit[latents].T
            cosines = cosines.masked_fill(torch.eye(len(latents), dtype=torch.bool), -1.0)
            total = total + cosines.max(1).values.clamp_min(0).square().sum()
        return 0.25 * total / D_SAE

    assert_same_loss(sae, rows(global_random_seed), term.loss, theirs, step=3, steps=10)


def test_orthogonality_draws_anew_and_pauses(global_random_seed: int) -> None:
    sae, term = orthogonality(global_random_seed, chunk=6, every=2)
    drawn = [torch.cat(term.chunks(step)) for step in (0, 0, 1)]
    assert torch.equal(drawn[0], drawn[1]) and not torch.equal(drawn[0], drawn[2])
    with torch.no_grad():
        values = [float(term.loss(sae(rows(global_random_seed), step, 10))) for step in range(3)]
    assert values[0] > 0 == values[1] < values[2]


def test_orthogonality_turns_rows_apart(global_random_seed: int) -> None:
    sae, term = orthogonality(global_random_seed, chunk=1000)
    x, losses = rows(global_random_seed), []
    for _ in range(30):
        sae.zero_grad()
        loss = term.loss(sae(x))
        losses.append(float(loss.detach()))
        loss.backward()
        assert sae.W_dec.grad is not None
        sae.W_dec.data.sub_(sae.W_dec.grad, alpha=1.0)
    assert losses[-1] < 0.9 * losses[0]


def contrast(seed: int, **settings: float) -> tuple[SAE, TemporalContrast]:
    losses = ["reconstruction", {"kind": "temporal_contrast", **settings}]
    sae = small(seed, losses=losses, bias=0.0)
    term = sae.loss_terms()["temporal_contrast"]
    assert isinstance(term, TemporalContrast)
    return sae, term


#: Segments of 1, 9, 2, 13 and 15 rows: the first has no pair.
STARTS = torch.tensor([0, 1, 10, 12, 25, ROWS])


@pytest.mark.parametrize("temperature", [None, 0.7])
def test_contrast(temperature: float | None, global_random_seed: int) -> None:
    settings = {} if temperature is None else {"temperature": temperature}
    sae, term = contrast(global_random_seed, share=0.5, coefficient=0.3, **settings)
    with torch.no_grad():
        sae.b_enc.sub_(0.5)
    later = term.second_rows(STARTS, 4)

    def theirs(t: Twin) -> Tensor:
        h = relu(t)[:, : D_SAE // 2]
        s = h[later] @ h[later - 1].T / (temperature or D_IN)
        both = log_softmax(s, 1).diagonal().mean() + log_softmax(s, 0).diagonal().mean()
        return -0.3 * both / (2 * D_IN)

    x = rows(global_random_seed)
    assert_same_loss(sae, x, term.loss, theirs, step=4, steps=10, starts=STARTS)


def test_pairs_are_within_segments(global_random_seed: int) -> None:
    _, term = contrast(global_random_seed)
    drawn = torch.stack([term.second_rows(STARTS, step) for step in range(300)])
    for column, first, end in zip(drawn.T, STARTS[1:-1], STARTS[2:], strict=True):
        assert column.unique().tolist() == list(range(int(first) + 1, int(end)))


def test_contexts_come_with_the_batch(global_random_seed: int) -> None:
    losses = ["reconstruction", {"kind": "temporal_contrast", "share": 0.5}]
    data = {"d_sae": D_SAE, "losses": losses, "controllers": [], "precision": "float32"}
    training = TrainConfig(tokens=3 * ROWS, batch_size=ROWS)
    x = rows(global_random_seed)
    cell = Cell("cell", SAEConfig.parse(data), training, x, global_random_seed)
    segments = torch.arange(ROWS) // 8
    values = []
    for given in (segments, segments, None):
        cell.step(Batch(x, torch.arange(ROWS), segments=given))
        values.append(cell.log.last("loss.temporal_contrast"))
    assert values[0] > 0 < values[1] and values[2] == 0


def test_without_pairs_there_is_nothing(global_random_seed: int) -> None:
    sae, term = contrast(global_random_seed)
    for starts in (None, torch.tensor([0, ROWS]), torch.arange(ROWS + 1)):
        assert not term.loss(sae(rows(global_random_seed), starts=starts)).any()
    assert term.needs_contexts and not sae.needs_contexts  # the code follows no context


def test_a_share_of_no_latent() -> None:
    losses = ["reconstruction", {"kind": "temporal_contrast", "share": 0.01}]
    with pytest.raises(SettingError, match="use a larger share"):
        SAEConfig.parse({"d_sae": 16, "losses": losses}).build(4)
