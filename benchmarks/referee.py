"""Attacks the decision keep / discard / more-seeds with a driver that submits nothing of value.

    python benchmarks/referee.py [--quick]

Over 500 submissions (no-ops, drifts of L0 inside the tolerance, changed seeds, repeats under other
names after their run was deleted, extension by seeds until it helps) at most 5% may be kept, and at
most 5% of what is kept may be worthless; of 50 planted effects of the smallest size of interest,
submitted among them, at least 80% are to be kept. "Keep if better" is measured on the same
submissions. Cells are simulated (saelab/verdict/simulation/adversary.py); the ledger, the verdict
and the decision are those of a launch.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from common import Section, Target, parser, save, scratch, table

from saelab.verdict.simulation.adversary import Count, attack
from saelab.verdict.simulation.cells import SD, SESOI

#: Standard deviation of a cell, correlation within a seed: the shipped study's, and harder ones.
CASES = ((SD, 0.0), (SESOI / 3, 0.6), (0.6 * SESOI, 0.0))
MOST_FALSE, LEAST_POWER = 0.05, 0.8


def main() -> None:
    options = parser(__doc__ or "").parse_args()
    worthless, planted = (90, 20) if options.quick else (500, 50)
    sections = []
    for sd, correlation in CASES[: 1 if options.quick else None]:
        with scratch() as folder:
            counts = attack(
                Path(folder), worthless=worthless, planted=planted, sd=sd, correlation=correlation
            )
        title = f"cells with sd {sd:g} (smallest effect of interest {SESOI:g}), r = {correlation:g}"
        sections.append(section(title, counts))
    save("referee", options, [each.show() for each in sections], None)


def section(title: str, counts: dict[str, Count]) -> Section:
    heads = ["rule", "worthless", "kept", "of submissions", "of keeps", "planted", "kept"]
    rows = [[rule, *cells(count)] for rule, count in counts.items()]
    raw: list[dict[str, Any]] = [
        {"name": rule, **vars(count), "of_keeps": count.of_keeps, "power": count.power}
        for rule, count in counts.items()
    ]
    judged = counts["decision"]
    targets = [
        Target("false keeps, of worthless submissions", judged.of_submissions, MOST_FALSE, False),
        Target("false keeps, of all keeps", judged.of_keeps, MOST_FALSE, False),
        Target("planted effects that are kept", judged.power, LEAST_POWER, True),
    ]
    return Section(title, table(heads, rows), raw, targets)


def cells(count: Count) -> list[str]:
    return [
        str(count.worthless),
        str(count.false_keeps),
        f"{count.of_submissions:.1%}",
        f"{count.of_keeps:.1%}",
        str(count.planted),
        f"{count.power:.0%}",
    ]


if __name__ == "__main__":
    main()
