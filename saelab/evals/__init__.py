"""The table of evaluations. A new one is one file in this folder and one entry in `EVALUATIONS`.

Importing this module loads no torch, so that `saelab eval --help` is quick: an entry names its
function, which is loaded on first use (`saelab.evals.measure` runs them).
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Collection, Sequence
from dataclasses import KW_ONLY, dataclass
from typing import Any, Literal

from saelab.errors import SettingError, nearest

At = Literal["every cell", "target", "asked"]
Needs = Literal["subject", "log", "snapshots", "seeds"]


@dataclass(frozen=True)
class Evaluation:
    """One entry of the table.

    `needs` says what the function is given:

        subject      (subject, data): anything with `encode` and `decode`, and an `EvalData`
        log          (subject, data, training): a `Training` with the log of every step, too
        snapshots    the same, for its decoders saved during training
        seeds        (pairs): comparisons with other seeds of the arm, or why there are none

    Args:
        name: as `--evals` and `evaluation.extra` take it.
        function: 'module:name' of a function that returns a list of `Row`.
        at: the cells of a launch that are measured: every cell, those at the plan's L0 ('target'),
            or those at the plan's L0 where `evaluation.extra` names it ('asked').
        needs: what it is computed from; only 'subject' can be had from a saved SAE.
        description: what it measures, in a few words.
        failed: measures cells whose training failed too.
        controls: measures the control subjects of a launch too, where it needs a subject alone.
    """

    name: str
    function: str
    _: KW_ONLY
    at: At
    needs: Needs
    description: str
    failed: bool = False
    controls: bool = True

    def load(self) -> Callable[..., list[Any]]:
        """Imports the function."""
        module, name = self.function.split(":")
        return getattr(importlib.import_module(module), name)

    def runs(self, at_target: bool, extra: Collection[str]) -> bool:
        """Returns True if a launch measures a cell with it.

        Args:
            at_target: the cell is at the plan's L0.
            extra: `evaluation.extra` of the launch.
        """
        if self.at == "every cell":
            return True
        return at_target and (self.at == "target" or self.name in extra)


#: In the order of a launch's rows.
_ENTRIES = (
    Evaluation(
        "stability",
        "saelab.evals.measure:stability_rows",
        at="every cell",
        needs="log",
        description="spikes and rises of the training loss, variation of the gradient's norm",
        failed=True,
    ),
    Evaluation(
        "core",
        "saelab.evals.measure:core_rows",
        at="every cell",
        needs="subject",
        description="FVU, explained variance, MSE, cosine, L0, dead latents, loss recovered, "
        "densities",
    ),
    Evaluation(
        "probing",
        "saelab.evals.measure:probing_rows",
        at="target",
        needs="subject",
        description="accuracy of probes for the class of a text, on few latents and on all",
    ),
    Evaluation(
        "model_channels",
        "saelab.evals.measure:channel_rows",
        at="asked",
        needs="subject",
        description="the same probes on the channels of the language model",
        controls=False,
    ),
    Evaluation(
        "sae_probes",
        "saelab.evals.measure:sae_probes_rows",
        at="asked",
        needs="subject",
        description="probes on few latents at the last token, on the data sets of sae-probes",
    ),
    Evaluation(
        "sae_probes_channels",
        "saelab.evals.measure:sae_probes_channel_rows",
        at="asked",
        needs="subject",
        description="the same probes and sae-probes' baselines on the channels of the model",
        controls=False,
    ),
    Evaluation(
        "sensitivity",
        "saelab.evals.measure:sensitivity_rows",
        at="target",
        needs="subject",
        description="change of FVU, L0 and loss recovered when a learned scalar is changed",
    ),
    Evaluation(
        "consistency",
        "saelab.evals.measure:consistency_rows",
        at="target",
        needs="subject",
        description="share of the differences between thresholds that variance alone explains",
    ),
    Evaluation(
        "positions",
        "saelab.evals.measure:position_rows",
        at="target",
        needs="subject",
        description="KL divergence and loss recovered by position and by token frequency",
    ),
    Evaluation(
        "truth",
        "saelab.evals.measure:truth_rows",
        at="target",
        needs="subject",
        description="known features: MCC, uniqueness, F1 of firing",
    ),
    Evaluation(
        "absorption",
        "saelab.evals.measure:absorption_rows",
        at="target",
        needs="subject",
        description="known features with parents: splitting and absorption",
    ),
    Evaluation(
        "convergence",
        "saelab.evals.measure:convergence_rows",
        at="every cell",
        needs="log",
        description="share of the run after which the loss and each learned scalar have settled",
    ),
    Evaluation(
        "decoder",
        "saelab.evals.decoder_cosines:evaluate_decoder",
        at="target",
        needs="subject",
        description="largest cosine of each decoder row with another one",
        controls=False,
    ),
    Evaluation(
        "survival",
        "saelab.evals.measure:lifetime_rows",
        at="target",
        needs="subject",
        description="lifetimes and resamplings of latents, counted during training",
        controls=False,
    ),
    Evaluation(
        "snapshots",
        "saelab.evals.dictionary_consistency:evaluate_snapshots",
        at="target",
        needs="snapshots",
        description="matched cosines of the decoder with its earlier states, and its half-life",
    ),
    Evaluation(
        "seeds",
        "saelab.evals.dictionary_consistency:evaluate_seeds",
        at="target",
        needs="seeds",
        description="matched cosines of the decoder with those of the arm's other seeds",
    ),
)
EVALUATIONS = {evaluation.name: evaluation for evaluation in _ENTRIES}

#: Why an evaluation can't be computed where only a subject is at hand.
_ONLY_IN_LAUNCH: dict[Needs, str] = {
    "log": "needs the log of every training step",
    "snapshots": "needs the decoders saved during training",
    "seeds": "needs the SAEs of the arm's other seeds",
}


def check_names(names: Sequence[str], given: Collection[Needs] = ("subject",)) -> None:
    """Refuses evaluations that can't be computed.

    Args:
        names: of the evaluations.
        given: data that they can be computed from.

    Raises: SettingError for an unknown evaluation (the nearest one is suggested), and for one that
        needs more than is given.
    """
    for name in names:
        if name not in EVALUATIONS:
            raise _unknown("evals", name)
        needs = EVALUATIONS[name].needs
        if needs not in given:
            reason = f"{_ONLY_IN_LAUNCH[needs]}, which a saved SAE does not bring"
            remedy = f"{reason}: take its rows from metrics.parquet of the run"
            raise SettingError("evals", name, remedy)


def check_extra(names: Sequence[str]) -> None:
    """Refuses names in `evaluation.extra` other than those of evaluations at 'asked'.

    Raises: SettingError.
    """
    for name in names:
        if name not in EVALUATIONS:
            raise _unknown("evaluation.extra", name)
        if EVALUATIONS[name].at != "asked":
            remedy = "is measured in every launch: leave it out"
            raise SettingError("evaluation.extra", name, remedy)


def _unknown(setting: str, name: str) -> SettingError:
    return SettingError(
        setting, name, f"known: {', '.join(EVALUATIONS)}{nearest(name, EVALUATIONS)}"
    )


def of_subject() -> list[Evaluation]:
    """Returns the entries that need a subject alone, a saved SAE for example."""
    return [evaluation for evaluation in EVALUATIONS.values() if evaluation.needs == "subject"]


def of_cell(at_target: bool, extra: Collection[str] = (), failed: bool = False) -> list[str]:
    """Names the evaluations of a trained cell of a launch, in the order of its rows.

    Args:
        at_target, extra: as in `Evaluation.runs`.
        failed: training stopped early.
    """
    return [
        name
        for name, evaluation in EVALUATIONS.items()
        if evaluation.needs != "seeds" and evaluation.runs(at_target, extra)
        if evaluation.failed or not failed
    ]


def of_control(extra: Collection[str] = ()) -> list[str]:
    """Names the evaluations of a control subject, which is measured at the plan's L0."""
    return [
        evaluation.name
        for evaluation in of_subject()
        if evaluation.controls and evaluation.runs(True, extra)
    ]


def of_seeds(extra: Collection[str] = ()) -> list[str]:
    """Names the evaluations of a cell at the plan's L0 next to other seeds of its arm."""
    return [
        name
        for name, evaluation in EVALUATIONS.items()
        if evaluation.needs == "seeds" and evaluation.runs(True, extra)
    ]


def evals_help() -> str:
    """Writes the help of `saelab eval --evals`."""
    possible = "; ".join(f"{one.name}: {one.description}" for one in of_subject())
    launch = [name for name, one in EVALUATIONS.items() if one.needs != "subject"]
    return f"Comma-separated. {possible}. Only a launch measures {', '.join(launch)}."
