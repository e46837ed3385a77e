"""The seams: base classes of all parts, what they are given, and when they are called.

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
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, Self

import numpy as np
import torch
from pydantic import AfterValidator
from torch import Tensor, nn
from torch.nn.functional import normalize, softplus

from saelab.config import Frozen
from saelab.distributed.ranks import ALONE, Ranks
from saelab.errors import SettingError
from saelab.kernels import Code, Support, row_norms

if TYPE_CHECKING:
    from saelab.sae import SAE, SAEConfig


@dataclass(frozen=True)
class Dims:
    """Dimensions and circumstances that a part is built for.

    `steps` is the number of optimiser steps of the run; `seed` is for the part's named streams;
    `ranks` are the processes that the SAE is trained on.
    """

    d_in: int
    d_sae: int
    steps: int = 1
    seed: int = 0
    ranks: Ranks = ALONE

    @property
    def n_local(self) -> int:
        """Number of the d_sae latents that this rank has: the length of tensors per latent."""
        local = self.ranks.own(self.d_sae)
        return local.stop - local.start


@dataclass(eq=False)
class Pass:
    """One forward pass, as losses, controllers and observers see it.

    Args:
        x: input in normalised space, float32 [N, d_in].
        target: what is reconstructed; equal to x for an SAE; [N, d_in].
        u: encoder input, float32 [N, d_in].
        code: the code, sparse or dense.
        recon: reconstruction in normalised space, [N, d_in].
        sae: the model.
        step: optimiser steps done before this pass; `steps` is their number in the run.
        settings: values of the controllers by name.
        starts: int64 [m + 1], where segments of rows that follow each other begin; None for
            shuffled rows.
        norms: of the decoder's rows, where they came with its product; see `decoder_norms`.
        stored_z: the value of `z`; None unless a part declares `uses_preactivations`.
        batch_rows: rows of the whole batch, where x is one rank's part of it.
        gradient_norms: of each weight's gradient before clipping, by name; the loop adds them
            after the backward pass, for `update` and observers.
        results: by part, what it has computed on this pass and needs again in its `update`.
    """

    x: Tensor
    target: Tensor
    u: Tensor
    code: Code
    recon: Tensor
    sae: SAE
    step: int
    steps: int
    settings: dict[str, float]
    starts: Tensor | None
    norms: Tensor | None = None
    stored_z: Tensor | None = None
    batch_rows: int | None = None

    @property
    def z(self) -> Tensor:
        """All pre-activations, without gradient, in the selection's dtype; [N, d_sae].

        It is the largest tensor of a pass, and freed once the code is computed unless a part
        reads it.

        Raises: RuntimeError when no part of the SAE declares that it reads it.
        """
        if self.stored_z is None:
            raise RuntimeError(
                "all pre-activations are stored only where a part declares that it "
                "reads them: set its uses_preactivations = True"
            )
        return self.stored_z

    gradient_norms: dict[str, float] = field(default_factory=dict)
    results: dict[Part, Any] = field(default_factory=dict)

    @cached_property
    def decoder_norms(self) -> Tensor:
        """|W_dec_i| of each latent with its gradient; [d_sae]."""
        return self.norms if self.norms is not None else row_norms(self.sae.W_dec)

    @property
    def n(self) -> int:
        """Rows of the batch, over all ranks."""
        return self.x.shape[0] if self.batch_rows is None else self.batch_rows

    def share(self, value: Tensor) -> Tensor:
        """The share of a mean over this rank's rows in the mean over the batch's rows."""
        local = self.x.shape[0]
        return value if local == self.n else value * (local / self.n)

    def mean(self, x: Tensor) -> Tensor:
        """Mean over the batch's rows, without gradient; x [rows of this rank, ...]."""
        ranks = self.sae.ranks
        return x.mean(0) if ranks.data == 1 else ranks.over_rows(x.sum(0)) / self.n

    @cached_property
    def firings(self) -> Tensor:
        """Number of the batch's rows in which each of this rank's latents fires; int64."""
        return self.sae.ranks.over_rows(self.code.firings)

    @cached_property
    def l0(self) -> float:
        """Mean number of active latents per row of the batch."""
        if self.sae.ranks.alone:
            return self.code.l0
        return self.sae.ranks.total(self.code.active_pairs)[0] / self.n

    @cached_property
    def energy(self) -> Tensor:
        """sum_n f_ni^2 |W_dec_i|^2 of each latent over the batch; [d_sae], without gradient."""
        return self.code.sums[1] * self.decoder_norms.detach().square()

    def setting(self, value: float | str) -> float:
        """A number as it is; a name is looked up among the controllers."""
        return self.settings[value] if isinstance(value, str) else value


