"""Documents and tokens: hand-made goldens with a word tokenizer, then real text."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from saelab.data.language_model import ModelConfig, load
from saelab.data.text import stdlib
from saelab.data.text.corpus import TextConfig, documents, manifest
from saelab.data.text.tokens import Tokens, _encode, _plain_backend, tokenize, tokenize_texts
from saelab.errors import SettingError, SourceError

REAL = Path(os.environ.get("SAELAB_REAL_DATA", Path(__file__).parents[3] / "shared" / "data"))
SPECIAL = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}
BOS, EOS, PAD, UNK = 0, 1, 2, 3
WORDS = ["a", "b", "c", "d", "e", "f", "g", "h"]
A, B, C, D, E, F, G, H = range(4, 12)


def word_tokenizer(**special: str) -> PreTrainedTokenizerFast:
    """Ids: <s> 0, </s> 1, <pad> 2, <unk> 3, then a = 4, b = 5 ..."""
    vocabulary = {word: i for i, word in enumerate(["<s>", "</s>", "<pad>", "<unk>", *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)


@pytest.fixture(scope="module")
def words() -> PreTrainedTokenizerFast:
    return word_tokenizer(**SPECIAL)


def write_folder(folder: Path, *texts: str) -> TextConfig:
    folder.mkdir(exist_ok=True)
    for number, text in enumerate(texts):
        (folder / f"{number}.txt").write_text(text)
    return TextConfig(kind="files", path=str(folder))


def contexts(tokens: Tokens) -> set[tuple[int, ...]]:
    return {tuple(row) for row in tokens.ids.tolist()}


# ---------------------------------------------------------------- tokens


def test_contexts_are_bos_and_consecutive_tokens_of_the_stream(tmp_path: Path, words) -> None:
    config = write_folder(tmp_path / "t", "a b c", "d e f g")
    # stream: a b c EOS d e f g EOS; windows of 3; nothing is left over
    tokens = tokenize(config, words, context=4, tokens=7)
    assert contexts(tokens) == {(BOS, A, B, C), (BOS, EOS, D, E), (BOS, F, G, EOS)}
    assert tokens.ids.dtype == torch.int64
    by_row = {tuple(r): m for r, m in zip(tokens.ids.tolist(), tokens.mask.tolist(), strict=True)}
    assert by_row[(BOS, A, B, C)] == [False, True, True, True]
    assert by_row[(BOS, EOS, D, E)] == [False, False, True, True]
    assert by_row[(BOS, F, G, EOS)] == [False, True, True, False]
    assert tokens.n_tokens == 7
    assert tokens.documents is not None and tokens.documents.dtype == torch.int32
    of_row = {
        tuple(r): d for r, d in zip(tokens.ids.tolist(), tokens.documents.tolist(), strict=True)
    }
    assert of_row[(BOS, A, B, C)] == [0, 0, 0, 0]
    assert of_row[(BOS, EOS, D, E)] == [0, 0, 1, 1]  # the end belongs to what it ends
    assert of_row[(BOS, F, G, EOS)] == [1, 1, 1, 1]


def test_documents_that_are_not_joined_begin_contexts_of_their_own(tmp_path: Path, words) -> None:
    config = write_folder(tmp_path, "a b", "c d e f g", "h")
    apart = tokenize(config.patched({"joined": False}), words, context=4, tokens=8)
    order = [row.tolist() for row in apart.ids]
    assert sorted(order) == [[BOS, A, B, EOS], [BOS, C, D, E], [BOS, F, G, EOS], [BOS, H, EOS, PAD]]
    assert apart.lengths is not None
    assert apart.lengths.tolist() == [3 if row[1] == H else 4 for row in order]
    assert torch.equal(apart.mask, apart.ids > UNK)
    assert apart.documents is not None
    numbers = {row[1]: one for row, one in zip(order, apart.documents.tolist(), strict=True)}
    assert numbers == {A: [0] * 4, C: [1] * 4, F: [1] * 4, H: [2, 2, 2, 3]}  # padding is nobody's
    assert tokenize(config, words, context=4, tokens=6).lengths is None


def test_unknown_words_do_not_count(tmp_path: Path, words) -> None:
    tokens = tokenize(write_folder(tmp_path / "t", "a zzz b"), words, context=5, tokens=2)
    assert tokens.ids.tolist() == [[BOS, A, UNK, B, EOS]]
    assert tokens.mask.tolist() == [[False, True, False, True, False]]


def test_too_short_a_text_says_how_many_tokens_there_are(tmp_path: Path, words) -> None:
    config = write_folder(tmp_path / "t", "a b c", "d e f g")
    with pytest.raises(SourceError, match="only 7 tokens.*1,000 are wanted: lower train.tokens"):
        tokenize(config, words, context=4, tokens=1000)


def test_the_order_of_contexts_comes_from_the_seed_alone(tmp_path: Path, words) -> None:
    config = write_folder(tmp_path / "t", " ".join(WORDS * 20))
    first, again = (tokenize(config, words, 5, 100, seed=1) for _ in range(2))
    other = tokenize(config, words, 5, 100, seed=2)
    assert first.digest == again.digest != other.digest
    assert torch.equal(first.ids, again.ids)


@settings(
    max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(context=st.integers(2, 9), few=st.integers(1, 40), more=st.integers(0, 40))
def test_fewer_tokens_are_a_prefix(
    tmp_path: Path, words, context: int, few: int, more: int
) -> None:
    config = write_folder(tmp_path / "t", *(" ".join(WORDS) for _ in range(20)))
    small = tokenize(config, words, context, few)
    large = tokenize(config, words, context, few + more)
    assert few <= small.n_tokens < few + context
    assert torch.equal(small.ids, large.ids[: len(small.ids)])
    assert torch.equal(small.mask, large.mask[: len(small.mask)])


def test_the_first_id_falls_back_to_eos_then_cls(tmp_path: Path) -> None:
    config = write_folder(tmp_path / "t", "a b c")
    eos_only = word_tokenizer(eos_token="</s>", unk_token="<unk>")
    assert tokenize(config, eos_only, 4, 3).ids.tolist() == [[EOS, A, B, C]]
    bert = word_tokenizer(cls_token="<s>", sep_token="</s>", unk_token="<unk>")
    assert tokenize(config, bert, 5, 3).ids.tolist() == [[BOS, A, B, C, EOS]]
    with pytest.raises(SourceError, match="no BOS, EOS or CLS token"):
        tokenize(config, word_tokenizer(unk_token="<unk>"), 4, 3)


def test_impossible_numbers_are_refused(words) -> None:
    with pytest.raises(SettingError, match="context = 1"):
        tokenize(TextConfig(), words, context=1, tokens=10)
    with pytest.raises(SettingError, match="tokens = 0"):
        tokenize(TextConfig(), words, context=8, tokens=0)


def test_the_digest_sees_ids_mask_and_shape() -> None:
    ids, mask = torch.arange(12).view(3, 4), torch.ones(3, 4, dtype=torch.bool)
    other_mask = mask.clone()
    other_mask[0, 0] = False
    digests = {
        Tokens(ids, mask).digest,
        Tokens(ids, other_mask).digest,
        Tokens(ids.flip(0), mask).digest,
        Tokens(ids.view(4, 3), mask.view(4, 3)).digest,
    }
    assert len(digests) == 4


# ---------------------------------------------------------------- texts for probing


def test_texts_are_cut_and_padded_on_the_right(words) -> None:
    ids, attention, mask = tokenize_texts(["a b", "", "c d e f g h", "zzz h"], words, context=5)
    assert ids.tolist() == [
        [BOS, A, B, PAD, PAD],
        [BOS, PAD, PAD, PAD, PAD],
        [BOS, C, D, E, F],
        [BOS, UNK, H, PAD, PAD],
    ]
    assert attention.sum(1).tolist() == [3, 1, 5, 3]
    assert mask.tolist() == [
        [False, True, True, False, False],
        [False, False, False, False, False],
        [False, True, True, True, True],
        [False, False, True, False, False],
    ]
    assert attention.dtype == mask.dtype == torch.bool


def test_no_texts_give_no_rows(words) -> None:
    assert [part.shape for part in tokenize_texts([], words, 5)] == [(0, 5)] * 3


# ---------------------------------------------------------------- documents


def test_stdlib_splits_are_those_of_the_library() -> None:
    train, held_out, everything = (
        list(documents(TextConfig(split=split))) for split in ("train", "held_out", "all")
    )
    assert train == [text for text in stdlib.texts("train") if text.strip()]
    assert sorted(train + held_out) == sorted(everything)
    # a few one-line package files are alike; nothing longer is in both
    assert all(len(text) < 200 for text in set(train) & set(held_out))
    assert manifest(TextConfig())["sha256"] == stdlib.manifest()["sha256"]


def test_unknown_stdlib_split_is_refused() -> None:
    with pytest.raises(SettingError, match=r"text.split = 'heldout'.*did you mean 'held_out'"):
        next(documents(TextConfig(split="heldout")))


def test_a_folder_is_read_in_the_order_of_its_paths(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / "b.txt").write_text("second")
    (tmp_path / "a.md").write_text("first")
    (tmp_path / "sub" / "c.jsonl").write_text('{"text": "third"}\n\n{"text": "fourth"}\n')
    (tmp_path / "picture.png").write_bytes(b"\x89PNG")
    config = TextConfig(kind="files", path=str(tmp_path))
    assert list(documents(config)) == ["first", "second", "third", "fourth"]
    assert set(manifest(config)["files"]) == {"a.md", "b.txt", "sub/c.jsonl"}


def rows_file(path: Path, rows: list[dict[str, object]]) -> str:
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.mark.parametrize("suffix", [".parquet", ".jsonl"])
def test_rows_of_the_wanted_split_are_kept(tmp_path: Path, suffix: str) -> None:
    rows = [
        {"text": "one", "split": "train"},
        {"text": "two", "split": "test"},
        {"text": None, "split": "train"},
        {"text": "three", "split": "train"},
    ]
    path = rows_file(tmp_path / f"x{suffix}", rows)

    def texts(split: str) -> list[str]:
        return list(documents(TextConfig(kind="files", path=path, split=split)))

    assert texts("train") == ["one", "three"]
    assert texts("test") == ["two"]
    assert texts("all") == ["one", "two", "three"]
    with pytest.raises(SourceError, match="no rows of split 'dev': its splits are test, train"):
        texts("dev")


@pytest.mark.parametrize("suffix", [".parquet", ".jsonl"])
def test_without_a_split_column_every_row_is_kept(tmp_path: Path, suffix: str) -> None:
    path = rows_file(tmp_path / f"x{suffix}", [{"body": "one"}, {"body": "two"}])
    config = TextConfig(kind="files", path=path, split="held_out", column="body")
    assert list(documents(config)) == ["one", "two"]


def test_files_named_after_the_split_are_chosen(tmp_path: Path) -> None:
    rows_file(tmp_path / "train-00000.jsonl", [{"text": "one"}])
    rows_file(tmp_path / "train-00001.parquet", [{"text": "two"}])
    rows_file(tmp_path / "test.jsonl", [{"text": "three"}])
    config = TextConfig(kind="files", path=str(tmp_path))
    assert list(documents(config)) == ["one", "two"]
    assert list(documents(config.patched({"split": "test"}))) == ["three"]
    assert set(documents(config.patched({"split": "all"}))) == {"one", "two", "three"}


def test_a_data_set_on_this_machine_is_known_by_its_content(tmp_path: Path) -> None:
    file = tmp_path / "texts" / "train.jsonl"
    file.parent.mkdir()
    for path in (file.parent, file):
        file.write_text('{"text": "one"}\n')
        config = TextConfig(kind="dataset", path=str(path))
        before = manifest(config)
        assert manifest(config) == before
        file.write_text('{"text": "two"}\n')
        assert manifest(config) != before
    assert "files" not in manifest(TextConfig(kind="dataset", path="owner/name"))


def test_files_of_one_name_in_several_folders_are_all_in_the_manifest(tmp_path: Path) -> None:
    for name in ("news", "code"):
        (tmp_path / name).mkdir()
        rows_file(tmp_path / name / "train.jsonl", [{"text": name}])
    config = TextConfig(kind="files", path=str(tmp_path))
    before = manifest(config)["files"]
    assert set(before) == {"code/train.jsonl", "news/train.jsonl"}
    rows_file(tmp_path / "code" / "train.jsonl", [{"text": "other"}])
    after = manifest(config)["files"]
    assert [name for name in before if after[name] != before[name]] == ["code/train.jsonl"]


@pytest.mark.parametrize("suffix", [".parquet", ".jsonl"])
def test_of_several_columns_the_first_that_is_there_counts(tmp_path: Path, suffix: str) -> None:
    rows_file(tmp_path / f"a{suffix}", [{"text": "one", "code": "never"}])
    rows_file(tmp_path / f"b{suffix}", [{"code": "two", "split": "train"}])
    config = TextConfig(kind="files", path=str(tmp_path), column=("text", "code"))
    assert list(documents(config)) == ["one", "two"]
    rows_file(tmp_path / f"c{suffix}", [{"body": "three", "split": "train"}])
    with pytest.raises(SourceError, match="no column 'text' or 'code'.*: its columns are body"):
        list(documents(config))


@pytest.mark.parametrize("suffix", [".parquet", ".jsonl"])
def test_a_missing_column_names_those_there(tmp_path: Path, suffix: str) -> None:
    path = rows_file(tmp_path / f"x{suffix}", [{"contents": "one", "label": 1}])
    with pytest.raises(
        SourceError, match=r"no column 'content' \(did you mean 'contents'\?\).*contents, label"
    ):
        list(documents(TextConfig(kind="files", path=path, column="content")))
    with pytest.raises(SourceError, match="'label' of .* holds int, not text"):
        list(documents(TextConfig(kind="files", path=path, column="label")))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("x.txt", "  \n", "holds no text"),
        ("x.jsonl", '{"text": ""}\n', "holds no text"),
        ("x.jsonl", '{"text": "a"}\n{broken\n', r"x.jsonl:2 is not JSON"),
        ("x.jsonl", "[1]\n", "is not a JSON object"),
        ("x.parquet", "PAR1 nothing", "name a readable parquet file"),
        ("x.csv", "a,b", "not one of .txt, .md, .jsonl, .parquet"),
    ],
)
def test_unusable_files_give_one_sentence(
    tmp_path: Path, name: str, content: str, message: str
) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(SourceError, match=message) as caught:
        list(documents(TextConfig(kind="files", path=str(tmp_path / name))))
    assert "\n" not in str(caught.value)


def test_text_that_is_no_utf8_is_refused(tmp_path: Path) -> None:
    (tmp_path / "x.txt").write_bytes(b"caf\xe9")
    with pytest.raises(SourceError, match="not UTF-8"):
        list(documents(TextConfig(kind="files", path=str(tmp_path / "x.txt"))))
    (tmp_path / "x.jsonl").write_bytes(b'{"text": "caf\xe9"}')
    with pytest.raises(SourceError, match=r"x.jsonl:1 is not JSON"):
        list(documents(TextConfig(kind="files", path=str(tmp_path / "x.jsonl"))))


def test_missing_paths_are_named(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="nowhere does not exist"):
        next(documents(TextConfig(kind="files", path=str(tmp_path / "nowhere"))))
    with pytest.raises(SourceError, match="has no .txt"):
        next(documents(TextConfig(kind="files", path=str(tmp_path))))
    with pytest.raises(SettingError, match="text.path = None"):
        next(documents(TextConfig(kind="files")))


# ---------------------------------------------------------------- streamed data sets


def test_a_data_set_is_streamed_in_order(tmp_path: Path, words) -> None:
    texts = [" ".join(WORDS[i:]) for i in range(6)]
    rows_file(tmp_path / "train.parquet", [{"text": text} for text in texts])
    config = TextConfig(kind="dataset", path=str(tmp_path))
    assert list(documents(config)) == texts
    # stream: a b c d e f g h EOS b c d ...; taken in order, no permutation
    tokens = tokenize(config, words, context=5, tokens=6)
    assert tokens.ids.tolist() == [[BOS, A, B, C, D], [BOS, E, F, G, H]]


def test_a_data_set_without_the_column_or_split_is_refused(tmp_path: Path) -> None:
    rows_file(tmp_path / "train.parquet", [{"body": "x"}])
    with pytest.raises(SourceError, match="no column 'text'.*columns are body"):
        next(documents(TextConfig(kind="dataset", path=str(tmp_path))))
    with pytest.raises(SourceError, match="split 'dev'") as caught:
        next(documents(TextConfig(kind="dataset", path=str(tmp_path), split="dev", column="body")))
    assert "\n" not in str(caught.value)


def test_an_unreachable_hub_gives_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    def unreachable(*args: object, **kwargs: object) -> None:
        raise ConnectionError("Couldn't reach the Hub\nwith many\nlines")

    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    with pytest.raises(SourceError, match="Couldn't reach the Hub.*name local files") as caught:
        next(documents(TextConfig(kind="dataset", path="owner/name")))
    assert "\n" not in str(caught.value)


def test_data_sets_of_other_file_types_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    class Stream:
        info = datasets.DatasetInfo(builder_name="webdataset")
        column_names = ("text",)

    monkeypatch.setattr(datasets, "load_dataset", lambda *a, **k: Stream())
    with pytest.raises(SourceError, match="type 'webdataset': only parquet"):
        next(documents(TextConfig(kind="dataset", path="owner/name")))


# ---------------------------------------------------------------- real text


@pytest.mark.skipif(
    not (REAL / "models" / "stories-260k").is_dir(), reason="real data stories-260k is absent"
)
def test_real_stories_come_back_from_their_tokens() -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(REAL / "models" / "stories-260k")
    path = str(REAL / "corpora" / "tinystories.parquet")
    config = TextConfig(kind="files", path=path, split="validation")
    tokens = tokenize(config, tokenizer, context=64, tokens=2000, seed=3)
    assert 2000 <= tokens.n_tokens < 2064
    assert bool((tokens.ids[:, 0] == tokenizer.bos_token_id).all())
    assert not bool(tokens.mask[:, 0].any())
    body = "".join(tokenizer.decode(tokenizer.encode(t)[1:]) for t in documents(config))
    inside = tokens.ids[tokens.mask[:, 1:].all(1), 1:]  # contexts within one story
    assert len(inside) > 10
    assert all(tokenizer.decode(row).strip() in body for row in inside)


@pytest.mark.parametrize("name", ["words", "embedded"])
def test_the_quick_way_gives_the_tokenizers_own_ids(name: str, words) -> None:
    tokenizer = words if name == "words" else load(ModelConfig()).tokenizer
    texts = ["", " the  cat\n\tsat", "<|eos|> a <s> b", "naïve 数 \x00", "the cat"]
    assert _plain_backend(tokenizer) is not None
    assert _encode(texts, tokenizer) == tokenizer(texts, add_special_tokens=False)["input_ids"]


def test_a_tokenizer_with_ways_of_its_own_is_left_to_itself() -> None:
    class Own(PreTrainedTokenizerFast):
        def _encode_plus(self, text, **options):
            return {"input_ids": [[7] for _ in text]}

    words = word_tokenizer(**SPECIAL)
    own = Own(tokenizer_object=words.backend_tokenizer, **SPECIAL)
    assert _encode(["the", "cat"], own) == [[7], [7]]
    words(["the cat sat"], truncation=True, max_length=2)  # leaves a cut in the backend
    assert len(_encode(["the cat sat"], words)[0]) == 3
