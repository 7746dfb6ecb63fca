"""The rows of the study as Markdown, for a README: `study.md`."""

from __future__ import annotations

import math
from collections.abc import Sequence

from recipes.clipping_study.findings import Finding, Row
from recipes.clipping_study.verdicts import KINDS, verdict


def markdown(found: Sequence[Finding]) -> str:
    """A section for each experiment: its verdict, the facts, and a line for each row."""
    return "\n".join(_section(number, each) for number, each in enumerate(found, 1))


def _section(place: int, found: Finding) -> str:
    experiment, said = found.experiment, verdict(found)
    lines = [
        f"## {place}. {experiment.title}: {said.word}",
        "",
        f"Claim: {experiment.claim}",
        "",
        experiment.definition,
        "",
        *(f"- {fact}" for fact in said.facts),
        "",
    ]
    steps = any(row.steps for row in found.rows)
    head = ["condition", "clipping", "setting", experiment.score, "failed", "clipped"]
    head += ["steps to target"] if steps else []
    lines += [f"| {' | '.join(head)} |", f"|{'---|' * len(head)}"]
    return "\n".join([*lines, *(_line(row) for row in found.rows), ""])


def _line(row: Row) -> str:
    setting = ", ".join(f"{name} {value:g}" for name, value in row.setting.items())
    cells = [
        row.arm,
        KINDS[row.kind],
        setting,
        f"{_number(row.mean)} ± {_number(row.spread)}",
        f"{row.failures} of {len(row.values)}",
        f"{100 * row.others['clipped']:.0f} %",
    ]
    if row.steps:
        cells.append(f"{row.others['steps']:.0f} ({row.others['reached']:.0f} reached it)")
    return f"| {' | '.join(cells)} |"


def _number(value: float) -> str:
    return f"{value:.3f}" if math.isfinite(value) else "–"
