"""What a new user does first: import, --help, the README's own lines."""

from __future__ import annotations

import math
import os
import re
import shutil
import signal
import sys
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
from projects import ROOT, Project, cli, environment, run

from saelab.runs.folder import RunFolder
from saelab.verdict.judge import Comparison
from saelab.verdict.l0_adjustment import match
from saelab.verdict.review import judge_files

#: What takes a second and more to load.
HEAVY = {"torch", "numpy", "transformers", "datasets", "pydantic", "sklearn", "scipy", "pyarrow"}


@pytest.mark.parametrize("code", ["import saelab", "import saelab.__main__"])
def test_importing_loads_nothing_heavy(tmp_path: Path, code: str) -> None:
    ended = run(tmp_path, "-c", f"{code}; import sys; print(sorted({HEAVY} & set(sys.modules)))")
    assert ended.out.strip() == "[]", ended.err


LOADING = """
import os, signal, sys
class Finder:
    def find_spec(self, name, *_):
        if name == "torch":
            os.kill(os.getpid(), {number})
sys.meta_path.insert(0, Finder())
signal.signal(signal.SIGINT, signal.default_int_handler)
{statement}
"""


@pytest.mark.parametrize(
    "statement", ["from saelab.launch.entry import main", "from saelab import Arm, main"]
)
@pytest.mark.parametrize(
    ("number", "word"), [(signal.SIGINT, "interrupted"), (signal.SIGTERM, "terminated")]
)
def test_a_signal_while_torch_is_loaded_is_one_sentence(
    tmp_path: Path, number: int, word: str, statement: str
) -> None:
    ended = run(tmp_path, "-c", LOADING.format(number=int(number), statement=statement))
    assert ended.code == 128 + number
    assert ended.err == f"{word}: the same command goes on where it stopped\n"


@pytest.mark.parametrize(
    "command",
    [
        (),
        ("train",),
        ("eval",),
        ("run",),
        ("lm", "train"),
        ("plan", "check"),
        ("verdict",),
        ("tune",),
        ("template",),
        ("attempts",),
    ],
)
def test_help_says_what_a_command_takes(tmp_path: Path, command: tuple[str, ...]) -> None:
    ended = cli(tmp_path, *command, "--help")
    assert ended.code == 0
    assert "Usage" in ended.out
    if command == ("train",):
        assert "--out_dir" in ended.out and "--set" in ended.out and "--seeds" in ended.out


def test_help_loads_nothing_heavy(tmp_path: Path) -> None:
    code = (
        "import atexit, sys; from saelab.__main__ import main; "
        f"heavy = {HEAVY - {'pydantic'}}; "  # which knows what can be set
        "atexit.register(lambda: print('loaded', sorted(heavy & set(sys.modules)))); "
        "sys.argv[1:] = ['train', '--help']; main()"
    )
    ended = run(tmp_path, "-c", code)
    assert ended.code == 0 and "Usage" in ended.out
    assert ended.out.rstrip().endswith("loaded []"), ended.out


