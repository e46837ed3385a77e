"""Leave-one-out refinement against its published lines, and what dropping a latent does."""

from __future__ import annotations

import itertools
from typing import Any, cast

import pytest
import torch
from torch import Tensor
from twins import D_IN, D_SAE, rows, small

from saelab import LeaveOneOut
from saelab.errors import SettingError
from saelab.evals.base import SparseSubject
from saelab.kernels import Code
from saelab.row_norm import RowNorm, normalise_rows
from saelab.sae import SAE, SAEConfig

#: Activations by name, and whether their codes come sparse.
KINDS: dict[str, Any] = {
    "topk": {"kind": "topk", "k": 6},
    "relu": "relu",
    "jumprelu": "jumprelu",
    "abs_topk": {"kind": "abs_topk", "k": 6},
    "batchtopk": {"kind": "batchtopk", "k": 6},
}
#: Scores so near to the threshold are decided by rounding.
NEAR = 1e-4
LOSSES = {"losses": ["reconstruction"]}


def trained(seed: int, kind: str, norm: RowNorm = "none", **settings: Any) -> SAE:
    sae = small(seed, activation=KINDS[kind], **settings).eval()
    sae.row_norm = norm
    return sae


def published(x: Tensor, acts: Tensor, w: Tensor, b: Tensor, threshold: float) -> Tensor:
    """The lines of the source, in float64; of a negative value the score's sign is turned."""
    x_hat = acts @ w + b
    residual = x - x_hat
    proj = residual @ w.T + acts * w.square().sum(1)
    score = torch.where(acts < 0, -proj, proj)
    near = ((score - threshold).abs() < NEAR) & (acts != 0)
    keep = (score > threshold) | (acts == 0)
    return torch.where(near.any(1, keepdim=True), torch.nan, acts * keep)


