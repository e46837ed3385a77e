"""Every entry of EVALUATIONS, on every kind of subject and data: the same bits again, nothing
changed, rows that are rows. A new entry of the table is tested without another edit here."""

from __future__ import annotations

import random
import re
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from typer.testing import CliRunner

from saelab import api
from saelab.cli import app
from saelab.data.activations.store import MemorySource, Shard
from saelab.data.language_model import LanguageModel, ModelConfig, load
from saelab.data.probing.activations import ProbingData, ProbingEntry
from saelab.data.probing.last_tokens import LastTokens
from saelab.data.probing.sae_probes import SaeProbesConfig
from saelab.data.synthetic.chains import SyntheticConfig, generate
from saelab.errors import SettingError
from saelab.evals import EVALUATIONS, evals_help, of_cell, of_seeds, of_subject
from saelab.evals.base import Row, Subject, Training
from saelab.evals.core import CoreData
from saelab.evals.dictionary_matching import random_directions
from saelab.evals.latent_examples import survey
from saelab.evals.measure import PROBING, EvalData, evaluate, evaluate_seeds
from saelab.evals.signed import one_sided
from saelab.launch.controls import SUBJECTS, Setting
from saelab.sae import SAE as SAEParts
from saelab.sae import SAEConfig
from saelab.seeding import torch_stream

HOOK = "blocks.1.hook_resid_post"
D_SAE = 96
SAE = SAEConfig.parse(
    {
        "d_sae": D_SAE,
        "activation": {"kind": "tied_threshold", "learned": ["theta"]},
        "constraints": ["unit_norm"],
        "observers": ["lifetimes"],
        "initial_l0": 8,
    }
)
DOCS = Path(__file__).parents[2] / "docs" / "evaluations.md"


class Plain:
    """Only what a subject must have."""

    def __init__(self, d_in: int) -> None:
        self.d_in, self.d_sae = d_in, D_SAE
        self.weights = random_directions(D_SAE, d_in, 11)

    def encode(self, x: Tensor) -> Tensor:
        return (x @ self.weights.T - 0.5).relu()

    def decode(self, f: Tensor) -> Tensor:
        return f @ self.weights


@pytest.fixture(scope="module")
def model() -> LanguageModel:
    return load(ModelConfig())


def on_text(model: LanguageModel) -> EvalData:
    """Held-out activations of a model, and probing texts whose classes differ in one channel."""
    draw = torch_stream(0, "test evaluations")
    ids = torch.randint(3, 400, (6, 24), generator=draw)
    mask = torch.ones(ids.shape, dtype=torch.bool)
    mask[:, 0] = False
    x = model.activations(ids, None, [HOOK])[HOOK].float()
    held_out = MemorySource([Shard(x, mask, ids.int())], {"hook_name": HOOK})
    labels = torch.arange(2).repeat_interleave(60)
    is_train = (torch.arange(60) < 40).repeat(2)
    rows = torch.randn(120 * 3, model.d_model, generator=draw)
    rows[torch.arange(360), labels.repeat_interleave(3)] += 3
    offsets = torch.arange(0, 361, 3)
    entry = ProbingEntry(
        name="planted",
        classes=("a", "b"),
        rows=rows,
        offsets=offsets,
        labels=labels,
        is_train=is_train,
    )
    probing = ProbingData((entry,), {"hook_name": HOOK})
    return EvalData(
        CoreData(held_out, model), probing, k_values=(1, 5), sae_probes=last_tokens(model.d_model)
    )


@dataclass(frozen=True, kw_only=True)
class Planted(LastTokens):
    """A data set of last tokens in memory, whose label is in one channel."""

    entry: ProbingEntry

    def load(self, name: str) -> ProbingEntry:
        return self.entry


def last_tokens(d: int, definition: int = 2) -> LastTokens:
    labels = torch.arange(260) % 2
    rows = torch.randn(260, d, generator=torch_stream(0, "test last tokens"))
    rows[:, 0] += 3 * labels
    entry = ProbingEntry(
        name="1_planted",
        classes=("0", "1"),
        rows=rows,
        offsets=torch.arange(261),
        labels=labels,
        is_train=torch.ones(260, dtype=torch.bool),
    )
    config = SaeProbesConfig.parse({"definition": definition, "k_values": [1, 5]})
    return Planted(config=config, folders={entry.name: Path()}, entry=entry)


