"""SAEBench's entries, its definition of sparse probing, and its result files."""

from __future__ import annotations

import functools
import os
import random
import subprocess
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from typer.testing import CliRunner

from saelab.analysis.saebench import comparison_lines, result_at
from saelab.cli import app
from saelab.config import read_toml
from saelab.data.probing import saebench as entries
from saelab.data.probing.activations import ProbingData, ProbingEntry
from saelab.data.probing.saebench import (
    ENTRY_NAMES,
    SAEBENCH_RECIPES,
    SourceConfig,
    load_entry,
    saebench_entries,
)
from saelab.errors import MismatchError, SettingError, SourceError
from saelab.evals.base import Row, check_one_definition
from saelab.evals.core import CoreData
from saelab.evals.measure import EvalData, probing_rows
from saelab.evals.probing import DEFINITION as OURS
from saelab.evals.probing import evaluate_probing
from saelab.evals.probing.saebench import DEFINITION, draw_examples, evaluate_as_saebench
from saelab.evals.saebench import (
    About,
    build_result,
    check_result,
    definition_of,
    read_result,
    rows_of,
    write_result,
)
from saelab.seeding import torch_stream
from saelab.study.plan import BaseConfig
from saelab.verdict.judge import Cells, compare_secondary
from saelab.verdict.l0_adjustment import Matched

ROOT = Path(__file__).parents[2]
#: The python of the environment that `make peers` makes, or another one.
PEERS = Path(os.environ.get("SAELAB_PEERS", ROOT / "benchmarks" / ".peers" / "bin" / "python"))
AG_NEWS, EUROPARL = "fancyzhx/ag_news", "Helsinki-NLP/europarl"
AMAZON = "canrager/amazon_reviews_mcauley_1and5"


def recipe(name: str) -> entries.SaebenchRecipe:
    return next(recipe for recipe in SAEBENCH_RECIPES if recipe.name == name)


def table(folder: Path, side: str, rows: list[dict[str, Any]]) -> Path:
    folder.mkdir(exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows), folder / f"{side}.parquet")
    return folder


def news(folder: Path, n: int = 30) -> SourceConfig:
    for side in ("train", "test"):
        rows = [{"text": f"{side} {c} {i}", "label": c} for c in range(4) for i in range(n)]
        table(folder, side, rows)
    return SourceConfig(path=str(folder))


# ---------------------------------------------------------------- the entries


def test_the_table_is_saebenchs() -> None:
    assert len(ENTRY_NAMES) == 8 and sum(len(r.classes) for r in SAEBENCH_RECIPES) == 36
    assert recipe("codeparrot/github-code").longer_than == (128 + 50) * 3


def test_definition_1_draws_as_pandas_does(tmp_path: Path) -> None:
    pandas = pytest.importorskip("pandas")
    entry = load_entry(recipe(AG_NEWS), news(tmp_path), 12, 5, 1)
    for c in entry.classes:
        rows = pandas.Series([f"train {c} {i}" for i in range(30)])
        assert list(entry.train[c]) == rows.sample(n=12, random_state=42).tolist()
    assert entry.classes == ("0", "1", "2", "3") and all(len(t) == 5 for t in entry.test.values())


def test_definition_1_shuffles_one_split_class_after_class(tmp_path: Path) -> None:
    texts = {lang: [f"{lang} {i}" for i in range(20)] for lang in recipe(EUROPARL).classes}
    rows = [{"text": t, "lang": lang} for lang, some in texts.items() for t in some]
    source = SourceConfig(
        path=str(table(tmp_path, "train", rows)), text_column="text", label_column="lang"
    )
    entry = load_entry(recipe(EUROPARL), source, 10, 4, 1)
    order = random.Random(42)
    for lang in entry.classes:
        first = texts[lang][:15]  # one more than are needed
        order.shuffle(first)
        assert list(entry.train[lang]) == first[:10] and list(entry.test[lang]) == first[10:14]
    ours = load_entry(recipe(EUROPARL), source, 10, 4, 2)
    assert ours.train != entry.train
    assert all(not set(ours.train[c]) & set(ours.test[c]) for c in ours.classes)


