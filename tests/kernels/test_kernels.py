"""Sparse encode and decode against dense autograd, in values and gradients."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from saelab.kernels import (
    Code,
    Support,
    decode_at,
    decode_with_norms,
    eager,
    encode_all,
    encode_at,
    functions,
    has_fast_bfloat16,
    kernels_name,
    mean_square,
    most_pairs,
    native,
    preactivations,
    row_norms,
    selection_dtype,
    support_above,
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


needs_native = pytest.mark.skipif(native.library() is None, reason=native.unavailable_reason())


@pytest.fixture(
    params=["sampled product", "gathered slices", pytest.param("native", marks=needs_native)],
    scope="class",
)
def path(request: pytest.FixtureRequest) -> Iterator[str]:
    """The kernels: eager with MKL's sampled product, eager with gathers in slices, and native."""
    with pytest.MonkeyPatch.context() as patch:
        if request.param != "native":
            patch.setattr(functions, "kernels_for", lambda device: eager)
        if request.param == "gathered slices":
            patch.setattr(torch.backends.mkl, "is_available", lambda: False)
            patch.setattr(eager, "SLICE", 5)
        yield request.param


@pytest.mark.usefixtures("path")
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

    @given(problems)
    def test_decode_with_norms(self, p: Problem) -> None:
        y, norms = decode_with_norms(p.values, p.w, p.support)
        wanted, dense_norms = p.dense(p.values) @ p.w, torch.linalg.vector_norm(p.w, dim=1)
        close(norms, dense_norms)
        weights = torch.linspace(-1, 2, len(norms))
        for both, parts in (
            ((y.square().sum() + norms @ weights), (wanted.square().sum() + dense_norms @ weights)),
            (norms @ weights, dense_norms @ weights),
            (y.sum(), wanted.sum()),
        ):
            got = torch.autograd.grad(both, (p.values, p.w), retain_graph=True, allow_unused=True)
            other = torch.autograd.grad(
                parts, (p.values, p.w), retain_graph=True, allow_unused=True
            )
            for one, two in zip(got, other, strict=True):
                if two is not None:
                    close(one, two)

    @given(problems)
    def test_centre_has_the_gradient_that_u_would_pass_on(self, p: Problem) -> None:
        x, centre = p.u.detach(), torch.linspace(-1, 1, p.u.shape[1]).requires_grad_()
        weights = torch.linspace(-1, 2, p.support.nnz)
        u = (x - centre).detach()
        z = encode_at(u, p.w, p.b, p.support, None, centre)
        wanted = ((x - centre) @ p.w.T + p.b).flatten()[p.support.flat]
        leaves = (p.w, p.b, centre)
        got = torch.autograd.grad((z * weights).sum(), leaves)
        for one, other in zip(
            got, torch.autograd.grad((wanted * weights).sum(), leaves), strict=True
        ):
            close(one, other)

    @pytest.mark.parametrize("d", [1, 15, 16, 17, 64, 192, 200, 777])
    def test_widths(self, d: int, global_random_seed: int) -> None:
        """Rows are worked through in strips of vectors: every remainder must be right."""
        p = problem(global_random_seed, 9, 14, d, 0.4, torch.float32)
        z = encode_at(p.u, p.w, p.b, p.support) / d
        y = decode_at(p.values, p.w, p.support)
        leaves = (p.u, p.w, p.b, p.values)
        got = torch.autograd.grad((z * p.values).sum() + y.square().mean(), leaves)
        dense = (p.u @ p.w.T + p.b).flatten()[p.support.flat] / d
        wanted = (dense * p.values).sum() + (p.dense(p.values) @ p.w).square().mean()
        for one, other in zip(got, torch.autograd.grad(wanted, leaves), strict=True):
            torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)

    def test_gradcheck(self, global_random_seed: int) -> None:
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

    @given(st.integers(0, 2**32), st.sampled_from([0.0, 0.05, 0.3, 0.4, 1.0]), st.integers(0, 5))
    def test_above(self, seed: int, density: float, n: int) -> None:
        z = torch.rand(n, 64, generator=torch_stream(seed, "selection")) - (1 - density)
        mask = z > 0
        support = support_above(z)
        if int(mask.sum()) > most_pairs(z.numel()):
            assert support is None
        else:
            assert support is not None
            support.check()
            again = torch.zeros(mask.numel(), dtype=torch.bool)
            again[support.flat] = True
            assert torch.equal(again.view(mask.shape), mask)
            assert torch.equal(support.flat, support.rows * 64 + support.latents)

    def test_above_one_floor_for_all(self) -> None:
        support = support_above(torch.tensor([[1.0, 2.0, 3.0, 0.0, 0.0]]), torch.tensor(2.0))
        assert support is not None and support.latents.tolist() == [2]

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


