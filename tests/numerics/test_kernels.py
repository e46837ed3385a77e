"""Sparse encode and decode against dense autograd, in values and gradients."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from saelab.kernels import (
    DENSEST,
    Code,
    Support,
    decode_at,
    eager,
    encode_at,
    has_fast_bfloat16,
    positive,
    preactivations,
    row_norms,
    selection_dtype,
    support_of_mask,
    support_of_topk,
)
from saelab.seeding import torch_stream

CPU = torch.device("cpu")


def support_of(mask: Tensor, shuffle: torch.Generator | None = None) -> Support:
    """The pairs of a mask at any density; latents in any order within their row."""
    latents = []
    for row in mask:
        here = row.nonzero().flatten()
        latents.append(
            here if shuffle is None else here[torch.randperm(len(here), generator=shuffle)]
        )
    counts = torch.tensor([0, *(len(row) for row in latents)])
    return Support(
        counts.cumsum(0), torch.cat([*latents, torch.empty(0, dtype=torch.int64)]), mask.shape[1]
    )


@dataclass(eq=False)
class Problem:
    """Weights, inputs and a support, drawn from one seed."""

    u: Tensor
    w: Tensor
    b: Tensor
    values: Tensor
    mask: Tensor
    support: Support

    def dense(self, values: Tensor) -> Tensor:
        out = torch.zeros(self.mask.numel(), dtype=values.dtype)
        return out.index_put((self.support.flat,), values).view(self.mask.shape)


def problem(seed: int, n: int, d_sae: int, d: int, density: float, dtype: torch.dtype) -> Problem:
    stream = torch_stream(seed, "kernel problem")

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=stream, dtype=dtype).requires_grad_()

    u, w, b = draw(n, d), draw(d_sae, d), draw(d_sae)
    mask = torch.rand(n, d_sae, generator=stream) < density
    if n > 2:
        mask[1] = False  # a row without pairs between others
    support = support_of(mask, stream)
    return Problem(u, w, b, draw(support.nnz), mask, support)


problems = st.builds(
    problem,
    seed=st.integers(0, 2**32),
    n=st.integers(0, 9),
    d_sae=st.integers(1, 12),
    d=st.integers(1, 8),
    density=st.sampled_from([0.0, 0.05, 0.3, 0.7, 1.0]),
    dtype=st.just(torch.float32),
)


def close(got: Tensor | None, wanted: Tensor | None) -> None:
    """Equal to 1e-5 of the row's norm, sums of a few terms near 0 allowed their rounding."""
    assert got is not None and wanted is not None and got.shape == wanted.shape
    torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-5)


@pytest.fixture(params=["sampled product", "gathered slices"])
def path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Both ways to inner products: MKL's sampled product and the fallback, in several slices."""
    if request.param == "gathered slices":
        monkeypatch.setattr(torch.backends.mkl, "is_available", lambda: False)
        monkeypatch.setattr(eager, "SLICE", 5)
    return request.param


