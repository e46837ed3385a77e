"""The table of parts: one line per part, by seam. A new part is one file and one line here.

A part written outside the package (in experiment.py) is added with `register`.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import BeforeValidator, PydanticUserError, SerializeAsAny
from torch import nn

from saelab.config import setting_error_at_place
from saelab.errors import SettingError, nearest
from saelab.parts.activations.abs_topk import AbsTopKConfig
from saelab.parts.activations.batchtopk import BatchTopKConfig
from saelab.parts.activations.feature_choice import FeatureChoiceConfig
from saelab.parts.activations.gated import GatedConfig
from saelab.parts.activations.groupmax import GroupMaxConfig
from saelab.parts.activations.ista import ISTAConfig
from saelab.parts.activations.jumprelu import JumpReLUConfig
from saelab.parts.activations.matching_pursuit import MatchingPursuitConfig
from saelab.parts.activations.orthogonal_matching_pursuit import (
    OrthogonalMatchingPursuitConfig,
)
from saelab.parts.activations.relu import ReLUConfig
from saelab.parts.activations.tied_threshold import TiedThresholdConfig
from saelab.parts.activations.topk import TopKConfig
from saelab.parts.base import (
    Activation,
    Constraint,
    Controller,
    Dims,
    Form,
    LossTerm,
    Observer,
    Part,
    PartConfig,
    Scaling,
)
from saelab.parts.constraints.frozen import FrozenConfig
from saelab.parts.constraints.unit_norm import UnitNormConfig
from saelab.parts.controllers.annealed_k import AnnealedKConfig
from saelab.parts.controllers.l0_target import L0TargetConfig
from saelab.parts.controllers.ramp import RampConfig
from saelab.parts.controllers.rounded_k import RoundedKConfig
from saelab.parts.controllers.schedule import ScheduleConfig
from saelab.parts.losses.auxk import AuxKConfig
from saelab.parts.losses.gate_l1 import GateL1Config
from saelab.parts.losses.gate_reconstruction import GateReconstructionConfig
from saelab.parts.losses.l0 import L0Config
from saelab.parts.losses.l1 import L1Config
from saelab.parts.losses.lp import LpConfig
from saelab.parts.losses.matryoshka import MatryoshkaConfig
from saelab.parts.losses.multi_topk import MultiTopKConfig
from saelab.parts.losses.orthogonality import OrthogonalityConfig
from saelab.parts.losses.preactivation import PreactivationConfig
from saelab.parts.losses.quadratic_l0 import QuadraticL0Config
from saelab.parts.losses.reconstruction import ReconstructionConfig
from saelab.parts.losses.similarity import SimilarityConfig
from saelab.parts.losses.similarity.literal import SimilarityLiteralConfig
from saelab.parts.losses.spliced import CrossEntropyConfig, KLConfig
from saelab.parts.losses.tanh import TanhConfig
from saelab.parts.losses.temporal_contrast import TemporalContrastConfig
from saelab.parts.observers.lifetimes import LifetimesConfig
from saelab.parts.observers.resampling import ResamplingConfig
from saelab.parts.scalings.centring import CentringConfig
from saelab.parts.scalings.variance_scaling import ScalarPriorConfig, VarianceScalingConfig
from saelab.parts.scalings.whitening import WhiteningConfig

TABLE: dict[str, dict[str, type[PartConfig]]] = {}


def register(seam: str, config: type[PartConfig]) -> type[PartConfig]:
    """Adds a part under its `kind`; its example is built once, so that a mistake shows at once.

    Raises: SettingError when the seam is unknown, the kind is taken or impossible, build() is
        missing or fails, or what it builds is not a part of the seam.
    """
    if seam not in SEAMS:
        raise SettingError("seam", seam, f"known seams: {', '.join(SEAMS)}{nearest(seam, SEAMS)}")
    kind = config.model_fields["kind"].default
    if not isinstance(kind, str):
        raise SettingError(
            "kind", kind, f'{config.__name__} needs `kind: Literal["name"] = "name"`'
        )
    if "." in kind or hasattr(nn.ModuleDict(), kind):
        raise SettingError("kind", kind, "is a name that torch modules use: choose another name")
    taken = TABLE.setdefault(seam, {}).get(kind)
    if taken is not None and not _same_part(taken, config):
        raise SettingError(
            "kind", kind, f"is already taken by {taken.__name__}: choose another name"
        )
    if config.build is PartConfig.build:
        raise SettingError("kind", kind, f"{config.__name__} needs build(self, dims) -> Part")
    _build_once(seam, config)
    TABLE[seam][kind] = config
    return config


def _same_part(one: type[PartConfig], other: type[PartConfig]) -> bool:
    """Returns whether two classes are of one definition: a file may be run and imported."""
    names = {cls.__qualname__ for cls in (one, other)}
    files = {getattr(sys.modules.get(cls.__module__), "__file__", None) for cls in (one, other)}
    modules = {cls.__module__ for cls in (one, other)}
    return len(names) == 1 and (len(modules) == 1 or len(files) == 1)


def _build_once(seam: str, config: type[PartConfig]) -> None:
    """Builds the example of a part.

    Raises: SettingError for what only a mistake in the part can cause. Settings that the part
        itself refuses are not: a part may have no legal defaults.
    """
    kind, wanted = config.model_fields["kind"].default, SEAM_CLASSES[seam]
    try:
        part = config.example(WIDTH).part.build(Dims(WIDTH // 8, WIDTH))
    except (SettingError, PydanticUserError):  # of a class whose file is still being read
        return
    except (ArithmeticError, AttributeError, LookupError, NameError, TypeError) as error:
        remedy = f"{config.__name__} can't be built ({type(error).__name__}: {error}): "
        raise SettingError("kind", kind, f"{remedy}correct its build or __init__") from error
    if not isinstance(part, wanted):
        remedy = f"{config.__name__}.build returns a {type(part).__name__}, which is no "
        raise SettingError("kind", kind, f"{remedy}{wanted.__name__}: subclass that of the seam")
    for name, further in (("shardable", "rows"), ("uses_preactivations", None)):
        value = getattr(part, name)
        if not isinstance(value, bool) and value != further:
            words = "use True or False" + (f' or "{further}"' if further else "")
            raise SettingError(f"{kind}.{name}", value, words)
    tensors = {*dict(part.named_parameters()), *dict(part.named_buffers())}
    if unknown := {*part.per_latent, *part.survives_reset} - tensors:
        remedy = f"name parameters or buffers of {type(part).__name__}"
        raise SettingError(f"{kind}.per_latent", ", ".join(sorted(unknown)), remedy)


#: The base class of each seam.
SEAM_CLASSES: dict[str, type[Part]] = {
    "scaling": Scaling,
    "activation": Activation,
    "loss": LossTerm,
    "controller": Controller,
    "constraint": Constraint,
    "observer": Observer,
}
SEAMS = tuple(SEAM_CLASSES)
#: Latents with which a part's example is built when it is registered.
WIDTH = 64

#: What an SAE is made of where its settings don't say it.
DEFAULT_ACTIVATION: PartConfig = ReLUConfig()
DEFAULT_LOSSES: tuple[PartConfig, ...] = (ReconstructionConfig(), L1Config())
DEFAULT_CONTROLLERS: tuple[PartConfig, ...] = (L0TargetConfig(),)
#: The constraint of the control whose decoder stays random.
FROZEN_DECODER: PartConfig = FrozenConfig(weight="decoder")
#: A remedy for settings whose L0 no part decides.
HOW_TO_SET_L0 = (
    "add the controller 'l0_target' and a penalty with its coefficient, or an activation with a k"
)

#: What an SAE has, apart from its size, in which the example of a part is checked.
AROUND_AN_EXAMPLE: dict[str, Any] = {
    "losses": (ReconstructionConfig(),),
    "controllers": (RampConfig(name="sparsity", value=0.01, warmup=0.5),),
    "precision": "float32",
}

for _seam, _configs in {
    "scaling": (VarianceScalingConfig, CentringConfig, WhiteningConfig),
    "activation": (
        ReLUConfig,
        TopKConfig,
        BatchTopKConfig,
        JumpReLUConfig,
        AbsTopKConfig,
        TiedThresholdConfig,
        GatedConfig,
        GroupMaxConfig,
        FeatureChoiceConfig,
        MatchingPursuitConfig,
        OrthogonalMatchingPursuitConfig,
        ISTAConfig,
    ),
    "loss": (
        ReconstructionConfig,
        L1Config,
        L0Config,
        AuxKConfig,
        ScalarPriorConfig,
        SimilarityConfig,
        SimilarityLiteralConfig,
        LpConfig,
        GateL1Config,
        GateReconstructionConfig,
        MatryoshkaConfig,
        KLConfig,
        CrossEntropyConfig,
        TanhConfig,
        PreactivationConfig,
        QuadraticL0Config,
        MultiTopKConfig,
        OrthogonalityConfig,
        TemporalContrastConfig,
    ),
    "controller": (
        L0TargetConfig,
        RampConfig,
        ScheduleConfig,
        RoundedKConfig,
        AnnealedKConfig,
    ),
    "constraint": (UnitNormConfig, FrozenConfig),
    "observer": (ResamplingConfig, LifetimesConfig),
}.items():
    for _config in _configs:
        register(_seam, _config)


def parse_part(seam: str, data: Any) -> PartConfig:
    """Reads a part's configuration from plain data, by its `kind`.

    Raises: SettingError for an unknown kind (nearest name suggested) or an unknown field; it names
        the field of the part.
    """
    configs = TABLE[seam]
    if isinstance(data, PartConfig):
        if type(data) not in configs.values():
            raise SettingError("kind", data.kind, f"is no {seam}; known: {', '.join(configs)}")
        return data
    if isinstance(data, str):
        data = {"kind": data}
    if not isinstance(data, dict) or "kind" not in data:
        raise SettingError("", data, f"needs a 'kind', one of: {', '.join(configs)}")
    kind = data["kind"]
    if not isinstance(kind, str) or kind not in configs:
        remedy = f"no such {seam}{nearest(str(kind), configs)}; known: {', '.join(configs)}"
        raise SettingError("kind", kind, remedy)
    return configs[kind].parse(data)


def _validate_part(seam: str, data: Any) -> PartConfig:
    """`parse_part` for pydantic, which knows the place of the part among the settings."""
    try:
        return parse_part(seam, data)
    except SettingError as error:
        raise setting_error_at_place(error) from None


def activation_of(form: Form) -> PartConfig:
    """The first registered activation that computes a form, see `PartConfig.of_form`.

    Raises: SettingError when there is none.
    """
    for config in TABLE["activation"].values():
        if (made := config.of_form(form)) is not None:
            return made
    raise SettingError("activation", form, "no activation computes this form: register one")


def _field(seam: str) -> Any:
    return Annotated[SerializeAsAny[PartConfig], BeforeValidator(lambda d: _validate_part(seam, d))]


if TYPE_CHECKING:  # to a type checker every such field is a part's configuration
    ScalingField = ActivationField = LossField = PartConfig
    ControllerField = ConstraintField = ObserverField = PartConfig
else:
    ScalingField = _field("scaling")
    ActivationField = _field("activation")
    LossField = _field("loss")
    ControllerField = _field("controller")
    ConstraintField = _field("constraint")
    ObserverField = _field("observer")