class TestMeanSquare:
    def test_against_torch(self, global_random_seed: int) -> None:
        stream = torch_stream(global_random_seed, "squares")
        a, b = (torch.randn(5, 4, generator=stream, dtype=torch.float64) for _ in range(2))
        a.requires_grad_()
        b.requires_grad_()
        torch.testing.assert_close(mean_square(a, b), (a - b).square().mean())
        assert torch.autograd.gradcheck(mean_square, (a, b))


class TestEncodeAll:
    def test_gradcheck(self, global_random_seed: int) -> None:
        p = problem(global_random_seed, 4, 6, 3, 0.4, torch.float64)
        assert torch.autograd.gradcheck(lambda u, w, b: encode_all(u, w, b), (p.u, p.w, p.b))

    def test_centre(self, global_random_seed: int) -> None:
        p = problem(global_random_seed, 4, 6, 3, 0.4, torch.float64)
        x, centre = p.u.detach(), torch.ones(3, dtype=torch.float64, requires_grad=True)
        weights = torch.linspace(-1, 2, 24, dtype=torch.float64).view(4, 6)
        z = encode_all((x - centre).detach(), p.w, p.b, centre)
        wanted = (x - centre) @ p.w.T + p.b
        for leaf in (p.w, p.b, centre):
            one, other = (
                torch.autograd.grad((k * weights).sum(), leaf, retain_graph=True)[0]
                for k in (z, wanted)
            )
            close(one, other)


class TestCode:
    @given(problems)
    def test_sparse_equals_dense(self, p: Problem) -> None:
        values = p.values.detach().clone()
        values[::3] = 0  # pairs inside a margin
        sparse = Code(values, values, p.support)
        dense = Code(p.dense(values), p.dense(values), None)
        assert torch.equal(sparse.dense(), dense.values)
        assert torch.equal(sparse.firings, dense.firings)
        assert torch.equal(sparse.row_counts, dense.row_counts)
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
        "eager.encode(torch.ones(2, 3), torch.ones(4, 3), None,"
        " support_of_topk(torch.tensor([[0], [1]]), 4))"
    )
    done = subprocess.run(
        [sys.executable, "-W", "error::UserWarning", "-c", script], capture_output=True, text=True
    )
    assert done.returncode == 0 and not done.stderr, done.stderr


# ---- the native kernels against the eager ones ---------------------------------------------------

SPECIAL = [0.0, -0.0, 1e-45, -1e-45, 1e-39, -1e-39, torch.inf, -torch.inf, 3.0, -3.0]


@pytest.fixture(params=[1, 2, 3])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def drawn(seed: int, n: int, d_sae: int, dtype: torch.dtype, distinct: int = 0) -> Tensor:
    """Normal values, special ones among them; rounded to few distinct values to make ties."""
    z = torch.randn(n, d_sae, generator=torch_stream(seed, "values"))
    if distinct:
        z = (z * distinct).round() / distinct
    z.view(-1)[: len(SPECIAL)] = torch.tensor(SPECIAL)[: z.numel()]
    return z.to(dtype)


selections = {
    "seed": st.integers(0, 2**32),
    "n": st.integers(0, 6),
    "d_sae": st.sampled_from([1, 7, 63, 64, 65, 200, 1000]),
    "dtype": st.sampled_from([torch.float32, torch.bfloat16]),
    "distinct": st.sampled_from([0, 2]),
}


