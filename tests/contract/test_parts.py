"""One battery for every registered part, steered by what the part declares.

A new part is picked up from the table; nothing has to be added here. Four published variants that
the package does not have (`variants.py`) pass through it as well.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from ambient import torch_defaults
from torch import Tensor
from variants import VARIANTS

from saelab.checks.boundaries import near_a_boundary
from saelab.checks.examples import FIELDS, Case, cases
from saelab.data.activations.stream import Batch
from saelab.errors import SettingError, UsageError
from saelab.formats.base import Plain
from saelab.parts import SEAMS, TABLE, base, parse_part, register
from saelab.parts.base import Dims, Part, PartConfig, Pass
from saelab.sae import SAE, SAEConfig
from saelab.seeding import torch_stream
from saelab.training.loop import Cell
from saelab.training.optim import TrainConfig
from saelab.training.state import State

D_IN, D_SAE, ROWS, STEPS = 16, 512, 48, 40
CLASSES = {
    "scaling": base.Scaling,
    "activation": base.Activation,
    "loss": base.LossTerm,
    "controller": base.Controller,
    "constraint": base.Constraint,
    "observer": base.Observer,
}
#: Seam -> kind -> settings of all parts that are tested.
PARTS = {
    seam: TABLE[seam]
    | {config.model_fields["kind"].default: config for config in VARIANTS.get(seam, ())}
    for seam in SEAMS
}
EVERY = cases(D_SAE, table=PARTS)
#: Activations with a number of latents per row.
K_AS_NUMBER = [
    case
    for case in EVERY
    if case.seam == "activation" and isinstance(getattr(case.part, "k", None), int)
]
#: Parts that take the value of a controller's setting, in a field that may hold a number as well.
READS_A_SETTING = [
    case
    for case in EVERY
    if case.seam != "controller"
    and isinstance(getattr(case.part, "coefficient", getattr(case.part, "k", None)), str)
]
#: Its observer resets latents in a run as short as these.
RESETS = next(one for one in cases(D_SAE, "observer") if one.example.resets)


@pytest.fixture(scope="module", autouse=True)
def variants() -> Iterator[None]:
    """Registers the variants for this module alone."""
    for seam, configs in VARIANTS.items():
        for config in configs:
            register(seam, config)
    yield
    for seam, configs in VARIANTS.items():
        for config in configs:
            del TABLE[seam][config.model_fields["kind"].default]


def of(seam: str) -> Any:
    return pytest.mark.parametrize("case", [case for case in EVERY if case.seam == seam], ids=str)


every_part = pytest.mark.parametrize("case", EVERY, ids=str)


def l0_rule(part: PartConfig, config: SAEConfig) -> str | None:
    return part.l0_rule(config)


def at_l0(level: float) -> Any:
    return lambda part, config: part.at_l0(level, config)


def composed(case: Case | str, **changes: Any) -> SAEConfig:
    """An SAE with a part's example in it; a name is that of an activation."""
    if isinstance(case, str):
        case = next(one for one in EVERY if str(one) == f"activation-{case}")
    return case.settings(D_SAE, **changes)


def case_of(seam: str, kind: str) -> Case:
    """The first example of a part."""
    return next(one for one in EVERY if (one.seam, one.kind) == (seam, kind))


def data(seed: int, rows: int = ROWS) -> Tensor:
    """Rows with a mean and with dimensions of unlike variance."""
    x = torch.randn(rows, D_IN, generator=torch_stream(seed, "contract data"))
    return 3 * (x * torch.linspace(0.3, 2, D_IN) + torch.linspace(-1, 1, D_IN))


def batch(x: Tensor) -> Batch:
    return Batch(x, torch.arange(len(x)))


def cell(config: SAEConfig, seed: int, steps: int = STEPS, snapshots: int = 0) -> Cell:
    training = TrainConfig(tokens=steps * ROWS, batch_size=ROWS, lr=3e-3)
    return Cell("cell", config, training, data(seed, 256), seed, snapshots)


def copied(state: State) -> State:
    """As it comes back from a file."""
    tensors = {name: tensor.detach().clone() for name, tensor in state.tensors.items()}
    return State(tensors, json.loads(json.dumps(state.plain, allow_nan=False)))


def trained(config: SAEConfig, seed: int, steps: int = 3) -> Cell:
    one = cell(config, seed)
    for i in range(steps):
        one.step(batch(data(seed + i + 1)))
    return one


