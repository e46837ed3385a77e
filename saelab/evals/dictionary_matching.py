"""Which row of one dictionary stands for which of another, and how alike they are.

    C_ij = cos(a_i, b_j)

Row i stands for row pi(i), pi an assignment of distinct rows with the largest sum of C (signed) or
of |C| (absolute), C in float32. Up to `EXACT` rows pi is optimal (scipy's `linear_sum_assignment`,
Crouse 2016, which is faster where each column's share in the sum is guessed first, by an auction,
Bertsekas 1988: a constant per column changes no optimum). Beyond, it is the best among each row's
and each column's `CANDIDATES` largest entries and the pairs of a greedy assignment, which make sure
that there is one: a sparse problem (scipy's `min_weight_full_bipartite_matching`) made in blocks,
so that C is never held as a whole. That can only fall short of the optimum, by no more than the
rows' largest entries lie above what it finds. Rows that are the same in another order are matched
as such, without cosines.

A matched cosine is 1 - |u - v|^2 / 2 of the unit rows in float64 (its negative, with u + v, for
rows that point apart), so that equal rows give exactly 1. Its mean between SAEs of two seeds is the
pairwise dictionary mean correlation coefficient, PW-MCC, of Song et al. 2025.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import normalize

from saelab.errors import MismatchError
from saelab.seeding import torch_stream

#: Rows up to which the whole matrix is held (24 bytes an entry: 1.6 GB) and solved exactly.
EXACT = 8192
#: Largest entries of each row and column among which a larger problem is solved. Our choice;
#: tests/evals/test_dictionary_matching.py holds the mean cosine within 5e-4 of the optimum on
#: random, noisy, half-shared and clustered dictionaries.
CANDIDATES = 32
#: Rounds of the auction, and by how much a bid goes beyond the second choice. Our choice: the
#: fastest of some on real dictionaries; they change no result.
ROUNDS, STEP = 40, 3e-3
#: Rows whose cosines are held at once where not all are. Our choice.
BLOCK = 1024
#: Pairs of random dictionaries that chance is the mean of. Our choice.
DRAWS = 3


@dataclass(frozen=True, eq=False)
class Agreement:
    """Matched cosines of each row of one dictionary with another's.

    Args:
        absolute, signed: of the assignment that is best for |C|, and for C; float64 [n].
        absolute_partner, signed_partner: the other's row for each row; int64 [n].
    """

    absolute: Tensor
    signed: Tensor
    absolute_partner: Tensor
    signed_partner: Tensor

    def turned(self) -> Agreement:
        """The same of each row of the other dictionary."""
        there, back = self.absolute_partner.argsort(), self.signed_partner.argsort()
        return Agreement(self.absolute[there], self.signed[back], there, back)


def agree(a: Tensor, b: Tensor) -> Agreement:
    """How alike two dictionaries are, up to the order of their rows.

    Args:
        a, b: rows [n, d] each, of any length. A row of zeros has cosine 0 with every other.

    Raises: MismatchError for other shapes.
    """
    a, b = unit(a), unit(b)
    values, partner, cosines = _absolute(a, b)
    if bool((values >= 0).all()):  # sum C <= sum |C| for any assignment, and here they are equal
        return Agreement(values, values, partner, partner)
    other = _candidates(a, b, signed=True) if cosines is None else assign(cosines)[1]
    return Agreement(values.abs(), _paired(a, b[other]), partner, other)


def matched_cosines(a: Tensor, b: Tensor) -> Tensor:
    """The cosines, with their signs, of the pairs that are best for |C|; float64 [n].

    Their absolute values are those of `agree`, without the search for the pairs best for C."""
    return _absolute(unit(a), unit(b))[0]


def same_index_mean(a: Tensor, b: Tensor) -> float:
    """Mean |cosine| of row i with row i: never above that of matched rows, and cheap."""
    return float(_paired(unit(a), unit(b)).abs().mean())


def matching_bytes(n: int, d: int) -> int:
    """Memory of a comparison of two dictionaries of n rows: their unit rows in both precisions and
    the cosines (with their signs, without, and twice as costs in float64 at most), or those of a
    block and the candidates of all rows."""
    cosines = 24 * n * n if n <= EXACT else 16 * BLOCK * n + 128 * CANDIDATES * n
    return 24 * n * d + cosines


def unit(rows: Tensor) -> Tensor:
    """Rows of length 1, float64; zeros stay."""
    return normalize(rows.detach().double(), dim=1)


def assign(similarity: Tensor) -> tuple[Tensor, Tensor]:
    """The assignment of rows to columns with the largest sum: two int64 [min(rows, columns)]."""
    from scipy.optimize import linear_sum_assignment

    square = similarity.shape[0] == similarity.shape[1]
    prices = _prices(similarity) if square else 0  # where a column stays free its price would count
    rows, columns = linear_sum_assignment((prices - similarity.double()).numpy())
    return torch.from_numpy(np.asarray(rows)), torch.from_numpy(np.asarray(columns))


def _prices(similarity: Tensor) -> Tensor:
    """What columns cost after some rounds of an auction in which each row without a column bids for
    the one that gives it most, up to where its second choice would be as good; [columns]."""
    values, n = similarity.float(), similarity.shape[1]
    prices, owner, free = torch.zeros(n), np.full(n, -1), np.arange(n)
    for _ in range(ROUNDS if n > 1 else 0):
        if len(free) == 0:
            break
        top = (values[torch.from_numpy(free)] - prices).topk(2, dim=1)
        gap, wanted = (top.values[:, 0] - top.values[:, 1]).numpy(), top.indices[:, 0].numpy()
        order = np.argsort(gap, kind="stable")
        best = np.full(n, -1)
        best[wanted[order]] = order  # of several bids the last stays, which is the highest
        columns = np.flatnonzero(best >= 0)
        winners = best[columns]
        prices.numpy()[columns] += gap[winners] + STEP
        lost = owner[columns]
        owner[columns] = free[winners]
        free = np.concatenate([np.delete(free, winners), lost[lost >= 0]])
    return prices


@lru_cache(maxsize=8)
def chance(n: int, d: int, seed: int) -> tuple[float, float]:
    """Mean matched cosine of random dictionaries of n rows in d dimensions: absolute and signed.

    Kept for the subjects that come after; the draws are of the seed's stream 'evaluation'.
    """
    found = []
    for draw in range(DRAWS):
        pair = (random_directions(n, d, seed, 2 * draw + side) for side in (0, 1))
        found.append(agree(*pair))
    absolute = sum(float(one.absolute.mean()) for one in found) / DRAWS
    return absolute, sum(float(one.signed.mean()) for one in found) / DRAWS


def random_directions(n: int, d: int, seed: int, draw: int = 0) -> Tensor:
    """Random unit rows, float32 [n, d]."""
    return normalize(torch.randn(n, d, generator=torch_stream(seed, "evaluation", "chance", draw)))


def largest_cosines(rows: Tensor) -> Tensor:
    """The largest cosine of each row [n, d] with another one, with its sign; [n]. A row of zeros,
    and a row alone, has 0."""
    rows = normalize(rows.detach(), dim=1)
    largest = rows.new_zeros(len(rows))
    if len(rows) == 1:
        return largest
    for block in _blocks(len(rows)):
        cosine = rows[block] @ rows.T
        here = torch.arange(block.start, block.stop, device=rows.device)
        cosine[here - block.start, here] = -2  # below any cosine
        largest[block] = cosine.max(1).values
    return largest


def _absolute(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
    """Of unit rows: the matched cosines, with their signs, and the other's rows of the assignment
    that is best for |C|; and C where it is held."""
    if a.shape != b.shape:
        raise MismatchError(f"dictionaries of shapes {[*a.shape]} and {[*b.shape]} are compared")
    cosines = a.float() @ b.float().T if len(a) <= EXACT else None
    partner = _reordered(a, b)
    if partner is None:
        partner = _candidates(a, b) if cosines is None else assign(cosines.abs())[1]
    return _paired(a, b[partner]), partner, cosines


def _reordered(a: Tensor, b: Tensor) -> Tensor | None:
    """Which row of b each row of a is, where b is a in another order, else None; int64 [n]. Found
    without cosines, which can't tell very similar rows apart."""
    if not torch.equal(a[:, 0].sort().values, b[:, 0].sort().values):  # quick, and mostly enough
        return None
    first, second = (np.lexsort(rows.T.numpy()) for rows in (a, b))
    if not np.array_equal(a.numpy()[first], b.numpy()[second]):
        return None
    partner = torch.empty(len(a), dtype=torch.int64)
    partner[torch.from_numpy(first)] = torch.from_numpy(second)
    return partner


