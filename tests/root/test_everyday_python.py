"""What a user sees of the package in Python: names, help, `repr`, saving and loading, tables."""

from __future__ import annotations

import builtins
import pydoc
import subprocess
import sys
import zipfile
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import saelab
from saelab.api import Comparisons, Scores
from saelab.errors import SettingError, UsageError
from saelab.evals.base import Row
from saelab.progress import progress
from saelab.progress.bar import NOTEBOOK_INTERVAL, display_mode
from saelab.progress.view import NotebookView
from saelab.sae import SAE, SAEConfig
from saelab.seeding import torch_stream
from saelab.verdict.judge import Comparison

ROOT = Path(__file__).parents[2]
OWN_PART = """
from typing import Literal

import saelab
from saelab.parts.base import Dims, LossTerm, PartConfig, Pass

RUNS = {}


class CubeConfig(PartConfig):
    kind: Literal["everyday_cube"] = "everyday_cube"

    def build(self, dims: Dims) -> "Cube":
        return Cube()


class Cube(LossTerm):
    def loss(self, p: Pass):
        return p.code.values.abs().pow(3).sum() / p.n


saelab.register("loss", CubeConfig)
"""


def built(**changes: Any) -> SAE:
    config = SAEConfig.parse({"d_sae": 32, "activation": {"kind": "topk", "k": 4}} | changes)
    sae = config.patched({"losses": [{"kind": "reconstruction"}], "controllers": []}).build(8)
    sae.initialise(torch.randn(256, 8, generator=torch_stream(0, "everyday")), seed=0)
    return sae.eval()


def comparison(**changes: Any) -> Comparison:
    numbers = {"mean_diff": 0.0957, "low": 0.0886, "high": 0.1028, "n": 8, "n_baseline": 8}
    given = {"arm": "A", "metric": "fvu", "level": 0.05, "sesoi": 0.005, "word": "hurts"}
    return Comparison(**(given | numbers | {"exploratory": True} | changes))  # type: ignore[arg-type]


def test_dir_has_the_public_names_and_no_others() -> None:
    names = [name for name in dir(saelab) if not name.startswith("__")]
    assert names == sorted(saelab.__all__)
    assert {"train", "load", "compare", "settings", "to_pandas", "SAE"} <= set(names)
    assert set(saelab._PLACES) == set(saelab.__all__)


def test_help_describes_the_public_functions() -> None:
    text = pydoc.plain(pydoc.render_doc(saelab))
    for line in ("train(base", "Trains one SAE on the activations", "compare(", "class SAE("):
        assert line in text


def test_the_wheel_says_that_the_package_is_typed(tmp_path: Path) -> None:
    """Only the metadata and the listed data of the package, from a copy without its modules."""
    source = tmp_path / "source"
    (source / "saelab").mkdir(parents=True)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        (source / name).write_bytes((ROOT / name).read_bytes())
    for name in ("__init__.py", "version.py", "py.typed"):
        (source / "saelab" / name).write_bytes((ROOT / "saelab" / name).read_bytes())
    build = "from setuptools.build_meta import build_wheel; print(build_wheel('.'))"
    ended = subprocess.run(
        [sys.executable, "-c", build], cwd=source, capture_output=True, text=True, check=True
    )
    wheel = source / ended.stdout.splitlines()[-1]
    assert "saelab/py.typed" in zipfile.ZipFile(wheel).namelist()


# ---- repr ------------------------------------------------------------------------------------


def fits_a_screen(text: str, lines: int = 40, columns: int = 100) -> bool:
    rows = text.splitlines()
    return len(rows) <= lines and max(map(len, rows)) <= columns


@pytest.mark.parametrize("config", sorted((ROOT / "configs").glob("*.toml")), ids=lambda f: f.stem)
def test_settings_show_what_differs_from_the_defaults_on_one_screen(config: Path) -> None:
    base = saelab.settings(config)
    text = repr(base)
    assert fits_a_screen(text), text
    assert "hook_name=" in text and "tokens=" in text and "grad_clip" not in text
    assert str(base) == text
    changed = repr(base.patched({"train.grad_clip": 0.25}))
    assert "grad_clip=0.25" in changed


def test_different_settings_have_different_texts() -> None:
    one, other = SAEConfig(), SAEConfig(tied=True)
    assert repr(one) != repr(other)
    assert repr(SAEConfig(d_sae=64)) != repr(SAEConfig(d_sae=65))


