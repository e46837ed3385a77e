"""The hub through huggingface_hub: listings and files, in its own cache, with errors as sentences.

HF_ENDPOINT, HF_TOKEN, HF_HOME and HF_HUB_OFFLINE mean what they mean to huggingface_hub. Offline,
the cache stands for the hub: a repository has the files that were downloaded.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, cast

from saelab.data.hub import silence_loggers
from saelab.errors import SaelabError, SourceError, UnreachableError
from saelab.formats.hub.reference import COMMIT, is_inside

#: Variable of huggingface_hub that forbids any network.
OFFLINE = "HF_HUB_OFFLINE"
MAIN = "main"
LOG_IN = "log in with `hf auth login`, or set HF_TOKEN"


@dataclass(frozen=True)
class Listing:
    """Files of a repository at one commit.

    Args:
        commit: 40 hexadecimal digits.
        names: paths in the repository, with '/'.
    """

    commit: str
    names: frozenset[str]


def is_offline() -> bool:
    """Returns True where HF_HUB_OFFLINE forbids any network."""
    from huggingface_hub import constants

    return bool(constants.HF_HUB_OFFLINE)


def list_files(repo: str, revision: str) -> Listing:
    """Lists a repository on the hub; offline, what the cache has of it.

    Args:
        revision: branch, tag or commit; '' for the main branch.

    Raises: SourceError for a repository or revision that does not exist or may not be read;
        UnreachableError where the hub does not answer.
    """
    if is_offline():
        listing = cached_files(repo, revision)
        if listing is None:
            raise not_cached(repo, revision)
        return listing
    from huggingface_hub import HfApi

    with hub_errors(repo, revision):
        info = HfApi().model_info(repo, revision=revision or None, timeout=30)
        names = [sibling.rfilename for sibling in info.siblings or ()]
        commit = str(info.sha)
    if not COMMIT.fullmatch(commit):
        raise _odd_answer()
    return Listing(commit, frozenset(name for name in names if is_inside(name)))


def cached_files(repo: str, revision: str) -> Listing | None:
    """Lists what the cache has of a repository; None where it has nothing of that revision."""
    folder = _cached_repository(repo)
    commit = revision
    if not COMMIT.fullmatch(revision):
        ref = folder / "refs" / (revision or MAIN)
        commit = ref.read_text(encoding="utf-8").strip() if ref.is_file() else ""
    snapshot = folder / "snapshots" / commit
    if not COMMIT.fullmatch(commit) or not snapshot.is_dir():
        return None
    files = (file for file in snapshot.rglob("*") if file.is_file())
    return Listing(commit, frozenset(file.relative_to(snapshot).as_posix() for file in files))


def not_cached(repo: str, revision: str, path: str = "") -> SourceError:
    """Returns the error that something is not in the cache, while the network is forbidden."""
    version = f" at {revision}" if revision else ""
    what = f"{path} of {repo}" if path else repo
    remedy = f"{OFFLINE} forbids the network: unset it once, so that it is downloaded"
    return SourceError(f"{what}{version} is not in the cache of the hub, and {remedy}")


def download(repo: str, revision: str, listing: Listing, names: Sequence[str]) -> Path:
    """Downloads files, in this order, to the hub's cache, and takes from it those it has.

    Returns: the cache's folder of this version of the repository.
    Raises: as `list_files`; SourceError where the repository changed meanwhile.
    """
    from huggingface_hub import hf_hub_download

    folder = _cached_repository(repo) / "snapshots" / listing.commit
    for name in names:
        if is_offline() or (COMMIT.fullmatch(revision) and (folder / name).is_file()):
            continue
        with hub_errors(repo, revision, name):
            file = Path(hf_hub_download(repo, name, revision=revision or MAIN))
        if file != folder / PurePosixPath(name):
            remedy = "try again, or name a commit with @"
            raise SourceError(f"{repo} on the hub was changed while it was read: {remedy}")
    return folder


def _cached_repository(repo: str) -> Path:
    from huggingface_hub import constants
    from huggingface_hub.file_download import repo_folder_name

    name = repo_folder_name(repo_id=repo, repo_type="model")
    return Path(constants.HF_HUB_CACHE).expanduser().resolve() / name


# ---- errors ------------------------------------------------------------------------------------


@contextmanager
def hub_errors(
    repo: str, revision: str = "", path: str = "", writes: bool = False
) -> Iterator[None]:
    """Turns every error of huggingface_hub in the block into one sentence with a remedy. Its
    progress bars are shown on a terminal only.

    Args:
        repo, revision, path: what the block asks for.
        writes: whether it sends files, for which the cache is no way out.
    """
    from huggingface_hub import errors

    version = f" at {revision}" if revision else ""
    where = f"{path} of {repo}{version}" if path else f"{repo}{version}"
    #: Of httpx or httpx2, by huggingface_hub's version.
    of_transport = cast(type[Exception], errors.HfHubHTTPError.__mro__[1])
    try:
        with silence_loggers(), _bars_on_a_terminal():
            yield
    except SaelabError:
        raise
    except errors.GatedRepoError:
        remedy = f"ask for access at {_endpoint()}/{repo}, then {LOG_IN}"
        raise SourceError(
            f"{repo} on the hub is open only to those with access: {remedy}"
        ) from None
    except errors.RevisionNotFoundError:
        remedy = "name a branch, a tag or a commit of it"
        raise SourceError(f"{repo} on the hub has no revision {revision!r}: {remedy}") from None
    except errors.RepositoryNotFoundError:
        remedy = f"check owner and name; if it is private, {LOG_IN}"
        raise SourceError(f"{repo} does not exist on the hub: {remedy}") from None
    except (errors.OfflineModeIsEnabled, errors.LocalEntryNotFoundError) as error:
        if is_offline():
            raise not_cached(repo, revision, path) from None
        raise _unreachable(where, error, writes) from None
    except errors.EntryNotFoundError:
        remedy = "name a file or folder of the repository"
        raise SourceError(f"{where} does not exist on the hub: {remedy}") from None
    except errors.HfHubHTTPError as error:
        raise _refused(where, error, writes) from None
    except (of_transport, ConnectionError, TimeoutError) as error:
        raise _unreachable(where, error, writes) from None
    except (ValueError, KeyError, TypeError, AttributeError):
        raise _odd_answer() from None


def _endpoint() -> str:
    from huggingface_hub import constants

    return str(constants.ENDPOINT)


@contextmanager
def _bars_on_a_terminal() -> Iterator[None]:
    from huggingface_hub import utils

    if sys.stderr.isatty() or utils.are_progress_bars_disabled():
        yield
        return
    utils.disable_progress_bars()
    try:
        yield
    finally:
        utils.enable_progress_bars()


def _refused(where: str, error: Any, writes: bool) -> SourceError:
    """Returns the sentence on an answer of the hub that is an error."""
    status = error.response.status_code
    if status in (401, 403):
        remedy = f"{LOG_IN}, with a token that has the right to it"
        return SourceError(f"the hub refuses {where} (status {status}): {remedy}")
    if status >= 500 or status == 429:
        remedy = "try again later" + _or_offline(writes)
        return UnreachableError(f"the hub could not answer for {where} (status {status}): {remedy}")
    reason = (str(error.server_message or "") or str(error)).splitlines()[0][:200]
    remedy = "check the name and your access"
    return SourceError(f"the hub refuses {where} (status {status}, {reason}): {remedy}")


def _or_offline(writes: bool) -> str:
    return "" if writes else f", or set {OFFLINE}=1 to use what is in the cache"


def _unreachable(where: str, error: BaseException, writes: bool) -> UnreachableError:
    reason = (str(error).splitlines() or [""])[0][:200] or type(error).__name__
    remedy = "check the network" + _or_offline(writes)
    return UnreachableError(
        f"the hub at {_endpoint()} can't be reached for {where} ({reason}): {remedy}"
    )


def _odd_answer() -> SourceError:
    remedy = "set HF_ENDPOINT to a hub, or try again"
    return SourceError(f"{_endpoint()} does not answer as a hub does: {remedy}")