def in_units(sae: SAE, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Rows, code, decoder and bias of an SAE in its normalised space, float64."""
    rows = normalise_rows(x, sae.row_norm) / sae.scale
    tensors = rows, sae.encode(x), sae.W_dec.detach(), sae.b_dec.detach()
    u, f, w, b = (t.double() for t in tensors)
    return u, f, w, b


@pytest.mark.parametrize("threshold", [0.0, 0.3, -0.2])
@pytest.mark.parametrize("kind", KINDS)
def test_it_is_what_the_published_lines_are(
    kind: str, threshold: float, global_random_seed: int
) -> None:
    sae, x = trained(global_random_seed, kind), rows(global_random_seed, 300)
    refined = LeaveOneOut(sae, threshold)
    wanted = published(*in_units(sae, x), threshold)
    clear = ~wanted.isnan().any(1)
    assert int(clear.sum()) > 250
    f = refined.encode(x)
    torch.testing.assert_close(f[clear].double(), wanted[clear], rtol=1e-4, atol=1e-5)
    before, after = (int((g[clear] != 0).sum()) for g in (sae.encode(x), f))
    assert 0 < after < before


@pytest.mark.parametrize("norm", ["layer_norm", "norm"])
def test_rows_that_are_normalised_first(norm: RowNorm, global_random_seed: int) -> None:
    sae, x = trained(global_random_seed, "topk", norm), rows(global_random_seed, 300)
    sae.scale.fill_(1)
    refined = LeaveOneOut(sae)
    wanted = published(*in_units(sae, x), 0.0)
    clear = ~wanted.isnan().any(1)
    assert int(clear.sum()) > 250
    f = refined.encode(x)
    torch.testing.assert_close(f[clear].double(), wanted[clear], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(
        refined.complete(refined.decode(f), x), sae.complete(sae.decode(f), x)
    )


@pytest.mark.parametrize("kind", KINDS)
def test_without_one_dropped_latent_the_error_falls(kind: str, global_random_seed: int) -> None:
    """By at least f_i^2 |d_i|^2; without a latent that stays by less, or it rises."""
    sae, x = trained(global_random_seed, kind), rows(global_random_seed, 200)
    u, f, w, b = in_units(sae, x)
    stays = LeaveOneOut(sae).encode(x) != 0
    error = (u - f @ w - b).square().sum(1)
    counts = [0, 0]
    for row, latent in (f != 0).nonzero().tolist():
        without = f[row].clone()
        without[latent] = 0
        fall = float(error[row] - (u[row] - without @ w - b).square().sum())
        least = float(f[row, latent].square() * w[latent].square().sum())
        dropped = not bool(stays[row, latent])
        counts[dropped] += 1
        assert (fall >= least - NEAR) if dropped else (fall <= least + NEAR)
    assert min(counts) > 20


@pytest.mark.parametrize("kind", ["topk", "relu"])
def test_sums_and_blocks_are_those_of_the_code(kind: str, global_random_seed: int) -> None:
    sae, x = trained(global_random_seed, kind), rows(global_random_seed, 50)
    refined = LeaveOneOut(sae)
    assert isinstance(refined, SparseSubject)
    f, cuts = refined.encode(x), torch.tensor([3, 10, 10, 41])
    sums = torch.stack([f[a:b].sum(0) for a, b in itertools.pairwise(cuts)])
    torch.testing.assert_close(refined.pooled(x, cuts), sums)
    for block, code in refined.codes(x):
        torch.testing.assert_close(refined.decode_code(code), refined.decode(f[block]))
    assert refined.encode(x[:0]).shape == (0, D_SAE)


def test_a_dense_code_is_refined_as_a_sparse_one(global_random_seed: int) -> None:
    sae, x = trained(global_random_seed, "topk"), rows(global_random_seed)
    refined, f = LeaveOneOut(sae, 0.1), sae.encode(x)
    wanted = refined.encode(x)
    sae.codes = lambda x, starts=None: iter([(slice(0, len(x)), Code(f, f, None))])  # type: ignore
    torch.testing.assert_close(refined.encode(x), wanted)


def test_orthogonal_latents_stay_and_two_alike_go_together() -> None:
    settings = {"d_sae": 8, "activation": "relu", "tied": True, "controllers": []}
    made = SAEConfig.parse(settings | LOSSES).build(D_IN)
    with torch.no_grad():
        made.W_enc.copy_(torch.eye(8, D_IN))
        made.b_enc.zero_()
        made.b_dec.zero_()
        made.scale.fill_(1)
    made.eval()
    x = rows(0)
    torch.testing.assert_close(LeaveOneOut(made).encode(x), made.encode(x))
    with torch.no_grad():
        made.W_enc[1] = made.W_enc[0]
    x = torch.eye(1, D_IN) * 2
    assert made.encode(x)[0].tolist()[:3] == [2, 2, 0]
    assert not bool(LeaveOneOut(made).encode(x).any())


def test_what_cannot_be_refined_is_refused() -> None:
    config = SAEConfig.parse({"d_sae": 8, "controllers": [], "losses": ["reconstruction"]})
    with pytest.raises(SettingError, match="a target is not seen at inference"):
        LeaveOneOut(config.build(D_IN, d_out=5).eval())
    for threshold in (float("nan"), float("inf")):
        with pytest.raises(SettingError, match="use a finite number"):
            LeaveOneOut(config.build(D_IN).eval(), threshold)


def test_contexts_are_handed_on(global_random_seed: int) -> None:
    sae = trained(global_random_seed, "topk")
    asked: list[Any] = []
    codes = sae.codes
    sae.codes = lambda x, starts=None: asked.append(starts) or codes(x)  # type: ignore[method-assign]
    x, starts = rows(global_random_seed), torch.tensor([0, 15, 40])
    refined = LeaveOneOut(cast(SAE, sae))
    refined.encode(x, starts)
    refined.pooled(x, torch.tensor([0, 40]), starts)
    assert all(one is starts for one in asked) and len(asked) == 2
