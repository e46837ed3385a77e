"""Held-out text for the calibration of L0 in training: how much of it, and why there is none.

It follows the evaluated contexts in the held-out text, so that no metric reads what a controller
has seen (`saelab.training.calibration_text`).
"""

from __future__ import annotations

from collections.abc import Sequence

from saelab.sae import SAEConfig
from saelab.study.plan import BaseConfig

#: Fewest tokens that L0 is calibrated on. Our choice: L0 of 128 contexts has a standard error of
#: about 0.8%, which is as large as what it would correct.
LEAST_TOKENS = 16_384


def calibration_tokens(base: BaseConfig) -> int:
    """Returns the number of held-out tokens that L0 is calibrated on; 0 where it is not."""
    asked = base.evaluation.calibration_tokens
    tokens = base.evaluation.tokens if asked is None else asked
    return tokens if base.activations is None and tokens >= LEAST_TOKENS else 0


def why_not_calibrated(base: BaseConfig) -> str:
    """Returns the reason why the settings ask for no calibration of L0; '' where they do."""
    if calibration_tokens(base):
        return ""
    if base.activations is not None:
        return "activations were made elsewhere"
    if base.evaluation.calibration_tokens == 0:
        return "evaluation.calibration_tokens is 0"
    return f"it needs {LEAST_TOKENS:,} held-out tokens (evaluation.calibration_tokens)"


def describe_calibration(base: BaseConfig, saes: Sequence[SAEConfig]) -> str:
    """Returns one line on what L0 is calibrated on, or why it is not.

    Args:
        saes: settings of the arms.
    """
    d_out = 2 if base.target_hooks else None
    if saes and not any(sae.outline(d_out=d_out).raise_thresholds(0.0) for sae in saes):
        return "L0 is what each activation selects: no threshold is to be calibrated"
    if reason := why_not_calibrated(base):
        return f"L0 is held on training batches and not calibrated on held-out text: {reason}"
    tokens = calibration_tokens(base)
    return f"L0 is calibrated on {tokens:,} held-out tokens that no metric reads"
