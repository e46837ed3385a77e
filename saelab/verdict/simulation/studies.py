"""Simulation of whole studies: what the error budget promises over all runs together.

A study has ten runs of six arms, whose comparisons all share the cells of one baseline and have
their levels from the budget, in the order of the runs. Many studies are simulated at once.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from saelab.seeding import numpy_stream
from saelab.stats import Array
from saelab.verdict.effect import Effect, estimate
from saelab.verdict.error_budget.ledger import DISCOVERY
from saelab.verdict.error_budget.levels import ErrorBudget, look_share
from saelab.verdict.judge import choose_words
from saelab.verdict.simulation.cells import Kind, draw_noise
from saelab.verdict.simulation.rows import Row

RUNS, ARMS, BASELINE_SEEDS, ALPHA = 10, 6, 8, 0.05
#: Studies that are simulated at once, which bounds the memory.
CHUNK = 2000
#: Smallest effect of interest and effect of the shipped study, in standard deviations of a cell.
SESOI, EFFECT = 3.0, 9.0


@dataclass(kw_only=True)
class Ledgers:
    """Budgets of many studies whose runs have equal numbers of arms.

    Args:
        rule: gives the levels.
        given: comparisons so far.
        pots: of each run, comparisons before its words were reported, and wealth that they earned
            in each study, in units of alpha.
        discoveries: of each study.
    """

    rule: ErrorBudget
    studies: int
    given: int = 0
    pots: list[tuple[int, Array]] = field(default_factory=list)
    discoveries: Array = field(default_factory=lambda: np.zeros(0))

    def __post_init__(self) -> None:
        self.discoveries = np.zeros(self.studies)

    def give(self, arms: int, look: int = 1) -> Array:
        """Levels [studies, arms] of one run."""
        t = self.given + 1 + np.arange(arms)
        level = np.broadcast_to(self.rule.gamma(t), (self.studies, arms))
        if self.pots:
            starts, earned = zip(*self.pots, strict=True)
            gamma = self.rule.gamma(t - np.array(starts)[:, None])
            level = level + np.stack(earned, axis=-1) @ gamma
        self.given += arms
        return np.minimum(self.rule.alpha * look_share(look) * level, self.rule.alpha / arms)

    def report(self, first: NDArray[np.bool_]) -> None:
        """Adds a run's discoveries [studies, arms]; the first one of a study earns nothing."""
        new = first.sum(axis=-1)
        earned = new - ((self.discoveries == 0) & (new > 0))
        if earned.any():
            self.pots.append((self.given, earned.astype(np.float64)))
        self.discoveries = self.discoveries + new


@dataclass(frozen=True, kw_only=True)
class Design:
    """Study of arms that share a baseline.

    Args:
        seeds: of each arm; the baseline has eight, the first of which are the same.
        kind, correlation: of the noise, and of arm and baseline within a seed.
        helping, hurting: shares of the arms with an effect for the better and for the worse.
        effect: its size, in standard deviations of a cell.
        sesoi: smallest effect of interest.
    """

    seeds: int = 3
    kind: Kind = "normal"
    correlation: float = 0.3
    helping: float = 0.0
    hurting: float = 0.0
    effect: float = EFFECT
    sesoi: float = 0.0

    def __str__(self) -> str:
        arms = f"{RUNS} runs of {ARMS} arms of {self.seeds} seeds"
        true = self.helping + self.hurting
        size = f", {true:.0%} with {self.effect:g} sd" if true else ""
        return f"{self.kind}, {arms}, r = {self.correlation:g}{size}"

    def draw(self, studies: int, seeds: int, stream: np.random.Generator) -> Drawn:
        """Cells of every arm and of the baseline."""
        shape = (studies, RUNS * ARMS)
        of_seed = np.sqrt(self.correlation) * draw_noise(stream, self.kind, (studies, 1, seeds))
        rest = np.sqrt(1 - self.correlation)
        kind = stream.random(shape)
        truth = np.where(kind < self.helping, 1, np.where(kind > 1 - self.hurting, -1, 0))
        arms = of_seed + rest * draw_noise(stream, self.kind, (*shape, seeds))
        arms += self.effect * truth[..., None]
        extra = max(seeds, BASELINE_SEEDS) - seeds
        both = np.concatenate([of_seed, draw_noise(stream, self.kind, (studies, 1, extra))], axis=2)
        both[..., seeds:] *= np.sqrt(self.correlation)
        base = both + rest * draw_noise(stream, self.kind, both.shape)
        return Drawn(arms, base, truth)


