"""A plan is checked without the memory that its training would take."""

from __future__ import annotations

import resource
from pathlib import Path

import pytest
from projects import Project, cli

from saelab.checks.examples import cases
from saelab.parts import SEAMS
from saelab.sae import MOST_LATENTS

#: Bytes that a check may take besides what was there; W_enc and W_dec of two channels take 1.1e9.
MOST_BYTES = 5e8


def peak() -> int:
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def test_plan_check_of_the_largest_sae(tmp_path: Path) -> None:
    project = Project.make_smallest(tmp_path / "project")
    assert cli(project.folder, "plan", "check").code == 0  # what is loaded once
    before = peak()
    project.replace("configs/small.toml", "d_sae = 64", f"d_sae = {MOST_LATENTS}")
    ended = cli(project.folder, "plan", "check")
    assert ended.code in (0, 2) and "GB of memory" in ended.out, ended.err  # 2: it takes hours
    assert peak() - before < MOST_BYTES


@pytest.mark.parametrize("seam", SEAMS)
def test_the_outline_of_every_part_takes_no_memory(seam: str) -> None:
    before = peak()
    for case in cases(MOST_LATENTS, seam):
        outline = case.settings(MOST_LATENTS).outline()
        assert {name: tuple(t.shape) for name, t in outline.state_dict().items()}
        assert outline.W_enc.device.type == "meta"
    assert peak() - before < MOST_BYTES
