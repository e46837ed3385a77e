"""Sparse inference: the same code as `encode`, without its zeros."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch

from saelab.checks.examples import cases
from saelab.kernels import Code, Support, eager, native, selection_dtype
from saelab.sae import ROWS, SAE, SAEConfig
from saelab.seeding import torch_stream

D_IN, D_SAE = 24, 160
BESIDE = ("losses", "controllers", "constraints")
KINDS: dict[str, dict[str, Any]] = {
    str(case): {name: part for name, part in case.settings(D_SAE).parts().items() if name in BESIDE}
    | {"activation": case.part, "initial_l0": 6 if case.part.takes_initial_l0 else None}
    | {name: getattr(case.settings(D_SAE), name) for name in ("tied", "encoder_bias")}
    for case in cases(D_SAE, "activation")
} | {
    "relu": {"activation": "relu"},
    "scaled": {"activation": "relu", "scaling": {"kind": "variance", "tau": 0.5}},
    "jumprelu": {"activation": {"kind": "jumprelu", "threshold": 1.0}},
    "dense": {"activation": "relu", "initial_l0": None},
}


def rows(seed: int, n: int = 2 * ROWS + 37) -> torch.Tensor:
    """Activations with unequal norms: rounding errors differ from row to row."""
    stream = torch_stream(seed, "rows")
    x = torch.randn(n, D_IN, generator=stream)
    return 3 * x * torch.rand(n, 1, generator=stream).mul(4).exp() / 10 + 1


def built(kind: str, seed: int, precision: str) -> SAE:
    settings = {"initial_l0": 6, "losses": ["reconstruction"], "controllers": []} | KINDS[kind]
    config = SAEConfig.parse({"d_sae": D_SAE, "precision": precision, **settings})
    sae = config.build(D_IN, seed=seed)
    sae.initialise(rows(seed), seed)
    if sae.activation.couples_batch:
        with torch.no_grad():
            sae.activation.update(sae(rows(seed)))
    return sae.eval()


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("kind", KINDS)
class TestCodes:
    def test_equal_to_encode(self, kind: str, precision: str, global_random_seed: int) -> None:
        sae, x = built(kind, global_random_seed, precision), rows(global_random_seed + 1)
        found = torch.cat([code.dense() for _, code in sae.codes(x)])
        wanted = sae.encode(x)
        # a value within rounding of its threshold may fall on either side
        near = (found != 0) != (wanted != 0)
        assert near.float().mean() < 1e-4
        torch.testing.assert_close(found[~near], wanted[~near], rtol=1e-4, atol=1e-5)

    def test_decode(self, kind: str, precision: str, global_random_seed: int) -> None:
        sae, x = built(kind, global_random_seed, precision), rows(global_random_seed + 1)
        for here, code in sae.codes(x):
            wanted = sae.decode(code.dense())
            torch.testing.assert_close(sae.decode_code(code), wanted, rtol=1e-4, atol=1e-3)
            assert len(wanted) == len(x[here])

    def test_pooled(self, kind: str, precision: str, global_random_seed: int) -> None:
        sae, x = built(kind, global_random_seed, precision), rows(global_random_seed + 1)
        cuts = torch.tensor([0, 0, 1, 40, ROWS, 2 * ROWS + 20, len(x)])
        code = torch.cat([code.dense() for _, code in sae.codes(x)])
        wanted = [code[start:stop].sum(0) for start, stop in itertools.pairwise(cuts)]
        found = sae.pooled(x, cuts)
        torch.testing.assert_close(found, torch.stack(wanted), rtol=1e-4, atol=1e-2)


def test_bfloat16_alone_would_miss_active_latents(global_random_seed: int) -> None:
    """So the lowered floors matter: without them the codes differ."""
    sae, x = built("relu", global_random_seed, "bfloat16"), rows(global_random_seed + 1)
    assert selection_dtype("bfloat16", x.device) == torch.bfloat16
    u = x / sae.scale - sae.b_dec
    rough = torch.addmm(sae.b_enc.bfloat16(), u.bfloat16(), sae.W_enc.bfloat16().t()) > 0
    assert (rough != (sae.encode(x) > 0)).any()
    assert sae.encode(x)[rough != (sae.encode(x) > 0)].max() > 1e-3


def test_training_mode_is_refused(global_random_seed: int) -> None:
    sae = built("relu", global_random_seed, "auto").train()
    with pytest.raises(RuntimeError, match="eval"):
        next(sae.codes(rows(0)))


@pytest.mark.parametrize(
    "kernels",
    [
        eager,
        pytest.param(
            native, marks=pytest.mark.skipif(native.library() is None, reason="no compiler")
        ),
    ],
)
def test_pool_by_hand(kernels: Any) -> None:
    dense = torch.tensor([[1.0, 0, 2], [0, 3, 0], [4, 0, 0], [0, 0, 5]])
    support_pairs = eager.above(dense, None, 12)
    assert support_pairs is not None

    support = Support(support_pairs[0], support_pairs[1], 3)
    values = dense[dense > 0]
    sums = torch.ones(2, 3)
    kernels.pool(values, support, torch.tensor([1, 3, 4]), sums)
    assert sums.tolist() == [[5, 4, 1], [1, 1, 6]]
    again = torch.ones(2, 3)
    Code(dense, dense, None).add_to(again, torch.tensor([1, 3, 4]))
    assert torch.equal(again, sums)
