"""Matched dictionaries: exact where they are equal, optimal, and near the optimum where large."""

from __future__ import annotations

import itertools

import pytest
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor
from torch.nn.functional import normalize

from saelab.errors import MismatchError
from saelab.evals import dictionary_matching
from saelab.evals.dictionary_matching import (
    assign,
    chance_cosines,
    largest_cosines,
    match_dictionaries,
    matched_cosines,
    random_directions,
    same_index_mean,
    unit_rows,
)
from saelab.seeding import torch_stream

N, D = 200, 24


def rows(name: str, n: int = N, d: int = D, seed: int = 0) -> Tensor:
    return torch.randn(n, d, generator=torch_stream(seed, f"test {name}"))


def permutation(n: int = N) -> Tensor:
    return torch.randperm(n, generator=torch_stream(0, "test order"))


def structured(seed: int) -> list[tuple[Tensor, Tensor]]:
    """Random ones, a noisy permutation, one that shares half of its rows, and clusters."""
    a, noise = rows("a", seed=seed), rows("noise", seed=seed)
    centres = rows("centres", 10, seed=seed)[torch.arange(N) % 10]
    return [
        (a, rows("b", seed=seed)),
        (a, (a + 0.5 * noise)[permutation()]),
        (a, torch.cat([a[: N // 2], noise[N // 2 :]])),
        (centres + 0.3 * a, -centres + 0.3 * noise),
    ]


@pytest.mark.parametrize("exact", [dictionary_matching.EXACT, 0])
def test_a_permutation_of_itself_gives_exactly_one(
    exact: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dictionary_matching, "EXACT", exact)
    a = 3.7 * rows("a")
    found = match_dictionaries(a, a[permutation()])
    assert bool((found.absolute == 1).all()) and bool((found.signed == 1).all())
    assert torch.equal(permutation()[found.signed_partner], torch.arange(N))
    close = torch.cat([a, a + 1e-5 * rows("close")])  # float32 cosines can't tell these apart
    assert bool((match_dictionaries(close, close[permutation(2 * N)]).absolute == 1).all())
    half = a.half()  # as snapshots are stored
    assert float(match_dictionaries(half, half[permutation()]).absolute.mean()) == 1


def test_rows_that_are_turned_round_agree_up_to_sign_alone() -> None:
    a = rows("a")
    signs = torch.where(torch.arange(N) % 3 == 0, -1.0, 1.0)[:, None]
    found = match_dictionaries(a, (signs * a)[permutation()])
    assert bool((found.absolute == 1).all())
    assert float(found.signed.mean()) < 0.9
    assert float(found.signed.mean()) > float(signs.mean())  # others are better than a turned one


def test_by_hand() -> None:
    """Row 0's best partner is worth more to row 1: 0.8 + 0.6 is more than 0.96 + 0.28."""
    a = torch.tensor([[0.96, 0.28], [1.0, 0.0]])
    b = torch.tensor([[1.0, 0.0], [0.6, 0.8]])
    found = match_dictionaries(a, b)
    straight, crossed = 0.96 + 0.6, (0.96 * 0.6 + 0.28 * 0.8) + 1.0
    assert crossed > straight
    assert float(found.absolute.sum()) == pytest.approx(crossed, abs=1e-6)
    assert found.absolute_partner.tolist() == [1, 0]
    turned = match_dictionaries(a, -b)
    assert float(turned.absolute.sum()) == pytest.approx(crossed, abs=1e-6)
    assert float(turned.signed.sum()) == pytest.approx(-straight, abs=1e-6)


def test_no_assignment_is_better(global_random_seed: int) -> None:
    a, b = rows("a", 6, 3, global_random_seed), rows("b", 6, 3, global_random_seed)
    cosine = unit_rows(a) @ unit_rows(b).T
    orders = [list(order) for order in itertools.permutations(range(6))]
    found = match_dictionaries(a, b)
    for values, all_values in ((found.absolute, cosine.abs()), (found.signed, cosine)):
        best = max(float(all_values[torch.arange(6), order].sum()) for order in orders)
        assert float(values.sum()) == pytest.approx(best, abs=1e-6)


def test_the_guess_of_prices_changes_no_result(global_random_seed: int) -> None:
    for a, b in structured(global_random_seed):
        cosine = unit_rows(a) @ unit_rows(b).T
        for values in (cosine, cosine.abs(), 50 * cosine, cosine[:150], cosine[:, :150]):
            plain = linear_sum_assignment(values.numpy(), maximize=True)
            assert float(values[assign(values)].sum()) == pytest.approx(
                float(values.numpy()[plain].sum()), rel=1e-12
            )


@pytest.mark.parametrize("candidates", [8, 32])
def test_the_faster_matching_is_near_the_exact_one(
    candidates: int, global_random_seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dictionary_matching, "CANDIDATES", candidates)
    monkeypatch.setattr(dictionary_matching, "BLOCK", 64)
    for a, b in structured(global_random_seed):
        exact = match_dictionaries(a, b)
        with monkeypatch.context() as patched:
            patched.setattr(dictionary_matching, "EXACT", 0)
            fast = match_dictionaries(a, b)
        for best, found in ((exact.absolute, fast.absolute), (exact.signed, fast.signed)):
            short = float(best.mean() - found.mean())
            assert -1e-6 < short < (1e-2 if candidates == 8 else 5e-4)
        cosine = (unit_rows(a) @ unit_rows(b).T).abs()
        assert float(exact.absolute.mean()) <= float(cosine.max(1).values.mean())


def test_the_other_side_is_the_same_pairs() -> None:
    a, b = structured(0)[1]
    one, other = match_dictionaries(a, b), match_dictionaries(a, b).transpose()
    assert torch.equal(other.absolute[one.absolute_partner], one.absolute)
    assert torch.equal(other.signed[one.signed_partner], one.signed)
    assert torch.equal(other.absolute_partner[one.absolute_partner], torch.arange(N))


def test_values_without_the_search_for_signs() -> None:
    for a, b in structured(1):
        values, found = matched_cosines(a, b), match_dictionaries(a, b)
        assert torch.equal(values.abs(), found.absolute)
        assert float(values.mean()) <= float(found.signed.mean()) + 1e-6
        assert same_index_mean(a, b) <= float(found.absolute.mean()) + 1e-6


def test_a_row_of_zeros_is_like_none() -> None:
    a = rows("a", 5)
    a[2] = 0
    found = match_dictionaries(a, a)
    assert found.absolute.tolist() == [1, 1, 0, 1, 1]
    assert float(largest_cosines(a)[2]) == 0


def test_other_shapes_are_refused() -> None:
    with pytest.raises(MismatchError, match=r"\[5, 24\] and \[6, 24\]"):
        match_dictionaries(rows("a", 5), rows("b", 6))


def test_chance_is_what_other_random_dictionaries_give(global_random_seed: int) -> None:
    absolute, signed = chance_cosines(N, D, global_random_seed)
    draws = [[random_directions(N, D, 1 + global_random_seed, 50 + 2 * i + s) for s in (0, 1)]
             for i in range(8)]  # fmt: skip
    found = [match_dictionaries(*pair) for pair in draws]
    for value, name in ((absolute, "absolute"), (signed, "signed")):
        others = torch.tensor([float(getattr(one, name).mean()) for one in found])
        error = float(others.std()) * (1 / dictionary_matching.DRAWS + 1 / len(others)) ** 0.5
        assert abs(value - float(others.mean())) < 6 * error
    assert 0.3 < signed < absolute < 0.6
    assert chance_cosines(N, D, global_random_seed) == (absolute, signed)


@pytest.mark.parametrize("block", [7, 1024])
def test_largest_cosines(block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dictionary_matching, "BLOCK", block)
    a = rows("a", 20)
    cosine = normalize(a, dim=1) @ normalize(a, dim=1).T
    expected = [max(float(cosine[i, j]) for j in range(20) if j != i) for i in range(20)]
    assert largest_cosines(5 * a).tolist() == pytest.approx(expected, abs=1e-6)
    opposite = torch.tensor([[1.0, 0.0], [-2.0, 0.0]])
    assert largest_cosines(opposite).tolist() == [-1, -1]
    assert largest_cosines(a[:1]).tolist() == [0]
