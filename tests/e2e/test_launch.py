"""`python experiment.py --out_dir=run_1` and plot.py on the embedded model, end to end."""

from __future__ import annotations

import json
import math
import re
import runpy
import shutil
import statistics
from pathlib import Path
from unittest.mock import patch

import pyarrow.parquet as pq
import pytest
from projects import BASE, BASELINE, RATE, ROOT, SCALED, TWO_SEEDS, Ended, Project, called, cli
from safetensors.torch import load_file

from saelab import checkpoint
from saelab.data.activations.store import FolderSource
from saelab.launch.controls import SUBJECTS
from saelab.report.figures import common

#: With the embedded probing entries, in small.
WITH_ENTRIES = BASE.replace('entries = "none"', "train_size = 30, test_size = 16")
#: Seeds, and with them cells, of each arm at the target L0 and at the further one.
SEEDS = {"baseline": (3, 1), "rate": (3, 1), "scaled": (2, 0)}
PROBED = tuple(f"sae_top_{k}_test_accuracy" for k in (1, 2, 5, 10, 20, 50))
TRIED = ("frozen decoder", "twin", *SUBJECTS)
CONTROLS = ("model channels", "frozen decoder", "twin", "planted effect", *SUBJECTS)
DEFINITIONS = (
    "planted/1",
    "last_logged/1",
    "last_logged_absolute/1",
    *("core/1", "core/random/1", "sparse_probing/2"),
    *("sensitivity/1", "consistency/1", "convergence/1"),
    *("positions/1", "truth/2", "absorption/1"),
    *("agreement/1", "decoder/1", "survival/1", "stability/1"),
)
FIRST = ("fvu", "l0", "loss_recovered", "dead_share", *PROBED[:1], PROBED[2], "sae_test_accuracy")
#: The same in nats, and its share of the way from the random code, which stand next to it.
NEXT = ("ce_rise", "loss_recovered_random")
CORE = ("fvu", "explained_variance", "l0", "loss_recovered", "cosine", "dead_share")
LOSSES = ("ce_clean", "ce_zero", "ce_spliced")
#: Pictures that are drawn of the launch; tests/report draws every one.
DRAWN = ("loss", "frontier", "probing", "density", "verdict")


class Launched:
    """One launch in processes of its own, looked at by many tests."""

    def __init__(self, project: Project, ended: Ended, drawn: Ended) -> None:
        self.project, self.ended, self.drawn = project, ended, drawn
        self.folder = project.folder / "run_1"


@pytest.fixture(scope="module")
def launched(tmp_path_factory: pytest.TempPathFactory) -> Launched:
    project = Project.make(tmp_path_factory.mktemp("launch") / "project", base=WITH_ENTRIES)
    shutil.copy(ROOT / "plot.py", project.folder)
    ended = project.launch(workers=2)
    assert ended.code == 0, ended.err
    with patch.object(common, "PICTURES", {name: common.PICTURES[name] for name in DRAWN}):
        drawn = called(
            project.folder,
            lambda: runpy.run_path(str(project.folder / "plot.py"), run_name="__main__"),
        )
    return Launched(project, ended, drawn)


def test_a_launch_prints_a_table_with_every_arm_and_no_traceback(launched: Launched) -> None:
    lines = launched.ended.out.splitlines()
    assert all(any(line.startswith(arm) for line in lines) for arm in SEEDS)
    assert "Traceback" not in launched.ended.err


def test_final_info_has_one_group_per_arm_and_nothing_beside_them(launched: Launched) -> None:
    info = launched.project.info()
    assert list(info) == list(SEEDS)
    assert all(set(group) == {"means", "stderrs", "final_info_dict"} for group in info.values())


def test_means_are_at_most_forty_numbers_strings_or_nulls(launched: Launched) -> None:
    for group in launched.project.info().values():
        assert len(group["means"]) <= 40
        assert all(v is None or isinstance(v, (int, float, str)) for v in group["means"].values())
        numbers = [v for v in group["means"].values() if isinstance(v, float)]
        assert all(map(math.isfinite, numbers))


