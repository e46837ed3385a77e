"""The loss that CONTRIBUTING.md shows passes the battery, and what it says of a pass is there."""

from __future__ import annotations

import re
from pathlib import Path

import torch
from projects import as_if_fresh
from typer.testing import CliRunner

from saelab.cli import app
from saelab.parts.base import Pass
from saelab.sae import SAE, SAEConfig
from saelab.seeding import torch_stream

PAGE = (Path(__file__).parents[2] / "CONTRIBUTING.md").read_text(encoding="utf-8")
SECTION = PAGE.split("### In a file of a study")[1].split("\n## ")[0]


def test_the_loss_passes_every_check(tmp_path: Path) -> None:
    (code,) = re.findall(r"```python\n(.*?)```", SECTION, re.DOTALL)
    (tmp_path / "experiment.py").write_text(code + "\nRUNS = {}\n")
    with as_if_fresh():
        done = CliRunner().invoke(app, ["check-part", str(tmp_path / "experiment.py")])
    assert done.exit_code == 0 and "FAILS" not in done.output, done.output


def test_every_row_of_the_table_is_there_in_its_shape() -> None:
    n, d, f = 6, 8, 16
    sae: SAE = SAEConfig.parse({"d_sae": f}).build(d)
    x = torch.randn(n, d, generator=torch_stream(0, "test own loss"))
    sae.initialise(x, 0)
    p: Pass = sae(x, 0, 1)
    table = dict(re.findall(r"^\| `(.+?)` \| \[(.+?)\]", SECTION, re.MULTILINE))
    sizes = {"N": n, "d": d, "F": f}
    assert len(table) > 4
    for names, shape in table.items():
        for name in names.split("`, `"):
            if name not in ("z", "starts", "l0"):  # two where a part asks for them, and a number
                value = eval(f"p.{name}", {"p": p})
                assert list(value.shape) == [sizes[one] for one in shape.split(", ")], name
    rows = re.findall(r"^\| `(.+?)` \| (?:any|as|number)", SECTION, re.MULTILINE)
    names = [name.split("(")[0] for row in rows for name in row.split("`, `")]
    assert {"n", "step", "steps", "setting", "sizes", "code.values"} <= set(names)
    for name in names:
        eval(f"p.{name}", {"p": p})