@pytest.mark.parametrize("definition", [1, 2])
def test_classes_are_halved_by_the_second_column(tmp_path: Path, definition: Any) -> None:
    rows = [
        {"text": f"{side} {c} {r} {i}", "category": c, "rating": r}
        for side in ("train", "test")
        for c in (6, 24)
        for r in (1.0, 5.0)
        for i in range(9 if r == 1.0 else 20)
    ]
    for side in ("train", "test"):
        table(tmp_path, side, [row for row in rows if row["text"].startswith(side)])
    source = SourceConfig(path=str(tmp_path), classes=("6", "24"), train_size=8)
    entry = load_entry(recipe(AMAZON), source, 2000, 6, definition)
    for texts, n in [(t, 4) for t in entry.train.values()] + [(t, 3) for t in entry.test.values()]:
        assert Counter(t.split()[2] for t in texts) == {"1.0": n, "5.0": n}
    with pytest.raises(SourceError, match=r"class '6' has 9 train texts where 10"):
        load_entry(recipe(AMAZON), source.patched({"train_size": 20}), 0, 6, definition)


def test_definition_2_keeps_no_story_that_is_on_both_sides(tmp_path: Path) -> None:
    source = news(tmp_path)
    story = "told at such length that its last eighty characters are enough to know it again, twice"
    rows = pq.read_table(tmp_path / "train.parquet").to_pylist()
    table(tmp_path, "train", [*rows, {"text": story, "label": 0}])
    rows = pq.read_table(tmp_path / "test.parquet").to_pylist()
    table(tmp_path, "test", [*rows, {"text": f"Title. {story}", "label": 0}])
    entry = load_entry(recipe(AG_NEWS), source, 30, 30, 2)
    assert not any(story in t for side in (entry.train, entry.test) for t in side["0"])


def test_a_class_that_is_hardly_short_is_told(tmp_path: Path) -> None:
    entry = load_entry(recipe(AG_NEWS), news(tmp_path, 99), 100, 50, 2)
    assert len(entry.train["2"]) == 99 and "2 train 99 of 100" in entry.source
    with pytest.raises(SourceError, match="has 99 train texts where 110"):
        load_entry(recipe(AG_NEWS), news(tmp_path, 99), 110, 50, 2)


def test_what_cannot_be_had_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    asked: list[str] = []

    def refuse(path: str, *args: object, **options: object) -> None:
        asked.append(path)
        raise ConnectionError(f"Couldn't reach {path!r} on the Hub")

    monkeypatch.setattr(datasets, "load_dataset", refuse)
    sources = {AG_NEWS: news(tmp_path / "news"), AMAZON: news(tmp_path / "other")}
    found, why = saebench_entries(sources, 12, 5)
    assert [entry.name for entry in found] == [AG_NEWS]
    assert asked == ["LabHC/bias_in_bios"]  # one look at a hub that can't be reached is enough
    assert "has no column 'category'" in why[AMAZON]
    assert len(why) == 7 and why[ENTRY_NAMES[2]] == entries.UNREACHABLE
    assert entries.describe_missing(why).count("the hub can't be reached") == 1
    with pytest.raises(SettingError, match="did you mean 'fancyzhx/ag_news'"):
        saebench_entries({"fancyzhx/agnews": SourceConfig()})


def test_hub_rows_are_read_like_local_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    def load(path: str, name: str, split: str, streaming: bool) -> Any:
        rows = [{"translation": dict.fromkeys(name.split("-"), f"{name} {i}")} for i in range(30)]
        return datasets.Dataset.from_list(rows).to_iterable_dataset()

    monkeypatch.setattr(datasets, "load_dataset", load)
    monkeypatch.setattr("saelab.data.text.corpus.SAFE_BUILDERS", ("None", "generator", ""))
    entry = load_entry(recipe(EUROPARL), SourceConfig(), 10, 4, 1)
    assert all(text.startswith("fr-it ") for text in entry.train["fr"])
    assert {len(texts) for texts in entry.train.values()} == {10}


def test_the_shipped_config_names_entries_and_columns(real_data: Path) -> None:
    config = BaseConfig.parse(read_toml(ROOT / "configs" / "saebench.toml")).evaluation.probing
    assert set(config.sources) <= set(ENTRY_NAMES) and config.entries == "saebench"
    changed = f"sources.{AG_NEWS}.path"
    assert config.patched({changed: "x"}).sources[AG_NEWS].path == "x"
    source = config.sources[AG_NEWS].patched({"path": str(real_data / "texts" / "ag_news")})
    for definition in (1, 2):
        entry = load_entry(recipe(AG_NEWS), source, 2000, 500, definition)
        assert {len(t) for t in entry.train.values()} == {2000}
        assert {len(t) for t in entry.test.values()} == {500}


