"""The notebooks of docs/notebooks: their form, and each run from the first cell to the last.

`make notebooks` installs what runs them.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
from projects import ROOT, environment

NOTEBOOKS = sorted((ROOT / "docs" / "notebooks").glob("*.ipynb"))


def cells(notebook: Path, kind: str) -> list[dict[str, Any]]:
    data = json.loads(notebook.read_text(encoding="utf-8"))
    return [cell for cell in data["cells"] if cell["cell_type"] == kind]


def test_there_are_three() -> None:
    names = {notebook.stem for notebook in NOTEBOOKS}
    assert names == {"bring_your_own", "judge_your_idea", "look_into_an_sae"}


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_is_stored_as_it_was_run(notebook: Path) -> None:
    """It begins with a title, its code compiles, and its outputs are results: no error, warning or
    path of the machine that it was run on."""
    (first, *_) = cells(notebook, "markdown")
    assert "".join(first["source"]).startswith("# ")
    outputs = [output for cell in cells(notebook, "code") for output in cell["outputs"]]
    assert outputs
    assert {o["output_type"] for o in outputs} <= {"stream", "execute_result", "display_data"}
    assert {o["name"] for o in outputs if "name" in o} <= {"stdout"}
    for cell in cells(notebook, "code"):
        compile("".join(cell["source"]), notebook.name, "exec")
    text = notebook.read_text(encoding="utf-8")
    assert not [word for word in ("/home/", "/tmp/", "/root/", "site-packages") if word in text]


@pytest.mark.slow
@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs(notebook: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In an empty folder, as it stands; every cell that has an output has one again."""
    pytest.importorskip("ipykernel")
    nbformat, nbclient = pytest.importorskip("nbformat"), pytest.importorskip("nbclient")
    for name, value in environment().items():
        monkeypatch.setitem(os.environ, name, value)
    run = nbformat.read(notebook, as_version=4)
    client = nbclient.NotebookClient(run, timeout=900, resources={"metadata": {"path": tmp_path}})
    client.execute()
    for before, after in zip(cells(notebook, "code"), _code(run), strict=True):
        assert bool(before["outputs"]) <= bool(after.outputs), before["source"]


def _code(notebook: Any) -> list[Any]:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]
