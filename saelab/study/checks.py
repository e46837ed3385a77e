"""Checks of an arm's settings that fit only on their own, before anything is trained."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING

from saelab.data.activations.stream import Layout
from saelab.errors import SettingError, naming_setting, nearest
from saelab.sae import SAEConfig
from saelab.study.hooks import check_hooks

if TYPE_CHECKING:
    from saelab.study.plan import BaseConfig


def naming_arm(name: str) -> AbstractContextManager[None]:
    """Adds the arm's name to the setting that a SettingError is about."""
    return naming_setting(f"{name}: ")


def check_settings(settings: BaseConfig) -> None:
    """Raises: SettingError for settings that fit only on their own."""
    check_hooks(settings, settings.activations)
    known = [str(getattr(controller, "name", "")) for controller in settings.sae.controllers]
    for place, parts in settings.sae.parts().items():
        several = isinstance(getattr(settings.sae, place), tuple)
        for i, part in enumerate(parts):
            for field, name in part.settings_read.items():
                if name not in known:
                    remedy = f"no such controller{nearest(name, known)}: add one, or use a number"
                    where = f"sae.{place}.{i}" if several else f"sae.{place}"
                    raise SettingError(f"{where}.{field}", name, remedy)
    low, high = settings.train.positions or (0, 1)
    foreign = settings.activations is not None
    context = high if foreign else settings.context
    least = 1 if foreign else 2  # position 0 is BOS, which is not trained on
    if settings.train.positions and not (low < min(high, context) and high >= least):
        remedy = f"use 0 <= low < high, from {least} to the context of {context}"
        raise SettingError("train.positions", settings.train.positions, remedy)


def check_layout(
    arm: str, config: SAEConfig, layout: Layout, place: str = "", has_target: bool = False
) -> None:
    """Shows impossible settings now, not in a worker.

    Args:
        has_target: whether other activations than the input are reconstructed.

    Raises: SettingError for a part that can't be built or that needs whole contexts.
    """
    with naming_arm(arm), naming_setting(place) if place else nullcontext():
        parts = config.outline(d_out=2 if has_target else None).parts()
    for part in parts:
        if part.needs_contexts and layout == "rows":
            name = type(part).__name__
            remedy = f"{name} needs whole contexts: set layout = 'contexts' for the launch"
            raise SettingError(f"{arm}: layout", layout, remedy)


def check_latents(arm: str, sae: SAEConfig) -> None:
    """Raises: SettingError for an L0 above the number of latents."""
    for name, l0 in (("target L0", sae.target_l0), ("sae.initial_l0", sae.initial_l0)):
        if l0 is not None and l0 > sae.d_sae:
            raise SettingError(f"{arm}: {name}", l0, f"must be at most d_sae = {sae.d_sae}")


def off_target(l0: float, target: float, tolerance: float) -> str:
    """Describes an L0 outside the tolerance (a relative distance from the target); '' inside."""
    off = abs(l0 / target - 1)
    if off <= tolerance + 1e-9:
        return ""
    return f"{l0:.4g}, {off:.1%} from the target {target:g} (tolerance {tolerance:.0%})"