@pytest.mark.slow
def test_the_local_tables_fill_their_entries(real_data: Path) -> None:
    config = BaseConfig.parse(read_toml(ROOT / "configs" / "saebench.toml")).evaluation.probing
    for name, source in config.sources.items():
        own = source.patched({"path": str(real_data / "texts" / Path(str(source.path)).name)})
        entry = load_entry(recipe(name), own, config.train_size, config.test_size, 2)
        for c in entry.classes:
            assert len(entry.train[c]) >= 0.98 * (source.train_size or 2000)
            assert len(entry.test[c]) >= 0.98 * (source.test_size or 500)
            assert not set(entry.train[c]) & set(entry.test[c])


# ---------------------------------------------------------------- definition 1


def planted(n_train: int = 60, n_test: int = 30, d: int = 12, strength: float = 1.0) -> ProbingData:
    """Two entries of three classes; class c adds `strength` to channel c."""
    made = []
    for name in ("a/one", "b/two"):
        labels = torch.arange(3).repeat_interleave(n_train + n_test)
        is_train = (torch.arange(n_train + n_test) < n_train).repeat(3)
        rows = 0.1 * torch.randn(len(labels), d, generator=torch_stream(0, "test", name))
        rows[torch.arange(len(rows)), labels] += strength
        offsets = torch.arange(len(labels) + 1)
        made.append(
            ProbingEntry(
                name=name,
                classes=("x", "y", "z"),
                rows=rows,
                offsets=offsets,
                labels=labels,
                is_train=is_train,
            )
        )
    return ProbingData(tuple(made), {"hook_name": "here"})


class Linear:
    """A subject whose code is relu(x W)."""

    def __init__(self, weight: torch.Tensor) -> None:
        self.weight = weight
        self.d_in, self.d_sae = weight.shape

    def encode(self, x: torch.Tensor) -> torch.Tensor:
        return (x @ self.weight).relu()

    def decode(self, f: torch.Tensor) -> torch.Tensor:
        return f


SUBJECT = Linear(torch.eye(12))


def test_examples_are_all_positives_and_as_many_spread_negatives() -> None:
    entry = planted().entries[0]
    generator = torch.Generator().manual_seed(42)
    before = torch.random.get_rng_state()
    some = draw_examples(entry, 1, True, generator)
    assert not isinstance(some, str)
    labels = entry.labels[some.index]
    assert Counter(labels.tolist()) == {0: 30, 1: 60, 2: 30}
    assert torch.equal(some.positive, labels == 1) and entry.is_train[some.index].all()
    again = draw_examples(entry, 1, True, generator)
    assert not isinstance(again, str) and not torch.equal(some.index, again.index)  # drawn anew
    assert torch.equal(torch.random.get_rng_state(), before)


def test_examples_follow_the_order_of_saebenchs_draws() -> None:
    """One permutation of each other class, one of those kept, one of all of them."""
    entry = planted().entries[0]
    some = draw_examples(entry, 0, False, torch.Generator().manual_seed(42))
    assert not isinstance(some, str)
    generator = torch.Generator().manual_seed(42)
    pools = [((entry.labels == c) & ~entry.is_train).nonzero()[:, 0] for c in (1, 2)]
    kept = torch.cat([pool[torch.randperm(30, generator=generator)[:15]] for pool in pools])
    kept = kept[torch.randperm(30, generator=generator)[:30]]
    own = ((entry.labels == 0) & ~entry.is_train).nonzero()[:, 0]
    order = torch.randperm(60, generator=generator)
    assert torch.equal(some.index, torch.cat([own, kept])[order])


def test_definition_1_finds_what_was_planted_and_repeats_itself() -> None:
    rows = evaluate_as_saebench(SUBJECT, planted(), k_values=(1, 5))
    assert {row.definition for row in rows} == {DEFINITION}
    overall = {row.metric: row.value for row in rows if not row.slice}
    assert overall["sae_top_5_test_accuracy"] > 0.98  # type: ignore[operator]
    assert overall["sae_test_accuracy"] > 0.85  # type: ignore[operator]  # few batches an epoch
    assert evaluate_as_saebench(SUBJECT, planted(), k_values=(1, 5)) == rows
    slices = {row.slice for row in rows}
    assert {"", "entry=a/one", "entry=b/two,class=z"} <= slices


