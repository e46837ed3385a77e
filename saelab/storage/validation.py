"""Types of data that was read from a file: told in one sentence where they are not as they must be.

The data itself is what is used then, so that nothing is converted on the way.
"""

from __future__ import annotations

import functools
from pathlib import PurePosixPath
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from saelab.errors import DamageError, SaelabError
from saelab.runtime.safe_text import is_plain

#: Bytes of a name that becomes a folder or a file; file systems take 255.
LONGEST_NAME = 200

Number = Annotated[float, Field(allow_inf_nan=False, ge=-1e300, le=1e300)]
#: Integers that fit a file's columns.
Whole = Annotated[int, Field(ge=-(2**63), lt=2**63)]


def is_name(text: str) -> bool:
    """Whether a text can name one entry of a folder, and nothing outside it."""
    one = text not in ("", ".", "..") and "/" not in text and "\\" not in text
    return one and is_plain(text) and len(text.encode(errors="replace")) <= LONGEST_NAME


def _named(text: str) -> str:
    if not is_name(text):
        raise ValueError("should name something inside the folder")
    return text


def _inside(text: str) -> str:
    path = PurePosixPath(text)
    if path.is_absolute() or not path.parts or not all(map(is_name, path.parts)):
        raise ValueError("should name something inside the folder")
    return text


#: One entry of a folder; and a path of such.
Name = Annotated[str, AfterValidator(_named)]
Inside = Annotated[str, AfterValidator(_inside)]


class Loose(BaseModel):
    """Base of what a file must hold at least: types are not converted, more names are allowed."""

    model_config = ConfigDict(strict=True, extra="allow")


@functools.cache
def _adapter(kind: Any) -> TypeAdapter[Any]:
    return TypeAdapter(kind)


def check(
    data: Any,
    kind: Any,
    where: object,
    remedy: str = "delete it and run again",
    error: type[SaelabError] = DamageError,
) -> Any:
    """The data, which is of a kind: a `Loose`, or any other type that pydantic knows.

    Raises: `error` that names the first place where it is not.
    """
    try:
        _adapter(kind).validate_python(data, strict=True)
    except ValidationError as found:
        first = found.errors()[0]
        place = ".".join(str(part) for part in first["loc"])
        reason = first["msg"][0].lower() + first["msg"][1:]
        told = f"{place}: {reason}" if place else reason
        raise error(f"{where} is damaged ({told}): {remedy}") from None
    return data