#: Ways in which a part decides the L0, the number of active latents per row.
L0Rule = Literal["set", "found"]
#: What a logged scalar is, in the order in which reports name them.
Role = Literal["learned", "state", "measured"]
ROLES: tuple[Role, ...] = ("learned", "state", "measured")


@dataclass(frozen=True)
class Scalar:
    """A scalar that a part may log at every step, declared once for all that shows it.

    Args:
        meaning: one phrase.
        role: 'learned', a result of training: when it settles is measured, and its path is drawn;
            'state', a value that the part holds or a rule sets; 'measured', a number about the run.
        reported: whether its last value stands in final_info.json.
        unit: '' for a number without one.
    """

    meaning: str
    role: Role = "learned"
    reported: bool = True
    unit: str = ""


def measurement(meaning: str, unit: str = "") -> Scalar:
    """A scalar about the run that stays in the log and its curves."""
    return Scalar(meaning, "measured", False, unit)


class PartConfig(Frozen):
    """Base of all part configurations; subclasses fix `kind` as a Literal with a default.

    `lr` is the learning rate of the part's own parameters; None means the run's rate.

    The rest of the program never asks for a kind. It asks the questions below; the answers here
    are those of a part that logs nothing, needs nothing and sets no L0.
    """

    kind: str
    lr: float | None = None

    def build(self, dims: Dims) -> Part:
        """Builds the part.

        Raises: SettingError when the settings are impossible at these dimensions.
        """
        raise SettingError("kind", self.kind, "this part has no build()")

    @property
    def logged(self) -> Mapping[str, Scalar]:
        """Every scalar that the part may log, by its name in the log."""
        return {}

    @property
    def companions(self) -> Mapping[str, Any]:
        """Settings of the SAE that must stand beside the part for it to work."""
        return {}

    # ---- sparsity ------------------------------------------------------------------------------

    @property
    def target_l0(self) -> float | None:
        """The L0 that the settings name, in latents per row; None where they name none."""
        return None

    @property
    def l0_setting(self) -> str | None:
        """Name of the controller's setting that the part takes its L0 from."""
        return None

    def l0_rule(self, sae: SAEConfig) -> L0Rule | None:
        """Says how the part decides the L0.

        Args:
            sae: the settings that the part stands in.

        Returns: 'set' where `at_l0` changes the settings so that the L0 follows; 'found' where the
            part's rule, or a number that its settings name, ends at an L0 that no level changes;
            None where the part does not decide the L0.
        """
        return None

    def at_l0(self, level: float, sae: SAEConfig) -> Self:
        """The settings with `level` active latents per row; these where the part does not set it.

        Args:
            sae: the settings that the part stands in.
        """
        return self

    @property
    def fixed_penalty(self) -> float | None:
        """The coefficient that a sparsity penalty ends with, where the settings fix it."""
        return None

    # ---- what it does to an SAE ----------------------------------------------------------------

    @property
    def moves_decoder(self) -> bool:
        """True where the part itself changes decoder rows, and so would fight a frozen decoder."""
        return False

    @classmethod
    def of_form(cls, form: Form) -> PartConfig | None:
        """The settings of an activation that computes the form; None where this one doesn't."""
        return None


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


def _positive(k: int | str) -> int | str:
    if isinstance(k, int) and k < 1:
        raise ValueError("should be at least 1, or a controller's name")
    return k


#: A number of latents, or the name of the controller that sets it.
Latents = Annotated[int | str, AfterValidator(_positive)]
#: Unit of a logged number of latents that is an L0.
PER_TOKEN = "latents per token"


