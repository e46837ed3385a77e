"""The data sets of sae-probes: files, rows, and activations at the last token."""

from __future__ import annotations

import math
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from sae_probes_folders import made_folder, write_master, write_set, write_shifted, write_table
from tiny_models import llama, save

from saelab.data.language_model import LanguageModel, ModelConfig, load
from saelab.data.probing import last_tokens, sae_probes
from saelab.data.probing.last_tokens import encode_prompts, harvest_last_tokens, prepare_last_tokens
from saelab.data.probing.row_selection import (
    NOISE,
    SHARES,
    TRAIN_SIZES,
    Condition,
    Split,
    conditions,
    select_rows,
)
from saelab.data.probing.sae_probes import (
    LabelledPrompts,
    SaeProbesConfig,
    choose_datasets,
    dataset_names,
    find_folder,
    read_prompts,
)
from saelab.errors import SettingError, SourceError

TWO = "Binary Classification"
HOOK = "blocks.1.hook_resid_post"

# ---------------------------------------------------------------- files


def test_names_are_those_of_tasks_with_two_classes_in_order(tmp_path: Path) -> None:
    write_master(tmp_path, {"9_b": TWO, "2_year": "Continuous Data", "10_a b": TWO})
    assert dataset_names(tmp_path) == ["9_b", "10_a b"]


def test_texts_are_read_as_they_are(tmp_path: Path) -> None:
    texts = ['a "quoted", one', "two\nlines\n\n", "NA", "007", "é 漢", ""]
    write_set(tmp_path, "1_x", [(text, "01"[i % 2]) for i, text in enumerate(texts)])
    assert list(read_prompts(tmp_path, "1_x").texts) == texts


@pytest.mark.parametrize(
    ("targets", "classes"),
    [
        (["10", "9"], ("9", "10")),
        (["1", "-1"], ("-1", "1")),
        (["True", "False"], ("False", "True")),
        (["not_bigram", "bigram"], ("bigram", "not_bigram")),
        (["not_entailment", "1"], ("1", "not_entailment")),
    ],
)
def test_labels_are_numbered_as_by_the_label_encoder(
    targets: list[str], classes: tuple[str, ...], tmp_path: Path
) -> None:
    write_set(tmp_path, "1_x", [("a", targets[0]), ("b", targets[1]), ("c", targets[0])])
    prompts = read_prompts(tmp_path, "1_x")
    assert prompts.classes == classes
    assert [prompts.classes[label] for label in prompts.labels] == [*targets, targets[0]]


def test_short_ones_and_shifted_texts_are_chosen(tmp_path: Path) -> None:
    write_master(tmp_path, {"1_short": TWO, "2_long": TWO})
    write_set(tmp_path, "1_short", [("a" * 99, "0"), ("b" * 100, "1")])
    write_set(tmp_path, "2_long", [("a" * 100, "0"), ("b" * 100, "1")])
    write_shifted(tmp_path, "1_short", [("c", "0"), ("d", "1")])

    def chosen(**settings: object) -> list[str]:
        return [p.name for p in choose_datasets(SaeProbesConfig.parse(dict(settings)), tmp_path)]

    assert chosen() == ["1_short"]
    assert chosen(datasets="all") == ["1_short", "2_long"]
    assert chosen(datasets=["2_long"]) == ["2_long"]
    assert chosen(datasets="all", settings=["normal", "ood"]) == [
        *("1_short", "2_long", "1_short_OOD")
    ]
    with pytest.raises(SettingError, match=r"datasets = '1_shrt': .*did you mean '1_short'"):
        chosen(datasets=["1_shrt"])


def test_the_installed_package_is_found_by_its_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made_folder(tmp_path / "pkg" / "data", {"1_x": 4})
    file = tmp_path / "pkg" / "data" / sae_probes.MASTER
    listed = [SimpleNamespace(name=file.name, locate=lambda: file)]
    monkeypatch.setattr(metadata, "files", lambda name: listed if name == "sae-probes" else None)
    assert find_folder() == file.parent
    listed.clear()
    with pytest.raises(SourceError, match="not installed here: pip install --no-deps sae-probes"):
        find_folder()
    with pytest.raises(SettingError, match=r"evaluation.sae_probes.path = .*holds no probing"):
        find_folder(str(tmp_path))


