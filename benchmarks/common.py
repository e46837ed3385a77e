"""Shared parts of the benchmarks: options, measuring in turns, ratios, tables, raw JSON, the peers.

The rows of a table are timed in turns, one short stretch each, in an order that shifts by one every
turn, so that a noisy machine affects all of them equally:

    ratio(a, b) = median over turns of  (median of a in the turn) / (median of b in the turn)

The peers run in a separate process, with the packages of their environment (`peers.py`). It reads
one JSON line per call from its stdin and writes one JSON line per reply; tensors are passed in
files that both sides read.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np

from saelab.errors import SaelabError, SettingError
from saelab.storage.atomic import write_json

HERE = Path(__file__).parent
RESULTS = HERE / "results"
#: Where `peers.py` makes the peers' environment unless told otherwise.
PEERS = HERE / ".peers"
#: Packages whose versions decide a timing.
OUR_PACKAGES = ("torch", "numpy", "scikit-learn", "transformers", "safetensors")
#: CPU flags that decide which GEMMs are fast.
FEATURES = (
    "avx2",
    "avx_vnni",
    "avx512f",
    "avx512_vnni",
    "avx512_bf16",
    "amx_bf16",
    "amx_tile",
    "asimd",
    "bf16",
)

os.environ.setdefault("SAELAB_PROGRESS", "off")


# ---------------------------------------------------------------- options


def parser(description: str) -> argparse.ArgumentParser:
    """The options that every benchmark has."""
    made = argparse.ArgumentParser(description=description)
    made.add_argument("--quick", action="store_true", help="smoke run: smallest shape, few steps")
    made.add_argument(
        "--threads", type=int, default=os.cpu_count() or 1, help="threads of every side"
    )
    made.add_argument(
        "--peers", default=str(PEERS), help="the peers' environment, or 'none' for our rows only"
    )
    made.add_argument("--results", type=Path, default=RESULTS, help="folder for the raw JSON")
    return made


def run(main: Callable[[], None]) -> None:
    """Says which processor is measured and calls a benchmark's main.

    An error that the user can fix ends with one sentence.
    """
    here = machine(0)
    features = ", ".join(here["features"]) or "none that matter here"
    masked = f"; masked: {', '.join(here['masked'])}" if here["masked"] else ""
    print(
        f"processor: {here['cpu']}, {here['cores']} cores; features: {features}{masked}", flush=True
    )
    try:
        main()
    except SaelabError as error:
        print(error, file=sys.stderr)
        sys.exit(error.exit_code)


@contextlib.contextmanager
def scratch() -> Iterator[Path]:
    """A temporary folder for the inputs that both sides read."""
    with tempfile.TemporaryDirectory(prefix="saelab-bench-") as folder:
        yield Path(folder)


# ---------------------------------------------------------------- measuring


@dataclass(eq=False)
class Contestant:
    """One row of a table.

    Args:
        name: of the row.
        run: n -> n samples, each the seconds of one step.
        side: 'ours', 'peer' or 'limit'.
        work: rows or tokens that one step processes, for a rate; 0 shows no rate.
        note: shown at the end of the row.
        turns: the recorded samples, one list per turn.
    """

    name: str
    run: Callable[[int], list[float]]
    side: str = "ours"
    work: float = 0.0
    note: str = ""
    turns: list[list[float]] = field(default_factory=list)

    @property
    def samples(self) -> list[float]:
        return [sample for turn in self.turns for sample in turn]

    def plain(self) -> dict[str, Any]:
        """Returns the row for the JSON file; seconds."""
        low, middle, high = quartiles(self.samples)
        return {
            "name": self.name,
            "side": self.side,
            "work_per_step": self.work,
            "note": self.note,
            "median_s": middle,
            "quartiles_s": [low, high],
            "turns_s": self.turns,
        }


def timed(
    work: Callable[[], object], before: Callable[[], object] | None = None
) -> Callable[[int], list[float]]:
    """Returns n -> the seconds of each of n calls of `work`; `before` runs before each, untimed."""

    def samples(n: int) -> list[float]:
        found = []
        for _ in range(n):
            if before is not None:
                before()
            start = perf_counter()
            work()
            found.append(perf_counter() - start)
        return found

    return samples


def alternate(
    contestants: Sequence[Contestant], turns: int, steps: int, settle: int = 0, warm: bool = True
) -> None:
    """Times all contestants in turns; an additional first turn warms up and is discarded.

    Args:
        turns: recorded turns.
        steps: samples of each contestant in a turn.
        settle: further steps at the start of each stretch that refill the caches; discarded.
        warm: False leaves the first turn out, for work that starts a process each time.
    """
    for turn in range(0 if warm else 1, turns + 1):
        shift = turn % len(contestants)
        for contestant in [*contestants[shift:], *contestants[:shift]]:
            samples = contestant.run(steps + settle)[settle:]
            if turn:
                contestant.turns.append(samples)


def quartiles(samples: Sequence[float]) -> tuple[float, float, float]:
    """Lower quartile, median, upper quartile (linear interpolation)."""
    low, middle, high = np.percentile(np.asarray(samples, dtype=float), [25, 50, 75])
    return float(low), float(middle), float(high)


@dataclass(frozen=True)
class Ratio:
    """Ratio of two contestants' times: median and quartiles over turns."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:.2f} ({self.low:.2f}-{self.high:.2f})"


