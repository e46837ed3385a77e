"""The gate: every rule fires on its own case, is silent on a healthy cell, and says why."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path

import pytest

from saelab.analysis.saebench import read_saebench_result
from saelab.errors import SettingError, SourceError
from saelab.verdict.gate import CHECKS, ORDER, Facts, GateResult, gate

DATA = Path(os.environ.get("SAELAB_REAL_DATA") or Path(__file__).parents[2] / "../shared/data")
RECORDED = DATA / "baseline_gemma2_2b_layer19.json"

HOOK = "blocks.2.hook_resid_post"
HEALTHY: dict[str, float | str | None] = {
    "l0": 32.0, "target_l0": 32.0, "d_in": 64.0, "d_sae": 1536.0, "code_std": 0.8,
    "dead_share": 0.1, "explained_variance": 0.8, "loss_recovered": 0.95,
    "probing_constant": 0.0, "probing_accuracy": 0.9,
    "random_control_low": 0.6, "random_control_high": 0.7,
    "weights_zero": 0.0, "nonfinite_step": None, "steps": 500.0, "tokens": 5e5,
    "hook_sae": HOOK, "hook_activations": HOOK, "hook_evaluation": HOOK,
    "near_duplicate_share": 0.01, "penalty_share": 0.1, "spikes": 0.0,
    "largest_weight": 1.5, "l0_at_start": 40.0, "ce_clean": 2.0, "ce_spliced": 2.4, "ce_zero": 10.0,
    "last_tenth_improvement": 0.01, "data_passes": 1.0, "planned_passes": 1.0,
    "bos_variance_share": 0.05, "bos_masked": 0.0, "mean_over_std": 1.0, "centred": 0.0,
    "scalar_reach.beta": 0.4, "scalar_reach.alpha": 0.3, "alpha_outside_share": 0.0,
}  # fmt: skip

#: check -> (facts that make it fire, facts just on the healthy side, what the sentence must hold)
CASES: dict[str, tuple[Facts, Facts, str]] = {
    "weights_zero": (
        {"weights_zero": 1.0, "l0_at_start": 0.0}, {"weights_zero": 1.0}, "all zero",
    ),
    "no_steps": ({"steps": 0}, {"steps": 1}, "steps is 0 (limit: above 0)"),
    "no_tokens": ({"tokens": -100000}, {"tokens": 1}, "tokens is -100000"),
    "hook_mismatch": (
        {"hook_evaluation": "blocks.3.hook_resid_post"},
        {"hook_sae": None, "hook_evaluation": None},
        "evaluation blocks.3.hook_resid_post",
    ),
    "probing_constant": ({"probing_constant": 1.0}, {"probing_constant": 0.0}, "class prior"),
    "loss_recovered_impossible": ({"loss_recovered": 1.03}, {"loss_recovered": 1.02}, "1.03"),
    "loss_below_clean": (
        {"loss_recovered": 1.03, "ce_clean": 5.1, "ce_spliced": 4.95},
        {"loss_recovered": 1.02, "ce_clean": 5.1, "ce_spliced": 5.0},
        "1.03, from a loss of 4.95 nats with the reconstruction and 5.1 without (limit:",
    ),
    "weights_exploded": ({"largest_weight": 2e9}, {"largest_weight": 1e9}, "weight is 2e+09"),
    "not_finite": ({"explained_variance": math.nan}, {"explained_variance": 0.5}, "(explained_var"),
    "nonfinite_training": ({"nonfinite_step": 17}, {"nonfinite_step": None}, "at step 17"),
    "no_firing": ({"l0": 0.0}, {"l0": 0.001}, "L0 is 0 latents per token"),
    "constant_code": ({"code_std": 0.0}, {"code_std": 1e-6}, "tokens is 0"),
    "worse_than_mean": ({"explained_variance": -0.2}, {"explained_variance": 0.01}, "-0.2"),
    "loss_not_recovered": ({"loss_recovered": 0.0}, {"loss_recovered": 0.01}, "recovered is 0"),
    "far_above_target": ({"l0": 321.0}, {"l0": 320.0}, "321 (limit: 10 x the target, 32)"),
    "dense_code": ({"l0": 769.0}, {"l0": 768.0}, "769 (limit: 0.5 x d_sae, 1536)"),
    "inert_scalar": ({"scalar_reach.beta": 0.049}, {"scalar_reach.beta": 0.05}, "beta moved 4.9%"),
    "collapsed_balance": (
        {"alpha_outside_share": 0.11}, {"alpha_outside_share": 0.1}, "11.0% of the steps",
    ),
    "random_band": ({"probing_accuracy": 0.65}, {"probing_accuracy": 0.71}, "0.6 to 0.7"),
    "dead_latents": ({"dead_share": 0.51}, {"dead_share": 0.5}, "0.51 (limit: at most 0.5)"),
    "near_duplicates": ({"near_duplicate_share": 0.06}, {"near_duplicate_share": 0.05}, "0.06"),
    "penalty_negligible": ({"penalty_share": 0.009}, {"penalty_share": 0.01}, "0.009 (limit: at l"),
    "penalty_dominant": ({"penalty_share": 0.91}, {"penalty_share": 0.9}, "0.91 (limit: at most"),
    "loss_spikes": ({"spikes": 1}, {"spikes": 0}, "spikes is 1 (limit: at most 0)"),
    "repeated_data": ({"data_passes": 1.5}, {"data_passes": 1.0}, "1.5 times (planned: 1)"),
    "not_converged": ({"last_tenth_improvement": 0.03}, {"last_tenth_improvement": 0.02}, "0.03"),
    "bos_variance": (
        {"bos_variance_share": 0.3}, {"bos_variance_share": 0.3, "bos_masked": 1}, "0.3 (limit",
    ),
    "large_mean": ({"mean_over_std": 3.5}, {"mean_over_std": 3.5, "centred": 1}, "3.5 (limit"),
    "wider_than_input": ({"l0": 65.0}, {"l0": 64.0}, "65 (limit: 1 x d_in, 64)"),
    "worse_than_linear": (
        {"linear_explained_variance": 0.99}, {"linear_explained_variance": 0.1},
        "that of the linear map 0.99",
    ),
}  # fmt: skip


def fired(result: GateResult) -> set[str]:
    return {finding.check for finding in result.findings}


def test_every_rule_has_a_case_and_names_are_unique() -> None:
    names = [check.name for check in CHECKS]
    assert len(set(names)) == len(names)
    assert set(CASES) == set(names)


def test_a_healthy_cell_passes_with_every_rule_looked_at() -> None:
    result = gate(HEALTHY)
    assert (result.outcome, result.findings, result.summary()) == ("ok", (), "ok")
    assert result.unchecked == ("nonfinite_training",)  # that no step was non-finite is no fact


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.name)
def test_rule_fires_on_its_case_and_only_there(check) -> None:
    fires, quiet, text = CASES[check.name]
    result = gate(HEALTHY | dict(fires))
    finding = next(f for f in result.findings if f.check == check.name)
    assert finding.outcome == check.outcome and not finding.expected
    assert text in finding.sentence
    assert check.explanation in finding.sentence and finding.sentence.endswith(check.remedy)
    assert ORDER.index(result.outcome) <= ORDER.index(check.outcome)  # type: ignore[arg-type]
    assert check.name not in fired(gate(HEALTHY | dict(quiet)))


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.name)
def test_rule_without_its_facts_is_silent(check) -> None:
    alone = dict(CASES[check.name][0])
    needed = {k: v for k, v in (HEALTHY | alone).items() if k in check.needs or k in alone}
    for name in needed:
        if name in check.needs:
            result = gate(HEALTHY | alone | {name: None})
            assert check.name not in fired(result)
            assert (check.name in result.unchecked) != check.of_some_kinds
    assert check.name not in fired(gate({}))


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.name)
def test_an_expected_finding_is_shown_and_not_punished(check) -> None:
    facts = HEALTHY | dict(CASES[check.name][0])
    others = fired(gate(facts)) - {check.name}
    result = gate(facts, {check.name})
    finding = next(f for f in result.findings if f.check == check.name)
    assert finding.expected
    assert (result.outcome == "ok") == (not others)
    assert gate(facts, {check.name, *others}).outcome == "ok"


def test_the_worst_outcome_counts_and_comes_first() -> None:
    result = gate(HEALTHY | {"dead_share": 0.9, "steps": 0, "l0": 0.0, "scalar_reach.beta": 0.0})
    assert [f.outcome for f in result.findings] == ["invalid", "failed", "relabelled", "warning"]
    assert result.outcome == "invalid" and result.summary() == "invalid: no_steps"


def test_a_dead_arm_fails_and_its_probes_do_not_make_it_invalid() -> None:
    dead = {"l0": 0.0, "code_std": 0.0, "explained_variance": 0.0, "loss_recovered": 0.0}
    result = gate(HEALTHY | dead | {"probing_constant": 1.0, "dead_share": 1.0})
    assert result.outcome == "failed"
    assert result.summary() == "failed: no_firing, worse_than_mean, loss_not_recovered"
    diverged = HEALTHY | {"nonfinite_step": 3, "explained_variance": math.nan}
    assert gate(diverged | {"probing_constant": 1.0}).summary() == "failed: nonfinite_training"
    untrained = HEALTHY | dead | {"weights_zero": 1.0, "l0_at_start": 0.0}
    assert gate(untrained).outcome == "invalid"
    for fault in ({"nonfinite_step": 1}, {"largest_weight": 1e30}):  # the arm's, not the software's
        ended = {"weights_zero": 1.0, "not_finite": "fvu", "explained_variance": None}
        assert gate(HEALTHY | {"l0_at_start": None} | ended | fault).outcome == "failed"


def test_a_scalar_that_all_seeds_move_alike_is_not_inert_however_short_its_way() -> None:
    short = HEALTHY | {"scalar_reach.theta": 0.017, "scalar_moved.theta": 0.10}
    assert gate(short).fixed_scalars == ("theta",)  # one seed alone
    assert gate(short | {"scalar_spread.theta": 0.02}).outcome == "ok"
    assert gate(short | {"scalar_spread.theta": 0.03}).fixed_scalars == ("theta",)
    still = short | {"scalar_moved.theta": 0.0, "scalar_spread.theta": 0.0}
    assert gate(still).fixed_scalars == ("theta",)


def test_every_inert_scalar_is_named() -> None:
    result = gate(HEALTHY | {"scalar_reach.beta": 0.01, "scalar_reach.alpha": 0.02})
    assert result.outcome == "relabelled" and result.fixed_scalars == ("beta", "alpha")
    assert gate(HEALTHY | {"scalar_reach.beta": 0.01}, {"inert_scalar"}).fixed_scalars == ()
    collapsed = gate(HEALTHY | {"scalar_reach.alpha": 0.01, "alpha_outside_share": 0.5})
    assert collapsed.fixed_scalars == ("alpha",)


def test_a_number_that_is_not_finite_never_passes() -> None:
    for name, value in HEALTHY.items():
        if isinstance(value, float):
            assert gate(HEALTHY | {name: math.nan}).outcome == "invalid", name
            assert gate(HEALTHY | {name: math.inf}).outcome == "invalid", name


def test_bad_names_and_types_are_refused() -> None:
    with pytest.raises(SettingError, match="did you mean 'dead_latents'"):
        gate(HEALTHY, {"dead_latent"})
    with pytest.raises(SettingError, match="l0 = '32'"):
        gate(HEALTHY | {"l0": "32"})


def saebench(**changes) -> dict:
    """A small result in SAEBench's form: two entries, an SAE that was never trained."""
    flat = {"sae_test_accuracy": 0.5, "sae_top_5_test_accuracy": 0.5}
    details = [
        {"dataset_name": f"{name}_results", "llm_test_accuracy": 0.9, **flat,
         "sae_top_100_test_accuracy": None}
        for name in ("a", "b")
    ]  # fmt: skip
    config = {"d_in": 8, "d_sae": 16, "hook_layer": 1, "hook_name": "blocks.1.hook_resid_post"}
    return {
        "eval_type_id": "sparse_probing",
        "eval_result_metrics": {"llm": {"llm_test_accuracy": 0.9}, "sae": flat},
        "eval_result_details": details,
        "sae_cfg_dict": config | {"training_tokens": -100000},
        "training_steps": 0,
        "layer": 3,
    } | changes


