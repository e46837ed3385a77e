"""Selection by an int8 product: no pair is missed, and values and codes are those of float32."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from saelab.data.activations.stream import Batch
from saelab.kernels import Screen, Support, build, eager, native, screen, table
from saelab.sae import SAE, SAEConfig
from saelab.seeding import torch_stream
from saelab.training.loop import Cell
from saelab.training.optim import TrainConfig

CPU = torch.device("cpu")
needs_native = pytest.mark.skipif(native.library() is None, reason="no compiled kernels")
needs_int8 = pytest.mark.skipif(screen.largest_int8(CPU) == 0, reason="no exact int8 product")
#: Parts whose selection a screen finds.
PARTS: dict[str, dict[str, Any]] = {
    "relu": {"activation": "relu", "initial_l0": 8},
    "jumprelu": {"activation": {"kind": "jumprelu", "threshold": 1.2}},
    "gated": {"activation": {"kind": "gated", "free_norms": True}, "initial_l0": 8},
    "batchtopk": {"activation": {"kind": "batchtopk", "k": 8}},
    "topk": {"activation": {"kind": "topk", "k": 8}},
}


def drawn(seed: int, *shape: int, spread: float = 0.0) -> Tensor:
    """Normal rows whose channels differ in size by up to exp(spread) and more."""
    stream = torch_stream(seed, "test screen", str(shape))
    sizes = torch.exp(spread * torch.randn(shape[-1], generator=stream))
    return torch.randn(*shape, generator=stream) * sizes


shapes = {
    "seed": st.integers(0, 2**32),
    "n": st.integers(1, 9),
    "d": st.sampled_from([16, 17, 37, 64]),
    "d_sae": st.sampled_from([1, 7, 64, 130]),
    "spread": st.sampled_from([0.0, 1.0, 4.0]),
    "limit": st.sampled_from([64, 127]),
}


def screen_of(w: Tensor, u: Tensor, limit: int) -> Screen:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(screen, "largest_int8", lambda device: limit)
        patch.setattr(screen, "FEWEST_ROWS", 1)
        made = Screen.of(w, u, "auto")
    assert made is not None
    return made


def chosen(support: Support) -> Tensor:
    mask = torch.zeros(support.n_rows * support.d_sae, dtype=torch.bool)
    mask[support.flat] = True
    return mask.view(support.n_rows, support.d_sae)


@needs_int8
class TestScreen:
    @given(**shapes, where=st.floats(-2, 2))
    def test_no_pair_above_its_floor_is_missed(
        self, seed, n, d, d_sae, spread, limit, where
    ) -> None:
        limit = min(limit, screen.largest_int8(CPU))
        u, w, bias = drawn(seed, n, d, spread=spread), drawn(seed + 1, d_sae, d), drawn(seed, d_sae)
        floor = drawn(seed + 2, d_sae) + where
        exact = u.double() @ w.double().t() + bias
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(screen, "most_pairs", lambda entries: entries)
            found = screen_of(w, u, limit).candidates(u, bias, floor)
        assert found is not None
        assert not ((exact > floor) & ~chosen(found)).any()

    @given(**shapes, k=st.integers(1, 7))
    def test_none_of_the_k_largest_is_missed(self, seed, n, d, d_sae, spread, limit, k) -> None:
        k, limit = min(k, d_sae), min(limit, screen.largest_int8(CPU))
        u, w, bias = drawn(seed, n, d, spread=spread), drawn(seed + 1, d_sae, d), drawn(seed, d_sae)
        exact = u.double() @ w.double().t() + bias
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(screen, "most_pairs", lambda entries: entries)
            found = screen_of(w, u, limit).candidates_for_topk(u, bias, k)
        assert found is not None
        largest = torch.zeros_like(exact, dtype=torch.bool)
        largest.scatter_(1, exact.topk(k, dim=1).indices, True)
        assert not (largest & ~chosen(found)).any()

    def test_it_leaves_most_pairs_out(self) -> None:
        u, w = drawn(0, 256, 192, spread=1.0), drawn(1, 1536, 192) / 14
        exact = u @ w.t()
        floor = exact.flatten().kthvalue(exact.numel() - 256 * 32).values
        made = Screen.of(w, u, "auto")
        assert made is not None
        found = made.candidates(u, torch.zeros(1536), floor)
        assert found is not None and 32 * 256 < found.nnz < 100 * 256

    @pytest.mark.parametrize("value", [torch.nan, torch.inf])
    def test_what_is_not_finite_is_left_to_the_other_paths(self, value: float) -> None:
        u, w = drawn(0, 80, 16), drawn(1, 32, 16)
        u[3, 5] = value
        made = screen_of(w, u, 64)
        assert made.candidates(u, torch.zeros(32), torch.zeros(())) is None

    def test_a_row_and_a_latent_of_zeros(self) -> None:
        u, w, bias = drawn(0, 80, 16), drawn(1, 32, 16), torch.full((32,), 0.5)
        u[3], w[7] = 0, 0
        found = screen_of(w, u, 64).candidates(u, bias, torch.tensor(0.25))
        assert found is None or (chosen(found)[3].all() and chosen(found)[:, 7].all())

    def test_other_precisions_and_few_rows_have_none(self) -> None:
        u, w = drawn(0, 80, 16), drawn(1, 32, 16)
        assert Screen.of(w, u, "float32") is None and Screen.of(w, u, "bfloat16") is None
        assert Screen.of(w, u[: screen.FEWEST_ROWS - 1], "auto") is None
        assert Screen.of(w.double(), u.double(), "auto") is None
        assert Screen.of(w, u, "auto") is not None

    def test_the_product_is_exact_up_to_the_limit(self) -> None:
        limit = screen.largest_int8(CPU)
        assert limit in (64, 127) and screen._is_exact(limit)


@needs_native
class TestNative:
    @given(**shapes)
    def test_quantise(self, seed, n, d, d_sae, spread, limit) -> None:
        x, columns = drawn(seed, n, d, spread=spread), drawn(seed, d).abs() + 0.1
        x[0] = 0
        (q, about), (wanted, plain) = (kernels.quantise(x, columns, limit) for kernels in BOTH)
        assert (q.int() - wanted.int()).abs().max() <= 1  # one step, where it is all but halfway
        assert int(q.abs().max()) <= limit and (q[0] == 0).all() and about[0, 0] == 1
        torch.testing.assert_close(about[:2], plain[:2])
        left = torch.linalg.vector_norm(x * columns - about[0][:, None] * q, dim=1)
        torch.testing.assert_close(about[2], left, rtol=1e-4, atol=1e-6)

    @given(**shapes, share=st.sampled_from([0.1, 1.0]))
    def test_screened(self, seed, n, d, d_sae, spread, limit, share) -> None:
        product = (100 * drawn(seed, n, d_sae)).int()
        of_rows, of_latents = drawn(seed, 3, n), drawn(seed, 2, d_sae)
        most = int(share * product.numel())
        got, wanted = (k.screened(product, of_rows, of_latents, most) for k in BOTH)
        assert (got is None) == (wanted is None)
        if got is not None and wanted is not None:
            assert all(map(torch.equal, got, wanted))

    @given(**shapes, k=st.integers(1, 7))
    def test_screened_topk(self, seed, n, d, d_sae, spread, limit, k) -> None:
        product, k = (100 * drawn(seed, n, d_sae)).int(), min(k, d_sae)
        of_rows, of_latents = drawn(seed, 3, n).abs(), drawn(seed, 3, d_sae).abs()
        got, wanted = (
            kernels.screened_topk(product, of_rows, of_latents, k, product.numel())
            for kernels in BOTH
        )
        assert got is not None and wanted is not None
        assert all(map(torch.equal, got, wanted))

    @given(**shapes, one=st.booleans())
    def test_keep_above(self, seed, n, d, d_sae, spread, limit, one) -> None:
        pairs = eager.above(drawn(seed, n, d_sae), None, n * d_sae)
        assert pairs is not None
        support = Support(*pairs, d_sae)
        values, floor = drawn(seed, support.nnz), drawn(seed, d_sae)
        floor = floor[0] if one else floor
        got, wanted = (kernels.keep_above(values, floor, support) for kernels in BOTH)
        assert all(map(torch.equal, got, wanted))
        Support(*got[:2], d_sae).check()

    @given(**shapes, k=st.integers(1, 7))
    def test_topk_of_pairs(self, seed, n, d, d_sae, spread, limit, k) -> None:
        pairs = eager.above(torch.ones(n, d_sae), None, n * d_sae)
        assert pairs is not None
        support, k = Support(*pairs, d_sae), min(k, d_sae)
        values = drawn(seed, n * d_sae)
        got, wanted = (kernels.topk_of_pairs(values, support, k) for kernels in BOTH)
        rows = values.view(n, d_sae)
        assert torch.equal(got[1], rows.gather(1, got[0])) and (got[0].diff(dim=1) > 0).all()
        assert torch.equal(got[1].sort(1).values, wanted[1].sort(1).values)


BOTH = native, eager


@pytest.fixture(params=["native", "eager"])
def kernels(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The kernels of a screen, which a width of 24 suffices for."""
    if request.param == "native" and native.library() is None:
        pytest.skip("no compiled kernels")
    monkeypatch.setattr(
        screen,
        "kernels_for",
        lambda device: dict(zip(("native", "eager"), BOTH, strict=True))[request.param],
    )
    monkeypatch.setattr(screen, "LEAST_WIDTH_FOR_TOPK", 1)
    monkeypatch.setattr(screen, "MOST", 1)


