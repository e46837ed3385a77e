"""One battery for every registered part, steered by what the part declares.

A new part is picked up from the table; nothing has to be added here.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from ambient import torch_defaults
from torch import Tensor

from saelab.checks.battery import Check, checks_of, name_of
from saelab.checks.examples import Case, cases
from saelab.checks.trials import (
    D_IN,
    D_SAE,
    ROWS,
    batch,
    fresh_cell,
    rows,
    sparse_sae,
    trained_cell,
)
from saelab.errors import SettingError, UsageError
from saelab.parts import TABLE, base, parse_part, register
from saelab.parts.base import Dims, Part, PartConfig, Pass
from saelab.sae import SAE, SAEConfig
from saelab.seeding import torch_stream

EVERY = cases(D_SAE)
#: Activations with a number of latents per row.
K_AS_NUMBER = [
    case
    for case in EVERY
    if case.seam == "activation" and isinstance(getattr(case.part, "k", None), int)
]
#: Parts that take the value of a controller's setting, in a field that may hold a number as well.
READS_A_SETTING = [case for case in EVERY if case.part.settings_read]
#: Its observer resets latents in a run as short as these.
RESETS = next(one for one in cases(D_SAE, "observer") if one.example.resets)


def of(seam: str) -> Any:
    return pytest.mark.parametrize("case", [case for case in EVERY if case.seam == seam], ids=str)


every_part = pytest.mark.parametrize("case", EVERY, ids=str)


def composed(case: Case | str, **changes: Any) -> SAEConfig:
    """An SAE with a part's example in it; a name is that of an activation."""
    if isinstance(case, str):
        case = next(one for one in EVERY if str(one) == f"activation-{case}")
    return case.settings(D_SAE, **changes)


def case_of(seam: str, kind: str) -> Case:
    """The first example of a part."""
    return next(one for one in EVERY if (one.seam, one.kind) == (seam, kind))


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    """Bitwise; a NaN that stands for 'not yet' equals itself."""
    return a.keys() == b.keys() and all(
        torch.equal(a[name].nan_to_num(nan=-7.5), b[name].nan_to_num(nan=-7.5)) for name in a
    )


def rows_close(got: Tensor, wanted: Tensor, tolerance: float = 1e-5) -> None:
    """Each row within `tolerance` of its own norm; a row that all but cancels, of a hundredth of
    the mean norm. A vector is one row."""
    got, wanted = torch.atleast_1d(got), torch.atleast_1d(wanted)
    got, wanted = got.reshape(-1, got.shape[-1]), wanted.reshape(-1, wanted.shape[-1])
    norms = torch.linalg.vector_norm(wanted, dim=1)
    allowed = tolerance * norms.clamp_min(0.01 * float(norms.mean()))
    worst = ((got - wanted).norm(dim=1) / allowed.clamp_min(1e-30)).max()
    assert worst <= 1, f"{float(worst):.2f} times the tolerance of {tolerance}"


# ---- configuration ---------------------------------------------------------------------------


@every_part
class TestConfiguration:
    def test_by_name_alone(self, case: Case) -> None:
        """Its kind alone names a part without required settings; its example is of that kind."""
        config = TABLE[case.seam][case.kind]
        assert type(case.part) is config
        if not any(field.is_required() for field in config.model_fields.values()):
            assert parse_part(case.seam, case.kind) == config.parse({})

    def test_unknown_field_is_refused_with_the_nearest(self, case: Case) -> None:
        for field in type(case.part).model_fields:
            if field == "kind":
                continue
            with pytest.raises(SettingError) as caught:
                parse_part(case.seam, case.part.model_dump() | {field + "x": 1})
            assert f"did you mean '{field}'?" in str(caught.value)
            assert field + "x" in str(caught.value) and caught.value.exit_code == 2

    def test_is_frozen(self, case: Case) -> None:
        with pytest.raises(ValueError, match="frozen"):
            case.part.lr = 1.0

    def test_misspelt_kind(self, case: Case) -> None:
        with pytest.raises(UsageError, match=f"did you mean '{case.kind}'"):
            parse_part(case.seam, {"kind": case.kind + "s"})


def test_a_k_sets_the_l0() -> None:
    """Activations whose example has a number k: a list that is empty would check nothing."""
    assert {case.kind for case in K_AS_NUMBER} >= {"topk", "batchtopk", "abs_topk"}
    assert all(case.part.l0_rule(composed(case)) == "set" for case in K_AS_NUMBER)


