"""The table of evaluations: name -> function of a subject and the data of a launch.

A new evaluation is one file here and one line in `EVALUATIONS`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from saelab.data.probing.activations import ProbingData
from saelab.data.probing.saebench import Definition
from saelab.data.synthetic.chains import truth_of
from saelab.errors import SettingError, nearest
from saelab.evals import probing as _probing
from saelab.evals import saebench_probing as _saebench
from saelab.evals.absorption import evaluate_absorption
from saelab.evals.base import Row, Subject, missing
from saelab.evals.core import CoreData, evaluate_core
from saelab.evals.known_features import evaluate_truth, no_truth
from saelab.evals.loss_by_position import evaluate_positions
from saelab.evals.probing import evaluate_probing
from saelab.evals.saebench_probing import evaluate_as_saebench
from saelab.evals.sensitivity import evaluate_sensitivity
from saelab.evals.threshold_fit import evaluate_consistency


@dataclass
class EvalData:
    """What evaluations are given besides the subject.

    Args:
        core: held-out activations and their model.
        probing: activations of the probing texts, or None with the reason in `why_no_probing`.
        seed: of the probing examples and of random dictionaries, the same for all subjects that are
            compared. Probing by definition 1 has SAEBench's own, 42.
        k_values: numbers of latents that probes may use.
        definition: of sparse probing: 2, or 1 for SAEBench's.
        missing_entries: probing entries that can't be had, with the reasons.
    """

    core: CoreData
    probing: ProbingData | None
    seed: int = 0
    k_values: Sequence[int] = _probing.K_VALUES
    why_no_probing: str = ""
    definition: Definition = 2
    missing_entries: Mapping[str, str] = field(default_factory=dict)


PROBING = {1: _saebench.DEFINITION, 2: _probing.DEFINITION}


def probing_rows(subject: Subject | None, data: EvalData, prefix: str = "sae") -> list[Row]:
    """Sparse probing by the definition that is set; None probes the model's channels ('llm')."""
    definition = PROBING[data.definition]
    names = [f"{prefix}_top_{k}_test_accuracy" for k in data.k_values] + [f"{prefix}_test_accuracy"]
    if data.probing is None:
        return [missing(name, definition, data.why_no_probing) for name in names]
    of, k, device = data.probing, data.k_values, data.core.device
    if data.definition == 1:
        rows = evaluate_as_saebench(subject, of, k_values=k, prefix=prefix, device=device)
    else:
        rows = evaluate_probing(subject, of, data.seed, k, prefix, device)
    absent = data.missing_entries.items()
    return rows + [missing(n, definition, why, f"entry={e}") for e, why in absent for n in names]


def _evaluate_truth(subject: Subject, data: EvalData) -> list[Row]:
    truth = truth_of(data.core.source)
    if truth is None:
        return no_truth()
    return evaluate_truth(subject, data.core.source, truth, data.seed, data.core.device)


def _evaluate_absorption(subject: Subject, data: EvalData) -> list[Row]:
    source = data.core.source
    return evaluate_absorption(subject, source, truth_of(source), data.seed, data.core.device)


EVALUATIONS: dict[str, Callable[[Subject, EvalData], list[Row]]] = {
    "core": lambda subject, data: evaluate_core(subject, data.core),
    "probing": probing_rows,
    "model_channels": lambda _, data: probing_rows(None, data, prefix="llm"),
    "truth": _evaluate_truth,
    "absorption": _evaluate_absorption,
    "positions": lambda subject, data: evaluate_positions(subject, data.core),
    "sensitivity": lambda subject, data: evaluate_sensitivity(subject, data.core),
    "consistency": lambda subject, data: evaluate_consistency(subject, data.core),
}


def check_names(names: Sequence[str]) -> None:
    """Raises: SettingError for an unknown evaluation (the nearest one is suggested)."""
    for name in names:
        if name not in EVALUATIONS:
            known = ", ".join(EVALUATIONS)
            raise SettingError("evals", name, f"known: {known}{nearest(name, EVALUATIONS)}")


def evaluate(subject: Subject, data: EvalData, names: Sequence[str]) -> list[Row]:
    """The rows of the named evaluations, core first, whose passes others use; raises as
    `check_names`."""
    check_names(names)
    data.core.kept, data.core.with_kl = None, "positions" in names
    found = {name: EVALUATIONS[name](subject, data) for name in sorted(names, key="core".__ne__)}
    data.core.kept = None
    return [row for name in names for row in found[name]]