def ratio(slow: Sequence[Sequence[float]], fast: Sequence[Sequence[float]]) -> Ratio:
    """Computes the ratio within each turn, so that anything that slows a whole turn down cancels.

    Args:
        slow, fast: samples by turn; both have the same number of turns.
    """
    pairs = zip(slow, fast, strict=True)
    low, middle, high = quartiles([float(np.median(a) / np.median(b)) for a, b in pairs])
    return Ratio(middle, low, high)


def fastest(contestants: Sequence[Contestant], side: str = "peer") -> Contestant | None:
    """Returns the contestant of a side with the smallest median; None if the side has none."""
    members = [c for c in contestants if c.side == side]
    return fastest_of(members) if members else None


def fastest_of(contestants: Sequence[Contestant]) -> Contestant:
    """Returns the contestant with the smallest median of at least one."""
    return min(contestants, key=lambda c: quartiles(c.samples)[1])


@dataclass(frozen=True)
class Target:
    """A measured figure and its target.

    Args:
        name: what is compared.
        value: the figure.
        wanted: the bound.
        at_least: whether the figure must not be below the bound (else not above).
        spread: quartiles or another remark, as text.
    """

    name: str
    value: float
    wanted: float
    at_least: bool = True
    spread: str = ""

    @property
    def met(self) -> bool:
        return self.value >= self.wanted if self.at_least else self.value <= self.wanted

    def __str__(self) -> str:
        sign, word = (">=" if self.at_least else "<="), ("met" if self.met else "MISSED")
        spread = f" {self.spread}" if self.spread else ""
        return f"{self.name}: {self.value:.3g}{spread} (target {sign} {self.wanted:g}: {word})"

    def plain(self) -> dict[str, Any]:
        return {**self.__dict__, "met": self.met}


def target_of(
    name: str, slow: Contestant, fast: Contestant, wanted: float, at_least: bool = True
) -> Target:
    """Returns slow / fast with its spread, and the target."""
    found = ratio(slow.turns, fast.turns)
    return Target(name, found.value, wanted, at_least, f"({found.low:.2f}-{found.high:.2f})")


# ---------------------------------------------------------------- tables


