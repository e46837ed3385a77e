"""Both similarity terms against a dense reference, by gradcheck, over seeds and for scale."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck
from torch.nn.functional import normalize

from saelab.kernels import Code, encode_at, support_above
from saelab.parts.losses.similarity.code import (
    Standard,
    code_similarity,
    dense_columns,
    product_moments,
    scale_free,
    similarity,
)
from saelab.parts.losses.similarity.decoder import deal, decoder_similarity
from saelab.seeding import torch_stream

N, D, F = 40, 6, 14


def draw(seed: int, *shape: int, name: str = "test") -> Tensor:
    generator = torch_stream(seed, name, *shape)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def whole(n: int = F) -> list[Tensor]:
    return [torch.arange(n)]


# ---- the reference: dense, by autograd ---------------------------------------------------------


def reference_decoder(w: Tensor, chunks: list[Tensor], form: str) -> Tensor:
    total, count = w.new_zeros(()), 0
    for chunk in chunks:
        unit = normalize(w[chunk], dim=1)
        squares = (unit @ unit.T).square() * (1 - torch.eye(len(chunk), dtype=w.dtype))
        total = total + (squares.amax(1).sum() if form == "max" else squares.sum())
        count += len(chunk) * (1 if form == "max" else len(chunk) - 1)
    return total / count


def reference_code(f: Tensor, by: Standard) -> Tensor:
    n, k = len(f), f.shape[1]
    h, off = (f - by.mean) / by.std, 1 - torch.eye(f.shape[1], dtype=f.dtype)
    first, second = h[: n // 2 + n % 2], h[n // 2 + n % 2 :]
    a, b = ((half.T @ half / len(half) - by.centre) / by.spread for half in (first, second))
    return (a * b * off).sum() / (k * (k - 1))


def standard(f: Tensor, **changes: Any) -> Standard:
    """Constants near those of f, but not the same."""
    f = f.detach()
    values = {"mean": 1.1 * f.mean(0), "std": 0.9 * f.std(0) + 0.01}
    values |= {"centre": f.new_zeros(()), "spread": f.new_ones(())}
    return Standard(**values | changes)


def code_of(w_enc: Tensor, bias: Tensor, u: Tensor, dense: bool) -> Code:
    if dense:
        return Code(torch.relu(u @ w_enc.T + bias), u, None)
    support = support_above((u @ w_enc.T + bias).detach().float())
    assert support is not None
    pre = u @ w_enc.T + bias
    values = torch.relu(pre[support.rows, support.latents])
    return Code(values, values, support)


def start(seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """W_enc, b_enc and u with a code of about a quarter of the latents."""
    w, u = draw(seed, F, D, name="w"), draw(seed, N, D, name="u")
    return w, torch.full((F,), -1.5, dtype=torch.float64), u


CHOSEN = torch.tensor([9, 2, 5, 11, 0])


@pytest.mark.parametrize("form", ["max", "mean"])
class TestDecoder:
    def test_gradcheck(self, form: Any, global_random_seed: int) -> None:
        chunks = deal(F, 5, torch_stream(global_random_seed, "chunks"))
        w = draw(global_random_seed, F, D).requires_grad_()
        assert gradcheck(lambda w: decoder_similarity(w, chunks, form)[0], (w,))

    def test_reference(self, form: Any, global_random_seed: int) -> None:
        for chunks in (whole(), deal(F, 5, torch_stream(global_random_seed, "chunks"))):
            w = draw(global_random_seed, F, D).requires_grad_()
            value, norm = decoder_similarity(w, chunks, form)
            wanted = reference_decoder(w, chunks, form)
            torch.testing.assert_close(value, wanted)
            (gradient,) = torch.autograd.grad(value, w)
            torch.testing.assert_close(gradient, torch.autograd.grad(wanted, w)[0])
            torch.testing.assert_close(norm, gradient.norm())
            assert gradient.any(1).all(), "a row without gradient"

    def test_scale_does_not_matter(self, form: Any, global_random_seed: int) -> None:
        w = draw(global_random_seed, F, D).requires_grad_()
        (gradient,) = torch.autograd.grad(decoder_similarity(w, whole(), form)[0], w)
        assert torch.linalg.vecdot(gradient, w.detach()).abs().max() < 1e-12
        scaled = w.detach() * torch.linspace(0.1, 9, F, dtype=w.dtype)[:, None]
        torch.testing.assert_close(
            decoder_similarity(scaled, whole(), form)[0], decoder_similarity(w, whole(), form)[0]
        )

    def test_zero_row_and_single_rows(self, form: Any) -> None:
        w = torch.zeros(3, D, dtype=torch.float64)
        w[0, 0] = w[1, 0] = 1.0
        w.requires_grad_()
        value, _ = decoder_similarity(w, whole(3), form)
        assert float(value.detach()) == pytest.approx(2 / 3 if form == "max" else 2 / 6)
        (gradient,) = torch.autograd.grad(value, w)
        assert gradient.isfinite().all()
        alone, norm = decoder_similarity(w, [torch.tensor([0])], form)
        assert float(alone.detach()) == float(norm) == 0

    def test_some_chunks_are_unbiased_for_all(self, form: Any, global_random_seed: int) -> None:
        w, pieces = draw(global_random_seed, 24, D), []
        chunks = deal(24, 6, torch_stream(global_random_seed, "chunks"))
        for chunk in chunks:
            pieces.append(decoder_similarity(w, [chunk], form)[0])
        mean = torch.stack(pieces).mean()
        torch.testing.assert_close(mean, decoder_similarity(w, chunks, form)[0])


def test_mean_over_chunks_is_unbiased_for_all_pairs(global_random_seed: int) -> None:
    """Over 400 deals the mean of value and gradient lies within four standard errors."""
    w = draw(global_random_seed, F, D).requires_grad_()

    def sample(chunks: list[Tensor]) -> Tensor:
        value = decoder_similarity(w, chunks, "mean")[0]
        return torch.cat([value[None], torch.autograd.grad(value, w)[0].flatten()])

    deals = [deal(F, 5, torch_stream(global_random_seed, "chunks", i)) for i in range(400)]
    for chunks in (deals, [chunks[:1] for chunks in deals]):
        found = torch.stack([sample(some) for some in chunks]).detach()
        error = found.std(0) / len(found) ** 0.5
        away = (found.mean(0) - sample(whole()).detach()).abs() / error
        assert away[0] < 4 and away.square().mean() < 2


def test_deal_is_a_partition_into_nearly_equal_chunks(global_random_seed: int) -> None:
    for n, size in ((14, 5), (512, 512), (513, 512), (7, 100)):
        chunks = deal(n, size, torch_stream(global_random_seed, "chunks"))
        assert torch.cat(chunks).sort().values.tolist() == list(range(n))
        lengths = {len(chunk) for chunk in chunks}
        assert max(lengths) <= size and max(lengths) - min(lengths) <= 1


@pytest.mark.parametrize("dense", [True, False])
class TestCode:
    def test_gradcheck_into_the_encoder(self, dense: bool, global_random_seed: int) -> None:
        w, bias, u = start(global_random_seed)
        by = standard(dense_columns(code_of(w, bias, u, dense), CHOSEN))

        def term(w: Tensor, bias: Tensor) -> Tensor:
            code = code_of(w, bias, u, dense)
            return code_similarity(code, u, CHOSEN, dense_columns(code, CHOSEN), by, "constant")[0]

        assert gradcheck(term, (w.requires_grad_(), bias.requires_grad_()))

    def test_gradcheck_of_the_standardised_code(self, dense: bool, global_random_seed: int) -> None:
        """Where the constants are the batch's own, `scale_free` is the gradient of the value."""
        w, bias, u = start(global_random_seed)

        def term(w: Tensor, bias: Tensor) -> Tensor:
            code = code_of(w, bias, u, dense)
            f = dense_columns(code, CHOSEN)
            by = standard(f, mean=f.mean(0), std=f.std(0, correction=0))
            return code_similarity(code, u, CHOSEN, f, by, "scale_free")[0]

        assert gradcheck(term, (w.requires_grad_(), bias.requires_grad_()))

    def test_reference(self, dense: bool, global_random_seed: int) -> None:
        w, bias, u = start(global_random_seed)
        w.requires_grad_()
        f = torch.relu(u @ w.T + bias)[:, CHOSEN]
        products = {"mean": f.new_zeros(()), "std": f.new_ones(()), "centre": f.new_tensor(0.2)}
        for by in (standard(f), standard(f, spread=f.new_tensor(0.7), **products)):
            code = code_of(w, bias, u, dense)
            torch.testing.assert_close(dense_columns(code, CHOSEN), f.detach())
            value, norm = code_similarity(code, u, CHOSEN, f.detach(), by, "constant")
            wanted = reference_code(f, by)
            torch.testing.assert_close(value, wanted)
            (gradient,) = torch.autograd.grad(value, w)
            torch.testing.assert_close(
                gradient, torch.autograd.grad(wanted, w, retain_graph=True)[0]
            )
            torch.testing.assert_close(norm, gradient.norm())
            assert gradient[CHOSEN].any(1).all()

    def test_scale_free(self, dense: bool, global_random_seed: int) -> None:
        """No derivative along any latent's own scale, though the constants are not the batch's."""
        w, bias, u = start(global_random_seed)
        along = {}
        for kind in ("scale_free", "constant"):
            code = code_of(w.requires_grad_(), bias, u, dense)
            f = dense_columns(code, CHOSEN)
            value, norm = code_similarity(code, u, CHOSEN, f, standard(f), kind)  # type: ignore[arg-type]
            (gradient,) = torch.autograd.grad(value, code.values, retain_graph=True)
            g = dense_columns(Code(gradient, gradient, code.support), CHOSEN)
            along[kind] = (g * f).sum(0).abs()
            assert g.abs().max() > 0
            torch.testing.assert_close(norm, torch.autograd.grad(value, w)[0].norm())
        assert along["scale_free"].max() < 1e-12
        assert along["constant"].min() > 1e-6


