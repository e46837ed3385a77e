"""The seams: base classes of all parts, and when they are called; a part's file imports from here.

An SAE is composed of parts; none subclasses the model. Each part has a configuration (frozen data
with a `kind`) that builds it, lives in one file and has one line in the table of `parts/__init__`.

    Scaling      x - b_dec -> encoder input; may own parameters; folds into W_enc and b_enc
    Activation   pre-activations -> code
    LossTerm     one pass -> a scalar; pure; may own learnable scalars
    Controller   one pass -> the next value of a named setting; schedules are controllers
    Constraint   acts on gradients before the optimiser and on parameters after it
    Observer     counts, and may reset latents; called by the loop only

`update(p)` of any part is called once per step, after the optimiser, without gradient: the only
place where running statistics change. Measuring and evaluating never call it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import softplus

from saelab.distributed.ranks import ALONE, Ranks
from saelab.errors import SettingError
from saelab.kernels import Code, Support
from saelab.parts.forms import Form, Pursuit, Refusal
from saelab.parts.forward_pass import Dims, Pass
from saelab.parts.resets import Reset, draw_reset
from saelab.parts.settings import (
    PER_TOKEN,
    ROLES,
    Example,
    L0Rule,
    Latents,
    PartConfig,
    Role,
    Scalar,
    few,
    measurement,
    nearest_k,
)
from saelab.parts.weights import Weights

if TYPE_CHECKING:
    from saelab.sae import SAE

__all__ = [
    "PER_TOKEN",
    "ROLES",
    "Activation",
    "Constraint",
    "Controller",
    "Dims",
    "Example",
    "Form",
    "L0Rule",
    "Latents",
    "Lives",
    "LossTerm",
    "Observer",
    "Part",
    "PartConfig",
    "Pass",
    "Pursuit",
    "Refusal",
    "Reset",
    "Role",
    "Scalar",
    "Scaling",
    "Stored",
    "Weights",
    "check_setting",
    "correct_bias",
    "draw_reset",
    "few",
    "inverse_softplus",
    "log_spread",
    "measurement",
    "nearest_k",
]


@dataclass(frozen=True)
class Stored:
    """Place of a scalar (or a vector of them): `tensor` holds link(value)."""

    tensor: Tensor
    link: Literal["value", "log", "logit", "softplus"] = "value"

    def times(self, factor: float) -> Tensor:
        """The tensor for a value that is `factor` times as large.

        Raises: SettingError where no tensor holds that value.
        """
        if self.link == "value":
            return self.tensor * factor
        if self.link == "log":
            return self.tensor + math.log(factor)
        if self.link == "logit":
            share = self.tensor.sigmoid() * factor
            if bool((share >= 1).any()):
                remedy = "takes a value in (0, 1) to 1 or beyond: change it by less"
                raise SettingError("factor", factor, remedy)
            return share.logit()
        return inverse_softplus(softplus(self.tensor) * factor)


def inverse_softplus(value: Tensor) -> Tensor:
    """Returns x with softplus(x) = value; value > 0."""
    return value + torch.log(-torch.expm1(-value))


class Part(nn.Module):
    """Base of all parts. Running state is stored in buffers, so that it is saved and restored."""

    #: Ascend instead of descend on the part's parameters.
    maximise: ClassVar[bool] = False
    #: Needs batches of whole contexts.
    needs_contexts: ClassVar[bool] = False
    #: Reads `p.spliced`: the language model runs in training, on the batch's contexts.
    needs_model: ClassVar[bool] = False
    #: Reads `p.z`, which is then stored through the step.
    uses_preactivations: bool = False
    #: Reads it in `loss` alone and in few steps, so that it may be computed when it is read.
    reads_them_rarely: bool = False
    #: Works where each rank has a subset of a batch's rows and of the latents. State per latent
    #: then has length `Dims.n_local`, and sums over rows or latents go over all ranks. "rows": only
    #: where each rank has all latents.
    shardable: bool | Literal["rows"] = False
    #: Names of the parameters and buffers with one entry per latent.
    per_latent: tuple[str, ...] = ()
    #: Those of them that a latent keeps when it starts afresh.
    survives_reset: tuple[str, ...] = ()
    #: Set by the SAE.
    ranks: Ranks = ALONE
    lr: float | None = None

    def check(self, sae: SAE) -> None:
        """Raises: SettingError when the SAE, once composed, lacks what the part needs."""

    def update(self, p: Pass) -> None:
        """Updates running statistics from one pass; called by the loop, once per step."""

    def groups(self) -> list[tuple[str, list[nn.Parameter], float | None]]:
        """The part's optimiser groups: name, parameters, learning rate (None: the run's).

        A child module with an `lr` of its own has a group of its own.
        """
        apart = {c: lr for c in self.children() if (lr := getattr(c, "lr", None)) is not None}
        theirs = {id(p) for child in apart for p in child.parameters()}
        rest = [p for p in self.parameters() if p.requires_grad and id(p) not in theirs]
        groups = [(type(self).__name__, rest, self.lr)]
        groups += [(type(c).__name__, list(c.parameters()), lr) for c, lr in apart.items()]
        return [group for group in groups if group[1]]

    def learned(self) -> dict[str, nn.Parameter]:
        """The learned scalars by their names in the log, as they are trained (a logarithm, say)."""
        return {}

    def stored(self) -> dict[str, tuple[Stored, ...]]:
        """Places of the scalars that shape the code, trained or not, by their names in the log; a
        scalar with several places scales with all of them together."""
        return {}

    @contextmanager
    def scale_temporarily(self, name: str, factor: float) -> Iterator[None]:
        """Scales the named scalar's value by `factor` inside the block, and restores every bit
        afterwards.

        Raises: SettingError where the value would leave its range.
        """
        places = self.stored()[name]
        with torch.no_grad():
            changed = [place.times(factor) for place in places]
            before = [place.tensor.clone() for place in places]
            try:
                for place, value in zip(places, changed, strict=True):
                    place.tensor.copy_(value)
                yield
            finally:
                for place, value in zip(places, before, strict=True):
                    place.tensor.copy_(value)

    def forget(self, latents: Tensor) -> None:
        """Clears running statistics of latents that start afresh; int64 [m]."""

    def scalars(self) -> dict[str, float]:
        """Named values for the log, read after the step; all of them are in the settings' `logged`,
        which says what each is."""
        return {}

    def facts(
        self, columns: Mapping[str, np.ndarray], travel: Callable[[nn.Parameter], float]
    ) -> dict[str, float]:
        """Facts of a trained cell for the gate (`saelab/verdict/gate.py`), by their names there.

        Args:
            columns: the log of every step, name -> float32 [steps done].
            travel: the sum of the learning rates that a parameter was trained with, which is about
                as far as Adam could move it.
        """
        return {}

    def latent_columns(self) -> dict[str, Tensor]:
        """Numbers that the part has of each latent after training, [d_sae] each: columns of the
        cell's latents.parquet."""
        return {}


