"""L1 with and without decoder norms, the tilted reconstruction, and what settings hash to."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from twins import D_IN, ROWS, Twin, assert_same_loss, relu, rows, small

from saelab.errors import SettingError
from saelab.parts import parse_part
from saelab.sae import SAEConfig


@pytest.mark.parametrize("norms", [True, False])
def test_l1(norms: bool, global_random_seed: int) -> None:
    losses = ["reconstruction", {"kind": "l1", "coefficient": 0.3, "decoder_norms": norms}]
    sae = small(global_random_seed, losses=losses, constraints=["unit_norm"])

    def theirs(t: Twin) -> Tensor:
        return 0.3 * (relu(t) * (t.norms if norms else 1.0)).sum() / (ROWS * math.sqrt(D_IN))

    assert_same_loss(sae, rows(global_random_seed), sae.loss_terms()["l1"].loss, theirs)


def test_l1_without_norms_needs_rows_of_one_norm() -> None:
    losses = ["reconstruction", {"kind": "l1", "decoder_norms": False}]
    with pytest.raises(SettingError, match="add the constraint 'unit_norm'"):
        SAEConfig.parse({"d_sae": 8, "losses": losses}).build(4)
    for constraint in ("unit_norm", "frozen"):
        SAEConfig.parse({"d_sae": 8, "losses": losses, "constraints": [constraint]}).build(4)


@pytest.mark.parametrize("tilt", [0.0, 1.5, 40.0, -2.0])
def test_tilted_reconstruction(tilt: float, global_random_seed: int) -> None:
    sae = small(global_random_seed, losses=[{"kind": "reconstruction", "tilt": tilt}])

    def theirs(t: Twin) -> Tensor:
        error = t.error(relu(t))
        if not tilt:
            return error.mean()
        return (torch.logsumexp(tilt * error, 0) - math.log(ROWS)) / tilt

    x = rows(global_random_seed)
    assert_same_loss(sae, x, sae.loss_terms()["reconstruction"].loss, theirs)
    p = sae(x)
    error, loss = (p.recon - p.target).square().mean(1), sae.loss_terms()["reconstruction"].loss(p)
    assert (loss > error.mean()) == (tilt > 0) or not tilt


def test_tilted_in_the_space_of_a_scaling(global_random_seed: int) -> None:
    """Equal errors of all rows have no tilt: the loss is that of the scaled space."""
    both = [{"kind": "reconstruction", "space": "scaled", "tilt": tilt} for tilt in (0.0, 1e-4)]
    scaling = {"kind": "variance", "tau": 1.0}
    sae = small(global_random_seed, losses=both, scaling=scaling)
    p = sae(rows(global_random_seed))
    plain, tilted = (term.loss(p) for term in sae.loss_terms().values())
    torch.testing.assert_close(tilted, plain, rtol=1e-2, atol=0)


@pytest.mark.parametrize(
    ("seam", "kind", "changes"),
    [
        ("loss", "l1", {"decoder_norms": False}),
        ("loss", "reconstruction", {"tilt": 1.0}),
        ("activation", "jumprelu", {"to_input": True}),
    ],
)
def test_a_later_field_changes_no_digest(seam: str, kind: str, changes: dict[str, object]) -> None:
    part = parse_part(seam, kind)
    (name,) = changes
    assert name in part.model_dump() and name not in part.model_dump(mode="json")
    changed = part.patched(changes)
    assert changed.model_dump(mode="json")[name] == changes[name]
    assert parse_part(seam, changed.model_dump(mode="json")) == changed
    assert changed.digest() != part.digest() == part.patched({name: getattr(part, name)}).digest()


def test_the_digest_of_the_defaults() -> None:
    assert SAEConfig().digest() == "20ca981462ddcb5d"
