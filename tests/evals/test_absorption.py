"""Splitting and absorption: SAEs that do it by construction, the truth, and random directions."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

from saelab.data.activations.store import MemorySource, Source
from saelab.data.synthetic.chains import SyntheticConfig, Truth, generate, truth_of
from saelab.evals.absorption import METRICS, evaluate_absorption
from saelab.evals.core import CoreData
from saelab.evals.dictionary_matching import random_directions
from saelab.evals.measure import EvalData, evaluate

#: Orthogonal features, so that a code can be read off without error: 4 parents, 2 children each.
CHILDREN, PARENTS = 2, 4
HAND = {
    "d": 12,
    "features": 12,
    "l0": 2.4,
    "frequency": "equal",
    "positions": 8,
    "noise": 0.0,
    "jitter": 0.0,
    "spread": 0.5,
    "orthogonal": True,
    "correlation": "hierarchical",
    "children": CHILDREN,
    "given": 0.4,
}


class HandMade:
    """Reads the true code off and gives the latents of each family by a rule.

    `rule` takes parent and children [n, 1 + CHILDREN] (values, parent first) and gives the codes of
    the family's latents [n, m]; `mixes` [m, 1 + CHILDREN] says what of the features each writes.
    """

    def __init__(self, truth: Truth, rule: Any, mixes: Tensor) -> None:
        self.truth, self.rule = truth, rule
        d = truth.directions
        families = [d[p::PARENTS] for p in range(PARENTS)]  # parent p, then its children
        self.weights = torch.cat([mixes @ family for family in families])
        self.d_sae, self.d_in = self.weights.shape

    def encode(self, x: Tensor) -> Tensor:
        code = x @ self.truth.directions.T
        code = code * (code.abs() > 1e-3)
        return torch.cat([self.rule(code[:, p::PARENTS]) for p in range(PARENTS)], 1)

    def decode(self, f: Tensor) -> Tensor:
        return f @ self.weights


def made(seed: int, **changes: Any) -> tuple[Source, Truth]:
    source = generate(SyntheticConfig.parse(HAND | changes), seed, 400, "held_out")
    truth = truth_of(source)
    assert isinstance(truth, Truth)
    return source, truth


def scores(subject: Any, source: Source, truth: Truth) -> dict[str, float]:
    rows = evaluate_absorption(subject, source, truth)
    assert [row.metric for row in rows] == list(METRICS)
    assert {row.definition for row in rows} == {"absorption/1"}
    return {row.metric: row.value for row in rows if row.value is not None}


def test_an_sae_that_absorbs_by_construction_has_rate_1(global_random_seed: int) -> None:
    source, truth = made(global_random_seed)
    sizes = truth.magnitudes.view(-1, PARENTS).T  # [parents, 1 + children]

    def rule(v: Tensor) -> Tensor:
        alone = v[:, :1] * ~(v[:, 1:] != 0).any(1, keepdim=True)
        return torch.cat([alone, (v[:, 1:] != 0).float()], 1)

    subject = HandMade(truth, rule, torch.eye(1 + CHILDREN))
    rows = []
    for family, size in enumerate(sizes):  # a child's latent writes the parent too
        parent, *children = truth.directions[family::PARENTS]
        both = zip(size[1:], children, strict=True)
        rows += [parent, *(size[0] * parent + own * child for own, child in both)]
    subject.weights = torch.stack(rows)
    found = scores(subject, source, truth)
    assert found["absorption.rate"] == found["absorption.silent"] == 1
    assert found["absorption.silent_alone"] == 0
    assert found["absorption.main_cosine"] == pytest.approx(1, abs=1e-5)
    assert found["oracle_absorption.rate"] == found["oracle_absorption.silent"] == 0
    assert found["chance_absorption.rate"] < 0.5


def test_latents_of_the_true_features_absorb_and_split_nothing(global_random_seed: int) -> None:
    source, truth = made(global_random_seed)
    found = scores(HandMade(truth, lambda v: v, torch.eye(1 + CHILDREN)), source, truth)
    for name in ("rate", "silent", "silent_alone"):
        assert found[f"absorption.{name}"] == found[f"oracle_absorption.{name}"] == 0
    assert found["splitting.latents"] == found["oracle_splitting.latents"] == 1
    assert found["splitting.share"] == 0


def test_a_silent_main_latent_that_nobody_replaces_is_not_absorption() -> None:
    source, truth = made(0)

    def rule(v: Tensor) -> Tensor:
        return torch.cat([v[:, :1] * ~(v[:, 1:] != 0).any(1, keepdim=True), v[:, 1:]], 1)

    found = scores(HandMade(truth, rule, torch.eye(1 + CHILDREN)), source, truth)
    assert found["absorption.silent"] == 1 and found["absorption.rate"] == 0


def test_a_parent_split_over_its_cases_is_split(global_random_seed: int) -> None:
    """One latent for each combination of children: 2^CHILDREN of them make up the parent."""
    source, truth = made(global_random_seed)
    cases = list(itertools.product([False, True], repeat=CHILDREN))

    def rule(v: Tensor) -> Tensor:
        on = v[:, 1:] != 0
        same = [(on == torch.tensor(case)).all(1, keepdim=True) for case in cases]
        return torch.cat([v[:, :1] * here for here in same], 1)

    mixes = torch.zeros(len(cases), 1 + CHILDREN)
    mixes[:, 0] = 1
    found = scores(HandMade(truth, rule, mixes), source, truth)
    assert found["splitting.latents"] == len(cases)
    assert found["splitting.share"] == 1


def test_random_directions_score_what_is_printed_as_chance(global_random_seed: int) -> None:
    source, truth = made(global_random_seed, orthogonal=False, noise=0.1)
    own = random_directions(30, 12, global_random_seed + 1)

    class Random:
        d_in, d_sae = 12, 30

        def encode(self, x: Tensor) -> Tensor:
            top = (x @ own.T).topk(3, dim=1)
            return torch.zeros(len(x), 30).scatter_(1, top.indices, top.values.clamp(min=0))

        def decode(self, f: Tensor) -> Tensor:
            return f @ own

    found = scores(Random(), source, truth)
    for name in ("rate", "silent", "silent_alone"):
        apart = found[f"absorption.{name}"] - found[f"chance_absorption.{name}"]
        assert abs(apart) < 0.35, name
    assert 0 < found["chance_absorption.silent"] < 1


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"correlation": "independent"}, "no children"),
        ({"given": 1e-9}, "no parent is on together"),
    ],
)
def test_what_can_not_be_measured_says_why(changes: dict[str, Any], reason: str) -> None:
    source, truth = made(0, **changes)
    rows = evaluate_absorption(HandMade(truth, lambda v: v, torch.eye(3)), source, truth)
    assert [row.metric for row in rows] == list(METRICS)
    assert all(row.value is None and reason in row.reason for row in rows)


def test_unknown_features_are_missing_with_the_reason() -> None:
    source, truth = made(0)
    data = EvalData(CoreData(MemorySource([source.shard(0)], {}), None), None)
    rows = evaluate(HandMade(truth, lambda v: v, torch.eye(3)), data, ["absorption"])
    assert all(row.value is None and "not known" in row.reason for row in rows)
