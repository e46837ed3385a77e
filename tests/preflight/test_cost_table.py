"""`plan cost`: devices, disk and hours of a long training, and whether its rates were measured."""

from __future__ import annotations

from pathlib import Path

import pytest

from saelab.errors import SettingError
from saelab.preflight.cost_table import FILLED, cost_text, count_cost, device_bytes
from saelab.preflight.rates import Rates, read_rates
from saelab.study.plan import BaseConfig, read_base

GEMMA = read_base(Path(__file__).parents[2] / "configs" / "gemma-2-2b.toml").patched(
    {"train.tokens": 500_000_000}
)


def rates(**changes: object) -> Rates:
    plain = {"title": "t", "source": "s", "measured": True, "peak_flops": 1e12}
    return Rates.parse(plain | {"peak_memory": 1e11, "capacity": 1e10, "store": 1e9} | changes)


def test_devices_are_added_until_the_memory_is_enough() -> None:
    result = count_cost(GEMMA, read_rates("h100"))
    assert [row.ranks for row in result.widths] == [1, 1, 1, 2]
    for row in result.widths:
        assert row.device_bytes <= FILLED * 80e9
        assert row.device_hours == pytest.approx(row.hours * row.ranks)
    one = device_bytes(1024, 2304, 2**20)
    assert one > 77e9 and device_bytes(1024, 2304, 2**20, 2) < 0.52 * one
    alone = count_cost(GEMMA, read_rates("h200")).widths[-1]
    assert alone.ranks == 1 and alone.hours > result.widths[-1].hours


def test_disk_network_and_hours_grow_with_the_tokens() -> None:
    h100 = read_rates("h100")
    long, short = (
        count_cost(GEMMA, h100),
        count_cost(GEMMA.patched({"train.tokens": 50_000_000}), h100),
    )
    assert long.disk_bytes == pytest.approx(500e6 * 128 / 127 * (2 * 2304 + 5), rel=1e-6)
    for name in ("disk_bytes", "read_bytes", "text_bytes", "harvest_hours"):
        assert getattr(long, name) == pytest.approx(10 * getattr(short, name), rel=1e-4)
    slow = Rates.parse(h100.model_dump() | {"store": 1e8})
    bound = count_cost(GEMMA, slow)
    assert bound.harvest_store_bound and bound.harvest_hours > long.harvest_hours
    assert bound.widths[0].store_bound and "bound by the store" in cost_text(bound)


def test_it_says_that_rates_are_assumed() -> None:
    for device in ("h100", "h200"):
        assert "ASSUMED, not measured" in cost_text(count_cost(GEMMA, read_rates(device)))
    assert "rates are measured" in cost_text(count_cost(GEMMA, rates(), [64]))
    assert count_cost(GEMMA, read_rates("h100")).as_dict()["rates"]["measured"] is False


def test_bad_input_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(SettingError, match="--device = 'h10'.*did you mean 'h100'"):
        read_rates("h10")
    with pytest.raises(SettingError, match="has no link to others: use 1"):
        count_cost(GEMMA, rates(), [64], ranks=2)
    with pytest.raises(SettingError, match="--width = 0"):
        count_cost(GEMMA, rates(), [0])
    with pytest.raises(SettingError, match="activations"):
        count_cost(BaseConfig(activations="folder"), rates())
    file = tmp_path / "own.toml"
    file.write_text('[devices.mine]\ntitle = "m"\n')
    with pytest.raises(SettingError, match="own.toml: devices.mine"):
        read_rates("mine", file)


def test_the_l0_is_that_of_the_settings() -> None:
    assert (
        count_cost(BaseConfig(), rates(), [64]).l0 == 32
    )  # the target of the default's controller
