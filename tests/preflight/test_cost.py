"""`plan cost`: the formulas by hand, the limits of a device, and what a rate is known from."""

from __future__ import annotations

from pathlib import Path

import pytest

from saelab.data.activations.harvest import bytes_needed
from saelab.data.language_model import ModelConfig, size
from saelab.errors import SettingError
from saelab.preflight import cost as costs
from saelab.preflight.calibration import Compared, _harvest_trial, _step_seconds, trial_lines
from saelab.preflight.cost import (
    RATES,
    Rates,
    cost,
    harvest_flops,
    known_rates,
    parameters,
    size_of,
    state_bytes,
    step_seconds,
    text,
)
from saelab.study.plan import BaseConfig, read_base

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


def test_devices_are_added_until_the_memory_is_enough() -> None:
    found = cost(GEMMA, known_rates("h100"))
    assert [row.ranks for row in found.widths] == [1, 1, 1, 2]
    for row in found.widths:
        assert row.device_bytes <= costs.FILLED * 80e9
        assert row.device_hours == pytest.approx(row.hours * row.ranks)
    one = state_bytes(1024, 2304, 2**20)
    assert one > 77e9 and state_bytes(1024, 2304, 2**20, 2) < 0.52 * one
    alone = cost(GEMMA, known_rates("h200")).widths[-1]
    assert alone.ranks == 1 and alone.hours > found.widths[-1].hours


def test_disk_network_and_hours_grow_with_the_tokens() -> None:
    h100 = known_rates("h100")
    long, short = cost(GEMMA, h100), cost(GEMMA.patched({"train.tokens": 50_000_000}), h100)
    assert long.disk_bytes == pytest.approx(500e6 * 128 / 127 * (2 * 2304 + 5), rel=1e-6)
    for name in ("disk_bytes", "read_bytes", "text_bytes", "harvest_hours"):
        assert getattr(long, name) == pytest.approx(10 * getattr(short, name), rel=1e-4)
    slow = Rates.parse(h100.model_dump() | {"store": 1e8})
    bound = cost(GEMMA, slow)
    assert bound.harvest_store_bound and bound.harvest_hours > long.harvest_hours
    assert bound.widths[0].store_bound and "bound by the store" in text(bound)


def test_it_says_that_rates_are_assumed() -> None:
    for device in ("h100", "h200"):
        assert "ASSUMED, not measured" in text(cost(GEMMA, known_rates(device)))
    assert "rates are measured" in text(cost(GEMMA, rates(), [64]))
    assert cost(GEMMA, known_rates("h100")).as_dict()["rates"]["measured"] is False


def test_bad_input_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(SettingError, match="--device = 'h10'.*did you mean 'h100'"):
        known_rates("h10")
    with pytest.raises(SettingError, match="has no link to others: use 1"):
        cost(GEMMA, rates(), [64], ranks=2)
    with pytest.raises(SettingError, match="--width = 0"):
        cost(GEMMA, rates(), [0])
    with pytest.raises(SettingError, match="activations"):
        cost(BaseConfig(activations="folder"), rates())
    own = tmp_path / "own.toml"
    own.write_text('[devices.mine]\ntitle = "m"\n')
    with pytest.raises(SettingError, match="own.toml: devices.mine"):
        known_rates("mine", own)


def test_a_model_at_hand_is_asked_itself() -> None:
    embedded = ModelConfig()
    assert size_of(embedded, RATES) == size(embedded)
    assert size_of(embedded).blocks == 4
    base = BaseConfig()
    assert cost(base, rates(), [64]).l0 == 32  # the target of the default's controller


def test_trials_name_the_worst_of_their_figures() -> None:
    found = [Compared("a", "s", 1.0, 1.1), Compared("b", "s", 1.0, 2.0)]
    assert found[1].error == -0.5
    assert trial_lines(found)[-1] == "worst: b, a factor of 2.00"


def test_a_trial_writes_what_is_predicted_for_the_disk() -> None:
    base = BaseConfig(context=32)
    made = _harvest_trial(base.model_dump(mode="json"), 1000)
    assert made["positions"] == 32 * 32 and made["tokens"] == 32 * 31
    predicted = bytes_needed(int(made["tokens"]), 32, size(base.model).d_model, "float32")
    assert made["bytes"] == pytest.approx(predicted, rel=0.01)
    assert made["seconds"] > 0 and made["memory"] > predicted


def test_the_step_of_a_trial_is_that_of_the_settings() -> None:
    topk = {"d_sae": 64, "activation": {"kind": "topk", "k": 8}, "controllers": []}
    for sae in (topk | {"losses": ["reconstruction"]}, {"d_sae": 64}):
        assert _step_seconds(BaseConfig.parse({"sae": sae}), 16, 8, 64, 6) > 0