def sae_of(kind: str, precision: str = "auto") -> SAE:
    settings = {"d_sae": 96, "losses": ["reconstruction"], "controllers": []} | PARTS[kind]
    settings |= (
        {"losses": ["reconstruction", {"kind": "gate_l1", "coefficient": 0.1}]}
        if kind == "gated"
        else {}
    )
    sae = SAEConfig.parse(settings | {"precision": precision}).build(24)
    sae.initialise(drawn(0, 512, 24, spread=1.0), 0)
    return sae


@needs_int8
@pytest.mark.parametrize("kind", PARTS)
def test_codes_have_the_bits_of_the_other_paths(
    kind: str, kernels: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    sae, x = sae_of(kind).eval(), drawn(3, 700, 24, spread=1.0)
    if kind == "batchtopk":
        sae.activation.ema.fill_(0.8)
        sae.activation.count.fill_(10**6)
    screened = torch.cat([code.dense() for _, code in sae.codes(x)])
    monkeypatch.setattr(screen, "largest_int8", lambda device: 0)
    plain = torch.cat([code.dense() for _, code in sae.codes(x)])
    assert torch.equal(screened, plain) and 0 < plain.count_nonzero() < 0.3 * plain.numel()


def gradients(kind: str, precision: str, x: Tensor) -> dict[str, Tensor]:
    sae = sae_of(kind, precision)
    if kind == "batchtopk":  # as after some batches
        sae.activation.ema.fill_(0.6)
        sae.activation.count.fill_(10**6)
    p = sae(x, 0, 1)
    torch.stack([term.loss(p) for term in sae.loss_terms().values()]).sum().backward()
    named = {name: w.grad for name, w in sae.named_parameters() if w.grad is not None}
    return named | {"code": p.code.dense().detach(), "recon": p.recon.detach()}


@needs_int8
@pytest.mark.parametrize("kind", PARTS)
def test_a_pass_has_the_gradients_of_float32(kind: str, kernels: None) -> None:
    x = drawn(4, 300, 24, spread=1.0)
    screened, plain = gradients(kind, "auto", x), gradients(kind, "float32", x)
    assert screened.keys() == plain.keys()
    for name, value in plain.items():
        torch.testing.assert_close(screened[name], value, rtol=1e-4, atol=1e-6, msg=name)


@needs_int8
def test_a_cut_below_the_expected_one_is_left_to_the_other_paths() -> None:
    sae, x = sae_of("batchtopk"), drawn(4, 300, 24, spread=1.0)
    sae.activation.ema.fill_(100.0)  # far above what this batch reaches
    sae.activation.count.fill_(10**6)
    assert sae._screened(sae._encoder_input(x / sae.scale)) is None
    assert sae(x, 0, 1).code.l0 == pytest.approx(8, abs=0.1)


@needs_int8
def test_pre_activations_that_are_read_rarely_are_computed_when_they_are_read() -> None:
    losses = ["reconstruction", {"kind": "auxk", "dead_after": 1}]
    settings = {"d_sae": 96, "losses": losses, "controllers": []} | PARTS["batchtopk"]
    cell = Cell(
        "a",
        SAEConfig.parse(settings),
        TrainConfig(tokens=900, batch_size=300),
        drawn(0, 512, 24),
        0,
    )
    for i in range(2):
        cell.step(Batch(drawn(i, 300, 24), torch.zeros(300, dtype=torch.int64)))
    p = cell.sae(drawn(5, 300, 24), 2, 3)
    assert callable(p.stored_z)
    z = p.z
    dtype = table.selection_dtype("auto", CPU)
    wanted = screen_free(cell.sae, p.u).to(dtype).float()
    torch.testing.assert_close(z.float(), wanted, rtol=2**-6, atol=2**-6)
    assert p.z is z


def screen_free(sae: SAE, u: Tensor) -> Tensor:
    return torch.nn.functional.linear(u, sae.W_enc, sae.b_enc).detach()


def test_a_processor_without_exact_products_has_no_screen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(screen, "_is_exact", lambda limit: False)
    assert screen._largest_int8_on_cpu.__wrapped__() == 0
    monkeypatch.setattr(screen.platform, "machine", lambda: "arm64")
    monkeypatch.setattr(screen, "_is_exact", lambda limit: True)
    assert screen._largest_int8_on_cpu.__wrapped__() == 0
    assert screen.largest_int8(torch.device("meta")) == 0


@pytest.mark.parametrize(
    ("capability", "features", "masked"),
    [("AVX512", "flags : avx512f", False), ("AVX2", "flags : avx512f", True), ("AVX2", "", False)],
)
def test_kernels_do_without_what_torch_is_told_to_do_without(
    monkeypatch: pytest.MonkeyPatch, capability: str, features: str, masked: bool
) -> None:
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    monkeypatch.setattr(build, "cpu_features", lambda: features)
    assert ("-mno-avx512f" in build.flags()) == masked
    if capability == "AVX2":
        assert not table.has_fast_bfloat16(CPU)