class Scaling(Part):
    """Maps the centred input to the encoder's input."""

    foldable: ClassVar[bool] = True
    #: The SAE starts as the same function that it would be without the scaling.
    keeps_start: bool = True

    def fit(self, sample: Tensor) -> None:
        """Sets the statistics from centred, normalised rows [n, d_in] before training."""

    def apply(self, centred: Tensor) -> Tensor:  # type: ignore[override]
        """[N, d_in] -> [N, d_in], with gradients to the part's parameters."""
        raise TypeError(f"{type(self).__name__} has no apply()")

    def fold(self) -> tuple[Tensor, Tensor]:
        """(gain, shift) with apply(c) = gain * c + shift at inference, or c @ gain + shift where
        the gain is a symmetric matrix; gain [d_in] or [d_in, d_in], shift [d_in]."""
        raise TypeError(f"{type(self).__name__} has no fold()")

    def metric(self) -> Tensor:
        """Factor of each input dimension, without learned scalars; [d_in].

        Raises: SettingError when the scaling has no such vector.
        """
        remedy = "has no scale for each dimension to measure errors in: use 'variance'"
        raise SettingError("scaling", type(self).__name__, remedy)

    def learned_gains(self) -> tuple[Tensor, Tensor] | None:
        """Variance of each input dimension and the gain learned for it, [d_in] each; None where no
        dimension has a gain of its own."""
        return None


