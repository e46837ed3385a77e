"""Settings of parts, and the questions that the rest of the program asks of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self, get_args

from pydantic import AfterValidator, NonNegativeFloat

from saelab.config import Frozen
from saelab.errors import SettingError

if TYPE_CHECKING:
    from saelab.parts.base import Part
    from saelab.parts.forms import Form
    from saelab.parts.forward_pass import Dims
    from saelab.sae import SAEConfig


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
        free_sign: whether seeds take either sign by chance; its absolute value is reported then.
    """

    meaning: str
    role: Role = "learned"
    reported: bool = True
    unit: str = ""
    free_sign: bool = False


def measurement(meaning: str, unit: str = "") -> Scalar:
    """A scalar about the run that stays in the log and its curves."""
    return Scalar(meaning, "measured", False, unit)


@dataclass(frozen=True)
class Example:
    """A small configuration of a part that is legal, and what must stand beside it.

    Args:
        part: the configuration.
        beside: settings of the SAE, by the names of its fields; the entries of a list are added to
            those that an SAE of the battery has anyway.
        resets: for an observer that resets latents within a run of 20 steps of a few dozen rows:
            the scalar of its log that counts these resets.
    """

    part: PartConfig
    beside: Mapping[str, Any] = field(default_factory=dict)
    resets: str | None = None


def few(d_sae: int) -> int:
    """Number of active latents per row for an example of that width: one in 16, at least 2."""
    return min(max(2, d_sae // 16), d_sae)


class PartConfig(Frozen):
    """Base of all part configurations; subclasses fix `kind` as a Literal with a default.

    `lr` is the learning rate of the part's own parameters; None means the run's rate.

    The rest of the program never asks for a kind. It asks the questions below; the answers here
    are those of a part that logs nothing, needs nothing and sets no L0.
    """

    kind: str
    lr: NonNegativeFloat | None = None

    def brief(self) -> str:
        """Returns the kind, and the settings that are not at their defaults: 'topk(k=16)'."""
        settings = ", ".join(f"{name}={value!r}" for name, value in self.__repr_args__())
        return f"{self.kind}({settings})" if settings else self.kind

    def build(self, dims: Dims) -> Part:
        """Builds the part.

        Raises: SettingError when the settings are impossible at these dimensions.
        """
        raise SettingError("kind", self.kind, "this part has no build()")

    @classmethod
    def example(cls, d_sae: int) -> Example:
        """Returns a small configuration with which every check of parts can run.

        Args:
            d_sae: number of latents of the SAE that it stands in; at least 16.

        Returns: the defaults with their companions; a part whose defaults are missing, or illegal
            at some width, says here what fits.
        """
        part = cls.parse({})
        return Example(part, part.companions)

    @classmethod
    def examples(cls, d_sae: int) -> tuple[Example, ...]:
        """Returns `example` and further configurations, with code paths of their own, to check."""
        return (cls.example(d_sae),)

    @property
    def settings_read(self) -> Mapping[str, str]:
        """Fields of the part that name a controller's setting, with that name: those that hold a
        text and may hold a number."""
        read = {}
        for name, value in self:
            kinds = set(get_args(type(self).model_fields[name].annotation))
            if isinstance(value, str) and str in kinds and kinds & {int, float}:
                read[name] = value
        return read

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

    @property
    def takes_initial_l0(self) -> bool:
        """True where an SAE with this activation may start at a named L0, by its bias."""
        return True

    # ---- what it does to an SAE ----------------------------------------------------------------

    @property
    def moves_decoder(self) -> bool:
        """True where the part itself changes decoder rows, and so would fight a frozen decoder."""
        return False

    @property
    def fixes_decoder_norms(self) -> bool:
        """True where the part holds the norm of every decoder row where it starts, which is 1."""
        return False

    @classmethod
    def of_form(cls, form: Form) -> PartConfig | None:
        """The settings of an activation that computes the form; None where this one doesn't."""
        return None


def _positive(k: int | str) -> int | str:
    """Returns k. Raises: ValueError for a number below 1."""
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
