"""Results of a search as an HTML page and as JSON."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Mapping, Sequence
from html import escape
from operator import attrgetter
from pathlib import Path

from trainer.loggers.files import as_json, replace_file
from trainer.report.axis import number
from trainer.report.chart import Chart, Series, draw
from trainer.report.html import document, section, table, tiles
from trainer.tuner.clip_limit import ClipSuggestion
from trainer.tuner.learning_rate import RateSuggestion
from trainer.tuner.trial import MEASURES

Suggestions = Mapping[str, ClipSuggestion] | Mapping[str, RateSuggestion]

TITLES = {"find_clip": "Clip limit", "find_lr": "Learning rate"}


def write_findings(
    folder: Path, findings: Mapping[str, Suggestions], notes: Sequence[str], steps: int
) -> list[Path]:
    """Write ``find_clip.html``/``.json`` and ``find_lr.html``/``.json``; return their paths.

    ``findings`` are suggestions by option and optimizer; ``notes`` explain them.
    """
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for kind, found in findings.items():
        records = {name: each.record() for name, each in found.items()}
        text = json.dumps(as_json({"steps": steps, "optimizers": records}), allow_nan=False)
        for suffix, content in (("json", text), ("html", _page(folder, kind, found, notes))):
            path = folder / f"{kind}.{suffix}"
            replace_file(path, [content.encode(errors="backslashreplace")], path.name)
            written.append(path)
    return written


def _page(folder: Path, kind: str, found: Suggestions, notes: Sequence[str]) -> str:
    """Return the page of one search as text."""
    facts, sections = [], ""
    for name, each in found.items():
        if isinstance(each, ClipSuggestion):
            label, value, charts, trials = "limit", each.limit, _clip_charts(each), _trials(each)
        else:
            label, value, charts, trials = "learning rate", each.lr, _rate_charts(each), ""
        facts.append((f"{label} of {name}", "–" if value is None else f"{value:g}", ""))
        drawn = f'<div class="charts">{"".join(map(draw, charts))}</div>'
        sections += section(name, f"<p>{escape(each.sentence())}</p>{drawn}{trials}")
    explained = "".join(f"<p>{escape(note)}</p>" for note in notes)
    return document(
        f"{TITLES[kind]} of {' / '.join(folder.resolve().parts[-3:]).lstrip('/ ')}",
        f"<p>Written {time.strftime('%Y-%m-%d %H:%M')}.</p>{tiles(facts)}",
        sections + section("How to read it", explained),
    )


def _rate_charts(found: RateSuggestion) -> list[Chart]:
    marks = {"suggested": found.lr, "lowest": found.lowest, "diverged": found.diverged}
    return [
        Chart(
            "Loss against that of the model at rest", "learning rate", "change of the loss",
            [Series("change, smoothed", found.rates, _cut(found.change))], counts=False,
            note=found.reason, marks={n: value for n, value in marks.items() if value is not None},
        ),
        Chart(
            "Loss of each step", "learning rate", "loss",
            [
                Series("training", found.rates, _cut(found.losses)),
                Series("the same batches at rest", found.rates, found.at_rest, 6, "faint"),
            ],
            counts=False,
        ),
    ]  # fmt: skip


def _cut(values: Sequence[float]) -> list[float]:
    """Replace values far above the first ones by gaps, for a readable scale."""
    start = values[: max(1, len(values) // 4)]
    low, high = min(values, default=0.0), max(start, default=0.0)
    top = high + max(high - low, abs(high) * 0.01)
    return [value if value <= top else math.nan for value in values]


def _clip_charts(found: ClipSuggestion) -> list[Chart]:
    """Return charts of the final losses by limit, of some trials, and of the gradients."""
    *limited, free = found.trials
    limits = [each.limit for each in limited]
    ends = [each.end_loss if each.end_loss < math.inf else math.nan for each in limited]
    last = Chart(
        "Loss at the end of a trial", "clip limit", "mean loss of the last quarter",
        [Series("clipped", limits, ends)], counts=False,
        note="A trial that failed is a gap." if any(map(math.isnan, ends)) else "",
        marks={} if found.limit is None else {"recommended": found.limit},
    )  # fmt: skip
    if math.isfinite(free.end_loss):
        level = [free.end_loss] * 2
        last.series.append(Series("no clipping", [limits[0], limits[-1]], level, style="limit"))
    norms = Chart("Gradients without clipping", "step of the trial", MEASURES[found.kind])
    norms.series = [Series("as they are", range(1, len(free.norms) + 1), free.norms, noisy=True)]
    if found.limit is not None and free.norms:
        level = [found.limit] * 2
        norms.series.append(Series("recommended", [1, len(free.norms)], level, style="limit"))
    losses = Chart("Losses of some trials", "step of the trial", "loss")
    best = min(limited, key=attrgetter("rank"))
    for each in found.trials:
        if each in (limited[0], best, limited[-1], free) or each.limit == found.limit:
            name, colour = f"limit {each.limit:g}", len(losses.series)
            name, colour = ("no clipping", 6) if each is free else (name, colour)
            steps = range(1, len(each.losses) + 1)
            losses.series.append(Series(name, steps, _cut(each.losses), colour, noisy=True))
    return [last, losses, norms]


def _trials(found: ClipSuggestion) -> str:
    """Return a table of all trials by limit."""
    rows = []
    for each in found.trials:
        free = math.isinf(each.limit)
        as_good = bool(found.as_good) and not found.needed if free else each.limit in found.as_good
        rows.append([
            "none" if free else f"{each.limit:g}",
            "failed" if math.isinf(each.end_loss) else number(each.end_loss),
            f"{100 * each.clipped_share:.0f} %", f"{each.skipped}", f"{each.steps}",
            "yes" if as_good else "",
        ])  # fmt: skip
    heads = ("limit", "loss at the end", "clipped", "not finite", "steps", "as good as the best")
    percents = " · ".join(f"{p} %: {number(value)}" for p, value in found.percentiles.items())
    return (
        f"<h3>Trials</h3><p>Percentiles of the {MEASURES[found.kind]} without clipping: "
        f"{percents}</p>{table('Trials', heads, rows)}"
    )