class Activation(Part):
    """Maps pre-activations to a code, along two paths that must agree.

    One that `needs_contexts` gets `starts` as a further argument of `support` and `dense`: int64
    [m + 1], segment s of tokens that follow each other has the rows starts[s] to starts[s + 1].

    `dense` is the reference. On the sparse path `support` chooses the pairs (without gradient) and
    `at` computes their values from the gathered pre-activations. In evaluation mode both use stored
    statistics only, so that a token's code does not depend on its batch.
    """

    #: During training the code of a row depends on the other rows.
    couples_batch: ClassVar[bool] = False
    #: Every row has the same number of active latents.
    exact_k: ClassVar[bool] = False
    #: Codes may be negative. Losses and evaluations then take sizes, |f|, where they would take f.
    signed: ClassVar[bool] = False
    #: Has statistics that `fit` sets before training.
    fitted: ClassVar[bool] = False
    #: The code is no function of pre-activations: `encode` computes it from the encoder's input and
    #: the weights, in place of `dense`, `support` and `at`. Nothing may read pre-activations then.
    uses_weights: ClassVar[bool] = False

    def dense(self, z: Tensor) -> Tensor:
        """[N, d_sae] -> [N, d_sae] with gradients."""
        raise TypeError(f"{type(self).__name__} has no dense()")

    def support(self, z: Tensor) -> Support | None:
        """Pairs that may be active, margin included; None asks for the dense path. No gradient."""
        raise TypeError(f"{type(self).__name__} has no support()")

    def at(self, values: Tensor, support: Support) -> Tensor:
        """Gathered pre-activations [nnz] -> code values [nnz] with gradients."""
        raise TypeError(f"{type(self).__name__} has no at()")

    def encode(self, u: Tensor, weights: Weights) -> Code:
        """Computes the code with gradients to u and the weights; called where it `uses_weights`.

        Args:
            u: encoder input, float32 [N, d_in].
            weights: the SAE's parameters themselves.

        Returns: the code, whose `pre` nothing reads.
        """
        raise TypeError(f"{type(self).__name__} has no encode()")

    def floor(self) -> Tensor | None:
        """Value that active pre-activations exceed at inference: [d_sae] or 0-dim.

        None where it depends on the other latents of the row, or on the rows before it.
        """
        return None

    def selection_floor(self) -> Tensor | None:
        """Value that selected pre-activations exceed in training, like `floor`, or that they can be
        expected to exceed, if `narrow` checks it; None where none is known."""
        return None

    def selection_k(self) -> int | None:
        """Number of latents with the largest pre-activations that are selected in each row; None
        where another rule selects them."""
        return None

    def narrow(self, support: Support, values: Tensor) -> tuple[Support, Tensor] | None:
        """Reduces the pairs above `selection_floor` to those that are selected.

        Args:
            values: their pre-activations, float32 [nnz].

        Returns: None where some that are selected lie below that floor.
        """
        return support, values

    def initial_floor(self) -> Tensor | None:
        """The floor before training, for the start of b_enc."""
        return self.floor()

    def raise_thresholds(self, by: float, bias: Tensor | None) -> bool:
        """Raises the thresholds of all latents alike, so that fewer are active at inference.

        Lowers the encoder's bias unless a subclass has thresholds of its own.

        Args:
            by: amount in this activation's own unit; below 0 lowers them.
            bias: of the encoder, [n_local]; None where it has none.

        Returns: False where no threshold decides how many are active.
        """
        if bias is None or self.floor() is None:
            return False
        bias.sub_(by)
        return True

    def fit(self, z: Tensor) -> None:
        """Sets the statistics from a sample's pre-activations [n, d_sae] before training."""

    def gate(self, z: Tensor, support: Support | None) -> Tensor:
        """1[latent fires] at the support (or densely), with gradients to the thresholds.

        Raises: SettingError when the activation has no thresholds.
        """
        raise SettingError(
            "activation", type(self).__name__, "has no thresholds to penalise: choose jumprelu"
        )

    def learned_thresholds(self) -> Tensor:
        """The thresholds with their gradients, [n_local].

        Raises: SettingError when none is learned for each latent.
        """
        remedy = "learns no threshold of each latent: choose jumprelu"
        raise SettingError("activation", type(self).__name__, remedy)

    def gate_path(self, z: Tensor, support: Support | None) -> Tensor:
        """max(z + b_gate, 0) at the support, or densely, with gradients to z and b_gate.

        Raises: SettingError when the activation has no gate.
        """
        raise SettingError("activation", type(self).__name__, "has no gate: choose gated")

    def latent_scale(self) -> Tensor | None:
        """The unit that each latent's pre-activation is measured in, [d_sae]; None without any."""
        return None

    def without_context(self) -> PartConfig | None:
        """Settings of the same activation with codes that don't follow the context, for which the
        tensors of this one fit; None where there is no such activation."""
        return None

    def export(self) -> Form | Refusal:
        """The activation in the form that other tools compute, or the reason why it has none."""
        return Refusal("has no export(): return its Form there, or a Refusal with the reason")

    def load_form(self, form: Form) -> None:
        """Takes over a form's tensors; called on a part that `PartConfig.of_form` configured."""


