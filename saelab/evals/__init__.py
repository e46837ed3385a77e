"""The table of evaluations: name -> function of a subject and the data of a launch.

A new evaluation is one file here and one line in `EVALUATIONS`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from saelab.data.synthetic import truth_of
from saelab.errors import SettingError, nearest
from saelab.evals import probing as _probing
from saelab.evals.base import Row, Subject, missing
from saelab.evals.consistency import evaluate_consistency
from saelab.evals.core import CoreData, evaluate_core
from saelab.evals.probing import ProbingData, evaluate_probing
from saelab.evals.sensitivity import evaluate_sensitivity
from saelab.evals.truth import evaluate_truth, no_truth


@dataclass
class EvalData:
    """What evaluations are given besides the subject.

    Args:
        core: held-out activations and their model.
        probing: activations of the probing texts, or None with the reason in `why_no_probing`.
        seed: of the probing examples and of random dictionaries, the same for all subjects that are
            compared.
        k_values: numbers of latents that probes may use.
    """

    core: CoreData
    probing: ProbingData | None
    seed: int = 0
    k_values: Sequence[int] = _probing.K_VALUES
    why_no_probing: str = ""


def _evaluate_probing(subject: Subject, data: EvalData) -> list[Row]:
    if data.probing is not None:
        device = data.core.device
        return evaluate_probing(subject, data.probing, data.seed, data.k_values, device=device)
    names = [f"sae_top_{k}_test_accuracy" for k in data.k_values] + ["sae_test_accuracy"]
    return [missing(name, _probing.DEFINITION, data.why_no_probing) for name in names]


def _evaluate_truth(subject: Subject, data: EvalData) -> list[Row]:
    truth = truth_of(data.core.source)
    if truth is None:
        return no_truth()
    return evaluate_truth(subject, data.core.source, truth, data.seed, data.core.device)


EVALUATIONS: dict[str, Callable[[Subject, EvalData], list[Row]]] = {
    "core": lambda subject, data: evaluate_core(subject, data.core),
    "probing": _evaluate_probing,
    "truth": _evaluate_truth,
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
    """The rows of the named evaluations; raises as `check_names`."""
    check_names(names)
    return [row for name in names for row in EVALUATIONS[name](subject, data)]
