"""Activations of a launch with several hook points: one pass, one key, checked names."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from projects import ROOT
from torch import Tensor

import saelab
from saelab.config import digest
from saelab.data.activations.joined import JoinedSource, Paths, is_growing, target_hooks
from saelab.data.hook_names import describe_hooks, split_hooks
from saelab.data.language_model import LanguageModel, size
from saelab.errors import SettingError
from saelab.launch.prepare import open_source, prepare, source_path
from saelab.preflight.cost import harvest_flops, launch_needs
from saelab.study import calibration
from saelab.study.checks import check_settings
from saelab.study.plan import BaseConfig
from saelab.verdict.error_budget.hypotheses import SHARED

CONTEXT = 16
READ, WRITTEN = "blocks.1.mlp.hook_in", "blocks.1.hook_mlp_out"


def words(begin: int, end: int) -> str:
    return "\n".join(f"x_{i} = {i * 7919 % 100_003}" for i in range(begin, end)) + "\n"


@pytest.fixture
def base(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> BaseConfig:
    monkeypatch.setenv("SAELAB_PROGRESS", "off")
    monkeypatch.setattr(calibration, "LEAST_TOKENS", 100)
    (tmp_path / "train.txt").write_text(words(0, 400))
    (tmp_path / "held_out.txt").write_text(words(20_000, 20_400))
    changes = {
        "context": CONTEXT,
        "hook_name": READ,
        "target_hook": WRITTEN,
        "train_text": {"kind": "files", "path": str(tmp_path / "train.txt")},
        "eval_text": {"kind": "files", "path": str(tmp_path / "held_out.txt")},
        "harvest.shard_tokens": 600,
        "train": {"tokens": 1024, "batch_size": 64},
        "evaluation": {"tokens": 512, "loss_contexts": 4, "probing": {"entries": "none"}},
        "sae.d_sae": 64,
    }
    return saelab.settings(ROOT / "configs" / "embedded.toml", changes)


class Passes:
    """Hook points of each pass of the model over whole contexts."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.hooks: list[list[str]] = []
        plain = LanguageModel.activations

        def counting(
            lm: LanguageModel, ids: Tensor, mask: Tensor | None, hooks: Sequence[str]
        ) -> dict[str, Tensor]:
            if ids.shape[1] == CONTEXT:
                self.hooks.append(list(hooks))
            return plain(lm, ids, mask, hooks)

        monkeypatch.setattr(LanguageModel, "activations", counting)