def test_the_full_probe_is_the_best_epoch_on_test() -> None:
    """On pure noise the best of many looks at the test set is above chance: the leak."""
    rows = evaluate_as_saebench(SUBJECT, planted(strength=0.0), k_values=())
    values = [row.value for row in rows if ",class=" in row.slice]
    assert np.mean(values) > 0.52  # type: ignore[arg-type]
    ours = evaluate_probing(SUBJECT, planted(strength=0.0), 0, k_values=())
    fair = [r.value for r in ours if ",class=" in r.slice and r.metric == "sae_test_accuracy"]
    assert np.mean(fair) < np.mean(values)  # type: ignore[arg-type]


def test_definition_1_tells_what_it_cannot_measure() -> None:
    rows = evaluate_as_saebench(Linear(torch.zeros(12, 4)), planted(), k_values=(2, 5))
    overall = {row.metric: row for row in rows if not row.slice}
    assert overall["sae_top_2_test_accuracy"].value == 0.5
    assert "fewer than k = 5" in overall["sae_top_5_test_accuracy"].reason
    assert all(row.value == 1.0 for row in rows if row.metric == "probing_constant")
    with pytest.raises(SettingError, match="k_values = 0"):
        evaluate_as_saebench(SUBJECT, planted(), k_values=(0,))


def test_the_definition_is_chosen_by_the_data() -> None:
    for definition, name in ((1, DEFINITION), (2, OURS)):
        core: CoreData = None  # type: ignore[assignment]
        data = EvalData(core, None, why_no_probing="not now", definition=definition)  # type: ignore[arg-type]
        assert {row.definition for row in probing_rows(SUBJECT, data)} == {name}


# ---------------------------------------------------------------- definition 2


def test_means_over_entries_have_an_interval() -> None:
    rows = evaluate_probing(SUBJECT, planted(strength=0.15), 0, (1, 5))
    value = {row.metric: row.value for row in rows if not row.slice}
    name = "sae_top_1_test_accuracy"
    assert value[f"{name}.low"] < value[name] < value[f"{name}.high"]  # type: ignore[operator]
    assert "sae_standardised_top_5_test_accuracy" in value
    one = ProbingData(planted().entries[:1], {})
    assert not any(r.metric.endswith(".low") for r in evaluate_probing(SUBJECT, one, 0, (1,)))


# ---------------------------------------------------------------- definitions do not mix


def test_numbers_of_different_definitions_are_not_compared() -> None:
    name = "sae_top_5_test_accuracy"
    with pytest.raises(MismatchError, match=f"{name} of b .*{DEFINITION}.*, a as .*{OURS}"):
        check_one_definition(name, {"a": OURS, "b": DEFINITION})
    ours, theirs = (
        Cells(matched=Matched(values={0: 0.5, 1: 0.6}), definition=definition)
        for definition in (OURS, DEFINITION)
    )
    with pytest.raises(MismatchError):
        compare_secondary(name, ours, {"b": theirs})


# ---------------------------------------------------------------- result files


ABOUT = About(
    model_name="a-model",
    dtype="float32",
    sae={"d_in": 12, "d_sae": 12, "hook_name": "blocks.2.hook_resid_post"},
    release="release",
    sae_id="mine",
    train_size=60,
    test_size=30,
    context=128,
    k_values=(1, 5),
    seed=42,
    millis=1_700_000_000_000,
    version="0",
)


@functools.cache
def measured(definition: int = 1) -> tuple[Row, ...]:
    data, absent = (
        planted(),
        Row("sae_test_accuracy", None, "", slice="entry=c/gone", reason="not there"),
    )
    if definition == 1:
        rows = evaluate_as_saebench(SUBJECT, data, k_values=(1, 5))
        rows += evaluate_as_saebench(None, data, k_values=(1, 5), prefix="llm")
    else:
        rows = evaluate_probing(SUBJECT, data, 0, (1, 5))
        rows += evaluate_probing(None, data, 0, (1, 5), "llm")
    return (*rows, replace(absent, definition=rows[0].definition))


