"""The formulas of time by hand, and rates measured or read."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from saelab.data.language_model import ModelConfig, size
from saelab.preflight import launch_time
from saelab.preflight.cost import (
    harvest_flops,
    harvest_seconds,
    parameters,
    step_seconds,
)
from saelab.preflight.launch_time import (
    START_SECONDS,
    Measured,
    encode_seconds,
    preparation_seconds,
    training_seconds,
)
from saelab.preflight.rates import RATES, Rates, model_rates, size_of, thread_rates
from saelab.study.calibration import calibration_tokens
from saelab.study.plan import Arm, BaseConfig, PlanConfig, Run, cells, read_base
from saelab.training.calibration_text import MOST_ROWS

GEMMA = read_base(Path(__file__).parents[2] / "configs" / "gemma-2-2b.toml").patched(
    {"train.tokens": 500_000_000}
)


def rates(**changes: object) -> Rates:
    plain = {"title": "t", "source": "s", "measured": True, "peak_flops": 1e12}
    return Rates.parse(plain | {"peak_memory": 1e11, "capacity": 1e10, "store": 1e9} | changes)


def test_the_flops_of_gemma_are_those_of_its_blocks() -> None:
    # 26 blocks: q and o 2304 x 2048, k and v 2304 x 1024, three matrices 2304 x 9216, four norms
    block = 2 * 2304 * 2048 + 2 * 2304 * 1024 + 3 * 2304 * 9216 + 4 * 2304
    wanted = 20 * (2 * block + 4 * 128 * 2048)
    assert harvest_flops(size_of(GEMMA.model), GEMMA) == pytest.approx(wanted, rel=1e-4)
    later = GEMMA.patched({"hook_name": "blocks.19.hook_resid_pre"})
    assert harvest_flops(size_of(GEMMA.model), later) == pytest.approx(wanted * 19 / 20, rel=1e-4)


def test_a_step_by_hand() -> None:
    n, d, f, l0 = 1000, 100, 10_000, 50
    moved = 36 * parameters(d, f) + 8 * n * f + 16 * n * l0 * d
    alone = 2 * n * d * f / 1e12 + moved / 1e11
    assert step_seconds(rates(), n, d, f, l0) == pytest.approx(alone)
    half = rates(peak_flops=2e12, matrix_efficiency=0.5, step_seconds=0.25, link=1e9)
    assert step_seconds(half, n, d, f, l0) == pytest.approx(alone + 0.25)
    shared = step_seconds(half, n, d, f, l0, ranks=4)
    assert shared == pytest.approx(alone / 4 + 8 * n * d / 1e9 + 0.25)


def test_a_launch_is_cells_evaluations_and_controls_on_the_threads_of_this_machine(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(launch_time, "thread_rates", lambda precision="auto": rates())
    monkeypatch.setattr(launch_time, "model_rates", lambda dtype: rates())
    base = BaseConfig()
    specs = cells(PlanConfig(study="test"), base, Run("test", [Arm("baseline")]))
    levels = sorted({spec.id.level for spec in specs})
    assert levels == [16, 32, 64]  # which change the L0 of a step, and so its seconds
    at_target = [spec for spec in specs if spec.id.level == 32]
    measured = Measured.of(base, 192, 32)
    steps = base.train.steps * step_seconds(rates(), base.train.batch_size, 192, base.sae.d_sae, 32)
    evaluation = measured.evaluation_seconds(rates(), base.sae.d_sae)
    read = min(calibration_tokens(base), MOST_ROWS * base.train.tokens)
    assert read > 30_000
    steps += encode_seconds(rates(), read, 192, base.sae.d_sae)
    assert measured.cell_seconds(at_target[0]) == pytest.approx(steps + evaluation)
    whole = len(at_target) * (steps + evaluation)
    alone = training_seconds(at_target, measured, 1, controls=False)
    assert alone == pytest.approx(START_SECONDS + whole)
    halved = training_seconds(at_target, measured, 2, controls=False)
    assert halved == pytest.approx(START_SECONDS + whole / 2)
    many = training_seconds(at_target, measured, 1000, controls=False)
    assert many == pytest.approx(START_SECONDS + steps + evaluation)  # no less than one cell
    controls = training_seconds(at_target, measured, 1) - alone
    assert controls > steps + 3 * evaluation  # one is trained, five are evaluated
    assert training_seconds(specs, measured, 1) > training_seconds(at_target, measured, 1)


def test_what_is_not_measured_takes_no_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch_time, "thread_rates", lambda precision="auto": rates())
    monkeypatch.setattr(launch_time, "model_rates", lambda dtype: rates())
    base = BaseConfig()
    unprobed = base.patched({"evaluation.probing.entries": "none"})
    with_probes, without = (
        Measured.of(one, 192, 32).evaluation_seconds(rates(), 1536) for one in (base, unprobed)
    )
    of_level = Measured.of(base, 192, 32).evaluation_seconds(rates(), 1536, at_target=False)
    assert with_probes > without > of_level > 0
    assert preparation_seconds(base) > preparation_seconds(unprobed)
    assert preparation_seconds(base.patched({"activations": "folder"})) == 0


def test_sae_probes_takes_time_where_it_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch_time, "thread_rates", lambda precision="auto": rates())
    monkeypatch.setattr(launch_time, "model_rates", lambda dtype: rates())
    base = BaseConfig()
    asked = base.patched({"evaluation.extra": ["sae_probes"]})
    before, after = (
        Measured.of(one, 192, 32).evaluation_seconds(rates(), 1536) for one in (base, asked)
    )
    fits = 47 * 3 * 8 * 0.014  # data sets, draws, numbers of latents
    assert after - before == pytest.approx(fits + encode_seconds(rates(), 134_938, 192, 1536))
    assert preparation_seconds(asked) > preparation_seconds(base)
    slower = asked.patched({"evaluation.sae_probes.definition": 1})
    assert Measured.of(slower, 192, 32).evaluation_seconds(rates(), 1536) > after


def test_a_harvest_runs_every_position_of_its_contexts() -> None:
    base, device = BaseConfig(context=128), rates(model_efficiency=0.5)
    embedded = size(base.model)
    wanted = 128 * 1000 * harvest_flops(embedded, base) / 0.5e12
    assert harvest_seconds(embedded, base, 127 * 1000, device) == pytest.approx(wanted)


def test_rates_of_a_thread_are_measured_once_and_leave_the_threads_alone() -> None:
    torch.set_num_threads(2)
    measured = thread_rates("float32")
    assert torch.get_num_threads() == 2
    torch.set_num_threads(1)
    assert measured is thread_rates("float32")
    assert 1e8 < measured.matrix < 1e14 and 1e8 < measured.memory < 1e13
    assert measured.model < measured.matrix


def test_a_language_model_is_as_fast_as_a_gemm_in_its_own_dtype(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for dtype, share in (("float32", 0.95), ("bfloat16", 0.75)):
        measured = model_rates(dtype)
        assert measured is thread_rates(dtype)
        assert measured.model == pytest.approx(share * measured.matrix)
    by_dtype = {"float32": rates(), "bfloat16": rates(peak_flops=2e12)}
    monkeypatch.setattr(launch_time, "model_rates", by_dtype.__getitem__)
    base = BaseConfig()
    fast = base.patched({"model.dtype": "bfloat16"})
    assert preparation_seconds(base) == pytest.approx(2 * preparation_seconds(fast))
    passes = [Measured.of(one, 192, 32).pass_seconds() for one in (base, fast)]
    assert passes[0] == pytest.approx(2 * passes[1])


def test_a_model_at_hand_is_asked_itself() -> None:
    embedded = ModelConfig()
    assert size_of(embedded, RATES) == size(embedded)
    assert size_of(embedded).blocks == 4
