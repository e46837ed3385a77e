"""Recovery of known features: each by one latent, which fires when the feature does.

With C_ji = cos(decoder row j, true direction i), and pi an assignment of distinct latents to
features that is optimal for the whole (Hungarian algorithm):

    mcc          mean over the pairs of |C_pi(i)i|, pi the best for |C|
    mcc_signed   mean over the pairs of C_pi(i)i, pi the best for C
    firing_f1    mean over i of 2 both_i / (fires_i + fires_pi(i)), pi of mcc; features that fire in
                 no row of the data are left out, one without a latent counts as 0; a latent fires
                 where its code is not zero
    uniqueness   features that are near_j = argmax_i |C_ji| of some latent j, over latents
    latent_precision, latent_recall, latent_f1
                 mean over latents j of both_j / fires_j, both_j / fires_near_j and their harmonic
                 mean, as detectors of near_j; 0 where a denominator is

There are min(latents, features) pairs. All but mcc_signed and firing_f1 are SAELens' (its mcc,
uniqueness, precision, recall and f1_score; benchmarks/synthetic_parity.py). Each is also given for
`chance`, random unit directions of the same shape (mean of `DRAWS`; as a code for firing_f1 the
largest projections, as many per row as the subject has on average). `oracle` rows are for the true
directions with the true code: the noise floor of FVU, and the true L0. FVU, explained variance, L0
and dead latents of the subject are rows of `core`.

Sources: MCC, Hyvarinen and Morioka 2016; for dictionaries, Sharkey et al. 2022, who average the
largest cosine of each feature instead of assigning.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor
from torch.nn.functional import normalize

from saelab.data.activations.store import Source
from saelab.data.synthetic.chains import KnownTruth
from saelab.errors import MismatchError
from saelab.evals.base import Row, Subject, missing, needs_contexts, number
from saelab.evals.dictionary_matching import DRAWS, assign, random_directions
from saelab.evals.signed import one_sided

DEFINITION = "truth/2"
LATENT = ("latent_precision", "latent_recall", "latent_f1")
SCORES = ("mcc", "mcc_signed", "uniqueness", "firing_f1", *LATENT)
ORACLE = ("oracle_fvu", "oracle_explained_variance", "oracle_l0")
METRICS = (
    *SCORES,
    *(f"chance_{name}" for name in SCORES),
    *(f"oracle_{name}" for name in SCORES),
    *ORACLE,
)
#: Rows whose dense codes are made at once. Our choice.
CHUNK = 2048


@torch.no_grad()
def evaluate_truth(
    subject: Subject, source: Source, truth: KnownTruth, seed: int = 0, device: str = "cpu"
) -> list[Row]:
    """Computes the rows of one subject.

    Args:
        source: held-out activations.
        truth: their known features.
        seed: of the random dictionaries.
        device: of the subject.

    Raises: MismatchError for a subject of another width.
    """
    d = truth.config.d
    if subject.d_in != d:
        raise MismatchError(f"the subject has d_in = {subject.d_in}, the activations have d = {d}")
    subject = one_sided(subject)
    true = truth.directions
    firings = _Firings(_match(directions(subject, device), true))
    oracle = _Firings(_match_truth(true))
    active = error = power = rows = 0.0
    mean = _mean(source)
    for x, f, codes in coded_rows(subject, source, truth, device):
        fires, f = codes != 0, f != 0
        firings.count(f, fires)
        oracle.count(fires, fires)
        active, rows = active + float(f.sum()), rows + len(x)
        error += float((x - codes @ true - truth.offset).square().sum(dtype=torch.float64))
        power += float((x - mean).square().sum(dtype=torch.float64))
    k = min(subject.d_sae, max(1, round(active / rows)))
    values = {
        **firings.scores(),
        **_add_prefix("chance", _chance(source, truth, subject.d_sae, k, seed)),
        **_add_prefix("oracle", oracle.scores()),
        "oracle_fvu": error / power,
        "oracle_explained_variance": 1 - error / power,
        "oracle_l0": float(oracle.fires.sum()) / rows,
    }
    return [number(name, values[name], DEFINITION) for name in METRICS]


def _add_prefix(prefix: str, scores: dict[str, float]) -> dict[str, float]:
    return {f"{prefix}_{name}": value for name, value in scores.items()}


def missing_truth() -> list[Row]:
    """Builds the rows for data whose features are not known."""
    reason = "the true features of these activations are not known"
    return [missing(name, DEFINITION, reason) for name in METRICS]


@torch.no_grad()
def directions(subject: Subject, device: str = "cpu") -> Tensor:
    """Unit decoder vectors of a subject's latents, float32 [d_sae, d_in]; zeros stay zero."""
    return normalize(decoder_vectors(subject, device), dim=1)