def _paired(u: Tensor, v: Tensor) -> Tensor:
    """Cosines of unit rows [n, d] with those beside them, exactly 1 for equal rows; [n]."""
    sign = (u * v).sum(1).sign()
    return sign * (1 - (u - sign.unsqueeze(1) * v).square().sum(1) / 2)


def _blocks(n: int) -> Iterator[slice]:
    return (slice(start, min(start + BLOCK, n)) for start in range(0, n, BLOCK))


def _candidates(a: Tensor, b: Tensor, signed: bool = False) -> Tensor:
    """The row of b for each of a, int64 [n], from the most similar ones alone."""
    from scipy.sparse import csr_array
    from scipy.sparse.csgraph import min_weight_full_bipartite_matching

    n = len(a)
    rows, columns, values = (part.numpy() for part in _edges(a, b, signed))
    partner = _greedy(n, rows, columns, values)
    own = (a * b[torch.from_numpy(partner)]).sum(1)
    values = np.concatenate([values, (own if signed else own.abs()).numpy()])
    places = np.concatenate([rows * n + columns, np.arange(n) * n + partner])
    places, first = np.unique(places, return_index=True)
    # a stored 0 would be no edge: costs lie in [1, 3]
    costs = csr_array((2 - values[first], (places // n, places % n)), shape=(n, n))
    found, columns = min_weight_full_bipartite_matching(costs)
    partner[found] = columns
    return torch.from_numpy(partner)


def _edges(a: Tensor, b: Tensor, signed: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Rows, columns and values of the `CANDIDATES` largest entries of each row and each column."""
    found: list[tuple[Tensor, Tensor, Tensor]] = []
    for one, other, turned in ((a, b, False), (b, a, True)):
        most = min(CANDIDATES, len(other))
        for block in _blocks(len(one)):
            cosine = one[block] @ other.T
            top = (cosine if signed else cosine.abs_()).topk(most, dim=1)
            here = torch.arange(block.start, block.stop).repeat_interleave(most)
            there = top.indices.flatten()
            pair = (there, here) if turned else (here, there)
            found.append((*pair, top.values.flatten()))
    rows, columns, values = (torch.cat(part) for part in zip(*found, strict=True))
    return rows, columns, values


def _greedy(n: int, rows: np.ndarray, columns: np.ndarray, values: np.ndarray) -> np.ndarray:
    """An assignment int64 [n]: the largest pair of what is free, again and again; what is left
    without one in any order."""
    partner, free = np.full(n, -1), np.ones(n, dtype=bool)
    for edge in np.argsort(-values, kind="stable"):
        row, column = rows[edge], columns[edge]
        if partner[row] < 0 and free[column]:
            partner[row], free[column] = column, False
    partner[partner < 0] = np.flatnonzero(free)
    return partner
