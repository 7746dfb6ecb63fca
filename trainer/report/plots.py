"""The charts of a run's report."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable, Sequence

from trainer.report.axis import count
from trainer.report.chart import Chart, Event, Series
from trainer.report.history import Curve, History

STEP = "optimizer step"
PARTS = ("data", "forward", "backward", "step", "save")  # of the time of a step
MAX_EVENTS = 200  # Lost steps marked in a chart.
REDUCTIONS: dict[str, Callable[[list[float]], float]] = {
    "largest": max, "median": statistics.median, "smallest": min,
}  # fmt: skip


def sections(history: History, lost: Sequence[Event] = ()) -> list[tuple[str, list[Chart]]]:
    """Return the charts by heading; charts over steps mark lost steps.

    The page leaves out charts without a line.
    """
    found = [
        ("Losses and metrics", [_training_loss(history), *_by_epoch(history)]),
        ("Optimization", _optimization(history)),
        ("Speed", _speed(history)),
    ]
    for _, charts in found:
        for chart in charts:
            if chart.x_label == STEP:
                chart.timed = True
                chart.events = list(lost)
    return found


def lost_steps(history: History, reported: Iterable[int]) -> list[Event]:
    """Return the skipped and overflowed steps, each at the end of its log interval.

    The page has reports of the ``reported`` ones under "step-N".
    """
    found = []
    for kind in ("skipped", "overflowed"):
        for name in history.optimizers():
            before = 0.0
            for step, lost in history.of_optimizer(name, kind).known():
                near = (each for each in reported if before < each <= step + 1)
                link = next((f"#step-{each}" for each in near if kind == "skipped"), "")
                if lost > 0:
                    text = f"{count(lost)} {kind} of {name} up to step {count(step)}"
                    found.append(Event(step, text, kind, link))
                before = step
    return found[:MAX_EVENTS]


def is_loss(measure: str) -> bool:
    """Return True for the dotted name of a loss, False for that of a metric."""
    return measure.split(".")[0] == "loss"


def display_name(measure: str) -> str:
    """Return a dotted name in words: "loss of generator" for "loss.generator"."""
    return measure.replace("loss.", "loss of ", 1) if measure.startswith("loss.") else measure


def _add(
    chart: Chart, name: str, curve: Curve, colour: int = 0, style: str = "solid",
    noisy: bool = False, zeros: bool = True,
) -> None:  # fmt: skip
    """Add a curve to a chart if a value is known and, without ``zeros``, one is above 0."""
    if any(zeros or y > 0 for _, y in curve.known()):
        chart.series.append(Series(name, curve.xs, curve.ys, colour, style, noisy))


def _colours(history: History) -> dict[str, int]:
    """Return the colour of each optimizer, and of the loss of its name, in all charts."""
    losses = [key[5:] for key in history.steps if key.startswith("loss.")]
    names = dict.fromkeys([*history.optimizers(), *losses])
    return {name: colour for colour, name in enumerate(names)}


def _training_loss(history: History) -> Chart:
    """Return the losses of the training by step."""
    chart, colours = Chart("Training loss", STEP, "loss"), _colours(history)
    for key, curve in history.steps.items():
        if is_loss(key):
            _add(chart, key[5:] or "loss", curve, colours.get(key[5:], 0), noisy=True)
    return chart


def _by_epoch(history: History) -> list[Chart]:
    """Return a chart over epochs for each loss and metric, with training and validation."""
    charts = []
    for measure in history.measures():
        name = display_name(measure)  # Names of metrics keep their case.
        chart = Chart(f"{name.replace('loss', 'Loss', 1)} by epoch", "epoch", name)
        for stage in history.stage_names():
            _add(chart, stage, history.by_epoch(stage, measure), 0 if stage == "train" else 1)
        charts.append(chart)
    return charts


def _optimization(history: History) -> list[Chart]:
    rates = Chart("Learning rate", STEP, "learning rate")
    shares = Chart("Clipped gradients", STEP, "% of steps", from_zero=True)
    windows = Chart("Clipped, of the last 100 steps", STEP, "% of steps", from_zero=True)
    lost = Chart("Steps not taken, so far", STEP, "steps", from_zero=True)
    scales = Chart("Loss scale (fp16)", STEP, "scale")
    names, colours = history.optimizers(), _colours(history)
    for name in names:
        _add(rates, name, history.of_optimizer(name, "lr"), colours[name])
        share = history.of_optimizer(name, "clipped").scaled(100)
        _add(shares, name, share, colours[name], noisy=True, zeros=False)
        scale = history.of_optimizer(name, "scale")
        if len({y for _, y in scale.known()}) > 1:
            _add(scales, name, scale, colours[name])
    for name, curves in history.norms.items():
        share = curves.get("clipped_share", Curve()).scaled(100)
        _add(windows, name, share, colours.get(name, 0), zeros=False)
    for shift, kind in enumerate(("skipped", "overflowed")):
        for name in names:
            total = history.of_optimizer(name, kind).total()
            line = f"{name} {kind}" if len(names) > 1 else kind
            _add(lost, line, total, len(names) * shift + colours[name], zeros=False)
    norms = [_norms(history, name, colours[name]) for name in names]
    every = [_every_step(history, name) for name in history.norms]
    return [rates, *norms, *every, shares, windows, lost, scales, *_by_layer(history)]


def _norms(history: History, name: str, colour: int) -> Chart:
    """Return a chart of the norm before clipping, its peaks, the limit and the share clipped."""
    of = f" of {name}" if len(history.optimizers()) > 1 else ""
    chart = Chart(f"Gradient norm{of}", STEP, "L2 norm before clipping")
    _add(chart, "largest", history.of_optimizer(name, "norm_max"), colour, "faint")
    _add(chart, "mean", history.of_optimizer(name, "norm"), colour, noisy=True)
    _add(chart, "limit", history.of_optimizer(name, "limit"), colour, "limit")
    shares = history.of_optimizer(name, "clipped").ys
    counts = history.of_optimizer(name, "stepped").ys
    if len(shares) == len(counts):
        known = [(s, n) for s, n in zip(shares, counts, strict=True) if math.isfinite(s + n)]
        steps = sum(n for _, n in known)
        if steps and chart.series:
            percent = f"{100 * sum(s * n for s, n in known) / steps:.1f} %"
            chart.note = f"{percent} of {count(steps)} logged steps were clipped."
    return chart


def _every_step(history: History, name: str) -> Chart:
    """Return a chart of the norms of all steps, before and after clipping."""
    of = f" of {name}" if len(history.optimizers()) > 1 else ""
    chart = Chart(f"Gradient norm{of}, every step", STEP, "L2 norm")
    curves = history.norms[name]
    spikes = curves.get("spikes", Curve()).sum()
    if spikes:
        chart.note = f"{count(spikes)} spikes: above four times the median of the steps before."
    _add(chart, "before clipping", curves.get("norms", Curve()), noisy=True)
    _add(chart, "after", curves.get("norms_after", Curve()), 1, noisy=True)
    _add(chart, "limit", curves.get("limits", Curve()), style="limit")
    return chart


def _by_layer(history: History) -> list[Chart]:
    """Return charts of the largest, the median and the smallest value of all layers."""
    charts = []
    for title, key, label in (
        ("Gradient norm by layer", "grad", "L2 norm before clipping"),
        ("Update by layer", "ratio", "norm of update / norm of weights"),
    ):
        by_step: dict[float, list[float]] = {}
        for curves in history.layers.values():
            for step, value in curves.get(key, Curve()).known():
                by_step.setdefault(step, []).append(value)
        steps, chart = sorted(by_step), Chart(title, STEP, label)
        for colour, (name, reduce) in enumerate(REDUCTIONS.items()):
            values = [reduce(by_step[step]) for step in steps]
            chart.series.append(Series(name, steps, values, colour))
        charts.append(chart)
    return charts if len(history.layers) > 1 else []


def _speed(history: History) -> list[Chart]:
    rate = Chart("Throughput", STEP, "examples per second", from_zero=True)
    _add(rate, "all ranks", history.of_step("examples_per_second"), noisy=True)
    times = Chart("Time of a step", STEP, "milliseconds", from_zero=True)
    for colour, part in enumerate(PARTS[:-1]):
        _add(times, part, history.of_step(f"times.{part}").scaled(1000), colour, noisy=True)
    memory = Chart("Memory, at most so far", STEP, "GB", from_zero=True)
    _add(memory, "main rank", history.of_step("memory").scaled(1e-9))
    padding = Chart("Padding", STEP, "% of a batch", from_zero=True)
    share = history.of_step("padding").scaled(100)
    _add(padding, "largest field", share, noisy=True, zeros=False)
    return [rate, times, memory, padding]
