"""Records kept for good beside plan.toml: what was registered first, and every attempt.

    .saelab/plan.json         plan, base settings and run table when the first run started
    .saelab/attempts.jsonl    one line when an attempt starts and one when it ends

They may be changed later; each change is then shown as a deviation wherever the study is. An
attempt that was killed has no second line, and a run folder that was deleted keeps its attempts.
A last line that a loss of power cut short is no line; any other that can't be read is refused.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field

from saelab.config import digest
from saelab.errors import DamageError, SaelabError, UsageError
from saelab.storage.atomic import LINE_REMEDY, append_line, read_json, read_lines, write_json
from saelab.storage.lock import wait_for_lock
from saelab.storage.validation import Loose, Number, validate
from saelab.study.plan import BaseConfig, PlanConfig, Run
from saelab.study.registration import base_changes, describe_base, describe_runs, run_changes

FOLDER, PLAN, ATTEMPTS = ".saelab", "plan.json", "attempts.jsonl"
#: Settings of plan.toml that decide no verdict.
UNREGISTERED = {"base"}
#: What to do about a registered plan that is not as it was written.
UNREADABLE = (
    "take it from a copy, it says what was registered before the first run (if you delete it, the "
    "next launch registers the plan anew, as it is then, and shows no earlier change of it as a "
    "deviation; finished runs keep their own plan and its hash)"
)


class _Registered(Loose):
    hash: str
    plan: dict[str, Any]
    base: dict[str, Any] | None = None
    runs: dict[str, Any] | None = None
    settings: dict[str, dict[str, Any]] = Field(default_factory=dict)
    rest: str = ""


class _Start(Loose):
    start: Annotated[int, Field(ge=1, lt=10**9)]
    run: str
    started: str


class _End(Loose):
    end: int
    outcome: str
    reason: str
    seconds: Number | None


def registered_settings(plan: PlanConfig) -> dict[str, Any]:
    """Returns the part of a plan that is registered, as plain data; without further settings they
    are left out, so that the hash of such a plan is that of earlier versions."""
    exclude = UNREGISTERED if plan.settings else UNREGISTERED | {"settings"}
    return plan.model_dump(mode="json", exclude=exclude)


def plan_hash(plan: PlanConfig) -> str:
    """A 16-character hash of what is registered."""
    return digest(registered_settings(plan))


def register(
    root: Path,
    plan: PlanConfig,
    base: BaseConfig | None = None,
    runs: Mapping[str, Run] | None = None,
    setting: str = "",
) -> tuple[str, ...]:
    """Stores plan, base settings and run table of the study's first run.

    A file without base settings or run table, as older versions and `saelab template` write it,
    gets them from the first launch that has them.

    Args:
        root: folder of plan.toml.
        setting: name of the plan's further setting that `base` is of; '' for its own base.

    Returns: the deviations from what is stored, as in 'seeds: 8 -> 4'.
    """
    file = root / FOLDER / PLAN
    if file.is_file():
        stored = _read_registered(file)
    else:
        stored = {"hash": plan_hash(plan), "plan": registered_settings(plan), "at": _now()}
    rest = _rest(stored)
    rest["runs"] = rest["runs"] or (describe_runs(runs) if runs else None)
    if base and setting:
        rest["settings"] = {setting: describe_base(base)} | rest.get("settings", {})
    elif base:
        rest["base"] = rest["base"] or describe_base(base)
    if not file.is_file() or any(rest[name] != stored.get(name) for name in rest):
        write_json(file, stored | rest | {"rest": digest(rest)})
    return deviations(root, plan, base, runs, setting)


def _rest(stored: Mapping[str, Any]) -> dict[str, Any]:
    """Returns what is stored besides the plan; settings only where there are some, so that the
    digest of a study without them is that of earlier versions."""
    settings = {"settings": stored["settings"]} if stored.get("settings") else {}
    return {name: stored.get(name) for name in ("base", "runs")} | settings


def deviations(
    root: Path,
    plan: PlanConfig,
    base: BaseConfig | None = None,
    runs: Mapping[str, Run] | None = None,
    setting: str = "",
) -> tuple[str, ...]:
    """Lists how plan, base settings and run table differ from the registered ones; nothing is said
    of what is not registered or not given."""
    file = root / FOLDER / PLAN
    if not file.is_file():
        return ()
    stored = _read_registered(file)
    lines = [*changes(PlanConfig.parse(stored["plan"], where=file.name), plan)]
    old = stored.get("settings", {}).get(setting) if setting else stored.get("base")
    if base and old:
        where = f"settings.{setting}" if setting else "base"
        lines += base_changes(old, base, where)
    if runs and stored.get("runs"):
        lines += run_changes(stored["runs"], runs)
    return tuple(lines)


def _read_registered(file: Path) -> dict[str, Any]:
    """Raises: DamageError when what was registered is not as it was written."""
    stored = validate(read_json(file, UNREADABLE), _Registered, file, UNREADABLE)
    old = PlanConfig.parse(stored["plan"], where=file.name)
    rest = _rest(stored)
    of_rest = digest(rest) if any(rest.values()) else stored.get("rest")
    hashes = (plan_hash(old), digest(stored["plan"]))
    if stored["hash"] not in hashes or stored.get("rest") != of_rest:
        raise DamageError(f"{file} was changed after it was written: {UNREADABLE}")
    return stored


def changes(old: PlanConfig, new: PlanConfig) -> tuple[str, ...]:
    """Lists the differences between two plans, as in 'seeds: 8 -> 4'."""
    before, after = registered_settings(old), registered_settings(new)
    return tuple(
        f"{name}: {_plain(before.get(name, []))} -> {_plain(after.get(name, []))}"
        for name in before | after
        if before.get(name) != after.get(name)
    )


def _plain(value: Any) -> str:
    return json.dumps(value)


# ---- attempts --------------------------------------------------------------------------------


@dataclass(frozen=True)
class Attempt:
    """One start of a run.

    Args:
        number: counted from 1 over all runs of the study.
        run: 'run_3'.
        started: time in UTC.
        outcome: 'complete', 'failed' (exit code 1), 'refused' (2), 'interrupted', or 'no end' for
            one that was killed or is still at work.
        reason: its last line of stderr where it has one.
        seconds: how long it took; None without an end.
    """

    number: int
    run: str
    started: str
    outcome: str = "no end"
    reason: str = ""
    seconds: float | None = None

    def line(self) -> str:
        took = "" if self.seconds is None else f" after {self.seconds:.0f} s"
        why = f": {self.reason}" if self.reason else ""
        return f"{self.number}. {self.run}, {self.started}, {self.outcome}{took}{why}"


@contextmanager
def attempt(root: Path, run: str) -> Iterator[int]:
    """Writes down an attempt at `run` and how it ended; gives its number."""
    file = root / FOLDER / ATTEMPTS
    with wait_for_lock(file, "is writing down an attempt"):  # two launches, two numbers
        number = 1 + len(attempts(root))
        append_line(file, _line(start=number, run=run, started=_now(), pid=os.getpid()))
    start, outcome, reason = time.monotonic(), "complete", ""
    try:
        yield number
    except KeyboardInterrupt:
        outcome = "interrupted"
        raise
    except Exception as error:
        outcome = "refused" if isinstance(error, UsageError) else "failed"
        said = "" if isinstance(error, SaelabError) else f"{type(error).__name__}: "
        reason = (said + str(error)).splitlines()[-1] if str(error) else type(error).__name__
        raise
    finally:
        seconds, reason = round(time.monotonic() - start, 1), _without_places(reason, root)
        append_line(file, _line(end=number, outcome=outcome, reason=reason, seconds=seconds))


def _without_places(reason: str, root: Path) -> str:
    """The reason with paths as seen from the study's folder: summaries and reports are shared."""
    for place, short in ((root.resolve(), ""), (Path.home(), "~/")):
        if place != Path("/"):
            reason = reason.replace(f"{place}/", short)
    return reason


def attempts(root: Path) -> list[Attempt]:
    """Every attempt of the study, in order.

    Raises: DamageError when the ledger can't be read.
    """
    found: dict[int, Attempt] = {}
    for where, line in read_lines(root / FOLDER / ATTEMPTS):
        if isinstance(line, dict) and "start" in line:
            validate(line, _Start, where, LINE_REMEDY)
            found[line["start"]] = Attempt(line["start"], line["run"], line["started"])
            continue
        validate(line, _End, where, LINE_REMEDY)
        if line["end"] not in found:
            raise DamageError(
                f"{where} ends attempt {line['end']}, which never began: {LINE_REMEDY}"
            )
        ended = {name: line[name] for name in ("outcome", "reason", "seconds")}
        found[line["end"]] = replace(found[line["end"]], **ended)
    return list(found.values())


def as_dicts(found: list[Attempt]) -> list[dict[str, Any]]:
    return [asdict(attempt) for attempt in found]


def _line(**data: Any) -> str:
    return json.dumps(data)


def _now() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
