"""Environment variables with few possible values."""

from __future__ import annotations

import os

from saelab.errors import SettingError, nearest


def is_set_to(name: str, value: str) -> bool:
    """Returns True if the variable has its one value, False if it is not set or empty.

    Raises: SettingError for any other value.
    """
    text = os.environ.get(name, "")
    if text not in ("", value):
        raise SettingError(name, text, f"use {value!r} or leave it out{nearest(text, [value])}")
    return bool(text)
