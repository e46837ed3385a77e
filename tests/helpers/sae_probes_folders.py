"""Small data sets in the layout of the package sae-probes."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from pathlib import Path

import pyarrow as pa

from saelab.data.probing.sae_probes import MASTER, SETS, SHIFTED_SETS
from saelab.seeding import numpy_stream

Row = tuple[str, str]


def write_table(path: Path, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Writes a .csv.zst file."""
    text = io.StringIO()
    writer = csv.writer(text)
    writer.writerow(columns)
    writer.writerows(rows)
    path.parent.mkdir(parents=True, exist_ok=True)
    with pa.OSFile(str(path), "wb") as file, pa.CompressedOutputStream(file, "zstd") as stream:
        stream.write(text.getvalue().encode())


def write_master(folder: Path, kinds: dict[str, str]) -> None:
    """Writes the master table: name of a data set -> kind of its task."""
    rows = [["", f"{SETS}/{name}.csv", kind] for name, kind in kinds.items()]
    write_table(folder / MASTER, ["Source", "Dataset save name", "Data type"], rows)


def write_set(folder: Path, name: str, rows: Sequence[Row]) -> None:
    write_table(folder / SETS / f"{name}.csv.zst", ["prompt", "target"], rows)


def write_shifted(folder: Path, name: str, rows: Sequence[Row]) -> None:
    columns = ["prompt", "prompt_len", "target"]
    table = [(prompt, "3", target) for prompt, target in rows]
    write_table(folder / SHIFTED_SETS / f"{name}_OOD.csv.zst", columns, table)


def worded(n: int, seed: int, words: int = 40) -> list[Row]:
    """Texts of words w3, w4 ...; those with label 1 end in an even word."""
    rng = numpy_stream(seed, "test", "sae-probes")
    rows = []
    for i in range(n):
        text = rng.integers(3, words, size=rng.integers(1, 8))
        text[-1] = text[-1] // 2 * 2 + (0 if i % 2 else 1)
        rows.append((" ".join(f"w{w}" for w in text), str(i % 2)))
    return rows


def made_folder(folder: Path, sizes: dict[str, int], shifted: Sequence[str] = ()) -> Path:
    """Writes data sets of these numbers of texts, and 60 shifted texts of those named."""
    write_master(folder, dict.fromkeys(sizes, "Binary Classification"))
    for i, (name, n) in enumerate(sizes.items()):
        write_set(folder, name, worded(n, i))
    for i, name in enumerate(shifted):
        write_shifted(folder, name, worded(60, 100 + i))
    return folder
