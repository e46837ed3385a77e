"""Time of a launch on this machine, with all that it does: start, harvests, cells, evaluation,
probing, controls.

    launch    start + harvests / threads + max(longest job, sum of jobs / workers)
    cell      steps x step + evaluation
    control   evaluation; the one with a frozen decoder is trained as well
    evaluation, at the target L0
              encode(held-out rows) + 4 passes of the loss's contexts + encode(probing rows)
              + probes x classes + fits of `sae_probes` where it is asked for
    evaluation of a further level
              encode(held-out rows) + 2.4 passes

encode(n): the forward part of a step on n rows; a pass: the model from the hook to its logits. The
probes' seconds and the numbers of passes are fits to launches on two cores (probes that are
compared with the harvest, logits and their softmax count as passes).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from saelab.data import language_model
from saelab.data.language_model import Size
from saelab.preflight.cost import (
    CODE_BYTES,
    active_latents,
    harvest_flops,
    harvest_seconds,
    probing_classes,
    probing_rows,
    step_seconds,
)
from saelab.preflight.rates import Rates, model_rates, thread_rates
from saelab.preflight.sae_probes_cost import sae_probes_cost
from saelab.study.calibration import calibration_tokens
from saelab.study.plan import BASELINE, BaseConfig, CellSpec, frozen_control
from saelab.training.calibration_text import MOST_ROWS

#: Seconds until workers have imported torch and opened their data, and until the run folder is
#: written. Our fit to launches on two cores.
START_SECONDS = 10.0
#: Passes of the loss's contexts that an evaluation costs, at the target L0 and at further levels.
PASSES, PASSES_OF_LEVEL = 4.0, 2.4
#: Seconds of the probes of one class, over all numbers of latents.
PROBE_SECONDS = 0.03
#: Controls that are evaluated without being trained: those with latents of the baseline's number,
#: those with one for each channel, and the model's channels, which are probed alone.
WIDE_CONTROLS, NARROW_CONTROLS = 2, 2


@dataclass(frozen=True, kw_only=True)
class Measured:
    """Data that the cells of a launch are measured on.

    Args:
        base: settings of the launch.
        d_in: width of the activations.
        level: of the cells at the plan's L0, which alone are probed.
        size: of the language model; None for activations that were made elsewhere.
    """

    base: BaseConfig
    d_in: int
    level: float
    size: Size | None

    @classmethod
    def of(cls, base: BaseConfig, d_in: int, level: float) -> Measured:
        size = None if base.activations is not None else language_model.size(base.model)
        return cls(base=base, d_in=d_in, level=level, size=size)

    def evaluation_seconds(self, rates: Rates, width: int, at_target: bool = True) -> float:
        """Seconds to evaluate a subject of `width` latents."""
        encoded = encode_seconds(rates, self.base.evaluation.tokens, self.d_in, width)
        passes = PASSES if at_target else PASSES_OF_LEVEL
        probing = self.probing_seconds(rates, width) if at_target else 0.0
        return encoded + passes * self.pass_seconds() + probing

    def pass_seconds(self) -> float:
        """Seconds of the model from the hook to its logits on the contexts of the loss."""
        if self.size is None:
            return 0.0
        size, base = self.size, self.base
        whole = base.patched({"hook_name": f"blocks.{size.blocks - 1}.hook_resid_post"})
        after = harvest_flops(size, whole) - harvest_flops(size, base)
        logits = 2 * size.vocabulary * size.d_model
        rate = model_rates(base.model.dtype).model
        return base.evaluation.loss_contexts * base.context * (after + logits) / rate

    def probing_seconds(self, rates: Rates, width: int) -> float:
        """Seconds to encode the probing texts and solve the probes."""
        if self.size is None:
            return 0.0
        last = sae_probes_cost(self.base)
        rows = probing_rows(self.base) + last.texts
        encoded = encode_seconds(rates, rows, self.d_in, width)
        return encoded + PROBE_SECONDS * probing_classes(self.base) + last.fit_seconds

    def cell_seconds(self, spec: CellSpec) -> float:
        """Seconds to train and evaluate a cell on one thread."""
        rates, n = thread_rates(spec.sae.precision), spec.train.batch_size
        width = spec.sae.d_sae
        step = step_seconds(rates, n, self.d_in, width, active_latents(spec.sae))
        at_target = spec.id.level == self.level
        calibrated = min(calibration_tokens(self.base), MOST_ROWS * spec.train.tokens)
        training = spec.train.steps * step + encode_seconds(rates, calibrated, self.d_in, width)
        return training + self.evaluation_seconds(rates, width, at_target)

    def control_seconds(self, specs: Sequence[CellSpec]) -> list[float]:
        """Seconds of the two jobs of the controls: the one that is trained, and the others."""
        first = next((spec for spec in specs if spec.id.arm == BASELINE), specs[0])
        rates, width = thread_rates(first.sae.precision), first.sae.d_sae
        others = WIDE_CONTROLS * self.evaluation_seconds(rates, width)
        others += NARROW_CONTROLS * self.evaluation_seconds(rates, self.d_in)
        if self.size:
            fits = sae_probes_cost(self.base).fit_seconds
            others += PROBE_SECONDS * probing_classes(self.base) + fits
        frozen = frozen_control(specs)
        return [*([self.cell_seconds(frozen)] if frozen else []), others]


def encode_seconds(rates: Rates, rows: float, d: int, width: int) -> float:
    """Seconds of the code of so many rows on one thread."""
    seconds = 2 * rows * d * width / rates.matrix + CODE_BYTES * rows * width / rates.memory
    return seconds / rates.step_efficiency


def training_seconds(
    specs: Sequence[CellSpec], measured: Measured, at_once: int, controls: bool = True
) -> float:
    """Seconds to train and evaluate cells on this machine, good to about a third.

    Args:
        specs: the cells.
        measured: what they are measured on.
        at_once: cells at work at a time, each on one thread.
        controls: whether the control subjects are made too.
    """
    jobs = [measured.cell_seconds(spec) for spec in specs]
    if controls and specs:
        jobs += measured.control_seconds(specs)
    return START_SECONDS + max([sum(jobs) / max(1, at_once), *jobs])


def preparation_seconds(base: BaseConfig) -> float:
    """Seconds to harvest the activations to train and evaluate on, and those of probing texts, on
    all threads."""
    if base.activations is not None:
        return 0.0
    tokens = base.train.tokens + base.evaluation.tokens + calibration_tokens(base)
    tokens += probing_rows(base) + sae_probes_cost(base).tokens
    rates = model_rates(base.model.dtype)
    return harvest_seconds(language_model.size(base.model), base, tokens, rates) / (
        torch.get_num_threads()
    )
