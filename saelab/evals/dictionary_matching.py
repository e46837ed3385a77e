"""Matching of the rows of two dictionaries, and the cosines of matched rows.

    C_ij = cos(a_i, b_j)

Row i is matched with row pi(i), where pi assigns distinct rows with the largest sum of C (signed)
or of |C| (absolute), C in float32. Up to `EXACT` rows pi is optimal (scipy's
`linear_sum_assignment`, Crouse 2016, which is faster where each column's share in the sum is
guessed first, by an auction, Bertsekas 1988: a constant per column changes no optimum). Beyond, it
is the best among each row's and each column's `CANDIDATES` largest entries and the pairs of a
greedy assignment, which make sure that one exists: a sparse problem (scipy's
`min_weight_full_bipartite_matching`) built in blocks, so that C is never held as a whole. Its sum
is at most the optimum, and below it by no more than the rows' largest entries exceed the matched
ones. Rows that are equal in another order are matched as such, without cosines.

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
#: Rounds of the auction, and how far a bid exceeds the second choice. Our choice: the fastest of
#: those tried on real dictionaries; they change no result.
ROUNDS, STEP = 40, 3e-3
#: Rows whose cosines are held at once in larger problems. Our choice.
BLOCK = 1024
#: Pairs of random dictionaries that chance is averaged over. Our choice.
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

    def transpose(self) -> Agreement:
        """Returns the matched cosines of each row of the other dictionary."""
        absolute, signed = self.absolute_partner.argsort(), self.signed_partner.argsort()
        return Agreement(self.absolute[absolute], self.signed[signed], absolute, signed)


def match_dictionaries(a: Tensor, b: Tensor) -> Agreement:
    """Matches the rows of two dictionaries.

    Args:
        a, b: rows [n, d] each, of any length. A row of zeros has cosine 0 with every other.

    Raises: MismatchError for other shapes.
    """
    a, b = unit_rows(a), unit_rows(b)
    values, partner, cosines = _match_absolute(a, b)
    if bool((values >= 0).all()):  # sum C <= sum |C| for any assignment, and here they are equal
        return Agreement(values, values, partner, partner)
    other = _match_candidates(a, b, signed=True) if cosines is None else assign(cosines)[1]
    return Agreement(values.abs(), _row_cosines(a, b[other]), partner, other)


def matched_cosines(a: Tensor, b: Tensor) -> Tensor:
    """Returns the cosines, with signs, of the pairs that are best for |C|; float64 [n].

    Their absolute values are those of `match_dictionaries`; the pairs best for C are left out.
    """
    return _match_absolute(unit_rows(a), unit_rows(b))[0]


def same_index_mean(a: Tensor, b: Tensor) -> float:
    """Mean |cosine| of row i with row i: never above that of matched rows, and cheap to compute."""
    return float(_row_cosines(unit_rows(a), unit_rows(b)).abs().mean())


def matching_bytes(n: int, d: int) -> int:
    """Bytes that a comparison of two dictionaries of n rows needs.

    These are their unit rows in both precisions and the cosines (with signs, without, and twice as
    costs in float64 at most), or the cosines of a block and the candidates of all rows.
    """
    cosines = 24 * n * n if n <= EXACT else 16 * BLOCK * n + 128 * CANDIDATES * n
    return 24 * n * d + cosines


def unit_rows(rows: Tensor) -> Tensor:
    """Scales rows to length 1, float64; zeros stay zero."""
    return normalize(rows.detach().double(), dim=1)


def assign(similarity: Tensor) -> tuple[Tensor, Tensor]:
    """Assigns rows to columns with the largest sum; two int64 [min(rows, columns)]."""
    from scipy.optimize import linear_sum_assignment

    square = similarity.shape[0] == similarity.shape[1]
    prices = _auction_prices(similarity) if square else 0  # the price of a free column would count
    rows, columns = linear_sum_assignment((prices - similarity.double()).numpy())
    return torch.from_numpy(np.asarray(rows)), torch.from_numpy(np.asarray(columns))


def _auction_prices(similarity: Tensor) -> Tensor:
    """Prices of the columns after `ROUNDS` of an auction, [columns].

    Each row without a column bids for the one that gives it most, up to the price at which its
    second choice would be as good.
    """
    values, n = similarity.float(), similarity.shape[1]
    prices, owner, free = torch.zeros(n, dtype=torch.float32), np.full(n, -1), np.arange(n)
    for _ in range(ROUNDS if n > 1 else 0):
        if len(free) == 0:
            break
        top = (values[torch.from_numpy(free)] - prices).topk(2, dim=1)
        gap, wanted = (top.values[:, 0] - top.values[:, 1]).numpy(), top.indices[:, 0].numpy()
        order = np.argsort(gap, kind="stable")
        best = np.full(n, -1)
        best[wanted[order]] = order  # the last of several bids remains, which is the highest
        columns = np.flatnonzero(best >= 0)
        winners = best[columns]
        prices.numpy()[columns] += gap[winners] + STEP
        lost = owner[columns]
        owner[columns] = free[winners]
        free = np.concatenate([np.delete(free, winners), lost[lost >= 0]])
    return prices


@lru_cache(maxsize=8)
def chance_cosines(n: int, d: int, seed: int) -> tuple[float, float]:
    """Mean matched cosine of random dictionaries of n rows in d dimensions: absolute and signed.

    Cached for subjects of the same shape; draws are from the seed's stream 'evaluation'.
    """
    draws = []
    for draw in range(DRAWS):
        pair = (random_directions(n, d, seed, 2 * draw + side) for side in (0, 1))
        draws.append(match_dictionaries(*pair))
    absolute = sum(float(one.absolute.mean()) for one in draws) / DRAWS
    return absolute, sum(float(one.signed.mean()) for one in draws) / DRAWS


def random_directions(n: int, d: int, seed: int, draw: int = 0) -> Tensor:
    """Draws random unit rows, float32 [n, d]."""
    return normalize(
        torch.randn(
            n, d, generator=torch_stream(seed, "evaluation", "chance", draw), dtype=torch.float32
        )
    )


def largest_cosines(rows: Tensor, absolute: bool = False) -> Tensor:
    """Largest cosine of each row [n, d] with another row, with its sign or in size; [n]. A row of
    zeros has 0, and so does a single row."""
    rows = normalize(rows.detach(), dim=1)
    largest = rows.new_zeros(len(rows))
    if len(rows) == 1:
        return largest
    for block in _blocks(len(rows)):
        cosine = rows[block] @ rows.T
        cosine = cosine.abs_() if absolute else cosine
        index = torch.arange(block.start, block.stop, device=rows.device)
        cosine[index - block.start, index] = -2  # below any cosine
        largest[block] = cosine.max(1).values
    return largest


def _match_absolute(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
    """Matches unit rows for |C|.

    Returns: matched cosines with signs, the row of b for each row of a, and C where it is held as a
        whole.
    """
    if a.shape != b.shape:
        raise MismatchError(f"dictionaries of shapes {[*a.shape]} and {[*b.shape]} are compared")
    cosines = a.float() @ b.float().T if len(a) <= EXACT else None
    partner = _find_reordering(a, b)
    if partner is None:
        partner = _match_candidates(a, b) if cosines is None else assign(cosines.abs())[1]
    return _row_cosines(a, b[partner]), partner, cosines


def _find_reordering(a: Tensor, b: Tensor) -> Tensor | None:
    """Finds the row of b that equals each row of a, int64 [n]; None unless b is a in another order.

    Cosines are not used, since they can't distinguish very similar rows.
    """
    if not torch.equal(a[:, 0].sort().values, b[:, 0].sort().values):  # quick, and mostly enough
        return None
    first, second = (np.lexsort(rows.T.numpy()) for rows in (a, b))
    if not np.array_equal(a.numpy()[first], b.numpy()[second]):
        return None
    partner = torch.empty(len(a), dtype=torch.int64)
    partner[torch.from_numpy(first)] = torch.from_numpy(second)
    return partner


def _row_cosines(u: Tensor, v: Tensor) -> Tensor:
    """Cosines of unit rows u and v [n, d], row by row, exactly 1 for equal rows; [n]."""
    sign = (u * v).sum(1).sign()
    return sign * (1 - (u - sign.unsqueeze(1) * v).square().sum(1) / 2)


def _blocks(n: int) -> Iterator[slice]:
    """Yields slices of `BLOCK` rows that cover n."""
    return (slice(start, min(start + BLOCK, n)) for start in range(0, n, BLOCK))


def _match_candidates(a: Tensor, b: Tensor, signed: bool = False) -> Tensor:
    """Assigns a row of b to each row of a, int64 [n], among the most similar ones alone."""
    from scipy.sparse import csr_array
    from scipy.sparse.csgraph import min_weight_full_bipartite_matching

    n = len(a)
    rows, columns, values = (part.numpy() for part in _largest_entries(a, b, signed))
    partner = _match_greedily(n, rows, columns, values)
    greedy = (a * b[torch.from_numpy(partner)]).sum(1)
    values = np.concatenate([values, (greedy if signed else greedy.abs()).numpy()])
    places = np.concatenate([rows * n + columns, np.arange(n) * n + partner])
    places, first = np.unique(places, return_index=True)
    # a stored 0 would be no edge: costs lie in [1, 3]
    costs = csr_array((2 - values[first], (places // n, places % n)), shape=(n, n))
    rows, columns = min_weight_full_bipartite_matching(costs)
    partner[rows] = columns
    return torch.from_numpy(partner)


def _largest_entries(a: Tensor, b: Tensor, signed: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Finds the `CANDIDATES` largest entries of each row and column: rows, columns and values."""
    edges: list[tuple[Tensor, Tensor, Tensor]] = []
    for one, other, swapped in ((a, b, False), (b, a, True)):
        most = min(CANDIDATES, len(other))
        for block in _blocks(len(one)):
            cosine = one[block] @ other.T
            top = (cosine if signed else cosine.abs_()).topk(most, dim=1)
            first = torch.arange(block.start, block.stop).repeat_interleave(most)
            second = top.indices.flatten()
            pair = (second, first) if swapped else (first, second)
            edges.append((*pair, top.values.flatten()))
    rows, columns, values = (torch.cat(part) for part in zip(*edges, strict=True))
    return rows, columns, values


def _match_greedily(
    n: int, rows: np.ndarray, columns: np.ndarray, values: np.ndarray
) -> np.ndarray:
    """Assigns greedily, int64 [n]: the largest pair whose row and column are both free, repeatedly;
    then the remaining rows in any order."""
    partner, free = np.full(n, -1), np.ones(n, dtype=bool)
    for edge in np.argsort(-values, kind="stable"):
        row, column = rows[edge], columns[edge]
        if partner[row] < 0 and free[column]:
            partner[row], free[column] = column, False
    partner[partner < 0] = np.flatnonzero(free)
    return partner
