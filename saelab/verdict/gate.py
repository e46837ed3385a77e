"""The gate: no score counts before its cell is shown to be alive.

All checks are in one table, `CHECKS`, each with its threshold, outcome, meaning and remedy. They
read the facts of one cell, a plain dictionary, and change nothing. The outcomes, worst first:

    invalid      the software's fault: the cell's number is null and its pair is excluded
    failed       the arm's fault (it died, diverged, lost its sparsity): the pair stays and counts
                 against the arm, because dropping it would leave the survivors only. What follows
                 from such a failure (weights of zero, numbers beyond float32) is not invalid too
    relabelled   a learned scalar did not move or collapsed: the arm is named fixed, numbers stay
    warning      shown next to the numbers
    ok           no check fired

A check whose facts are absent (missing or None) is silent and named in `GateResult.unchecked`. An
arm may declare the checks it expects to fire (a penalty of weight 0, a dead control): they are
shown and do not count.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Literal

from saelab.errors import SettingError, nearest
from saelab.runs.schema import REACH
from saelab.verdict.gate_looks import (
    EXPLODED,
    Facts,
    Hits,
    above,
    arm_died,
    at_most,
    below,
    find_collapsed,
    find_constant_probing,
    find_control_band,
    find_hook_mismatch,
    find_inert,
    find_loss_recovered,
    find_nonfinite_step,
    find_not_finite,
    find_repeated_data,
    find_worse_than_linear,
    find_zero_weights,
    flag,
    has_diverged,
    number,
    predicts_badly,
    ratio,
    unless,
)

Outcome = Literal["invalid", "failed", "relabelled", "warning"]

#: Outcomes from worst to mildest.
ORDER: tuple[Outcome, ...] = ("invalid", "failed", "relabelled", "warning")


@dataclass(frozen=True, kw_only=True)
class Check:
    """Rule of the gate.

    Args:
        name: in findings, plans and reports.
        outcome: of a cell for which it fires.
        threshold: the number it compares with; None for a rule without one.
        needs: facts that must be present; a name that ends in '.' or '_' stands for any fact
            with that beginning.
        explanation: meaning of a finding.
        remedy: advice to the reader.
        look: (facts, threshold) -> (subject, observation) for each finding; the subject is ''
            for the cell as a whole and a scalar's name otherwise.
        of_some_kinds: whether absent facts mean that the rule is not about such a cell, rather
            than that it could not be checked.
    """

    name: str
    outcome: Outcome
    threshold: float | None
    needs: tuple[str, ...]
    explanation: str
    remedy: str
    look: Callable[[Facts, float], Hits]
    of_some_kinds: bool = False

    def has_facts(self, facts: Facts) -> bool:
        """Returns whether all facts that the rule needs are present."""
        for need in self.needs:
            if facts.get(need) is not None:
                continue
            beginning = need[-1] in "._"
            if not beginning or all(facts[key] is None for key in facts if key.startswith(need)):
                return False
        return True


@dataclass(frozen=True, kw_only=True)
class Finding:
    """Check that fired; `sentence` gives observation, value, threshold and remedy."""

    check: str
    outcome: Outcome
    sentence: str
    expected: bool
    subject: str = ""


@dataclass(frozen=True)
class GateResult:
    """Result of the gate for one cell.

    Args:
        outcome: the worst outcome of the findings that were not expected, or 'ok'.
        findings: every check that fired, worst first.
        unchecked: names of the checks whose facts were absent.
    """

    outcome: Outcome | Literal["ok"]
    findings: tuple[Finding, ...]
    unchecked: tuple[str, ...] = ()

    @property
    def fixed_scalars(self) -> tuple[str, ...]:
        """Learned scalars that the report must name as fixed."""
        relabelled = (f for f in self.findings if f.outcome == "relabelled" and not f.expected)
        return tuple(dict.fromkeys(f.subject for f in relabelled))

    def summary(self) -> str:
        """The outcome and the names of its checks, as in 'failed: no_firing'."""
        names = [f.check for f in self.findings if f.outcome == self.outcome and not f.expected]
        return f"{self.outcome}: {', '.join(dict.fromkeys(names))}" if names else self.outcome


def gate(facts: Facts, expected: Collection[str] = ()) -> GateResult:
    """Applies every check to the facts of one cell.

    Args:
        facts: name -> value; None or a missing name means unknown. Flags are 0 or 1, shares lie
            between 0 and 1, L0 is in latents per token.
        expected: names of the checks that the arm declares as expected to fire.

    Raises: SettingError for an expected check that does not exist, or for a fact of the wrong type.
    """
    check_expected(expected)
    findings: list[Finding] = []
    unchecked = {check.name for check in CHECKS if not check.has_facts(facts)}
    for check in WORST_FIRST:
        if check.name not in unchecked:
            for subject, text in check.look(facts, check.threshold or 0.0):
                sentence = f"{text}: {check.explanation}; {check.remedy}"
                is_expected = check.name in expected
                findings.append(
                    Finding(
                        check=check.name,
                        outcome=check.outcome,
                        sentence=sentence,
                        expected=is_expected,
                        subject=subject,
                    )
                )
    counted: list[Outcome] = [f.outcome for f in findings if not f.expected]
    left_out = tuple(c.name for c in CHECKS if c.name in unchecked and not c.of_some_kinds)
    return GateResult(counted[0] if counted else "ok", tuple(findings), left_out)


def check_expected(names: Collection[str]) -> None:
    """Raises: SettingError for a name that is not a check of the gate."""
    checks = [check.name for check in CHECKS]
    for name in names:
        if name not in checks:
            hint = nearest(name, checks)
            raise SettingError("expected", name, f"no such check of the gate{hint}")


# ---------------------------------------------------------------------------------------- the table

#: Every rule of the gate. A threshold without a source is our choice, argued in the explanation.
CHECKS: tuple[Check, ...] = (
    Check(
        name="weights_zero", outcome="invalid", threshold=None, needs=("weights_zero",),
        explanation="no gradient can flow, so this SAE was never trained",
        remedy="start from unit decoder rows and their transpose",
        look=find_zero_weights,
    ),
    Check(
        name="no_steps", outcome="invalid", threshold=0.0, needs=("steps",),
        explanation="no training step was taken or recorded",
        remedy="train the cell and record its steps",
        look=unless(has_diverged, at_most("steps", "the number of training steps")),
    ),
    Check(
        name="no_tokens", outcome="invalid", threshold=0.0, needs=("tokens",),
        explanation="no token was trained on or recorded",
        remedy="train the cell and record its tokens",
        look=unless(has_diverged, at_most("tokens", "the number of training tokens")),
    ),
    Check(
        name="hook_mismatch", outcome="invalid", threshold=None, needs=("hook_",),
        explanation="the SAE was trained, fed or scored on activations of another place",
        remedy="name one hook for training, activations and evaluation",
        look=find_hook_mismatch,
    ),
    Check(
        name="probing_constant", outcome="invalid", threshold=None, needs=("probing_constant",),
        explanation="the probes saw nothing of the model",
        remedy="check that the SAE was trained and that its code reaches the probes",
        look=unless(arm_died, find_constant_probing),
    ),
    Check(
        name="loss_recovered_impossible", outcome="invalid", threshold=1.02,
        needs=("loss_recovered",),
        explanation="the model predicts this text well, and no reconstruction beats the "
        "activations themselves by more than rounding",
        remedy="check the hook, the mask and the ablation of that evaluation",
        look=unless(predicts_badly, find_loss_recovered),
    ),
    Check(
        name="not_finite", outcome="invalid", threshold=None, needs=(),
        explanation="training was finite, so the measurement is at fault",
        remedy="report the evaluation that gave these numbers",
        look=find_not_finite,
    ),
    Check(
        name="nonfinite_training", outcome="failed", threshold=None, needs=("nonfinite_step",),
        explanation="the arm diverged",
        remedy="lower its learning rate or the weight of its own loss terms",
        look=find_nonfinite_step,
    ),
    Check(
        name="weights_exploded", outcome="failed", threshold=EXPLODED, needs=("largest_weight",),
        explanation="the arm diverged, and what it reconstructs is beyond float32",
        remedy="lower its learning rate or the weight of its own loss terms",
        look=above("largest_weight", "the largest weight"),
    ),
    Check(
        name="no_firing", outcome="failed", threshold=0.0, needs=("l0",),
        explanation="no latent fires on any token",
        remedy="lower the penalty or the threshold, or warm it up more slowly",
        look=at_most("l0", "L0", " latents per token"),
    ),
    Check(
        name="constant_code", outcome="failed", threshold=0.0, needs=("code_std",),
        explanation="the code is the same for every token and carries nothing",
        remedy="lower the penalty or the threshold, or use another start",
        look=unless(
            lambda facts: number(facts, "l0") == 0,
            at_most("code_std", "the largest standard deviation of a latent over tokens"),
        ),
    ),
    Check(
        name="worse_than_mean", outcome="failed", threshold=0.0, needs=("explained_variance",),
        explanation="the reconstruction is no better than the mean activation",
        remedy="lower the penalty or the learning rate",
        look=at_most("explained_variance", "explained variance"),
    ),
    Check(
        name="loss_not_recovered", outcome="failed", threshold=0.0, needs=("loss_recovered",),
        explanation="the reconstruction serves the model no better than ablating the hook",
        remedy="lower the penalty or the learning rate",
        look=at_most("loss_recovered", "loss recovered"),
    ),
    Check(
        name="far_above_target", outcome="failed", threshold=10.0, needs=("l0", "target_l0"),
        explanation="the arm did not keep its sparsity",
        remedy="raise its penalty or threshold and calibrate it again",
        look=ratio("l0", "target_l0", "L0", "the target"),
    ),
    Check(
        name="dense_code", outcome="failed", threshold=0.5, needs=("l0", "d_sae"),
        explanation="more than half of the latents fire on a token, so the code is not sparse",
        remedy="raise the penalty or the threshold",
        look=ratio("l0", "d_sae", "L0", "d_sae"),
    ),
    Check(
        name="inert_scalar", outcome="relabelled", threshold=0.05, needs=(REACH,),
        explanation="the arm is reported as fixed, a label only, unless the seeds moved it alike: "
        "noise alone reaches 15% in 200 steps and a converged scalar shows 2.8% after 20,000",
        remedy="look at its path, or raise its own learning rate",
        look=find_inert,
    ),
    Check(
        name="collapsed_balance", outcome="relabelled", threshold=0.10,
        needs=("alpha_outside_share",),
        explanation="the balance chose one term for good and the arm is reported as fixed",
        remedy="use a balance with an equilibrium (minimax, gradnorm), or report the fixed arm",
        look=find_collapsed,
    ),
    Check(
        name="random_band", outcome="warning", threshold=None,
        needs=("probing_accuracy", "random_control_low", "random_control_high"),
        explanation="that is a result and no fault, since random dictionaries do as well",
        remedy="claim nothing about features from this score",
        look=find_control_band,
    ),
    Check(
        name="loss_below_clean", outcome="warning", threshold=1.02,
        needs=("loss_recovered", "ce_clean", "ce_zero"),
        explanation="the model predicts this text so badly that a reconstruction may serve it "
        "better than its own activations",
        remedy="measure on text that the model knows before anything is said of its losses",
        look=unless(lambda facts: not predicts_badly(facts), find_loss_recovered),
    ),
    Check(
        name="dead_latents", outcome="warning", threshold=0.5, needs=("dead_share",),
        explanation="most of the dictionary is unused",
        remedy="resample or use AuxK, or lower d_sae",
        look=above("dead_share", "the share of dead latents"),
    ),
    Check(
        name="near_duplicates", outcome="warning", threshold=0.05, needs=("near_duplicate_share",),
        explanation="latents repeat each other, with a decoder cosine above 0.95",
        remedy="lower d_sae or penalise similar decoder rows",
        look=above("near_duplicate_share", "the share of latents with a near twin"),
    ),
    Check(
        name="penalty_negligible", outcome="warning", threshold=0.01, needs=("penalty_share",),
        explanation="the penalty hardly acts, so the arm is nearly the baseline",
        remedy="raise its weight until the share is 0.05 to 0.3",
        look=below("penalty_share", "the penalty's share of the gradient"),
    ),
    Check(
        name="penalty_dominant", outcome="warning", threshold=0.9, needs=("penalty_share",),
        explanation="the penalty drowns the reconstruction",
        remedy="lower its weight until the share is 0.05 to 0.3",
        look=above("penalty_share", "the penalty's share of the gradient"),
    ),
    Check(
        name="loss_spikes", outcome="warning", threshold=0.0, needs=("spikes",),
        explanation="training was not stable: a spike is above 10 median absolute deviations of "
        "the log loss for at least 3 steps",
        remedy="lower the learning rate or clip gradients",
        look=above("spikes", "the number of loss spikes"),
    ),
    Check(
        name="repeated_data", outcome="warning", threshold=None,
        needs=("data_passes", "planned_passes"),
        explanation="the cell saw the same activations more often than the plan says",
        remedy="add text, or plan the repetition",
        look=find_repeated_data,
    ),
    Check(
        name="not_converged", outcome="warning", threshold=0.02, needs=("last_tenth_improvement",),
        explanation="the comparison is one of speed rather than of end points",
        remedy="train on more tokens",
        look=above("last_tenth_improvement", "the share by which the last tenth improved FVU"),
    ),
    Check(
        name="bos_variance", outcome="warning", threshold=0.2, needs=("bos_variance_share",),
        explanation="the first token's own direction makes up much of what is reconstructed",
        remedy="mask BOS positions in training and evaluation",
        look=unless(
            lambda facts: flag(facts, "bos_masked"),
            above("bos_variance_share", "the share of variance at BOS positions"),
        ),
    ),
    Check(
        name="large_mean", outcome="warning", threshold=3.0, needs=("mean_over_std",),
        explanation="the mean dominates the activations and latents will be spent on it",
        remedy="centre the activations",
        look=unless(
            lambda facts: flag(facts, "centred"),
            above("mean_over_std", "norm(mean) / norm(std) of the activations"),
        ),
    ),
    Check(
        name="wider_than_input", outcome="warning", threshold=1.0, needs=("l0", "d_in"),
        explanation="more latents fire than the input has dimensions",
        remedy="raise the penalty or the threshold",
        look=ratio("l0", "d_in", "L0", "d_in"),
    ),
    Check(
        name="worse_than_linear", outcome="warning", threshold=None,
        needs=("explained_variance", "linear_explained_variance"),
        explanation="a linear map of the input, without any latent, explains more of the target",
        remedy="train longer, at a higher L0 or another rate, or report the map beside it",
        look=find_worse_than_linear, of_some_kinds=True,
    ),
)  # fmt: skip
#: The same, the worst outcomes first.
WORST_FIRST = sorted(CHECKS, key=lambda check: ORDER.index(check.outcome))


# --------------------------------------------------------------------------------------- SAEBench
