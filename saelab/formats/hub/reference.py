"""Names of SAEs on the hub, as they stand in place of a path.

hub:owner/name[@revision][:path]      a folder or a file of a repository
hub:release[@revision]:sae            an SAE of a release in saelab/assets/releases.toml
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from saelab.errors import SettingError
from saelab.formats.hub.releases import sae_of

PREFIX = "hub:"
FORM = "write hub:owner/name, and @revision and :path after it where they are needed"
#: A repository's name, as the hub allows it.
_REPOSITORY = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9_][\w.-]*", re.ASCII)
_REVISION = re.compile(r"[A-Za-z0-9_][\w./+-]*", re.ASCII)
#: A commit, which never changes.
COMMIT = re.compile(r"[0-9a-f]{40}")


@dataclass(frozen=True, kw_only=True)
class Reference:
    """An SAE on the hub.

    Args:
        repo: 'owner/name'.
        revision: branch, tag or commit; '' for the repository's main branch.
        path: folder or file in it, with '/'; '' for the repository itself.
        l0: where the path ends in a *, the L0 to which its number is the nearest there is.
    """

    repo: str
    revision: str = ""
    path: str = ""
    l0: int | None = None

    def __str__(self) -> str:
        revision = f"@{self.revision}" if self.revision else ""
        return f"{PREFIX}{self.repo}{revision}" + (f":{self.path}" if self.path else "")

    @property
    def is_pinned(self) -> bool:
        """True where the revision is a commit, which never changes."""
        return bool(COMMIT.fullmatch(self.revision))


def is_reference(path: str | Path) -> bool:
    """Returns True for a name on the hub, False for a path of this disk."""
    return _text(path).startswith(PREFIX)


def _text(path: str | Path) -> str:
    return path.as_posix() if isinstance(path, Path) else path


def parse(path: str | Path) -> Reference:
    """Parses a name on the hub.

    Raises: SettingError for one of another form, a release or an SAE that is not in the table, and
        a path that leaves its repository.
    """
    text = _text(path)
    if not is_reference(text):
        raise SettingError("SAE", text, FORM)
    head, _, inner = text.removeprefix(PREFIX).partition(":")
    repo, at, revision = head.partition("@")
    if at and (not _REVISION.fullmatch(revision) or ".." in revision):
        raise SettingError("SAE", text, f"{revision!r} is not a revision: {FORM}")
    if "/" not in repo:
        return in_release(repo, inner, revision)
    return reference(repo, inner, revision)


def repository(path: str | Path) -> str:
    """Returns 'owner/name' of a name on the hub that is a repository alone.

    Raises: SettingError for a name of another form.
    """
    name = _text(path).removeprefix(PREFIX)
    if "@" in name or ":" in name:
        raise SettingError("TO", _text(path), "write hub:owner/name, without revision and path")
    return reference(name).repo


def in_release(release: str, sae: str, revision: str = "") -> Reference:
    """Returns the SAE of a release.

    Raises: SettingError for a name that the table of releases does not have.
    """
    stated = sae_of(release, sae)
    return Reference(repo=stated.repo, revision=revision, path=stated.path, l0=stated.l0)


def reference(repo: str, path: str = "", revision: str = "") -> Reference:
    """Returns a folder or a file of a repository.

    Raises: SettingError for a name that no repository can have, and a path that leaves it.
    """
    if not _REPOSITORY.fullmatch(repo) or ".." in repo or "--" in repo:
        raise SettingError("SAE", f"{PREFIX}{repo}", f"is not the name of a repository: {FORM}")
    path = path.rstrip("/")
    if path and not is_inside(path):
        raise SettingError("SAE", f"{PREFIX}{repo}:{path}", "name a path inside the repository")
    return Reference(repo=repo, revision=revision, path=path)


def is_inside(name: str) -> bool:
    """Returns True for a path that stays in the folder that it starts from."""
    odd = any(c in name for c in "\\*?\0") or re.match(r"[A-Za-z]:", name)
    parts = PurePosixPath(name).parts
    plain = PurePosixPath(name).as_posix() == name and name != "."
    return plain and not odd and not name.startswith("/") and ".." not in parts
