"""Sparse probing: planted latents are found, noise is chance, scikit-learn agrees."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from saelab.data.language_model import ModelConfig, load
from saelab.data.probing.activations import ProbingData, ProbingEntry, harvest_probing
from saelab.data.probing.embedded import Entry, embedded_entries
from saelab.errors import DamageError, MismatchError, SettingError, SourceError
from saelab.evals.base import Row
from saelab.evals.probing import evaluate_probing, mean_codes
from saelab.evals.probing.tasks import build_tasks
from saelab.seeding import torch_stream

CLASSES = ("a", "b", "c")


def planted(
    seed: int, n_train: int = 120, n_test: int = 60, d: int = 12, strength: float = 1.0
) -> ProbingEntry:
    """Three classes; class c adds `strength` to channel c of every position, the rest is noise."""
    labels = torch.arange(3).repeat_interleave(n_train + n_test)
    is_train = (torch.arange(n_train + n_test) < n_train).repeat(3)
    generator = torch_stream(seed, "test", "planted")
    lengths = torch.randint(1, 9, (len(labels),), generator=generator)
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)])
    rows = 0.1 * torch.randn(int(offsets[-1]), d, generator=generator)
    of_row = labels.repeat_interleave(lengths)
    rows[torch.arange(len(rows)), of_row] += strength
    return ProbingEntry(
        name="planted",
        classes=CLASSES,
        rows=rows,
        offsets=offsets,
        labels=labels,
        is_train=is_train,
    )


def data_of(*entries: ProbingEntry) -> ProbingData:
    return ProbingData(entries, {"hook_name": "here"})


class Linear:
    """A subject whose code is relu(x W)."""

    def __init__(self, weight: Tensor) -> None:
        self.weight = weight
        self.d_in, self.d_sae = weight.shape

    def encode(self, x: Tensor) -> Tensor:
        return (x @ self.weight).relu()

    def decode(self, f: Tensor) -> Tensor:
        return f @ self.weight.T


def values(rows: list[Row], slice: str = "") -> dict[str, float | None]:
    return {row.metric: row.value for row in rows if row.slice == slice}


# ---------------------------------------------------------------- tasks


def test_tasks_are_balanced_and_negatives_are_spread_evenly() -> None:
    entry = planted(0)
    for label, task in enumerate(build_tasks(entry, seed=3)):
        assert task.name == CLASSES[label]
        for examples, side, n in ((task.train, True, 120), (task.test, False, 60)):
            chosen = entry.labels[examples.index]
            assert len(examples.index) == len(examples.index.unique()) == 2 * n
            assert (entry.is_train[examples.index] == side).all()
            assert ((chosen == label) == examples.positive).all()
            counts = chosen.bincount(minlength=3).tolist()
            assert counts == [n if c == label else n // 2 for c in range(3)]


@given(st.lists(st.integers(1, 9), min_size=2, max_size=5), st.integers(0, 99))
def test_unequal_classes_stay_balanced(sizes: list[int], seed: int) -> None:
    labels = torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes)).repeat(2)
    is_train = torch.arange(len(labels)) < sum(sizes)
    names, nothing = tuple("abcde"[: len(sizes)]), torch.zeros(0)
    entry = ProbingEntry(
        name="x", classes=names, rows=nothing, offsets=nothing, labels=labels, is_train=is_train
    )
    for label, task in enumerate(build_tasks(entry, seed)):
        counts = labels[task.train.index].bincount(minlength=len(sizes)).tolist()
        own = counts.pop(label)
        assert own == sum(counts) > 0 and max(counts) - min(counts) <= 1


def test_examples_depend_on_labels_and_seed_alone() -> None:
    entry = planted(0)
    other = replace(entry, rows=torch.zeros(1), offsets=torch.zeros(1))
    for one, two in zip(build_tasks(entry, 1), build_tasks(other, 1), strict=True):
        assert torch.equal(one.train.index, two.train.index)
        assert torch.equal(one.test.index, two.test.index)
    assert not torch.equal(
        build_tasks(entry, 1)[0].train.index, build_tasks(entry, 2)[0].train.index
    )


def test_a_class_without_test_texts_is_refused() -> None:
    entry = planted(0)
    with pytest.raises(SourceError, match="class 'c'|for another"):
        build_tasks(replace(entry, is_train=entry.is_train | (entry.labels == 2)), 0)


# ---------------------------------------------------------------- pooling


@pytest.mark.parametrize("chunk", [1, 7, 64, 100_000])
def test_pooling_is_the_mean_over_positions_for_any_chunk(chunk: int) -> None:
    entry = planted(1, n_train=30, n_test=10)
    subject = Linear(torch.randn(12, 20, generator=torch_stream(1, "test")))
    code = subject.encode(entry.rows)
    naive = torch.stack(
        [code[a:b].mean(0) for a, b in zip(entry.offsets, entry.offsets[1:], strict=False)]
    )
    found = mean_codes(subject, entry.rows, entry.offsets, chunk=chunk)
    assert found.shape == (120, 20) and found.dtype == torch.float32
    torch.testing.assert_close(found, naive, rtol=0, atol=1e-6)


def test_zeros_are_included_in_the_mean() -> None:
    rows = torch.tensor([[3.0], [-1.0], [-2.0], [4.0]])
    code = mean_codes(Linear(torch.eye(1)), rows.half(), torch.tensor([0, 3, 4]))
    assert code.tolist() == [[1.0], [4.0]]


class Sparse(Linear):
    """The same code, summed from its active latents only."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__(weight)
        self.calls = 0

    def pooled(self, rows: Tensor, cuts: Tensor) -> Tensor:
        assert rows.dtype == torch.float32 and cuts[0] == 0 and cuts[-1] == len(rows)
        self.calls += 1
        code = Linear.encode(self, rows)
        row, latent = code.nonzero(as_tuple=True)
        text = torch.searchsorted(cuts, row, right=True) - 1
        sums = code.new_zeros(len(cuts) - 1, self.d_sae)
        return sums.index_put_((text, latent), code[row, latent], accumulate=True)

    def encode(self, x: Tensor) -> Tensor:
        raise AssertionError("it pools by itself")

    codes = decode_code = encode


