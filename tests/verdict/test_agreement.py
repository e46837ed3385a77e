"""Agreement between seeds: the jackknife over seeds against its definition, and what shows it."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest

from saelab import stats
from saelab.launch.seed_pairs import partners
from saelab.runs.schema import PAIR, CellId
from saelab.seeding import numpy_stream
from saelab.study.plan import BaseConfig, PlanConfig
from saelab.verdict.agreement import (
    WIDER,
    agreement,
    agreement_text,
    pseudo_values,
    replicates,
    replicates_of_means,
)
from saelab.verdict.arms import ArmResult, CellGate
from saelab.verdict.final_info import cells_at_target, final_info
from saelab.verdict.judge import compare_secondary
from saelab.verdict.summary import agreement_lines

PLAN = PlanConfig(study="s", target_l0=None)
METRIC = "consistency.seeds"


def draw(n: int, key: int = 0, mean: float = 0.5) -> dict[tuple[int, int], float]:
    """Values of all pairs of n seeds, to each of which both seeds contribute."""
    stream = numpy_stream(key, "test agreement", n)
    own = 0.02 * stream.normal(size=n)
    both = itertools.combinations(range(n), 2)
    return {(i, j): float(mean + own[i] + own[j] + 0.01 * stream.normal()) for i, j in both}


def jackknife(pairs: dict[tuple[int, int], float], n: int) -> tuple[float, float]:
    """Mean over pairs and its standard error, as the jackknife is defined."""
    left = [np.mean([v for pair, v in pairs.items() if i not in pair]) for i in range(n)]
    return float(np.mean([*pairs.values()])), math.sqrt(
        (n - 1) / n * np.sum((left - np.mean(left)) ** 2)
    )


@pytest.mark.parametrize("n", [3, 5, 8])
def test_pseudo_values_give_the_jackknife(n: int) -> None:
    pairs = draw(n)
    mean, error = jackknife(pairs, n)
    assert stats.mean_stderr(replicates(pairs).values()) == pytest.approx((mean, error))
    result = agreement(pairs)
    assert result is not None and (result.seeds, result.pairs) == (n, n * (n - 1) // 2)
    from scipy.stats import t

    half = t.ppf(1 - 0.05 / WIDER / 2, n - 1) * error
    assert (result.low, result.high) == pytest.approx((mean - half, mean + half))


def test_a_ring_of_twelve_and_the_means_of_seeds_give_the_same() -> None:
    everything = draw(12)
    ring = {
        tuple(sorted((i, j))): everything[min(i, j), max(i, j)]
        for i, others in partners(range(12)).items()
        for j in others
    }
    for pairs, n in ((ring, 12), (draw(5), 5)):
        means = {i: float(np.mean([v for p, v in pairs.items() if i in p])) for i in range(n)}
        expected = replicates(pairs)  # type: ignore[arg-type]
        assert replicates_of_means(means) == pytest.approx(expected)
        assert np.mean([v for v in expected.values() if v is not None]) == pytest.approx(
            np.mean([*pairs.values()])
        )
    assert replicates_of_means({4: None, 5: 0.5, 6: 0.7}) == {4: None, 5: 0.6, 6: None}


def test_two_seeds_have_a_mean_and_no_interval() -> None:
    assert replicates({(3, 4): 0.4}) == {3: 0.4, 4: None}
    result = agreement({(3, 4): 0.4})
    assert result is not None and (result.mean, result.low, result.high) == (0.4, None, None)
    assert "takes 3 seeds" in agreement_text(result)
    assert agreement({}) is None


def arm(
    name: str, pairs: dict[tuple[int, int], float], n: int, dead: int | None = None
) -> ArmResult:
    result = ArmResult(name)
    for seed in range(n):
        others = {j: v for pair, v in pairs.items() if seed in pair for j in pair if j != seed}
        slices = {"": float(np.mean([*others.values()]))} | {
            f"{PAIR}{j}": v for j, v in others.items()
        }
        rows = [
            {"metric": METRIC, "slice": where, "value": value, "definition": "agreement/1"}
            for where, value in slices.items()
        ]
        facts = {"nonfinite_step": 3} if seed == dead else {}
        result.add(CellGate(id=CellId(name, seed, 0.0), expected=(), facts=facts), rows)
    return result


def test_the_difference_of_two_arms_is_the_paired_jackknife() -> None:
    one, other = draw(6, 1), draw(6, 2)
    arms = {"baseline": arm("baseline", other, 6), "arm": arm("arm", one, 6)}
    cells = cells_at_target(arms, "baseline", METRIC, PLAN)
    (result,) = compare_secondary(METRIC, cells["baseline"], {"arm": cells["arm"]})
    mean, error = jackknife({pair: one[pair] - other[pair] for pair in one}, 6)
    from scipy.stats import t

    half = t.ppf(0.975, 5) * error
    assert result.mean_diff == pytest.approx(mean)
    assert (result.low, result.high) == pytest.approx((mean - half, mean + half))


def test_pairs_of_a_failed_seed_are_left_out() -> None:
    pairs = draw(5)
    pairs |= {pair: 0.0 for pair in pairs if 2 in pair}
    result = arm("arm", pairs, 5, dead=2)
    assert result.failed == {2}
    healthy = {pair: v for pair, v in pairs.items() if 2 not in pair}
    assert result.agreement(METRIC) == agreement(healthy)
    assert result.replicates(METRIC)[2] is None
    (_, _, line) = agreement_lines({"arm": result})
    assert line == f"- arm: {agreement_text(agreement(healthy))}"  # type: ignore[arg-type]


def test_final_info_has_the_interval_next_to_the_mean() -> None:
    one, other = arm("baseline", draw(4), 4), arm("arm", {(0, 1): 0.5}, 2)
    for result in (one, other):
        result.facts = {0: {"steps": 1, "tokens": 2, "d_sae": 3}}
    settings = dict.fromkeys(("baseline", "arm"), BaseConfig())
    info = final_info({"baseline": one, "arm": other}, [], [], settings, "blocks.1.hook")
    names = [f"{METRIC}{end}" for end in ("", ".low", ".high")]
    means, expected = info["baseline"]["means"], agreement(draw(4))
    assert expected is not None
    assert list(means)[:3] == names
    assert [means[n] for n in names] == pytest.approx([expected.mean, expected.low, expected.high])
    assert info["baseline"]["stderrs"][METRIC] == pytest.approx(jackknife(draw(4), 4)[1])
    assert [info["arm"]["means"][n] for n in names] == [0.5, None, None]
    assert info["arm"]["stderrs"][METRIC] is None  # two seeds are one pair
    assert info["arm"]["final_info_dict"][METRIC] == [0.5, 0.5]


def test_values_of_many_studies_at_once() -> None:
    values = numpy_stream(0, "test agreement").normal(size=(4, 3))
    members = np.array([[0, 1], [0, 2], [1, 2]])
    for row, whole in zip(values, pseudo_values(values, members), strict=True):
        pairs = {(0, 1): row[0], (0, 2): row[1], (1, 2): row[2]}
        assert list(replicates(pairs).values()) == pytest.approx(whole.tolist())
