"""Snapshots, half-lives, frequency bins and survival, worked out by hand."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from saelab.evals.base import Row
from saelab.evals.decoder_cosines import decoder_rows
from saelab.evals.dictionary_consistency import (
    OF_SEEDS,
    chance_rows,
    half_life,
    seed_rows,
    snapshot_rows,
    sums_by_frequency,
)
from saelab.evals.latent_lifetimes import survival_rows
from saelab.parts.observers.lifetimes import BINS, Lifetimes
from saelab.sae import SAE, SAEConfig

TOKENS = [100, 200, 400, 800, 1600]


def turned(*angles: float) -> Tensor:
    """8 orthogonal planes, in each a row turned by the angle; [snapshots, 8, 16]."""
    decoders = torch.zeros(len(angles), 8, 16, dtype=torch.float64)
    for i, angle in enumerate(angles):
        for plane in range(8):
            decoders[i, plane, 2 * plane] = math.cos(angle)
            decoders[i, plane, 2 * plane + 1] = math.sin(angle)
    return decoders


def found(rows: list[Row]) -> dict[tuple[str, str], float | None]:
    return {(row.metric.removeprefix("consistency."), row.slice): row.value for row in rows}


def test_the_curve_of_a_decoder_that_turns() -> None:
    """All rows turn by a known angle, in any order and sign: the cosine is that of the angle."""
    angles = (1.2, 0.9, 0.5, 0.2, 0.0)
    decoders = turned(*angles)
    decoders[2] = decoders[2][torch.randperm(8, generator=torch.Generator().manual_seed(0))]
    decoders[3] *= -1
    values = found(snapshot_rows(TOKENS, list(decoders), 0, 0.2))
    for tokens, angle in zip(TOKENS, angles, strict=True):
        sign = -1 if tokens == 800 else 1
        assert values["snapshots", f"tokens={tokens}"] == pytest.approx(math.cos(angle))
        expected = sign * math.cos(angle)
        assert values["snapshots_signed", f"tokens={tokens}"] == pytest.approx(expected)
    assert values["snapshots", "tokens=1600"] == 1


def test_a_planted_half_life() -> None:
    """Chance 0.2 puts half at 0.6. From 200 tokens: cos 0.4 = 0.92 at 400, cos 1.0 = 0.54 at 800,
    so that it falls below between these, on a line in log tokens."""
    decoders = list(turned(0.0, 0.1, 0.5, 1.1, 1.2))
    rows = snapshot_rows(TOKENS, decoders, settled=150, chance=0.2)
    values = found(rows)
    share = (math.cos(0.4) - 0.6) / (math.cos(0.4) - math.cos(1.0))
    assert values["half_life", "from=200"] == pytest.approx(400 * 2**share - 200)
    assert values["half_life", ""] == values["half_life", "from=200"]
    assert ("half_life", "from=100") not in values  # before the end of warm-up
    late = next(row for row in rows if row.slice == "from=400")
    assert late.value is None and "did not fall below half (0.600)" in late.reason
    first = found(snapshot_rows(TOKENS, decoders, settled=100, chance=0.2))
    share = (math.cos(0.5) - 0.6) / (math.cos(0.5) - math.cos(1.1))
    assert first["half_life", ""] == pytest.approx(400 * 2**share - 100)


def test_the_first_fall_counts_and_few_pairs_are_matched() -> None:
    matrix = {1: 0.9, 2: 0.5, 3: 0.8, 4: 0.1}
    asked: list[int] = []

    def matched(i: int, j: int) -> float:
        asked.append(j)
        return matrix[j]

    life = half_life(TOKENS, 0, 0.6, matched, lambda i, j: 0.7 if j == 1 else 0.0)
    assert life == pytest.approx(200 * 2**0.75 - 100)  # 0.9 -> 0.5 passes 0.6 at three quarters
    assert set(asked) == {1, 2}
    asked.clear()
    assert half_life(TOKENS, 0, 0.6, matched, lambda i, j: 1.0) is None and not asked


def test_why_there_is_no_half_life() -> None:
    none = snapshot_rows([], [], 0, 0.2)
    assert [row.metric for row in none] == [
        "consistency.snapshots", "consistency.snapshots_signed", "consistency.half_life",
    ]  # fmt: skip
    assert all(row.value is None and "evaluation.snapshots is 0" in row.reason for row in none)
    late = snapshot_rows(TOKENS, list(turned(0, 0, 0, 0, 0)), settled=1600, chance=0.2)[-1]
    assert late.metric == "consistency.half_life" and "end of warm-up" in late.reason
    assert [row.value for row in chance_rows((0.3, 0.2))] == [0.3, 0.2]


def test_frequency_bins() -> None:
    """Edges every half decade; one that never fires is apart, the rarest share the lowest bin."""
    density = torch.tensor([0.0, 1e-7, 10**-3.4, 10**-3.1, 0.2, 1.0])
    values = torch.tensor([0.1, 0.2, 0.3, 0.5, 0.6, 0.8], dtype=torch.float64)
    sums = sums_by_frequency(values, density)
    assert {name: count for name, (_, count) in sums.items()} == {
        "never": 1, "-5.0": 1, "-3.5": 2, "-1.0": 1, "-0.5": 1,
    }  # fmt: skip
    assert sums["-3.5"][0] == pytest.approx(0.8)
    other = sums_by_frequency(torch.full((6,), 0.4, dtype=torch.float64), density)
    rows = seed_rows([dict.fromkeys(OF_SEEDS, sums), dict.fromkeys(OF_SEEDS, other)])
    means = found(rows)
    assert means["seeds", ""] == pytest.approx((2.5 + 2.4) / 12)
    assert means["seeds", "frequency=-3.5"] == pytest.approx((0.8 + 0.8) / 4)
    own = [row.slice for row in rows if row.metric == "consistency.seeds_signed"]
    edges = ("never", "-5.0", "-3.5", "-1.0", "-0.5")
    assert own == ["", *(f"frequency={name}" for name in edges)]


def test_histogram_of_the_largest_cosines() -> None:
    rows = decoder_rows(torch.tensor([0.35, 0.39, 1.0, -0.2]))
    shares = {row.slice: row.value for row in rows if row.value}
    assert shares.pop("") == pytest.approx(0.385)
    assert shares == {"cosine=0.00": 0.25, "cosine=0.35": 0.5, "cosine=0.95": 0.25}
    assert "parts" in decoder_rows(None)[0].reason


def observed(observers: list[dict], steps: int = 200) -> SAE:
    return SAEConfig.parse({"d_sae": 8, "observers": observers}).build(4, steps)


def test_survival_of_known_deaths() -> None:
    """8 lives over 200 steps: 2 deaths at age 30, 4 at age 100, the others live at age 200."""
    sae = observed([{"kind": "lifetimes"}])
    lives = next(part for part in sae.observer_parts() if isinstance(part, Lifetimes))
    lives.now.fill_(200)
    lives.ended[:6] = True
    lives.deaths[30 * BINS // 200] = 2
    lives.deaths[100 * BINS // 200] = 4
    lives.resamplings[3] = 2
    values = {(row.metric, row.slice): row.value for row in survival_rows(sae)}
    assert values["lifetime.survival", "age=0.10"] == 1
    assert values["lifetime.survival", "age=0.20"] == pytest.approx(0.75)
    assert values["lifetime.at_risk", "age=0.20"] == 6
    assert values["lifetime.survival", "age=1.00"] == pytest.approx(0.25)
    assert values["lifetime.at_risk", "age=1.00"] == 2
    assert values["lifetime.median", ""] == pytest.approx(0.505)  # the bin that holds age 0.5
    assert values["lifetime.deaths", ""] == 6
    assert values["lifetime.resamplings", ""] == values["resampling.count", ""] == 2
    assert len([key for key in values if key[0] == "lifetime.survival"]) == 20


def test_why_lives_are_missing() -> None:
    alive = survival_rows(observed([{"kind": "lifetimes"}]))
    reasons = {(row.metric, row.slice): row.reason for row in alive if row.value is None}
    assert "no life was observed" in reasons["lifetime.survival", "age=1.00"]
    assert "outlast" in reasons["lifetime.median", ""]
    counted = survival_rows(observed([{"kind": "resampling"}]))
    values = {row.metric: row.value for row in counted}
    assert values["resampling.count"] == 0 and values["lifetime.median"] is None
    assert "no part follows" in next(row.reason for row in counted if row.value is None)
    assert "nothing is resampled" in survival_rows(observed([]))[-1].reason
    assert all("made of parts" in row.reason for row in survival_rows(object()))
