"""Settings that say where activations are read, and which are reconstructed.

one hook_name, no target_hook         a sparse autoencoder
one hook_name, one target_hook        a transcoder (Dunefsky et al. 2024)
several hook names, no target_hook    a crosscoder (Lindsey et al. 2024)
one hook_name, several target hooks   a code of one layer that writes to several
"""

from __future__ import annotations

from typing import Annotated, Any, ClassVar

from pydantic import BeforeValidator

from saelab.config import Frozen, setting_error_at_place
from saelab.data.hook_names import describe_hooks
from saelab.errors import SettingError


def _one_or_several(value: Any) -> Any:
    """Returns a list with one name as that name, so that both have the same digest."""
    if not isinstance(value, (list, tuple)):
        return value
    names = [str(name) for name in value]
    if not names:
        error = SettingError("", value, "name at least one hook point")
        raise setting_error_at_place(error)
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise setting_error_at_place(SettingError("", value, f"holds {twice} twice: name it once"))
    return value[0] if len(value) == 1 else tuple(value)


Hooks = Annotated[str | tuple[str, ...], BeforeValidator(_one_or_several)]


class HookSettings(Frozen):
    """Hook points of an SAE.

    Args:
        hook_name: where activations are read, for example 'blocks.2.hook_resid_post'; several make
            one input side by side.
        target_hook: whose activations are reconstructed; None for the input itself.
    """

    added_later: ClassVar[frozenset[str]] = frozenset({"target_hook"})

    hook_name: Hooks = "blocks.2.hook_resid_post"
    target_hook: Hooks | None = None

    @property
    def input_hooks(self) -> tuple[str, ...]:
        """Hook points that are read."""
        return _names(self.hook_name)

    @property
    def target_hooks(self) -> tuple[str, ...]:
        """Hook points whose activations are reconstructed; () where that is the input."""
        return () if self.target_hook is None else _names(self.target_hook)

    @property
    def output_hooks(self) -> tuple[str, ...]:
        """Hook points whose activations are reconstructed, in the order of their channels."""
        return self.target_hooks or self.input_hooks

    @property
    def hooks(self) -> tuple[str, ...]:
        """All hook points, each once."""
        return tuple(dict.fromkeys((*self.input_hooks, *self.target_hooks)))

    @property
    def hook_text(self) -> str:
        """Hook points as provenance names them."""
        return describe_hooks(self.input_hooks, self.target_hooks)


def _names(value: str | tuple[str, ...]) -> tuple[str, ...]:
    return (value,) if isinstance(value, str) else value


def check_hooks(settings: HookSettings, foreign: str | None) -> None:
    """Checks that the hook points go together.

    Args:
        foreign: folder of activations that were made elsewhere; None without one.

    Raises: SettingError for a target that is the input, and for several hook points of activations
        that were made elsewhere.
    """
    if settings.target_hooks == settings.input_hooks:
        remedy = "is hook_name itself: leave target_hook out, an SAE reconstructs its input"
        raise SettingError("target_hook", settings.target_hook, remedy)
    if foreign is not None and len(settings.hooks) > 1:
        name = "hook_name" if settings.target_hook is None else "target_hook"
        remedy = "activations made elsewhere have one hook point: leave it out"
        raise SettingError(name, getattr(settings, name), remedy)
