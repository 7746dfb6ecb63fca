"""Verdicts of the experiments on the claims that they test, by rules fixed before the run."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from recipes.clipping_study.findings import Finding, Row
from trainer.report.axis import number

ADAPTIVE = ("AutoClip", "MedianClip", "ZClip", "AdaGC", "AGC", "SPAM")
LAYERWISE = ("LayerClip", "AdaGC", "AGC")


@dataclass
class Verdict:
    """``word`` is "holds", "holds in part" or "not found here"; ``facts`` are the reasons."""

    word: str
    facts: list[str]


def better(a: Row, b: Row, high: bool = False) -> bool:
    """Return true if row ``a`` is clearly better than ``b``.

    That is: fewer failures where those differ, else a difference of the means of more than two
    standard errors.
    """
    if a.failures != b.failures:
        return a.failures < b.failures
    if not (math.isfinite(a.mean) and math.isfinite(b.mean)):
        return False
    count = len(a.values)
    error = math.sqrt((a.spread**2 + b.spread**2) / count) if count > 1 else 0.0
    difference = a.mean - b.mean if high else b.mean - a.mean
    return difference > 2.0 * error


def verdict(found: Finding) -> Verdict:
    """Return the verdict of an experiment."""
    return RULES[found.experiment.name](found)


def _recurrent(found: Finding) -> Verdict:
    """Judge recurrent networks.

    The claim holds where without clipping most trainings fail at every length, and norm clipping
    keeps most alive up to 100 steps at least; in part where clipping is clearly better at some
    length.
    """
    arms = found.arms()
    free = [found.of(arm, "none")[0] for arm in arms]
    bound = [found.of(arm, "NormClip")[0] for arm in arms]
    most = len(free[0].values) / 2
    long = [row for arm, row in zip(arms, bound, strict=True) if int(arm) >= 100] or bound
    holds = all(r.failures > most for r in free) and all(r.failures < most for r in long)
    helped = any(better(b, f, high=True) for b, f in zip(bound, free, strict=True))
    facts = [
        f"Failed of {len(free[0].values)}, at {', '.join(arms)} steps: "
        + "; ".join(
            f"{name} {', '.join(str(found.of(arm, kind)[0].failures) for arm in arms)}"
            for kind, name in KINDS.items()
            if all(found.of(arm, kind) for arm in arms)
        )
        + "."
    ]
    widest = max(arms, key=lambda arm: sum(row.arm == arm for row in found.rows))
    rows = sorted((r for r in found.rows if r.arm == widest), key=lambda r: (r.failures, -r.mean))
    order = ", ".join(f"{KINDS[row.kind]} {row.failures}" for row in rows)
    facts.append(f"All kinds at {widest} steps, by failures: {order}.")
    return Verdict(_word(holds, helped), facts)


def _warmup(found: Finding) -> Verdict:
    """Judge clipping in place of a warm-up.

    The claim holds where the best with clipping alone is clearly better than the best with neither,
    and not clearly worse than the best with warm-up alone; in part where only the first is so.
    """
    short, long = found.arms()[0], found.arms()[-1]
    best = {
        (arm, kind): min(found.of(arm, kind), key=lambda row: (row.failures, row.median))
        for arm in (short, long)
        for kind in ("none", "NormClip")
    }
    neither, clip = best[short, "none"], best[short, "NormClip"]
    warm, both = best[long, "none"], best[long, "NormClip"]
    facts = [
        f"Best loss with neither {_of(neither)}, with clipping alone {_of(clip)}, with a warm-up "
        f"alone {_of(warm)}, with both {_of(both)}."
    ]
    rate = max(row.setting["lr"] for row in found.rows)
    for arm in (short, long):
        rows = [row for row in found.rows if row.arm == arm and row.setting["lr"] == rate]
        told = ", ".join(f"{_limit(row)} {_of(row)}, {row.failures} failed" for row in rows)
        facts.append(f"At the highest rate, {rate:g}, with a warm-up of {arm} steps: {told}.")
    holds = better(clip, neither) and not better(warm, clip)
    return Verdict(_word(holds, better(clip, neither)), facts)


def _speed(found: Finding) -> Verdict:
    """Judge speed.

    The claim holds where clipping with decay needs at least 30 % fewer steps than decay alone in
    every model; in part where it does in some.
    """
    facts, saved = [], []
    for model in dict.fromkeys(arm.rpartition(", ")[0] for arm in found.arms()):
        free = found.of(f"{model}, decay", "none")[0]
        bound = found.of(f"{model}, decay", "NormClip")[0]
        constant = found.of(f"{model}, constant", "NormClip")[0]
        saved.append(1.0 - bound.others["steps"] / free.others["steps"])
        facts.append(
            f"{model}: decay alone needs {_steps(free)}, clipping with decay {_steps(bound)}, "
            f"clipping with a constant rate {_steps(constant)}: {100 * saved[-1]:.0f} % fewer."
        )
    return Verdict(_word(min(saved) >= 0.3, max(saved) >= 0.3), facts)


def _spikes(found: Finding) -> Verdict:
    """Judge adaptive kinds under spikes.

    The claim holds where some adaptive kind is clearly better than the tuned norm limit under every
    optimizer; in part under one.
    """
    facts, won = [], []
    for arm in found.arms():
        rows = {row.kind: row for row in found.rows if row.arm == arm}
        fixed, free = rows["NormClip"], rows["none"]
        best = min((rows[k] for k in ADAPTIVE if k in rows), key=lambda row: row.mean)
        clear = [KINDS[k] for k in ADAPTIVE if k in rows and better(rows[k], fixed)]
        won.append(bool(clear))
        facts.append(
            f"{arm}: no clipping {_of(free)} with {free.failures} failed; a tuned norm limit "
            f"{_of(fixed)}; the best adaptive kind, {KINDS[best.kind]}, {_of(best)}. Clearly "
            f"better than the tuned limit: {', '.join(clear) or 'none'}."
        )
        worst = {k: row.others.get("worst", math.nan) for k, row in rows.items()}
        facts.append(
            f"{arm}, the worst of the four settings that were tried: "
            + ", ".join(f"{KINDS[kind]} {number(value)}" for kind, value in worst.items())
            + "."
        )
    return Verdict(_word(all(won), any(won)), facts)


def _half(found: Finding) -> Verdict:
    """Judge half precision.

    The claim holds where no kind is clearly better in fp32 than in fp16, or the reverse, and
    clipping gradients that are still scaled is clearly worse; in part where one of the two is so.
    """
    arms = found.arms()
    pairs = [(found.of(arms[0], k)[0], found.of(arms[1], k)[0]) for k in found.kinds()]
    alike = not any(better(a, b) or better(b, a) for a, b in pairs)
    wrong = [row for row in found.rows if row.arm == arms[2]]
    worse = all(better(found.of(arms[1], row.kind)[0], row) for row in wrong)
    facts = [
        "fp32 against fp16: "
        + "; ".join(
            f"{KINDS[a.kind]} {_of(a)} against {_of(b)}, "
            f"{100 * a.others['clipped']:.0f} % against {100 * b.others['clipped']:.0f} % clipped"
            for a, b in pairs
        )
        + ".",
        "Clipped while still scaled: "
        + "; ".join(
            f"{KINDS[row.kind]} {_of(row)}, {row.failures} of {len(row.values)} failed"
            for row in wrong
        )
        + ".",
    ]
    return Verdict(_word(alike and worse, alike or worse), facts)


def _scales(found: Finding) -> Verdict:
    """Judge layers of different scale.

    The claim holds where a kind with limits by layer is clearly better than the joint norm at 1:100
    under every optimizer; in part under one.
    """
    facts, won = [], []
    for arm in found.arms():
        rows = {row.kind: row for row in found.rows if row.arm == arm}
        clear = [KINDS[k] for k in LAYERWISE if better(rows[k], rows["NormClip"])]
        if arm.endswith("1:100"):
            won.append(bool(clear))
        told = ", ".join(f"{KINDS[row.kind]} {_of(row)}" for row in rows.values())
        facts.append(f"{arm}: {told}. Clearly better than norm: {', '.join(clear) or 'none'}.")
    return Verdict(_word(all(won), any(won)), facts)


def _word(holds: bool, in_part: bool) -> str:
    return "holds" if holds else "holds in part" if in_part else "not found here"


def _of(row: Row) -> str:
    if not math.isfinite(row.mean):
        return "given up"
    spread = f" ± {number(float(f'{row.spread:.2g}'))}" if math.isfinite(row.spread) else ""
    return f"{number(float(f'{row.mean:.3g}'))}{spread}"


def _limit(row: Row) -> str:
    limit = row.setting.get("limit")
    return "no clipping" if limit is None else f"limit {limit:g}"


def _steps(row: Row) -> str:
    return f"{row.others['steps']:.0f} steps ({row.others['reached']:.0f} of {len(row.values)})"


KINDS = {
    "none": "no clipping", "NormClip": "norm", "ValueClip": "value", "LayerClip": "per layer",
    "AutoClip": "AutoClip", "MedianClip": "median", "ZClip": "ZClip", "AdaGC": "AdaGC",
    "AGC": "AGC", "SPAM": "SPAM",
}  # fmt: skip
RULES: dict[str, Callable[[Finding], Verdict]] = {
    "recurrent": _recurrent,
    "warmup": _warmup,
    "speed": _speed,
    "spikes": _spikes,
    "half": _half,
    "scales": _scales,
}