@needs_native
class TestNative:
    @given(**selections, floors=st.booleans(), share=st.sampled_from([0.1, 0.5, 1.0]))
    def test_above(self, seed, n, d_sae, dtype, distinct, floors, share) -> None:
        z = drawn(seed, n, d_sae, dtype, distinct)
        floor = torch.randn(d_sae, generator=torch_stream(seed, "floor")) if floors else None
        limit = int(share * z.numel())
        got, wanted = native.above(z, floor, limit), eager.above(z, floor, limit)
        assert (got is None) == (wanted is None)
        if got is not None and wanted is not None:
            assert torch.equal(got[0], wanted[0]) and torch.equal(got[1], wanted[1])

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_above_with_all_pairs_in_one_threads_rows(
        self, threads: int, dtype: torch.dtype
    ) -> None:
        z = -torch.ones(8, 100, dtype=dtype)
        z[0] = z[1, 3] = 1
        got = native.above(z, None, 101)
        assert got is not None
        assert got[0].tolist() == [0, 100] + [101] * 7
        assert got[1].tolist() == [*range(100), 3]
        assert native.above(z, None, 100) is None

    @pytest.mark.parametrize("share", [0.01, 0.08, 0.1, 0.5])
    def test_above_holds_no_more_than_the_pairs(self, threads: int, share: float) -> None:
        """With room in the first scan, in all but one thread of it, and in the second only."""
        z = torch.rand(64, 512, generator=torch_stream(0, "above")) - (1 - share)
        z[:32] -= share / 2  # the threads' rows are not equally dense
        got, wanted = native.above(z, None, z.numel()), eager.above(z, None, z.numel())
        assert got is not None and wanted is not None
        assert torch.equal(got[0], wanted[0]) and torch.equal(got[1], wanted[1])
        assert got[1].untyped_storage().nbytes() == 8 * len(wanted[1])

    @given(**selections, k=st.integers(1, 70))
    def test_topk(self, seed, n, d_sae, dtype, distinct, k) -> None:
        z, k = drawn(seed, n, d_sae, dtype, distinct) + 0.0, min(k, d_sae)  # no -0.0
        got = native.topk(z, k)
        assert got.shape == (n, k) and (got.diff(dim=1) > 0).all()
        values = z.gather(1, got).sort(dim=1).values
        assert torch.equal(values, z.gather(1, eager.topk(z, k)).sort(dim=1).values)
        for row, chosen in zip(z, got, strict=True):  # ties go to the lower index
            cut = row[chosen].min()
            ties = (row == cut).nonzero().flatten()
            assert set(chosen[row[chosen] == cut].tolist()) == set(
                ties[: int((row[chosen] == cut).sum())].tolist()
            )

    def test_topk_of_nan_stays_in_range(self) -> None:
        z = torch.full((2, 70), torch.nan)
        got = native.topk(z, 5)
        assert (got >= 0).all() and (got < 70).all() and (got.diff(dim=1) > 0).all()

    @given(**selections, share=st.floats(0, 1))
    def test_kth_largest(self, seed, n, d_sae, dtype, distinct, share) -> None:
        z = drawn(seed, n + 1, d_sae, dtype, distinct)
        rank = 1 + int(share * (z.numel() - 1))
        assert native.kth_largest(z, rank) == eager.kth_largest(z, rank)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_kth_largest_when_the_first_values_mislead(
        self, threads: int, dtype: torch.dtype, global_random_seed: int
    ) -> None:
        """The first sixteenth sets a bound; here it holds all the large values."""
        z = drawn(global_random_seed, 64, 500, dtype).sort(dim=0, descending=True).values
        for rank in (1, 50, 1000, 8000):
            assert native.kth_largest(z, rank) == eager.kth_largest(z, rank)

    @given(problems)
    def test_index_and_counts(self, p: Problem) -> None:
        s = p.support
        for one, other in zip(
            native.by_latent(s.offsets, s.latents, s.d_sae),
            eager.by_latent(s.offsets, s.latents, s.d_sae),
            strict=True,
        ):
            assert torch.equal(one, other)
        values = p.values.detach().clone()
        values[::3] = 0
        got, wanted = native.firings(values, s), eager.firings(values, s)
        assert torch.equal(got[0], wanted[0]) and got[1] == wanted[1]

    @pytest.mark.parametrize("d", [1, 15, 16, 33, 192, 200])
    def test_unit_rows(self, threads: int, d: int, global_random_seed: int) -> None:
        stream = torch_stream(global_random_seed, "rows")
        w, g = (torch.randn(9, d, generator=stream) for _ in range(2))
        w[2] = 0
        ours, theirs = w.clone(), w.clone()
        native.normalise(ours)
        eager.normalise(theirs)
        close(ours, theirs)
        assert not ours[2].any()
        left, wanted = g.clone(), g.clone()
        native.project_out(left, ours)
        eager.project_out(wanted, theirs)
        close(left, wanted)
        assert torch.linalg.vecdot(left, ours).abs().max() < 1e-4
        strided = torch.randn(d, 9, generator=stream).t()
        expected = torch.nn.functional.normalize(strided, dim=1)
        native.normalise(strided)
        close(strided, expected)

    @pytest.mark.parametrize("shape", [(0, 5), (1, 1), (7, 33), (20, 200)])
    def test_gram_product(self, shape: tuple[int, int], global_random_seed: int) -> None:
        stream = torch_stream(global_random_seed, "gram")
        z = torch.randn(*shape, generator=stream)
        weights = torch.rand(shape[0], generator=stream)
        v = torch.randn(shape[1], generator=stream)
        for one, other in zip(
            native.gram_product(z, weights, v), eager.gram_product(z, weights, v), strict=True
        ):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)

    def test_bits_do_not_depend_on_threads(self, threads: int, global_random_seed: int) -> None:
        p = problem(global_random_seed, 40, 900, 192, 0.05, torch.float32)
        u, w, b, values = (x.detach() for x in (p.u, p.w, p.b, p.values))
        support = Support(p.support.offsets, p.mask.nonzero()[:, 1], 900)  # latents rising
        g = torch.linspace(-1, 1, support.nnz)

        def results() -> list[Tensor]:
            return [
                native.encode(u, w, b, support),
                *native.encode_backward(g, u, support),
                native.decode(values, w, support),
                *native.decode_backward(u, values, w, support),
                *native.above(u, None, u.numel()),  # type: ignore[misc]
                native.topk(u, 7),
            ]

        many = results()
        torch.set_num_threads(1)
        assert all(torch.equal(a, b) for a, b in zip(many, results(), strict=True))