@pytest.mark.parametrize("definition", [1, 2])
def test_rows_come_back_from_a_result(tmp_path: Path, definition: int) -> None:
    rows, file = measured(definition), tmp_path / "result.json"
    write_result(file, rows, ABOUT)
    result = read_result(file)
    assert definition_of(result) == rows[0].definition
    assert result["eval_result_metrics"]["sae"]["sae_top_100_test_accuracy"] is None
    names = [detail["dataset_name"] for detail in result["eval_result_details"]]
    assert names == ["a/one_results", "b/two_results"]
    back = {(row.metric, row.slice): row for row in rows_of(result)}
    for row in rows:
        named = row.metric.endswith("test_accuracy") and "standardised" not in row.metric
        if named and row.value is not None and not row.slice.startswith("position"):
            assert back[row.metric, row.slice].value == row.value
    assert back["sae_test_accuracy", "entry=c/gone"].reason == "not there"
    assert back["sae_top_50_test_accuracy", ""].reason == "not run"
    assert result == {**build_result(rows, ABOUT)}


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda r: r.pop("eval_id"), "lacks 'eval_id'"),
        (lambda r: r.update(datetime_epoch_millis="now"), "datetime_epoch_millis = 'now'"),
        (lambda r: r["eval_config"].pop("k_values"), "eval_config lacks 'k_values'"),
        (lambda r: r["eval_config"].update(random_seed=True), "random_seed = True"),
        (lambda r: r["eval_result_metrics"]["llm"].clear(), "lacks 'llm_test_accuracy'"),
        (
            lambda r: r["eval_result_details"][1].update(sae_top_5_test_accuracy="high"),
            r"eval_result_details.1: sae_top_5_test_accuracy = 'high'",
        ),
    ],
)
def test_the_schema_names_what_is_wrong(change: Any, told: str) -> None:
    result = build_result(measured(), ABOUT)
    check_result(result, "it")
    change(result)
    with pytest.raises(SourceError, match=told):
        check_result(result, "it")


def test_a_result_needs_the_models_channels_and_one_definition() -> None:
    rows = [row for row in measured() if row.metric.startswith("sae")]
    with pytest.raises(SourceError, match="model_channels"):
        build_result(rows, ABOUT)
    with pytest.raises(SourceError, match="one definition"):
        build_result([*measured(1), *measured(2)], ABOUT)


@pytest.mark.peers
@pytest.mark.skipif(not PEERS.is_file(), reason=f"no peers' environment ({PEERS}): make peers")
def test_saebench_itself_reads_what_is_written(tmp_path: Path) -> None:
    write_result(tmp_path / "result.json", measured(), ABOUT)
    code = (
        "import sys; from pydantic import TypeAdapter;"
        "from sae_bench.evals.sparse_probing.eval_output import SparseProbingEvalOutput as Output;"
        "found = TypeAdapter(Output).validate_json(open(sys.argv[1]).read());"
        "print(found.eval_result_metrics.sae.sae_top_5_test_accuracy)"
    )
    command = [str(PEERS), "-c", code, str(tmp_path / "result.json")]
    environment = {name: v for name, v in os.environ.items() if name != "PYTHONPATH"}
    ended = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert ended.returncode == 0, ended.stderr[-500:]
    ours = next(
        r.value for r in measured() if r.metric == "sae_top_5_test_accuracy" and not r.slice
    )
    assert float(ended.stdout) == ours


def test_the_recorded_baseline_is_named_for_what_it_is(real_data: Path, tmp_path: Path) -> None:
    file = real_data / "baseline_gemma2_2b_layer19.json"
    ended = CliRunner().invoke(app, ["saebench", str(file)])
    assert ended.exit_code == 0 and "An untrained SAE: all its accuracies" in ended.output
    assert "gemma-2-2b" in ended.output and "0.9393" in ended.output
    write_result(tmp_path / "one.json", measured(1), ABOUT)
    write_result(tmp_path / "two.json", measured(2), ABOUT)
    invalid = "\n".join(comparison_lines(file, result_at(tmp_path / "one.json")))
    assert "No differences: the file's SAE is invalid" in invalid
    same = "\n".join(comparison_lines(tmp_path / "one.json", result_at(tmp_path / "one.json")))
    assert "difference" in same.split("mean over entries")[1].splitlines()[0]
    assert "+0.0000" in same and "SAEs in the same place" in same
    other = "\n".join(comparison_lines(tmp_path / "one.json", result_at(tmp_path / "two.json")))
    assert "No differences: sparse probing of ours is measured as" in other
    assert "difference" not in other.split("mean over entries")[1].splitlines()[0]
