"""Folders and objects at a URL (s3://, gs:// and any other that fsspec supports), used like paths.

    Remote("s3://bucket/prefix") / "activations" / "header.json"

An object is written by one put and read by one get, so a reader sees it whole or not at all. A
request that fails is repeated with growing pauses, a bounded number of times; a missing object and
a refused access are answers, not failures. Credentials, regions and endpoints come from the
environment variables of the packages behind fsspec (AWS_ACCESS_KEY_ID, AWS_ENDPOINT_URL,
GOOGLE_APPLICATION_CREDENTIALS ...).
"""

from __future__ import annotations

import functools
import os
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlsplit
from urllib.request import url2pathname

from saelab.errors import SourceError

T = TypeVar("T")

#: Largest number of tries of a request, and seconds before the second; each further pause is twice
#: as long, up to the longest. Our choice: 24 s in all, which survives a short outage.
TRIES, PAUSE, LONGEST_PAUSE = 8, 0.25, 8.0
#: Errors that no repetition fixes.
NOT_RETRIED = (
    FileNotFoundError,
    PermissionError,
    IsADirectoryError,
    NotADirectoryError,
    ImportError,
)
#: Package behind a protocol, and the extra of this one that installs it.
EXTRAS = {"s3": "s3", "s3a": "s3", "gs": "gcs", "gcs": "gcs"}


class RemoteError(SourceError):
    """A store can't be used, or did not answer after all tries: exit code 2."""


@dataclass(frozen=True)
class Remote:
    """A place at a URL, without state, so that it can be sent to another process.

    Raises: RemoteError, by every method that sends a request, when the store does not answer;
        FileNotFoundError where a path would raise it.
    """

    url: str

    def __str__(self) -> str:
        return self.url

    def __truediv__(self, name: str) -> Remote:
        return Remote(f"{self.url.rstrip('/')}/{name}")

    @property
    def name(self) -> str:
        """Last part of the URL."""
        return self.url.rstrip("/").rpartition("/")[2]

    def check(self) -> None:
        """Sends no request. Raises: RemoteError when no store could be at this URL."""
        self._open()

    def is_file(self) -> bool:
        """Returns whether there is an object at this URL."""
        try:
            return self._ask("looked up", lambda fs, path: fs.info(path))["type"] == "file"
        except FileNotFoundError:
            return False

    def read_bytes(self) -> bytes:
        """Reads the whole object."""
        return self._ask("read", lambda fs, path: fs.cat_file(path))

    def read_text(self, encoding: str = "utf-8") -> str:
        """Reads the whole object as text."""
        return self.read_bytes().decode(encoding)

    def put(self, file: Path) -> None:
        """Writes the bytes of a local file as one object."""
        self._ask("written", lambda fs, path: fs.put_file(str(file), path))

    def unlink(self, missing_ok: bool = False) -> None:
        """Deletes the object."""
        try:
            self._ask("deleted", lambda fs, path: fs.rm_file(path))
        except FileNotFoundError:
            if not missing_ok:
                raise

    def sizes(self) -> dict[str, int]:
        """Returns name -> bytes of each object directly in this folder, from one listing."""
        with suppress(FileNotFoundError):
            entries = self._ask("listed", lambda fs, path: fs.ls(path, detail=True))
            files = [entry for entry in entries if entry["type"] == "file"]
            return {entry["name"].rpartition("/")[2]: int(entry["size"]) for entry in files}
        return {}

    def has(self, pattern: str) -> bool:
        """Returns whether an object below this folder matches a pattern like '*/header.json'."""
        return bool(self._ask("listed", lambda fs, path: fs.glob(f"{path}/{pattern}")))

    def _ask(self, verb: str, request: Callable[[Any, str], T]) -> T:
        """Sends a request, which is repeated when it fails, and returns its answer.

        Args:
            verb: participle of what the request does, for error messages.
            request: the store and the path in it -> answer.
        """
        fs, path = self._open()
        for tries in range(1, TRIES + 1):
            try:
                return request(fs, path)
            except PermissionError as error:
                raise RemoteError(
                    f"{self} can't be {verb}, access is refused ({_reason(error)}): give the "
                    "credentials in the environment the right to it"
                ) from error
            except NOT_RETRIED:
                raise
            except Exception as error:  # every package raises its own errors
                if tries == TRIES:
                    raise RemoteError(
                        f"{self} can't be {verb}, {TRIES} tries failed ({_reason(error)}): check "
                        "the network and the credentials in the environment, then run again"
                    ) from error
            time.sleep(min(LONGEST_PAUSE, PAUSE * 2 ** (tries - 1)))
        raise AssertionError("unreachable: the last try returns or raises")

    def _open(self) -> tuple[Any, str]:
        """Returns the store and the path in it."""
        protocol, host, *_ = urlsplit(self.url)
        try:
            fs = _filesystem(f"{protocol}://{host}", os.getpid())
        except ImportError as error:
            extra = EXTRAS.get(protocol)
            remedy = f"pip install 'saelab[{extra}]'" if extra else "install that package"
            raise RemoteError(f"{self} can't be opened ({_reason(error)}): {remedy}") from None
        except ValueError as error:
            raise RemoteError(
                f"{self} can't be opened ({_reason(error)}): name a folder or a URL that fsspec "
                "supports, such as s3://bucket/prefix"
            ) from None
        return fs, str(fs._strip_protocol(self.url))


#: A folder or a file on this machine or at a URL.
Place = Path | Remote


def place_of(text: str) -> Place:
    """Returns the place that a path or a URL names."""
    protocol, separator, _ = text.partition("://")
    if not separator:
        return Path(text)
    if protocol == "file":
        return Path(url2pathname(urlsplit(text).path))
    return Remote(text.rstrip("/"))


@functools.cache
def _filesystem(root: str, process: int) -> Any:
    """Returns fsspec's object for a store, one per process.

    It caches no listings, because other processes write to the store as well.
    """
    from fsspec.core import url_to_fs

    return url_to_fs(root, use_listings_cache=False)[0]


def _reason(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
