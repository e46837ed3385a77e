"""With the peers themselves: SAELens computes what ours does, and ours what each of them does.

    make test-peers         makes benchmarks/.peers first

or SAELAB_PEERS names a python that has sae-lens, eai-sparsify and dictionary-learning.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peers import peers_python, run_worker
from published_saes import BY_NAME, LAYOUTS
from saes import D_IN, D_SAE, N, clear, rows, same, trained, trained_sae
from safetensors.torch import load_file, save_file

from saelab import formats
from saelab.checks.examples import cases
from saelab.errors import SettingError
from saelab.formats.saelens_fields import RULES
from saelab.parts.base import Form
from saelab.row_norm import RowNorm
from saelab.sae import SAE, SAEConfig

pytestmark = pytest.mark.peers
WORKER = Path(__file__).with_name("peers_worker.py")


def fits(config: SAEConfig) -> bool:
    """Says whether such an SAE can be built, and has a form of other tools."""
    try:
        return isinstance(config.build(D_IN).activation.export(), Form)
    except SettingError:
        return False


OURS = {
    f"{activation}-{scaling and scaling.kind}": config
    for activation in cases(D_SAE, "activation", first=True)
    for scaling in (None, *cases(D_SAE, "scaling", first=True))
    if fits(config := activation.settings(D_SAE, scaling=scaling and scaling.part))
}
THEIRS = [
    *(f"saelens-{n}" for n in ("standard", "standard-uncentred", "topk", "topk-rescaled")),
    *(f"saelens-{n}" for n in ("abstopk", "jumprelu", "gated", "topk-trained", "batchtopk")),
    *(f"saelens-{n}" for n in ("jumprelu-trained", "gated-trained", "matching_pursuit")),
    *(f"saelens-{n}" for n in ("topk-layer_norm", "standard-constant_norm")),
    *(f"saelens-{n}-inference" for n in ("topk-trained", "batchtopk", "jumprelu-trained")),
    *(f"saelens-{n}" for n in ("expected_average_only_in", "covariance_whitening")),
    *(f"saelens-{n}" for n in ("gated-trained-inference", "standard-old", "topk-old")),
    "sparsify-layers.3",
    *(f"dictionary_learning-{n}" for n in ("AutoEncoder", "AutoEncoderNew", "GatedAutoEncoder")),
    *(f"dictionary_learning-{n}" for n in ("AutoEncoderTopK", "BatchTopKSAE")),
    *(f"dictionary_learning-{n}" for n in ("MatryoshkaBatchTopKSAE", "JumpReluAutoEncoder")),
]


#: Ours that normalise each row, as readers of published SAEs leave them.
ROW_NORMS: dict[str, RowNorm] = {"topk-layer_norm": "layer_norm", "topk-norm": "norm"}


@pytest.fixture(scope="module")
def saes() -> dict[str, SAE]:
    saes = {name: trained_sae(config) for name, config in OURS.items()}
    for name, norm in ROW_NORMS.items():
        saes[name] = trained(activation={"kind": "topk", "k": 4}, constraints=["unit_norm"])
        saes[name].row_norm = norm
    return saes


@pytest.fixture(scope="module")
def answers(saes: dict[str, SAE], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Everything that the peers computed, in one process of theirs."""
    peers_python()
    folder = tmp_path_factory.mktemp("peers")
    x = rows(1)
    for name, sae in saes.items():
        place = folder / "ours" / name
        formats.saver("saelens")(sae, place, {"model": "gpt2"})
        save_file({"x": clear(sae, x)}, place / "rows.safetensors")
    save_file({"x": x}, folder / "rows.safetensors")
    run_worker(WORKER, folder)
    return folder


@pytest.mark.parametrize("name", [*OURS, *ROW_NORMS])
def test_saelens_computes_what_ours_does(name: str, saes: dict[str, SAE], answers: Path) -> None:
    place, sae = answers / "ours" / name, saes[name]
    x, found = load_file(place / "rows.safetensors")["x"], load_file(place / "answer.safetensors")
    assert len(x) > N // 2
    f = sae.encode(x)
    assert bool((f > 0).any())
    form = sae.activation.export()
    pursuit = isinstance(form, Form) and form.pursuit is not None
    same(found["f"], f * sae.scale if pursuit else f)
    same(found["x_hat"], sae.complete(sae.decode(f), x))