def as_sae_probes(model: LanguageModel) -> EvalData:
    """The same, probed as sae-probes does."""
    return replace(on_text(model), sae_probes=last_tokens(model.d_model, definition=1))


def on_truth(_: LanguageModel) -> EvalData:
    """Synthetic activations of a hierarchy."""
    config = SyntheticConfig.parse(
        {"d": 16, "features": 32, "l0": 2.5, "correlation": "hierarchical", "positions": 8}
    )
    held_out = generate(config, 0, 60, "held_out")
    return EvalData(CoreData(held_out, None), None, why_no_probing="there are no texts")


def on_text_as_saebench(model: LanguageModel) -> EvalData:
    """The same, probed by definition 1."""
    return replace(on_text(model), definition=1)


DATA = {"text": on_text, "truth": on_truth}
#: Those that any subject can have, and those that need its training.
NAMES = [evaluation.name for evaluation in of_subject()]
OF_TRAINING = [name for name, e in EVALUATIONS.items() if e.needs in ("log", "snapshots")]
#: Name of an evaluation and what makes its data.
CASES = [(name, where) for name in NAMES for where in DATA.values()]
CASES += [(name, on_text_as_saebench) for name in ("probing", "model_channels")]
CASES += [(name, as_sae_probes) for name in ("sae_probes", "sae_probes_channels")]
KINDS = ("SAE", "plain", *SUBJECTS)


def subject_of(kind: str, data: EvalData) -> Subject:
    x = data.core.rows[0]
    if kind == "plain":
        return Plain(x.shape[1])
    if kind in SUBJECTS:
        return SUBJECTS[kind](Setting(x, SAE, 8.0, 3))
    sae = SAE.build(x.shape[1], 1, 3)
    sae.initialise(x, 3)
    return sae.eval()


def state(thing: Any) -> dict[str, Any]:
    """Copies of all that a subject or a model holds."""
    if not isinstance(thing, torch.nn.Module):
        return {k: v.clone() if isinstance(v, Tensor) else v for k, v in vars(thing).items()}
    found: dict[str, Any] = {k: v.detach().clone() for k, v in thing.state_dict().items()}
    found |= {f"{name}.training": module.training for name, module in thing.named_modules()}
    for name, parameter in thing.named_parameters():
        grad = parameter.grad
        found[f"{name}.grad"] = None if grad is None else grad.clone()
        found[f"{name}.requires_grad"] = parameter.requires_grad
    return found


def globals_of(folder: Path) -> dict[str, Any]:
    """What a process has once: random states, switches, files of the working folder."""
    return {
        "torch": torch.get_rng_state(),
        "numpy": repr(np.random.get_state()),  # noqa: NPY002
        "python": random.getstate(),
        "grad": torch.is_grad_enabled(),
        "dtype": torch.get_default_dtype(),
        "threads": torch.get_num_threads(),
        "files": sorted(folder.rglob("*")),
    }


def assert_same(before: dict[str, Any], after: dict[str, Any]) -> None:
    assert before.keys() == after.keys()
    for name, value in before.items():
        own, other = (
            x.cpu().numpy().tobytes() if isinstance(x, Tensor) else x for x in (value, after[name])
        )
        assert own == other, name  # bytes, since a NaN is not equal to itself


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.chdir(tmp_path)
    yield tmp_path


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("name", "where"), CASES)
def test_an_evaluation_repeats_and_changes_nothing(
    name: str,
    where: Callable[[LanguageModel], EvalData],
    kind: str,
    model: LanguageModel,
    folder: Path,
) -> None:
    data = where(model)
    subject = subject_of(kind, data)
    shard = data.core.source.shard(0)
    held_out = {"x": shard.x.clone(), "mask": shard.mask.clone()}
    things = [thing for thing in (subject, data.core.model and data.core.model.model) if thing]
    before, everywhere = [state(thing) for thing in things], globals_of(folder)
    first = evaluate(subject, data, [name])
    assert_same(everywhere, globals_of(folder))
    for thing, own in zip(things, before, strict=True):
        assert_same(own, state(thing))
    assert_same(held_out, {"x": shard.x, "mask": shard.mask})
    assert evaluate(subject, data, [name]) == first  # on what it has cached
    assert evaluate(subject, where(model), [name]) == first  # and on nothing
    assert_rows(first)


