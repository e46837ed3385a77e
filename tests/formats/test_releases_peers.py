"""The table of releases next to SAELens' own list (`make test-peers`)."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
from peers import run_worker

from saelab.formats.hub.releases import CANONICAL, model_on_hub, releases, sae_of

pytestmark = pytest.mark.peers
#: Releases on the tuned model, which SAELens' list gives the base model's name.
TUNED = {"gemma-scope-9b-it-res"}
LOADERS = {
    "gemma_scope": {"gemma_2", "gemma_2_transcoder"},
    "gemma_scope_2": {"gemma_3"},
    "layer_transcoder": {"mwhanna_transcoder"},
    "llama_scope": {"llama_scope"},
    "llama_scope_r1": {"llama_scope_r1_distill"},
    "dictionary_learning": {"dictionary_learning_1"},
    "saelens": {None},
}


@pytest.fixture(scope="module")
def theirs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    out = tmp_path_factory.mktemp("releases") / "table.json"
    run_worker(Path(__file__).with_name("releases_worker.py"), out)
    return json.loads(out.read_text())


def last(name: str) -> str:
    return name.rpartition("/")[2].lower()


def test_every_sae_of_a_release_has_the_place_that_saelens_gives_it(
    theirs: dict[str, dict[str, Any]],
) -> None:
    compared = 0
    for name, release in releases().items():
        if name not in theirs:  # a size that SAELens does not list
            continue
        listed = theirs[name]
        assert release.repo == listed["repo"], name
        assert listed["loader"] in LOADERS.get(release.format, {release.format}), name
        if name not in TUNED:
            assert last(release.model) == last(model_on_hub(listed["model"])), name
        for id, path in listed["saes"].items():
            stated = sae_of(name, id)
            assert (stated.path, stated.l0) == (path, None), (name, id)
            compared += 1
    assert compared > 10_000


def test_most_combinations_of_choices_are_releases_of_saelens(
    theirs: dict[str, dict[str, Any]],
) -> None:
    ours = set(releases())
    assert ours - set(theirs) <= {f"gemma-scope-2-27b-pt-{kind}" for kind in missing_of_27b()}


def missing_of_27b() -> Iterable[str]:
    """Kinds of Gemma Scope 2 on the largest model that SAELens does not list."""
    yield from ("mlp", "mlp-all", "att", "att-all", "transcoders")


def test_canonical_follows_from_the_l0s_there_are(theirs: dict[str, dict[str, Any]]) -> None:
    """SAELens lists the canonical SAE of each folder: the L0 nearest to 100."""
    compared = 0
    for name, listed in theirs.items():
        if not name.endswith(CANONICAL):
            continue
        everything = theirs[name.removesuffix(CANONICAL)]["saes"].values()
        for id, path in listed["saes"].items():
            stated = sae_of(name, id)
            if stated.l0 is None:  # one that SAELens chose otherwise
                assert path == stated.path
                continue
            pattern = re.escape(stated.path).replace(r"\*", r"(\d+)")
            numbers = [int(m[1]) for one in everything if (m := re.fullmatch(pattern, one))]
            assert stated.l0 == 100
            nearest = min(numbers, key=lambda number: (abs(number - 100), number))
            assert path == stated.path.replace("*", str(nearest))
            compared += 1
    assert compared > 400
