"""Every registered part in an SAE that reconstructs activations of another width than it reads."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from pairs import pair_source

from saelab.data.activations.stream import batches
from saelab.errors import SettingError
from saelab.parts import SEAMS, TABLE, parse_part
from saelab.parts.base import Dims
from saelab.sae import SAEConfig
from saelab.training.loop import Cell, train
from saelab.training.optim import TrainConfig
from saelab.training.sample import initial_sample

WIDTHS = ((16,), (10, 5))
SIZE, STEPS, D_SAE = 32, 30, 512
PLACES = {name: f"{name}s" for name in ("controller", "constraint", "observer")}
PLACES |= {"loss": "losses", "scaling": "scaling", "activation": "activation"}


def composed(seam: str, kind: str) -> SAEConfig:
    """An SAE with the part in its place and the companions that it declares."""
    data: dict[str, Any] = {
        "d_sae": D_SAE,
        "losses": ["reconstruction"],
        "controllers": [{"kind": "ramp", "name": "sparsity", "value": 0.01, "warmup": 0.5}],
    }
    place = PLACES[seam]
    if place.endswith("s"):
        first = [] if seam == "controller" or kind == "reconstruction" else data.get(place, [])
        data[place] = [*first, kind]
    else:
        data[place] = kind
    if seam == "loss":
        data["scaling"] = "variance"
    for name, value in parse_part(seam, kind).companions.items():
        data[name] = [*data.get(name, []), *value] if isinstance(value, list) else value
    return SAEConfig.parse(data)


@pytest.mark.parametrize(("seam", "kind"), [(seam, kind) for seam in SEAMS for kind in TABLE[seam]])
def test_the_part_trains_with_a_target(seam: str, kind: str) -> None:
    source = pair_source(*WIDTHS)
    training = TrainConfig(tokens=STEPS * SIZE, batch_size=SIZE, lr=3e-3)
    config = composed(seam, kind)
    if config.activation.build(Dims(16, D_SAE)).uses_weights:  # compares input and decoder rows
        with pytest.raises(SettingError, match="target_hook"):
            config.build(16, d_out=15)
        return
    cell = Cell("cell", config, training, initial_sample(source), 1)
    sae = cell.sae
    layout = "contexts" if sae.needs_contexts else "rows"
    moved = {"W_enc", "W_dec", "b_dec"}
    frozen = {"W_dec"} if kind == "frozen" else set()
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