def assert_rows(rows: list[Row]) -> None:
    assert rows
    assert max(Counter((row.metric, row.slice) for row in rows).values()) == 1
    for row in rows:
        assert re.fullmatch(r"[A-Za-z][A-Za-z0-9_.]*", row.metric), row
        versioned = re.fullmatch(r"[a-z_]+/[1-9][0-9]*", row.definition)
        assert versioned or row.definition == PROBING[1], row
        assert (row.value is None) == bool(row.reason), row
        assert row.value is None or (type(row.value) is float and np.isfinite(row.value)), row
        assert all("=" in part for part in row.slice.split(",") if row.slice), row
        assert (row.arm, row.seed, row.level) == ("", -1, 0.0), row


def signed_pair(x: Tensor) -> list[SAEParts]:
    """An SAE with signed codes, and the same function with half of its latents turned round."""
    config = SAE.patched({"activation": {"kind": "abs_topk", "k": 8}, "constraints": ()})
    config = config.patched({"initial_l0": None})
    pair = [config.build(x.shape[1], 1, 3) for _ in range(2)]
    for one in pair:
        one.initialise(x, 3)
    with torch.no_grad():
        for weight in (pair[1].W_enc, pair[1].b_enc, pair[1].W_dec):
            weight[::2] *= -1
    return [one.eval() for one in pair]


@pytest.mark.parametrize("where", DATA)
@pytest.mark.parametrize("name", NAMES)
def test_nothing_depends_on_the_signs_of_signed_latents(
    name: str, where: str, model: LanguageModel
) -> None:
    """A latent that is turned round computes the same: a place that takes f for |f| shows here."""
    data = DATA[where](model)
    one, other = signed_pair(data.core.rows[0])
    code = one.encode(data.core.rows[0])
    assert bool((code < 0).any()) and not torch.equal(code, other.encode(data.core.rows[0]))
    rows, turned = (evaluate(sae, data, [name]) for sae in (one, other))
    assert [(r.metric, r.slice, r.reason) for r in rows] == [
        (r.metric, r.slice, r.reason) for r in turned
    ]
    for row, again in zip(rows, turned, strict=True):
        if row.value is not None:
            assert again.value == pytest.approx(row.value, rel=1e-4, abs=1e-5), row


def test_examples_of_signed_latents_are_the_largest_in_size(model: LanguageModel) -> None:
    data = on_text(model)
    surveys = [survey(sae, data.core.source) for sae in signed_pair(data.core.rows[0])]
    torch.testing.assert_close(surveys[0].strongest, surveys[1].strongest)
    assert torch.equal(surveys[0].peaks[0], surveys[1].peaks[0])
    sizes = one_sided(signed_pair(data.core.rows[0])[0]).encode(data.core.rows[0])
    torch.testing.assert_close(surveys[0].strongest[0], sizes.view(-1, 2, D_SAE).amax((0, 1)))


def test_a_signed_code_in_two_halves_is_the_same_code(model: LanguageModel) -> None:
    x = on_text(model).core.rows[0]
    sae = signed_pair(x)[0]
    halves = one_sided(sae)
    f = halves.encode(x)
    assert f.shape[1] == halves.d_sae == 2 * D_SAE and bool((f >= 0).all())
    torch.testing.assert_close(halves.decode(f), sae.decode(sae.encode(x)))
    assert one_sided(Plain(x.shape[1])).d_sae == D_SAE


@pytest.mark.parametrize("name", NAMES)
def test_a_value_is_there_where_its_data_are(name: str, model: LanguageModel) -> None:
    """No evaluation is missing everywhere."""
    found: list[Row] = []
    for make in DATA.values():
        data = make(model)
        found += evaluate(subject_of("SAE", data), data, [name])
    assert any(row.value is not None for row in found)


@pytest.mark.parametrize("where", DATA)
def test_together_they_are_what_they_are_alone(where: str, model: LanguageModel) -> None:
    data = DATA[where](model)
    subject = subject_of("SAE", data)
    alone = [row for name in NAMES for row in evaluate(subject, data, [name])]
    assert evaluate(subject, data, NAMES) == alone
    names = Counter((row.metric, row.slice) for row in alone)
    assert max(names.values()) == 1  # no two evaluations share a name