# ---- life in a run ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("check", "case"),
    [
        pytest.param(check, case, id=f"{case}-{name_of(check)}")
        for case in EVERY
        for check in checks_of(case)
    ],
)
def test_battery(check: Check, case: Case, global_random_seed: int) -> None:
    check(case, global_random_seed)


@every_part
class TestLife:
    @pytest.mark.parametrize("ambient", [(torch.float64, "meta"), (torch.bfloat16, "cpu")], ids=str)
    def test_torchs_defaults_in_the_process_change_no_bit(
        self, case: Case, ambient: tuple[torch.dtype, str], global_random_seed: int
    ) -> None:
        config = composed(case)
        one, other = (fresh_cell(config, global_random_seed) for _ in range(2))
        batches = [batch(rows(global_random_seed + i + 1)) for i in range(5)]
        for given in batches:
            one.step(given)
        with torch_defaults(*ambient):
            for given in batches:
                other.step(given)
        states = one.state().tensors, other.state().tensors
        assert all(states[1][name].dtype == states[0][name].dtype for name in states[0])
        assert same(*states)
        x, cuts, starts = batches[0].x, torch.tensor([0, 20, ROWS]), torch.arange(ROWS + 1)

        def codes(sae: SAE) -> list[Tensor]:
            code = sae.encode(x, starts)
            return [code, sae.decode(code), sae.pooled(x, cuts, starts)]

        wanted, measured = codes(one.sae.eval()), other.sae.eval()
        with torch_defaults(*ambient):
            assert all(map(torch.equal, codes(measured), wanted))
            assert config.build(D_IN).W_enc.dtype == torch.float32


# ---- activations -----------------------------------------------------------------------------


@of("activation")
@pytest.mark.parametrize("training", [True, False])
class TestActivation:
    def test_bfloat16_selects_and_values_are_float32(
        self, case: Case, training: bool, global_random_seed: int, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        sae = sparse_sae(case, global_random_seed, "bfloat16").train(training)
        if sae.activation.uses_weights:
            exact = sparse_sae(case, global_random_seed, "float32").train(training)
            codes = [one(rows(global_random_seed)).code for one in (sae, exact)]
            assert torch.equal(codes[0].dense(), codes[1].dense())
            blocks = [code.dense() for _, code in sae.eval().codes(rows(global_random_seed))]
            assert torch.equal(torch.cat(blocks), exact.eval().encode(rows(global_random_seed)))
            return
        select, dtypes = sae.activation.support, []
        monkeypatch.setattr(
            sae.activation, "support", lambda z: (dtypes.append(z.dtype), select(z))[1]
        )
        p = sae(rows(global_random_seed))
        support = p.code.support
        assert support is not None
        assert dtypes == [torch.bfloat16 if training else torch.float32]
        exact = (p.u @ sae.W_enc.T + sae.b_enc).flatten()[support.flat]
        torch.testing.assert_close(p.code.pre, exact, rtol=1e-5, atol=1e-5)
        reference = sae.activation.dense((p.u @ sae.W_enc.T + sae.b_enc).detach())
        differ = float((p.code.dense() != 0).ne(reference != 0).sum() / (reference != 0).sum())
        assert differ < 0.05 if training else differ == 0
        both = (p.code.dense() != 0) & (reference != 0)
        torch.testing.assert_close(p.code.dense()[both], reference[both], rtol=1e-5, atol=1e-5)


# ---- scalings --------------------------------------------------------------------------------


def agrees_with_folded(sae: SAE, x: Tensor) -> None:
    """f = activation((x - b_dec) W_enc^T + b_enc), x_hat = f W_dec + b_dec."""
    w = sae.fold()
    z = (x - w["b_dec"]) @ w["W_enc"].T + w["b_enc"]
    own = sae._encoder_input(x / sae.scale) @ sae.W_enc.T + sae.b_enc
    rows_close(z, own.detach())
    with torch.no_grad():
        f = sae.activation.dense(z)
    rows_close(f, sae.encode(x))
    rows_close(f @ w["W_dec"] + w["b_dec"], sae.decode(sae.encode(x)))


@of("scaling")
def test_foldable_scaling(case: Case, global_random_seed: int) -> None:
    sae = trained_cell(composed(case), global_random_seed).sae.eval()
    assert sae.scaling is not None
    if not sae.scaling.foldable:
        with pytest.raises(SettingError, match="cannot be folded"):
            sae.fold()
        return
    agrees_with_folded(sae, rows(global_random_seed))
    x = rows(global_random_seed)
    rows_close(sae.encode(x)[3:8], sae.encode(x[3:8]))
    centred = x / sae.scale - sae.b_dec.detach()
    gain, shift = sae.scaling.fold()
    scaled = centred * gain if gain.dim() == 1 else centred @ gain
    rows_close(sae.scaling.apply(centred).detach(), scaled + shift)


def variance(**settings: Any) -> dict[str, Any]:
    return {"scaling": {"kind": "variance", **settings}}


@pytest.mark.parametrize("tau", [0, 0.1, 0.5, 1])
@pytest.mark.parametrize("tying", ["global", "per_feature", "off"])
@pytest.mark.parametrize("rest", [{}, {"literal": True, "start": "scaled"}])
def test_folding_at_every_tau_and_tying(
    tau: float, tying: str, rest: dict[str, Any], global_random_seed: int
) -> None:
    changes = variance(tau=tau, tying=tying, beta=1.3, theta=0.2, **rest)
    for centre in (True, False):
        config = composed("relu", centre=centre, encoder_bias=centre, **changes)
        sae = trained_cell(config, global_random_seed).sae.eval()
        assert sae.scaling is not None
        with torch.no_grad():
            for parameter in sae.scaling.parameters():
                noise = torch_stream(global_random_seed, "scalars")
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=noise))
        agrees_with_folded(sae, rows(global_random_seed))


