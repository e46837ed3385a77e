"""Consistency of a decoder with its own past, and with the decoders of other seeds.

    m(s, t)               mean matched |cosine| of the decoder at s tokens with that at t
                          (dictionary_matching)
    consistency.snapshots m(t, end), slice 'tokens=t'; snapshots_signed: the signed cosines of the
                          same pairs (of random dictionaries: about 0)
    consistency.half_life tokens from s until m(s, .) falls below (1 + chance) / 2, that is until
                          half of its excess over chance is gone; between two snapshots
                          interpolated on a line in log tokens
    consistency.chance    mean matched |cosine| of random dictionaries of the shape

The half-life is given from every snapshot s at or after the end of warm-up ('from=s'), and without
a slice from the first of these. A latent that was resampled keeps its index and is not matched by
it: all latents are matched anew for each pair of snapshots.

    consistency.seeds     mean matched |cosine| with other seeds of the arm, and by the latent's
                          held-out firing frequency ('frequency=-3.5': its log10 is in [-3.5, -3))
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import cache

from torch import Tensor

from saelab.evals.base import Row, SeedPair, Subject, Training, missing, number
from saelab.evals.dictionary_matching import chance_cosines, matched_cosines, same_index_mean
from saelab.evals.measure import EvalData

DEFINITION = "agreement/1"
OF_SNAPSHOTS = ("consistency.snapshots", "consistency.snapshots_signed", "consistency.half_life")
OF_CHANCE = ("consistency.chance", "consistency.chance_signed")
OF_SEEDS = ("consistency.seeds", "consistency.seeds_signed")
#: Width of the frequency bins in log10, and the lowest edge, below which all share one bin.
BIN, LOWEST = 0.5, -5.0


def evaluate_snapshots(subject: Subject, data: EvalData, training: Training) -> list[Row]:
    """Computes the rows of one cell: its decoder against its earlier states, and chance."""
    snapshots = training.snapshots
    if snapshots is None:
        reason = "only an SAE made of parts has decoder rows"
        return missing_agreement(reason, (*OF_SNAPSHOTS, *OF_CHANCE))
    expected = chance_cosines(subject.d_sae, getattr(subject, "d_out", subject.d_in), data.seed)
    tokens, decoders = snapshots.tokens, snapshots.decoders
    rows = snapshot_rows(tokens, decoders, training.settled, expected[0])
    return rows + chance_rows(expected)


def chance_rows(chance: tuple[float, float]) -> list[Row]:
    """Builds the rows of chance, absolute and signed as in `chance_cosines`."""
    return [number(name, v, DEFINITION) for name, v in zip(OF_CHANCE, chance, strict=True)]


def missing_agreement(reason: str, names: Sequence[str]) -> list[Row]:
    """Builds rows without values."""
    return [missing(name, DEFINITION, reason) for name in names]


def snapshot_rows(
    tokens: Sequence[int], decoders: Sequence[Tensor], settled: float, chance: float
) -> list[Row]:
    """Computes the cosines of each snapshot with the last one, and half-lives.

    Args:
        tokens: of the run when each snapshot was taken, rising; the last is the end.
        decoders: rows [d_sae, d_in] each, of any length.
        settled: tokens at which warm-up ends.
        chance: mean matched |cosine| of random dictionaries.
    """
    if not tokens:
        return missing_agreement("no snapshots are taken (evaluation.snapshots is 0)", OF_SNAPSHOTS)
    rows, end = [], len(tokens) - 1
    to_end: list[float] = []
    for i, decoder in enumerate(decoders):
        cosines = matched_cosines(decoder, decoders[end]) if i < end else decoder.new_ones(1)
        to_end.append(float(cosines.abs().mean()))
        where = f"tokens={tokens[i]}"
        rows.append(number(OF_SNAPSHOTS[0], to_end[i], DEFINITION, where))
        rows.append(number(OF_SNAPSHOTS[1], float(cosines.mean()), DEFINITION, where))

    @cache
    def matched(i: int, j: int) -> float:
        if j == end:
            return to_end[i]
        return float(matched_cosines(decoders[i], decoders[j]).abs().mean())

    def least(i: int, j: int) -> float:
        return same_index_mean(decoders[i], decoders[j])

    level = (1 + chance) / 2
    starts = [i for i in range(end) if tokens[i] >= settled]
    if not starts:
        reason = "no snapshot lies between the end of warm-up and that of the run"
        return [*rows, missing(OF_SNAPSHOTS[2], DEFINITION, reason)]
    lives = {i: half_life(tokens, i, level, matched, least) for i in starts}
    rows.append(_half_life_row(lives[starts[0]], level, ""))
    return rows + [_half_life_row(life, level, f"from={tokens[i]}") for i, life in lives.items()]


def half_life(
    tokens: Sequence[int],
    start: int,
    level: float,
    matched: Callable[[int, int], float],
    least: Callable[[int, int], float],
) -> float | None:
    """Tokens from snapshot `start` until `matched(start, .)` first falls below `level` < 1; None
    when it does not. `least` is a cheap lower bound of `matched`, and sufficient for most pairs."""
    for j in range(start + 1, len(tokens)):
        if least(start, j) >= level or matched(start, j) >= level:
            continue
        before = matched(start, j - 1) if j - 1 > start else 1.0
        share = (before - level) / (before - matched(start, j))
        low, high = math.log(tokens[j - 1]), math.log(tokens[j])
        return math.exp(low + share * (high - low)) - tokens[start]
    return None


def _half_life_row(life: float | None, level: float, where: str) -> Row:
    if life is None:
        reason = f"the matched cosine did not fall below half ({level:.3f}) by the end"
        return missing(OF_SNAPSHOTS[2], DEFINITION, reason, where)
    return number(OF_SNAPSHOTS[2], life, DEFINITION, where)


# ---- frequency -------------------------------------------------------------------------------


def sums_by_frequency(values: Tensor, density: Tensor) -> dict[str, tuple[float, int]]:
    """Sums values [n] of latents by bin of their held-out firing share [n].

    Returns: bin -> sum and number of its values, without empty bins; latents that never fire are
        in 'never'.
    """
    logs = density.double().log10().clamp_min(LOWEST)
    edges = (LOWEST + BIN * ((logs - LOWEST) / BIN).floor()).clamp_max(-BIN)
    groups = {f"{edge:.1f}": edges == edge for edge in edges[density > 0].unique().tolist()}
    bins = {"never": density == 0} | {name: group & (density > 0) for name, group in groups.items()}
    return {
        name: (float(values[group].sum()), int(group.sum()))
        for name, group in bins.items()
        if group.any()
    }


def evaluate_seeds(pairs: Sequence[SeedPair] | str) -> list[Row]:
    """Computes the rows of one cell; `pairs` as in `seed_rows`, or why there are none."""
    return missing_agreement(pairs, OF_SEEDS) if isinstance(pairs, str) else seed_rows(pairs)


def seed_rows(pairs: Sequence[SeedPair]) -> list[Row]:
    """Computes the rows of one cell.

    Args:
        pairs: for each pair with another seed, metric of `OF_SEEDS` -> `sums_by_frequency` of this
            cell's latents.
    """
    rows = []
    for metric in OF_SEEDS:
        bins: dict[str, list[tuple[float, int]]] = {}
        for pair in pairs:
            for name, (total, count) in pair[metric].items():
                bins.setdefault(name, []).append((total, count))
        everything = [sums for group in bins.values() for sums in group]
        rows.append(number(metric, _mean(everything), DEFINITION))
        for name in sorted(bins, key=_edge):
            rows.append(number(metric, _mean(bins[name]), DEFINITION, f"frequency={name}"))
    return rows


def _mean(sums: Sequence[tuple[float, int]]) -> float:
    return sum(total for total, _ in sums) / sum(count for _, count in sums)


def _edge(name: str) -> float:
    return -math.inf if name == "never" else float(name)