def test_metrics_of_one_name_have_one_definition(model: LanguageModel) -> None:
    definitions: dict[str, str] = {}
    for make in DATA.values():
        data = make(model)
        for kind in KINDS:
            for row in evaluate(subject_of(kind, data), data, NAMES):
                assert definitions.setdefault(row.metric, row.definition) == row.definition, row


def test_every_definition_is_described(model: LanguageModel) -> None:
    text = DOCS.read_text(encoding="utf-8")
    for make in DATA.values():
        data = make(model)
        rows = evaluate(subject_of("SAE", data), data, [*NAMES, *OF_TRAINING], training())
        missing = {row.definition for row in rows if f"`{row.definition}`" not in text}
        assert not missing


# ---- what only a launch has --------------------------------------------------------------------


@dataclass
class Log:
    """A loss that falls, with the norm of its gradient and one learned scalar."""

    columns: dict[str, np.ndarray]
    length: int

    @property
    def loss(self) -> np.ndarray:
        return self.columns["loss"][: self.length]


@dataclass
class Decoders:
    tokens: list[int]
    decoders: list[Tensor]


def training(stopped: int | None = None) -> Training:
    steps = np.arange(1, 201)
    columns = {"loss": 1 + 1 / steps, "grad_norm": 1 / steps, "theta": 1 - 1 / steps}
    rows = [random_directions(D_SAE, 16, 5, draw) for draw in range(3)]
    return Training(Log(columns, 200), stopped, Decoders([10, 100, 1000], rows), 50.0)


@pytest.mark.parametrize("name", OF_TRAINING)
def test_an_evaluation_of_the_training_gives_rows(name: str, model: LanguageModel) -> None:
    data = on_truth(model)
    subject = subject_of("SAE", data)
    rows = evaluate(subject, data, [name], training())
    assert_rows(rows)
    assert any(row.value is not None for row in rows)
    assert evaluate(subject, data, [name], training()) == rows


def test_only_some_evaluations_measure_a_cell_that_failed(model: LanguageModel) -> None:
    data = on_truth(model)
    names = of_cell(at_target=True, failed=True)
    rows = evaluate(subject_of("SAE", data), data, names, training(stopped=120))
    assert_rows(rows)
    assert {row.reason for row in rows} == {"", "training stopped at step 120"}


def test_comparisons_with_other_seeds_give_rows() -> None:
    names = ("consistency.seeds", "consistency.seeds_signed")
    pair = {name: {"-1.0": (3.0, 4), "never": (0.5, 2)} for name in names}
    rows = evaluate_seeds([pair, pair], of_seeds())
    assert_rows(rows)
    assert rows[0].value == pytest.approx(3.5 / 6)
    assert {row.reason for row in evaluate_seeds("the arm has one seed", of_seeds())} == {
        "the arm has one seed"
    }


@pytest.mark.parametrize("name", sorted({*EVALUATIONS} - {*NAMES}))
def test_what_needs_a_training_is_refused_by_name(name: str, model: LanguageModel) -> None:
    data = on_truth(model)
    with pytest.raises(SettingError, match=rf"'{name}': needs the .* a saved SAE"):
        evaluate(subject_of("plain", data), data, ["core", name])


# ---- the table in help and documents -----------------------------------------------------------


def test_the_command_and_the_api_describe_them_all() -> None:
    shown = CliRunner().invoke(app, ["eval", "--help"], env={"COLUMNS": "4000"}).output
    assert " ".join(evals_help().split()) in " ".join(shown.split())
    assert all(re.search(rf"\b{name}\b", shown) for name in EVALUATIONS)
    text = api.evaluate.__doc__ or ""
    assert all(f"'{one.name}': {one.description}\n" in text for one in of_subject())


def test_the_list_in_the_documents_is_the_table() -> None:
    """A failure prints the lines to put into docs/evaluations.md."""
    expected = [
        f"| `{one.name}` | {one.at} | {one.needs} | {one.description} |"
        for one in EVALUATIONS.values()
    ]
    _, _, rest = DOCS.read_text(encoding="utf-8").partition("| name | measures | needs |")
    listed = [line for line in rest.partition("\n\n")[0].splitlines() if line.startswith("| `")]
    assert listed == expected, "\n".join(expected)