@pytest.mark.parametrize("chunk", [None, 50])
def test_a_subject_that_pools_by_itself_is_asked_to(chunk: int | None) -> None:
    data = data_of(planted(2, n_train=30, n_test=10, strength=0.1))
    weight = torch.randn(12, 20, generator=torch_stream(2, "test"))
    sparse = Sparse(weight)
    rows = evaluate_probing(sparse, data, seed=0, chunk=chunk)
    assert sparse.calls == (1 if chunk is None else -(-len(data.entries[0].rows) // chunk))
    assert rows == evaluate_probing(Linear(weight), data, seed=0)


def test_a_text_without_counted_positions_is_refused() -> None:
    with pytest.raises(SourceError, match="text 1 has no counted position"):
        mean_codes(Linear(torch.eye(1)), torch.ones(4, 1), torch.tensor([0, 3, 3, 4]))


# ---------------------------------------------------------------- the evaluation


def test_a_planted_latent_is_found_with_one_column(global_random_seed: int) -> None:
    entry = planted(global_random_seed)
    rows = evaluate_probing(Linear(torch.eye(12)), data_of(entry), seed=0)
    overall = values(rows)
    assert overall["sae_top_1_test_accuracy"] == 1.0
    assert overall["sae_test_accuracy"] == 1.0
    assert overall["probing_constant"] == 0.0
    assert {row.definition for row in rows} == {"sparse_probing/2"}


def test_shuffled_labels_are_chance(global_random_seed: int) -> None:
    entry = planted(global_random_seed, n_train=300, n_test=300)
    for is_train in (True, False):
        where = (entry.is_train == is_train).nonzero()[:, 0]
        order = torch.randperm(len(where), generator=torch_stream(global_random_seed, "test"))
        entry.labels[where] = entry.labels[where[order]]
    overall = values(evaluate_probing(Linear(torch.eye(12)), data_of(entry), seed=0))
    error = math.sqrt(0.25 / 600)  # of one task; the mean of three is no wider
    for metric in ("sae_top_1_test_accuracy", "sae_top_5_test_accuracy", "sae_test_accuracy"):
        assert abs(overall[metric] - 0.5) < 4 * error  # type: ignore[operator]


@pytest.mark.parametrize("level", [0.0, 0.1])
def test_a_constant_code_is_half_and_flagged(level: float) -> None:
    class Constant(Linear):
        def encode(self, x: Tensor) -> Tensor:
            return torch.full((len(x), self.d_sae), level)

    entry = replace(planted(0), offsets=torch.arange(541), rows=torch.randn(540, 12))
    rows = evaluate_probing(Constant(torch.zeros(12, 200)), data_of(entry), seed=0)
    assert values(rows)["probing_constant"] == 1.0
    accuracies = [
        row.value for row in rows if row.metric.endswith("accuracy") and row.value is not None
    ]
    assert len(accuracies) == (7 + 2) * 5 and set(accuracies) == {0.5}


def test_more_columns_than_there_are_is_a_missing_row() -> None:
    rows = evaluate_probing(None, data_of(planted(0)), 0, k_values=(12, 13), prefix="llm")
    there = [row for row in rows if row.metric == "llm_top_12_test_accuracy"]
    absent = [row for row in rows if row.metric == "llm_top_13_test_accuracy"]
    assert len(there) == len(absent) == 5
    assert all(row.value is not None for row in there)
    assert all(
        row.value is None and "12 columns, fewer than k = 13" in row.reason for row in absent
    )


def test_a_code_that_is_not_finite_is_a_missing_row() -> None:
    entry = planted(0)
    entry.rows[5] = float("nan")
    rows = evaluate_probing(
        Linear(torch.eye(12)), data_of(entry, replace(planted(1), name="ok")), 0
    )
    broken, fine, overall = (values(rows, s) for s in ("entry=planted", "entry=ok", ""))
    assert broken["sae_test_accuracy"] is None and overall["sae_test_accuracy"] is None
    assert fine["sae_test_accuracy"] == 1.0
    reason = next(r.reason for r in rows if r.slice == "" and r.metric == "sae_test_accuracy")
    assert "entry=planted" in reason and "not finite" in reason


def test_means_are_over_classes_then_over_entries() -> None:
    easy, hard = planted(0), replace(planted(1, strength=0.05), name="hard")
    rows = evaluate_probing(Linear(torch.eye(12)), data_of(easy, hard), 0, k_values=(1,))
    metric = "sae_top_1_test_accuracy"
    of_entry = []
    for name in ("planted", "hard"):
        of_class = [values(rows, f"entry={name},class={c}")[metric] for c in CLASSES]
        of_entry.append(values(rows, f"entry={name}")[metric])
        assert of_entry[-1] == pytest.approx(sum(of_class) / 3)  # type: ignore[arg-type]
    assert values(rows)[metric] == pytest.approx(sum(of_entry) / 2)


def test_the_same_seed_gives_the_same_rows_and_the_model_its_own_channels() -> None:
    data = data_of(planted(0, strength=0.1))
    assert evaluate_probing(None, data, 5, prefix="llm") == evaluate_probing(
        None, data, 5, prefix="llm"
    )
    channels = values(evaluate_probing(None, data, 5, prefix="x"))
    both_signs = Linear(torch.cat([torch.eye(12), -torch.eye(12)], dim=1))
    assert values(evaluate_probing(both_signs, data, 5, prefix="x")) != channels
    assert not any(name == "probing_constant" for name in channels)


def test_the_standardised_variant_is_not_led_by_scale() -> None:
    entry = planted(0)
    entry.rows[:, 11] *= 1000  # one massive channel of noise
    rows = evaluate_probing(None, data_of(entry), 0, prefix="llm")
    overall = values(rows)
    assert overall["llm_standardised_top_1_test_accuracy"] == 1.0
    assert overall["llm_top_1_test_accuracy"] < 0.7  # type: ignore[operator]


def test_k_below_one_is_refused() -> None:
    with pytest.raises(SettingError, match="k_values = 0"):
        evaluate_probing(None, data_of(planted(0)), 0, k_values=(0,))


# ---------------------------------------------------------------- the model's activations


class Letters:
    """A tokenizer of single letters, as far as it is needed."""

    bos_token_id, eos_token_id, pad_token_id, cls_token_id, sep_token_id = 0, 1, 2, None, None
    all_special_ids = (0, 1, 2)

    def __call__(self, texts: list[str], **options: object) -> dict[str, list[list[int]]]:
        return {"input_ids": [[ord(letter) for letter in text] for text in texts]}


def letters_model() -> Any:
    """A model whose activation is (token id, position); it counts the positions it computes."""

    def activations(ids: Tensor, attention: Tensor, hooks: list[str]) -> dict[str, Tensor]:
        model.computed += ids.numel()
        position = torch.arange(ids.shape[1]).expand_as(ids)
        return {hooks[0]: torch.stack([ids, position], dim=-1).float()}

    config = SimpleNamespace(path="letters", dtype="float32")
    model = SimpleNamespace(
        activations=activations,
        tokenizer=Letters(),
        config=config,
        digest="0",
        computed=0,
        device=torch.device("cpu"),
        d_model=2,
        hook_identity=lambda hook: {},
    )
    return model


def letter_entry(n: int = 200) -> Entry:
    def group(c: str, start: int) -> tuple[str, ...]:
        return tuple(c * (1 + (7 * i) % 30) + chr(200 + start + i) for i in range(n))

    train = {"x": group("x", 0), "y": group("y", n)}
    test = {"x": group("x", 2 * n), "y": group("y", 3 * n)}
    return Entry(
        name="letters", classes=("x", "y"), train=train, test=test, source="made for a test"
    )


def test_rows_come_back_in_the_order_of_the_texts() -> None:
    entry, model = letter_entry(), letters_model()
    data = harvest_probing(model, "hook", [entry], context=20)
    (made,) = data.entries
    assert made.rows.dtype == torch.float16
    texts = [t for side in (entry.train, entry.test) for c in "xy" for t in side[c]]
    for i, text in enumerate(texts):
        rows = made.rows[made.offsets[i] : made.offsets[i + 1]].tolist()
        assert rows == [[ord(letter), p] for p, letter in enumerate(text[:19], start=1)]
    assert made.labels.tolist() == ([0] * 200 + [1] * 200) * 2
    assert made.is_train.tolist() == [True] * 400 + [False] * 400
    assert model.computed < 1.15 * (len(made.rows) + len(texts))  # sorted by length: no padding


def test_a_text_that_the_tokenizer_does_not_know_is_refused_before_the_pass() -> None:
    entry = letter_entry()
    texts = {**entry.test, entry.classes[1]: ("", *entry.test[entry.classes[1]][1:])}
    told = f"a test text of '{entry.classes[1]}' has no token that counts"
    with pytest.raises(SourceError, match=told):
        harvest_probing(letters_model(), "hook", [replace(entry, test=texts)])


def test_activations_beyond_float16_are_refused() -> None:
    model = letters_model()
    small = model.activations
    model.activations = lambda *args: {k: 1e6 * v for k, v in small(*args).items()}
    with pytest.raises(SourceError, match="definition = 1, which stores float32"):
        harvest_probing(model, "hook", [letter_entry(3)])
    data = harvest_probing(model, "hook", [letter_entry(3)], dtype=torch.float32)
    assert data.entries[0].rows.isfinite().all()


def test_saved_data_come_back_and_damage_is_seen(tmp_path: Path) -> None:
    data = harvest_probing(letters_model(), "hook", [letter_entry(30)], context=20)
    data.save(tmp_path)
    again = ProbingData.load(tmp_path, {"hook_name": "hook", "context": 20})
    assert again.digest == data.digest and again.header == data.header
    assert torch.equal(again.entries[0].rows, data.entries[0].rows)
    assert evaluate_probing(None, again, 0) == evaluate_probing(None, data, 0)
    with pytest.raises(MismatchError, match="context = 20, but 64"):
        ProbingData.load(tmp_path, {"context": 64})
    file = tmp_path / "probing.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"\xff")
    with pytest.raises(DamageError, match="does not match its checksum"):
        ProbingData.load(tmp_path)


def test_the_digest_follows_every_tensor() -> None:
    entry = planted(0)
    base = data_of(entry).digest
    changed = entry.rows.clone()
    changed[3, 3] += 1
    assert data_of(replace(entry, rows=changed)).digest != base
    assert data_of(replace(entry, labels=1 - entry.labels)).digest != base
    assert ProbingData((entry,), {"hook_name": "there"}).digest != base


def test_the_embedded_model_tells_conditions_from_other_expressions() -> None:
    entry = next(e for e in embedded_entries(100, 50) if e.name == "expression_role")
    model = load(ModelConfig())
    data = harvest_probing(
        model, "blocks.2.hook_resid_post", [entry], context=32, dtype=torch.float32
    )
    (made,) = data.entries
    alone = replace(
        entry,
        train={c: entry.train[c][:2] for c in entry.classes},
        test={c: () for c in entry.classes},
    )
    few = harvest_probing(
        model, "blocks.2.hook_resid_post", [alone], context=32, dtype=torch.float32
    ).entries[0]
    n = int(few.offsets[2])
    torch.testing.assert_close(few.rows[:n], made.rows[:n], atol=1e-4, rtol=1e-4)
    accuracy = values(evaluate_probing(None, data, 0, prefix="llm"), "entry=expression_role")
    assert 0.65 < accuracy["llm_top_50_test_accuracy"] < 0.95  # type: ignore[operator]