def nearest_k(level: float) -> int:
    """The number of latents per row that is nearest to a level, at least 1."""
    return max(1, round(level))


class Part(nn.Module):
    """Base of all parts. Running state is stored in buffers, so that it is saved and restored."""

    #: Ascend instead of descend on the part's parameters.
    maximise: ClassVar[bool] = False
    #: Needs batches of whole contexts.
    needs_contexts: ClassVar[bool] = False
    #: Reads `p.z`, which is then stored through the step.
    uses_preactivations: bool = False
    #: Works where each rank has a subset of a batch's rows and of the latents. State per latent
    #: then has length `Dims.n_local`, and sums over rows or latents go over all ranks.
    shardable: bool = False
    #: Names of the parameters and buffers with one entry per latent.
    per_latent: ClassVar[tuple[str, ...]] = ()
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
    #: Has statistics that `fit` sets before training.
    fitted: ClassVar[bool] = False

    def dense(self, z: Tensor) -> Tensor:
        """[N, d_sae] -> [N, d_sae] with gradients."""
        raise TypeError(f"{type(self).__name__} has no dense()")

    def support(self, z: Tensor) -> Support | None:
        """Pairs that may be active, margin included; None asks for the dense path. No gradient."""
        raise TypeError(f"{type(self).__name__} has no support()")

    def at(self, values: Tensor, support: Support) -> Tensor:
        """Gathered pre-activations [nnz] -> code values [nnz] with gradients."""
        raise TypeError(f"{type(self).__name__} has no at()")

    def floor(self) -> Tensor | None:
        """Value that active pre-activations exceed at inference: [d_sae] or 0-dim.

        None where it depends on the other latents of the row, or on the rows before it.
        """
        return None

    def initial_floor(self) -> Tensor | None:
        """The floor before training, for the start of b_enc."""
        return self.floor()

    def fit(self, z: Tensor) -> None:
        """Sets the statistics from a sample's pre-activations [n, d_sae] before training."""

    def gate(self, z: Tensor, support: Support | None) -> Tensor:
        """1[latent fires] at the support (or densely), with gradients to the thresholds.

        Raises: SettingError when the activation has no thresholds.
        """
        raise SettingError(
            "activation", type(self).__name__, "has no thresholds to penalise: choose jumprelu"
        )

    def latent_scale(self) -> Tensor | None:
        """The unit that each latent's pre-activation is measured in, [d_sae]; None without any."""
        return None

    def without_context(self) -> PartConfig | None:
        """Settings of the same activation with codes that don't follow the context, for which the
        tensors of this one fit; None where there is no such activation."""
        return None

    def export(self) -> Form | None:
        """The activation in the form that other tools compute; None where it has no such form.

        Raises: SettingError with the reason, where it depends on the settings.
        """
        return None

    def load_form(self, form: Form) -> None:
        """Takes over a form's tensors; called on a part that `PartConfig.of_form` configured."""


@dataclass(frozen=True)
class Form:
    """Activation as other tools know it, a function of one row's pre-activations z:

        f = gain z + shift      where it is above 0 and z above the threshold, else 0
        f = max(z, 0)           at the k largest z of the row, else 0

    Args:
        threshold: [d_sae] or 0-dim; None where 0 is the only one.
        k: active latents per row; then there is nothing else.
        affine: gain (> 0) and shift, [d_sae] each; None for 1 and 0.
    """

    threshold: Tensor | None = None
    k: int | None = None
    affine: tuple[Tensor, Tensor] | None = None

    def code(self, z: Tensor) -> Tensor:
        """The code of pre-activations; [n, d_sae] both."""
        if self.k is not None:
            values, latents = z.topk(self.k, dim=-1)
            return torch.zeros_like(z).scatter(-1, latents, torch.relu(values))
        f = torch.relu(z if self.affine is None else z * self.affine[0] + self.affine[1])
        return f if self.threshold is None else f * (z > self.threshold)


def check_setting(name: str, value: float | str, sae: SAE) -> None:
    """Raises: SettingError when the value is the name of a setting that no controller owns."""
    if isinstance(value, str) and value not in sae.settings(0):
        remedy = "no controller sets it: add a controller of that name, or give a number"
        raise SettingError(name, value, remedy)