def table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Formats plain text with aligned columns: the first to the left, the others to the right."""
    widths = [max(map(len, cells)) for cells in zip(columns, *rows, strict=True)]
    lines = [columns, ["-" * width for width in widths], *rows]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if i == 0 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    )


def timing_table(contestants: Sequence[Contestant], ours: Contestant, limit: Contestant) -> str:
    """Formats one row each: median, quartiles, rate, and the ratio to ours and to the limit."""
    columns = ["", "ms", "quartiles", "per second", "x ours", "x limit", "note"]
    rows = []
    for c in contestants:
        low, middle, high = quartiles(c.samples)
        rate = f"{c.work / middle:,.0f}" if c.work else ""
        to_ours, to_limit = ratio(c.turns, ours.turns), ratio(c.turns, limit.turns)
        quart = f"{low * 1e3:.4g}-{high * 1e3:.4g}"
        cells = [f"{middle * 1e3:.4g}", quart, rate, f"{to_ours.value:.2f}"]
        rows.append([c.name, *cells, f"{to_limit.value:.2f}", c.note])
    return table(columns, rows)


# ---------------------------------------------------------------- results


@dataclass
class Section:
    """One table of a benchmark with its raw numbers.

    Args:
        title: what was measured, with shapes and settings.
        text: the table as printed.
        rows: raw numbers, as plain data.
        targets: figures with a target.
        unavailable: rows that could not be measured, with the reason.
    """

    title: str
    text: str
    rows: list[dict[str, Any]]
    targets: list[Target] = field(default_factory=list)
    unavailable: dict[str, str] = field(default_factory=dict)

    def show(self) -> Section:
        """Prints the section and returns it."""
        print(f"\n{self.title}\n{self.text}")
        for name, reason in self.unavailable.items():
            print(f"not measured: {name}: {reason}")
        for target in self.targets:
            print(target)
        sys.stdout.flush()
        return self

    def plain(self) -> dict[str, Any]:
        return {
            "title": self.title,
            "rows": self.rows,
            "targets": [target.plain() for target in self.targets],
            "unavailable": self.unavailable,
        }


def added(title: str, sides: Sequence[Contestant], limit: float) -> Section:
    """Returns what each side after the second adds to the second, as shares of the first.

    Args:
        sides: the reference, our step without the addition, and our step with each addition;
            one sample per turn.
        limit: the largest share that is allowed.
    """
    reference, plain, *others = sides
    targets = []
    for side in others:
        turns = zip(side.turns, plain.turns, reference.turns, strict=True)
        low, middle, high = quartiles([(a[0] - b[0]) / c[0] for a, b, c in turns])
        name = f"{side.name}: added, share of {reference.name}"
        targets.append(Target(name, middle, limit, False, f"({low:.3f}-{high:.3f})"))
    rows = [[side.name, *(f"{q * 1e3:.4g}" for q in quartiles(side.samples))] for side in sides]
    text = table(["", "lower quartile, ms", "median", "upper"], rows)
    return Section(title, text, [side.plain() for side in sides], targets)


def save(name: str, options: argparse.Namespace, sections: Sequence[Section], peers: Any) -> None:
    """Writes <results>/<name>.json ('<name>-quick.json' for a smoke run)."""
    path = options.results / f"{name}{'-quick' if options.quick else ''}.json"
    record = {
        "benchmark": name,
        "command": _command(name, options),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": machine(options.threads),
        "versions": {"ours": our_versions(), "peers": peers.versions() if peers else {}},
        "sections": [section.plain() for section in sections],
    }
    write_json(path, record)
    print(f"\nraw numbers: {path}")


def _command(name: str, options: argparse.Namespace) -> str:
    """Returns the command without paths of this machine."""
    given = [
        f"--{key}" if value is True else f"--{key} {_place(value)}"
        for key, value in vars(options).items()
        if key not in ("peers", "results") and value not in (False, None)
    ]
    return " ".join([f"python benchmarks/{name.partition('-')[0]}.py", *given])


def _place(value: object) -> object:
    """Returns a path relative to the root of the repository; anything else unchanged."""
    if isinstance(value, Path) and value.is_absolute():
        return os.path.relpath(value, HERE.parent)
    return value


#: Variables that make torch, oneDNN, MKL and our kernels do without features of the processor.
MASKS = ("ATEN_CPU_CAPABILITY", "ONEDNN_MAX_CPU_ISA", "MKL_ENABLE_INSTRUCTIONS")


def machine(threads: int) -> dict[str, Any]:
    """Returns what affects a timing: processor, features, memory, system, current load."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.is_file() else []
    fields = dict(line.split(":", 1) for line in lines if ":" in line)
    fields = {name.strip(): value.strip() for name, value in fields.items()}
    flags = fields.get("flags", fields.get("Features", "")).split()  # Arm has the second
    return {
        "cpu": fields.get("model name", platform.processor() or "unknown"),
        "cores": os.cpu_count(),
        "features": [feature for feature in FEATURES if feature in flags],
        "masked": [f"{name}={os.environ[name]}" for name in MASKS if name in os.environ],
        "memory_gb": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9, 1),
        "system": platform.system(),
        "python": platform.python_version(),
        "threads": threads,
        "load_at_end": [round(load, 2) for load in os.getloadavg()],
    }