@pytest.mark.parametrize("name", [layout.name for layout in LAYOUTS])
def test_published_saes_are_what_saelens_loads(name: str, answers: Path) -> None:
    layout = BY_NAME[name]
    named = layout.format if formats.TABLE[layout.format].by_name else ""
    compare(answers / "published" / name, layout.path, named, layout.targets)


@pytest.mark.parametrize("name", [layout.name for layout in LAYOUTS if layout.transposed])
def test_saelens_multiplies_with_the_transposed_skip_connection(name: str, answers: Path) -> None:
    found = load_file(answers / "published" / name / "answer.safetensors")
    apart = (found["as_read"] - found["x_hat"]).abs().max()
    assert float(apart) > 0.1 * float(found["x_hat"].abs().max())


def test_every_loader_of_theirs_is_in_the_documentation(answers: Path) -> None:
    page = (Path(__file__).parents[2] / "docs" / "formats.md").read_text()
    loaders = json.loads((answers / "loaders.json").read_text())
    assert len(loaders) == 15
    rows = re.findall(r"^\| `(\w+)` \| ", page.split("## SAELens' loaders")[1], re.MULTILINE)
    assert sorted(rows) == sorted(loaders)


@pytest.mark.parametrize("name", THEIRS)
def test_ours_computes_what_they_do(name: str, answers: Path) -> None:
    named = "dictionary_learning" if name.startswith("dictionary_learning") else ""
    compare(answers / "theirs" / name, lambda place: place, named)


@pytest.mark.parametrize("name", [n for n in THEIRS if n.startswith("dictionary_learning")])
def test_saelens_reads_dictionary_learning_as_ours_does(name: str, answers: Path) -> None:
    place = answers / "theirs" / name
    file = place / "saelens.safetensors"
    assert file.is_file() == (not name.endswith("AutoEncoderNew"))  # which it can't read
    if not file.is_file():
        return
    sae, found = formats.load(place, "dictionary_learning").sae, load_file(file)
    x = load_file(place / "rows.safetensors")["x"]
    kept = (x[:, None] == clear(sae, x)[None]).all(2).any(1)
    f = found["f"][kept]
    if name.endswith("-AutoEncoder"):  # the library's own loader moves the norms into the code
        weights = torch.load(place / "ae.pt", weights_only=True)
        f = f * weights["decoder.weight"].norm(dim=0)
    same(sae.encode(x[kept]), f)
    same(sae.decode(f), found["x_hat"][kept])


def compare(place: Path, sae_in: Callable[[Path], Path], named: str, targets: int = 1) -> None:
    """The SAE that we read in `place` computes what the peers have put there; of several targets
    they have the sum."""
    sae = formats.load(sae_in(place), named).sae
    x, found = load_file(place / "rows.safetensors")["x"], load_file(place / "answer.safetensors")
    kept = clear(sae, x)
    rows_kept = (x[:, None] == kept[None]).all(2).any(1)
    assert int(rows_kept.sum()) > N // 2
    f = found["f"][rows_kept]
    assert 0 < float((f > 0).float().mean()) < 1
    same(sae.encode(x[rows_kept]), f)
    x_hat = sae.complete(sae.decode(f), x[rows_kept])
    same(x_hat.unflatten(1, (targets, -1)).sum(1), found["x_hat"][rows_kept])


def test_all_that_they_wrote_is_tried(answers: Path) -> None:
    assert {place.name for place in (answers / "theirs").iterdir()} == set(THEIRS)


def test_every_field_of_theirs_is_known(answers: Path) -> None:
    found = json.loads((answers / "fields.json").read_text())
    assert len(found) == 14
    assert {name for names in found.values() for name in names} - {"metadata"} <= set(RULES)


def test_the_rows_of_a_test_are_not_all_alike() -> None:
    assert len(torch.unique(rows(1), dim=0)) == N
