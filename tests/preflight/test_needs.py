"""The stated needs of a launch against measured memory, and how they grow."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from saelab.data import language_model
from saelab.data.activations.harvest import HarvestConfig
from saelab.data.language_model import ModelConfig, load, size
from saelab.preflight.cost import harvest_bytes, launch_needs, process_bytes
from saelab.study.plan import Arm, BaseConfig, PlanConfig, Run, cells
from saelab.training.snapshots import snapshot_bytes

BASE = BaseConfig()
GROUP = 3


def specs(base: BaseConfig = BASE) -> list:
    return cells(PlanConfig(study="test"), base, Run("test", [Arm("baseline")]))


def test_the_size_is_that_of_the_loaded_model() -> None:
    embedded, model = size(ModelConfig()), load(ModelConfig())
    assert embedded.weights == sum(4 * weight.numel() for weight in model.model.parameters())
    assert (embedded.d_model, embedded.inner) == (model.d_model, 4 * model.d_model)
    assert size(ModelConfig(dtype="bfloat16")).weights == embedded.weights // 2


def test_needs_grow_with_what_is_asked_for() -> None:
    small = launch_needs(BASE, specs(), 2, GROUP)
    wide = BASE.patched({"sae.d_sae": 16 * BASE.sae.d_sae})
    weights = 4 * 2 * 192 * 15 * BASE.sae.d_sae  # of the rest of a cell
    grown = launch_needs(wide, specs(wide), 2, GROUP).training - small.training
    assert grown > 2 * (3 * GROUP + 1) * weights  # with moments, and one cell's gradient
    assert launch_needs(BASE, specs(), 8, GROUP).training > 3 * small.training
    large = BASE.patched({"harvest.shard_tokens": 16 * BASE.harvest.shard_tokens})
    assert launch_needs(large, specs(), 2, GROUP).harvest > small.harvest + 300e6
    long = BASE.patched({"train.tokens": 16 * BASE.train.tokens})
    assert launch_needs(long, specs(long), 2, GROUP).disk > 10 * small.disk
    without = BASE.patched({"evaluation.snapshots": 0})
    kept = small.training - launch_needs(without, specs(without), 2, GROUP).training
    assert kept == 2 * GROUP * snapshot_bytes(10, BASE.sae.d_sae, 192)
    assert "GB of memory" in small.line() and "GB of disk" in small.line()


def test_the_logits_of_a_large_vocabulary_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    small = size(ModelConfig())
    plain = launch_needs(BASE, specs(), 2, GROUP)
    large = replace(small, vocabulary=49_152)
    monkeypatch.setattr(language_model, "size", lambda _: large)
    grown = launch_needs(BASE, specs(), 2, GROUP).training - plain.training
    # 5 contexts a pass instead of 32, one in float32 twice, 2 stored instead of 32
    of_context = 4 * 128 * 49_152
    assert grown == 2 * (9 * of_context - (32 + 2 + 32) * 4 * 128 * 4096)
    monkeypatch.setattr(language_model, "size", lambda _: replace(large, has_head=False))
    saved = plain.training + grown - launch_needs(BASE, specs(), 2, GROUP).training
    assert saved > 2 * 9 * of_context


def test_the_data_sets_of_sae_probes_take_memory_and_disk() -> None:
    plain = launch_needs(BASE, specs(), 2, GROUP)
    probed = BASE.patched({"evaluation.extra": ["sae_probes"]})
    asked = launch_needs(probed, specs(), 2, GROUP)
    assert asked.disk - plain.disk == 4 * 134_938 * 192  # one float32 row a text
    rows = 8 * 5000 * (192 + BASE.sae.d_sae)
    problems = 4 * min(2**26, 47 * 3 * 2 * 1024 * 128)
    assert asked.training - plain.training == 2 * (rows + problems)
    every = probed.patched({"evaluation.sae_probes.datasets": "all"})
    assert launch_needs(every, specs(), 2, GROUP).disk > asked.disk


def test_both_phases_count_where_they_are_at_work_together() -> None:
    apart = launch_needs(BASE, specs(), 2, GROUP)
    together = launch_needs(BASE.patched({"harvest.overlap": True}), specs(), 2, GROUP)
    assert (together.harvest, together.training) == (apart.harvest, apart.training)
    shared = process_bytes() + size(ModelConfig()).weights
    assert together.memory == apart.training + apart.harvest - shared > apart.memory
    assert "both at once" in together.line() and "both at once" not in apart.line()


def test_a_launch_of_foreign_activations_asks_for_no_model() -> None:
    foreign = BASE.patched({"activations": "elsewhere", "model.path": "/nowhere"})
    assert launch_needs(foreign, specs(), 2, GROUP).disk == 0


PEAK = """
import json, sys, torch
from pathlib import Path
torch.set_num_threads(2)
import saelab.launch.launch
from saelab.data.activations.harvest import HarvestConfig, harvest
from saelab.data import language_model
from saelab.data.language_model import ModelConfig, load
from saelab.data.text.tokens import Tokens
folder, contexts, shard_tokens, batch = sys.argv[1], *map(int, sys.argv[2:])
ids = torch.randint(3, 4096, (contexts, 128))
config = HarvestConfig(shard_tokens=shard_tokens, batch=batch)
hooks = ["blocks.2.hook_resid_post"]
harvest(load(ModelConfig()), Tokens(ids, ids > 2), hooks, config, Path(folder))
status = Path("/proc/self/status").read_text()  # ru_maxrss would count the process that started us
print(json.dumps(1024 * int(status.split("VmHWM:")[1].split()[0])))
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="the peak is read from /proc")
@pytest.mark.parametrize(
    ("contexts", "shard_tokens", "batch"),
    [(512, 32_768, 32), (1024, 65_536, 128), (2560, 163_840, 32)],
)
def test_a_harvest_takes_what_is_stated(
    tmp_path: Path, contexts: int, shard_tokens: int, batch: int
) -> None:
    asked = [str(tmp_path), *map(str, (contexts, shard_tokens, batch))]
    environment = os.environ | {"SAELAB_PROGRESS": "off", "OMP_NUM_THREADS": "2"}
    done = subprocess.run(
        [sys.executable, "-c", PEAK, *asked],
        capture_output=True,
        text=True,
        check=True,
        env=environment,
    )
    peak = json.loads(done.stdout.splitlines()[-1])
    torch.set_num_threads(2)  # the number of lanes that the other process had
    settings = BaseConfig(harvest=HarvestConfig(shard_tokens=shard_tokens, batch=batch))
    embedded = size(ModelConfig())
    stated = process_bytes() + embedded.weights
    stated += harvest_bytes(embedded, settings, 128 * contexts)
    torch.set_num_threads(1)
    print(f"peak {peak / 1e6:.0f} MB, stated {stated / 1e6:.0f} MB")
    assert 1 / 1.3 < stated / peak < 1.3
