"""Cost of the evaluation `sae_probes`, counted from its settings without reading its data sets.

    harvest      characters / CHARACTERS tokens, once for all SAEs
    a subject    encode(one row a text) + data sets x conditions x fits x seconds of a fit
    memory       the largest data set's rows and code, with a copy; in definition 2 the problems
                 that wait to be solved together
    disk         one row of float32 a text

Texts and characters are those of sae-probes 0.4.2; data sets that are named count as average ones.
"""

from __future__ import annotations

from dataclasses import dataclass

from saelab.data.probing.row_selection import conditions
from saelab.evals.sae_probes import MOST_NUMBERS
from saelab.study.plan import BaseConfig

#: Data sets, texts, and characters of them within the 1,024 tokens that are read.
SHORT, ALL = (47, 134_938, 6_472_143), (113, 334_092, 165_899_991)
#: Texts of the largest data set, and training rows of a probe.
LARGEST, TRAINING_ROWS = 5000, 1024
#: Characters of a token. Measured with SmolLM2 on the short data sets.
CHARACTERS = 3.5
#: Seconds of one fit (of one k and draw) on one thread, by definition: measured on made-up rows,
#: and on SmolLM2's short data sets.
FIT_SECONDS = {1: 0.2, 2: 0.014}


@dataclass(frozen=True, kw_only=True)
class SaeProbesCost:
    """Work of the evaluation; all 0 where the settings do not ask for it.

    Args:
        texts: rows that are encoded.
        tokens: that the language model reads.
        fit_seconds: of all probes of one subject, on one thread.
        waiting: bytes of the problems that are solved together.
    """

    texts: int = 0
    tokens: int = 0
    fit_seconds: float = 0.0
    waiting: int = 0

    def disk(self, d: int) -> int:
        """Bytes of the stored activations of d channels."""
        return 4 * self.texts * d

    def memory(self, d: int, width: int) -> int:
        """Bytes of a worker that probes an SAE of d channels and `width` latents."""
        return 8 * min(LARGEST, self.texts) * (d + width) + self.waiting


def sae_probes_cost(base: BaseConfig) -> SaeProbesCost:
    """Counts the evaluation of a launch with these settings."""
    if base.activations is not None or not base.evaluation.asks_sae_probes:
        return SaeProbesCost()
    config = base.evaluation.sae_probes
    sets, texts, characters = SHORT if config.datasets == "short" else ALL
    if isinstance(config.datasets, tuple):
        share = len(config.datasets) / sets
        sets, texts, characters = (round(share * each) for each in ALL)
    draws = config.draws if config.definition == 2 else 1
    problems = sets * len(list(conditions(config.settings))) * draws
    fits = problems * len(config.k_values)
    numbers = problems * 2 * TRAINING_ROWS * max(config.k_values)
    return SaeProbesCost(
        texts=texts,
        tokens=round(characters / CHARACTERS) + texts,
        fit_seconds=fits * FIT_SECONDS[config.definition],
        waiting=4 * min(MOST_NUMBERS, numbers) if config.definition == 2 else 0,
    )