@torch.no_grad()
def decoder_vectors(subject: Subject, device: str = "cpu") -> Tensor:
    """Decoder vectors of a subject's latents, float32 [d_sae, d_in].

    Row j is decode(e_j) - decode(0), for any affine decoder.
    """
    origin = subject.decode(torch.zeros(1, subject.d_sae, device=device, dtype=torch.float32))
    parts = []
    for start in range(0, subject.d_sae, CHUNK):
        count = min(CHUNK, subject.d_sae - start)
        one = torch.zeros(count, subject.d_sae, device=device, dtype=torch.float32)
        one[torch.arange(count), start + torch.arange(count)] = 1
        parts.append(subject.decode(one) - origin)
    return torch.cat(parts).float().cpu()


def mcc(rows: Tensor, true: Tensor, signed: bool = False) -> float:
    """Mean correlation coefficient of rows [m, d] with true rows [features, d], over the pairs."""
    cosine = _cosine(rows, true)
    similarity = cosine if signed else cosine.abs()
    return float(similarity[assign(similarity)].mean())


def _cosine(rows: Tensor, true: Tensor) -> Tensor:
    return normalize(rows.double(), dim=1) @ normalize(true.double(), dim=1).T


def uniqueness(rows: Tensor, true: Tensor) -> float:
    """Number of distinct rows of `true` [features, d] that are nearest, up to sign, to any of the
    rows [m, d], over m."""
    return len(_cosine(rows, true).abs().argmax(1).unique()) / len(rows)


