"""Code that the commands share: options, how they read the run table, print and end."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext, redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer import Argument, Option
from typer.core import TyperGroup

if TYPE_CHECKING:
    from saelab.errors import SaelabError
    from saelab.study.plan import BaseConfig, Run

#: The file with the run table.
EXPERIMENT = Path("experiment.py")
#: Help and tables use at most this many columns of a wide terminal. Our choice: lines above it are
#: hard to read.
MOST_COLUMNS = 160
RunTable = Annotated[Path, Option("--experiment", help="File with the run table.")]
OwnParts = Annotated[
    Path | None,
    Option("--experiment", help="The experiment.py that defines parts of the SAE."),
]
Set = Annotated[
    list[str] | None,
    Option("--set", help="Change one setting: --set train.lr=1e-3. May be repeated."),
]
Tokens = Annotated[
    int | None, Option("--tokens", help="Tokens that each SAE trains on (train.tokens).")
]
SeedsOfArms = Annotated[
    int | None, Option("--seeds", help="Seeds of every arm, in place of the plan's numbers.")
]
Quick = Annotated[
    bool,
    Option(
        "--quick",
        help="Three arms in about 90 seconds: few tokens and seeds, in the folder quick/. Marked "
        "in every output, and no part of the study.",
    ),
]
Arms = Annotated[
    list[str] | None,
    Option("--arm", help="Only this arm of a run. May be repeated; all arms by default."),
]
Seeds = Annotated[
    list[int] | None,
    Option("--seed", help="Only this seed of a run. May be repeated; all seeds by default."),
]
WithoutTrace = Annotated[
    bool,
    Option(
        "--without-trace",
        help="Set beta = 0 in a threshold that follows the context. The function is then not the "
        "trained one, but one that other tools know.",
    ),
]
Folders = Annotated[
    list[Path] | None,
    Argument(help="Complete runs; by default every run_* in this folder."),
]
Json = Annotated[bool, Option("--json", help="Print JSON, for programs.")]


def _print_version(wanted: bool) -> None:
    if wanted:
        from saelab.version import __version__

        typer.echo(f"saelab {__version__}")
        raise typer.Exit


Version = Annotated[
    bool,
    Option("--version", callback=_print_version, is_eager=True, help="Show the version and exit."),
]


class Listing(TyperGroup):
    """A group whose help shows the first sentence of each command in full."""

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        names = [name for name in self.list_commands(ctx)]
        commands = [(name, self.get_command(ctx, name)) for name in names]
        rows = [(name, _first_sentence(c.help or "")) for name, c in commands if c and not c.hidden]
        with formatter.section("Commands"):
            formatter.write_dl(rows)


def _first_sentence(text: str) -> str:
    """Returns the first paragraph of a help text up to its first full stop."""
    paragraph = " ".join(text.split("\n\n")[0].split())
    end = paragraph.find(". ")
    return paragraph if end < 0 else paragraph[: end + 1]


class Guarded(Listing):
    """A group whose commands end as `cli_errors` says."""

    def invoke(self, ctx: Any) -> Any:
        with cli_errors("--json" in [*ctx._protected_args, *ctx.args]):
            return super().invoke(ctx)


@contextmanager
def cli_errors(as_json: bool = False) -> Iterator[None]:
    """Ends bad input with one sentence and exit code 2, a failed study with 1, SIGINT with 130 and
    SIGTERM with 143.

    Args:
        as_json: prints the error as a JSON object on stdout too (`outputs.Failure`).
    """
    from saelab.errors import SaelabError
    from saelab.runtime import exhaustion
    from saelab.runtime.signals import exit_on_signal

    with exit_on_signal():
        try:
            with exhaustion.as_usage_error():
                yield
        except SaelabError as error:
            if is_first_process():
                typer.echo(str(error), err=True)
                if as_json:
                    show(True, {"error": error_data(error)}, ())
            raise typer.Exit(error.exit_code) from None


def error_data(error: SaelabError) -> dict[str, Any]:
    """Returns an error as plain data, see `outputs.Problem`."""
    setting, value, remedy = (getattr(error, n, None) for n in ("setting", "value", "remedy"))
    return {
        "type": type(error).__name__,
        "message": str(error),
        "setting": setting,
        "value": None if setting is None else str(value),
        "remedy": remedy,
        "exit_code": error.exit_code,
    }


def is_first_process() -> bool:
    """Returns False in all but one of the processes that torchrun starts on a machine."""
    import os

    return os.environ.get("LOCAL_RANK", "0") == "0"


def say(text: str, err: bool = False) -> None:
    """Prints text that may hold names and texts of others."""
    from saelab.runtime.safe_text import visible

    typer.echo(visible(text, keep="\n"), err=err)


def show(as_json: bool, data: Any, lines: Iterable[str], between: str = "\n") -> None:
    """Prints the data of a result as JSON, or its lines as text.

    JSON has no word for a number that is not finite: it is null there.
    """
    if as_json:
        import json

        typer.echo(json.dumps(_without_nan(data), indent=1, allow_nan=False))
    elif text := between.join(lines):
        say(text)


def _without_nan(data: Any) -> Any:
    if isinstance(data, Mapping):
        return {key: _without_nan(value) for key, value in data.items()}
    if isinstance(data, (list, tuple)):
        return [_without_nan(value) for value in data]
    return None if isinstance(data, float) and not math.isfinite(data) else data


def messages_on_stderr(as_json: bool) -> AbstractContextManager[object]:
    """Keeps stdout for JSON: whatever prints inside the block then prints on stderr."""
    return redirect_stdout(sys.stderr) if as_json else nullcontext()


def read_runs(experiment: Path) -> tuple[Mapping[str, Run], Path]:
    """Returns the run table and the absolute path of its file.

    Raises: SourceError when the file is missing or defines no RUNS.
    """
    from saelab.study.experiment_file import load_experiment

    file = experiment.resolve()
    return load_experiment(file).RUNS, file


def register_parts(experiment: Path | None) -> None:
    """Registers the parts that an experiment.py defines."""
    if experiment is not None:
        read_runs(experiment)


def parse_changes(pairs: list[str] | None) -> dict[str, Any]:
    """Parses 'train.lr=1e-3' into {"train.lr": 0.001}; values are TOML, plain words are text.

    Raises: SettingError for a pair without name or '='.
    """
    from saelab.errors import SettingError

    changes: dict[str, Any] = {}
    for pair in pairs or []:
        name, equals, value = pair.partition("=")
        if not equals or not name:
            raise SettingError("--set", pair, "use NAME=VALUE, for example train.lr=1e-3")
        changes[name] = parse_value(value)
    return changes


def parse_value(text: str) -> Any:
    """Parses a value as TOML; plain words are text."""
    import tomllib

    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text


def changed_settings(config: Path, set_: list[str] | None, tokens: int | None) -> BaseConfig:
    """Reads base settings and changes what --tokens and --set say; --set is the last."""
    from saelab.api import settings

    of_tokens = {} if tokens is None else {"train.tokens": tokens}
    return settings(config, of_tokens | parse_changes(set_))
