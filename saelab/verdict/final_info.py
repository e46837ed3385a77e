"""From cells to `final_info.json`: per arm means, standard errors and the values of every seed.

    {arm: {"means": {...}, "stderrs": {...}, "final_info_dict": {metric: [per seed]}}}

at the matched L0. An invalid seed is null everywhere; the standard error is sd (ddof 1) / sqrt(n),
null for one seed. `means` holds at most 40 entries: verdict, gate and settings, and of the metrics
those that come first in `metric_order`, the same ones for every arm of a run. The other two groups
hold all of them; everything else is in metrics.parquet.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

from saelab import stats
from saelab.evals.base import ALWAYS_NAMED
from saelab.parts.base import ROLES, Scalar
from saelab.runs.random_code import SHARE
from saelab.study.plan import BASELINE, BaseConfig, PlanConfig
from saelab.verdict.across_settings import AcrossSettings
from saelab.verdict.arms import ArmResult
from saelab.verdict.decision import Decision
from saelab.verdict.error_budget.ledger import Budget
from saelab.verdict.judge import Cells, Comparison, Difference, Rules, compare_secondary, judge
from saelab.verdict.l0_adjustment import match

#: Most entries of `means`: an autonomous driver's model sees nothing else.
MOST_MEANS = 40
#: Metrics that every launch measures.
CORE = ("fvu", "explained_variance", "l0", "loss_recovered", "cosine", "dead_share")
#: Fields of an SAE whose parts make the code: `means` says of their scalars when they settle and
#: how sensitive the SAE is to them.
MAKE_CODE = ("activation", "scaling")
#: Secondary metrics whose paired difference is shown, without a word.
SECONDARY = ("loss_recovered", "ce_rise", SHARE, "sae_top_5_test_accuracy")
#: The same for metrics that a launch measures when it is asked to: left out where no arm has them.
ASKED_FOR = ("sae_probes_top_16_auc",)
#: Those of them that `means` has no room for: the same difference in other units.
OTHER_UNITS = ("ce_rise", SHARE)


def judge_run(
    arms: Mapping[str, ArmResult],
    plan: PlanConfig,
    exploratory: bool,
    levels: Mapping[str, float] | None = None,
) -> tuple[list[Comparison], list[Difference]]:
    """The verdict on the primary metric, and secondary differences without words, all of them at
    the declared L0 (`l0_adjustment`).

    Args:
        levels: arm -> level that the study's error budget gave it, see `ledger`.
    """
    others = [arm for arm in arms.values() if arm.name != BASELINE]
    comparisons: list[Comparison] = []
    differences: list[Difference] = []
    for name in dict.fromkeys(arm.against for arm in others):
        group = [arm.name for arm in others if arm.against == name]
        rules = Rules(
            primary=plan.primary,
            direction=plan.direction,
            sesoi=plan.sesoi,
            alpha=plan.alpha,
            family=max(len(others), plan.family or 0),
            exploratory=exploratory,
            baseline=name,
        )
        cells = cells_at_target(arms, name, plan.primary, plan)
        comparisons += judge(rules, cells[name], {arm: cells[arm] for arm in group}, levels)
        asked = [name for name in ASKED_FOR if any(name in arm.definitions for arm in others)]
        for metric in (*SECONDARY, *asked):
            if metric != plan.primary:
                differences += _secondary(arms, name, group, metric, plan)
    order = list(arms)
    comparisons.sort(key=lambda c: order.index(c.arm))
    return comparisons, differences


def cells_at_target(
    arms: Mapping[str, ArmResult], baseline: str, metric: str, plan: PlanConfig
) -> dict[str, Cells]:
    """Cells of all arms with a metric at the declared L0.

    Args:
        baseline: the arm whose frontier arms without levels take.
    """
    return {
        name: Cells(
            matched=matched,
            failed=frozenset(arms[name].failed),
            definition=arms[name].definitions.get(metric),
        )
        for name, matched in match(arms, baseline, metric, plan).items()
    }


def _secondary(
    arms: Mapping[str, ArmResult], base: str, group: Sequence[str], metric: str, plan: PlanConfig
) -> list[Difference]:
    """Differences of the arms that were measured as the other was; what differs has none."""
    cells = cells_at_target(arms, base, metric, plan)
    known = cells[base].definition
    same = {name: cells[name] for name in group if cells[name].definition in (known, None)}
    return compare_secondary(metric, cells[base], same, baseline_name=base)


def final_info(
    arms: Mapping[str, ArmResult],
    comparisons: Sequence[Comparison],
    differences: Sequence[Difference],
    settings: Mapping[str, BaseConfig],
    hook_name: str,
    across: Sequence[AcrossSettings] = (),
    decisions: Sequence[Decision] = (),
) -> dict[str, Any]:
    """The content of final_info.json.

    Args:
        arms, comparisons, differences: of a run judged from its files.
        settings: of each arm.
        hook_name: where the activations were read.
        across: of a plan with further settings, whose words come before those of a single one.
        decisions: that follow from the comparisons.
    """
    verdicts: dict[str, dict[str, Any]] = {name: {} for name in arms}
    for comparison in comparisons:
        verdicts[comparison.arm] |= comparison.means()
    for decision in decisions:
        verdicts[decision.comparison.arm] |= decision.means()
    for difference in differences:
        if difference.metric in OTHER_UNITS:
            continue
        verdicts[difference.arm] |= {
            f"diff.{difference.metric}": difference.mean_diff,
            f"diff.{difference.metric}.low": difference.low,
            f"diff.{difference.metric}.high": difference.high,
        }
    for one in across:
        verdicts[one.arm].pop("needed_seeds", None)
        verdicts[one.arm] |= one.means()
    others = {
        name: _others(arm, verdicts[name]) | _settings(arm, settings[name], hook_name)
        for name, arm in arms.items()
    }
    measured = {m for arm in arms.values() for values in arm.values.values() for m in values}
    metrics = [metric for metric in metric_order(settings.values()) if metric in measured]
    room = max(0, MOST_MEANS - 1 - max(map(len, others.values())))  # one for `add_budget` or `mark`
    shown = _with_ends(metrics, {metric for arm in arms.values() for metric in arm.pairs})[:room]
    return {name: _group(arm, metrics, shown, others[name]) for name, arm in arms.items()}


def _with_ends(metrics: Sequence[str], of_pairs: Collection[str]) -> list[str]:
    """Names of metrics, with those of the ends of their interval after each one of `of_pairs`."""
    ends = {metric: [f"{metric}.low", f"{metric}.high"] for metric in of_pairs}
    return [name for metric in metrics for name in (metric, *ends.get(metric, ()))]


def add_budget(info: dict[str, dict[str, Any]], budget: Budget | None) -> None:
    """Adds to each judged arm's `means` the share of the study's error budget that is left."""
    for group in info.values():
        if budget is not None and "level" in group["means"]:
            group["means"]["budget_left"] = round(budget.left, 6)


def mark(info: dict[str, dict[str, Any]], name: str, sentence: str) -> None:
    """Adds a sentence about the whole run to the `means` of every arm."""
    for group in info.values():
        group["means"][name] = sentence


def metric_order(settings: Collection[BaseConfig]) -> list[str]:
    """Metrics in the order in which `means` takes them while there is room.

    Args:
        settings: of the arms.
    """
    scalars = reported_scalars(settings)
    later = [name for name in reported_scalars(settings, MAKE_CODE) if name not in ALWAYS_NAMED]
    return [
        *("fvu", "l0", "loss_recovered", "ce_rise", SHARE, "dead_share"),
        *("sae_top_1_test_accuracy", "sae_top_5_test_accuracy", "sae_test_accuracy"),
        *("sae_probes_top_1_auc", "sae_probes_top_16_auc"),
        *scalars,
        "final_loss",
        *("position.fvu_early", "position.fvu_late"),
        *_course(ALWAYS_NAMED),
        "convergence.steps",
        *("spikes", "stability.rise"),
        *("consistency.temperature", "consistency.r2"),
        *_course(name for name in later if scalars[name].role == "learned"),
        *("consistency.seeds", "consistency.chance", "consistency.half_life"),
        *("consistency.seeds_signed", "resampling.count"),
        *("lifetime.resamplings", "lifetime.median"),
        *("explained_variance", "cosine", "ce_spliced", "ce_clean", "ce_zero"),
        *(f"sae_top_{k}_test_accuracy" for k in (20, 2, 10, 50)),
        *(f"sae_probes_top_{k}_auc" for k in (4, 64, 2, 8, 32, 128)),
        *("position.l0_early", "position.l0_late"),
        *("position.dead_share_early", "position.dead_share_late"),
        *("consistency.chance_signed", "decoder.max_cosine", "lifetime.deaths"),
        *("stability.detrended", "stability.gradient_cv", "stability.nonfinite"),
    ]


def _course(scalars: Iterable[str]) -> list[str]:
    return [f"{metric}.{name}" for name in scalars for metric in ("convergence", "sensitivity")]


def reported_scalars(
    settings: Collection[BaseConfig], fields: Collection[str] = ()
) -> dict[str, Scalar]:
    """The scalars whose last value is reported, as the arms' parts declare them, in one order for
    all arms: those that every cell has rows for, then by role, then by the part's place in an SAE.

    Args:
        fields: of an SAE, whose parts are asked; () for all.
    """
    parts = [arm.sae.parts() for arm in settings]
    found: dict[str, Scalar] = {}
    for field in fields or (parts[0] if parts else ()):
        for part in (part for by_field in parts for part in by_field[field]):
            for name, scalar in part.logged.items():
                if scalar.reported:
                    found.setdefault(name, scalar)
    place = {name: i for i, name in enumerate(ALWAYS_NAMED)}

    def order(name: str) -> tuple[int, int]:
        return place.get(name, len(place)), ROLES.index(found[name].role)

    return {name: found[name] for name in sorted(found, key=order)}


def _others(arm: ArmResult, verdict: Mapping[str, Any]) -> dict[str, Any]:
    """Entries of `means` besides metrics and settings: the verdict and the gate's word."""
    fixed = sorted({name for result in arm.gates.values() for name in result.fixed_scalars})
    named = {"fixed": ", ".join(fixed)} if fixed else {}
    return {**verdict, "gate": arm.gate_summary, **named}