def paired_rows(source: Source, truth: KnownTruth) -> Iterator[tuple[Tensor, Tensor]]:
    """Yields activations [n, d] and true codes [n, features] of the rows, in blocks of contexts."""
    contexts = max(1, CHUNK // truth.config.positions)
    for i in range(source.n_shards):
        rest = source.shard(i).x
        for codes in truth.chunks(i):
            x, rest = rest[: len(codes)], rest[len(codes) :]
            pair = zip(x.split(contexts), codes.split(contexts), strict=True)
            yield from ((block.flatten(0, 1), true.flatten(0, 1)) for block, true in pair)


def coded_rows(
    subject: Subject, source: Source, truth: KnownTruth, device: str = "cpu"
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Yields activations [n, d], the subject's code [n, d_sae] and the true code [n, features] of
    the rows, in blocks of contexts, on the CPU."""
    for x, codes in paired_rows(source, truth):
        context = (_starts(x, truth).to(device),) if needs_contexts(subject) else ()
        yield x, subject.encode(x.to(device), *context).cpu(), codes


def _starts(x: Tensor, truth: KnownTruth) -> Tensor:
    """First rows of the contexts, and the number of rows; int64 [contexts + 1]."""
    return torch.arange(0, len(x) + 1, truth.config.positions)


@dataclass(frozen=True, eq=False, kw_only=True)
class _Match:
    """Pairs of latents and features, and the scores that need no data.

    Args:
        directions: unit directions [d_sae, d].
        latents, features: the pairs, int64 [min(d_sae, features)].
        nearest: the feature that each latent is most like, int64 [d_sae].
        n_features: number of features.
        scores: mcc, mcc_signed and uniqueness.
    """

    directions: Tensor
    latents: Tensor
    features: Tensor
    nearest: Tensor
    n_features: int
    scores: dict[str, float]


def _match(directions: Tensor, true: Tensor) -> _Match:
    """Assigns unit directions [d_sae, d] to true ones [features, d]."""
    cosine = _cosine(directions, true)
    signed = float(cosine[assign(cosine)].mean())
    similarity = cosine.abs_()
    (latents, features), nearest = assign(similarity), similarity.argmax(1)
    scores = {
        "mcc": float(similarity[latents, features].mean()),
        "mcc_signed": signed,
        "uniqueness": len(nearest.unique()) / len(directions),
    }
    return _Match(
        directions=directions,
        latents=latents,
        features=features,
        nearest=nearest,
        n_features=len(true),
        scores=scores,
    )


def _match_truth(true: Tensor) -> _Match:
    """Matches the true directions with themselves: no assignment is better than the identity."""
    same = torch.arange(len(true))
    cosine = float(normalize(true.double(), dim=1).square().sum(1).mean())
    scores = {"mcc": cosine, "mcc_signed": cosine, "uniqueness": 1.0}
    return _Match(
        directions=true,
        latents=same,
        features=same,
        nearest=same,
        n_features=len(true),
        scores=scores,
    )


class _Firings:
    """Counts of the firings of matched latents and their features."""

    def __init__(self, match: _Match) -> None:
        self.match = match
        self.both = torch.zeros(len(match.features), dtype=torch.int64)
        self.hits = torch.zeros(len(match.directions), dtype=torch.int64)
        self.latent_fires = torch.zeros(len(match.directions), dtype=torch.int64)
        self.fires = torch.zeros(match.n_features, dtype=torch.int64)

    def count(self, f: Tensor, fires: Tensor) -> None:
        """Adds rows: firings of the latents, bool [n, d_sae], and features, bool [n, features]."""
        match = self.match
        self.both += (f[:, match.latents] & fires[:, match.features]).sum(0)
        self.hits += (f & fires[:, match.nearest]).sum(0)
        self.latent_fires += f.sum(0)
        self.fires += fires.sum(0)

    def scores(self) -> dict[str, float]:
        """Each of `SCORES`."""
        match, latent_fires = self.match, self.latent_fires
        f1 = torch.zeros(match.n_features, dtype=torch.float64)
        f1[match.features] = _share(
            2 * self.both, latent_fires[match.latents] + self.fires[match.features]
        )
        near = self.fires[match.nearest]
        shares = (
            _share(self.hits, latent_fires),
            _share(self.hits, near),
            _share(2 * self.hits, latent_fires + near),
        )
        means = {name: float(share.mean()) for name, share in zip(LATENT, shares, strict=True)}
        return {**match.scores, "firing_f1": float(f1[self.fires > 0].mean()), **means}


def _share(part: Tensor, whole: Tensor) -> Tensor:
    """Returns part / whole, 0 where the whole is 0; float64."""
    return part.double() / whole.clamp(min=1)


@lru_cache(maxsize=8)
def _random_matches(truth: KnownTruth, n: int, seed: int) -> list[_Match]:
    """Matches random dictionaries; cached, as assignments of large dictionaries take seconds."""
    draws = (random_directions(n, truth.config.d, seed, draw) for draw in range(DRAWS))
    return [_match(rows, truth.directions) for rows in draws]


def _chance(source: Source, truth: KnownTruth, n: int, k: int, seed: int) -> dict[str, float]:
    """Scores of random dictionaries, mean over the draws."""
    firings = [_Firings(match) for match in _random_matches(truth, n, seed)]
    for x, codes in paired_rows(source, truth):
        for one in firings:
            top = (x @ one.match.directions.T).topk(k, dim=1, sorted=False)
            f = torch.zeros(len(x), n, dtype=torch.bool).scatter_(1, top.indices, top.values > 0)
            one.count(f, codes != 0)
    scores = [one.scores() for one in firings]
    return {name: sum(score[name] for score in scores) / DRAWS for name in SCORES}


def _mean(source: Source) -> Tensor:
    """Mean activation, float32 [d]."""
    shards = [source.shard(i).x.flatten(0, 1) for i in range(source.n_shards)]
    total = sum(
        (x.sum(0, dtype=torch.float64) for x in shards),
        torch.zeros(source.d, dtype=torch.float64),
    )
    return (total / sum(len(x) for x in shards)).float()
