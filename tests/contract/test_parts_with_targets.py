"""Every registered part in an SAE that reconstructs activations of another width than it reads."""

from __future__ import annotations

import pytest
import torch
from pairs import pair_source

from saelab.checks.examples import Case, cases
from saelab.data.activations.stream import batches
from saelab.errors import SettingError
from saelab.parts.base import Dims
from saelab.training.loop import Cell, train
from saelab.training.optim import TrainConfig
from saelab.training.sample import initial_sample

WIDTHS = ((16,), (10, 5))
SIZE, STEPS, D_SAE = 32, 30, 512


@pytest.mark.parametrize("case", cases(D_SAE), ids=str)
def test_the_part_trains_with_a_target(case: Case) -> None:
    source = pair_source(*WIDTHS)
    training = TrainConfig(tokens=STEPS * SIZE, batch_size=SIZE, lr=3e-3)
    config = case.settings(D_SAE)
    if config.activation.build(Dims(16, D_SAE)).uses_weights:  # compares input and decoder rows
        with pytest.raises(SettingError, match="target_hook"):
            config.build(16, d_out=15)
        return
    cell = Cell("cell", config, training, initial_sample(source), 1)
    sae = cell.sae
    layout = "contexts" if sae.needs_contexts else "rows"
    moved = {"W_enc", "W_dec", "b_dec"}
    weight = {"decoder": "W_dec", "encoder": "W_enc"}.get(getattr(case.part, "weight", ""), "")
    frozen = {weight} if case.kind == "frozen" else set()
    before = {name: getattr(sae, name).detach().clone() for name in moved}
    assert not train([cell], batches(source, 1, SIZE, layout))
    assert cell.log.length == STEPS
    for name in moved:
        assert torch.equal(getattr(sae, name), before[name]) == (name in frozen), name
    assert sae.W_enc.shape == (D_SAE, 16) and sae.W_dec.shape == (D_SAE, 15)
    for part in sae.parts():
        part.forget(torch.tensor([0, 3]))
    x = initial_sample(source).x[:64]
    starts = torch.tensor([0, 32, 64]) if sae.needs_contexts else None
    assert sae.decode(sae.encode(x, starts)).shape == (64, 15)
