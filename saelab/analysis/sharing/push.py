"""SAEs to the hub and from it: safetensors in SAELens' layout, and a model card.

README.md                             the model card
verdict.json                          of a run, what `saelab verdict --json` prints
<arm>/seed<s>-l0_<level>/cfg.json, sae_weights.safetensors
"""

from __future__ import annotations

import shlex
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from saelab import formats
from saelab.analysis.export import about, without_context
from saelab.analysis.sharing.card import README, VERDICT, One, card
from saelab.analysis.sharing.new_folder import new_folder
from saelab.analysis.sharing.public_names import check_folder, public, public_data
from saelab.errors import SettingError, SourceError
from saelab.formats import saelens
from saelab.formats.hub import client, reference
from saelab.runs.folder import Member, RunFolder, run_cells
from saelab.storage.atomic import write_json, write_text
from saelab.verdict.review import review_run

#: Endings of files that are pulled: what the readers of open formats read, and texts.
PULLED = (".safetensors", ".json", ".md", ".npz", ".yaml")


@dataclass(frozen=True, kw_only=True)
class Selection:
    """The SAEs that are shared.

    Args:
        path: a run folder, or one SAE.
        source: format of the SAE; '' recognises it.
        arms, seeds: of a run, which cells at the plan's L0; all by default.
        without_trace: write an adapting threshold with beta = 0, which is another function.
    """

    path: Path
    source: str = ""
    arms: tuple[str, ...] = ()
    seeds: tuple[int, ...] = ()
    without_trace: bool = False

    def command(self, to: str) -> str:
        """Returns the command that pushes them, without the folders that they lie in."""
        words = ["saelab", "push", self._public_path(), to]
        words += [word for arm in self.arms for word in ("--arm", arm)]
        words += [word for seed in self.seeds for word in ("--seed", str(seed))]
        return public(shlex.join([*words, *(["--without-trace"] if self.without_trace else [])]))

    def _public_path(self) -> str:
        if reference.is_reference(self.path):
            return self.path.as_posix()
        place = self.path.resolve()
        run = RunFolder.of(place)
        return place.relative_to(run.folder.parent).as_posix() if run else place.name


@dataclass(frozen=True)
class Pushed:
    """Files of a push.

    Args:
        names: paths in the repository -> size in bytes.
        url: where they are now; '' if nothing was sent.
        folder: that holds them; None if they were only sent.
    """

    names: dict[str, int]
    url: str = ""
    folder: Path | None = None


def to_folder(selection: Selection, folder: Path, name: str) -> Pushed:
    """Writes the files of a push to a new folder, and sends nothing.

    Args:
        name: 'owner/name' of the repository that the card names, or the name of the folder.

    Raises: SourceError for a folder that is not empty; as `write`.
    """
    with new_folder(folder) as fresh:
        write(selection, fresh, name)
        names = _sizes(fresh)
    return Pushed(names, folder=folder)


def to_hub(selection: Selection, name: str, private: bool = False) -> Pushed:
    """Sends SAEs to a repository on the hub, which is made if it does not exist, in one commit.

    Files of earlier pushes that are not written again stay.

    Args:
        name: 'owner/name'.
        private: of a repository that is made now, whether only its owner sees it.

    Raises: as `write`; SourceError where the hub refuses it, UnreachableError where it is not
        reached.
    """
    if client.is_offline():
        remedy = f"unset {client.OFFLINE}, or use --dry-run"
        raise SourceError(f"{client.OFFLINE} forbids to push {name}: {remedy}")
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "push"
        write(selection, folder, name)
        names = _sizes(folder)
        from huggingface_hub import HfApi

        with client.hub_errors(name, writes=True):
            api = HfApi()
            api.create_repo(name, private=private or None, exist_ok=True)
            message = selection.command(f"hub:{name}")
            commit = api.upload_folder(repo_id=name, folder_path=folder, commit_message=message)
    return Pushed(names, url=str(commit.commit_url))


def write(selection: Selection, folder: Path, name: str) -> None:
    """Writes the files of a push.

    Raises: SettingError or SourceError for an SAE that SAELens' layout can't hold, which names it;
        SourceError for a run that is not complete, and where a file would name a place of this
        disk.
    """
    cells = run_cells(selection.path, selection.arms, selection.seeds)
    run = RunFolder.of(selection.path)
    saes: list[One] = []
    for place, path, cell in _places(selection, cells, run):
        loaded = formats.load(path, selection.source)
        sae = without_context(loaded.sae) if selection.without_trace else loaded.sae
        data = about(loaded, path, selection.without_trace)
        with _naming(path):
            saelens.save(sae, folder / place, data)
        saes.append(One(place=place, d_in=sae.d_in, d_sae=sae.d_sae, cell=cell, about=data))
    where = f"hub:{name}" if "/" in name else name
    text = card(saes, run, where, selection.command(where))
    write_text(folder / README, text)
    if run is not None:
        write_json(folder / VERDICT, public_data(review_run(run).as_dict()))
    check_folder(folder)


def _places(
    selection: Selection, cells: list[Member] | None, run: RunFolder | None
) -> Iterator[tuple[str, Path, Member | None]]:
    """Yields the place in the repository, the path and the cell of each SAE."""
    if cells is not None:
        for cell in cells:
            yield cell.id.folder.as_posix(), cell.folder, cell
        return
    lone = selection.path.resolve()
    named = [cell for cell in run.cells if cell.folder.resolve() == lone] if run else []
    yield "", formats.pinned(selection.path, selection.source), next(iter(named), None)


@contextmanager
def _naming(path: Path) -> Iterator[None]:
    """Names the SAE in the error about a part that can't be written."""
    try:
        yield
    except SettingError as error:
        remedy = f"{error.remedy}; nothing is pushed: name the other arms with --arm"
        raise SettingError(f"{path}: {error.setting}", error.value, remedy) from None


def _sizes(folder: Path) -> dict[str, int]:
    files = sorted(file for file in folder.rglob("*") if file.is_file())
    return {file.relative_to(folder).as_posix(): file.stat().st_size for file in files}


# ---- pulling ------------------------------------------------------------------------------------


def pull(source: Path, out: Path) -> Pushed:
    """Copies a repository on the hub, or a folder of one, to a new folder.

    Args:
        source: 'hub:owner/name[@revision][:path]'. Only safetensors, JSON, npz, YAML and Markdown
            files are taken.

    Raises: SettingError for a name of another form; SourceError for a folder that is not empty, and
        what `client.list_files` and `client.download` raise.
    """
    wanted = reference.parse(source)
    if wanted.l0 is not None:
        raise SettingError("SAE", str(source), "name the SAE's path in the repository")
    listing = client.list_files(wanted.repo, wanted.revision)
    start = PurePosixPath(wanted.path)
    names = [
        name
        for name in sorted(listing.names)
        if PurePosixPath(name).is_relative_to(start) and name.endswith(PULLED)
    ]
    if not names:
        endings = ", ".join(PULLED)
        raise SourceError(f"{wanted} holds no file that is pulled ({endings}): name another")
    with new_folder(out) as fresh:
        snapshot = client.download(wanted.repo, wanted.revision, listing, names)
        for name in names:
            inner = PurePosixPath(name).relative_to(start)
            target = fresh / (inner if inner.parts else start.name)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(snapshot / name, target)
        sizes = _sizes(fresh)
    return Pushed(sizes, folder=out)
