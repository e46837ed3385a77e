"""Training and test rows of sae-probes' settings, drawn as the package draws them.

    p = share of positives (0.5), n = rows of the data set, m = min(n, 5,000), only these are used
    train   ceil(p N) positives, then N - ceil(p N) negatives
    test    ceil(p M) positives, then M - ceil(p M) negatives, of what remains in rising order
    both    permuted, train first

    normal       N = min(n - 100, 1024), M = m - N - 1
    scarcity     N = 2 ... 1,024, those up to n - 100; M = m - N - 1
    imbalance    p = 0.05 ... 0.95; N and M the same for all p, as many as the rarer class allows
    label_noise  as normal; int(r N) training labels are inverted, r = 0 ... 0.5
    ood          N = 1024 of the first 1,500 rows; test = all texts of another kind

Source: sae-probes 0.4.2. The package uses numpy's RandomState(42), which definition 1 repeats;
definition 2 draws from named streams.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from saelab.data.probing.sae_probes import Setting
from saelab.runtime.counting import count

#: The package's numbers: rows used of a data set ('ood': of its training side), training rows, and
#: test rows at least.
MOST_ROWS, MOST_SHIFTED_ROWS, TRAIN_ROWS, LEAST_TEST = 5000, 1500, 1024, 100
#: Scarcity: numbers of training rows.
TRAIN_SIZES = tuple(int(n) for n in np.unique(np.round(2 ** np.linspace(1, 10, 20))))
#: Imbalance: shares of positives, with the last bits that decide a rounding up in the package.
SHARES = tuple(float(p) for p in np.linspace(0.05, 0.95, 19))
#: Label noise: shares of inverted labels.
NOISE = tuple(round(float(r) * 20) / 20 for r in np.linspace(0, 0.5, 11))

Draw = np.random.RandomState | np.random.Generator


@dataclass(frozen=True)
class Condition:
    """One point of a setting.

    Args:
        setting: its name.
        amount: training rows (scarcity), share of positives (imbalance) or of inverted labels
            (label noise); 0 elsewhere.
    """

    setting: Setting
    amount: float = 0.0

    @property
    def slice(self) -> str:
        """Slice of its rows; '' for the normal setting."""
        names = {"scarcity": "rows", "imbalance": "positives", "label_noise": "inverted"}
        if self.setting == "normal":
            return ""
        where = f"setting={self.setting}"
        name = names.get(self.setting)
        return f"{where},{name}={self.amount:g}" if name else where

    def is_possible(self, n: int, has_shifted: bool) -> bool:
        """Returns False where the package leaves a data set out.

        Args:
            n: rows of the data set.
            has_shifted: it has texts of another kind.
        """
        if self.setting == "scarcity":
            return self.amount <= n - LEAST_TEST
        return has_shifted or self.setting != "ood"


@dataclass(frozen=True, eq=False)
class Split:
    """Rows int64 of a data set, and the labels of the training rows (1: positive), int64.

    `test` is None where all texts of another kind are the test rows.
    """

    train: np.ndarray
    train_labels: np.ndarray
    test: np.ndarray | None


def conditions(settings: Sequence[Setting]) -> list[Condition]:
    """Lists the points of settings, in their order."""
    amounts: dict[str, tuple[float, ...]] = {
        "scarcity": TRAIN_SIZES,
        "imbalance": SHARES,
        "label_noise": NOISE,
    }
    return [
        Condition(setting, float(amount))
        for setting in dict.fromkeys(settings)
        for amount in amounts.get(setting, (0.0,))
    ]


def select_rows(
    labels: np.ndarray,
    condition: Condition,
    generator: Callable[[str], Draw],
    rounded: bool = False,
) -> Split | str:
    """Draws the rows of a condition.

    Args:
        labels: int64 [n], 0 or 1.
        condition: of the probes.
        generator: purpose ('rows' or 'labels') -> a generator at its start.
        rounded: shares of positives are rounded to 0.05, as in the package's baselines; its SAE
            probes keep the last bits, which can move one row to the positives.

    Returns: the rows, or the reason why there are too few.
    """
    n, every = len(labels), labels
    labels = labels[: MOST_SHIFTED_ROWS if condition.setting == "ood" else MOST_ROWS]
    m, share = len(labels), 0.5
    n_train = min(n - LEAST_TEST, TRAIN_ROWS)
    n_test = m - n_train - 1
    if condition.setting == "scarcity":
        n_train = int(condition.amount)
        n_test = m - n_train - 1
    elif condition.setting == "imbalance":
        share = round(condition.amount * 20) / 20 if rounded else condition.amount
        n_train, n_test = _imbalanced_sizes(every)
    elif condition.setting == "ood":
        n_train, n_test = TRAIN_ROWS, 0
    if n_train < 2 or n_train + min(LEAST_TEST, n_test) > m or n_test < 0:
        least = f"{max(n_train, 2)} to train on and {LEAST_TEST} to test on"
        return f"{count(m, 'row')} in total, fewer than {least}"
    rows = _draw(labels, (n_train, n_test), share, generator("rows"))
    if isinstance(rows, str):
        return rows
    train, test = rows
    targets = labels[train]
    if condition.setting == "label_noise":
        flips = generator("labels").choice(n_train, int(n_train * condition.amount), replace=False)
        targets = targets.copy()
        targets[flips] = 1 - targets[flips]
    return Split(train, targets, None if condition.setting == "ood" else test)


def _imbalanced_sizes(labels: np.ndarray) -> tuple[int, int]:
    """Returns the numbers of training and test rows that every share of positives allows."""
    positives = int(labels.sum())
    most = int(min((len(labels) - positives) / (1 - min(SHARES)), positives / max(SHARES)))
    n_train = min(most - LEAST_TEST, TRAIN_ROWS)
    return n_train, max(LEAST_TEST, most - n_train - 1)


def _draw(
    labels: np.ndarray, sizes: tuple[int, int], share: float, rng: Draw
) -> tuple[np.ndarray, np.ndarray] | str:
    """Draws training and test rows, int64; or says which class has too few."""
    pools = [np.flatnonzero(labels == 1), np.flatnonzero(labels == 0)]
    counts = [(up := math.ceil(share * size), size - up) for size in sizes]
    chosen: list[list[np.ndarray]] = []
    for of_side in counts:
        side = []
        for pool, size in zip(pools, of_side, strict=True):
            if size > len(pool):
                return f"a class has {count(len(pool), 'row')} where {size} are drawn"
            side.append(rng.choice(pool, size=size, replace=False))
        pools = [np.setdiff1d(p, taken) for p, taken in zip(pools, side, strict=True)]
        chosen.append(side)
    train, test = (rng.permutation(np.concatenate(side)) for side in chosen)
    return train, test