def test_scale_free_neither_shifts_nor_scales(global_random_seed: int) -> None:
    f = torch.relu(draw(global_random_seed, N, 5))
    g = scale_free(draw(global_random_seed, N, 5, name="g"), f)
    assert g.sum(0).abs().max() < 1e-12 and (g * f).sum(0).abs().max() < 1e-12


def test_a_latent_that_never_varies_gets_a_finite_gradient() -> None:
    f = torch.full((N, 3), 0.1)
    f[:, 0] = 0
    f[::2, 2] = 3.0
    assert scale_free(torch.randn(N, 3, generator=torch_stream(0, "g")), f).isfinite().all()


def test_two_halves_estimate_the_square_without_bias(global_random_seed: int) -> None:
    """Independent latents have similarity 0; the square of one estimate would be 1 / N."""
    generator = torch_stream(global_random_seed, "codes")
    f = torch.relu(torch.randn(4000, 50, 8, generator=generator, dtype=torch.float64) - 0.3)
    flat = f.flatten(0, 1)
    by = standard(flat, mean=flat.mean(0), std=flat.std(0))
    halves = torch.stack([similarity(batch, by)[0] for batch in f])
    error = float(halves.std() / len(halves) ** 0.5)
    assert abs(float(halves.mean())) < 4 * error < 0.1 / 50
    h = (f - by.mean) / by.std
    entries = h.transpose(1, 2) @ h / 50
    off = ~torch.eye(8, dtype=torch.bool)
    assert float(entries[:, off].square().mean()) == pytest.approx(1 / 50, rel=0.1)


