"""The charts of a run's report."""

from __future__ import annotations

import math
from collections.abc import Callable

from trainer.report.axis import count
from trainer.report.chart import Chart, Series
from trainer.report.history import Curve, History
from trainer.report.layers import layer_charts

STEP = "optimizer step"


def sections(history: History) -> list[tuple[str, list[Chart]]]:
    """Return the charts by heading, also those without a line, which the page leaves out."""
    return [
        ("Losses and metrics", [_training_loss(history), *_by_epoch(history)]),
        ("Optimization", _optimization(history)),
        ("Speed", [_speed(history)]),
    ]


def _series(
    name: str, curve: Curve, colour: int = 0, style: str = "solid", noisy: bool = False
) -> Series:
    return Series(name, curve.xs, curve.ys, colour, style, noisy)


def display_name(measure: str) -> str:
    """Return a dotted name for people: "loss of generator" for "loss.generator"."""
    return measure.replace("loss.", "loss of ", 1) if measure.startswith("loss.") else measure


def _colour(history: History, name: str) -> int:
    """Return the colour that an optimizer and the loss of its name have in all charts."""
    losses = [key[5:] for key in history.steps if key.startswith("loss.")]
    names = list(dict.fromkeys([*history.optimizers(), *losses]))
    return names.index(name) if name in names else 0


def _training_loss(history: History) -> Chart:
    chart = Chart("Training loss", STEP, "loss")
    for key, curve in history.steps.items():
        if key.split(".")[0] == "loss" and curve.known():
            name = key[5:] or "loss"
            chart.series.append(_series(name, curve, _colour(history, name), noisy=True))
    return chart


def _by_epoch(history: History) -> list[Chart]:
    """Return a chart over the epochs for each loss and metric, training beside validation."""
    charts = []
    for measure in history.measures():
        name = display_name(measure)  # Not in capitals: si_snr is not SI_SNR.
        chart = Chart(f"{name.replace('loss', 'Loss', 1)} by epoch", "epoch", name)
        for stage in history.stage_names():
            curve = history.by_epoch(stage, measure)
            if curve.known():
                chart.series.append(_series(stage, curve, 0 if stage == "train" else 1))
        charts.append(chart)
    return charts


def _optimization(history: History) -> list[Chart]:
    names = history.optimizers()
    rates = _per_optimizer(history, Chart("Learning rate", STEP, "learning rate"), "lr")
    shares = _per_optimizer(
        history,
        Chart("Clipped gradients", STEP, "% of steps", from_zero=True),
        "clipped",
        lambda curve: curve.scaled(100),
        _any_above_zero,
    )
    lost = Chart("Steps not taken, so far", STEP, "steps", from_zero=True)
    for shift, kind in enumerate(("skipped", "overflowed")):
        for name in names:
            total = history.of_optimizer(name, kind).total()
            if _any_above_zero(total):
                colour = len(names) * shift + _colour(history, name)
                chart_name = f"{name} {kind}" if len(names) > 1 else kind
                lost.series.append(_series(chart_name, total, colour))
    scales = _per_optimizer(
        history, Chart("Loss scale (fp16)", STEP, "scale"), "scale", worth=_changes
    )
    norms = [_norms(history, name, len(names)) for name in names]
    every = [_every_step(history, name, len(names)) for name in history.norms]
    return [rates, *norms, *every, shares, *_windows(history), lost, scales, *layer_charts(history)]


def _every_step(history: History, name: str, optimizers: int) -> Chart:
    """Return the norms of all steps, before and after clipping."""
    of = f" of {name}" if optimizers > 1 else ""
    chart = Chart(f"Gradient norm{of}, every step", STEP, "L2 norm")
    spikes = history.norms[name].get("spikes", Curve()).sum()
    if spikes:
        chart.note = f"{count(spikes)} spikes: above four times the median of the steps before."
    for label, key, style, colour in (
        ("before clipping", "norms", "solid", 0),
        ("after", "norms_after", "solid", 1),
        ("limit", "limits", "limit", 0),
    ):
        curve = history.norms[name].get(key, Curve())
        if curve.known():
            chart.series.append(_series(label, curve, colour, style, noisy=style == "solid"))
    return chart


def _windows(history: History) -> list[Chart]:
    """Return the share of clipped steps among the last 100, at each monitor record."""
    chart = Chart("Clipped, of the last 100 steps", STEP, "% of steps", from_zero=True)
    for name, curves in history.norms.items():
        curve = curves.get("clipped_share", Curve())
        if _any_above_zero(curve):
            chart.series.append(_series(name, curve.scaled(100), _colour(history, name)))
    return [chart]


def _any_above_zero(curve: Curve) -> bool:
    return any(y > 0 for y in curve.ys)


def _changes(curve: Curve) -> bool:
    return len({y for _, y in curve.known()}) > 1


def _per_optimizer(
    history: History,
    chart: Chart,
    key: str,
    change: Callable[[Curve], Curve] = lambda curve: curve,
    worth: Callable[[Curve], bool] = lambda curve: bool(curve.known()),
) -> Chart:
    """Return the chart with a line for each optimizer whose curve is worth one."""
    for name in history.optimizers():
        curve = change(history.of_optimizer(name, key))
        if worth(curve):
            noisy = key == "clipped"
            chart.series.append(_series(name, curve, _colour(history, name), noisy=noisy))
    return chart


def _norms(history: History, name: str, optimizers: int) -> Chart:
    """Return the gradient norm before clipping, its peaks, the limit, and the share clipped."""
    of = f" of {name}" if optimizers > 1 else ""
    chart = Chart(f"Gradient norm{of}", STEP, "L2 norm before clipping")
    colour = _colour(history, name)
    for label, key, style in (
        ("largest", "norm_max", "faint"),
        ("mean", "norm", "solid"),
        ("limit", "limit", "limit"),
    ):
        curve = history.of_optimizer(name, key)
        if curve.known():
            chart.series.append(_series(label, curve, colour, style, noisy=key == "norm"))
    shares = history.of_optimizer(name, "clipped")
    counts = history.of_optimizer(name, "stepped")
    if len(shares) == len(counts) and chart.series:
        pairs = [
            (share, number)
            for share, number in zip(shares.ys, counts.ys, strict=True)
            if math.isfinite(share) and math.isfinite(number)
        ]
        steps = sum(number for _, number in pairs)
        clipped = sum(share * number for share, number in pairs)
        if steps:
            percent = f"{100 * clipped / steps:.1f} %"
            chart.note = f"{percent} of {count(steps)} logged steps were clipped."
    return chart


def _speed(history: History) -> Chart:
    chart = Chart("Throughput", STEP, "examples per second", from_zero=True)
    curve = history.steps.get("examples_per_second", Curve())
    if curve.known():
        chart.series.append(_series("all ranks", curve, noisy=True))
    return chart
