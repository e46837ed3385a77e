"""What the files of strangers must not do: run code, write elsewhere, take memory, deceive."""

from __future__ import annotations

import json
import os
import pickle
import resource
import shutil
import struct
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from run_folders import write_run
from safetensors.torch import save_file

from saelab import checkpoint, formats
from saelab.analysis.export import export
from saelab.assets import EMBEDDED_MODEL
from saelab.config import digest
from saelab.data import language_model
from saelab.data.activations.foreign import ForeignSource
from saelab.data.language_model import ModelConfig
from saelab.errors import DamageError, SaelabError, SettingError, SourceError
from saelab.progress.journal import Tail
from saelab.report.figures.common import draw_run
from saelab.report.figures.style import legend_name
from saelab.report.run_data import load
from saelab.runs.folder import run_cells
from saelab.runtime.safe_text import markdown, visible
from saelab.sae import SAEConfig
from saelab.storage.atomic import read_json, read_lines, write_json, write_sealed
from saelab.storage.parquet import read_rows
from saelab.study.plan import Arm, BaseConfig, PlanConfig, Run, cells

HOSTILE_NAMES = ("../out", "/tmp/out", "a/b", "..", ".", "", ".hidden", "a\\b", "a\x00b", "\x1b[2J")
HOSTILE_NAMES += ("x" * 300, "a\nb", "\u202eexe.", "control:fake")


def taken() -> int:
    """Most memory that this process has had, in bytes."""
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def sae_in(folder: Path) -> Path:
    sae = SAEConfig.parse({"d_sae": 12}).build(5)
    sae.initialise(torch.randn(40, 5, generator=torch.Generator().manual_seed(0)), 0)
    checkpoint.save(sae, folder, {})
    return folder


# ---------------------------------------------------------------- no code


class Canary:
    """Leaves a file where it is unpickled."""

    def __init__(self, place: Path) -> None:
        self.place = place

    def __reduce__(self) -> Any:
        return os.system, (f"touch '{self.place}'",)


def test_pickles_run_nothing(tmp_path: Path) -> None:
    canary = tmp_path / "canary"
    (tmp_path / "sae").mkdir()
    write_json(tmp_path / "sae" / "config.json", {"trainer": {"dict_class": "AutoEncoder"}})
    for made in (pickle.dumps(Canary(canary)), None):
        file = tmp_path / "sae" / "ae.pt"
        if made is not None:
            file.write_bytes(made)
        else:
            torch.save({"bias": Canary(canary)}, file)
        with pytest.raises(SourceError, match="only tensors are unpickled"):
            formats.load(tmp_path / "sae", "dictionary_learning")
        assert not canary.exists()
    pickle.loads(pickle.dumps(Canary(canary)))
    assert canary.exists()  # the canary itself works


def model_in(folder: Path) -> Path:
    shutil.copytree(EMBEDDED_MODEL, folder)
    return folder


def test_a_model_with_its_own_code_or_pickled_weights_is_refused(tmp_path: Path) -> None:
    folder, canary = model_in(tmp_path / "model"), tmp_path / "canary"
    (folder / "own.py").write_text(f"open({str(canary)!r}, 'w')\nclass C: ...\n")
    config = read_json(folder / "config.json")
    own = {"auto_map": {name: "own.C" for name in ("AutoConfig", "AutoModelForCausalLM")}}
    write_json(folder / "config.json", config | own | {"model_type": "its_own"})
    with pytest.raises(SourceError, match="can't be loaded"):
        language_model.load(ModelConfig(path=str(folder)))
    write_json(folder / "config.json", config | own)  # a known type: its own class is taken
    language_model.load(ModelConfig(path=str(folder)))
    weights = folder / "model.safetensors"
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Canary(canary)))
    weights.unlink()
    with pytest.raises(SourceError, match="can't be loaded"):
        language_model.load(ModelConfig(path=str(folder)))
    assert not canary.exists()


LIES: dict[str, dict[str, Any]] = {
    "wide": {"hidden_size": 2**20, "num_attention_heads": 4},
    "huge vocabulary": {"vocab_size": 2**33},
    "endless": {"num_hidden_layers": 10**9},
    "no layers": {"num_hidden_layers": -1},
    "wrong type": {"hidden_size": "large"},
    "no number": {"num_attention_heads": None},
    "nothing it knows": {"model_type": 7},
    "deep": {"rope_scaling": {"a": {"b": [1, 2, {"c": 10**30}]}}, "num_hidden_layers": [4]},
}


@pytest.mark.parametrize("lie", LIES)
def test_a_model_whose_config_lies_is_one_sentence(tmp_path: Path, lie: str) -> None:
    folder = model_in(tmp_path / "model")
    config = read_json(folder / "config.json")
    (folder / "config.json").write_text(json.dumps(config | LIES[lie]))
    before = taken()
    with pytest.raises(SaelabError):
        language_model.load(ModelConfig(path=str(folder)))
    assert taken() - before < 10**9