def test_an_sae_shows_its_sizes_parts_and_place() -> None:
    text = repr(built())
    assert fits_a_screen(text, lines=10)
    assert "32 latents on activations of width 8" in text and "topk(k=4)" in text
    assert "552 parameters, torch.float32 on cpu, in evaluation mode" in text
    assert "in training mode" in repr(built().train())


def test_a_pass_shows_its_sizes_l0_and_error() -> None:
    sae = built().train()
    x = torch.randn(64, 8, generator=torch_stream(1, "everyday"))
    text = repr(sae.forward(x, step=3, steps=9))
    assert fits_a_screen(text, lines=1, columns=200)
    assert "step 3 of 9: 64 rows of width 8, 32 latents, L0 4, FVU 1.0" in text


def test_comparisons_have_a_line_each() -> None:
    missing = comparison(arm="B", mean_diff=None, low=None, high=None, reason="no healthy cell")
    lines = repr(Comparisons([comparison(), missing])).splitlines()
    assert lines[0] == (
        "Comparison(A against baseline: hurts; fvu differs by +0.0957 (0.95 interval +0.0886 to "
        "+0.1028); 8 cells and 8, smallest effect 0.005)"
    )
    assert "no healthy cell" in lines[1] and len(lines) == 2


def test_scores_show_the_first_values() -> None:
    few, many = Scores({"fvu": 0.25}), Scores({f"metric {i}": float(i) for i in range(60)})
    assert repr(few) == "Scores: 1 value\n  fvu  0.25"
    assert fits_a_screen(repr(many), lines=26) and "and 36 more values" in repr(many)


# ---- saving and loading ----------------------------------------------------------------------


def test_an_sae_is_saved_and_loaded_with_the_same_bits(tmp_path: Path) -> None:
    sae, x = built(), torch.randn(16, 8, generator=torch_stream(2, "everyday"))
    sae.save(tmp_path / "mine", {"hook_name": "h"})
    loaded = saelab.load(tmp_path / "mine")
    assert loaded.config == sae.config and torch.equal(loaded.encode(x), sae.encode(x))
    saelab.save(sae, tmp_path / "again", "saelab")
    assert torch.equal(saelab.load(str(tmp_path / "again")).encode(x), sae.encode(x))


def test_own_parts_are_named_by_their_file(tmp_path: Path) -> None:
    """In processes of their own: a part stays registered."""
    (tmp_path / "experiment.py").write_text(OWN_PART, encoding="utf-8")
    save = (
        "import experiment; from saelab.sae import SAEConfig;"
        "c = SAEConfig.parse({'d_sae': 8, 'losses': [{'kind': 'reconstruction'}, "
        "{'kind': 'everyday_cube'}], 'controllers': []}); c.build(4).save('mine')"
    )
    load = "import saelab; print(saelab.load('mine'{}).d_sae)"
    ended = in_process(tmp_path, save)
    assert ended.returncode == 0, ended.stderr
    refused = in_process(tmp_path, load.format(""))
    last = refused.stderr.splitlines()[-1]
    assert "everyday_cube" in last and "saelab.load(folder, experiment='experiment.py')" in last
    named = in_process(tmp_path, load.format(", experiment='experiment.py'"))
    assert named.stdout.strip() == "8", named.stderr


def in_process(folder: Path, code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code], cwd=folder, capture_output=True, text=True, check=False
    )


def test_settings_come_from_a_dict_too() -> None:
    plain = {"sae": {"d_sae": 64}}
    base = saelab.settings(plain, {"train.tokens": 1_024})
    assert base.sae.d_sae == 64 and base.train.tokens == 1_024
    assert saelab.settings(base) == base


# ---- nothing that was not asked for ----------------------------------------------------------