def snapshot(module: torch.nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in module.state_dict().items()}


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
    def test_round_trip_through_json(self, case: Case) -> None:
        config = case.part
        again = parse_part(case.seam, json.loads(config.model_dump_json()))
        assert type(again) is type(config) and again == config
        whole = composed(case)
        parsed = SAEConfig.parse(json.loads(whole.model_dump_json()))
        assert parsed == whole and parsed.digest() == whole.digest()
        assert getattr(parsed, FIELDS[case.seam]) == getattr(whole, FIELDS[case.seam])

    def test_by_name_alone(self, case: Case) -> None:
        """Where no setting is required; the example is one of the table's kinds in any case."""
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

    def test_builds_its_seam(self, case: Case) -> None:
        part = case.part.build(Dims(D_IN, D_SAE, steps=STEPS, seed=0))
        assert isinstance(part, CLASSES[case.seam])

    def test_companions_are_all_it_needs(self, case: Case) -> None:
        sae = composed(case).build(D_IN)
        assert case.part_of(sae) in sae.parts()
        assert case.part.companions.items() <= dict(case.example.beside).items()

    def test_what_it_says_of_the_l0_is_what_it_does(self, case: Case) -> None:
        config = composed(case)
        part = case.part
        rule, low, high = (f(part, config) for f in (l0_rule, at_l0(3.0), at_l0(9.0)))
        assert rule in ("set", "found", None)
        if rule == "set":
            assert low != high and all(type(at) is type(part) for at in (low, high))
            assert {low.target_l0, high.target_l0} in ({3, 9}, {None})
        if rule == "found":
            assert low == high == part
        once = config.at_l0(3.0)
        if "found" not in once.l0_rules(3.0):  # a schedule's end is set once
            assert once.at_l0(9.0) == config.at_l0(9.0)


def test_a_k_sets_the_l0() -> None:
    """Activations whose example has a number k: a list that is empty would check nothing."""
    assert {case.kind for case in K_AS_NUMBER} >= {"topk", "batchtopk", "abs_topk"}
    assert all(case.part.l0_rule(composed(case)) == "set" for case in K_AS_NUMBER)


# ---- life in a run ---------------------------------------------------------------------------