def test_means_hold_metrics_verdict_gate_and_settings(launched: Launched) -> None:
    info = launched.project.info()
    settings = ("training_steps", "tokens", "final_loss", "layer", "dict_size", "learning_rate")
    for arm, group in info.items():
        assert {"gate", "sparsity_penalty", *settings, *FIRST} <= set(group["means"])
        of_seeds = {*CORE, *NEXT, *LOSSES, *PROBED, "sae_test_accuracy"}
        assert of_seeds <= set(group["final_info_dict"])
        assert set(NEXT) <= set(group["means"])
        verdict = [f"diff.fvu{end}" for end in ("", ".low", ".high")] + ["verdict.fvu"]
        assert (set(verdict) <= set(group["means"])) == (arm != "baseline")
    averaged = {metric for group in info.values() for metric in group["means"]}
    for group in info.values():
        shown = [metric in averaged for metric in group["final_info_dict"]]
        assert shown == sorted(shown, reverse=True)  # what there is no room for comes last
    of_scalars = {"convergence.beta", "sensitivity.beta", "sensitivity.tau"}
    assert of_scalars <= set(info["scaled"]["means"])
    assert all("position.fvu_early" in group["means"] for group in info.values())
    means = info["rate"]["means"]
    assert (means["training_steps"], means["tokens"], means["layer"]) == (64, 8_192, 2)
    assert (means["dict_size"], means["learning_rate"]) == (256, 2e-3)
    assert means["verdict.fvu"] in ("helps", "hurts", "equivalent", "cannot tell yet")


def test_means_and_errors_are_those_of_the_seeds(launched: Launched) -> None:
    for arm, group in launched.project.info().items():
        assert set(group["stderrs"]) == set(group["final_info_dict"])
        for metric, values in group["final_info_dict"].items():
            n = len(values)
            assert n == SEEDS[arm][0]
            mean = sum(values) / n
            sd = math.sqrt(sum((v - mean) ** 2 for v in values) / (n - 1))
            if metric in group["means"]:
                assert group["means"][metric] == pytest.approx(mean, abs=1e-12)
            if not metric.startswith("consistency.seeds"):  # pairs of seeds, by the jackknife
                assert group["stderrs"][metric] == pytest.approx(sd / math.sqrt(n), abs=1e-9)


def test_losses_in_nats_and_the_share_from_the_random_code_are_everywhere(
    launched: Launched,
) -> None:
    rows = pq.read_table(launched.folder / "metrics.parquet").to_pylist()
    values = {
        (row["arm"], row["seed"], row["level"], row["metric"]): row["value"]
        for row in rows
        if not row["slice"]
    }
    random = next(v for k, v in values.items() if k[0] == "control:untrained" and "_spl" in k[3])
    cells = {key[:3] for key in values if key[3] == "loss_recovered"}
    assert {cell[0] for cell in cells} == {*SEEDS, *(f"control:{name}" for name in TRIED)}
    for cell in cells:
        clean, spliced = values[*cell, "ce_clean"], values[*cell, "ce_spliced"]
        assert values[*cell, "ce_random"] == random
        assert values[*cell, "ce_rise"] == pytest.approx(spliced - clean, abs=1e-9)
        share = (random - spliced) / (random - clean)
        assert values[*cell, "loss_recovered_random"] == pytest.approx(share, abs=1e-9)
    shown = ("rise (nats)", "from random", f"with the random code (untrained) {random:.4g}")
    for text in (launched.ended.out, (launched.folder / "summary.md").read_text("utf-8")):
        assert all(part in text for part in shown)
    verdict = cli(launched.project.folder, "verdict", "run_1").out
    assert shown[2] in verdict and "from the random code" in verdict
    (judged,) = json.loads(cli(launched.project.folder, "verdict", "run_1", "--json").out)
    rises = {arm: of_arm["ce_rise"] for arm, of_arm in judged["losses"]["arms"].items()}
    assert rises == {
        arm: group["means"]["ce_rise"] for arm, group in launched.project.info().items()
    }
    page = launched.project.folder / "report.html"
    assert cli(launched.project.folder, "report", "run_1", "--out", str(page)).code == 0
    assert all(part in page.read_text("utf-8") for part in shown)


def test_saelab_eval_takes_the_random_code_of_the_run(launched: Launched, tmp_path: Path) -> None:
    cell = next((launched.folder / "cells" / "baseline").glob("seed*-l0_16"))
    ended = cli(launched.project.folder, "eval", str(cell), "--evals", "core", "--json")
    rows = {row["metric"]: row for row in json.loads(ended.out) if not row["slice"]}
    stored = launched.project.info()["baseline"]["final_info_dict"]["loss_recovered_random"]
    share = rows["loss_recovered_random"]["value"]
    assert any(share == pytest.approx(value, abs=1e-5) for value in stored)
    shorter = ("--set", "evaluation.loss_contexts=2")
    other = cli(launched.project.folder, "eval", str(cell), "--evals", "core", "--json", *shorter)
    (row,) = (r for r in json.loads(other.out) if r["metric"] == "loss_recovered_random")
    assert row["value"] is None and "with another model, text or hook" in row["reason"]