# ---------------------------------------------------------------- nothing outside


@pytest.mark.parametrize("name", HOSTILE_NAMES)
def test_no_arm_leaves_the_run_folder(name: str) -> None:
    run = Run("r", [Arm("baseline"), Arm(name, {"train.lr": 1e-3})])
    with pytest.raises(SettingError, match=r"arm = .*names a folder: "):
        cells(PlanConfig(study="s"), BaseConfig(), run)


@pytest.mark.parametrize("name", [n for n in HOSTILE_NAMES[:10] if n != ".hidden"])
def test_no_manifest_leads_out_of_its_run(tmp_path: Path, name: str) -> None:
    """A stranger's manifest may name arms; none is read or written beside the run."""
    run = tmp_path / "run_1"
    sae_in(tmp_path / "out" / "seed1-l0_32")
    sae_in(run / "cells" / "baseline" / "seed1-l0_32")
    manifest = {"arms": {name: {}}, "target_l0": 32, "study": "s"}
    write_sealed(run / "manifest.json", manifest | {"base": BaseConfig().model_dump(mode="json")})
    with pytest.raises(DamageError, match="inside the folder"):
        run_cells(run)
    with pytest.raises(DamageError, match="inside the folder"):
        export(run, tmp_path / "exported")
    there = sorted(path.name for path in tmp_path.iterdir())
    assert there == ["out", "run_1"]


def test_no_shard_lies_outside_its_harvest(tmp_path: Path) -> None:
    from saelab.data.activations.store import FolderSource

    save_file({"x": torch.zeros(1, 2, 3)}, tmp_path / "elsewhere.safetensors")
    record = {"file": "../elsewhere.safetensors", "sha256": "", "bytes": 96, "contexts": 1}
    state = {"format": 1, "header": {"d": 3, "n_tokens": 2}, "shards": [record | {"n_tokens": 2}]}
    (tmp_path / "harvest").mkdir()
    write_sealed(tmp_path / "harvest" / "header.json", state)
    with pytest.raises(DamageError, match="inside the folder"):
        FolderSource.open(tmp_path / "harvest")


# ---------------------------------------------------------------- no memory


def lying(header: dict[str, Any], data: bytes = b"\0" * 64) -> bytes:
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def tensor(shape: list[int], end: int, dtype: str = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [0, end]}


HEADERS: dict[str, bytes] = {
    "length of the header": struct.pack("<Q", 2**62) + b"{}",
    "header longer than the file": struct.pack("<Q", 10**6) + b"{}",
    "shape": lying({"x": tensor([2**20, 2**20], 64)}),
    "shape and end": lying({"x": tensor([2**20, 2**20], 2**42)}),
    "product beyond 64 bits": lying({"x": tensor([2**40, 2**40, 2**40], 64)}),
    "nothing, of great width": lying({"x": tensor([0, 2**60], 0)}, b""),
    "nothing, of great length": lying({"x": tensor([2**40, 0], 0)}, b""),
    "backwards": lying({"x": {"dtype": "F32", "shape": [4], "data_offsets": [64, 48]}}),
    "negative": lying({"x": {"dtype": "F32", "shape": [-4], "data_offsets": [0, 64]}}),
    "overlapping": lying({"x": tensor([16], 64), "y": tensor([16], 64)}),
    "no type": lying({"x": tensor([16], 64, "F99")}),
    "no names": lying({}),
    "text": b"\x10\0\0\0\0\0\0\0not a header at all",
    "empty": b"",
}


@pytest.mark.parametrize("lie", HEADERS)
def test_a_header_that_lies_takes_no_memory(tmp_path: Path, lie: str) -> None:
    (tmp_path / "acts").mkdir()
    (tmp_path / "acts" / "a.safetensors").write_bytes(HEADERS[lie])
    before = taken()
    with pytest.raises(SourceError, match=r"a\.safetensors"):
        ForeignSource.open(tmp_path / "acts")
    sae = tmp_path / "sae"
    sae.mkdir()
    (sae / "sae.safetensors").write_bytes(HEADERS[lie])
    write_json(sae / "cfg.json", {"k": 2, "d_in": 4, "activation": "topk"})
    with pytest.raises(SourceError, match=r"sae\.safetensors"):
        formats.load(sae)
    assert taken() - before < 10**8