class TestAgainstDense:
    @given(problems)
    def test_encode(self, p: Problem) -> None:
        z = encode_at(p.u, p.w, p.b, p.support)
        wanted = (p.u @ p.w.T + p.b).flatten()[p.support.flat]
        close(z, wanted)
        weights = torch.linspace(-1, 2, p.support.nnz)
        got = torch.autograd.grad((z * weights).sum(), (p.u, p.w, p.b))
        for one, other in zip(
            got, torch.autograd.grad((wanted * weights).sum(), (p.u, p.w, p.b)), strict=True
        ):
            close(one, other)

    @given(problems)
    def test_decode(self, p: Problem) -> None:
        y = decode_at(p.values, p.w, p.support)
        wanted = p.dense(p.values) @ p.w
        close(y, wanted)
        got = torch.autograd.grad(y.square().sum(), (p.values, p.w))
        for one, other in zip(
            got, torch.autograd.grad(wanted.square().sum(), (p.values, p.w)), strict=True
        ):
            close(one, other)

    @pytest.mark.parametrize("density", [0.0, 0.2, 1.0])
    def test_both_paths(self, path: str, density: float, global_random_seed: int) -> None:
        p = problem(global_random_seed, 7, 11, 5, density, torch.float32)
        wanted = (p.u @ p.w.T).flatten()[p.support.flat]
        close(eager.inner_products(p.u.detach(), p.w.detach(), p.support), wanted.detach())

    def test_gradcheck(self, path: str, global_random_seed: int) -> None:
        p = problem(global_random_seed, 4, 6, 3, 0.4, torch.float64)
        assert torch.autograd.gradcheck(
            lambda u, w, b: encode_at(u, w, b, p.support), (p.u, p.w, p.b)
        )
        assert torch.autograd.gradcheck(lambda v, w: decode_at(v, w, p.support), (p.values, p.w))

    def test_expanded_and_transposed_gradients(self, global_random_seed: int) -> None:
        p = problem(global_random_seed, 6, 9, 4, 0.5, torch.float32)
        z = encode_at(p.u, p.w, p.b, p.support)
        (got,) = torch.autograd.grad(z.sum(), p.w)  # the gradient of a sum has stride 0
        (wanted,) = torch.autograd.grad((p.u @ p.w.T)[p.mask].sum(), p.w)
        close(got, wanted)
        y = decode_at(p.values, p.w, p.support).T
        weights = torch.linspace(-1, 1, y.numel()).view(y.shape)
        (got,) = torch.autograd.grad((y * weights).sum(), p.values)
        (wanted,) = torch.autograd.grad(((p.dense(p.values) @ p.w).T * weights).sum(), p.values)
        close(got, wanted)

    def test_only_asked_gradients(self, global_random_seed: int) -> None:
        p = problem(global_random_seed, 6, 9, 4, 0.5, torch.float32)
        fixed = p.w.detach()
        encode_at(p.u, fixed, p.b.detach(), p.support).sum().backward()
        decode_at(p.values, fixed, p.support).sum().backward()
        assert p.u.grad is not None and p.values.grad is not None
        assert fixed.grad is None and p.b.grad is None

    def test_products_are_reused_in_their_own_precision_only(self, global_random_seed: int) -> None:
        p = problem(global_random_seed, 6, 9, 4, 0.5, torch.float32)
        exact = (p.u @ p.w.T + p.b).detach()
        close(encode_at(p.u, p.w, p.b, p.support, exact), exact.flatten()[p.support.flat])
        coarse = preactivations(p.u, p.w, p.b, torch.bfloat16)
        assert not torch.allclose(coarse.float(), exact, rtol=1e-5)
        close(encode_at(p.u, p.w, p.b, p.support, coarse), exact.flatten()[p.support.flat])


class TestSupport:
    @given(problems)
    def test_indices_agree(self, p: Problem) -> None:
        s = p.support
        s.check()
        assert s.nnz == int(p.mask.sum()) and s.n_rows == len(p.mask)
        assert torch.equal(s.rows * s.d_sae + s.latents, s.flat)
        assert p.mask.flatten()[s.flat].all()
        order, rows, offsets = s.by_latent
        assert torch.equal(order.sort().values, torch.arange(s.nnz))
        assert torch.equal(rows, s.rows[order])
        assert torch.equal(offsets.diff(), p.mask.sum(0))
        assert (s.latents[order].diff() >= 0).all()

    @pytest.mark.parametrize(
        ("offsets", "latents", "message"),
        [
            ([0, 1, 3], [0, 1], "offsets must rise"),
            ([1, 1, 2], [0, 1], "offsets must rise"),
            ([0, 2, 1, 2], [0, 1], "offsets must rise"),
            ([0, 1, 2], [0, 4], "latents must lie in [0, 4)"),
            ([0, 1, 2], [-1, 3], "latents must lie in [0, 4)"),
            ([0, 2, 2], [3, 3], "a latent occurs twice"),
        ],
    )
    def test_check_refuses(self, offsets: list[int], latents: list[int], message: str) -> None:
        with pytest.raises(ValueError, match=message.replace("[", r"\[").replace(")", r"\)")):
            Support(torch.tensor(offsets), torch.tensor(latents), 4).check()

    def test_same_latent_in_two_rows_is_fine(self) -> None:
        Support(torch.tensor([0, 1, 2]), torch.tensor([3, 3]), 4).check()

    @given(st.integers(0, 2**32), st.sampled_from([0.0, 0.05, 0.125, 0.2, 1.0]), st.integers(0, 5))
    def test_of_mask(self, seed: int, density: float, n: int) -> None:
        mask = torch.rand(n, 64, generator=torch_stream(seed, "mask")) < density
        support = support_of_mask(mask)
        if int(mask.sum()) > DENSEST * mask.numel():
            assert support is None
        else:
            assert support is not None
            support.check()
            again = torch.zeros(mask.numel(), dtype=torch.bool)
            again[support.flat] = True
            assert torch.equal(again.view(mask.shape), mask)
            assert torch.equal(support.flat, support.rows * 64 + support.latents)

    def test_of_topk(self) -> None:
        support = support_of_topk(torch.tensor([[5, 1], [0, 7], [2, 3]]), 8)
        support.check()
        assert support.offsets.tolist() == [0, 2, 4, 6]
        assert support.rows.tolist() == [0, 0, 1, 1, 2, 2]
        assert support.flat.tolist() == [5, 1, 8, 15, 18, 19]


