"""Presets: one name for a published SAE. A preset is replaced by its parts and is stored nowhere.

    [sae]                                   {"sae.preset": "gated"}        in an arm
    preset = "gated"                        {"sae.preset": "topk", "sae.activation.k": 64}
    d_sae = 4096

A preset says all that makes an SAE the published one: FIELDS. Sizes and what holds the L0 stay the
user's: controllers and observers may be replaced next to it, coefficients, k and targets may be
changed; anything else that it fixes is refused there. In an arm it replaces the base's parts, keeps
the L0 that these are set to, and settings after it change what it has put there.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from saelab.config import Macro
from saelab.errors import SettingError, nearest
from saelab.parts import parse_part
from saelab.parts.base import PartConfig
from saelab.parts.published import PRESETS

if TYPE_CHECKING:
    from saelab.sae import SAEConfig

#: Fields of an SAE that hold parts, with the seam of each.
SEAM_OF = {
    "activation": "activation",
    "losses": "loss",
    "constraints": "constraint",
    "controllers": "controller",
    "observers": "observer",
    "scaling": "scaling",
}
#: Fields that a preset gives, with their values where it does not name them.
FIELDS: dict[str, Any] = {
    **dict.fromkeys(SEAM_OF, ()),
    "scaling": None,
    "encoder_bias": True,
    "centre": True,
    "tied": False,
}
#: Of these, what may be replaced next to a preset: how the L0 is held, and ideas added to it.
OPEN_FIELDS = frozenset({"controllers", "observers", "scaling"})
#: Settings of parts that are the user's under every preset.
OPEN_SETTINGS = frozenset({"coefficient", "dead_after", "k", "lr", "target"})


def check_name(name: Any) -> str:
    """Returns the name of a preset. Raises: SettingError for a name that is none."""
    if isinstance(name, str) and name in PRESETS:
        return name
    remedy = f"no such preset{nearest(str(name), PRESETS)}; known: {', '.join(PRESETS)}"
    raise SettingError("preset", name, remedy)


def fields_of(name: str) -> dict[str, Any]:
    """Returns FIELDS of a preset as plain data, each part with what differs from its defaults.

    Raises: SettingError for a name that is no preset.
    """
    preset = PRESETS[check_name(name)]
    losses = [_plain(loss) for loss in preset.losses]
    if all(loss["kind"] != "reconstruction" for loss in losses):
        losses = [{"kind": "reconstruction"}, *losses]
    return FIELDS | {
        "activation": _plain(preset.activation),
        "losses": losses,
        "controllers": [_plain(part) for part in preset.controllers],
        "constraints": [_plain(part) for part in preset.constraints],
        "observers": [_plain(part) for part in preset.observers],
        **preset.weights,
    }


def _plain(part: str | Mapping[str, Any]) -> dict[str, Any]:
    return {"kind": part} if isinstance(part, str) else dict(part)


def expand(data: Mapping[str, Any]) -> dict[str, Any]:
    """Replaces the preset in settings of an SAE, given as plain data, by its parts.

    Args:
        data: fields of the SAE, `preset` among them. A part, or an entry of a list, changes the
            preset's part of its kind; without a kind, the only part there.

    Raises: SettingError for a field that the preset fixes to something else.
    """
    name = check_name(data["preset"])
    fixed = fields_of(name)
    given = {field: value for field, value in data.items() if field != "preset"}
    for field, value in given.items():
        if field in fixed and not is_open(name, [field]):
            given[field] = _over(name, field, fixed[field], value)
    return fixed | given


def _over(name: str, field: str, fixed: Any, value: Any) -> Any:
    """Returns a field with the user's changes of the preset's parts."""
    if field not in SEAM_OF:
        if value != fixed:
            raise SettingError(field, value, _remedy(name))
        return value
    if not isinstance(fixed, list):
        return _part_over(name, (field,), fixed, value)
    entries = list(fixed)
    if not isinstance(value, (list, tuple)):
        return value  # which is refused, with its place
    if fixed and not value:
        raise SettingError(field, value, _remedy(name))
    for i, given in enumerate(value):
        place = (field, str(i))
        kind = _as_dict(given).get("kind")
        match = [j for j, entry in enumerate(entries) if kind in (entry["kind"], None)]
        if len(match) != 1:
            raise SettingError(".".join(place), kind or given, _remedy(name))
        entries[match[0]] = _part_over(name, place, entries[match[0]], given)
    return entries


def _part_over(name: str, place: Sequence[str], fixed: dict[str, Any], value: Any) -> Any:
    """Returns a part of a preset with the user's settings of it."""
    given = _as_dict(value)
    whole = parse_part(SEAM_OF[place[0]], fixed).model_dump()
    for setting, changed in given.items():
        changed = tuple(changed) if isinstance(changed, list) else changed
        differs = setting in whole and changed != whole[setting]
        if differs and not is_open(name, [*place, setting]):
            raise SettingError(".".join([*place, setting]), changed, _remedy(name))
    return fixed | given