def test_variance_gain_by_hand() -> None:
    """Variances 1, 4, 16 have geometric mean 4; tau .5 divides by standard deviations 1/2, 1, 2."""
    sae = composed("relu", **variance(tau=0.5)).build(3)
    assert sae.scaling is not None
    sae.scaling.get_buffer("variance").copy_(torch.tensor([1.0, 4.0, 16.0]))
    gain, shift = sae.scaling.fold()
    torch.testing.assert_close(gain, torch.tensor([2.0, 1.0, 0.5]), rtol=1e-4, atol=0)
    assert shift.tolist() == [0, 0, 0]


def test_running_variance_by_hand(global_random_seed: int) -> None:
    """v <- m v + (1 - m) var(batch), after the sample's variance at the start."""
    config = composed("relu", **variance(momentum=0.75))
    one, x = fresh_cell(config, global_random_seed), rows(global_random_seed + 1)
    assert one.sae.scaling is not None
    running = one.sae.scaling.get_buffer("variance")
    start = (rows(global_random_seed, 256) / one.sae.scale).var(0, correction=0)
    torch.testing.assert_close(running, start)
    one.step(batch(x))
    wanted = 0.75 * start + 0.25 * (x / one.sae.scale).var(0, correction=0)
    torch.testing.assert_close(running, wanted)


@pytest.mark.parametrize("theta", [0.0, 0.3])
def test_start_as_the_same_function(theta: float, global_random_seed: int) -> None:
    x, sample = rows(global_random_seed), rows(global_random_seed, 256)
    plain = composed("relu").build(D_IN)
    scaled = composed("relu", **variance(tau=1, theta=theta)).build(D_IN)
    for sae in (plain, scaled):
        sae.initialise(sample, global_random_seed)
        sae.eval()
    rows_close(scaled.encode(x), plain.encode(x), 1e-4)


def test_beta_zero_cannot_start_as_the_same_function() -> None:
    config = composed("relu").patched(variance(beta=0.0))
    with pytest.raises(SettingError, match="start"):
        config.build(D_IN)
    composed("relu", **variance(beta=0.0, start="scaled")).build(D_IN)


def test_batch_statistics_couple_rows_and_do_not_fold(global_random_seed: int) -> None:
    config = composed("relu", **variance(statistics="batch"))
    sae, x = trained_cell(config, global_random_seed).sae.eval(), rows(global_random_seed)
    assert sae.scaling is not None and not sae.scaling.foldable
    with pytest.raises(SettingError, match="cannot be folded"):
        sae.fold()
    assert not torch.allclose(sae.encode(x)[:8], sae.encode(x[:8]), rtol=1e-3)
    assert sae.encode(x[:1]).isfinite().all()  # one row has no variance


# ---- the table -------------------------------------------------------------------------------


@pytest.fixture
def table() -> Iterator[None]:
    """Puts the table back as it was."""
    before = {seam: dict(kinds) for seam, kinds in TABLE.items()}
    yield
    TABLE.clear()
    TABLE.update(before)


