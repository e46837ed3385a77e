"""`saelab export` and `saelab eval`: the way out and in again, and what is told on the way."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
from projects import BASE, BASELINE, Ended, Project, cli
from safetensors.torch import load_file, save_file

SCALED = (
    'Arm("scaled", {"sae.scaling": {"kind": "variance", "beta": 1.5, "theta": 0.1}}, "A1", '
    "primary=True)"
)
PLAN = (
    "study = 'small'\nbase = 'configs/small.toml'\ntarget_l0 = 16\nlevels = [8]\n"
    "seeds = 2\nseeds_levels = 1\n"
)
PROBED = BASE.replace(
    'entries = "none"', 'entries = "embedded", train_size = 40, test_size = 20, k_values = [1, 5]'
)
CONFIG = "configs/small.toml"
ADAPTING = (
    'Arm("adapting", {"sae.activation": {"kind": "tied_threshold", "beta": 0.3, '
    '"learned": ["theta", "beta"], "context": 32}, "sae.losses": [{"kind": "reconstruction"}]})'
)


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Project:
    """One finished run; no test changes it."""
    folder = tmp_path_factory.mktemp("formats") / "project"
    made = Project.make(folder, (BASELINE, SCALED), plan=PLAN, base=PROBED)
    ended = made.call()
    assert ended.code == 0, ended.err
    return made


def at_target(project: Project, run: str = "run_1") -> dict[tuple[str, int], dict[str, float]]:
    """(arm, seed) -> metric -> value, as the launch wrote them."""
    found: dict[tuple[str, int], dict[str, float]] = {}
    for row in pq.read_table(project.folder / run / "metrics.parquet").to_pylist():
        if row["level"] == 16 and not row["slice"] and row["value"] is not None:
            found.setdefault((row["arm"], row["seed"]), {})[row["metric"]] = row["value"]
    return {cell: values for cell, values in found.items() if ":" not in cell[0]}


def told(ended: Ended, *words: str) -> None:
    assert ended.code == 2, ended.err
    assert "Traceback" not in ended.err
    for word in words:
        assert word in ended.last, ended.last


def one_cell(project: Project, arm: str = "baseline") -> Path:
    return min((project.folder / "run_1" / "cells" / arm).glob("*-l0_16"))


def rows_of(ended: Ended) -> list[dict[str, Any]]:
    assert ended.code == 0, ended.err
    return json.loads(ended.out)


def test_a_run_gives_its_own_numbers_again(project: Project) -> None:
    ended = cli(project.folder, "eval", "run_1", "--json")
    launched, again = at_target(project), rows_of(ended)
    assert len(launched) == 4
    compared = 0
    for row in again:
        if not row["slice"] and row["value"] is not None:
            assert row["value"] == launched[row["arm"], row["seed"]][row["metric"]]
            compared += 1
    assert compared >= 4 * 10
    measured = {row["metric"] for row in again}
    assert {"fvu", "l0", "loss_recovered", "sae_top_1_test_accuracy"} <= measured
    assert all(row["definition"] and row["hook_name"] and row["text_digest"] for row in again)
    assert {(r["format"], r["mismatch"], r["without_trace"]) for r in again} == {
        ("saelab", "", False)
    }


def test_codes_are_refined_on_request(project: Project, tmp_path: Path) -> None:
    cell = one_cell(project)
    options = ("eval", str(cell), "--evals", "core", "--json")
    plain = rows_of(cli(project.folder, *options))
    refined = rows_of(cli(project.folder, *options, "--leave-one-out", "0"))
    assert {row["leave_one_out"] for row in plain} == {None}
    assert {row["leave_one_out"] for row in refined} == {0.0}
    l0, fewer = (
        next(row["value"] for row in rows if row["metric"] == "l0" and not row["slice"])
        for rows in (plain, refined)
    )
    assert 0 < fewer < l0
    out = str(tmp_path / "saebench.json")
    ended = cli(project.folder, *options, "--leave-one-out", "0", "--saebench-json", out)
    assert ended.code == 2 and "leave out --saebench-json" in ended.err
    assert "Traceback" not in ended.err
    ended = cli(project.folder, *options, "--leave-one-out", "nan")
    assert ended.code == 2 and "use a finite number" in ended.err


def test_probing_rows_name_their_own_texts(project: Project) -> None:
    kept = pq.read_table(project.folder / "run_1" / "metrics.parquet").to_pylist()
    again = rows_of(cli(project.folder, "eval", "run_1", "--json", "--seed", str(kept[0]["seed"])))
    names = ("context", "tokens", "text", "text_digest", "mask")
    for rows in (kept, again):
        found = {
            probed: {
                tuple(row[name] for name in names)
                for row in rows
                if row["definition"].startswith("sparse_probing/") == probed
            }
            for probed in (True, False)
        }
        ((context, tokens, text, digest, _),), ((_, others, _, other, _),) = found.values()
        assert context == 32 and text == "probing entries"
        assert tokens != others and digest != other
    changed = ("--set", "evaluation.probing.context=16", "--seed", str(kept[0]["seed"]))
    rows = rows_of(cli(project.folder, "eval", "run_1", "--json", *changed))
    assert {row["context"] for row in rows if row["definition"] == "sparse_probing/2"} == {16}
    assert {row["context"] for row in rows if row["definition"] == "core/1"} == {32}


def test_export_and_eval_again(project: Project, tmp_path: Path) -> None:
    out = tmp_path / "new" / "saelens"
    ended = cli(project.folder, "export", "run_1", "--out", str(out))
    assert ended.code == 0, ended.err
    launched = at_target(project)
    places = {f"{arm}/seed{seed}-l0_16" for arm, seed in launched}
    assert {str(p.parent.relative_to(out)) for p in out.glob("*/*/cfg.json")} == places
    assert sorted(ended.out.split()) == sorted(str(out / place) for place in places)
    for arm, seed in launched:
        folder = out / arm / f"seed{seed}-l0_16"
        metadata = json.loads((folder / "cfg.json").read_text())["metadata"]
        assert metadata["hook_name"] == "blocks.2.hook_resid_post"
        assert metadata["dataset_path"] == "train.txt" and metadata["context_size"] == 32
        assert metadata["saelab"]["arm"] == arm and metadata["saelab"]["seed"] == seed
    file, values = tmp_path / "rows.parquet", launched[arm, seed]
    ended = cli(project.folder, "eval", str(folder), "--config", "run_1", "--out", str(file))
    assert ended.code == 0, ended.err
    for row in pq.read_table(file).to_pylist():
        assert row["format"] == "saelens" and row["subject"] == str(folder)
        if not row["slice"] and row["value"] is not None:
            assert row["value"] == pytest.approx(values[row["metric"]], abs=2e-2)
            if row["metric"] in ("fvu", "l0", "ce_spliced", "cosine"):
                assert row["value"] == pytest.approx(values[row["metric"]], rel=1e-5)
    shown = dict(line.split(maxsplit=1) for line in ended.out.splitlines())
    assert shown["position.fvu_late"].startswith("missing: ")
    assert float(shown["fvu"]) == pytest.approx(values["fvu"], abs=1e-4)


def test_a_choice_of_arms_and_seeds(project: Project, tmp_path: Path) -> None:
    seed = min(seed for _, seed in at_target(project))
    chosen = ("--arm", "scaled", "--seed", str(seed))
    assert cli(project.folder, "export", "run_1", "--out", str(tmp_path / "a"), *chosen).code == 0
    assert [p.name for p in (tmp_path / "a").iterdir()] == ["scaled"]
    rows = rows_of(cli(project.folder, "eval", "run_1", "--evals", "core", "--json", *chosen))
    assert {(row["arm"], row["seed"]) for row in rows} == {("scaled", seed)}
    told(cli(project.folder, "eval", "run_1", "--arm", "scale"), "did you mean 'scaled'")
    told(cli(project.folder, "export", "run_1", "--out", "b", "--seed", "1"), "seed = 1", str(seed))
    cell = str(one_cell(project))
    told(cli(project.folder, "eval", cell, "--arm", "scaled"), "not a run folder")


def test_one_cell_brings_its_settings(project: Project, tmp_path: Path) -> None:
    cell, out = one_cell(project), tmp_path / "one"
    assert cli(project.folder, "export", str(cell), "--out", str(out)).code == 0
    assert sorted(path.name for path in out.iterdir()) == ["cfg.json", "sae_weights.safetensors"]
    ended = cli(project.folder, "eval", str(cell), "--evals", "core")
    assert ended.code == 0, ended.err
    told(cli(project.folder, "eval", str(out)), "--config", "a run folder")


def test_other_tools_beside_ours(project: Project, tmp_path: Path) -> None:
    """The same weights in the layouts of the other tools have the same numbers."""
    cell, out = one_cell(project), tmp_path / "one"
    assert cli(project.folder, "export", str(cell), "--out", str(out)).code == 0
    own = load_file(out / "sae_weights.safetensors")
    encoder = {"encoder.weight": own["W_enc"].T.contiguous(), "encoder.bias": own["b_enc"]}
    sparsify, pickled = tmp_path / "layers.2", tmp_path / "pickled"
    sparsify.mkdir()
    pickled.mkdir()
    save_file(encoder | {n: own[n] for n in ("W_dec", "b_dec")}, sparsify / "sae.safetensors")
    (sparsify / "cfg.json").write_text(json.dumps({"k": 16, "d_in": own["W_enc"].shape[0]}))
    marks = {"k": torch.tensor(16), "threshold": torch.tensor(-1.0)}
    decoder = {"decoder.weight": own["W_dec"].T.contiguous(), "b_dec": own["b_dec"]}
    torch.save(encoder | decoder | marks, pickled / "ae.pt")
    trainer = {"dict_class": "AutoEncoderTopK", "k": 16}
    (pickled / "config.json").write_text(json.dumps({"trainer": trainer}))
    fvu = {}
    for folder, named in ((sparsify, ()), (pickled, ("--format", "dictionary_learning"))):
        options = ("--config", "run_1", "--evals", "core", "--json", *named)
        rows = rows_of(cli(project.folder, "eval", str(folder), *options))
        fvu[rows[0]["format"]] = next(r["value"] for r in rows if r["metric"] == "fvu")
    assert set(fvu) == {"sparsify", "dictionary_learning"}
    wanted = at_target(project)[("baseline", int(cell.name[4:].split("-")[0]))]["fvu"]
    assert list(fvu.values()) == pytest.approx([wanted, wanted], rel=1e-5)
    told(cli(project.folder, "eval", str(pickled), "--config", "run_1"), "--format dictionary")


def test_another_place_is_told_and_may_be_allowed(project: Project, tmp_path: Path) -> None:
    cell, out = one_cell(project), tmp_path / "one"
    assert cli(project.folder, "export", str(cell), "--out", str(out)).code == 0
    file = out / "cfg.json"
    config = json.loads(file.read_text())
    config["metadata"] |= {"model_name": "gpt2", "hook_name": "blocks.1.hook_resid_post"}
    file.write_text(json.dumps(config))
    options = ("eval", str(out), "--config", "run_1", "--evals", "core")
    words = ("gpt2", "embedded", "blocks.1.hook_resid_post", "blocks.2.hook_resid_post")
    told(cli(project.folder, *options), *words, "--allow-mismatch")
    rows = rows_of(cli(project.folder, *options, "--allow-mismatch", "--json"))
    assert all(word in row["mismatch"] for row in rows for word in words)


def test_an_evaluation_harvests_no_training_text(project: Project, tmp_path: Path) -> None:
    """And leaves a cache with which a launch goes on."""
    fresh = Project.make(tmp_path / "p", (BASELINE,), plan=PLAN, base=PROBED)
    cell = str(one_cell(project))
    ended = cli(fresh.folder, "eval", cell, "--config", CONFIG, "--evals", "core", "--json")
    fvu = next(row["value"] for row in rows_of(ended) if row["metric"] == "fvu")
    seed = int(Path(cell).name[4:].split("-")[0])
    assert fvu == at_target(project)["baseline", seed]["fvu"]
    complete = list((fresh.folder / ".saelab" / "activations").glob("*/*/header.json"))
    assert len(complete) == 1
    ended = fresh.call()
    assert ended.code == 0, ended.err
    assert at_target(fresh)["baseline", seed]["fvu"] == fvu


def test_another_width_is_told(project: Project, tmp_path: Path) -> None:
    acts = tmp_path / "acts"
    acts.mkdir()
    save_file({"x": torch.randn(4096, 8)}, acts / "x.safetensors")
    options = ("--config", CONFIG, "--set", f"activations={acts}", "--evals", "core")
    ended = cli(project.folder, "eval", str(one_cell(project)), *options)
    told(ended, "d_in = 192", "the activations have 8")


def test_activations_made_elsewhere_name_no_place(project: Project, tmp_path: Path) -> None:
    acts = tmp_path / "acts"
    acts.mkdir()
    save_file({"x": torch.randn(4096, 192)}, acts / "x.safetensors")
    options = ("--config", CONFIG, "--set", f"activations={acts}", "--evals", "core", "--json")
    rows = rows_of(cli(project.folder, "eval", str(one_cell(project)), *options))
    found = {row["metric"]: row for row in rows if not row["slice"]}
    assert found["fvu"]["value"] > 0 and found["fvu"]["mismatch"] == ""
    assert found["loss_recovered"]["value"] is None and found["loss_recovered"]["reason"]


BAD: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "no path": (("eval", "nowhere", "--config", CONFIG), ("nowhere does not exist",)),
    "a file": (("eval", "plan.toml", "--config", CONFIG), ("plan.toml is a file",)),
    "no SAE": (("eval", "configs", "--config", CONFIG), ("holds no sae.json",)),
    "no settings": (("eval", "configs"), ("--config", "TOML")),
    "unknown format": (("eval", "configs", "--config", CONFIG, "--format", "sae"), ("'sae'",)),
    "unknown file": (("eval", "run_1", "--out", "rows.csv"), ("rows.csv", ".parquet or .json")),
    "unknown evaluation": (("eval", "run_1", "--evals", "cor"), ("did you mean 'core'",)),
    "folder in use": (("export", "run_1", "--out", "configs"), ("configs", "not empty")),
    "export elsewhere": (("export", "run_1", "--out", "x", "--format", "st"), ("is not written",)),
    "no parts": (("eval", "run_1", "--experiment", "no.py"), ("no.py does not exist",)),
}


@pytest.mark.parametrize("case", list(BAD))
def test_bad_input_is_told(case: str, project: Project) -> None:
    arguments, words = BAD[case]
    told(cli(project.folder, *arguments), *words)
    assert not (project.folder / "x").exists()


def test_an_adapting_arm_is_refused_and_the_others_are_written(tmp_path: Path) -> None:
    project = Project.make(
        tmp_path / "p",
        (BASELINE, ADAPTING),
        plan=PLAN.replace("levels = [8]", "levels = []").replace("l0 = 16", "l0 = 'none'"),
        changes='{"layout": "contexts"}',
    )
    assert project.call().code == 0
    ended = cli(project.folder, "export", "run_1", "--out", "x")
    assert ended.code == 2 and "Traceback" not in ended.err
    for words in ("adapting/seed", "follows the context", "--without-trace"):
        assert words in ended.err
    assert [path.name for path in (project.folder / "x").iterdir()] == ["baseline"]
    shutil.rmtree(project.folder / "x")
    assert cli(project.folder, "export", "run_1", "--out", "x", "--without-trace").code == 0
    marks = {
        path.parent.parent.name: json.loads(path.read_text())["metadata"]["saelab"]
        for path in (project.folder / "x").glob("*/*/cfg.json")
    }
    assert marks["adapting"]["without_trace"] is True
    assert "without_trace" not in marks["baseline"]
    options = ("eval", "run_1", "--arm", "adapting", "--evals", "core", "--json")
    whole = rows_of(cli(project.folder, *options))
    still = rows_of(cli(project.folder, *options, "--without-trace"))
    assert {row["without_trace"] for row in whole} == {False}
    assert {row["without_trace"] for row in still} == {True}
    assert [row["value"] for row in whole] != [row["value"] for row in still]