def test_the_difference_is_between_the_means_of_all_seeds(launched: Launched) -> None:
    info = launched.project.info()  # no slope is known: the further level lies on one side only
    mean = {arm: statistics.mean(info[arm]["final_info_dict"]["fvu"]) for arm in SEEDS}
    for arm in ("rate", "scaled"):
        expected = pytest.approx(mean[arm] - mean["baseline"], abs=1e-12)
        assert info[arm]["means"]["diff.fvu"] == expected


def test_every_number_in_metrics_has_definition_and_provenance(launched: Launched) -> None:
    table = pq.read_table(launched.folder / "metrics.parquet")
    rows = table.to_pylist()
    for row in rows:
        assert row["definition"] in DEFINITIONS
        assert (row["value"] is None) == bool(row["reason"])
        assert row["hook_name"] == "blocks.2.hook_resid_post"
        assert (row["model"], row["context"], row["dtype"]) == ("embedded", 32, "float32")
        assert row["tokens"] >= 2_000
        for name in ("model_digest", "text", "text_digest", "saelab"):
            assert row[name]
    arms = {row["arm"] for row in rows}
    assert arms == {*SEEDS, *(f"control:{name}" for name in CONTROLS)}


def test_metrics_and_final_info_agree(launched: Launched) -> None:
    rows = pq.read_table(launched.folder / "metrics.parquet").to_pylist()
    info = launched.project.info()
    for arm, (seeds, _) in SEEDS.items():
        for metric in (*CORE, *PROBED):
            found = {
                row["seed"]: row["value"]
                for row in rows
                if (row["arm"], row["metric"], row["slice"], row["level"]) == (arm, metric, "", 16)
            }
            assert len(found) == seeds
            assert [found[s] for s in sorted(found)] == info[arm]["final_info_dict"][metric]


def test_all_subjects_are_probed_on_the_same_entries(launched: Launched) -> None:
    rows = pq.read_table(launched.folder / "metrics.parquet").to_pylist()
    probed: dict[str, set[str]] = {}
    for row in rows:
        if row["metric"].endswith("top_5_test_accuracy"):
            probed.setdefault(row["arm"], set()).add(row["slice"])
    assert set(probed) >= {*SEEDS, "control:untrained", "control:frozen decoder"}
    assert len({frozenset(slices) for slices in probed.values()}) == 1


def test_curves_hold_every_cell_over_the_whole_run(launched: Launched) -> None:
    table = pq.read_table(launched.folder / "curves.parquet")
    assert table.schema.names == ["arm", "seed", "level", "step", "tokens", "name", "value"]
    rows = table.to_pylist()
    cells = {(row["arm"], row["seed"], row["level"]) for row in rows}
    assert len(cells) == sum(map(sum, SEEDS.values()))
    for cell in cells:
        loss = [
            row
            for row in rows
            if (row["arm"], row["seed"], row["level"]) == cell and row["name"] == "loss"
        ]
        assert (loss[-1]["step"], loss[-1]["tokens"]) == (64, 8_192)
        assert loss[-1]["value"] < loss[0]["value"]


def test_the_results_come_last_and_the_manifest_says_what_was_done(launched: Launched) -> None:
    files = {f.name: f.stat().st_mtime_ns for f in launched.folder.glob("*") if f.is_file()}
    last = [
        "manifest.json",
        "final_info.json",
        "metrics.jsonl",
    ]  # the last says that it is complete
    times = [files.pop(name) for name in last]
    assert times == sorted(times) and max(files.values()) <= times[0]  # of a tick some are equal
    said = launched.project.manifest()
    assert said["base"]["sae"]["d_sae"] == 256
    assert said["plan"]["study"] == "small"
    assert len(said["cells"]) == sum(map(sum, SEEDS.values()))
    assert said["arms"]["rate"]["changes"] == {"train.lr": 2e-3}
    assert {"saelab", "torch", "python", "package_digest", "package"} <= set(said["versions"])
    assert said["data"]["train"]["n_tokens"] >= 8_192


def test_the_summary_answers_the_question_in_words(launched: Launched) -> None:
    text = (launched.folder / "summary.md").read_text(encoding="utf-8")
    for heading in ("Question", "Verdict", "Why", "Gate", "What to try next"):
        assert f"**{heading}" in text
    assert "other models or texts" in text  # what the interval does not cover