def test_files_that_cannot_be_used_are_refused_in_a_sentence(tmp_path: Path) -> None:
    write_set(tmp_path, "1_three", [("a", "0"), ("b", "1"), ("c", "2")])
    write_table(tmp_path / sae_probes.SETS / "2_odd.csv.zst", ["text", "target"], [("a", "1")])
    (tmp_path / sae_probes.SETS / "3_damaged.csv.zst").write_bytes(b"no zstd at all")
    with pytest.raises(SourceError, match="3 values of `target`, two are needed"):
        read_prompts(tmp_path, "1_three")
    for name in ("2_odd", "3_damaged", "4_absent"):
        with pytest.raises(SourceError, match=rf"{name}.*can't be read"):
            read_prompts(tmp_path, name)


# ---------------------------------------------------------------- rows


def rows_of_the_package(
    y: np.ndarray, sizes: tuple[int, int], share: float
) -> tuple[np.ndarray, np.ndarray]:
    """The package's draw, written down once more, step by step."""
    rng = np.random.RandomState(42)
    (train, test), positives, negatives = sizes, np.where(y == 1)[0], np.where(y == 0)[0]
    ups = [math.ceil(share * size) for size in sizes]
    first = rng.choice(positives, ups[0], replace=False)
    second = rng.choice(negatives, train - ups[0], replace=False)
    third = rng.choice(np.array(sorted({*positives} - {*first})), ups[1], replace=False)
    fourth = rng.choice(np.array(sorted({*negatives} - {*second})), test - ups[1], replace=False)
    both = [np.concatenate([first, second]), np.concatenate([third, fourth])]
    return rng.permutation(both[0]), rng.permutation(both[1])


def select(y: np.ndarray, condition: Condition, rounded: bool = False) -> Split:
    split = select_rows(y, condition, lambda _: np.random.RandomState(42), rounded)
    assert isinstance(split, Split), split
    return split


@pytest.mark.parametrize("n", [728, 2000])
def test_rows_are_the_package_s(n: int) -> None:
    y = np.random.RandomState(1).permutation(np.arange(n) % 2)
    sizes = {
        "normal": (min(n - 100, 1024), n - min(n - 100, 1024) - 1),
        "label_noise": (min(n - 100, 1024), n - min(n - 100, 1024) - 1),
    }
    for condition in conditions(("normal", "scarcity", "imbalance", "label_noise")):
        if not condition.is_possible(n, False):
            assert condition.amount > n - 100
            continue
        share = condition.amount if condition.setting == "imbalance" else 0.5
        if condition.setting == "imbalance":
            most = int(min((n / 2) / (1 - 0.05), (n / 2) / 0.95))
            train = min(most - 100, 1024)
            pair = train, max(100, most - train - 1)
        elif condition.setting == "scarcity":
            pair = int(condition.amount), n - int(condition.amount) - 1
        else:
            pair = sizes[condition.setting]
        split = select(y, condition)
        train_rows, test_rows = rows_of_the_package(y, pair, share)
        assert np.array_equal(split.train, train_rows), condition
        assert split.test is not None and np.array_equal(split.test, test_rows), condition
        flipped = int(pair[0] * condition.amount) if condition.setting == "label_noise" else 0
        assert (split.train_labels != y[train_rows]).sum() == flipped


def test_a_share_with_its_last_bits_moves_a_row_and_a_rounded_one_does_not() -> None:
    y = np.arange(4000) % 2
    moved = [p for p in SHARES if p != round(p * 20) / 20]
    assert moved  # linspace gives such numbers
    pairs = [
        (
            select(y, Condition("imbalance", p)).train_labels.sum(),
            select(y, Condition("imbalance", p), rounded=True).train_labels.sum(),
        )
        for p in SHARES
    ]
    assert all(0 <= bits - rounded <= 1 for bits, rounded in pairs)