def check_setting(name: str, value: float | str, sae: SAE) -> None:
    """Raises: SettingError when the value is the name of a setting that no controller owns."""
    if isinstance(value, str) and value not in sae.settings(0):
        remedy = "no controller sets it: add a controller of that name, or give a number"
        raise SettingError(name, value, remedy)


class LossTerm(Part):
    """One term of the objective; `coefficient` is a number or the name of a controller."""

    coefficient: float | str = 1.0
    #: Reads `p.decoder_norms`, which then come with the decoder's product.
    uses_decoder_norms: bool = False

    def check(self, sae: SAE) -> None:
        check_setting("coefficient", self.coefficient, sae)

    def loss(self, p: Pass) -> Tensor:
        """A scalar with gradient; must not change any state.

        On several ranks it is what this rank's rows contribute, over all latents: the sum over
        ranks with other rows is the batch's loss.
        """
        raise TypeError(f"{type(self).__name__} has no loss()")


class Controller(Part):
    """Owns the value of the setting `name`, which other parts refer to by that name.

    `follows_text` says that it holds the L0 of training batches by `correction`, which is added to
    the logarithm of its target and makes held-out text have the target; training sets it.
    """

    name: str
    follows_text = False
    correction: float = 0.0

    def value(self, step: int) -> float:
        raise TypeError(f"{type(self).__name__} has no value()")


class Constraint(Part):
    """Keeps parameters where they must be."""

    def on_gradients(self, sae: SAE) -> None: ...

    def on_parameters(self, sae: SAE) -> None: ...


@dataclass(frozen=True)
class Lives:
    """Lifetimes of the latents of a run.

    Args:
        survival: share of lives that outlast each bin of age, float64 [bins]; the bins have equal
            widths and cover the run.
        at_risk: lives observed up to the beginning of each bin; int64 [bins].
        deaths, resamplings: numbers over the run.
    """

    survival: Tensor
    at_risk: Tensor
    deaths: int
    resamplings: int


class Observer(Part):
    """Watches the run; may ask the loop to reset latents."""

    def observe(self, p: Pass) -> Reset | None:
        """Returns the latents to reset, if any; called after `update`. The loop carries out the
        reset, optimiser moments included."""

    def lives(self) -> Lives | None:
        """The lives of the latents so far; None where the part does not follow them."""
        return None

    def resampled(self) -> int | None:
        """Number of resets of latents that the part has counted; None where it counts none."""
        return None


def log_spread(variance: Tensor) -> Tensor:
    """Standard deviation of log variance, what a temperature of 0.5 takes off; [n] -> 0-dim."""
    return variance.clamp_min(torch.finfo(variance.dtype).tiny).log().std(correction=0)


@torch.no_grad()
def correct_bias(ema: Tensor, momentum: float, count: int) -> Tensor:
    """An EMA that started at 0, divided by the weight it has gathered after `count` updates."""
    return ema / (1 - momentum**count) if count else ema
