"""Every error that saelab raises on purpose.

SaelabError                  something went wrong that the user can act on
├── UsageError               bad input: exit code 2, one sentence with setting, value and remedy
│   ├── SettingError         a setting has an impossible value or an unknown name
│   ├── SourceError          a model, text or activation source is missing or unusable
│   │   └── UnreachableError the hub can't be reached
│   └── MismatchError        two things that must agree (hook, context, dtype, definition) do not
├── DamageError              a file that saelab wrote does not match its checksum
├── CellFailure              one cell stopped (non-finite loss ...); the others continue
└── StudyFailure             the launch as a whole has no usable result: exit code 1
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from saelab.runtime.safe_text import visible

#: Characters of a setting's name or value that an error message shows.
LONGEST_SHOWN = 300


class SaelabError(Exception):
    """Base of the tree; `exit_code` is the exit code of the command line."""

    exit_code = 1

    def __str__(self) -> str:  # one line, whatever names and reasons the message contains
        return visible(super().__str__())

    def __reduce__(self) -> tuple[object, ...]:  # a worker process sends all attributes
        return Exception.__new__, (type(self), *self.args), self.__dict__


class UsageError(SaelabError):
    """Bad input, reported in one sentence that names the remedy."""

    exit_code = 2


class SettingError(UsageError):
    """A setting has an impossible value or an unknown name."""

    def __init__(self, setting: str, value: object, remedy: str) -> None:
        super().__init__(f"{shorten(setting)} = {_repr(value)}: {remedy}")
        self.setting, self.value, self.remedy = setting, value, remedy


@contextmanager
def naming_setting(place: str, kind: str = "") -> Iterator[None]:
    """Puts the place of a setting before the name that a SettingError has for it.

    Args:
        place: such as 'sae.losses.1'; it ends in ': ' where the rest is a name of its own.
        kind: of the part there, whose errors may begin with it.
    """
    try:
        yield
    except SettingError as error:
        first, dot, rest = error.setting.partition(".")
        field = place.split(".")[0]
        if kind and first == kind and dot:
            name = f"{place}.{rest}"
        elif first == field or place.endswith(": "):
            name = f"{place}{error.setting}" if place.endswith(": ") else error.setting
        else:
            name = f"{place}.{error.setting}"
        raise SettingError(name, error.value, error.remedy) from None


class SourceError(UsageError):
    """A model, text or activation source is missing or unusable."""


class UnreachableError(SourceError):
    """The hub can't be reached, so nothing on it is available."""


class ShortTextError(SourceError):
    """A text has fewer tokens than are wanted."""


class MismatchError(UsageError):
    """Two things that must agree do not."""


class DamageError(SaelabError):
    """A file does not match the checksum that was written with it."""


class CellFailure(SaelabError):
    """One cell cannot continue; `step` is the optimiser step at which it stopped."""

    def __init__(self, cell: str, step: int, reason: str) -> None:
        super().__init__(f"cell {cell} stopped at step {step}: {reason}")
        self.cell, self.step, self.reason = cell, step, reason


class StudyFailure(SaelabError):
    """The launch has no usable result (for example no valid baseline cell)."""


def shorten(text: str, most: int = LONGEST_SHOWN) -> str:
    """Returns the text, with its middle left out where it is longer than `most` characters."""
    half = most // 2
    return text if len(text) <= most else f"{text[:half]}...{text[-half:]}"


def _repr(value: object) -> str:
    """Returns a value as an error message shows it."""
    try:
        return shorten(repr(value))
    except (ValueError, RecursionError):  # more digits, or deeper, than Python writes
        return f"<{type(value).__name__} that is too long to show>"


def nearest(name: str, names: Iterable[str]) -> str:
    """Returns " (did you mean 'x'?)" for the closest of the names, or "" when none is close."""
    close = difflib.get_close_matches(name, list(names), n=1)
    return f" (did you mean {close[0]!r}?)" if close else ""
