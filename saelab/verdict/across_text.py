"""Verdicts over settings in words: the tables of `saelab verdict` and of a launch's printout."""

from __future__ import annotations

from collections.abc import Sequence

from saelab.runtime.counting import count
from saelab.verdict.across_settings import AcrossSettings
from saelab.verdict.summary import align_columns, span_text

#: What the prediction interval is about, printed with every general word.
COVERS_SETTINGS = (
    "A word for a new setting holds if the new setting is like these ones, as if all were drawn "
    "from one population."
)


def across_text(across: Sequence[AcrossSettings]) -> str:
    """Words of every setting, then of every arm over the settings; '' without settings."""
    if not across:
        return ""
    names = [one.setting for one in across[0].settings]
    words = [["arm", *names]]
    words += [[_name(a), *(one.word for one in a.settings)] for a in across]
    heads = ["arm", "settings", "mean", "interval", "tau", "I²", "in a new setting"]
    lines = [[*heads, "over these settings", "for a new setting"]]
    for a in across:
        mean = "-" if a.mean is None else f"{a.mean:+.4f}"
        lines.append(
            [
                *(_name(a), f"{a.n}/{len(a.settings)}", mean, span_text(a.low, a.high)),
                *("-" if a.tau is None else f"{a.tau:.2g}", _share(a.i2)),
                *(span_text(a.new_low, a.new_high), a.mean_word, a.word),
            ]
        )
    parts = [f"words in {count(len(names), 'setting')}:", align_columns(words), ""]
    parts += [f"over settings (coverage {1 - min(a.level for a in across):.2%}):"]
    parts += [align_columns(lines), "", *(f"{a.arm}: {a.reason}" for a in across)]
    return "\n".join([*parts, "", COVERS_SETTINGS])


def _name(a: AcrossSettings) -> str:
    return a.arm if a.against == "baseline" else f"{a.arm} - {a.against}"


def _share(value: float | None) -> str:
    return "-" if value is None else f"{value:.0%}"