def test_product_moments_by_hand(global_random_seed: int) -> None:
    f = torch.relu(draw(global_random_seed, N, 5))
    products = (f[:, :, None] * f[:, None, :])[:, ~torch.eye(5, dtype=torch.bool)]
    wanted = torch.stack([products.mean(), products.square().mean()])
    torch.testing.assert_close(product_moments(f), wanted)


def test_gradient_reaches_the_encoder_through_the_sparse_path(global_random_seed: int) -> None:
    w, bias, u = (part.float() for part in start(global_random_seed))
    w.requires_grad_()
    support = support_above((u @ w.T + bias).detach())
    assert support is not None
    values = torch.relu(encode_at(u, w, bias, support))
    code = Code(values, values, support)
    f = dense_columns(code, CHOSEN)
    value, norm = code_similarity(code, u, CHOSEN, f, standard(f), "scale_free")
    (gradient,) = torch.autograd.grad(value, w)
    torch.testing.assert_close(gradient.norm(), norm)
    rest = torch.ones(F, dtype=torch.bool)
    rest[CHOSEN] = False
    assert gradient[CHOSEN].any(1).all() and not gradient[rest].any()


def test_too_few_rows_or_latents_cost_nothing() -> None:
    f = torch.ones(1, 5)
    assert float(similarity(f, standard(torch.rand(9, 5)))[0]) == 0
    assert float(similarity(f.T, standard(torch.rand(9, 1)))[0]) == 0