def _group(
    arm: ArmResult, metrics: Sequence[str], shown: Sequence[str], others: Mapping[str, Any]
) -> dict[str, Any]:
    """One arm's entry; `shown` are the metrics that `means` has room for."""
    own = {metric for values in arm.values.values() for metric in values}
    per_seed = {m: list(arm.metric(m).values()) for m in metrics if m in own}
    found = {metric: stats.mean_stderr(arm.replicates(metric).values()) for metric in per_seed}
    numbers = {metric: mean for metric, (mean, _) in found.items()}
    for metric in arm.pairs:
        if (result := arm.agreement(metric)) is not None:
            numbers |= {f"{metric}.low": result.low, f"{metric}.high": result.high}
    return {
        "means": {name: numbers[name] for name in shown if name in numbers} | dict(others),
        "stderrs": {metric: stderr for metric, (_, stderr) in found.items()},
        "final_info_dict": per_seed,
    }


def _settings(arm: ArmResult, settings: BaseConfig, hook_name: str) -> dict[str, Any]:
    facts = next(iter(arm.facts.values()))
    layer = "".join(c for c in hook_name.split("hook")[0] if c.isdigit())
    penalties = [part.fixed_penalty for part in settings.sae.all_parts()]
    penalty = next((value for value in penalties if value is not None), "L0 target")
    return {
        "training_steps": facts["steps"],
        "tokens": facts["tokens"],
        "layer": int(layer) if layer else None,
        "dict_size": facts["d_sae"],
        "learning_rate": settings.train.lr,
        "sparsity_penalty": penalty,
    }