def our_versions() -> dict[str, str]:
    """Returns the versions of the package and of the libraries that it computes with."""
    from saelab import __version__

    return {"saelab": __version__} | {name: metadata.version(name) for name in OUR_PACKAGES}


# ---------------------------------------------------------------- peers


class PeerError(SaelabError):
    """A call to the peers failed; the message is theirs."""


class Peers:
    """The peers' process: `call` runs one function of `peer_worker.py` there.

    Args:
        venv: their environment, made by `peers.py`.
        threads: of their torch.

    Raises: SettingError when there is no environment.
    """

    def __init__(self, venv: Path, threads: int) -> None:
        python = venv / "bin" / "python"
        if not python.is_file():
            remedy = "is no environment: make it with 'make peers', or say --peers none"
            raise SettingError("--peers", str(venv), remedy)
        self.log = tempfile.TemporaryFile()  # noqa: SIM115 (closed by `close`)
        self.process = subprocess.Popen(
            [str(python), str(HERE / "peer_worker.py")],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.log,
            text=True,
            env=_peers_environment(threads),
        )
        self.call("threads", n=threads)

    def call(self, function: str, **arguments: Any) -> Any:
        """Raises: PeerError with their message."""
        assert self.process.stdin and self.process.stdout
        try:
            self.process.stdin.write(json.dumps([function, arguments]) + "\n")
            self.process.stdin.flush()
            line = self.process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            raise PeerError(f"the peers' process ended in {function}: {self._last_words()}")
        reply = json.loads(line)
        if "error" in reply:
            raise PeerError(f"{function}: {reply['error']}")
        return reply["result"]

    def versions(self) -> dict[str, str]:
        return self.call("versions")

    def close(self) -> None:
        assert self.process.stdin
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.close()
        self.process.wait(timeout=300)
        self.log.close()

    def _last_words(self) -> str:
        self.log.seek(0)
        lines = self.log.read().decode(errors="replace").strip().splitlines()
        return lines[-1] if lines else "no message (out of memory?)"


@contextlib.contextmanager
def peers_of(options: argparse.Namespace) -> Iterator[Peers | None]:
    """The peers' process while the block runs; None for --peers none."""
    if options.peers == "none":
        yield None
        return
    peers = Peers(Path(options.peers), options.threads)
    try:
        yield peers
    finally:
        peers.close()


def _peers_environment(threads: int) -> dict[str, str]:
    """Returns our environment without PYTHONPATH, hub or tracking service, with the threads set."""
    kept = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    offline = dict.fromkeys(("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "TRANSFORMERS_OFFLINE"), "1")
    pools = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS"), str(threads))
    return kept | offline | pools | {"WANDB_MODE": "disabled", "TOKENIZERS_PARALLELISM": "false"}
