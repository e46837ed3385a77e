"""`saelab neuronpedia`: the files, held to the schema that Neuronpedia's tools read.

The schema is written down from public sources: the fields and types of NeuronpediaDashboardBatch,
...Feature and ...Activation in jbloomAus/SAEDashboard (sae_dashboard/neuronpedia/
neuronpedia_dashboard.py, read at commit 234ea321), and what the converters index without a default:
export_neuronpedia_dashboards there (neuronpedia_export.py, commit 3ea1249a), and
convert-saedashboard-to-neuronpedia-export.py of Neuronpedia's own neuronpedia-utils.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from projects import Project, cli

from saelab.analysis.latents import browse, chosen_cells
from saelab.runs.folder import RunFolder

NUMBER = (int, float)
BATCH = {"model_id": str, "layer": int, "sae_set": str, "sae_id_suffix": (str, type(None))}
FEATURE: dict[str, Any] = {
    "feature_index": int,
    "frac_nonzero": NUMBER,
    "n_prompts_total": int,
    "n_tokens_in_prompt": int,
    "dataset": str,
}
#: Lists, by the type of their entries.
LISTS: dict[str, Any] = {
    **{name: str for name in ("neg_str", "pos_str")},
    **{name: NUMBER for name in ("neg_values", "pos_values", "decoder_weights_dist")},
    "neuron_alignment_indices": int,
    **{f"neuron_alignment_{name}": NUMBER for name in ("values", "l1")},
    **{f"correlated_{kind}_indices": int for kind in ("neurons", "features")},
    **{
        f"correlated_{kind}_{name}": NUMBER
        for kind in ("neurons", "features")
        for name in ("l1", "pearson")
    },
    **{
        f"{kind}_hist_data_bar_{name}": NUMBER
        for kind in ("freq", "logits")
        for name in ("values", "heights")
    },
}
ACTIVATION: dict[str, Any] = {
    "bin_min": NUMBER,
    "bin_max": NUMBER,
    "bin_contains": NUMBER,
    "qualifying_token_index": int,
}
TOKENS: dict[str, Any] = {"tokens": str, "values": NUMBER}


def check_fields(data: dict[str, Any], fields: dict[str, Any], lists: dict[str, Any]) -> None:
    for name, kind in fields.items():
        assert isinstance(data[name], kind) and not isinstance(data[name], bool), name
    for name, kind in lists.items():
        assert isinstance(data[name], list), name
        assert all(isinstance(v, kind) and not isinstance(v, bool) for v in data[name]), name


def check_batch(batch: dict[str, Any]) -> None:
    """Raises where a file is not what the converters read."""
    check_fields(batch, BATCH, {})
    assert set(batch) == {*BATCH, "features"}
    for feature in batch["features"]:
        check_fields(feature, FEATURE, LISTS)
        assert set(feature) == {*FEATURE, *LISTS, "activations"}
        for side in ("pos", "neg"):
            assert len(feature[f"{side}_str"]) == len(feature[f"{side}_values"])
        for activation in feature["activations"]:
            check_fields(activation, ACTIVATION, TOKENS)
            assert set(activation) == {*ACTIVATION, *TOKENS}
            values = activation["values"]
            assert len(values) == len(activation["tokens"]) > 0
            peak = activation["qualifying_token_index"]
            assert values[peak] == max(values, key=abs)  # which the converter takes as maxValue


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Project:
    return Project.finished_baseline(tmp_path_factory.mktemp("neuronpedia") / "project")


@pytest.fixture(scope="module")
def cell(project: Project) -> str:
    return str(project.first_cell().relative_to(project.folder))


def batches(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(file.read_text()) for file in sorted(folder.glob("batch-*.json"))]


def test_files_follow_the_schema_and_say_what_the_report_says(
    project: Project, cell: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "dashboards"
    ended = cli(project.folder, "neuronpedia", cell, "--set-name", "res-tiny", "--out", str(out))
    assert ended.code == 0, ended.err
    assert "neuronpedia.org/embedded/2-res-tiny" in ended.out
    (batch,) = batches(out)
    check_batch(batch)
    assert (batch["model_id"], batch["layer"], batch["sae_set"]) == ("embedded", 2, "res-tiny")
    features = {feature["feature_index"]: feature for feature in batch["features"]}
    assert sorted(features) == list(range(64))
    monkeypatch.chdir(project.folder)  # texts are named relative to it
    run = RunFolder(project.folder / "run_1")
    (browsed,) = browse(chosen_cells([run], ["baseline"], 1), 8, 8, project.folder / ".saelab")
    compared = 0
    for latent in browsed.latents:
        feature = features[latent.index]
        assert feature["frac_nonzero"] == latent.density
        assert len(feature["activations"]) == len(latent.examples)
        assert latent.lens is not None
        assert feature["pos_values"] == pytest.approx([v for _, v in latent.lens.raised], rel=1e-5)
        assert feature["pos_str"] == [browsed.texts.token(t) for t, _ in latent.lens.raised]
        assert feature["neg_values"][0] < 0 < feature["pos_values"][0]
        for activation, example in zip(feature["activations"], latent.examples, strict=True):
            assert activation["values"] == pytest.approx(list(example.values), rel=1e-5)
            assert activation["bin_max"] == pytest.approx(latent.largest, rel=1e-5)
            assert (activation["bin_min"], activation["bin_contains"]) == (-1, -1)
            compared += 1
    assert compared > 8
    one = features[0]
    assert one["n_tokens_in_prompt"] == 32 and one["dataset"] == "held_out.txt"
    assert one["n_prompts_total"] == run.manifest["data"]["held_out"]["n_contexts"]
    assert len(one["neuron_alignment_indices"]) == 3
    assert all(one[name] == [] for name in LISTS if re.match("corr|freq|logits|decoder", name))


def test_some_latents_in_several_files(
    project: Project, cell: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("saelab.analysis.sharing.neuronpedia.PER_FILE", 5)
    options = ("--set-name", "x", "--latents", "8", "--examples", "2", "--model-id", "tiny")
    ended = cli(project.folder, "neuronpedia", cell, *options, "--out", str(tmp_path / "out"))
    assert ended.code == 0, ended.err
    several = batches(tmp_path / "out")
    assert [len(batch["features"]) for batch in several] == [5, 3]
    for batch in several:
        check_batch(batch)
        assert batch["model_id"] == "tiny"
        assert all(len(feature["activations"]) <= 2 for feature in batch["features"])


def test_refusals(project: Project, cell: str, tmp_path: Path) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes").write_text("mine")
    for words, options in (
        ("use letters", ("--set-name", "a/b", "--out", str(tmp_path / "x"))),
        ("use at least 1", ("--set-name", "a", "--latents", "0", "--out", str(tmp_path / "x"))),
        ("is not empty", ("--set-name", "a", "--out", str(tmp_path / "full"))),
    ):
        ended = cli(project.folder, "neuronpedia", cell, *options)
        assert ended.code == 2 and words in ended.last and "Traceback" not in ended.err
    assert sorted(file.name for file in tmp_path.iterdir()) == ["full"]


@pytest.mark.parametrize("name", [*FEATURE, *LISTS, "activations"])
def test_the_schema_sees_a_missing_field(name: str) -> None:
    feature: dict[str, Any] = {"activations": []}
    feature |= {key: [] for key in LISTS} | {"feature_index": 0, "frac_nonzero": 0.5}
    feature |= {"n_prompts_total": 1, "n_tokens_in_prompt": 2, "dataset": "pile"}
    batch = {"model_id": "m", "layer": 0, "sae_set": "s", "sae_id_suffix": None}
    check_batch(batch | {"features": [feature]})
    with pytest.raises((KeyError, AssertionError)):
        check_batch(batch | {"features": [{k: v for k, v in feature.items() if k != name}]})