def test_python_calls_print_and_probe_nothing(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    for i in range(2):
        x = torch.randn(512, 8, generator=torch_stream(i, "test rows"))
        save_file({"x": x}, tmp_path / f"{i}.safetensors")
    base = {
        "activations": str(tmp_path),
        "sae": {
            "d_sae": 32,
            "activation": {"kind": "topk", "k": 4},
            "losses": [{"kind": "reconstruction"}],
            "controllers": [],
        },
        "train": {"tokens": 256, "batch_size": 64},
        "evaluation": {"tokens": 128},
    }
    scores = saelab.evaluate(saelab.train(base, cache=tmp_path), base, cache=tmp_path)
    assert {row.definition for row in scores.rows} == {"core/1", "core/random/1"}
    arms = {"A": {"train.lr": 2e-3}}
    made = saelab.compare(
        base, arms, seeds=2, target_l0=4, seeds_levels=0, out_dir=tmp_path / "made"
    )
    assert [c.arm for c in made] == ["A"]
    assert capfd.readouterr().out == ""


def test_no_texts_are_read_for_probes_that_were_not_asked_for(tmp_path: Path) -> None:
    base = {
        "context": 32,
        "sae": {"preset": "topk", "d_sae": 64},
        "train": {"tokens": 512, "batch_size": 128},
        "evaluation": {"tokens": 256, "loss_contexts": 2, "calibration_tokens": 0},
    }
    saelab.evaluate(saelab.train(base, cache=tmp_path), base, cache=tmp_path)
    assert saelab.settings(base).evaluation.probing.entries == "embedded"
    assert "probing" not in {folder.name for folder in (tmp_path / ".saelab").iterdir()}


# ---- pandas ----------------------------------------------------------------------------------


def test_results_as_pandas(tmp_path: Path) -> None:
    pytest.importorskip("pandas")
    scores = Scores({"fvu": 0.25})
    scores.rows = [Row("fvu", 0.25, "core/1"), Row("fvu", None, "core/1", slice="s", reason="why")]
    table = saelab.to_pandas(scores)
    assert list(table["metric"]) == ["fvu", "fvu"] and table["value"][0] == 0.25
    table = saelab.to_pandas(Comparisons([comparison(), comparison(arm="B")]))
    assert list(table["arm"]) == ["A", "B"] and table["high"][0] == 0.1028
    with pytest.raises(SettingError, match=r"give scores of saelab\.evaluate"):
        saelab.to_pandas({"a": 1})


def test_without_pandas_one_sentence_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def without(name: str, *rest: Any) -> ModuleType:
        if name == "pandas":
            raise ImportError(name)
        return real(name, *rest)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(UsageError, match="pip install pandas"):
        saelab.to_pandas([])


# ---- notebooks -------------------------------------------------------------------------------


class Handle:
    """Stands in for IPython's handle of an output; keeps what is shown."""

    def __init__(self, first: dict[str, str]) -> None:
        self.shown = [first]

    def update(self, data: dict[str, str], raw: bool) -> None:
        assert raw
        self.shown.append(data)


@pytest.fixture
def outputs(monkeypatch: pytest.MonkeyPatch) -> list[Handle]:
    """Outputs of a notebook's cell, in a process that looks like a kernel."""
    made: list[Handle] = []

    def display(data: dict[str, str], raw: bool, display_id: bool) -> Handle:
        assert raw and display_id
        made.append(Handle(data))
        return made[-1]

    shell = SimpleNamespace(kernel=object())
    package, inner = ModuleType("IPython"), ModuleType("IPython.display")
    vars(package)["get_ipython"] = lambda: shell
    vars(inner)["display"] = display
    monkeypatch.setitem(sys.modules, "IPython", package)
    monkeypatch.setitem(sys.modules, "IPython.display", inner)
    monkeypatch.delenv("SAELAB_PROGRESS", raising=False)
    return made


def test_a_notebook_has_one_bar_that_is_replaced(
    outputs: list[Handle], capsys: pytest.CaptureFixture[str]
) -> None:
    assert display_mode() == "notebook"
    with progress("<b> harvest", 10, "tokens") as bar:
        for _ in range(10):
            bar.advance()
    (handle,) = outputs
    assert len(handle.shown) == 2  # the first and the last; an interval lies between two updates
    assert NOTEBOOK_INTERVAL > 0.1
    last = handle.shown[-1]
    assert 'value="1.0000"' in last["text/html"] and "100%" in last["text/plain"]
    assert "<b>" not in last["text/html"]
    assert capsys.readouterr().err == ""


def test_a_launch_in_a_notebook_has_one_view(outputs: list[Handle]) -> None:
    view = NotebookView(lambda: "3/4 cells <x>")
    view.update()
    view.update(force=True)
    assert len(outputs) == 1 and len(outputs[0].shown) == 2
    assert outputs[0].shown[-1]["text/html"] == "<pre>3/4 cells &lt;x&gt;\n</pre>"


def test_a_terminal_of_ipython_is_no_notebook(monkeypatch: pytest.MonkeyPatch) -> None:
    package = ModuleType("IPython")
    vars(package)["get_ipython"] = lambda: SimpleNamespace()
    monkeypatch.setitem(sys.modules, "IPython", package)
    monkeypatch.delenv("SAELAB_PROGRESS", raising=False)
    assert display_mode() in ("plain", "live")