@pytest.mark.parametrize(
    "lie", [{"d_in": 2**40}, {"d_sae": 2**40}, {"d_in": 2**62, "d_sae": 2**62}, {"d_in": 1}]
)
def test_a_checkpoint_whose_settings_lie_takes_no_memory(
    tmp_path: Path, lie: dict[str, int]
) -> None:
    """Sealed again, as a stranger would."""
    record = read_json(sae_in(tmp_path) / "sae.json")
    del record["digest"]
    record |= {name: value for name, value in lie.items() if name == "d_in"}
    record["sae"] |= {name: value for name, value in lie.items() if name == "d_sae"}
    write_json(tmp_path / "sae.json", record | {"digest": digest(record)})
    before = taken()
    with pytest.raises(SaelabError, match=r"sae\.safetensors|sae\.json\.d_sae"):
        checkpoint.load(tmp_path)
    assert taken() - before < 10**8


def test_a_tensor_that_is_larger_than_its_file_is_refused(tmp_path: Path) -> None:
    write_json(tmp_path / "config.json", {"trainer": {"dict_class": "AutoEncoder"}})
    torch.save({"bias": torch.zeros(1).expand(2**40)}, tmp_path / "ae.pt")
    with pytest.raises(SourceError, match="bias is larger than the file"):
        formats.load(tmp_path, "dictionary_learning")


def test_a_table_that_swells_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "t.parquet"
    many = pa.table({"value": pa.array([0.5]).take(pa.array([0] * 10**6))})
    pq.write_table(many, file)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("saelab.storage.parquet.MOST_VALUES", 10**5)
        with pytest.raises(DamageError, match="over 100,000 values"):
            read_rows(file, {"value": "number"})
    pq.write_table(many, file, compression="zstd")
    with pytest.raises(DamageError, match="compressed by ZSTD"):
        read_rows(file, {"value": "number"})


@pytest.mark.parametrize(
    "text",
    ["[" * 10**6, '{"a":' * 10**5, "1" * 10**5, "1e400", "NaN", '{"a": Infinity}', "\ufeff{}", "'"],
)
def test_json_that_is_none_is_told(tmp_path: Path, text: str) -> None:
    (tmp_path / "x.json").write_text(text)
    with pytest.raises(DamageError, match=r"x\.json is damaged"):
        read_json(tmp_path / "x.json")


def test_json_beyond_the_limit_is_not_parsed(tmp_path: Path) -> None:
    with (tmp_path / "x.json").open("wb") as file:
        file.truncate(2**36)  # a hole
    before = taken()
    with pytest.raises(DamageError, match="over 32 MB"):
        read_json(tmp_path / "x.json")
    assert taken() - before < 10**8


# ---------------------------------------------------------------- nobody fooled


def test_what_a_terminal_would_obey_is_shown() -> None:
    told = str(SourceError("a\x1b[2Jb\rc\u202ed\ne\x9b"))
    assert told == r"a\x1b[2Jb\rc\u202ed\ne\x9b"
    assert visible("a\nb\x07", keep="\n") == "a\nb\\x07"
    assert visible("é 漢 – ok") == "é 漢 – ok"


def test_markdown_of_others_is_shown() -> None:
    told = markdown("a|b <script> [x](javascript:y) `c` **d**\n# e")
    assert told == r"a\|b \<script\> \[x\](javascript:y) \`c\` \*\*d\*\* # e"


def test_pictures_show_hostile_names_as_they_are(tmp_path: Path) -> None:
    """Mathematics, markup and hidden labels; the legend names every arm."""
    names = ("baseline", "_hidden", "$x^{", "<b>&amp;", "a $x$ b")
    run = load(write_run(tmp_path / "run_1", names, seeds=2, entries=("theme",)))
    drawn = [line for line, good in draw_run(run, tmp_path) if good]
    assert any("loss" in line for line in drawn)
    assert legend_name("_hidden") == " _hidden" and legend_name("$x^{") == "$x^{"
    from xml.etree import ElementTree

    for file in tmp_path.glob("*.svg"):
        ElementTree.parse(file)  # is well-formed


# ---------------------------------------------------------------- half characters


HALF = json.dumps({"name": "\ud800"}).encode()  # as an escape, which UTF-8 itself can't hold


def test_json_with_half_a_character_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "results.json"
    file.write_bytes(HALF)
    with pytest.raises(DamageError, match=r"half a character \(a surrogate\)\): delete it"):
        read_json(file)
    file.write_bytes(HALF + b"\n{}\n")
    with pytest.raises(DamageError, match=r"results.json:1 is damaged .*surrogate"):
        list(read_lines(file))
    file.write_bytes(json.dumps({"name": "\U0001f600 \\ud800"}).encode())  # a whole one
    assert read_json(file) == {"name": "\U0001f600 \\ud800"}


def test_what_watches_a_run_leaves_out_lines_that_no_tool_writes(tmp_path: Path) -> None:
    file = tmp_path / "metrics.jsonl"
    file.write_bytes(HALF + b"\n" + b"[" * 100_000 + b"\n" + b'{"step": 1}\n')
    assert list(Tail(file).lines()) == [{"step": 1}]
