"""Results of a study on synthetic activations, as data and as lines."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np

from saelab import stats
from saelab.evals.base import Row
from saelab.launch.synthetic.matched import at_target, by_seed, differences
from saelab.launch.synthetic.study import SyntheticStudyConfig
from saelab.launch.synthetic.training import Outcome
from saelab.runtime.counting import count
from saelab.sae import SAE
from saelab.study.tuning import describe_edge
from saelab.verdict.effect import estimate_by_seed
from saelab.verdict.judge import Rules, choose_words

#: Metrics of the true dictionary with the true code.
ORACLE = ("oracle_fvu", "oracle_l0")


def table(
    config: SyntheticStudyConfig,
    outcomes: Sequence[Outcome],
    trials: Mapping[str, Mapping[str, float | None]] | None = None,
) -> dict[str, Any]:
    """Returns a summary of the outcomes, ready for JSON and for `saelab.report.figures.synthetic`.

    Args:
        trials: of the tuning, see `tune`.

    Returns:
        config: all settings.
        seeds: of the columns below.
        values: arm -> metric -> value at the target L0 of each seed, None where it is missing.
        missing: why, as sentences.
        l0: arm -> level -> measured L0 of each seed.
        scalars: arm -> scalar of its activation or input scaling -> value of every cell, in the
            order of training.
        differences: arm -> metric -> arm minus baseline over the seeds that have both: n, mean, sd
            and the 95% t interval from low to high; {} without a baseline.
        words: arm -> judged metric -> word, mean, ends of the interval and its level, which holds
            for all words together; or the reason why there is none.
        trials: of the tuning.
        oracle: of the true dictionary with the true code, the mean over seeds.
    """
    found: dict[str, Any] = {"config": config.model_dump(mode="json")}
    found["seeds"] = list(dict.fromkeys(outcome.seed for outcome in outcomes))
    found |= {"values": {}, "missing": [], "l0": {}, "scalars": {}, "differences": {}}
    found |= {"words": {}, "trials": dict(trials or {})}
    rows = {
        name: at_target(outcomes, name, config.target_l0, config.tolerance)
        for name in dict.fromkeys([*config.metrics, *config.judged])
    }
    for arm in config.arms:
        own = [outcome for outcome in outcomes if outcome.arm == arm]
        mine = {name: [row for row in of if row.arm == arm] for name, of in rows.items()}
        found["values"][arm] = {name: [row.value for row in of] for name, of in mine.items()}
        found["missing"] += _missing(arm, [row for of in mine.values() for row in of])
        found["l0"][arm] = {
            f"{level:g}": [o.value("l0") for o in own if o.level == level]
            for level in config.levels
        }
        found["scalars"][arm] = _columns([_scalars(o.sae) for o in own])
        if config.baseline not in (None, arm):
            found["differences"][arm] = {
                name: _paired(differences(of, arm, config.baseline)) for name, of in rows.items()
            }
            found["words"][arm] = {
                name: _word(config, name, rows[name], arm) for name in config.judged
            }
    found["oracle"] = {
        name: stats.mean_stderr(outcome.value(name) for outcome in outcomes)[0] for name in ORACLE
    }
    return found


def _missing(arm: str, rows: Sequence[Row]) -> list[str]:
    """Returns a sentence for each seed and reason, with all metrics that are missing for it."""
    metrics: dict[tuple[int, str], list[str]] = {}
    for row in rows:
        if row.value is None:
            metrics.setdefault((row.seed, row.reason), []).append(row.metric)
    return [
        f"{arm}, seed {seed}, {', '.join(names)}: {reason}"
        for (seed, reason), names in sorted(metrics.items())
    ]


def _word(
    config: SyntheticStudyConfig, metric: str, rows: Sequence[Row], arm: str
) -> dict[str, Any]:
    """Judges one metric of an arm by an interval that holds for all words of the study together."""
    judged, baseline = config.judged[metric], config.baseline or ""
    mine, theirs = by_seed(rows, arm), by_seed(rows, baseline)
    lost = sum(row.value is None for row in rows if row.arm in (arm, baseline))
    if lost or len(mine) < 2:
        reason = f"{count(lost, 'cell')} without a value" if lost else "one seed has no interval"
        return {"word": None, "reason": reason}
    rules = Rules(primary=metric, direction=judged.direction, sesoi=judged.sesoi)
    level = rules.level((len(config.arms) - 1) * len(config.judged))
    effect = estimate_by_seed(mine, theirs)
    low, high = (float(end) for end in effect.interval(level))
    gain, one, other = (np.array(rules.sign * value) for value in (float(effect.mean), low, high))
    ends = np.minimum(one, other), np.maximum(one, other)
    word = str(choose_words(gain, *ends, judged.sesoi))
    return {"word": word, "mean": float(effect.mean), "low": low, "high": high, "level": level}


def study_lines(table: Mapping[str, Any]) -> Iterator[str]:
    """Lines of a `table`: metrics and scalars with their range, then paired differences."""
    config, n = table["config"], len(table["seeds"])
    yield f"at L0 {config['target_l0']:g}, mean over seeds (lowest to highest), {count(n, 'seed')}"
    for arm, metrics in table["values"].items():
        yield arm
        for name, values in metrics.items():
            yield f"  {name:20s} {_summary(values)}"
        for name, values in table["scalars"][arm].items():
            yield f"  {name:20s} {_summary(values)} at all levels"
    yield "truth"
    for name, value in table["oracle"].items():
        yield f"  {name:20s} {'missing' if value is None else f'{value:.4f}'}"
    if table["differences"]:
        yield f"arm minus {config['baseline']!r}, paired by seed: mean [95% t interval]"
    for arm, metrics in table["differences"].items():
        yield arm
        for name, paired in metrics.items():
            yield f"  {name:20s} {_interval(paired)}"
    if table["words"]:
        yield "words, by intervals that hold for all of them together"
    for arm, metrics in table["words"].items():
        for name, judged in metrics.items():
            yield f"  {arm:24s} {name:12s} {_judged(judged)}"
    for arm, rates in table["trials"].items():
        tried = ", ".join(f"{rate}: {_number(value)}" for rate, value in rates.items())
        yield f"learning rates of {arm}: {tried}{_edge(config, arm, rates)}"
    yield from (f"missing: {sentence}" for sentence in table["missing"])


def _scalars(sae: SAE) -> dict[str, float]:
    parts = (sae.activation, sae.scaling)
    return {name: value for part in parts if part for name, value in part.scalars().items()}


def _columns(records: Sequence[Mapping[str, float]]) -> dict[str, list[float]]:
    return {name: [record[name] for record in records] for name in (records[0] if records else ())}


def _paired(row: Sequence[float]) -> dict[str, Any]:
    return asdict(stats.paired_summary(row)) if row else {"n": 0, "mean": None}


def _summary(values: Sequence[float | None]) -> str:
    there = [value for value in values if value is not None]
    lost = len(values) - len(there)
    why = f" [{lost} missing]" if lost else ""
    if not there:
        return f"missing{why}"
    return f"{sum(there) / len(there):.4f} ({min(there):.4f} to {max(there):.4f}){why}"


def _interval(paired: Mapping[str, Any]) -> str:
    if paired["mean"] is None:
        return "missing: no seed has both"
    if paired["low"] is None:
        return f"{paired['mean']:+.4f}, one seed"
    return f"{paired['mean']:+.4f} [{paired['low']:+.4f}, {paired['high']:+.4f}]"


def _judged(judged: Mapping[str, Any]) -> str:
    if judged["word"] is None:
        return f"no word: {judged['reason']}"
    ends = f"[{judged['low']:+.4f}, {judged['high']:+.4f}]"
    return f"{judged['word']}: {judged['mean']:+.4f} {ends}"


def _edge(config: Mapping[str, Any], arm: str, rates: Mapping[str, float | None]) -> str:
    """Says that an arm's best rate is the smallest or largest tried; '' where it is not."""
    if all(value is None for value in rates.values()):
        return ""
    best = float(config["otherwise"].get(arm, {}).get("lr", config["train"]["lr"]))
    note = describe_edge(best, [float(rate) for rate in rates])
    return f" ({note})" if note else ""


def _number(value: float | None) -> str:
    return "missing" if value is None else f"{value:.4f}"
