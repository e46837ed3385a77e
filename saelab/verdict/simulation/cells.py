"""Simulated cells: kinds of noise, correlation within a seed, numbers of cells of both sides.

Units are FVU; the spread of a cell and the slope of the frontier are about those of the shipped
study.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np

from saelab.runtime.counting import count
from saelab.stats import Array

Kind = Literal["normal", "skewed", "discrete"]
KINDS: tuple[Kind, ...] = ("normal", "skewed", "discrete")
#: Correlations of arm and baseline within a seed.
CORRELATIONS = (0.0, 0.3, 0.6, 0.9)

#: Baseline's FVU, standard deviation of a cell, smallest effect of interest, slope of the frontier.
FVU, SD, SESOI, SLOPE = 0.185, 0.00054, 0.005, -0.0727
TARGET = 32.0


@dataclass(frozen=True)
class Design:
    """Numbers of cells of each arm and of the baseline, whose first ones share their seeds, and of
    arms in the family."""

    arm: int
    baseline: int
    arms: int = 1

    def __str__(self) -> str:
        cells = f"{self.arm} and {count(self.baseline, 'cell')}"
        return f"{cells}, {count(self.arms, 'arm')}" if self.arms > 1 else cells

    @property
    def shared(self) -> int:
        return min(self.arm, self.baseline)


def draw_noise(stream: np.random.Generator, kind: Kind, shape: tuple[int, ...]) -> Array:
    """Draws noise of mean 0 and standard deviation 1: normal, exponential, or 20 coin throws."""
    if kind == "normal":
        return stream.normal(size=shape)
    if kind == "skewed":
        return stream.exponential(size=shape) - 1
    return (stream.binomial(20, 0.8, size=shape) / 20 - 0.8) / math.sqrt(0.2 * 0.8 / 20)


def draw_cells(
    design: Design, kind: Kind, correlation: float, studies: int, stream: np.random.Generator
) -> tuple[Array, Array]:
    """Draws the noise of arms [studies, arms, n_arm] and of a baseline [studies, 1, n_baseline].

    Args:
        correlation: of cells that share their seed.
    """
    of_seed = draw_noise(stream, kind, (studies, 1, max(design.arm, design.baseline)))
    share, rest = math.sqrt(correlation), math.sqrt(1 - correlation)
    arm = rest * draw_noise(stream, kind, (studies, design.arms, design.arm))
    base = rest * draw_noise(stream, kind, (studies, 1, design.baseline))
    return arm + share * of_seed[..., : design.arm], base + share * of_seed[..., : design.baseline]


def draw_two(
    n: int, kind: Kind, correlation: float, studies: int, stream: np.random.Generator
) -> tuple[Array, Array]:
    """Draws the noise of an arm and its baseline, n cells of the same seeds, [studies, n] each."""
    arm, base = draw_cells(Design(n, n), kind, correlation, studies, stream)
    return arm[:, 0], base[:, 0]