def read(tmp_path: Path, data: dict) -> dict[str, float | str | None]:
    path = tmp_path / "result.json"
    path.write_text(json.dumps(data))
    return read_saebench_result(path)


def assert_untrained(result: GateResult) -> None:
    assert result.outcome == "invalid"
    wrong = {"no_steps", "no_tokens", "hook_mismatch", "probing_constant"}
    assert {f.check for f in result.findings if f.outcome == "invalid"} == wrong


def test_untrained_saebench_result_is_invalid(tmp_path: Path) -> None:
    facts = read(tmp_path, saebench())
    assert_untrained(gate(facts))
    assert (facts["hook_sae"], facts["hook_activations"]) == ("layer 1", "layer 3")


def test_trained_saebench_result_passes(tmp_path: Path) -> None:
    data = saebench(training_steps=100, layer=1)
    data["sae_cfg_dict"]["training_tokens"] = 1000
    data["eval_result_details"][1]["sae_test_accuracy"] = 0.8
    result = gate(read(tmp_path, data))
    assert (result.outcome, result.findings) == ("ok", ())
    assert {"no_steps", "hook_mismatch", "probing_constant"}.isdisjoint(result.unchecked)


def test_published_saebench_result_without_our_fields_is_silent_on_them(tmp_path: Path) -> None:
    data = saebench()
    del data["training_steps"], data["layer"], data["sae_cfg_dict"]["training_tokens"]
    data["eval_result_details"] = []
    result = gate(read(tmp_path, data))
    assert result.outcome == "ok"
    assert {"no_steps", "no_tokens", "probing_constant"} <= set(result.unchecked)


def test_other_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="sparse_probing"):
        read(tmp_path, {"eval_type_id": "core"})
    with pytest.raises(SourceError, match="does not exist"):
        read_saebench_result(tmp_path / "none.json")


@pytest.mark.skipif(not RECORDED.exists(), reason=f"{RECORDED.name} is absent")
def test_the_recorded_baseline_is_invalid() -> None:
    facts = read_saebench_result(RECORDED)
    result = gate(facts)
    assert_untrained(result)
    sentence = next(f.sentence for f in result.findings if f.check == "hook_mismatch")
    assert "sae layer 5" in sentence and "activations layer 19" in sentence