class TestRegister:
    def test_own_part_takes_part(self, table: None, global_random_seed: int) -> None:
        from typing import Literal

        class PowerConfig(PartConfig):
            kind: Literal["power"] = "power"
            weight: float = 2.0

            def build(self, dims: Dims) -> Part:
                return Power(self.weight)

        class Power(base.LossTerm):
            def __init__(self, weight: float) -> None:
                super().__init__()
                self.weight = weight

            def loss(self, p: Pass) -> Tensor:
                return self.weight * p.recon.square().mean()

        register("loss", PowerConfig)
        one = trained_cell(
            Case("loss", PowerConfig.example(D_SAE)).settings(D_SAE), global_random_seed
        )
        assert one.log.last("loss.power") > 0
        with pytest.raises(SettingError, match="did you mean 'weight'"):
            parse_part("loss", {"kind": "power", "wieght": 1})

    def test_mistakes_show_at_once(self, table: None) -> None:
        from typing import Literal

        class Nameless(PartConfig):
            def build(self, dims: Dims) -> Part:
                return Part()

        class NoBuild(PartConfig):
            kind: Literal["no_build"] = "no_build"

        class Taken(PartConfig):
            kind: Literal["relu"] = "relu"

            def build(self, dims: Dims) -> Part:
                return Part()

        class Reserved(PartConfig):
            kind: Literal["train"] = "train"

            def build(self, dims: Dims) -> Part:
                return Part()

        for seam, config, message in (
            ("loss", Reserved, "choose another name"),
            ("activations", Taken, "did you mean 'activation'"),
            ("activation", Nameless, "needs `kind"),
            ("activation", NoBuild, "needs build"),
            ("activation", Taken, "already taken by ReLUConfig"),
        ):
            with pytest.raises(SettingError, match=message):
                register(seam, config)
        register("activation", TABLE["activation"]["relu"])  # a second import is no mistake

    def test_mistakes_in_what_is_built_show_at_once(self, table: None) -> None:
        from typing import Literal

        class Builds(PartConfig):
            kind: Literal["mistaken"] = "mistaken"

            def build(self, dims: Dims) -> Part:
                return made[0](dims)

        class Term(base.LossTerm):
            def __init__(self, dims: Dims) -> None:
                super().__init__()

        def misspelt(dims: Dims) -> Part:
            return Part(dims.d_say)  # type: ignore[attr-defined]

        def sharded(dims: Dims) -> Part:
            part = Term(dims)
            part.shardable = "yes"  # type: ignore[assignment]
            return part

        def nameless(dims: Dims) -> Part:
            part = Term(dims)
            part.per_latent = ("silent",)
            return part

        made: list[Any] = []
        for make, message in (
            (misspelt, r"Builds can't be built \(AttributeError: .*d_say.*correct its build"),
            (Part, "can't be built .TypeError"),
            (lambda dims: Part(), "returns a Part, which is no LossTerm: subclass"),
            (sharded, "shardable = 'yes': use True or False"),
            (nameless, "per_latent = 'silent': name parameters or buffers of Term"),
        ):
            made[:] = [make]
            with pytest.raises(SettingError, match=message):
                register("loss", Builds)
            assert "mistaken" not in TABLE["loss"]
        made[:] = [Term]
        register("loss", Builds)

    def test_wrong_seam_and_shape(self) -> None:
        with pytest.raises(SettingError, match="is no loss"):
            parse_part("loss", TABLE["activation"]["relu"].parse({}))
        for wrong in (3, None, {"k": 3}, ["relu"]):
            with pytest.raises(SettingError, match="needs a 'kind'"):
                parse_part("activation", wrong)


class TestComposition:
    @pytest.mark.parametrize("case", READS_A_SETTING, ids=str)
    def test_a_setting_without_its_controller(self, case: Case) -> None:
        config = composed(case, controllers=[])
        with pytest.raises(SettingError, match="no controller sets it"):
            config.build(D_IN)

    def test_threshold_penalty_without_thresholds(self) -> None:
        config = SAEConfig.parse({"d_sae": 8, "losses": ["reconstruction", "l0"]})
        with pytest.raises(SettingError, match=r"ReLU.*no thresholds.*jumprelu"):
            config.build(4)

    def test_two_of_a_kind(self) -> None:
        sae = SAEConfig.parse(
            {"d_sae": 8, "losses": ["l1", {"kind": "l1", "coefficient": 1.0}]}
        ).build(4)
        assert len(sae.loss_terms()) == 2
        assert {term.coefficient for term in sae.loss_terms().values()} == {"sparsity", 1.0}

    @pytest.mark.parametrize("case", K_AS_NUMBER, ids=str)
    def test_k_above_d_sae(self, case: Case) -> None:
        part = case.part.patched({"k": D_SAE + 1})
        with pytest.raises(SettingError, match=f"at most d_sae = {D_SAE}"):
            composed(case, activation=part).build(D_IN)


