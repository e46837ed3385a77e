"""Validates data read from files; reports the first mismatch in one sentence.

The data itself is used afterwards, so nothing is converted.
"""

from __future__ import annotations

import functools
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from saelab.errors import DamageError, SaelabError
from saelab.runtime.safe_text import is_plain
from saelab.runtime.system import name_problem

#: Longest name that becomes a folder or a file, in bytes; file systems take 255.
LONGEST_NAME = 200

Number = Annotated[float, Field(allow_inf_nan=False, ge=-1e300, le=1e300)]
#: Integers that fit the columns of a table.
Int64 = Annotated[int, Field(ge=-(2**63), lt=2**63)]


def is_name(text: str) -> bool:
    """Returns whether a text can name one entry of a folder, and nothing outside it."""
    inside = text not in ("", ".", "..") and "/" not in text and "\\" not in text
    return inside and is_plain(text) and len(text.encode(errors="replace")) <= LONGEST_NAME


def folder_name_problem(text: str) -> str:
    """Says why a text can't name a folder on this system, as the remedy of an error; '' if it can.

    A name that starts with a dot is left to files that are being written.
    """
    if not is_name(text) or text.startswith("."):
        return "names a folder: may not be empty, hold '/' or control signs or start with '.'"
    problem = name_problem(text)
    return f"{problem}: use another name" if problem else ""


def _check_name(text: str) -> str:
    if not is_name(text):
        raise ValueError("should name something inside the folder")
    return text


#: Name of one entry of a folder.
Name = Annotated[str, AfterValidator(_check_name)]


class Loose(BaseModel):
    """Base of a file's required fields; types are not converted, further names are allowed."""

    model_config = ConfigDict(strict=True, extra="allow")


@functools.cache
def _adapter(kind: Any) -> TypeAdapter[Any]:
    return TypeAdapter(kind)


def validate(
    data: Any,
    kind: Any,
    where: object,
    remedy: str = "delete it and run again",
    error: type[SaelabError] = DamageError,
) -> Any:
    """Returns the data unchanged after it was validated.

    Args:
        data: as parsed from the file.
        kind: the type that it must have: a `Loose`, or any other type that pydantic supports.
        where: the file, for the error message.
        remedy: last part of the error message.
        error: class of the error.

    Raises: `error` naming the first mismatch.
    """
    try:
        _adapter(kind).validate_python(data, strict=True)
    except ValidationError as failure:
        first = failure.errors()[0]
        place = ".".join(str(part) for part in first["loc"])
        reason = first["msg"][0].lower() + first["msg"][1:]
        mismatch = f"{place}: {reason}" if place else reason
        raise error(f"{where} is damaged ({mismatch}): {remedy}") from None
    return data
