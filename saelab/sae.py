"""The sparse autoencoder: one final class that composes parts.

    x_n   = x / c                                  c one scalar with E|x_n - mean|^2 = d_in
    u     = scaling(x_n - b_dec)                   z = W_enc u + b_enc
    f     = activation(z)                          x_hat = c * (f W_dec + b_dec)

Where other activations y than those that are read are reconstructed (a transcoder)

    u     = scaling(x_n - a)                       a the sample's mean of x_n, fixed
    y_hat = c' * (f W_dec + b_dec + W_skip (x_n - a))      c' the scale of y; W_skip where set

x and y may consist of several hook points, whose channels then follow each other; each hook point
has a scale of its own, c and c' are vectors with one number for each channel. An SAE on several
hook points whose input is its target is a crosscoder (Lindsey et al. 2024).

Both weight matrices are stored latent-major, [d_sae, d_in] and [d_sae, d_out]: row i belongs to
latent i, so that sparse gradients gather and scatter whole rows. `encode` and `decode` work in raw
activation space. `decode` gives the code's part of a reconstruction; `complete` adds what comes
from the input past the code. Where `row_norm` is set (by readers of published SAEs), x is a row
normalised by its own statistics (`saelab.row_norm`), `decode` gives a normalised row, and
`complete` makes it a raw one.

On several ranks (`saelab.distributed.ranks`) each rank holds the rows of its latents, and all ranks
call every method together. The code of a training pass covers the latents of the rank; `encode`,
`codes` and `decode` return and take the code of all latents on every rank.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Literal, cast, final

import torch
from pydantic import Field, PositiveFloat, model_validator
from torch import Tensor, nn
from torch.nn.functional import linear, normalize

from saelab.config import Frozen, Macro, setting_error_at_place
from saelab.distributed.ranks import ALONE, Ranks
from saelab.distributed.sharded_file import Shards
from saelab.errors import SettingError, naming_setting, shorten
from saelab.kernels import (
    Code,
    Precision,
    Screen,
    Support,
    decode_at,
    decode_with_norms,
    encode_all,
    encode_at,
    gather_code,
    pool_codes,
    preactivations,
    select_latents,
    selection_dtype,
    support_above,
)
from saelab.origin import Origin
from saelab.parts import (
    DEFAULT_ACTIVATION,
    DEFAULT_CONTROLLERS,
    DEFAULT_LOSSES,
    HOW_TO_SET_L0,
    ActivationField,
    ConstraintField,
    ControllerField,
    LossField,
    ObserverField,
    ScalingField,
)
from saelab.parts.base import (
    Activation,
    Constraint,
    Controller,
    Dims,
    L0Rule,
    LossTerm,
    Observer,
    Part,
    PartConfig,
    Pass,
    Reset,
    Scalar,
    Scaling,
    Weights,
)
from saelab.parts.presets import PRESET, expand
from saelab.row_norm import RowNorm, normalise_rows, restore_rows
from saelab.runtime.counting import count
from saelab.seeding import torch_stream
from saelab.storage.atomic import write_sealed

#: Version of the format that `SAE.save` writes.
FORMAT = 1
#: Width of a hook point, or of each of several.
Widths = int | Sequence[int]
#: The most latents of an SAE: twice as many as any published SAE has. Our choice.
MOST_LATENTS = 2**26
#: The largest error of a bfloat16 selection relative to |u| |w| + |b|: 2^-9 for the rounding of
#: each factor and of the result, and a little for the products of these errors.
ROUNDING = 3.05 * 2**-9
#: Decoder rows drawn at once: a multiple of 16, so that all draws together equal one large draw.
ROWS_DRAWN_AT_ONCE = 64
#: Rows of the sample from which the initial bias is computed.
BIAS_ROWS = 2048
#: Rows encoded at once where no gradient is needed: their code stays in a core's cache.
ROWS = 256
#: The same if a code depends on previous tokens: whole segments of about this many rows together.
CONTEXT_ROWS = 2048


class SAEConfig(Frozen):
    """Settings of an SAE: its size and its parts.

    Args:
        d_sae: number of latents.
        activation, scaling, losses, controllers, constraints, observers: the parts,
            see `saelab parts`.
        encoder_bias: whether b_enc exists (idea A's literal form has none).
        centre: whether b_dec is subtracted before the encoder.
        tied: whether the encoder is the decoder's transpose, one matrix for both.
        initial_l0: active latents per row at the start: b_enc starts at the constant that gives
            this L0 on the sample. None starts it at 0, where half of all latents are active. Needs
            a bias, and an activation that treats each latent separately.
        precision: of the GEMM that selects active latents; values are float32 in any case.
        skip: with a target, adds a linear map of the input to the reconstruction.
        decoder_start: with a target, 'random' unit rows or 'zeros'.

    The name of a published SAE under `preset` stands for its parts (`saelab.parts.presets`).
    """

    added_later: ClassVar[frozenset[str]] = frozenset({"skip", "decoder_start"})
    always_shown: ClassVar[frozenset[str]] = frozenset({"d_sae", "activation"})
    macros: ClassVar[Mapping[str, Macro]] = {"preset": PRESET}

    d_sae: int = Field(default=1536, gt=0, le=MOST_LATENTS)
    activation: ActivationField = DEFAULT_ACTIVATION
    scaling: ScalingField | None = None
    losses: tuple[LossField, ...] = DEFAULT_LOSSES
    controllers: tuple[ControllerField, ...] = DEFAULT_CONTROLLERS
    constraints: tuple[ConstraintField, ...] = ()
    observers: tuple[ObserverField, ...] = ()
    encoder_bias: bool = True
    centre: bool = True
    tied: bool = False
    initial_l0: PositiveFloat | None = None
    precision: Precision = "auto"
    skip: bool = False
    decoder_start: Literal["random", "zeros"] = "random"

    @model_validator(mode="before")
    @classmethod
    def _with_parts_of_preset(cls, data: Any) -> Any:
        if not isinstance(data, Mapping) or "preset" not in data:
            return data
        try:
            return expand(data)
        except SettingError as error:
            raise setting_error_at_place(error) from None

    def build(
        self,
        d_in: Widths,
        steps: int = 1,
        seed: int = 0,
        ranks: Ranks = ALONE,
        d_out: Widths | None = None,
    ) -> SAE:
        """Builds an uninitialised SAE; call `initialise` before training.

        Args:
            d_in: width of the input, or of each of its hook points.
            d_out: likewise of the target; None where the input is the target.

        Raises: SettingError on several ranks for a part that is not `shardable`, and for settings
            that do not go with the target.
        """
        return SAE(self, self._dims(d_in, d_out, steps=steps, seed=seed, ranks=ranks))

    def _dims(self, d_in: Widths, d_out: Widths | None = None, **options: Any) -> Dims:
        inputs = (d_in,) if isinstance(d_in, int) else tuple(d_in)
        targets = () if d_out is None else (d_out,) if isinstance(d_out, int) else tuple(d_out)
        several = inputs if len(inputs) > 1 else ()
        return Dims(sum(inputs), self.d_sae, inputs=several, targets=targets, **options)

    def outline(self, d_in: Widths = 2, ranks: Ranks = ALONE, d_out: Widths | None = None) -> SAE:
        """Builds the SAE without the memory of its large tensors, to check its parts.

        Raises: SettingError for parts that are impossible or do not fit together.
        """
        dims = self._dims(d_in, d_out, ranks=ranks)
        try:
            with torch.device("meta"):
                sae = SAE(self, dims, checked=False)
            # controllers are asked for their first values
            sae.controllers = _build_parts("controllers", self.controllers, dims)
            sae.check_parts()
        except (NotImplementedError, RuntimeError):  # a user's part that reads its own tensors
            return self.build(d_in, ranks=ranks, d_out=d_out)
        return sae

    def parts(self) -> dict[str, tuple[PartConfig, ...]]:
        """Name of each field that holds parts -> its parts, in the order of `SAE.parts`."""
        scaling = () if self.scaling is None else (self.scaling,)
        return {
            "activation": (self.activation,),
            "scaling": scaling,
            "losses": self.losses,
            "controllers": self.controllers,
            "constraints": self.constraints,
            "observers": self.observers,
        }

    def all_parts(self) -> list[PartConfig]:
        """All parts in the order of `SAE.parts`."""
        return [part for parts in self.parts().values() for part in parts]

    @property
    def target_l0(self) -> float | None:
        """The L0 that the settings name, in latents per row: a part's or else that of the start;
        None where they name none."""
        named = [part.target_l0 for part in self.all_parts()]
        return next((float(l0) for l0 in [*named, self.initial_l0] if l0 is not None), None)

    @property
    def settled_l0(self) -> float | None:
        """The L0 that a part sets, in latents per row, which training ends with by moving the
        thresholds (`SAE.raise_thresholds`); None where none is set."""
        setting = [part for part in self.all_parts() if part.l0_rule(self) == "set"]
        named = [part.target_l0 for part in setting if part.target_l0 is not None]
        return float(named[0]) if named else None

    @property
    def decides_l0(self) -> bool:
        """True where a part sets the L0, or ends at one of its own."""
        return any(part.l0_rule(self) for part in self.all_parts())

    def at_l0(self, level: float) -> SAEConfig:
        """The settings with `level` active latents per row; as they are where a part's rule ends at
        an L0 of its own.

        Raises: SettingError where no part sets or finds the L0.
        """
        if not self.decides_l0:
            remedy = f"no part of these settings sets or finds the L0: {HOW_TO_SET_L0}"
            raise SettingError("level", level, remedy)
        changes: dict[str, Any] = {}
        for field, parts in self.parts().items():
            changed = tuple(part.at_l0(level, self) for part in parts)
            if changed != parts:
                whole = isinstance(getattr(self, field), tuple)
                changes[field] = changed if whole else changed[0]
        return self.patched(changes) if changes else self

    def l0_rules(self, level: float) -> frozenset[L0Rule]:
        """The ways in which the parts decide the L0; empty where none does.

        Args:
            level: in latents per row. A part that says 'set' counts if `at_l0` tells this level
                from a higher one.
        """
        rules: set[L0Rule] = set()
        for part in self.all_parts():
            rule, ends = part.l0_rule(self), [part.at_l0(l0, self) for l0 in (level, level + 2)]
            if rule == "found" or (rule and ends[0] != ends[1]):
                rules.add(rule)
        return frozenset(rules)

    def has_user(self, setting: str) -> bool:
        """True where a part takes the value of a controller's setting."""
        others = [part for part in self.all_parts() if part not in self.controllers]
        return any(setting in part.settings_read.values() for part in others)

    @property
    def logged(self) -> dict[str, Scalar]:
        """Every scalar that the parts may log, by its name in the log."""
        return {name: scalar for part in self.all_parts() for name, scalar in part.logged.items()}

    def shapes(self, d_in: Widths, d_out: Widths | None = None) -> dict[str, tuple[int, ...]]:
        """Returns name -> shape of every tensor of such an SAE, without allocating any."""
        with torch.device("meta"):
            sae = SAE(self, self._dims(d_in, d_out), checked=False)
        return {name: tuple(tensor.shape) for name, tensor in sae.state_dict().items()}


def computes(name: str) -> bool:
    """Returns True for a tensor of a state dict that code or reconstruction depend on, and False
    for one that serves training alone."""
    return name.split(".")[0] not in ("losses", "controllers", "constraints", "observers")


@final
class SAE(nn.Module):
    """A sparse autoencoder that is composed of parts; see this module's equations.

    Args:
        config: its settings.
        dims: its sizes.
        checked: whether the parts check that they fit together; False only to ask for shapes.

    `origin` is the model and hook point that it was trained on, where these are known.
    """

    scale: Tensor
    target_scale: Tensor
    centre: Tensor
    W_skip: nn.Parameter | None

    def __init__(self, config: SAEConfig, dims: Dims, checked: bool = True) -> None:
        super().__init__()
        self.config, self.d_in, self.d_sae = config, dims.d_in, dims.d_sae
        self.dims, self.ranks = dims, dims.ranks
        self.row_norm: RowNorm = "none"
        self.origin = Origin()
        self.W_enc = nn.Parameter(torch.zeros(dims.n_local, dims.d_in, dtype=torch.float32))
        self.b_enc = nn.Parameter(
            torch.zeros(dims.n_local, dtype=torch.float32), requires_grad=config.encoder_bias
        )
        self.W_dec = nn.Parameter(torch.zeros(dims.n_local, dims.d_out, dtype=torch.float32))
        if config.tied and not dims.targets:
            self.W_enc = self.W_dec
        self.b_dec = nn.Parameter(torch.zeros(dims.d_out, dtype=torch.float32))
        self.register_buffer("scale", _unit_scale(dims.input_blocks))
        if dims.targets:
            self.register_buffer("target_scale", _unit_scale(dims.targets))
            self.register_buffer("centre", torch.zeros(dims.d_in, dtype=torch.float32))
        skip = torch.zeros(dims.d_out, dims.d_in, dtype=torch.float32) if config.skip else None
        self.register_parameter("W_skip", None if skip is None else nn.Parameter(skip))
        self.activation = cast(Activation, _build_part("activation", config.activation, dims))
        scaling = _build_part("scaling", config.scaling, dims) if config.scaling else None
        self.scaling = cast(Scaling | None, scaling)
        self.losses = _build_parts("losses", config.losses, dims)
        self.controllers = _build_parts("controllers", config.controllers, dims)
        self.constraints = _build_parts("constraints", config.constraints, dims)
        self.observers = _build_parts("observers", config.observers, dims)
        one = len(dims.target_blocks) == 1  # the kernel gives the norm of the whole row
        self._norms_wanted = one and any(t.uses_decoder_norms for t in self.loss_terms().values())
        readers = [part for part in self.parts() if part.uses_preactivations]
        self._z_may_be_wanted = bool(readers)
        self._z_wanted = not all(part.reads_them_rarely for part in readers)
        for part in self.parts():
            part.ranks = dims.ranks
        if checked:
            self.check_parts()

    def _apply(self, fn: Any, recurse: bool = True) -> SAE:
        """Moves or converts all tensors, as `to`, `cuda` and `double` do; nothing is moved to a
        device that can't hold them all.

        Raises: SettingError for a device without float64 where a part has a float64 tensor.
        """
        if name := next((n for n, b in self.named_buffers() if b.dtype == torch.float64), ""):
            try:
                fn(torch.zeros((), dtype=torch.float64))
            except TypeError as error:
                reason = f"can't hold {name} of the SAE in float64 ({shorten(str(error))})"
                raise SettingError("device", "mps", f"{reason}: leave the SAE on 'cpu'") from None
        return super()._apply(fn, recurse)

    def __repr__(self) -> str:
        """Returns sizes, parts with their settings that are not at their defaults, and the place
        of the weights."""
        target = f", target of width {self.dims.d_out}" if self.has_target else ""
        lines = [
            f"SAE of {count(self.d_sae, 'latent')} on activations of width {self.d_in}{target}"
        ]
        for field, parts in self.config.parts().items():
            if parts:
                lines.append(f"  {field}: {', '.join(part.brief() for part in parts)}")
        numbers = sum(tensor.numel() for tensor in self.parameters())
        mode = "in training mode" if self.training else "in evaluation mode"
        lines.append(f"  {numbers:,} parameters, {self.W_enc.dtype} on {self.W_enc.device}, {mode}")
        if str(self.origin):
            lines.append(f"  trained {self.origin}")
        return "\n".join(map(shorten, lines))

    def save(self, folder: str | Path, about: Mapping[str, Any] | None = None) -> None:
        """Writes this SAE in the format of saelab (`saelab.checkpoint`); `saelab.load` reads it.

        Args:
            folder: made where it is missing; an SAE in it is replaced.
            about: metadata to store, as plain JSON data; model and hook_name are those of `origin`
                unless it names others.
        """
        folder, tensors = Path(folder), dict[str, Tensor](self.state_dict())
        if self.config.tied:  # one matrix, stored once
            del tensors["W_enc"]
        checksum = self.shards().write(folder / "sae.safetensors", tensors)
        blocks = {"inputs": list(self.dims.inputs), "targets": list(self.dims.targets)}
        record = {
            "format": FORMAT,
            "d_in": self.d_in,
            **{name: widths for name, widths in blocks.items() if widths},
            "sae": self.config.model_dump(mode="json"),
            "provenance": self.origin.about | dict(about or {}),
            "sha256": checksum,
        }
        if self.row_norm != "none":  # of a published SAE that was trained further
            record["row_norm"] = self.row_norm
        self.ranks.on_first(lambda: write_sealed(folder / "sae.json", record))

    # ---- composition -------------------------------------------------------------------------

    def check_parts(self) -> None:
        """Raises: SettingError for settings or parts that do not fit together."""
        _check_target(self.config, self.has_target)
        _check_start(self.config)
        if self.activation.uses_weights:
            _check_without_preactivations(self)
        for place, part in zip(_places(self.config), self.parts(), strict=True):
            _check_shardable(part, self.ranks)
            with naming_setting(place):
                part.check(self)

    def parts(self) -> list[Part]:
        """Returns all parts in the order in which they are updated."""
        single = [self.activation, *([self.scaling] if self.scaling is not None else [])]
        groups = (self.losses, self.controllers, self.constraints, self.observers)
        return [*single, *(cast(Part, part) for group in groups for part in group.values())]

    def loss_terms(self) -> dict[str, LossTerm]:
        """Returns the loss terms by name."""
        return {name: cast(LossTerm, part) for name, part in self.losses.items()}

    def settings(self, step: int) -> dict[str, float]:
        """Returns the controllers' values before the given step, by name."""
        return {part.name: part.value(step) for part in self.controller_parts()}

    def controller_parts(self) -> list[Controller]:
        """Returns the controllers."""
        return [cast(Controller, part) for part in self.controllers.values()]

    def constraint_parts(self) -> list[Constraint]:
        """Returns the constraints."""
        return [cast(Constraint, part) for part in self.constraints.values()]

    def observer_parts(self) -> list[Observer]:
        """Returns the observers."""
        return [cast(Observer, part) for part in self.observers.values()]

    @property
    def d_out(self) -> int:
        """Width of what is reconstructed; d_in unless there is a target."""
        return self.dims.d_out

    @property
    def has_target(self) -> bool:
        """True if other activations than the input are reconstructed."""
        return bool(self.dims.targets)

    @property
    def out_scale(self) -> Tensor:
        """Scale of what is reconstructed: one number, or one for each of its channels."""
        return self.target_scale if self.has_target else self.scale

    @property
    def local_latents(self) -> int:
        """Number of latents that this rank holds."""
        return len(self.b_enc)

    def shards(self) -> Shards:
        """Describes how the tensors of the state dict are split over the ranks."""
        names = {"W_enc", "b_enc", "W_dec"}
        for place, module in self.named_modules():
            if isinstance(module, Part):
                names |= {f"{place}.{name}" for name in module.per_latent}
        return Shards(frozenset(names), self.d_sae, self.ranks)

    # ---- initialisation ----------------------------------------------------------------------

    @torch.no_grad()
    def initialise(self, sample: Tensor, seed: int, y: Tensor | None = None) -> None:
        """Draws random unit decoder rows; sets the encoder to their transpose and b_dec to the
        sample's mean.

        With a target the encoder's rows are drawn by themselves, and b_dec is the target's mean.

        Args:
            sample: raw activations, [n, d_in], the same for every arm of a launch.
            seed: rows come from the named stream 'init' of this seed, those of a decoder whose
                target is not the input from 'init target'.
            y: targets of the sample's rows, [n, d_out]; None where the input is the target.

        Raises: SettingError when the sample is constant or not finite.
        """
        sample = normalise_rows(sample, self.row_norm)
        mean = sample.mean(0)
        self._set_scale(self.scale, sample, mean, self.dims.input_blocks)
        if self.has_target:
            outward = self._checked_targets(sample, y)
            outward_mean = outward.mean(0)
            self._set_scale(self.target_scale, outward, outward_mean, self.dims.targets)
            self._draw_unit_rows(self.W_enc, seed, "init")
            if self.config.decoder_start == "random":
                self._draw_unit_rows(self.W_dec, seed, "init target")
            self.centre.copy_(mean / self.scale)
            self.b_dec.copy_(outward_mean / self.target_scale)
        else:
            self._draw_unit_rows(self.W_dec, seed, "init")
            self.W_enc.copy_(self.W_dec)
            self.b_dec.copy_(mean / self.scale)
        self.b_enc.zero_()
        start = self.centre if self.has_target else self._centre()
        if self.config.initial_l0 is not None or self.activation.fitted:
            self._initialise_code(sample[:BIAS_ROWS] / self.scale - start)
        if self.has_target and not self.config.centre:  # the same start without a centre
            self.b_enc.sub_(self.W_enc @ self.centre)
        if self.scaling is not None:
            self.scaling.fit(sample / self.scale - self._centre())
            if self.scaling.keeps_start:
                gain, shift = self.scaling.fold()
                if not self.config.tied:
                    self.W_enc.copy_(_unfold_gain(self.W_enc, gain))
                self.b_enc.sub_(self.W_enc @ shift)
        self.check_alive()

    def _draw_unit_rows(self, w: Tensor, seed: int, stream: str) -> None:
        """Fills w [this rank's latents, d] with its rows of a draw of d_sae random unit rows."""
        local = self.ranks.own(self.d_sae)
        for first, drawn in _normal_rows(self.d_sae, w.shape[1], torch_stream(seed, stream)):
            rows = drawn[max(0, local.start - first) : max(0, local.stop - first)]
            place = max(0, first - local.start)
            w[place : place + len(rows)] = normalize(rows, dim=1).to(w.device)

    def _set_scale(
        self, scale: Tensor, sample: Tensor, mean: Tensor, blocks: tuple[int, ...]
    ) -> None:
        """Sets the scale of each hook point from a sample [n, d] of them side by side."""
        first = 0
        for width in blocks:
            place = slice(first, first + width)
            power = float((sample[:, place] - mean[place]).square().sum(1).mean())
            if not 0 < power < math.inf:
                remedy = "are constant, too large or not finite: check model, hook and text"
                raise SettingError("activations", power, remedy)
            (scale[place] if scale.dim() else scale).fill_(math.sqrt(power / width))
            first += width

    def _checked_targets(self, x: Tensor, y: Tensor | None) -> Tensor:
        """Raises: ValueError unless there are targets [n, d_out] of the rows x."""
        shape = None if y is None else tuple(y.shape)
        if y is None or shape != (len(x), self.d_out):
            raise ValueError(f"targets of shape {(len(x), self.d_out)} are needed, not {shape}")
        return y

    def _initialise_code(self, rows: Tensor) -> None:
        """Sets the activation's statistics and the bias from centred rows [n, d_in]."""
        z = linear(rows, self.W_enc)
        self.activation.fit(z)
        if self.config.initial_l0 is not None and self.config.encoder_bias:
            self.b_enc.fill_(self._bias_for(z, self.config.initial_l0))
            self.activation.fit(z.add_(self.b_enc))

    def _bias_for(self, z: Tensor, l0: float) -> float:
        """Returns the constant b_enc with which `l0` latents per row of z [n, d_sae] are active."""
        floor = self.activation.initial_floor()
        if floor is None or self.activation.couples_batch:
            return 0.0
        above = (z - floor.to(z.device)).flatten()
        active = min(max(1, round(l0 * len(z))), len(z) * self.d_sae)
        return -float(self.ranks.kth_largest(above, active))

    def check_alive(self) -> None:
        """Checks that no weight matrix is all zero, as no gradient could ever flow; a decoder that
        starts at zeros moves first.

        Raises: SettingError when one is.
        """
        zeros = self.has_target and self.config.decoder_start == "zeros"
        for name in ("W_enc",) if zeros else ("W_enc", "W_dec"):
            if not bool(getattr(self, name).any()):
                raise SettingError(name, 0, "is all zero, so nothing can be learned: initialise it")

    # ---- training pass -----------------------------------------------------------------------

    def forward(
        self,
        x: Tensor,
        step: int = 0,
        steps: int = 1,
        starts: Tensor | None = None,
        batch_rows: int | None = None,
        y: Tensor | None = None,
    ) -> Pass:
        """Computes one pass in raw activation space.

        Args:
            x: float32 [N, d_in].
            step, steps: the current step and the length of the run, for schedules.
            starts: int64 [m + 1], the first rows of segments of consecutive tokens, and N; None for
                shuffled rows.
            batch_rows: number of rows of the whole batch if x is this rank's part of it.
            y: targets, float32 [N, d_out]; None where the input is the target.
        """
        targets = self._checked_targets(x, y) / self.target_scale if self.has_target else None
        x = normalise_rows(x, self.row_norm) / self.scale
        u = self._encoder_input(x)
        code, z = self._code(u, starts)
        if code.support is None:
            product, norms = code.values @ self.W_dec, None
        else:
            decode = decode_with_norms if self._norms_wanted else _decode_without_norms
            product, norms = decode(code.values, self.W_dec, code.support)
        recon = self.ranks.over_latents(product) + self.offset(x)
        now = self.settings(step)
        return Pass(
            x=x,
            target=x if targets is None else targets,
            u=u,
            code=code,
            recon=recon,
            sae=self,
            step=step,
            steps=steps,
            settings=now,
            starts=starts,
            norms=norms,
            stored_z=z,
            batch_rows=batch_rows,
        )

    def _code(
        self, u: Tensor, starts: Tensor | None
    ) -> tuple[Code, Tensor | Callable[[], Tensor] | None]:
        """Computes the code with its gradients, and all pre-activations if a part reads them; if
        only rarely, perhaps a function that computes them."""
        if self.activation.uses_weights:
            return self.activation.encode(u, self.weights()), None
        dtype = selection_dtype(self.config.precision, u.device) if self.training else u.dtype
        if self.training and (found := self._screened(u)) is not None:
            pre = encode_at(u, self.W_enc, self.b_enc, *found, self._centre_of_gradient())
            code = Code(self.activation.at(pre, found[0]), pre, found[0])
            lazy = partial(preactivations, u, self.W_enc, self.b_enc, dtype)
            return code, lazy if self._z_may_be_wanted else None
        z = preactivations(u, self.W_enc, self.b_enc, dtype)
        support = self._support(z, starts)
        returned = z if self._z_may_be_wanted else None
        if support is None:
            del z
            pre = self.encode_all(u)
            return Code(self._dense(pre, starts), pre, None), returned
        pre = self.encode_at(u, support, z)
        return Code(self.activation.at(pre, support), pre, support), returned

    @torch.no_grad()
    def _screened(self, u: Tensor) -> tuple[Support, Tensor] | None:
        """Selects pairs by an int8 product and computes their values, [nnz]; None where another
        selection must do."""
        rule = self.activation
        k, floor = rule.selection_k(), rule.selection_floor()
        if not self.ranks.alone or self._z_wanted or (k is None and floor is None):
            return None
        screen = Screen.of(self.W_enc, u, self.config.precision, of_rows=k is not None)
        if screen is None:
            return None
        if k is not None:
            return screen.selected_topk(u, self.W_enc, self.b_enc, k)
        assert floor is not None
        found = screen.selected(u, self.W_enc, self.b_enc, floor)
        return None if found is None else rule.narrow(*found)

    @torch.no_grad()
    def _support(self, z: Tensor, starts: Tensor | None) -> Support | None:
        """Selects the pairs at which the code may be non-zero; None asks for the dense path."""
        context = (starts,) if self.activation.needs_contexts else ()
        support = self.activation.support(z, *context)
        if self.ranks.alone or not self.activation.couples_batch:
            return support
        (dense,) = self.ranks.total(support is None)  # ranks that communicate must take one path
        return None if dense else support

    def weights(self) -> Weights:
        """Returns the matrices as an activation that `uses_weights` sees them."""
        return Weights(self.W_enc, self.b_enc, self.W_dec)

    def _dense(self, z: Tensor, starts: Tensor | None) -> Tensor:
        """Computes the dense code of pre-activations [N, d_sae]."""
        context = (starts,) if self.activation.needs_contexts else ()
        return self.activation.dense(z, *context)

    def offset(self, x: Tensor) -> Tensor:
        """Returns what is added to the decoded code, in normalised space: b_dec, [d_out], or with a
        skip connection [N, d_out]; with gradients.

        Args:
            x: input in normalised space, [N, d_in].
        """
        if self.W_skip is None:
            return self.b_dec
        return self.b_dec + linear(x - self._centre(), self.W_skip)

    def _centre(self) -> Tensor | float:
        if not self.config.centre:
            return 0.0
        return self.centre if self.has_target else self.b_dec

    @property
    def encoder_centre(self) -> Tensor | float:
        """Tensor that the encoder subtracts in normalised space, [d_in]; 0 if it subtracts none."""
        centre = self._centre()
        return centre.detach() if isinstance(centre, Tensor) else centre

    def _encoder_input(self, x: Tensor) -> Tensor:
        """Computes u of the module's equation; it is detached if there is no scaling, because
        `encode_at` computes the gradient of b_dec at less cost. An activation that `uses_weights`
        does not call that, so it gets u with its gradient."""
        if self.scaling is None:
            centred = x - self._centre()
            return centred if self.activation.uses_weights else centred.detach()
        return self.ranks.spread(self.scaling.apply(x - self._centre()))

    def encode_at(self, u: Tensor, support: Support, z: Tensor | None = None) -> Tensor:
        """Computes pre-activations [nnz] at the support with all their gradients.

        Args:
            u: encoder input of a `Pass`, [N, d_in].
            support: the pairs to compute.
            z: all pre-activations of the selection, reused in float32 mode.
        """
        return encode_at(u, self.W_enc, self.b_enc, support, z, self._centre_of_gradient())

    def encode_all(self, u: Tensor) -> Tensor:
        """Computes all pre-activations [N, local latents] with all their gradients.

        Args:
            u: encoder input of a `Pass`, [N, d_in].
        """
        return encode_all(u, self.W_enc, self.b_enc, self._centre_of_gradient())

    def _centre_of_gradient(self) -> Tensor | None:
        """Returns b_dec if the encoder input is detached from it, see `encode_at`, else None: the
        centre of an SAE with a target is not trained, because b_enc can do what it does."""
        if not self.config.centre or self.scaling is not None or self.has_target:
            return None
        return self.ranks.spread(self.b_dec)

    # ---- inference, raw activation space -----------------------------------------------------

    @property
    def signed(self) -> bool:
        """True if codes may be negative."""
        return self.activation.signed

    @property
    def needs_contexts(self) -> bool:
        """True if a token's code depends on the tokens before it."""
        return self.activation.needs_contexts

    @torch.no_grad()
    def encode(self, x: Tensor, starts: Tensor | None = None) -> Tensor:
        """Encodes raw activations [n, d_in] -> code [n, d_sae], with stored statistics only.

        Args:
            starts: as for `forward`; ignored unless the SAE `needs_contexts`.

        Raises: SettingError when the SAE needs `starts` and gets none.
        """
        self._check_eval()
        if self.ranks.latents > 1:
            return torch.cat([code.dense() for _, code in self.codes(x, starts)])
        if self.activation.uses_weights:
            return self.activation.encode(self.encoder_input(x), self.weights()).dense()
        return self._dense(linear(self.encoder_input(x), self.W_enc, self.b_enc), starts)

    @torch.no_grad()
    def encoder_input(self, x: Tensor) -> Tensor:
        """Computes raw activations [n, d_in] -> u of the module's equation [n, d_in]."""
        return self._encoder_input(normalise_rows(x, self.row_norm) / self.scale)

    @torch.no_grad()
    def codes(self, x: Tensor, starts: Tensor | None = None) -> Iterator[tuple[slice, Code]]:
        """Yields the code of `encode` without its zeros, in blocks of ROWS rows or whole segments.

        If the selection is in int8 or bfloat16, the floors are lowered by more than its largest
        rounding error, so that no active latent is missed; the values are float32. A code that is
        not sparse is yielded dense. An activation that `uses_weights` computes everything in
        float32.

        Args:
            x: raw activations [n, d_in].

        Returns: pairs of a slice of x's rows and their code.
        """
        self._check_eval()
        if self.activation.uses_weights:
            yield from self._codes_from_weights(self.encoder_input(x))
            return
        floor = self.activation.floor()
        dtype = selection_dtype(self.config.precision, x.device)
        if floor is None:
            dtype = torch.float32
        w_enc, b_enc = self.W_enc.to(dtype), self.b_enc.to(dtype)
        norms = torch.linalg.vector_norm(self.W_enc, dim=1)
        inputs = self.encoder_input(x)
        k = self.activation.selection_k()
        screen = None
        if floor is not None or (k is not None and self.ranks.alone):
            screen = Screen.of(self.W_enc, inputs, self.config.precision, of_rows=floor is None)
        for rows, block_starts in self._row_blocks(len(x), starts):
            u = inputs[rows]
            found = None if screen is None else self._screened_at_inference(screen, u, floor, k)
            if found is not None:
                yield rows, self._gathered(self._code_at(u, found, block_starts))
                continue
            z = preactivations(u, w_enc, b_enc, dtype)
            if floor is None or dtype == torch.float32:
                support = self._support(z, block_starts)
            else:
                longest = torch.linalg.vector_norm(u, dim=1).max()
                error = ROUNDING * (norms * longest + self.b_enc.abs() + floor.abs())
                support = support_above(z, floor - error)
            yield rows, self._gathered(self._code_at(u, support, block_starts))

    def _screened_at_inference(
        self, screen: Screen, u: Tensor, floor: Tensor | None, k: int | None
    ) -> Support | None:
        """Selects at least the active pairs of a block of rows, by floors or else the k largest of
        each; None where a screen can't."""
        if floor is not None:
            return screen.candidates(u, self.b_enc, floor)
        assert k is not None
        found = screen.selected_topk(u, self.W_enc, self.b_enc, k)
        return None if found is None else found[0]

    def _gathered(self, code: Code) -> Code:
        """Returns the code of all latents from this rank's."""
        return gather_code(code, self.d_sae, self.ranks) if self.ranks.latents > 1 else code

    def _codes_from_weights(self, u: Tensor) -> Iterator[tuple[slice, Code]]:
        """Yields the codes of an activation that `uses_weights`, in blocks of ROWS rows."""
        weights = self.weights()
        for rows, _ in self._row_blocks(len(u), None):
            yield rows, self.activation.encode(u[rows], weights)

    def _row_blocks(self, n: int, starts: Tensor | None) -> Iterator[tuple[slice, Tensor | None]]:
        """Yields the rows that are encoded at once, and the `starts` of the segments in them."""
        if not self.needs_contexts or starts is None:
            yield from ((slice(i, min(i + ROWS, n)), None) for i in range(0, n, ROWS))
            return
        cuts, first = starts.tolist(), 0
        for last in range(1, len(cuts)):
            if last + 1 == len(cuts) or cuts[last + 1] - cuts[first] > CONTEXT_ROWS:
                block_starts = starts[first : last + 1] - cuts[first]
                yield slice(cuts[first], cuts[last]), block_starts.to(self.W_enc.device)
                first = last

    def _code_at(self, u: Tensor, support: Support | None, starts: Tensor | None) -> Code:
        """Computes the code at a support, or the dense code if there is none."""
        if support is None:
            values = self._dense(linear(u, self.W_enc, self.b_enc), starts)
            return Code(values, values, None)
        pre = encode_at(u, self.W_enc, self.b_enc, support)
        return Code(self.activation.at(pre, support), pre, support)

    @torch.no_grad()
    def decode_code(self, code: Code) -> Tensor:
        """Decodes a code of `codes`, as `decode` does; [n, d_out]."""
        if code.support is None:
            return self.decode(code.values)
        if self.ranks.latents > 1:
            code = select_latents(code, self.ranks.own(self.d_sae))
            assert code.support is not None
        product = self.ranks.over_latents(decode_at(code.values, self.W_dec, code.support))
        return (product + self.b_dec) * self.out_scale

    @torch.no_grad()
    def pooled(self, rows: Tensor, cuts: Tensor, starts: Tensor | None = None) -> Tensor:
        """Sums the code over segments of rows.

        Args:
            rows: raw activations [n, d_in].
            cuts: int64 [m + 1], rising; segment i has the consecutive rows cuts[i] to cuts[i + 1].
            starts: as for `forward`; None if contexts begin at the cuts.

        Returns: float32 [m, d_sae].
        """
        return pool_codes(lambda starts: self.codes(rows, starts), rows, cuts, starts, self.d_sae)

    @torch.no_grad()
    def decode(self, f: Tensor) -> Tensor:
        """Decodes a code [n, d_sae] -> reconstruction in raw activation space [n, d_out], without
        what `complete` adds."""
        product = self.ranks.over_latents(f[:, self.ranks.own(self.d_sae)] @ self.W_dec)
        return (product + self.b_dec) * self.out_scale

    @torch.no_grad()
    def complete(self, x_hat: Tensor, x: Tensor) -> Tensor:
        """Adds to a result of `decode` what comes from the input past the code; [n, d_out].

        Args:
            x_hat: raw activation space, [n, d_out].
            x: the rows that were encoded, raw activation space, [n, d_in].
        """
        x_hat = restore_rows(x_hat, x, self.row_norm)
        if self.W_skip is None:
            return x_hat
        return x_hat + linear(x / self.scale - self._centre(), self.W_skip) * self.out_scale

    def _check_eval(self) -> None:
        if self.training:
            raise RuntimeError("call eval() before encode(): inference uses stored statistics")

    @torch.no_grad()
    def fold(self) -> dict[str, Tensor]:
        """Returns the weights of a standard SAE on raw activations (on normalised rows, where
        `row_norm` is set) that computes the same function.

        Returns: W_enc [d_sae, d_in], b_enc, W_dec [d_sae, d_in], b_dec with
            f = activation((x - b_dec) W_enc^T + b_enc),  x_hat = f W_dec + b_dec,
            or with a target y, W_dec [d_sae, d_out] and W_skip [d_out, d_in] where there is one,
            f = activation(x W_enc^T + b_enc),  y_hat = f W_dec + b_dec + x W_skip^T.

        Raises: SettingError when the scaling depends on the batch.
        """
        w_enc, b_enc = self.W_enc, self.b_enc
        if self.scaling is not None:
            if not self.scaling.foldable:
                raise SettingError("scaling", "batch statistics", "cannot be folded into weights")
            gain, shift = self.scaling.fold()
            b_enc = b_enc + w_enc @ shift
            w_enc = _fold_gain(w_enc, gain)
        b_dec, skip = self.b_dec * self.out_scale, {}
        if self.has_target:  # nothing is subtracted from its input, and its b_dec is of y
            centre = self._centre() + torch.zeros_like(self.centre)
            b_enc = b_enc - w_enc @ centre
            if self.W_skip is not None:
                outward = self.W_skip * self.out_scale.reshape(-1, 1)
                skip, b_dec = {"W_skip": outward / self.scale}, b_dec - outward @ centre
        elif not self.config.centre:
            b_enc = b_enc + w_enc @ self.b_dec
        return {
            "W_enc": w_enc / self.scale,
            "b_enc": b_enc.clone(),
            "W_dec": self.W_dec * self.out_scale,
            "b_dec": b_dec,
            **skip,
        }

    @torch.no_grad()
    def effective_encoder(self) -> Tensor:
        """Returns W_enc with the scaling's gain folded in, in normalised space; [d_sae, d_in]."""
        if self.scaling is None:
            return self.W_enc
        return _fold_gain(self.W_enc, self.scaling.fold()[0])

    # ---- resets ------------------------------------------------------------------------------

    @torch.no_grad()
    def raise_thresholds(self, by: float) -> bool:
        """Raises the thresholds of all latents alike, so that fewer are active at inference.

        Args:
            by: amount in the activation's own unit; below 0 lowers them.

        Returns: False where no threshold decides how many are active.
        """
        bias = self.b_enc if self.config.encoder_bias else None
        return self.activation.raise_thresholds(by, bias)

    @torch.no_grad()
    def reset_latents(self, reset: Reset) -> None:
        """Gives latents new directions; the rows of the folded encoder get the requested norm.

        All parts forget their statistics of these latents.
        """
        encoder = reset.directions * reset.encoder_norm
        if self.scaling is not None:
            encoder = _unfold_gain(encoder, self.scaling.fold()[0])
        if not self.config.tied:
            self.W_enc[reset.latents] = encoder
        outward = reset.decoder_directions
        self.W_dec[reset.latents] = reset.directions if outward is None else outward
        self.b_enc[reset.latents] = 0
        for part in self.parts():
            part.forget(reset.latents)

    def scalars(self) -> dict[str, float]:
        """Returns all named values of the parts, for the log."""
        return {name: value for part in self.parts() for name, value in part.scalars().items()}


def learned_scalars(subject: object) -> list[str]:
    """Names in the log of the scalars that training finds; [] for anything but an SAE of parts."""
    logged = subject.config.logged if isinstance(subject, SAE) else {}
    return [name for name, scalar in logged.items() if scalar.role == "learned"]


def _unit_scale(blocks: tuple[int, ...]) -> Tensor:
    """Returns the scale 1 of a hook point, or of each channel of several."""
    shape = (sum(blocks),) if len(blocks) > 1 else ()
    return torch.ones(shape, dtype=torch.float32)


def _check_target(config: SAEConfig, has_target: bool) -> None:
    """Raises: SettingError for settings that do not go with a target, or need one."""
    if has_target and config.tied:
        remedy = "makes the decoder the encoder's transpose, but they belong to different "
        raise SettingError("tied", True, f"{remedy}activations with a target_hook: set it to false")
    if not has_target:
        for name, value in (("skip", config.skip), ("decoder_start", config.decoder_start)):
            if value != SAEConfig.model_fields[name].default:
                remedy = "needs a target: set target_hook, or leave it out"
                raise SettingError(name, value, remedy)


def _check_start(config: SAEConfig) -> None:
    """Raises: SettingError for a start at an L0 that the activation has no bias for."""
    if config.initial_l0 is not None and not config.activation.takes_initial_l0:
        remedy = f"sets b_enc, which does not decide the L0 of {config.activation.kind}: "
        raise SettingError("initial_l0", config.initial_l0, f"{remedy}leave it out")


def _check_without_preactivations(sae: SAE) -> None:
    """Raises: SettingError for what reads pre-activations, which an activation that `uses_weights`
    does not have."""
    kind, l0 = sae.config.activation.kind, sae.config.initial_l0
    if l0 is not None and sae.activation.initial_floor() is None:
        remedy = f"sets b_enc by the pre-activations, but {kind} has none: leave it out"
        raise SettingError("initial_l0", l0, remedy)
    for part in sae.parts():
        if part.uses_preactivations:
            remedy = f"reads pre-activations, but the activation {kind} has none: leave it out"
            raise SettingError("part", type(part).__name__, remedy)


def _check_shardable(part: Part, ranks: Ranks) -> None:
    if part.shardable == "rows" and ranks.latents > 1:
        remedy = "needs all latents on every rank: set parallel.latents to 1, or leave it out"
        raise SettingError("part", type(part).__name__, remedy)
    if not ranks.alone and not part.shardable:
        remedy = "works on one rank only: leave it out, or start one process"
        raise SettingError("part", type(part).__name__, remedy)


def _normal_rows(rows: int, width: int, stream: torch.Generator) -> Iterator[tuple[int, Tensor]]:
    """Yields standard normal rows [m, width], each time with the index of the first of them.

    The rows are, bit by bit, those of one draw of [rows, width]: torch draws in blocks of 16
    numbers, and draws the last 16 again if they do not fill a block.
    """
    first = 0
    while first < rows:
        left = rows - first
        count = ROWS_DRAWN_AT_ONCE if left >= 2 * ROWS_DRAWN_AT_ONCE else left
        yield first, torch.randn(count, width, generator=stream, dtype=torch.float32, device="cpu")
        first += count


def _fold_gain(w: Tensor, gain: Tensor) -> Tensor:
    """Folds a gain (`Scaling.fold`) into rows that act on its output, so they act on its input."""
    return w * gain if gain.dim() == 1 else w @ gain


def _unfold_gain(w: Tensor, gain: Tensor) -> Tensor:
    """Inverts `_fold_gain`."""
    return w / gain if gain.dim() == 1 else torch.linalg.solve(gain, w, left=False)


def _decode_without_norms(values: Tensor, w_dec: Tensor, support: Support) -> tuple[Tensor, None]:
    return decode_at(values, w_dec, support), None


def _places(config: SAEConfig) -> Iterator[str]:
    """Yields the place of each part among the settings, in the order of `SAE.parts`."""
    yield "activation"
    if config.scaling:
        yield "scaling"
    for field in ("losses", "controllers", "constraints", "observers"):
        yield from (f"{field}.{i}" for i in range(len(getattr(config, field))))


def _build_part(place: str, config: Any, dims: Dims) -> Part:
    """Builds a part; an error names the part's place among the settings of the SAE."""
    with naming_setting(place, config.kind):
        return config.build(dims)


def _build_parts(field: str, configs: Any, dims: Dims) -> nn.ModuleDict:
    """Builds parts under the names of their kinds; a second part of a kind gets a number."""
    built = nn.ModuleDict()
    for i, config in enumerate(configs):
        name = config.kind
        while name in built:
            name = f"{config.kind}_{len(built)}"
        built[name] = _build_part(f"{field}.{i}", config, dims)
    return built
