"""SAEs on the hub: their exact place there, their files here, and what their release states."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from saelab.errors import SourceError
from saelab.formats.hub import client
from saelab.formats.hub.client import Listing
from saelab.formats.hub.needed import Needed, NoSAEError, choose
from saelab.formats.hub.reference import Reference
from saelab.formats.hub.releases import at, model_on_hub
from saelab.origin import Origin

if TYPE_CHECKING:
    from saelab.formats import Format


@dataclass(frozen=True)
class Fetched:
    """An SAE whose files are in the hub's cache.

    Args:
        reference: with its commit and the exact path.
        format: name in the table of formats.
        place: its folder or file in the cache.
    """

    reference: Reference
    format: str
    place: Path


def fetch(reference: Reference, table: Mapping[str, Format], format_name: str) -> Fetched:
    """Downloads the files of an SAE that are not in the cache yet.

    Raises: as `client.list_files`, `choose` and `client.download`.
    """
    listing, needed = _locate(reference, table, format_name)
    folder = client.download(reference.repo, reference.revision, listing, needed.names)
    place = folder / needed.path
    exact = replace(reference, revision=listing.commit, path=needed.path, l0=None)
    return Fetched(exact, needed.format, place)


def _locate(
    reference: Reference, table: Mapping[str, Format], format_name: str
) -> tuple[Listing, Needed]:
    """Finds the files of an SAE; a commit whose SAE is in the cache needs no network."""
    repo, revision = reference.repo, reference.revision
    if reference.is_pinned and (cached := client.cached_files(repo, revision)) is not None:
        try:
            needed = choose(reference, cached.names, table, format_name)
        except SourceError:
            pass  # it is not complete
        else:
            if needed.path == reference.path:
                return cached, needed
    if client.is_offline() and reference.l0 is not None:
        remedy = f"it is found by asking the hub, which {client.OFFLINE} forbids: name its path"
        raise SourceError(f"{reference} is the SAE with the L0 nearest to {reference.l0}; {remedy}")
    listing = client.list_files(repo, revision)
    try:
        return listing, choose(reference, listing.names, table, format_name)
    except NoSAEError:
        if client.is_offline():
            raise client.not_cached(repo, revision, reference.path) from None
        raise


def stated_origin(origin: Origin, fetched: Fetched) -> Origin:
    """Returns an SAE's origin together with what its release states, where it is of one."""
    stated = at(fetched.reference.repo, fetched.reference.path)
    if stated is None:
        return origin
    model, hook = model_on_hub(origin.model), origin.hook_name
    differences = Origin(model, hook).differences(stated.model, stated.hook)
    odd = ()
    if differences:
        odd = (
            f"is on {stated.model} at {stated.hook} by its release {stated.release}, and on "
            f"{model} at {hook} by its files",
        )
    return Origin(model or stated.model, hook or stated.hook, (*origin.peculiarities, *odd))
