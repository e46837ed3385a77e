"""Pairs of seeds: who is compared with whom, once, and what is missing and why."""

from __future__ import annotations

from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch

from saelab import checkpoint
from saelab.evals.base import Row
from saelab.launch import seed_pairs
from saelab.launch.latent_table import FILE, write_latents
from saelab.launch.seed_pairs import compare, partners, rows_of_seeds
from saelab.sae import SAEConfig
from saelab.seeding import torch_stream
from saelab.storage.atomic import read_sealed, write_json

D_SAE, D_IN = 12, 8
#: Half of the latents fire in a tenth of the rows, a quarter in 1 of 1000, a quarter never.
DENSITY = torch.tensor([0.1] * 6 + [1e-3] * 3 + [0.0] * 3, dtype=torch.float64)


def cell(cache: Path, name: str, order: list[int] | None = None, seed: int = 0) -> Path:
    """A finished cell whose decoder rows are those of the seed, in another order."""
    sae = SAEConfig.parse({"d_sae": D_SAE}).build(D_IN)
    rows = torch.randn(D_SAE, D_IN, generator=torch_stream(seed, "test rows"))
    order = list(range(D_SAE)) if order is None else order
    with torch.no_grad():
        sae.W_dec.copy_(rows[order])
    folder = cache / "cells" / name
    checkpoint.save(sae, folder, {})
    write_latents(folder / FILE, sae, DENSITY[order])
    write_json(folder / "cell.json", {"rows": []})
    return folder


def values(rows: list[Row]) -> dict[tuple[str, str], float | None]:
    return {(row.metric.removeprefix("consistency."), row.slice): row.value for row in rows}


def test_up_to_nine_seeds_are_all_compared_and_more_in_a_ring() -> None:
    for n in (2, 3, 8, 9):
        assert all(sorted(others) == [j for j in range(n) if j != i]
                   for i, others in partners(range(n)).items())  # fmt: skip
    ring = partners(range(12))
    assert sorted(ring[0]) == [1, 2, 3, 4, 8, 9, 10, 11]
    assert all(i in ring[j] for i, others in ring.items() for j in others)
    assert partners(["alone"]) == {"alone": []}


def test_the_same_dictionary_in_another_order_agrees_wholly(tmp_path: Path) -> None:
    one, other = cell(tmp_path, "b"), cell(tmp_path, "a", list(range(D_SAE))[::-1])
    compare(tmp_path, one, other)
    for own, beside in ((one, other), (other, one)):
        found = values(rows_of_seeds(tmp_path, own, [beside]))
        assert found.pop(("seeds", "")) == found.pop(("seeds_signed", "")) == 1
        assert {where for _, where in found} == {
            "frequency=never", "frequency=-3.0", "frequency=-1.0",
        }  # fmt: skip
        assert set(found.values()) == {1}


def test_a_cell_is_the_mean_over_its_pairs_in_bins_of_its_own(tmp_path: Path) -> None:
    folders = [cell(tmp_path, name, seed=i) for i, name in enumerate("abc")]
    own, *others = folders
    pairs = []
    for other in others:
        compare(tmp_path, other, own)  # in whichever order
        pairs.append(values(rows_of_seeds(tmp_path, own, [other])))
    both = values(rows_of_seeds(tmp_path, own, others))
    for key, value in both.items():
        assert value == pytest.approx((pairs[0][key] + pairs[1][key]) / 2)
    sizes = {"frequency=never": 3, "frequency=-3.0": 3, "frequency=-1.0": 6}
    whole = sum(n * both["seeds", where] for where, n in sizes.items()) / D_SAE
    assert both["seeds", ""] == pytest.approx(whole)
    assert 0 < both["seeds_signed", ""] <= both["seeds", ""] < 1


def test_nothing_is_compared_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one, other = cell(tmp_path, "a"), cell(tmp_path, "b", seed=1)
    compare(tmp_path, one, other)
    (file,) = (tmp_path / "pairs").iterdir()
    assert set(read_sealed(file)) == {"a", "b"}
    monkeypatch.setattr(seed_pairs, "match_dictionaries", lambda *_: pytest.fail("compared again"))
    compare(tmp_path, one, other)
    compare(tmp_path, other, one)


def test_a_damaged_pair_is_named_and_compared_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    one, other = cell(tmp_path, "a"), cell(tmp_path, "b", seed=1)
    compare(tmp_path, one, other)
    (file,) = (tmp_path / "pairs").iterdir()
    wanted = file.read_text()
    file.write_text(wanted.replace('"a"', '"c"'))
    compare(tmp_path, one, other)
    assert file.name in capsys.readouterr().err
    assert file.read_text() == wanted


def test_why_seeds_are_missing(tmp_path: Path) -> None:
    one, failed = cell(tmp_path, "a"), cell(tmp_path, "b")
    (failed / FILE).unlink()
    compare(tmp_path, one, failed)
    assert not (tmp_path / "pairs").exists()
    for own, others, reason in (
        (one, [], "has one seed"),
        (one, [failed], "no other seed"),
        (failed, [one], "failed, or is no SAE"),
    ):
        rows = rows_of_seeds(tmp_path, own, others)
        assert [row.metric for row in rows] == ["consistency.seeds", "consistency.seeds_signed"]
        assert all(row.value is None and reason in row.reason for row in rows)


def test_what_is_known_of_each_latent(tmp_path: Path) -> None:
    plain = pq.read_table(cell(tmp_path, "a") / FILE).to_pydict()
    assert plain == {"latent": list(range(D_SAE)), "density": DENSITY.tolist()}
    data = {"d_sae": D_SAE, "activation": "jumprelu", "observers": ["lifetimes"]}
    sae = SAEConfig.parse(data).build(D_IN)
    sae.observer_parts()[0].get_buffer("firings")[:] = torch.arange(D_SAE)
    write_latents(tmp_path / FILE, sae, DENSITY)
    full = pq.read_table(tmp_path / FILE).to_pydict()
    lives = {"birth", "last_fired", "firings", "resamplings"}
    assert set(full) == {"latent", "density", "threshold", *lives}
    assert full["firings"] == list(range(D_SAE))
    floor = sae.activation.initial_floor()
    assert floor is not None and full["threshold"] == floor.tolist()