@dataclass(frozen=True)
class Drawn:
    """Simulated cells: arms [studies, arms, seeds], baseline [studies, 1, seeds], and the direction
    of each arm's effect [studies, arms], 0 for none."""

    arms: Array
    baseline: Array
    truth: NDArray[np.int_]

    def effects(self, n: int, arms: NDArray[np.int_] | slice, first: int = 0) -> Effect:
        """Estimates arms of n seeds; the baseline has as many, or eight.

        Args:
            arms: a slice, or one arm of each study [studies].
            first: seed of both sides.
        """
        n_base = max(n, BASELINE_SEEDS)
        chosen = (slice(None) if isinstance(arms, slice) else np.arange(len(arms)), arms)
        cells = self.arms[..., first : first + n][chosen]
        cells = cells if cells.ndim == 3 else cells[:, None]
        base = self.baseline[..., first : first + n_base]
        return estimate(cells, base, n)


@dataclass(kw_only=True)
class Words:
    """Words of the simulated studies: an arm has a direction where any look said so."""

    truth: NDArray[np.int_]
    said: NDArray[np.int_]

    @property
    def any_false(self) -> float:
        """Share of studies with a false word."""
        return float((self._false(self.said != 0)).any(axis=-1).mean())

    @property
    def false_rate(self) -> float:
        """Mean share of false words among the words of a study."""
        return self._rate(self.said != 0)

    @property
    def false_helps_rate(self) -> float:
        """Mean share of false words among those that say "helps"."""
        return self._rate(self.said > 0)

    @property
    def power(self) -> float:
        """Share of the arms with an effect for the better that are said to help."""
        return float((self.said > 0)[self.truth > 0].mean())

    def _false(self, which: NDArray[np.bool_]) -> NDArray[np.bool_]:
        return which & (self.said != self.truth)

    def _rate(self, which: NDArray[np.bool_]) -> float:
        false = self._false(which).sum(axis=-1)
        return float((false / np.maximum(1, which.sum(axis=-1))).mean())


def simulate(design: Design, studies: int, seed: int, extend: str = "") -> Words:
    """Runs many studies.

    Args:
        extend: what is done after the ten runs: '' nothing; 'best' the most promising arms get
            one seed after the other until they help; 'all' every arm gets one seed, three times;
            'again' every arm is repeated with other seeds, twice.
    """
    stream = numpy_stream(seed, "simulation", f"study {design!r} {extend}")
    parts = []
    for start in range(0, studies, CHUNK):
        parts.append(_simulate(design, min(CHUNK, studies - start), stream, extend))
    return Words(
        truth=np.concatenate([part.truth for part in parts]),
        said=np.concatenate([part.said for part in parts]),
    )


#: Seeds of an arm at its last look, and how many of the most promising arms are extended.
MOST_SEEDS, EXTENDED = 24, 8


def _simulate(design: Design, studies: int, stream: np.random.Generator, extend: str) -> Words:
    drawn = design.draw(studies, MOST_SEEDS if extend else design.seeds, stream)
    rule = ErrorBudget(alpha=ALPHA, planned=RUNS * ARMS)
    study = _Study(
        drawn=drawn,
        ledgers=Ledgers(rule=rule, studies=studies),
        words=Words(truth=drawn.truth, said=np.zeros_like(drawn.truth)),
        sesoi=design.sesoi,
    )
    promising = np.ones(drawn.truth.shape)
    for part in PARTS:
        effect = study.look(part, design.seeds, 1)
        promising[:, part] = np.where(effect.mean > 0, effect.p, 1.0)
    n = design.seeds
    if extend == "best":
        _extend_best(study, promising, n)
    further = {"all": [(n + k, 0) for k in (1, 2, 3)], "again": [(n, n), (n, 2 * n)]}
    for look, (seeds, first) in enumerate(further.get(extend, ()), start=2):
        for part in PARTS:
            study.look(part, seeds, look, first)
    return study.words


#: Arms of each run.
PARTS = [slice(run * ARMS, (run + 1) * ARMS) for run in range(RUNS)]