class LossTerm(Part):
    """One term of the objective; `coefficient` is a number or the name of a controller."""

    coefficient: float | str = 1.0
    #: Reads `p.decoder_norms`, which then come with the decoder's product.
    uses_decoder_norms: ClassVar[bool] = False

    def check(self, sae: SAE) -> None:
        check_setting("coefficient", self.coefficient, sae)

    def loss(self, p: Pass) -> Tensor:
        """A scalar with gradient; must not change any state.

        On several ranks it is what this rank's rows contribute, over all latents: the sum over
        ranks with other rows is the batch's loss.
        """
        raise TypeError(f"{type(self).__name__} has no loss()")


class Controller(Part):
    """Owns the value of the setting `name`, which other parts refer to by that name."""

    name: str

    def value(self, step: int) -> float:
        raise TypeError(f"{type(self).__name__} has no value()")


class Constraint(Part):
    """Keeps parameters where they must be."""

    def on_gradients(self, sae: SAE) -> None: ...

    def on_parameters(self, sae: SAE) -> None: ...


@dataclass(frozen=True)
class Reset:
    """Latents to start afresh.

    Args:
        latents: int64 [m].
        directions: unit vectors in normalised space, float32 [m, d_in].
        encoder_norm: norm of the new encoder rows, input scaling folded in.
    """

    latents: Tensor
    directions: Tensor
    encoder_norm: float


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


@torch.no_grad()
def draw_reset(p: Pass, latents: Tensor, encoder_norm: float, draw: torch.Generator) -> Reset:
    """Draws new directions: inputs in proportion to their squared error. Bricken et al. 2023.

    Args:
        latents: those that start afresh; int64 [m].
        encoder_norm: of the new encoder rows, relative to the mean norm of all others.
        draw: the part's stream.
    """
    ranks = p.sae.ranks
    first, count = ranks.before(latents.numel())
    error = _gather_rows(p, (p.target - p.recon).square().sum(1).double()).cpu()
    rows = torch.multinomial(error, count, replacement=True, generator=draw)
    rows = rows[first : first + latents.numel()].to(p.x.device)
    directions = normalize(_rows_of(p, rows) - p.sae.b_dec.detach(), dim=1)
    others = torch.ones(p.sae.local_latents, dtype=torch.bool, device=latents.device)
    others[latents] = False
    norms = torch.linalg.vector_norm(p.sae.effective_encoder(), dim=1)
    left = ranks.total_over_latents(int(others.sum()))[0]
    mean = float(ranks.mean_over_latents(norms[others] if left else norms))
    return Reset(latents, directions, encoder_norm * mean)


def _gather_rows(p: Pass, values: Tensor) -> Tensor:
    """Gathers a number of each of this rank's rows to one of each of the batch's rows."""
    if p.sae.ranks.data == 1:
        return values
    whole = values.new_zeros(p.n)
    whole[p.sae.ranks.rows(p.n)] = values
    return p.sae.ranks.over_rows(whole)


def _rows_of(p: Pass, rows: Tensor) -> Tensor:
    """Returns x of the given rows of the batch, int64 [m], whichever rank has them; [m, d_in].
    Ranks with the same latents ask for the same rows."""
    local = p.sae.ranks.rows(p.n)
    if p.sae.ranks.data == 1:
        return p.x[rows]
    here = (rows >= local.start) & (rows < local.stop)
    values = p.x.new_zeros(len(rows), p.x.shape[1])
    values[here] = p.x[rows[here] - local.start]
    return p.sae.ranks.over_rows(values)


def log_spread(variance: Tensor) -> Tensor:
    """Standard deviation of log variance, what a temperature of 0.5 takes off; [n] -> 0-dim."""
    return variance.clamp_min(torch.finfo(variance.dtype).tiny).log().std(correction=0)


@torch.no_grad()
def correct_bias(ema: Tensor, momentum: float, count: int) -> Tensor:
    """An EMA that started at 0, divided by the weight it has gathered after `count` updates."""
    return ema / (1 - momentum**count) if count else ema