@every_part
class TestLife:
    def test_pass_runs(self, case: Case, global_random_seed: int) -> None:
        sae = cell(composed(case), global_random_seed).sae
        p = sae(data(global_random_seed), 0, STEPS)
        assert p.recon.shape == p.x.shape == p.target.shape == (ROWS, D_IN)
        if any(part.uses_preactivations for part in sae.parts()):
            assert p.z.shape == (ROWS, D_SAE) and not p.z.requires_grad
        else:
            assert p.stored_z is None
            with pytest.raises(RuntimeError, match="uses_preactivations"):
                _ = p.z
        assert p.recon.isfinite().all() and p.code.values.isfinite().all()
        assert p.code.dense().shape == (ROWS, D_SAE)
        if p.code.support is not None:
            p.code.support.check()

    def test_loss_is_scalar_finite_and_pure(self, case: Case, global_random_seed: int) -> None:
        one = trained(composed(case), global_random_seed)
        before = snapshot(one.sae)
        p = one.sae(data(global_random_seed), one.steps_done, STEPS)
        for term in one.sae.loss_terms().values():
            first, second = term.loss(p), term.loss(p)
            assert first.shape == () and bool(first.isfinite())
            assert torch.equal(first, second)
        assert same(snapshot(one.sae), before)

    def test_only_update_changes_state_and_only_buffers(
        self, case: Case, global_random_seed: int
    ) -> None:
        one = trained(composed(case), global_random_seed)
        sae, part = one.sae, case.part_of(one.sae)
        before, generator = snapshot(sae), torch.get_rng_state()
        p = sae(data(global_random_seed), one.steps_done, STEPS)
        part.scalars()
        sae.settings(one.steps_done)
        assert same(snapshot(sae), before)
        with torch.no_grad():
            part.update(p)
            if isinstance(part, base.Observer):
                part.observe(p)
        own = {id(buffer) for buffer in part.buffers()}
        for name, tensor in sae.state_dict(keep_vars=True).items():
            assert id(tensor) in own or torch.equal(
                tensor.detach().nan_to_num(), before[name].nan_to_num()
            ), name
        assert torch.equal(torch.get_rng_state(), generator)

    def test_state_is_saved_and_restored(self, case: Case, global_random_seed: int) -> None:
        config, x = composed(case), data(global_random_seed)
        one = trained(config, global_random_seed)
        fresh = config.build(D_IN, STEPS, global_random_seed)
        fresh.load_state_dict(snapshot(one.sae))
        passes = [sae(x, one.steps_done, STEPS) for sae in (one.sae, fresh)]
        assert torch.equal(passes[0].recon, passes[1].recon)
        assert passes[0].settings == passes[1].settings
        losses = [
            torch.stack([term.loss(p) for term in p.sae.loss_terms().values()]) for p in passes
        ]
        assert torch.equal(*losses)
        with torch.no_grad():
            for p in passes:
                case.part_of(p.sae).update(p)
        assert same(snapshot(one.sae), snapshot(fresh))
        assert one.sae.scalars() == fresh.scalars()
        codes = [sae.eval().encode(x) for sae in (one.sae, fresh)]
        assert torch.equal(*codes)

    def test_a_run_goes_on_from_its_state(self, case: Case, global_random_seed: int) -> None:
        """Cut anywhere, resets and snapshots included, every bit is that of the whole run."""
        observer = case if case.example.resets else RESETS
        observers = [observer.part]
        if case.seam == "observer" and case.kind != observer.kind:
            observers.append(case.part)
        config = composed(case, observers=observers)
        whole, cut = (cell(config, global_random_seed, snapshots=4) for _ in range(2))
        for one in (whole, cut):
            with torch.no_grad():
                one.sae.b_enc[::7] = -100  # these are dead
        for i in range(STEPS):
            if i in (1, STEPS // 2, STEPS - 3):
                state = copied(cut.state())
                cut = cell(config, global_random_seed, snapshots=4)
                cut.restore(state)
            x = data(global_random_seed + i + 1)
            assert whole.step(batch(x)) == cut.step(batch(x))
        states = whole.state(), cut.state()
        assert same(states[0].tensors, states[1].tensors) and states[0].plain == states[1].plain
        assert whole.scalar_reach() == cut.scalar_reach()
        assert whole.log.last(observer.example.resets) > 0

    @pytest.mark.parametrize("ambient", [(torch.float64, "meta"), (torch.bfloat16, "cpu")], ids=str)
    def test_torchs_defaults_in_the_process_change_no_bit(
        self, case: Case, ambient: tuple[torch.dtype, str], global_random_seed: int
    ) -> None:
        config = composed(case)
        one, other = (cell(config, global_random_seed) for _ in range(2))
        batches = [batch(data(global_random_seed + i + 1)) for i in range(5)]
        for given in batches:
            one.step(given)
        with torch_defaults(*ambient):
            for given in batches:
                other.step(given)
        states = one.state().tensors, other.state().tensors
        assert all(states[1][name].dtype == states[0][name].dtype for name in states[0])
        assert same(*states)
        rows, cuts, starts = batches[0].x, torch.tensor([0, 20, ROWS]), torch.arange(ROWS + 1)

        def codes(sae: SAE) -> list[Tensor]:
            code = sae.encode(rows, starts)
            return [code, sae.decode(code), sae.pooled(rows, cuts, starts)]

        wanted, measured = codes(one.sae.eval()), other.sae.eval()
        with torch_defaults(*ambient):
            assert all(map(torch.equal, codes(measured), wanted))
            assert config.build(D_IN).W_enc.dtype == torch.float32

    def test_every_parameter_of_the_part_is_trained(
        self, case: Case, global_random_seed: int
    ) -> None:
        one = cell(composed(case), global_random_seed)
        known = {id(p) for group in one.optimiser.groups for p in group.parameters}
        part = case.part_of(one.sae)
        for parameter in part.parameters():
            assert (id(parameter) in known) == parameter.requires_grad
        one.step(batch(data(global_random_seed)))
        moments = one.optimiser.moments()
        for parameter in part.parameters():
            assert not parameter.requires_grad or float(moments[parameter]["step"]) == 1
            assert parameter.grad is None  # gradients live as long as the step


# ---- what it says of itself ------------------------------------------------------------------


@every_part
class TestDeclarations:
    def test_every_scalar_is_declared(self, case: Case, global_random_seed: int) -> None:
        one = trained(composed(case), global_random_seed)
        config, part = case.part, case.part_of(one.sae)
        assert part.scalars().keys() == config.logged.keys()
        assert config.logged.keys() <= one.log.columns.keys()
        assert {*part.learned(), *part.stored()} <= config.logged.keys()
        for name, scalar in config.logged.items():
            assert scalar.meaning and scalar.role in base.ROLES, name
        assert all(config.logged[name].role == "learned" for name in part.learned())

    def test_facts_and_columns(self, case: Case, global_random_seed: int) -> None:
        one = trained(composed(case), global_random_seed, STEPS)
        part = case.part_of(one.sae)
        before = snapshot(one.sae)
        facts = part.facts(one.log.columns, one.optimiser.travel)
        assert all(math.isfinite(value) for value in facts.values())
        columns = part.latent_columns()
        assert all(column.shape == (D_SAE,) for column in columns.values())
        if isinstance(part, base.Observer):
            lives, resets = part.lives(), part.resampled()
            assert lives is None or lives.survival.shape == lives.at_risk.shape
            assert resets is None or resets >= 0
        assert same(snapshot(one.sae), before)


# ---- activations -----------------------------------------------------------------------------


def sparse_sae(case: Case, seed: int, precision: str = "float32") -> SAE:
    """An SAE a few steps old whose code is sparse enough for the sparse path."""
    one = trained(composed(case, precision=precision), seed)
    with torch.no_grad():
        one.sae.b_enc.sub_(1.5)
    if one.sae.activation.couples_batch:  # its statistics must know the new bias
        with torch.no_grad():
            for i in range(20):
                one.sae.activation.update(one.sae(data(seed + i)))
    return one.sae


def gradients(sae: SAE, x: Tensor) -> tuple[Pass, dict[str, Tensor]]:
    sae.zero_grad()
    p = sae(x, 5, STEPS)
    weight = torch.linspace(-1, 1, p.recon.numel()).view(p.recon.shape)
    ((p.recon * weight).sum() + (p.recon - p.target).square().sum()).backward()
    return p, {
        name: parameter.grad.clone()
        for name, parameter in sae.named_parameters()
        if parameter.grad is not None
    }


@of("activation")
@pytest.mark.parametrize("training", [True, False])
class TestActivation:
    def test_sparse_path_equals_dense_path(
        self, case: Case, training: bool, global_random_seed: int, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        sae, x = sparse_sae(case, global_random_seed).train(training), data(global_random_seed)
        x = x[~near_a_boundary(sae, x).any(1)]
        assert len(x) > ROWS // 2
        sparse, got = gradients(sae, x)
        assert sparse.code.support is not None, "too dense: the sparse path was not taken"
        sparse.code.support.check()
        monkeypatch.setattr(sae.activation, "support", lambda z: None)
        dense, wanted = gradients(sae, x)
        assert dense.code.support is None
        rows_close(sparse.code.dense().detach(), dense.code.values.detach())
        assert torch.equal(sparse.code.dense() != 0, dense.code.values != 0)
        rows_close(sparse.recon.detach(), dense.recon.detach())
        assert got.keys() == wanted.keys()
        for name, gradient in wanted.items() if training else ():  # evaluation has no gradients
            rows_close(got[name], gradient)

    def test_bfloat16_selects_and_values_are_float32(
        self, case: Case, training: bool, global_random_seed: int, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        sae = sparse_sae(case, global_random_seed, "bfloat16").train(training)
        select, dtypes = sae.activation.support, []
        monkeypatch.setattr(
            sae.activation, "support", lambda z: (dtypes.append(z.dtype), select(z))[1]
        )
        p = sae(data(global_random_seed))
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

    def test_rows_are_independent_unless_declared(
        self, case: Case, training: bool, global_random_seed: int
    ) -> None:
        sae, x = sparse_sae(case, global_random_seed).train(training), data(global_random_seed)
        if training and sae.activation.couples_batch:
            other = x.clone()
            other[5:] *= 10
            assert not torch.equal(sae(x).code.dense()[:5], sae(other).code.dense()[:5])
            return
        whole = sae(x).code.dense().detach()
        few = sae(x[3:8]).code.dense().detach()
        keep = ~near_a_boundary(sae, x)[3:8]
        rows_close(few * keep, whole[3:8] * keep)

    def test_exact_k(self, case: Case, training: bool, global_random_seed: int) -> None:
        sae = sparse_sae(case, global_random_seed).train(training)
        p = sae(data(global_random_seed))
        counts = (p.code.dense() != 0).sum(1)
        if sae.activation.exact_k:
            assert p.code.support is not None
            assert p.code.support.offsets.diff().unique().numel() == 1
            assert counts.max() <= p.code.support.offsets[1]
        else:
            assert counts.unique().numel() > 1

    def test_encode_is_the_dense_path(
        self, case: Case, training: bool, global_random_seed: int
    ) -> None:
        sae, x = sparse_sae(case, global_random_seed), data(global_random_seed)
        if training:
            with pytest.raises(RuntimeError, match=r"eval\(\)"):
                sae.encode(x)
            return
        sae.eval()
        keep = ~near_a_boundary(sae, x).any(1)
        rows_close(sae.encode(x)[keep], sae(x).code.dense().detach()[keep])
        rows_close(sae.decode(sae.encode(x))[keep], (sae(x).recon.detach() * sae.scale)[keep])


@of("activation")
def test_an_exported_form_is_the_same_function(case: Case, global_random_seed: int) -> None:
    sae, x = sparse_sae(case, global_random_seed).eval(), data(global_random_seed)
    form = sae.activation.export()
    assert type(sae.activation).export is not base.Activation.export, "write export()"
    if isinstance(form, base.Refusal):
        with pytest.raises(SettingError, match=re.escape(form.reason)):
            Plain.of(sae)
        return
    keep = ~near_a_boundary(sae, x).any(1)
    assert keep.any()
    z = (sae.encoder_input(x) @ sae.W_enc.T + sae.b_enc).detach()
    rows_close(form.code(z)[keep], sae.encode(x)[keep])
    plain = Plain.of(sae)
    again = plain.build()
    rows_close(again.encode(x)[keep], sae.encode(x)[keep], 1e-4)
    rows_close(again.decode(again.encode(x))[keep], sae.decode(sae.encode(x))[keep], 1e-4)


@of("activation")
def test_without_the_context_the_tensors_fit(case: Case) -> None:
    part = composed(case).build(D_IN).activation
    config = part.without_context()
    if config is None:
        assert not part.needs_contexts
        return
    twin = config.build(Dims(D_IN, D_SAE, steps=STEPS))
    assert not twin.needs_contexts
    twin.load_state_dict(part.state_dict())


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
    sae = trained(composed(case), global_random_seed).sae.eval()
    assert sae.scaling is not None
    if not sae.scaling.foldable:
        with pytest.raises(SettingError, match="cannot be folded"):
            sae.fold()
        return
    agrees_with_folded(sae, data(global_random_seed))
    x = data(global_random_seed)
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
        sae = trained(config, global_random_seed).sae.eval()
        assert sae.scaling is not None
        with torch.no_grad():
            for parameter in sae.scaling.parameters():
                noise = torch_stream(global_random_seed, "scalars")
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=noise))
        agrees_with_folded(sae, data(global_random_seed))


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
    one, x = cell(config, global_random_seed), data(global_random_seed + 1)
    assert one.sae.scaling is not None
    running = one.sae.scaling.get_buffer("variance")
    start = (data(global_random_seed, 256) / one.sae.scale).var(0, correction=0)
    torch.testing.assert_close(running, start)
    one.step(batch(x))
    wanted = 0.75 * start + 0.25 * (x / one.sae.scale).var(0, correction=0)
    torch.testing.assert_close(running, wanted)


@pytest.mark.parametrize("theta", [0.0, 0.3])
def test_start_as_the_same_function(theta: float, global_random_seed: int) -> None:
    x, sample = data(global_random_seed), data(global_random_seed, 256)
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
    sae, x = trained(config, global_random_seed).sae.eval(), data(global_random_seed)
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
        one = trained(Case("loss", PowerConfig.example(D_SAE)).settings(D_SAE), global_random_seed)
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
            p = trained(config, global_random_seed).sae(data(global_random_seed))
            assert p.code.l0 == 32, precision

    def test_threshold_is_the_smallest_selected_value(self, global_random_seed: int) -> None:
        one = cell(composed("batchtopk"), global_random_seed)
        p = one.sae(data(global_random_seed))
        one.step(batch(data(global_random_seed)))
        smallest = p.code.values.detach()[p.code.active].min()
        form = one.sae.activation.export()
        assert isinstance(form, base.Form) and form.threshold is not None
        torch.testing.assert_close(form.threshold, smallest)


class TestUnitNorm:
    def test_rows_stay_on_the_sphere(self, global_random_seed: int) -> None:
        one = trained(composed(case_of("constraint", "unit_norm")), global_random_seed)
        norms = torch.linalg.vector_norm(one.sae.W_dec.detach(), dim=1)
        torch.testing.assert_close(norms, torch.ones(D_SAE))
        p = one.sae(data(global_random_seed))
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
        sae = cell(config, global_random_seed).sae
        term = sae.loss_terms()["auxk"]
        p = sae(data(global_random_seed))
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
            after = term.loss(sae(data(global_random_seed)))
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
