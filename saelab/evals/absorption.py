"""Splitting and absorption, where features have known parents.

W_j is what latent j writes at f_j = 1, v_i the true value of feature i, main(p) = argmax_j cos(W_j,
D_p) the latent of a parent p. Of the rows where p and at least one of its children c are on,

    absorption.rate           the share in which main(p) is silent and some latent j that fires
                              stands for both: f_j a_jp >= v_p / 2 and f_j a_jc >= v_c / 2 for a
                              child c that is on, with W_j ~ a_jp D_p + a_jc D_c by least squares
    absorption.silent         the share in which main(p) is silent, with or without a substitute
    absorption.silent_alone   the share of silent main(p) in the rows where p is on without any
                              child: what main(p) misses anyway
    absorption.main_cosine    cos(W_main(p), D_p)

and, with the latents that are best for p by F1 of firing in order, and F_k the F1 of "any of the
first k fires",

    splitting.latents         the k up to which every latent adds more than `GAIN` to F
    splitting.share           1 where that is more than one

each the mean over the parents that have such rows. An SAE that writes the parent into its
children's latents has rate 1; latents of the true features that fire with them, 0. Each is also
given for random directions with as large a code (`chance_`) and for the truth (`oracle_`). A parent
that is split over its children's latents is also absorbed by them, since here every child is a
large share of its parent; the rate requires a silent main latent, so it separates the two cases
where a main latent exists.

Sources: feature splitting, Bricken et al. 2023; absorption and the F1 rule for splitting, Chanin et
al. 2024 ("A is for Absorption"), whose probe of a letter is the true direction here.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import normalize

from saelab.data.activations.store import Source
from saelab.data.synthetic.chains import KnownTruth
from saelab.evals.base import Row, Subject, missing, number
from saelab.evals.dictionary_matching import DRAWS, random_directions
from saelab.evals.known_features import coded_rows, decoder_vectors, paired_rows
from saelab.evals.signed import one_sided

DEFINITION = "absorption/1"
ABSORPTION = tuple(
    f"absorption.{name}" for name in ("rate", "silent", "silent_alone", "main_cosine")
)
SPLITTING = ("splitting.latents", "splitting.share")
SCORES = (*ABSORPTION, *SPLITTING)
METRICS = tuple(f"{prefix}{name}" for prefix in ("", "chance_", "oracle_") for name in SCORES)
#: A latent stands for a feature from this share of its value on. Our choice.
SHARE = 0.5
#: Increase of F1 that makes a further latent a part of a split feature (Chanin et al.), and the
#: number of latents that are tried (our choice).
GAIN, TRIED = 0.03, 8
#: Held-out rows that are used, and entries of a gathered table. Our choice: bounds the memory.
ROWS, ENTRIES = 32_768, 1 << 22


@torch.no_grad()
def evaluate_absorption(
    subject: Subject, source: Source, truth: KnownTruth | None, seed: int = 0, device: str = "cpu"
) -> list[Row]:
    """Computes the rows of one subject.

    Args:
        source: held-out activations.
        truth: their known features; None where these are not known.
        seed: of the random dictionaries.
        device: of the subject.

    Raises: MismatchError for a subject of another width.
    """
    if truth is None:
        return _missing_rows("the true features of these activations are not known")
    family = _family(truth)
    if not len(family.children):
        return _missing_rows("the true features of these activations have no children")
    subject, true = one_sided(subject), truth.directions
    counts = _Counts(decoder_vectors(subject, device), true, family)
    oracle = _Counts(true, true, family)
    seen = active = 0
    for _, f, codes in coded_rows(subject, source, truth, device):
        counts.count(f, codes)
        oracle.count(codes, codes)
        seen, active = seen + len(f), active + int((f != 0).sum())
        if seen >= ROWS:
            break
    if not bool(counts.with_child.any()):
        return _missing_rows(f"no parent is on together with a child in {seen} held-out rows")
    k = min(subject.d_sae, max(1, round(active / seen)))
    chance = [
        _count_random(source, truth, family, subject.d_sae, k, seed, draw).scores()
        for draw in range(DRAWS)
    ]
    mean = {name: sum(scores[name] for scores in chance) / DRAWS for name in SCORES}
    by_prefix = {"": counts.scores(), "chance_": mean, "oracle_": oracle.scores()}
    return [
        number(f"{prefix}{name}", scores[name], DEFINITION)
        for prefix, scores in by_prefix.items()
        for name in SCORES
    ]


def _missing_rows(reason: str) -> list[Row]:
    return [missing(name, DEFINITION, reason) for name in METRICS]


@dataclass(frozen=True, eq=False)
class _Family:
    """Parents and children among the features.

    Args:
        parents: features that have children, int64 [p].
        children: features that have a parent, int64 [c].
        of: index in `parents` of each child's parent, int64 [c].
    """

    parents: Tensor
    children: Tensor
    of: Tensor


def _family(truth: KnownTruth) -> _Family:
    """Builds the family of the true features."""
    parent = truth.config.parent_of
    children = (parent != torch.arange(len(parent))).nonzero().squeeze(1)
    parents, place = parent[children].unique(return_inverse=True)
    return _Family(parents, children, place)


class _Counts:
    """Firings of latents next to those of parents and children.

    Args:
        weights: decoder vector of each latent, float32 [m, d].
        true: directions of the features, float32 [features, d].
    """

    def __init__(self, weights: Tensor, true: Tensor, family: _Family) -> None:
        self.family = family
        parents, children = true[family.parents], true[family.children]
        self.onto_parents, self.onto_children = weights @ parents.T, weights @ children.T
        self.overlap = (parents[family.of] * children).sum(1)
        cosine = normalize(weights, dim=1) @ parents.T
        self.main_cosine, self.main = cosine.max(0)
        self.with_child, self.silent, self.absorbed, self.alone, self.silent_alone = (
            torch.zeros(len(family.parents), dtype=torch.int64) for _ in range(5)
        )
        self.fires: list[Tensor] = []
        self.on: list[Tensor] = []

    def count(self, f: Tensor, v: Tensor) -> None:
        """Adds rows: codes of the latents [n, m] and of the features [n, features]."""
        family = self.family
        on, child_on = v[:, family.parents] != 0, v[:, family.children] != 0
        child_on &= on[:, family.of]
        any_child = torch.zeros(on.shape, dtype=torch.int32)
        any_child.index_add_(1, family.of, child_on.int())
        silent, with_child = f[:, self.main] == 0, any_child > 0
        alone = on & ~with_child
        self.with_child += with_child.sum(0)
        self.silent += (with_child & silent).sum(0)
        self.alone += alone.sum(0)
        self.silent_alone += (alone & silent).sum(0)
        rows, kids = (child_on & silent[:, family.of]).nonzero().T
        absorbed = torch.zeros_like(on)
        replaced = self._are_replaced(f, v, rows, kids)
        absorbed[rows[replaced], family.of[kids[replaced]]] = True
        self.absorbed += absorbed.sum(0)
        self.fires.append(f != 0)
        self.on.append(on)

    def _are_replaced(self, f: Tensor, v: Tensor, rows: Tensor, kids: Tensor) -> Tensor:
        """Finds the pairs of a row and a child whose child and parent one latent stands for.

        The main latent is silent in these rows, so that it is not that latent.

        Returns: bool [pairs].
        """
        width = max(1, int((f != 0).sum(1).max()))
        values, which = f.abs().topk(width, dim=1, sorted=False)
        values = f.gather(1, which) * (values != 0)
        parts = []
        step = max(1, ENTRIES // width)
        for row, kid in zip(rows.split(step), kids.split(step), strict=True):
            family, latents, code = self.family, which[row], values[row]
            place = family.of[kid]
            p = self.onto_parents[latents, place[:, None]]
            c = self.onto_children[latents, kid[:, None]]
            r = self.overlap[kid][:, None]
            of_parent = code * (p - r * c) / (1 - r * r)
            of_child = code * (c - r * p) / (1 - r * r)
            enough = of_parent >= SHARE * v[row, family.parents[place]][:, None]
            enough &= of_child >= SHARE * v[row, family.children[kid]][:, None]
            parts.append(enough.any(1))
        return torch.cat(parts) if parts else torch.zeros(0, dtype=torch.bool)

    def scores(self) -> dict[str, float]:
        """Means over the parents of each score."""
        seen = self.with_child > 0
        rate, silent = self.absorbed / self.with_child, self.silent / self.with_child
        seen_alone = seen & (self.alone > 0)
        alone = (self.silent_alone / self.alone)[seen_alone]
        parts = self._count_parts()[seen].double()
        return {
            "absorption.rate": float(rate[seen].double().mean()),
            "absorption.silent": float(silent[seen].double().mean()),
            "absorption.silent_alone": float(alone.double().mean()),
            "absorption.main_cosine": float(self.main_cosine[seen].double().mean()),
            "splitting.latents": float(parts.mean()),
            "splitting.share": float((parts > 1).double().mean()),
        }

    def _count_parts(self) -> Tensor:
        """Counts the latents that each parent is split over, int64 [parents]."""
        fires, on = torch.cat(self.fires), torch.cat(self.on)
        both = fires.float().T @ on.float()  # counts: exact below 2^24 rows
        count, wanted = fires.sum(0)[:, None], on.sum(0)
        best = (2 * both / (count + wanted).clamp(min=1)).topk(min(TRIED, len(both)), dim=0).indices
        parts, going = torch.ones_like(wanted), torch.ones_like(wanted, dtype=torch.bool)
        union, before = torch.zeros_like(on), torch.zeros(len(wanted), dtype=torch.float32)
        for k, latents in enumerate(best, start=1):
            union |= fires[:, latents]
            f1 = 2 * (union & on).sum(0) / (union.sum(0) + wanted).clamp(min=1)
            going &= f1 > before + GAIN if k > 1 else going
            parts = torch.where(going, k, parts)
            before = f1
        return parts


def _count_random(
    source: Source,
    truth: KnownTruth,
    family: _Family,
    n: int,
    k: int,
    seed: int,
    draw: int,
) -> _Counts:
    """Counts for n random unit directions, with the k largest projections as a code."""
    directions = random_directions(n, truth.config.d, seed, draw)
    counts = _Counts(directions, truth.directions, family)
    seen = 0
    for x, codes in paired_rows(source, truth):
        top = (x @ directions.T).topk(k, dim=1, sorted=False)
        f = torch.zeros(len(x), n, dtype=torch.float32).scatter_(
            1, top.indices, top.values.clamp(min=0)
        )
        counts.count(f, codes)
        seen += len(x)
        if seen >= ROWS:
            break
    return counts
