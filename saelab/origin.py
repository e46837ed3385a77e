"""Origin of an SAE: the model and the hook point of its activations."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any

from saelab.errors import MismatchError


@dataclass(frozen=True)
class Origin:
    """Model and hook point that an SAE was trained on, as far as is known; '' if it is not.

    Args:
        model: name or folder.
        hook_name: hook point of its activations.
        peculiarities: differences from all activations that can be harvested here, each as the end
            of a sentence about the SAE.
    """

    model: str = ""
    hook_name: str = ""
    peculiarities: tuple[str, ...] = ()

    def differences(self, model: str, hook_name: str) -> list[str]:
        """Lists the differences to the data that the SAE is evaluated on; '' is not compared.

        Models are compared by the last part of their names, in lower case.
        """
        differences = []
        if self.hook_name and hook_name and self.hook_name != hook_name:
            differences.append(f"was trained at {self.hook_name}, but hook_name = {hook_name}")
        if self.model and model and _last_part(self.model) != _last_part(model):
            differences.append(f"was trained on the model {self.model}, but model.path = {model}")
        return [*differences, *(self.peculiarities if model else ())]

    def check(self, model: str, hook_name: str, way_past: str = "use --allow-mismatch") -> None:
        """Checks that the SAE was trained on the data that it is evaluated on.

        Args:
            way_past: what a user sets to use the SAE nevertheless.

        Raises: MismatchError, which names both sides of every difference.
        """
        differences = self.differences(model, hook_name)
        if differences:
            remedy = f"use it where it was trained, or {way_past}"
            raise MismatchError(f"the SAE {', and '.join(differences)}: {remedy}")

    def __str__(self) -> str:
        """Returns 'at HOOK of MODEL', as far as it is known."""
        at, of = f"at {self.hook_name}", f"of {self.model}"
        return " ".join(part for part, name in ((at, self.hook_name), (of, self.model)) if name)

    @property
    def about(self) -> dict[str, Any]:
        """The parts that are known, as metadata of a saved SAE."""
        odd = {"peculiarities": list(self.peculiarities)} if self.peculiarities else {}
        named = {"model": self.model, "hook_name": self.hook_name}
        return {name: value for name, value in named.items() if value} | odd


def origin_of(subject: object) -> Origin:
    """Returns the origin of an SAE, or of any object that is used as one: unknown unless it has
    an `origin` of this kind."""
    origin = getattr(subject, "origin", None)
    return origin if isinstance(origin, Origin) else Origin()


def _last_part(name: str) -> str:
    return PurePosixPath(name.rstrip("/")).name.lower()