def test_points_of_the_settings() -> None:
    assert TRAIN_SIZES[:4] == (2, 3, 4, 5)
    assert (len(TRAIN_SIZES), TRAIN_SIZES[-1]) == (20, 1024)
    assert (len(SHARES), len(NOISE), NOISE[3], NOISE[-1]) == (19, 11, 0.15, 0.5)


def test_texts_of_another_kind_are_tested_after_training_on_the_first_rows() -> None:
    split = select(np.arange(3000) % 2, Condition("ood"))
    assert split.test is None
    assert (len(split.train), split.train.max() < 1500) == (1024, True)


@pytest.mark.parametrize("n", [50, 101, 150])
def test_too_few_rows_are_a_reason(n: int) -> None:
    y = (np.arange(n) < 5).astype(np.int64)
    reason = select_rows(y, Condition("normal"), lambda _: np.random.RandomState(42))
    assert isinstance(reason, str)
    assert "rows" in reason


# ---------------------------------------------------------------- last tokens


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> LanguageModel:
    folder = save(llama(), tmp_path_factory.mktemp("llama"))
    return load(ModelConfig(path=str(folder)))


def prompts_of(*texts: str) -> LabelledPrompts:
    return LabelledPrompts("1_x", texts, tuple(i % 2 for i in range(len(texts))), ("0", "1"))


def test_a_row_is_the_activation_at_the_last_token(model: LanguageModel) -> None:
    prompts = prompts_of("w3", "w4 w5 w6 w7", "w8 w9", "w10 w11 w12")
    entry = harvest_last_tokens(model, HOOK, prompts)
    for row, text in zip(entry.rows, prompts.texts, strict=True):
        ids = torch.tensor([model.tokenizer(text)["input_ids"]])
        alone = model.activations(ids, None, [HOOK])[HOOK][0, -1]
        torch.testing.assert_close(row, alone, rtol=1e-5, atol=1e-6)
    assert entry.labels.tolist() == [0, 1, 0, 1]
    assert entry.rows.dtype == torch.float32


def test_a_long_text_keeps_its_end(model: LanguageModel) -> None:
    text = " ".join(f"w{3 + i % 60}" for i in range(40))
    (ids,) = encode_prompts(prompts_of(text), model.tokenizer, 24)
    assert ids == model.tokenizer(text)["input_ids"][-24:]
    assert model.tokenizer.truncation_side == "right"  # the model's own is not changed
    assert len(model.tokenizer(text)["input_ids"]) == 40


def test_a_text_without_a_token_is_refused(model: LanguageModel) -> None:
    with pytest.raises(SourceError, match=r"1_x has a text without a token \(' '\)"):
        encode_prompts(prompts_of("w3", " "), model.tokenizer, 24)


def test_one_pass_of_the_model_serves_all(
    model: LanguageModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = made_folder(tmp_path / "data", {"1_x": 20, "2_y": 12}, shifted=["1_x"])
    config = SaeProbesConfig.parse({"path": str(data), "settings": ["normal", "ood"]})
    first = prepare_last_tokens(config, model, HOOK, tmp_path / "cache")
    assert (first.names, len(first.folders)) == (["1_x", "2_y"], 3)
    rows = first.load("1_x").rows

    def again(*_: object) -> None:
        raise AssertionError("harvested again")

    monkeypatch.setattr(last_tokens, "harvest_last_tokens", again)
    second = prepare_last_tokens(config, model, HOOK, tmp_path / "cache")
    assert torch.equal(second.load("1_x").rows, rows)
    assert second.load_shifted("2_y") is None
    assert second.content() == first.content()
    with pytest.raises(AssertionError, match="harvested again"):
        prepare_last_tokens(config, model, "blocks.0.hook_resid_post", tmp_path / "cache")
