"""Runs evaluations of the table on a subject: the data they are given, and their rows in order."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, field

from saelab.data.probing.activations import ProbingData
from saelab.data.probing.last_tokens import LastTokens
from saelab.data.probing.saebench import Definition
from saelab.data.synthetic.chains import truth_of
from saelab.evals import EVALUATIONS, Needs, check_names
from saelab.evals.absorption import evaluate_absorption
from saelab.evals.base import Row, SeedPair, Subject, Training, missing
from saelab.evals.convergence import convergence
from saelab.evals.core import CoreData, evaluate_core
from saelab.evals.known_features import evaluate_truth, missing_truth
from saelab.evals.latent_lifetimes import survival_rows
from saelab.evals.loss_by_position import evaluate_positions
from saelab.evals.probing import DEFINITION, K_VALUES, evaluate_probing, saebench
from saelab.evals.sae_probes import CHANNELS, DEFINITIONS, LATENTS, evaluate_sae_probes
from saelab.evals.sensitivity import evaluate_sensitivity
from saelab.evals.threshold_fit import evaluate_consistency
from saelab.evals.training_stability import stability
from saelab.sae import learned_scalars


@dataclass
class EvalData:
    """Data that evaluations are given besides the subject.

    Args:
        core: held-out activations and their model.
        probing: activations of the probing texts, or None with the reason in `why_no_probing`.
        seed: of the probing examples and of random dictionaries, the same for all subjects that are
            compared. Probing by definition 1 uses SAEBench's, 42.
        k_values: numbers of latents that probes may use.
        definition: of sparse probing: 2, or 1 for SAEBench's.
        missing_entries: probing entries that can't be had, with the reasons.
        sae_probes: last tokens of sae-probes' data sets, or None where they were not asked for.
    """

    core: CoreData
    probing: ProbingData | None
    _: KW_ONLY
    seed: int = 0
    k_values: Sequence[int] = K_VALUES
    why_no_probing: str = ""
    definition: Definition = 2
    missing_entries: Mapping[str, str] = field(default_factory=dict)
    sae_probes: LastTokens | None = None


def evaluate(
    subject: Subject, data: EvalData, names: Sequence[str], training: Training | None = None
) -> list[Row]:
    """Computes the rows of the named evaluations, in the order of the names.

    Core is computed first, because others use its passes.

    Args:
        training: of the subject, for evaluations of its log and its snapshots; None without one.

    Raises: as `check_names`.
    """
    given: tuple[Needs, ...] = ("subject",)
    if training is not None:
        given += ("log", "snapshots")
    check_names(names, given)
    data.core.last_losses, data.core.with_kl = None, "positions" in names
    rows: dict[str, list[Row]] = {}
    for name in sorted(names, key="core".__ne__):
        evaluation = EVALUATIONS[name]
        further = () if evaluation.needs == "subject" else (training,)
        rows[name] = evaluation.load()(subject, data, *further)
    data.core.last_losses = None
    return [row for name in names for row in rows[name]]


def evaluate_seeds(pairs: Sequence[SeedPair] | str, names: Sequence[str]) -> list[Row]:
    """Computes the rows of the named evaluations of a cell next to other seeds of its arm.

    Args:
        pairs: its comparisons with them, or the reason why there are none.
    """
    return [row for name in names for row in EVALUATIONS[name].load()(pairs)]


# ---- entries of the table whose functions take other arguments -------------------------------


def core_rows(subject: Subject, data: EvalData) -> list[Row]:
    return evaluate_core(subject, data.core)


#: Definitions of sparse probing, by the number that settings name them by.
PROBING = {1: saebench.DEFINITION, 2: DEFINITION}


def probing_rows(subject: Subject | None, data: EvalData, prefix: str = "sae") -> list[Row]:
    """Sparse probing by the definition in `data`; None probes the model's channels ('llm')."""
    definition = PROBING[data.definition]
    names = [f"{prefix}_top_{k}_test_accuracy" for k in data.k_values] + [f"{prefix}_test_accuracy"]
    if data.probing is None:
        return [missing(name, definition, data.why_no_probing) for name in names]
    texts, k, device = data.probing, data.k_values, data.core.device
    if data.definition == 1:
        rows = saebench.evaluate_as_saebench(
            subject, texts, k_values=k, prefix=prefix, device=device
        )
    else:
        rows = evaluate_probing(subject, texts, data.seed, k, prefix, device)
    absent = data.missing_entries.items()
    return rows + [missing(n, definition, why, f"entry={e}") for e, why in absent for n in names]


def channel_rows(_: Subject | None, data: EvalData) -> list[Row]:
    """Sparse probing of the model's channels, the same for every subject."""
    return probing_rows(None, data, prefix="llm")


def sae_probes_rows(subject: Subject | None, data: EvalData) -> list[Row]:
    """Probing on sae-probes' data sets; None probes the model's channels."""
    if data.sae_probes is None:
        name = f"{CHANNELS if subject is None else LATENTS}_top_1_auc"
        reason = "the last tokens of sae-probes' data sets are not there (evaluation.extra)"
        return [missing(name, DEFINITIONS[2], reason)]
    return evaluate_sae_probes(subject, data.sae_probes, data.seed, data.core.device)


def sae_probes_channel_rows(_: Subject | None, data: EvalData) -> list[Row]:
    """Probing of the model's channels on sae-probes' data sets, the same for every subject."""
    return sae_probes_rows(None, data)


def channels_control_rows(data: EvalData) -> list[Row]:
    """Probing of the model's channels as a control of a launch, on all data sets that are there."""
    rows = probing_rows(None, data, prefix="llm")
    return rows if data.sae_probes is None else rows + sae_probes_rows(None, data)


def sensitivity_rows(subject: Subject, data: EvalData) -> list[Row]:
    return evaluate_sensitivity(subject, data.core)


def consistency_rows(subject: Subject, data: EvalData) -> list[Row]:
    return evaluate_consistency(subject, data.core)


def position_rows(subject: Subject, data: EvalData) -> list[Row]:
    return evaluate_positions(subject, data.core)


def truth_rows(subject: Subject, data: EvalData) -> list[Row]:
    truth = truth_of(data.core.source)
    if truth is None:
        return missing_truth()
    return evaluate_truth(subject, data.core.source, truth, data.seed, data.core.device)


def absorption_rows(subject: Subject, data: EvalData) -> list[Row]:
    source = data.core.source
    return evaluate_absorption(subject, source, truth_of(source), data.seed, data.core.device)


def lifetime_rows(subject: Subject, _: EvalData) -> list[Row]:
    return survival_rows(subject)


def stability_rows(_: Subject, __: EvalData, training: Training) -> list[Row]:
    return stability(training.log, training.stopped)


def convergence_rows(subject: Subject, _: EvalData, training: Training) -> list[Row]:
    return convergence(training.log, learned_scalars(subject))
