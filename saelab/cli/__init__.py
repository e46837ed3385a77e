"""The command line, `saelab COMMAND`: one module per group of commands.

Heavy packages are imported inside the commands, so that `--help` is quick.
"""

from __future__ import annotations

from functools import partial

import typer

from saelab.cli import (
    drivers,
    latents,
    models,
    parts,
    plan,
    results,
    run,
    saes,
    schemas,
    settings,
    sharing,
    sweep,
    train,
)
from saelab.cli.common import MOST_COLUMNS, Guarded, Listing, Version

#: Plain help, and errors whose last line says what is wrong.
Group = partial(typer.Typer, no_args_is_help=True, rich_markup_mode=None, cls=Listing)
app = Group(
    cls=Guarded,
    help="Train sparse autoencoder variants side by side and learn whether an idea helps.",
    epilog="Runs on the CPU. The path for CUDA (model.device = 'cuda') has not run on a GPU yet.",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": MOST_COLUMNS},
)
lm_group = Group(help="Language models: those of Python packages, and the embedded one.")
plan_group = Group(help="The plan of a study, before anything is trained.")
app.add_typer(lm_group, name="lm")
app.add_typer(plan_group, name="plan")

#: Every command in the order of `saelab --help`: group, name, function.
COMMANDS = (
    (app, "run", run.run),
    (plan_group, "check", plan.check),
    (plan_group, "cost", plan.cost),
    (app, "try", drivers.try_),
    (app, "tune", run.tune),
    (app, "verdict", results.verdict),
    (app, "report", results.report),
    (app, "template", run.template),
    (app, "watch", run.watch),
    (app, "attempts", run.attempts),
    (app, "train", train.train),
    (app, "sweep", sweep.sweep),
    (app, "difference", results.difference),
    (app, "probing", results.probing),
    (app, "eval", saes.evaluate),
    (app, "latent", latents.latent),
    (app, "steer", latents.steer),
    (app, "export", saes.export),
    (app, "settings", settings.settings),
    (app, "push", sharing.push),
    (app, "pull", sharing.pull),
    (app, "neuronpedia", sharing.neuronpedia),
    (app, "parts", parts.parts),
    (app, "check-part", parts.check_part),
    (app, "saebench", saes.saebench),
    (app, "synthetic", train.synthetic),
    (app, "schema", schemas.schema),
    (lm_group, "install", models.install),
    (lm_group, "import", models.import_),
    (lm_group, "train", train.language_model),
)
for group, name, command in COMMANDS:
    group.command(name)(command)


@app.callback()
def options(version: Version = False) -> None:
    """Holds the options of `saelab` itself."""


def main() -> None:
    """Runs the command that the arguments of the process name."""
    app()
