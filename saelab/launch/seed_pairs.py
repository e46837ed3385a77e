"""Do several seeds of an arm learn the same dictionary? Each pair is compared once.

Seeds stand in a ring in the order of the study, and each is compared with the `NEXT` ones after it:
all pairs up to 2 NEXT + 1 seeds, so that each seed then counts as often as any other and the work
grows with the number of seeds and not with its square. A worker that has finished a cell compares
it with those partners that are finished too; what is left is done when the launch collects. What a
pair gives lies in the cache under the hashes of its two cells, `pairs/<hash>.json`:

    {hash of a cell: {metric: {frequency bin: [sum of matched cosines, latents]}}}

the bin being that of this cell's own latent. A cell that failed has no `latents.parquet` and
belongs to no pair.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from safetensors import safe_open
from torch import Tensor

from saelab.config import digest
from saelab.errors import DamageError
from saelab.evals import of_seeds
from saelab.evals.base import Row, SeedPair, number
from saelab.evals.dictionary_consistency import DEFINITION, OF_SEEDS, sums_by_frequency
from saelab.evals.dictionary_matching import Agreement, match_dictionaries
from saelab.evals.measure import evaluate_seeds
from saelab.launch.latent_table import FILE, read_density
from saelab.runs.schema import PAIR
from saelab.storage.atomic import check_key, read_sealed, write_sealed

T = TypeVar("T")

#: Seeds after it that each seed is compared with. Our choice: all pairs up to 9 seeds.
NEXT = 4


def partners(members: Sequence[T]) -> dict[T, list[T]]:
    """Those that each member of a ring is compared with, itself and repetitions left out."""
    n = len(members)
    reach = [step for step in range(-NEXT, NEXT + 1) if step]
    return {
        one: list(dict.fromkeys(o for step in reach if (o := members[(i + step) % n]) != one))
        for i, one in enumerate(members)
    }


def compare(cache: Path, one: Path, other: Path) -> None:
    """Compares two cells, by their folders, unless that is done or one of them is not there."""
    if _is_compared(cache, one, other) or not (_comparable(one) and _comparable(other)):
        return
    first, second = sorted((one, other), key=lambda folder: folder.name)
    found = match_dictionaries(_decoder(first), _decoder(second))
    sides = {first: found, second: found.transpose()}
    sums = {cell.name: _sums(side, read_density(cell / FILE)) for cell, side in sides.items()}
    write_sealed(_file(cache, one, other), sums)


def rows_of_seeds(
    cache: Path, own: Path, others: Sequence[Path], extra: Sequence[str] = ()
) -> list[Row]:
    """The rows of one cell, whose pairs have been compared.

    Args:
        own: its folder.
        others: those of the other seeds that it is compared with.
        extra: `evaluation.extra` of the launch.
    """
    return evaluate_seeds(_pairs(cache, own, others), of_seeds(extra))


def rows_of_pairs(cache: Path, own: Path, others: Mapping[int, Path]) -> list[Row]:
    """The rows of each pair of a cell, over all latents: what an interval of their mean is made of.

    Args:
        own: its folder.
        others: seed -> folder of a cell that it has been compared with.
    """
    rows = []
    for seed, other in others.items():
        if _comparable(own) and _file(cache, own, other).is_file():
            for metric, bins in _read(cache, own, other)[own.name].items():
                total, latents = (sum(part) for part in zip(*bins.values(), strict=True))
                rows.append(number(metric, total / latents, DEFINITION, f"{PAIR}{seed}"))
    return rows


def _pairs(cache: Path, own: Path, others: Sequence[Path]) -> list[SeedPair] | str:
    """A cell's side of each of its pairs, or the reason why there are none."""
    if not others:
        return "the arm has one seed"
    if not _comparable(own):
        return "the cell failed, or is no SAE made of parts"
    present = [other for other in others if _file(cache, own, other).is_file()]
    pairs = [_read(cache, own, other)[own.name] for other in present]
    return pairs or "no other seed of the arm has a trained SAE"


def _is_compared(cache: Path, one: Path, other: Path) -> bool:
    """Returns True if a pair was compared; a file that is damaged, or of another pair, is named on
    stderr."""
    if not _file(cache, one, other).is_file():
        return False
    try:
        return bool(_read(cache, one, other))
    except DamageError as error:
        print(f"{error} (done now)", file=sys.stderr)
        return False


def _read(cache: Path, one: Path, other: Path) -> dict[str, SeedPair]:
    """Cell -> its side of a pair.

    Raises: DamageError when the file was changed, or is of another pair.
    """
    file = _file(cache, one, other)
    pair = read_sealed(file)
    check_key(sorted(pair), sorted((one.name, other.name)), file)
    return pair


def _file(cache: Path, one: Path, other: Path) -> Path:
    return cache / "pairs" / f"{digest(sorted((one.name, other.name)))}.json"


def _comparable(folder: Path) -> bool:
    return all((folder / name).is_file() for name in ("cell.json", FILE, "sae.safetensors"))


def _decoder(folder: Path) -> Tensor:
    with safe_open(folder / "sae.safetensors", framework="pt") as file:
        return file.get_tensor("W_dec")


def _sums(found: Agreement, density: Tensor) -> dict[str, Any]:
    values = dict(zip(OF_SEEDS, (found.absolute, found.signed), strict=True))
    return {name: sums_by_frequency(value, density) for name, value in values.items()}