def test_one_pass_fills_inputs_and_targets(
    base: BaseConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    passes = Passes(monkeypatch)
    data = prepare(base, tmp_path / "cache", "cpu")
    assert {frozenset(hooks) for hooks in passes.hooks} == {
        frozenset({READ, WRITTEN}),  # training and held-out text
        frozenset({READ}),  # calibration text is only read
    }
    train = data.train
    assert isinstance(train, JoinedSource) and target_hooks(train) == (WRITTEN,)
    assert data.provenance["hook_name"] == f"{READ} -> {WRITTEN}"
    model = saelab.data.language_model.load(base.model)
    shard = train.shard(0)
    found = model.activations(shard.ids.long()[:3], None, [READ, WRITTEN])
    for stored, name in ((shard.x, READ), (shard.y, WRITTEN)):
        torch.testing.assert_close(stored[:3], found[name].to(stored.dtype))

    ran = len(passes.hooks)
    again = prepare(base, tmp_path / "cache", "cpu")
    assert again.train.digest == train.digest and len(passes.hooks) == ran
    written = (tmp_path / "cache").rglob(WRITTEN)
    (damaged,) = (path for path in written if len(list(path.glob("shard-*"))) > 1)
    shutil.rmtree(damaged)
    repaired = prepare(base, tmp_path / "cache", "cpu")
    assert repaired.train.digest == train.digest
    assert {tuple(hooks) for hooks in passes.hooks[ran:]} == {(WRITTEN,)}


def test_workers_open_the_same_source(base: BaseConfig, tmp_path: Path) -> None:
    hooks = {"hook_name": [READ, "blocks.0.hook_resid_post"]}
    data = prepare(base.patched(hooks), tmp_path / "cache", "cpu")
    path = source_path(data.train)
    assert isinstance(path, Paths) and len(path.inputs) == 2 and len(path.targets) == 1
    opened = open_source(path, False, "train")
    assert opened.digest == data.train.digest and opened.header == data.train.header
    assert torch.equal(opened.shard(0).x, data.train.shard(0).x)
    assert opened.d == 2 * data.train.targets[0].d  # type: ignore[attr-defined]


def test_training_may_begin_during_the_harvest(base: BaseConfig, tmp_path: Path) -> None:
    whole = prepare(base, tmp_path / "whole", "cpu").train
    data = prepare(base, tmp_path / "steps", "cpu", overlap=True)
    assert is_growing(data.train) and data.train_digest is None and not is_growing(whole)
    opened = open_source(source_path(data.train), False, "train", growing=True)
    next(data.steps)
    for source in (data.train, opened):
        assert torch.equal(source.shard(0).y, whole.shard(0).y)  # type: ignore[attr-defined]
    for _ in data.steps:
        pass
    assert data.train.digest == opened.digest == whole.digest


def test_a_single_hook_has_the_key_of_before(base: BaseConfig, tmp_path: Path) -> None:
    alone = base.patched({"target_hook": None, "hook_name": ["blocks.1.hook_resid_post"]})
    assert alone.hook_name == "blocks.1.hook_resid_post"
    data = prepare(alone, tmp_path / "cache", "cpu")
    header = data.train.header
    names = ("model_digest", "model_dtype", "hook_name", "corpus", "context", "asked_tokens")
    asked = {name: header[name] for name in (*names, "dtype")}
    asked |= {"column": alone.train_text.column, "joined": alone.train_text.joined}
    assert header["key"] == digest(asked)  # as the version before targets computed it
    assert data.train.path.name == "blocks.1.hook_resid_post"  # type: ignore[attr-defined]


def test_settings_without_a_target_have_the_digest_of_before() -> None:
    base = saelab.settings(ROOT / "configs" / "embedded.toml")
    assert base.digest() == "ac01cdce0ac59d6c"  # written down before there were targets
    listed = base.patched({"hook_name": [base.hook_name]})
    assert listed.digest() == base.digest()
    changed = base.patched({"target_hook": "blocks.2.hook_mlp_out"})
    assert changed.digest() != base.digest()
    assert changed.target_hooks == ("blocks.2.hook_mlp_out",) and base.target_hooks == ()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"target_hook": READ}, "target_hook = .*leave target_hook out"),
        ({"hook_name": []}, "hook_name = .*at least one hook point"),
        ({"hook_name": [READ, READ]}, "hook_name = .*twice: name it once"),
        ({"activations": "elsewhere"}, "target_hook = .*made elsewhere have one hook point"),
        (
            {"activations": "elsewhere", "target_hook": None, "hook_name": ["a", "b"]},
            "hook_name = .*made elsewhere have one hook point",
        ),
    ],
)
def test_hooks_that_do_not_go_together(
    base: BaseConfig, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(SettingError, match=message):
        check_settings(base.patched(changes))


def test_names_of_hooks_are_read_back() -> None:
    for inputs, targets in ((("a",), ()), (("a", "b"), ()), (("a",), ("b", "c")), ((), ())):
        assert split_hooks(describe_hooks(inputs, targets)) == (inputs, targets)


def test_the_harvest_costs_what_the_last_hook_costs(base: BaseConfig) -> None:
    of_model = size(base.model)
    first = base.patched({"hook_name": "blocks.0.hook_resid_post", "target_hook": None})
    later = first.patched({"target_hook": "blocks.2.hook_mlp_out"})
    assert harvest_flops(of_model, later) == pytest.approx(3 * harvest_flops(of_model, first))


def test_a_launch_needs_the_space_of_all_hooks(base: BaseConfig) -> None:
    alone = base.patched({"target_hook": None, "evaluation.calibration_tokens": 0})
    both = alone.patched({"target_hook": WRITTEN})
    one, two = (launch_needs(each, [], 1, 1) for each in (alone, both))
    assert two.disk == 2 * one.disk and two.training > one.training


def test_a_target_is_part_of_what_a_comparison_is_about(base: BaseConfig) -> None:
    dumps = [
        each.model_dump(mode="json", include=SHARED)
        for each in (base, base.patched({"target_hook": None}))
    ]
    assert dumps[0] != dumps[1] and "target_hook" not in dumps[1]