def _as_dict(value: Any) -> dict[str, Any]:
    if isinstance(value, PartConfig):
        return value.model_dump()
    return _plain(value) if isinstance(value, (str, Mapping)) else {"kind": value}


def is_open(name: str, path: Sequence[str]) -> bool:
    """True where a setting of an SAE may be changed next to a preset.

    Args:
        path: names from the field of the SAE on.
    """
    preset, field = PRESETS[name], path[0]
    if field not in FIELDS:
        return True
    if field in OPEN_FIELDS:
        return field != "observers" or not preset.observers
    return len(path) > 1 and path[-1] in OPEN_SETTINGS | preset.open


def _remedy(name: str) -> str:
    return (
        f"is fixed by the preset {name!r}: leave it out, or replace the preset by its parts, which "
        f"`saelab parts {name}` prints"
    )


def name_of(sae: SAEConfig) -> str | None:
    """Returns the preset that the settings of an SAE are, up to what is open next to it."""
    return next((name for name in PRESETS if matches(sae, name)), None)


def matches(sae: SAEConfig, name: str) -> bool:
    """True where the settings of an SAE are a preset, up to what is open next to it."""
    ours = fields_of(name)
    fields = [field for field in FIELDS if field == "scaling" or not is_open(name, [field])]
    return all(
        _identity(name, field, getattr(sae, field)) == _identity(name, field, ours[field])
        for field in fields
    )


def _identity(name: str, field: str, value: Any) -> Any:
    """Returns what a preset fixes in a field, whatever the order of a list."""
    if field not in SEAM_OF or value is None:
        return value
    free = OPEN_SETTINGS | PRESETS[name].open
    parts = [
        parse_part(SEAM_OF[field], part)
        for part in (value if isinstance(value, (list, tuple)) else [value])
    ]
    dumps = [
        {key: item for key, item in part.model_dump().items() if key not in free} for part in parts
    ]
    return sorted(dumps, key=str)


def apply(sae: SAEConfig, name: Any) -> SAEConfig:
    """Returns the settings with the parts of a preset, at the L0 that they are set to now.

    Raises: SettingError for a name that is no preset.
    """
    kept = {field: value for field, value in sae if field not in FIELDS}
    new = type(sae).parse(kept | fields_of(check_name(name)))
    level = sae.settled_l0
    return new.at_l0(level) if level is not None and new.decides_l0 else new


def refusal(name: Any, path: Sequence[str], after: bool, appends: bool) -> str | None:
    """Returns why a setting can't be changed together with a preset; None where it can."""
    if path[0] not in FIELDS:
        return None
    if not after:
        return f"is replaced by the preset {name!r}: write it after the preset"
    lists = appends and len(path) == 1
    if lists or name not in PRESETS or is_open(name, path) or _is_unknown(name, path):
        return None
    return _remedy(name)


def _is_unknown(name: str, path: Sequence[str]) -> bool:
    """True where the parts of a preset have no such setting, which is then refused as such."""
    if len(path) == 1 or path[0] not in SEAM_OF or path[-1].isdigit():
        return False
    entries = fields_of(name)[path[0]]
    parts = [
        parse_part(SEAM_OF[path[0]], entry)
        for entry in (entries if isinstance(entries, list) else [entries])
    ]
    return all(path[-1] not in type(part).model_fields for part in parts)


PRESET = Macro(apply, refusal)