def test_stored_saes_reproduce_their_stored_numbers(launched: Launched) -> None:
    """FVU computed here from the equation, on activations read from the cache."""
    found = launched.project.folder.glob(".saelab/activations/*/*")
    held_out = min(map(FolderSource.open, found), key=lambda s: s.header["n_tokens"])
    x, _ = held_out.shard(0).rows()
    rows = pq.read_table(launched.folder / "metrics.parquet").to_pylist()
    folders = sorted((launched.folder / "cells").glob("*/*"))
    assert len(folders) == sum(map(sum, SEEDS.values()))
    for folder in folders:
        sae, origin = checkpoint.load(folder)
        error = (x - sae.decode(sae.encode(x))).double().square().sum()
        fvu = float(error / (x - x.mean(0)).double().square().sum())
        stored = [
            row["value"]
            for row in rows
            if (row["arm"], row["seed"], row["level"]) == (folder.parent.name, *_cell_of(folder))
            and (row["metric"], row["slice"]) == ("fvu", "")
        ]
        assert stored == [pytest.approx(fvu, rel=1e-5)]
        assert origin["hook_name"] == "blocks.2.hook_resid_post"


def _cell_of(folder: Path) -> tuple[int, float]:
    seed, level = folder.name.split("-l0_")
    return int(seed.removeprefix("seed")), float(level)


def test_plot_draws_the_run(launched: Launched) -> None:
    assert launched.drawn.code == 0, launched.drawn.err
    pictures = sorted(f.name for f in launched.project.folder.glob("run_1_*.png"))
    assert set(pictures) == {f"run_1_{name}.png" for name in DRAWN}
    assert all((launched.project.folder / name).stat().st_size > 5_000 for name in pictures)


def test_a_complete_run_is_refused_and_left_alone(launched: Launched) -> None:
    before = (launched.folder / "final_info.json").read_bytes()
    ended = launched.project.call()
    assert ended.code == 2
    assert "run_1 = " not in ended.last and "complete run" in ended.last
    assert (launched.folder / "final_info.json").read_bytes() == before


