"""Stores for tests: one that fails one request in five, and a local S3 server."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import fsspec
from fsspec.implementations.memory import MemoryFileSystem

from saelab.seeding import numpy_stream
from saelab.storage import remote

#: Share of the requests that fail.
FAILING = 0.2


class FlakyFileSystem(MemoryFileSystem):
    """A store in memory whose requests fail one time in five, by a seeded draw.

    Every second failure comes after the request was carried out, as a lost answer does.
    """

    protocol = "flaky"
    store: dict[str, Any] = {}  # noqa: RUF012 (as in the class above)
    pseudo_dirs = [""]  # noqa: RUF012
    draws = numpy_stream(0, "failing requests")
    requests = failures = 0

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        return MemoryFileSystem._strip_protocol(path.replace("flaky://", "memory://"))

    def _asked(self, name: str, *args: Any, **options: Any) -> Any:
        kind = type(self)
        kind.requests += 1
        fails = kind.draws.random() < FAILING
        kind.failures += fails
        if fails and kind.failures % 2:
            raise OSError(f"{name}: the store is busy")
        found = getattr(super(), name)(*args, **options)
        if fails:
            raise TimeoutError(f"{name}: the answer was lost")
        return found

    def info(self, *args: Any, **options: Any) -> Any:
        return self._asked("info", *args, **options)

    def ls(self, *args: Any, **options: Any) -> Any:
        return self._asked("ls", *args, **options)

    def cat_file(self, *args: Any, **options: Any) -> Any:
        return self._asked("cat_file", *args, **options)

    def put_file(self, *args: Any, **options: Any) -> Any:
        return self._asked("put_file", *args, **options)


def flaky_store(monkeypatch: Any) -> type[FlakyFileSystem]:
    """Registers an empty one as flaky://; no test waits for its pauses."""
    fsspec.register_implementation("flaky", FlakyFileSystem, clobber=True)
    FlakyFileSystem.store.clear()
    FlakyFileSystem.draws = numpy_stream(0, "failing requests")
    FlakyFileSystem.requests = FlakyFileSystem.failures = 0
    monkeypatch.setattr(remote, "PAUSE", 0.0)
    return FlakyFileSystem


@contextmanager
def s3_server(folder: Path) -> Iterator[dict[str, str]]:
    """A local S3 server with the bucket `saelab`; the variables under which clients find it."""
    with closing(socket.socket()) as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    url = f"http://127.0.0.1:{port}"
    command = "import sys; from moto.server import main; main(sys.argv[1:])"
    with (folder / "server.log").open("w") as log:
        server = subprocess.Popen(
            [sys.executable, "-c", command, "-H", "127.0.0.1", "-p", str(port)],
            stdout=log,
            stderr=log,
        )
    try:
        names = {
            "AWS_ENDPOINT_URL": url,
            "AWS_ACCESS_KEY_ID": "test",
            "AWS_SECRET_ACCESS_KEY": "test",
            "AWS_DEFAULT_REGION": "us-east-1",
        }
        _make_bucket(names, server)
        yield names
    finally:
        server.terminate()
        server.wait()


def _make_bucket(names: dict[str, str], server: subprocess.Popen[bytes]) -> None:
    """In a process of its own, so that this one opens the store under the variables of the test."""
    code = "import s3fs; s3fs.S3FileSystem().mkdir('saelab')"
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and server.poll() is None:
        made = subprocess.run(
            [sys.executable, "-c", code], env={**os.environ, **names}, capture_output=True
        )
        if made.returncode == 0:
            return
        time.sleep(0.5)
    raise RuntimeError("the local S3 server gives no answer")
