"""Commands on single latents of a saved SAE: latent, steer."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from typer import Argument, Option

from saelab.cli.common import Json, OwnParts, messages_on_stderr, register_parts, show

Sae = Annotated[
    Path,
    Argument(
        metavar="SAE",
        help="One cell of a run (run_1/cells/baseline/seed7-l0_32), the directory of an SAE in any "
        "format (docs/formats.md), or one on the hub: hub:owner/name[@revision][:path].",
    ),
]
Config = Annotated[
    Path | None,
    Option(
        help="The model, hook and text: a TOML file or a run folder. A cell of a run has its own."
    ),
]
Format = Annotated[str, Option(help="Format of SAE if it must be named, as --format of eval.")]


def latent(
    sae: Sae,
    index: Annotated[int, Argument(metavar="LATENT", help="Its index, from 0.")],
    config: Config = None,
    examples: Annotated[int, Option(help="Number of contexts.")] = 8,
    format: Format = "",
    json: Json = False,
    experiment: OwnParts = None,
) -> None:
    """Show one latent: contexts, density, logit lens, nearest latents.

    saelab latent run_1/cells/baseline/seed7-l0_32 7

    saelab latent downloaded_sae 7 --config configs/pythia-70m.toml --json

    The contexts are those of the held-out text in which it is strongest, each with its largest
    value, at the token between » and «. Tokens raised and lowered are those whose logits the
    decoder row moves most, through the final norm and the unembedding. This is what the feature
    browser of report.html shows, for any latent.
    """
    from saelab.analysis.one_latent import saved_sae, view_latents
    from saelab.storage.cache import cache_folder

    register_parts(experiment)
    with messages_on_stderr(json):
        loaded, base = saved_sae(sae, config, format)
        (view,) = view_latents(loaded, [index], base, cache_folder(Path()), examples)
    show(json, view.as_dict(), view.lines())


def steer(
    sae: Sae,
    latent: Annotated[int, Option(help="Index of the latent, from 0.")],
    by: Annotated[
        float,
        Option(
            help="What is added to the latent at every token, in the unit of the code: "
            "`saelab latent` prints its largest value, and one to four times that is a start. "
            "Below 0 steers away."
        ),
    ],
    prompt: Annotated[str, Option(help="Text that the model continues.")],
    tokens: Annotated[int, Option(help="At most so many new tokens.")] = 40,
    config: Config = None,
    format: Format = "",
    json: Json = False,
    experiment: OwnParts = None,
) -> None:
    """Print a text with and without a latent raised.

    saelab steer run_1/cells/baseline/seed7-l0_32 --latent 7 --by 4 --prompt "def add("

    Each next token is the most likely one, so the same command prints the same text. The error of
    the reconstruction stays in the model: only the latent changes it. In Python, saelab.attach does
    this and more (docs/inside.md).
    """
    from dataclasses import asdict

    from saelab.analysis import one_latent

    register_parts(experiment)
    with messages_on_stderr(json):
        loaded, base = one_latent.saved_sae(sae, config, format)
        steered = one_latent.steer(loaded, base, latent, by, prompt, tokens)
    show(json, asdict(steered), steered.lines())
