"""Finding the SAE in a folder: what the message says where there is none."""

from __future__ import annotations

from pathlib import Path

import pytest

from saelab.errors import SourceError
from saelab.formats import find
from saelab.formats.saelens import FILES


@pytest.mark.parametrize("place", ["seed7", "baseline/seed7", "cells/baseline/seed7-l0_32"])
def test_a_folder_of_saes_names_one_of_them(place: str, tmp_path: Path) -> None:
    folder = tmp_path / place
    folder.mkdir(parents=True)
    for name in FILES:
        (folder / name).write_text("{}", encoding="utf-8")
    assert find(folder) == "saelens"
    with pytest.raises(SourceError, match=f"one of the folders in it, such as '{place}'"):
        find(tmp_path)


def test_an_empty_folder_asks_for_one_with_an_sae(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="name the folder of a saved SAE"):
        find(tmp_path)
