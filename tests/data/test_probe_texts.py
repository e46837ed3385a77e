"""Texts of sae-probes: training, held-out and probing texts share nothing."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import packages
import pyarrow as pa
import pytest
from pyarrow import csv

from saelab.data.text import probe_texts
from saelab.data.text.corpus import TextConfig, check_texts, documents, manifest
from saelab.errors import SettingError, SourceError

LONG = "a text that is long enough to be a document of its own " * 3
HELD_OUT = "94_ai_gen"
TRAIN, EVAL = (TextConfig(kind="sae_probes", split=split) for split in probe_texts.SPLITS)


def table(columns: Mapping[str, Sequence[object]]) -> bytes:
    plain, packed = pa.BufferOutputStream(), pa.BufferOutputStream()
    csv.write_csv(pa.table(dict(columns)), plain)
    with pa.CompressedOutputStream(packed, "zstd") as stream:
        stream.write(plain.getvalue())
    return packed.getvalue().to_pybytes()


@pytest.fixture
def texts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, list[str]]]:
    """An installed package with a training, a held-out, a short and a table of another kind."""
    sets = {
        "1_train": [f"{LONG} one", f"{LONG} both", f"{LONG} two\nlines", f"{LONG} one"],
        "2_train": [f"{LONG} three", f"{LONG}  one", f"{LONG} short"],
        HELD_OUT: [f"{LONG} four", f"{LONG}\n both"],
        "3_short": ["a word", "x", "y", f"{LONG} short", "z"],
        "4_numbers": [LONG],
    }
    kinds = ["Binary Classification"] * 4 + ["Continuous Data"]
    places = [f"cleaned_data/{name}.csv" for name in sets]
    files = {
        f"data/cleaned_data/{name}.csv.zst": table({"prompt": rows, "target": [0] * len(rows)})
        for name, rows in sets.items()
    }
    master = table({"Dataset save name": places, "Data type": kinds})
    files["data/probing_datasets_MASTER.csv.zst"] = master
    packages.install(tmp_path, "sae_probes", files, "0.4.2")
    monkeypatch.syspath_prepend(tmp_path)
    probe_texts._long_sets.cache_clear()
    yield sets
    probe_texts._long_sets.cache_clear()


def test_a_text_is_on_one_side_alone_and_never_in_a_short_data_set(
    texts: dict[str, list[str]],
) -> None:
    train = list(documents(TRAIN))
    assert sorted(train) == sorted([f"{LONG} one", f"{LONG} two\nlines", f"{LONG} three"])
    assert train == sorted(train, key=probe_texts.text_hash)  # of all data sets, mixed
    assert list(documents(EVAL)) == [f"{LONG} four"]


def test_the_manifest_names_every_file_and_the_rule(texts: dict[str, list[str]]) -> None:
    content = manifest(TRAIN)
    assert set(content["files"]) == {"1_train", "2_train", HELD_OUT, "3_short"}
    assert content != manifest(EVAL)
    assert content["rule"]["long"] == 100 and HELD_OUT in content["rule"]["held_out"]


def test_held_out_files_that_hold_a_training_text_are_refused_at_launch(
    texts: dict[str, list[str]], tmp_path: Path
) -> None:
    file = tmp_path / "held_out.jsonl"
    file.write_text("\n".join(json.dumps({"text": text}) for text in ("new", "other")))
    own = TextConfig(kind="files", path=str(file))
    check_texts(TRAIN, own)
    file.write_text("\n".join(json.dumps({"text": t}) for t in ("new", f"{LONG}   three", "x")))
    with pytest.raises(SettingError, match=r"eval_text = .*1 document of it are|is in the train"):
        check_texts(TRAIN, own)
    check_texts(EVAL, own)


def test_another_split_is_refused() -> None:
    with pytest.raises(SettingError, match=r"sae_probes has train, held_out"):
        list(documents(TextConfig(kind="sae_probes", split="test")))


def test_a_missing_package_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.path", [])
    with pytest.raises(SourceError, match="pip install --no-deps sae-probes==0.4.2 brings it"):
        probe_texts.data_sets()


def test_a_damaged_table_is_one_sentence(texts: dict[str, list[str]], tmp_path: Path) -> None:
    file = tmp_path / "sae_probes" / "data" / "cleaned_data" / "2_train.csv.zst"
    for content in (file.read_bytes()[:10], table({"other": ["x"]})):
        file.write_bytes(content)
        with pytest.raises(SourceError, match=r"2_train.csv.zst of package sae-probes can't be"):
            list(documents(TRAIN))


@pytest.mark.slow
def test_the_package_itself_has_66_long_and_47_short_data_sets() -> None:
    try:
        files = probe_texts.data_sets()
    except SourceError as error:
        pytest.skip(str(error))
    long = probe_texts._long_sets(tuple(files.items()))
    assert (len(long), len(files) - len(long)) == (66, 47)
    assert long >= probe_texts.HELD_OUT
    train, held_out = list(documents(TRAIN)), list(documents(EVAL))
    short = [text for name in files.keys() - long for text in probe_texts._prompts(files[name])]
    assert len(train) > 100_000 and len(held_out) > 10_000
    assert probe_texts.count_shared(train, held_out) == 0
    assert probe_texts.count_shared(short, [*train, *held_out]) == 0