def test_all_public_names_are_there() -> None:
    import saelab

    for name in saelab.__all__:
        assert getattr(saelab, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'trian'"):
        saelab.trian  # noqa: B018


def test_the_root_table_can_be_run_as_it_is() -> None:
    """Every arm of every shipped run is possible; nothing is trained here."""
    from saelab.study.experiment_file import load_experiment
    from saelab.study.plan import cells, read_base, read_plan, resolve_with_placeholders

    plan, runs = read_plan(ROOT / "plan.toml"), load_experiment(ROOT / "experiment.py").RUNS
    sys.modules.pop("saelab_experiment", None)
    base = read_base(ROOT / plan.base)
    for run_ in runs.values():
        specs = cells(plan, base, resolve_with_placeholders(run_))
        assert sum(s.id.arm == "baseline" and s.id.level == plan.target_l0 for s in specs) == 8
    assert len(cells(plan, base, runs["run_1"])) == 39
    assert len((ROOT / "experiment.py").read_text(encoding="utf-8").splitlines()) <= 220


@pytest.mark.parametrize("config", sorted((ROOT / "configs").glob("*.toml")), ids=lambda p: p.name)
def test_every_shipped_config_is_possible(config: Path) -> None:
    from saelab.study.plan import read_base

    base = read_base(config)
    base.sae.build(2, d_out=2 if base.target_hooks else None)
    assert base.eval_text != base.train_text


def readme_block(language: str, containing: str) -> str:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    blocks = re.findall(rf"```{language}\n(.*?)```", text, re.S)
    (found,) = [block for block in blocks if containing in block]
    return found


@pytest.mark.slow
def test_the_readmes_python_lines_run(tmp_path: Path) -> None:
    code = readme_block("python", "import saelab")
    smaller = '16_384, "sae.d_sae": 256, "evaluation.tokens": 8_192, '
    smaller += '"evaluation.probing.train_size": 100, "evaluation.probing.test_size": 40'
    for old, new in (("131_072", smaller), ("seeds=3", "seeds=2")):
        assert code.count(old) == 1
        code = code.replace(old, new)
    shutil.copytree(ROOT / "configs", tmp_path / "configs")
    (tmp_path / "lines.py").write_text(code, encoding="utf-8")
    ended = run(tmp_path, "lines.py")
    assert ended.code == 0, ended.err
    first, *_, last = ended.out.splitlines()
    explained, l0, recovered = map(float, first.split())
    assert 0 < explained < 1 and l0 > 0 and 0.5 < recovered < 1.02
    assert last.startswith("A1 ")


def test_the_api_does_what_the_readme_shows(tmp_path: Path) -> None:
    """The same calls on a small project, in this process."""
    import saelab

    project = Project.make_smallest(tmp_path / "p")
    before = Path.cwd()
    os.chdir(project.folder)
    try:
        base = saelab.settings("configs/small.toml", {"train.tokens": 4_096})
        sae = saelab.train(base, seed=0)
        scores = saelab.evaluate(sae, base, evals=["core"])
        again = saelab.evaluate(saelab.train(base, seed=0), base)
        other = saelab.evaluate(saelab.train(base, seed=1), base)
        assert scores["fvu"] == again["fvu"] != other["fvu"]
        assert scores["explained_variance"] == pytest.approx(1 - scores["fvu"])
        assert {row.definition for row in scores.rows} == {"core/1", "core/random/1"}
        arms = {"A1": {"sae.scaling": {"kind": "variance", "tau": 0.5}}}
        (c,) = saelab.compare(base, arms, seeds=2, target_l0=16, out_dir="kept")
        assert c.arm == "A1" and c.low is not None and c.high is not None
        assert c.low <= (c.mean_diff or 0) <= c.high
        assert (project.folder / "kept" / "final_info.json").is_file()
        (same,) = saelab.compare(base, arms, seeds=2, target_l0=16)
        assert same == c
        _check_compared_at_target(project.folder / "kept", c)
    finally:
        os.chdir(before)


def _check_compared_at_target(folder: Path, comparison: Comparison) -> None:
    """Checks that the comparison is the one of `judge_files`, between cells that were moved to the
    declared L0 along each arm's own levels."""
    judged = judge_files(RunFolder(folder))
    assert judged.comparisons == [comparison] and judged.plan.target_l0 == 16
    for arm in judged.arms.values():
        assert len(arm.levels) == 2 and all(
            cells.keys() == {8, 32} for cells in arm.levels.values()
        )
    matched = match(judged.arms, "baseline", "fvu", judged.plan)
    assert {one.origin for one in matched.values()} == {"own"}
    for name, arm in judged.arms.items():
        slope = float(np.mean([_slope(cells) for cells in arm.levels.values()]))
        for seed, values in arm.values.items():
            moved = values["fvu"] + slope * math.log(16 / values["l0"])
            assert matched[name].values[seed] == pytest.approx(moved, rel=1e-9)
    assert comparison.mean_diff is not None
    means = {name: np.mean([v for v in m.values.values() if v]) for name, m in matched.items()}
    assert comparison.mean_diff == pytest.approx(means["A1"] - means["baseline"], abs=1e-6)


def _slope(cells: Mapping[float, Mapping[str, float]]) -> float:
    """Change of FVU with log L0 between the two levels of a seed."""
    low, high = (cells[level] for level in sorted(cells))
    return (high["fvu"] - low["fvu"]) / math.log(high["l0"] / low["l0"])


def test_the_environment_of_these_tests_is_a_users() -> None:
    assert not {"SAELAB_CACHE", "SAELAB_WORKERS", "SAELAB_PROGRESS"} & set(environment())