class TestRowNorms:
    def test_against_torch(self, global_random_seed: int) -> None:
        w = torch.randn(
            7, 5, generator=torch_stream(global_random_seed, "rows"), dtype=torch.float64
        )
        w.requires_grad_()
        torch.testing.assert_close(row_norms(w), torch.linalg.vector_norm(w, dim=1))
        assert torch.autograd.gradcheck(row_norms, w)

    @pytest.mark.parametrize("up", [1.0, -1e6])
    def test_zero_row_has_no_gradient(self, up: float) -> None:
        w = torch.tensor([[0.0, 0.0], [3.0, 4.0]], requires_grad=True)
        (row_norms(w) * up).sum().backward()
        assert w.grad is not None
        torch.testing.assert_close(w.grad, up * torch.tensor([[0.0, 0.0], [0.6, 0.8]]))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_positive(dtype: torch.dtype, global_random_seed: int) -> None:
    special = [0.0, -0.0, 1e-45, -1e-45, 1e-39, -1e-39, torch.inf, -torch.inf, 3.0, -3.0]
    drawn = torch.randn(5, 10, generator=torch_stream(global_random_seed, "signs"))
    z = torch.cat([torch.tensor([special]), drawn]).to(dtype)
    assert torch.equal(positive(z), z > 0)
    assert torch.equal(positive(z[:, 2:7]), z[:, 2:7] > 0)


class TestCode:
    @given(problems)
    def test_sparse_equals_dense(self, p: Problem) -> None:
        values = p.values.detach().clone()
        values[::3] = 0  # pairs inside a margin
        sparse = Code(values, values, p.support)
        dense = Code(p.dense(values), p.dense(values), None)
        assert torch.equal(sparse.dense(), dense.values)
        assert torch.equal(sparse.firings, dense.firings)
        assert sparse.l0 == dense.l0
        weight = torch.linspace(1, 2, p.support.d_sae)
        close(sparse.weighted_sum(weight), dense.weighted_sum(weight))

    def test_by_hand(self) -> None:
        support = Support(torch.tensor([0, 2, 2, 3]), torch.tensor([2, 0, 1]), 3)
        values = torch.tensor([2.0, 0.0, 5.0], requires_grad=True)
        code = Code(values, values, support)
        assert code.dense().tolist() == [[0, 0, 2], [0, 0, 0], [0, 5, 0]]
        assert code.firings.tolist() == [0, 1, 1] and code.l0 == pytest.approx(2 / 3)
        weight = torch.tensor([1.0, 10.0, 100.0], requires_grad=True)
        total = code.weighted_sum(weight)
        total.backward()
        assert float(total.detach()) == 250
        assert values.grad is not None and values.grad.tolist() == [100, 1, 10]
        assert weight.grad is not None and weight.grad.tolist() == [0, 5, 2]

    def test_no_rows(self) -> None:
        support = Support(torch.zeros(1, dtype=torch.int64), torch.empty(0, dtype=torch.int64), 3)
        code = Code(torch.empty(0), torch.empty(0), support)
        assert code.l0 == 0 and code.dense().shape == (0, 3) and code.firings.tolist() == [0, 0, 0]


class TestPrecision:
    def test_table(self) -> None:
        assert selection_dtype("float32", CPU) == torch.float32
        assert selection_dtype("bfloat16", CPU) == torch.bfloat16
        fast = has_fast_bfloat16(CPU)
        assert selection_dtype("auto", CPU) == (torch.bfloat16 if fast else torch.float32)
        assert selection_dtype("auto", torch.device("cuda")) == torch.bfloat16
        assert selection_dtype("float32", torch.device("cuda")) == torch.float32

    def test_selection_has_no_gradient(self, global_random_seed: int) -> None:
        p = problem(global_random_seed, 6, 9, 4, 0.5, torch.float32)
        z = preactivations(p.u, p.w, p.b, torch.float32)
        assert not z.requires_grad
        close(z, (p.u @ p.w.T + p.b).detach())


def test_torch_does_not_warn_of_sparse_tensors() -> None:
    """One line on stderr of every launch would be one too many; other warnings stay errors."""
    script = (
        "import torch; from saelab.kernels import eager, support_of_topk;"
        "eager.inner_products(torch.ones(2, 3), torch.ones(4, 3),"
        " support_of_topk(torch.tensor([[0], [1]]), 4))"
    )
    done = subprocess.run(
        [sys.executable, "-W", "error::UserWarning", "-c", script], capture_output=True, text=True
    )
    assert done.returncode == 0 and not done.stderr, done.stderr