class TestBatchTopK:
    def test_training_selects_k_per_row_on_average(self, global_random_seed: int) -> None:
        for precision in ("float32", "bfloat16"):
            config = composed("batchtopk", precision=precision)
            p = trained_cell(config, global_random_seed).sae(rows(global_random_seed))
            assert p.code.l0 == 32, precision

    def test_threshold_is_the_smallest_selected_value(self, global_random_seed: int) -> None:
        one = fresh_cell(composed("batchtopk"), global_random_seed)
        p = one.sae(rows(global_random_seed))
        one.step(batch(rows(global_random_seed)))
        smallest = p.code.values.detach()[p.code.active].min()
        form = one.sae.activation.export()
        assert isinstance(form, base.Form) and form.threshold is not None
        torch.testing.assert_close(form.threshold, smallest)


class TestUnitNorm:
    def test_rows_stay_on_the_sphere(self, global_random_seed: int) -> None:
        one = trained_cell(composed(case_of("constraint", "unit_norm")), global_random_seed)
        norms = torch.linalg.vector_norm(one.sae.W_dec.detach(), dim=1)
        torch.testing.assert_close(norms, torch.ones(D_SAE))
        p = one.sae(rows(global_random_seed))
        (p.recon - p.target).square().mean().backward()
        for constraint in one.sae.constraint_parts():
            constraint.on_gradients(one.sae)
        assert one.sae.W_dec.grad is not None
        radial = torch.linalg.vecdot(one.sae.W_dec.grad, one.sae.W_dec.detach())
        assert radial.abs().max() < 1e-6


class TestAuxK:
    def test_dead_latents_learn_the_error(self, global_random_seed: int) -> None:
        """Only dead latents get a gradient from the term, and following it lowers the term."""
        config = composed(case_of("loss", "auxk")).patched(
            {"losses.1.dead_after": 1, "losses.1.k": 4}
        )
        sae = fresh_cell(config, global_random_seed).sae
        term = sae.loss_terms()["auxk"]
        p = sae(rows(global_random_seed))
        assert float(term.loss(p)) == 0  # nothing is dead yet
        dead = torch.arange(0, D_SAE, 7)
        term.get_buffer("silent")[dead] = 100
        loss = term.loss(p)
        assert float(loss.detach()) > 0
        loss.backward()
        assert sae.W_dec.grad is not None and sae.W_enc.grad is not None
        touched = sae.W_dec.grad.any(1).nonzero().flatten()
        assert touched.numel() and set(touched.tolist()) <= set(dead.tolist())
        assert set(sae.W_enc.grad.any(1).nonzero().flatten().tolist()) <= set(dead.tolist())
        with torch.no_grad():
            sae.W_dec.sub_(sae.W_dec.grad, alpha=0.1)
            after = term.loss(sae(rows(global_random_seed)))
        assert float(after) < float(loss.detach())

    def test_by_hand(self) -> None:
        """One dead latent along the error with the right length leaves nothing over."""
        sae = SAEConfig.parse(
            {
                "d_sae": 2,
                "losses": ["reconstruction", {"kind": "auxk", "coefficient": 0.5, "k": 1}],
                "precision": "float32",
            }
        ).build(2)
        with torch.no_grad():
            sae.W_enc.copy_(torch.tensor([[1.0, 0.0], [0.0, 1.0]]))
            sae.W_dec.copy_(torch.tensor([[0.0, 0.0], [0.0, 0.5]]))
        term = sae.loss_terms()["auxk"]
        term.get_buffer("silent")[1] = 10**6
        x = torch.tensor([[0.0, 2.0]])
        p = sae(x)  # f = (0, 2), x_hat = (0, 1): error (0, 1), explained (0, 2 * 0.5)
        assert float(term.loss(p).detach()) == pytest.approx(0.0)
        with torch.no_grad():
            sae.W_dec[1, 1] = 0.25  # x_hat (0, .5): error 1.5, explained .5, left 1
        assert float(term.loss(sae(x)).detach()) == pytest.approx(0.5 * (1.0 / 1.5) ** 2)