class TestChoice:
    def test_eager_on_request_and_without_a_compiler(self) -> None:
        """Where nobody asked for it, that is one line on stderr, however often kernels are used."""
        script = "from saelab.kernels import kernels_name; kernels_name(); print(kernels_name())"
        environment = {k: v for k, v in os.environ.items() if k not in ("CXX", "SAELAB_KERNELS")}
        for extra, said in (
            ({"SAELAB_KERNELS": "eager"}, "eager (SAELAB_KERNELS=eager"),
            ({"PATH": "/nowhere"}, "eager (no C++ compiler"),
            ({"CXX": "/nowhere/c++"}, "eager (/nowhere/c++ does not run"),
            ({"CXX": "/bin/false"}, "eager (/bin/false failed"),
        ):
            done = subprocess.run(
                [sys.executable, "-c", script],
                capture_output=True,
                text=True,
                env=environment | extra,
                check=True,
            )
            assert done.stdout.startswith(said)
            reason = done.stdout.strip().removeprefix("eager (").removesuffix(")")
            line = f"the slower eager kernels are used: {reason}\n"
            assert done.stderr == ("" if extra.get("SAELAB_KERNELS") else line)

    @needs_native
    def test_native_is_built_once(self, tmp_path: Path) -> None:
        script = "from saelab.kernels import kernels_name; print(kernels_name())"
        times = []
        for _ in range(2):
            done = subprocess.run(
                [sys.executable, "-c", script],
                capture_output=True,
                text=True,
                env=os.environ | {"XDG_CACHE_HOME": str(tmp_path)},
                check=True,
            )
            assert done.stdout == "native\n"
            file, checksum = sorted((tmp_path / "saelab").iterdir())
            assert checksum.name == f"{file.name}.sha256"
            times.append(file.stat().st_mtime_ns)
        assert times[0] == times[1]

    @needs_native
    def test_name(self) -> None:
        assert kernels_name() == "native"