@dataclass(frozen=True, kw_only=True)
class _Study:
    """Studies in progress."""

    drawn: Drawn
    ledgers: Ledgers
    words: Words
    sesoi: float

    def look(self, arms: NDArray[np.int_] | slice, seeds: int, look: int, first: int = 0) -> Effect:
        """Judges a run of arms: a slice, or one arm of each study; a word once said stays."""
        effect = self.drawn.effects(seeds, arms, first)
        said = _judge(effect, self.ledgers.give(effect.mean.shape[1], look), self.sesoi)
        one = not isinstance(arms, slice)
        place = (np.arange(len(said))[:, None], arms[:, None]) if one else (slice(None), arms)
        before = self.words.said[place]
        self.ledgers.report((said > 0) & (before <= 0))
        self.words.said[place] = np.where(said != 0, said, before)
        return effect


def _extend_best(study: _Study, promising: Array, seeds: int) -> None:
    """Gives the most promising arms that do not help yet more seeds, and judges them each time.

    Args:
        promising: p of each arm [studies, arms], 1 where its mean is worse.
    """
    rows = np.arange(len(promising))
    promising = np.where(study.words.said > 0, 2.0, promising)
    for _ in range(EXTENDED):
        best = promising.argmin(axis=-1)
        for look, n in enumerate(range(seeds + 1, MOST_SEEDS + 1), start=2):
            study.look(best, n, look)
        promising[rows, best] = 3.0


def _judge(effect: Effect, level: Array, sesoi: float) -> NDArray[np.int_]:
    """1 where the word is "helps", -1 where it is "hurts", else 0."""
    word = choose_words(effect.mean, *effect.interval(level), sesoi)
    return np.where(word == DISCOVERY, 1, np.where(word == "hurts", -1, 0))


def study_rows(studies: int, seed: int, kind: Kind, r: float) -> Iterator[Row]:
    """Promises of the error budget over whole studies.

    Args:
        r: correlation within a seed.
    """
    for seeds in (3, 8):
        design = Design(seeds=seeds, kind=kind, correlation=r)
        for extend, how in EXTENSIONS.items():
            promise = f"study without effects{how}: a false word"
            yield _at_most(promise, design, studies, seed, extend)
    for seeds, helping, hurting, effect in MIXED:
        design = Design(
            seeds=seeds,
            kind=kind,
            correlation=r,
            helping=helping,
            hurting=hurting,
            effect=effect,
        )
        yield _at_most("study with effects: share of false words", design, studies, seed)
    for extend, how in EXTENSIONS.items():
        if extend:
            design = Design(seeds=8, kind=kind, correlation=r, helping=0.2)
            promise = f"study with effects{how}: share of false words"
            yield _at_most(promise, design, studies, seed, extend)
    design = Design(kind=kind, correlation=r, helping=0.2, sesoi=SESOI)
    helps = simulate(design, studies, seed).power
    yield _row("an effect of 9 sd in such a study: helps", design, studies, helps, (0.95, 1.0))


#: What is done after ten runs, in words.
EXTENSIONS = {
    "": "",
    "best": ", best arms extended",
    "all": ", every arm extended",
    "again": ", other seeds twice",
}
#: Seeds, shares of arms that help and that hurt, and size of the effect.
MIXED = [
    *((8, helping, 0.0, effect) for helping in (0.2, 0.5) for effect in (3.0, 9.0)),
    (8, 0.1, 0.4, 9.0),
    (3, 0.2, 0.0, 9.0),
    (3, 0.5, 0.0, 9.0),
]


def _at_most(promise: str, design: Design, studies: int, seed: int, extend: str = "") -> Row:
    """Row of a rate that may not exceed alpha: of studies with a false word, or of false words
    among those that say "helps", or among all, whichever is larger."""
    words = simulate(design, studies, seed, extend)
    true = design.helping + design.hurting
    rate = max(words.false_rate, words.false_helps_rate) if true else words.any_false
    return _row(promise, design, studies, rate, (0.0, ALPHA))


def _row(
    promise: str, design: Design, studies: int, observed: float, bounds: tuple[float, float]
) -> Row:
    return Row(
        promise=promise,
        cells=str(design),
        studies=studies,
        observed=observed,
        low=bounds[0],
        high=bounds[1],
    )
