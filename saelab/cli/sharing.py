"""Commands that share SAEs: push, pull, neuronpedia."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from typer import Argument, Option

from saelab.cli.common import Arms, Json, OwnParts, Seeds, WithoutTrace, register_parts, show
from saelab.cli.latents import Config, Format, Sae
from saelab.runtime.counting import count


def push(
    path: Annotated[Path, Argument(help="A run folder (run_1), one of its cells, or a saved SAE.")],
    to: Annotated[
        Path, Argument(metavar="TO", help="hub:owner/name, or a new folder to write the files to.")
    ],
    arm: Arms = None,
    seed: Seeds = None,
    private: Annotated[
        bool, Option("--private", help="Only you see the repository, if it is made now.")
    ] = False,
    dry_run: Annotated[
        bool, Option("--dry-run", help="Write the files to the folder --out, and send nothing.")
    ] = False,
    out: Annotated[
        Path | None, Option(help="New folder for --dry-run; the name in hub:owner/name by default.")
    ] = None,
    without_trace: WithoutTrace = False,
    source: Annotated[
        str, Option(help="Format of PATH if it must be named, as --format of eval.")
    ] = "",
    json_: Json = False,
    experiment: OwnParts = None,
) -> None:
    """Share trained SAEs on the Hugging Face hub, with a model card that carries the verdict.

    saelab push run_1 hub:me/my-saes --arm A1 --dry-run

    saelab push run_1 hub:me/my-saes --arm A1 --private

    Of a run every cell at the plan's L0 is sent, as <arm>/seed<s>-l0_<level>: safetensors in
    SAELens' layout, as saelab export writes them. README.md says the verdict with its intervals,
    controls, gate, provenance and the commands. No path of this disk is in what is sent. Log in
    first with `hf auth login`, or set HF_TOKEN.
    """
    from saelab.analysis.sharing.push import Selection, to_folder, to_hub
    from saelab.errors import SettingError
    from saelab.formats.hub import reference

    register_parts(experiment)
    selection = Selection(
        path=path,
        source=source,
        arms=tuple(arm or ()),
        seeds=tuple(seed or ()),
        without_trace=without_trace,
    )
    on_hub = reference.is_reference(to)
    name = reference.repository(to) if on_hub else to.resolve().name
    if out is not None and not (on_hub and dry_run):
        raise SettingError("--out", str(out), "is the folder of --dry-run: leave it out")
    if on_hub and not dry_run:
        pushed = to_hub(selection, name, private)
        data = {"folder": None, "repository": name, "url": pushed.url, "files": pushed.names}
        show(json_, data, [f"{_files(pushed.names)} sent to hub:{name}", pushed.url])
        return
    folder = out or (Path(name.rpartition("/")[2]) if on_hub else to)
    pushed = to_folder(selection, folder, name)
    lines = [f"{size:>12,}  {file}" for file, size in pushed.names.items()]
    end = f"not sent to hub:{name}" if on_hub else "not sent"
    lines.append(f"{_files(pushed.names)} in {folder}, {end}")
    data = {"folder": str(folder), "repository": name if on_hub else None, "url": None}
    show(json_, data | {"files": pushed.names}, lines)


def pull(
    source: Annotated[
        Path, Argument(metavar="SAE", help="hub:owner/name, and @revision and :path after it.")
    ],
    out: Annotated[
        Path | None, Option(help="New folder; the name of the repository by default.")
    ] = None,
    json_: Json = False,
) -> None:
    """Copy SAEs from the Hugging Face hub to a folder: safetensors, JSON, npz, YAML and Markdown.

    saelab pull hub:me/my-saes --out theirs

    To evaluate an SAE this is not needed: saelab eval takes hub:owner/name[@revision][:path].
    """
    from saelab.analysis.sharing.push import pull
    from saelab.formats.hub.reference import parse

    repository = parse(source).repo
    folder = out or Path(repository.rpartition("/")[2])
    pulled = pull(source, folder)
    data = {"folder": str(folder), "repository": repository, "url": None, "files": pulled.names}
    show(json_, data, [f"{_files(pulled.names)} in {folder}"])


def neuronpedia(
    sae: Sae,
    set_name: Annotated[
        str,
        Option(help="Name of the SAE set on Neuronpedia, without the layer: res-16k, for example."),
    ],
    out: Annotated[Path, Option(help="New folder.")],
    config: Config = None,
    model_id: Annotated[
        str,
        Option(help="Neuronpedia's name of the model; the last part of model.path by default."),
    ] = "",
    latents: Annotated[
        int | None, Option(help="So many latents, picked as for the report; all by default.")
    ] = None,
    examples: Annotated[int, Option(help="Contexts of each latent.")] = 8,
    format: Format = "",
    json_: Json = False,
    experiment: OwnParts = None,
) -> None:
    """Write the latents of an SAE for an upload to Neuronpedia, as SAEDashboard does.

    saelab neuronpedia run_1/cells/baseline/seed7-l0_32 --set-name res-small --out dashboards

    The files batch-0.json, batch-1.json ... hold contexts, density and logit lens of each latent on
    held-out text, as the report shows them. Neuronpedia's tools make an upload of such a folder
    (docs/sharing.md).
    """
    from saelab.analysis.one_latent import saved_sae
    from saelab.analysis.sharing.neuronpedia import place_of, write
    from saelab.storage.cache import cache_folder

    register_parts(experiment)
    loaded, base = saved_sae(sae, config, format)
    place = place_of(base, set_name, model_id)
    files = write(loaded, base, place, out, cache_folder(Path()), latents, examples)
    source = f"{place.model}/{place.layer}-{place.set_name}"
    data = {"folder": str(out), "files": [str(file) for file in files], "source": source}
    line = f"{count(len(files), 'file')} in {out}, for neuronpedia.org/{source}"
    show(json_, data, [line])


def _files(names: dict[str, int]) -> str:
    return f"{count(len(names), 'file')} ({sum(names.values()) / 1e6:.1f} MB)"