def test_the_same_launch_from_an_empty_cache_gives_the_same_bits(
    launched: Launched, tmp_path: Path
) -> None:
    """Once in two worker processes, once in this one."""
    other = Project.make(tmp_path / "other", base=WITH_ENTRIES)
    ended = other.call()
    assert ended.code == 0, ended.err
    assert len(other.weights()) == sum(map(sum, SEEDS.values()))
    assert other.weights() == launched.project.weights()
    files = [p.folder / "run_1" / "final_info.json" for p in (other, launched.project)]
    assert files[0].read_bytes() == files[1].read_bytes()
    found = sorted(other.folder.glob(".saelab/pairs/*"))
    assert len(found) == sum(seeds * (seeds - 1) // 2 for seeds, _ in SEEDS.values())
    before, written = files[0].read_bytes(), [file.stat().st_mtime_ns for file in found]
    assert other.again().code == 0
    assert [file.stat().st_mtime_ns for file in found] == written  # none is compared twice
    assert files[0].read_bytes() == before


def test_cells_at_the_target_have_snapshots_latents_and_other_seeds(launched: Launched) -> None:
    cells = launched.project.manifest()["cells"]
    rows = pq.read_table(launched.folder / "metrics.parquet").to_pylist()
    for name, key in cells.items():
        folder = launched.project.folder / ".saelab" / "cells" / key
        at_target = name.endswith("L0 16")
        assert (folder / "snapshots.safetensors").is_file() == at_target
        assert (folder / "latents.parquet").is_file() == at_target
        if at_target:
            kept = load_file(folder / "snapshots.safetensors")
            assert kept["tokens"].tolist()[-1] == 8_192 and len(kept["tokens"]) == 10
            assert kept["decoder"].shape == (10, 256, 192)
            share = pq.read_table(folder / "latents.parquet").column("density").to_pylist()
            assert sum(share) == pytest.approx(16, rel=1e-6)  # TopK: that is its L0
    for arm, (seeds, further) in SEEDS.items():
        own = [row for row in rows if row["arm"] == arm and row["slice"] == ""]
        for metric in ("consistency.seeds", "consistency.seeds_signed", "consistency.chance"):
            found = [row["value"] for row in own if row["metric"] == metric]
            assert len(found) == seeds and all(0 < value < 1 for value in found)
        pairs = [row for row in rows if row["arm"] == arm and row["slice"].startswith("seed=")]
        assert len(pairs) == 2 * seeds * (seeds - 1)  # of each seed with each other, two metrics
        values = {
            (r["metric"], *sorted((r["seed"], int(r["slice"][5:])))): r["value"] for r in pairs
        }
        assert all(
            values[r["metric"], *sorted((r["seed"], int(r["slice"][5:])))]
            == pytest.approx(r["value"])
            for r in pairs
        )
        assert sum(row["metric"] == "decoder.max_cosine" for row in own) == seeds
        assert sum(row["metric"] == "fvu" for row in own) == seeds + further


# ---------------------------------------------------------------- one project, changed by its user


@pytest.fixture(scope="module")
def worked_on(tmp_path_factory: pytest.TempPathFactory) -> Project:
    project = Project.make(tmp_path_factory.mktemp("changed") / "project", (BASELINE, RATE))
    ended = project.call()
    assert ended.code == 0, ended.err
    return project


def test_an_added_arm_leaves_the_others_alone_and_trains_nothing_else(worked_on: Project) -> None:
    worked_on.table((BASELINE, RATE))
    before, ages = worked_on.weights(), _ages(worked_on)
    worked_on.table((SCALED, BASELINE, RATE))
    ended = worked_on.again()
    assert ended.code == 0, ended.err
    assert "2 cells to train (8 in the cache)" in ended.err
    assert {name: worked_on.weights()[name] for name in before} == before
    assert {name: age for name, age in _ages(worked_on).items() if name in ages} == ages
    assert list(worked_on.info()) == ["scaled", "baseline", "rate"]


def test_an_edited_arm_is_trained_again_and_no_other(worked_on: Project) -> None:
    worked_on.table((BASELINE, RATE))
    worked_on.again()
    before = worked_on.manifest()["cells"]
    worked_on.table((BASELINE, RATE.replace("2e-3", "3e-3")))
    ended = worked_on.again()
    assert "4 cells to train (4 in the cache)" in ended.err
    after = worked_on.manifest()["cells"]
    assert {name for name in before if before[name] != after[name]} == {
        name for name in before if name.startswith("rate/")
    }
    worked_on.table((BASELINE, RATE))
    assert "to train" not in worked_on.again().err
    assert worked_on.manifest()["cells"] == before


def test_a_renamed_arm_keeps_its_cells(worked_on: Project) -> None:
    worked_on.table((BASELINE, RATE.replace('"rate"', '"slower"')))
    ended = worked_on.again()
    assert "to train" not in ended.err
    rows = pq.read_table(worked_on.folder / "run_1" / "metrics.parquet").to_pylist()
    assert {"baseline", "slower"} <= {row["arm"] for row in rows}


def test_a_changed_text_trains_every_cell_again(worked_on: Project, tmp_path: Path) -> None:
    project = worked_on.copied(tmp_path / "p")
    project.table((BASELINE, RATE))
    project.again()
    before = project.manifest()["cells"]
    text = (project.folder / "train.txt").read_text(encoding="utf-8")
    project.write("train.txt", text[2_000:])
    assert "8 cells to train (0 in the cache)" in project.again().err
    assert not set(before.values()) & set(project.manifest()["cells"].values())


def test_force_replaces_a_complete_run_and_leaves_nothing_of_it(
    worked_on: Project, tmp_path: Path
) -> None:
    project = worked_on.copied(tmp_path / "p")
    project.table((BASELINE, SCALED))
    assert cli(project.folder, "run", "run_1").code == 2
    ended = cli(project.folder, "run", "run_1", "--force")
    assert ended.code == 0, ended.err
    assert set(project.info()) == {"baseline", "scaled"}
    assert {name.split("/")[0] for name in project.weights()} == {"baseline", "scaled"}


def test_a_baseline_with_a_learned_sparsity_reaches_its_target(tmp_path: Path) -> None:
    """The embedded default in small, with its text and controller: 512 steps of 32 rows."""
    sae = """\
activation = { kind = "relu" }
losses = [{ kind = "reconstruction" }, { kind = "l1" }]
controllers = [{ kind = "l0_target", target = 16 }]
constraints = []
"""
    start, end = BASE.index("activation ="), BASE.index("[train]")
    base = BASE[:start] + sae + BASE[end:].replace("8_192", "16_384").replace("128", "32")
    base = re.sub(r"\[(train|eval)_text\]\n(.+\n)+\n", "", base)
    project = Project.make(tmp_path / "p", (BASELINE,), plan=TWO_SEEDS, base=base)
    ended = project.call()
    assert ended.code == 0, ended.err
    assert project.info()["baseline"]["means"]["l0"] == pytest.approx(16, rel=0.25)


def _ages(project: Project) -> dict[str, int]:
    return {file.parent.name: file.stat().st_mtime_ns for file in project.finished_cells()}
