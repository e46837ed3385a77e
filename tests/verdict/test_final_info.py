"""The order of metrics in final_info.json, which a driver reads from the top."""

from __future__ import annotations

from typing import Any

from saelab.study.plan import BaseConfig
from saelab.verdict.final_info import metric_order

#: Arms that together have every part whose scalars are reported, in no helpful order.
ARMS: list[dict[str, Any]] = [
    {},
    {"sae.losses+": "similarity", "sae.controllers+": "rounded_k"},
    {"sae.activation": "jumprelu"},
    {"sae.activation": "tied_threshold", "sae.constraints": ["unit_norm"]},
    {"sae.scaling": {"kind": "variance", "temperature": "learned_schedule"}},
]
ORDER = (
    *("fvu", "l0", "loss_recovered", "ce_rise", "loss_recovered_random", "dead_share"),
    *("sae_top_1_test_accuracy", "sae_top_5_test_accuracy", "sae_test_accuracy"),
    *("sae_probes_top_1_auc", "sae_probes_top_16_auc"),
    *("beta", "theta", "tau", "rho", "alpha", "k", "threshold", "sparsity", "penalty_share"),
    "final_loss",
    *("position.fvu_early", "position.fvu_late"),
    *("convergence.beta", "sensitivity.beta", "convergence.theta", "sensitivity.theta"),
    *("convergence.tau", "sensitivity.tau", "convergence.steps"),
    *("spikes", "stability.rise"),
    *("consistency.temperature", "consistency.r2"),
    *("convergence.rho", "sensitivity.rho"),
    *("consistency.seeds", "consistency.chance", "consistency.half_life"),
    *("consistency.seeds_signed", "resampling.count", "lifetime.resamplings", "lifetime.median"),
    *("explained_variance", "cosine", "ce_spliced", "ce_clean", "ce_zero"),
    *("sae_top_20_test_accuracy", "sae_top_2_test_accuracy"),
    *("sae_top_10_test_accuracy", "sae_top_50_test_accuracy"),
    *("sae_probes_top_4_auc", "sae_probes_top_64_auc", "sae_probes_top_2_auc"),
    *("sae_probes_top_8_auc", "sae_probes_top_32_auc", "sae_probes_top_128_auc"),
    *("position.l0_early", "position.l0_late"),
    *("position.dead_share_early", "position.dead_share_late"),
    *("consistency.chance_signed", "decoder.max_cosine", "lifetime.deaths"),
    *("stability.detrended", "stability.gradient_cv", "stability.nonfinite"),
)


def arms(changes: list[dict[str, Any]]) -> list[BaseConfig]:
    return [BaseConfig().patched(c) for c in changes]


def test_the_order_does_not_depend_on_that_of_the_arms() -> None:
    assert tuple(metric_order(arms(ARMS))) == ORDER
    assert tuple(metric_order(arms(ARMS[::-1]))) == ORDER


def test_scalars_that_no_arm_has_are_left_out() -> None:
    without = {"theta", "tau", "rho", "alpha", "k", "threshold", "penalty_share"}
    without |= {"beta", "convergence.rho", "sensitivity.rho"}
    assert metric_order(arms(ARMS[:1])) == [name for name in ORDER if name not in without]
