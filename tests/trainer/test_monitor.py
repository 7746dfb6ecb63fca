"""The layer monitor measures what happened, changes nothing, is absent when off, and warns once."""

import json
import logging
import math
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.trainer.small import Players, Regressor, batches, everything, make, same
from tests.trainer.test_page import read
from tests.trainer.test_syncs import syncs
from trainer import Brain, Stage, StepReport, seed
from trainer.checkpoint import Checkpointer
from trainer.diagnostics.layer_monitor import BLOCKS, PATIENCE, WINDOW, Health, LayerMonitor
from trainer.report import render

KINDS = [Regressor, Players]


def lines(folder: Path) -> list[dict[str, Any]]:
    """Return the monitor records of a run."""
    records = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [record for record in records if record["kind"] == "monitor"]


def reporting(kind: type[Brain]) -> Any:
    """Return a kind of Brain that keeps its step reports."""

    class Reporting(kind):  # type: ignore[misc, valid-type]
        def optimize(self, *arguments: Any, **named: Any) -> Any:
            report = super().optimize(*arguments, **named)
            self.reports.append(report)
            return report

    return Reporting


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_a_monitor_changes_nothing(kind: type[Brain], precision: str, tmp_path: Path) -> None:
    states = []
    for every in (0, 1, 3):
        brain = make(
            kind, norm=True, precision=precision, ema_decay=0.9, monitor_every=every,
            tensorboard=bool(every), output_folder=str(tmp_path / str(every)),
        )  # fmt: skip
        brain.fit([1], batches(8))
        states.append([everything(brain), seed.rng_state()])
    assert same(states[0], states[1])
    assert same(states[0], states[2])


def monitors(brain: Brain) -> list[LayerMonitor]:
    return [each for each in brain.callbacks if isinstance(each, LayerMonitor)]


def test_off_is_no_callback_and_no_hook() -> None:
    brain = make(monitor_every=0)
    brain.fit([1], batches(2))
    update = brain.updates["main"]
    assert len(update.before_step) == 1  # Of the list of callbacks.
    assert not update.optimizer._optimizer_step_post_hooks
    assert len(update.optimizer._optimizer_step_pre_hooks) == 1  # Notices steps by hand.
    assert not monitors(brain)
    assert len(monitors(make())) == 1


def test_a_saved_state_comes_back_and_drops_what_is_measured() -> None:
    """The layout is that of checkpoints of format 1."""
    brain = make(monitor_every=2)
    brain.fit([1], batches(3))
    (monitor,) = monitors(brain)
    step = [1.0, None, math.inf, False, 0.1]
    health = {
        "window": [step, step], "medians": [1.0], "still": {"net.0": 2}, "faint": {}, "steps": 2,
        "said": ["large"],
    }  # fmt: skip
    state = {"main": {"steps": [step], "health": health}}
    brain.updates["main"].read_later(torch.ones(4), lambda values: pytest.fail("read"))
    monitor.load_state_dict(state)
    assert monitor.state_dict() == state


@pytest.mark.parametrize("kind", KINDS)
def test_a_line_has_the_norms_of_all_steps(kind: type[Brain], tmp_path: Path) -> None:
    limit = {Regressor: 2.0, Players: 0.5}[kind]
    brain = make(reporting(kind), max_grad_norm=limit, monitor_every=4, output_folder=str(tmp_path))
    brain.reports = []
    brain.fit([1], batches(9))
    names = list(brain.updates)
    for name in names:
        own = [report for report in brain.reports if report.name == name][:8]
        found = [line for line in lines(tmp_path) if name in line["optimizers"]]
        assert [line["step"] for line in found] == [4, 8]
        facts = [line["optimizers"][name] for line in found]
        for key, wanted in (
            ("norms", [r.norm for r in own]),
            ("norms_after", [r.norm_after for r in own]),
            ("limits", [limit] * 8),
        ):
            assert sum((each[key] for each in facts), []) == pytest.approx(wanted, rel=1e-4)
        share = sum(r.clipped for r in own) / 8
        assert facts[-1]["clipped_share"] == pytest.approx(share)
    assert 0 < sum(r.clipped for r in brain.reports) < len(brain.reports)


def test_layers_are_measured_before_clipping_and_updates_as_they_were(tmp_path: Path) -> None:
    class Watching(Regressor):
        def on_fit_batch_start(self, batch: Any, should_step: bool) -> None:
            self.before = {n: p.detach().double() for n, p in self.modules.named_parameters()}

        def on_fit_batch_end(self, *_: Any) -> None:
            after = {n: p.detach().double() for n, p in self.modules.named_parameters()}
            self.moved = {name: after[name] - self.before[name] for name in after}

    sgd = partial(torch.optim.SGD, lr=0.1)
    brain = make(
        Watching, optimizer=sgd, monitor_every=1, max_grad_norm=0.5, output_folder=str(tmp_path)
    )
    for number, batch in enumerate(batches(5), 1):
        brain.fit([number], [batch])
        layers = lines(tmp_path)[-1]["layers"]
        clipped = 0.5 / brain.updates["main"].last_norm
        assert clipped < 1
        assert list(layers) == ["net.0", "net.2"]
        for layer, found in layers.items():
            mine = [name for name in brain.moved if name.startswith(f"{layer}.")]
            update = math.hypot(*(float(brain.moved[name].norm()) for name in mine))
            weights = dict(brain.modules.named_parameters())
            weight = math.hypot(*(float(weights[name].detach().double().norm()) for name in mine))
            assert found["update"] == pytest.approx(update, rel=1e-4)
            assert found["weight"] == pytest.approx(weight, rel=1e-4)
            assert found["ratio"] == pytest.approx(update / weight, rel=1e-4)
            # SGD moves by lr times the clipped gradient.
            assert found["grad"] == pytest.approx(update / 0.1 / clipped, rel=1e-3)


def test_a_record_waits_for_nothing_that_a_step_does_not_wait_for() -> None:
    off, _ = syncs(Regressor, 24, log_interval=1000, monitor_every=0)
    on, _ = syncs(Regressor, 24, log_interval=1000, monitor_every=6)
    assert on == off == 24


def test_a_step_between_records_calls_nothing_of_the_monitor(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def counted(method: Any) -> Any:
        def call(self: LayerMonitor, brain: Brain, *arguments: Any) -> None:
            calls.append(brain.progress.step)
            method(self, brain, *arguments)

        return call

    calls: list[int] = []
    for name in ("_before_step", "_after_step"):
        monkeypatch.setattr(LayerMonitor, name, counted(getattr(LayerMonitor, name)))
    brain = make(monitor_every=4, output_folder=str(tmp_path))
    brain.fit([1], batches(9))
    # In the step that is measured, and in the next one, which brings its numbers.
    assert calls == [4, 4, 5, 5, 8, 8, 9, 9]
    assert [line["step"] for line in lines(tmp_path)] == [4, 8]
    with brain.sandbox():
        for batch in batches(5):
            brain.train_batch(batch)
    assert len(calls) == 8
    brain.fit([2], batches(4))
    assert [line["step"] for line in lines(tmp_path)] == [4, 8, 12]


@pytest.mark.parametrize("kind", KINDS)
def test_optimizers_that_are_exchanged_between_two_fits_are_measured(
    kind: type[Brain], tmp_path: Path
) -> None:
    brain = make(kind, monitor_every=2, output_folder=str(tmp_path))
    brain.fit([1], batches(5))
    first, *others = brain.updates
    made = torch.optim.SGD(brain.updates[first].params, lr=0.1)
    if kind is Players:
        brain.optimizers_dict = {**brain.optimizers_dict, first: made}
    else:
        brain.optimizer = made
    brain.fit([2], batches(5))
    # The new one counts from its first step on.
    for name, steps in {first: [2, 4, 7, 9], **dict.fromkeys(others, [2, 4, 6, 8, 10])}.items():
        found = [line["step"] for line in lines(tmp_path) if name in line["optimizers"]]
        assert found == steps


def test_an_optimizer_that_steps_twice_in_a_batch_is_measured(tmp_path: Path) -> None:
    class Twice(Regressor):
        def fit_batch(self, batch: Any) -> Any:
            for _ in range(2):
                report = super().fit_batch(batch)
            return report

    make(Twice, monitor_every=4, output_folder=str(tmp_path)).fit([1], batches(8))
    norms = [line["optimizers"]["main"]["norms"] for line in lines(tmp_path)]
    assert sum(map(len, norms)) >= 12
    assert all(4 <= len(each) <= 5 for each in norms)


@pytest.mark.parametrize("every", [1, 4])
def test_the_norm_after_cutting_elements_comes_with_the_next_step(
    every: int, tmp_path: Path
) -> None:
    seen: list[float] = []

    def watched(params: Any) -> torch.optim.Optimizer:
        optimizer = torch.optim.SGD(params, lr=0.1)

        def note(*_: Any) -> None:
            grads = [p.grad for group in optimizer.param_groups for p in group["params"]]
            seen.append(math.hypot(*(float(grad.double().norm()) for grad in grads)))

        optimizer.register_step_pre_hook(note)
        return optimizer

    brain = make(
        optimizer=watched, clip="value", max_grad_norm=0.05, monitor_every=every,
        output_folder=str(tmp_path),
    )  # fmt: skip
    brain.fit([1], batches(8))
    found = sum((line["optimizers"]["main"]["norms_after"] for line in lines(tmp_path)), [])
    assert found == pytest.approx(seen, rel=1e-4)
    assert len(found) == 8
    quiet, _ = syncs(Regressor, 24, log_interval=1000, monitor_every=0)
    assert syncs(
        Regressor, 24, log_interval=1000, monitor_every=6, clip="value", max_grad_norm=0.05
    ) == (quiet, 24)


def test_skipped_and_accumulated_batches_are_not_recorded(tmp_path: Path) -> None:
    data = batches(8)
    data[2] = {**data[2], "factor": math.nan}
    brain = make(grad_accumulation_factor=2, monitor_every=3, output_folder=str(tmp_path))
    brain.fit([1], data)
    (line,) = lines(tmp_path)
    assert line["step"] == 3
    assert all(norm > 0 for norm in line["optimizers"]["main"]["norms"])


def test_a_resumed_run_writes_the_same_lines(tmp_path: Path) -> None:
    class Stopped(Regressor):
        def on_fit_batch_start(self, batch: Any, should_step: bool) -> None:
            if self.step == self.stop_at:
                raise KeyboardInterrupt

    def run(folder: Path, stop_at: int) -> Any:
        options = {"monitor_every": 4, "output_folder": str(folder), "checkpoint_every_steps": 3}
        brain = make(Stopped, checkpointer=Checkpointer(folder / "checkpoints"), **options)
        brain.stop_at = stop_at
        brain.fit([1], batches(11))
        return brain

    run(tmp_path / "straight", 0)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "stopped", 8)
    run(tmp_path / "stopped", 0)
    assert lines(tmp_path / "stopped") == lines(tmp_path / "straight")
    assert len(lines(tmp_path / "straight")) == 2


def test_tensorboard_has_histograms_of_weights_and_gradients(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    make(monitor_every=2, tensorboard=True, output_folder=str(tmp_path)).fit([1], batches(4))
    events = EventAccumulator(str(tmp_path / "tensorboard"), {"histograms": 0})
    events.Reload()
    tags = events.Tags()["histograms"]
    names = ["net.0.weight", "net.0.bias", "net.2.weight", "net.2.bias"]
    assert set(tags) == {f"{what}/{n}" for what in ("weights", "gradients") for n in names}
    found = events.Histograms("gradients/net.0.weight")
    assert [(each.step, each.histogram_value.num) for each in found] == [(2, 24), (4, 24)]
    assert "train_monitor/layers.net.0.ratio" in events.Tags()["scalars"]


# ------------------------------------------------------------------------------------- warnings


def taken(
    norm: float, after: float, limit: float = math.inf, clipped: bool = False, lr: float = 0.1
) -> StepReport:
    return StepReport("main", "stepped", 1.0, 1.0, norm, after, limit, clipped, lr=lr)


def steps(norms: Iterable[float], limit: float = math.inf, lr: float = 0.1) -> list[StepReport]:
    return [taken(norm, min(norm, limit), limit, norm > limit, lr) for norm in norms]


def layer(grad: float | None, update: float) -> dict[str, float | None]:
    return {"grad": grad, "weight": 1.0, "update": update, "ratio": update}


HEALTHY = {"a": layer(1.0, 0.1), "b": layer(0.1, 0.1)}
QUIET = [1.0 + 0.1 * math.sin(n) for n in range(WINDOW)]
CASES: dict[str, tuple[Callable[[int], list[StepReport]], dict[str, Any], str]] = {
    "large": (lambda n: steps([20.0 + x for x in QUIET]), HEALTHY, "above 10 before clipping in 1"),
    "clipped": (lambda n: steps(QUIET, 0.5), HEALTHY, "Raise max_grad_norm to about 1.1"),
    "vanishing": (lambda n: steps([1e-8] * WINDOW), HEALTHY, "nothing is learned any more"),
    "drift": (lambda n: steps([2.0**n] * WINDOW), HEALTHY, "has grown without a pause over the la"),
    "still": (lambda n: steps(QUIET), {**HEALTHY, "c": layer(None, 0.0)}, "c (no gradient) did no"),
    "faint": (lambda n: steps(QUIET), {**HEALTHY, "c": layer(1e-9, 0.1)}, "vanish on their way to"),
}


@pytest.mark.parametrize("case", CASES)
def test_each_warning_is_said_once_and_alone(case: str) -> None:
    made, layers, words = CASES[case]
    health, said = Health("main"), []
    for number in range(max(BLOCKS, PATIENCE) + 2):
        restored = Health("main")  # A resumed run repeats no warning.
        restored.load_state_dict(health.state_dict())
        health = restored
        said += health.add(made(number), layers)[1]
    others = [text for text in said if words not in text]
    assert sum(words in text for text in said) == 1
    assert not others or case == "drift"  # What has grown that much is large as well.


def test_a_limit_that_is_meant_to_be_always_reached_is_no_warning() -> None:
    high = [taken(30.0 + x, 5.0, 5.0, True) for x in QUIET]
    for rate, warnings in ((1.0, []), (0.96, ["above 10", "were clipped"]), (0.5, ["60 of the"])):
        health, share = Health("main", rate), 0.6 if rate == 0.5 else 1.0
        kept = [step for number, step in enumerate(high) if number < share * WINDOW]
        rest = [taken(4.0, 4.0, 5.0) for _ in range(WINDOW - len(kept))]
        _, said = health.add([*rest, *kept], HEALTHY)
        assert [any(words in text for text in said) for words in warnings] == [True] * len(warnings)
        assert len(said) == len(warnings)


def test_a_clip_rate_is_expected_of_each_optimizer_by_name() -> None:
    with pytest.raises(ValueError, match="expected_clip_rate names the optimizer 'x'"):
        make(monitor_every=1, expected_clip_rate={"x": 1.0}).fit([1], batches(1))
    with pytest.raises(ValueError, match="expected_clip_rate must be a number from 0 to 1"):
        make(expected_clip_rate=1.5)


def test_a_healthy_run_has_no_warning() -> None:
    health = Health("main")
    for _ in range(10):
        facts, said = health.add(steps(QUIET, limit=1.05), HEALTHY)
        assert not said
        assert facts["spikes"] == 0
    assert 0.2 < facts["clipped_share"] < 0.8


def test_an_adaptive_limit_may_clip_every_step_and_a_rate_of_zero_moves_nothing() -> None:
    health = Health("main")
    for number in range(2 * PATIENCE):
        adaptive = [taken(x, 0.5 * x, 0.5 * x, True, 0.0) for x in QUIET]
        assert not health.add(adaptive, {"a": layer(1.0, 0.0)})[1], number


def test_spikes_are_counted_against_the_median_of_the_steps_before() -> None:
    health = Health("main")
    assert health.add(steps([50.0, *QUIET[:30]]), HEALTHY)[0]["spikes"] == 0  # Nothing before.
    assert health.add(steps([1.0, 3.9, 5.0, 1.0, 40.0]), HEALTHY)[0]["spikes"] == 2


def test_a_run_warns_in_its_log_its_lines_and_its_page(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    class Forgetful(Regressor):
        def init_optimizers(self) -> None:
            used = [*self.modules.net.parameters(), *self.modules.unused.parameters()]
            self.optimizer = self.opt_class(used)

    options = {"device": "cpu", "progressbar": False, "monitor_every": 2}
    modules = {
        "net": make().modules.net, "unused": nn.Linear(2, 2), "nobody's": nn.Linear(2, 2),
    }  # fmt: skip
    brain = Forgetful(
        modules, partial(torch.optim.SGD, lr=0.01), {}, {**options, "output_folder": str(tmp_path)}
    )
    with caplog.at_level(logging.WARNING, "trainer"):
        brain.fit([1, 2], batches(8))
    said = [record.getMessage() for record in caplog.records]
    assert [text.split(":")[0] for text in said] == ["step 2", "step 6"]
    assert "no optimizer has nobody's.weight, nobody's.bias: they never move" in said[0]
    assert "unused (no gradient) did not move in the last 3 records" in said[1]
    assert [w for line in lines(tmp_path) for w in line.get("warnings", ())] == [
        text.partition(": ")[2] for text in said
    ]
    page = read(render(tmp_path))
    assert {"Warnings", "Layers", "Gradient norm by layer", "Update by layer"} <= {*page.headings}
    assert "Gradient norm, every step" in page.headings
    assert "net.0" in page.words


def test_hostile_names_and_odd_lines_leave_a_page(tmp_path: Path) -> None:
    odd = [
        {"step": 1, "optimizers": 3, "layers": [1]},
        {"step": 2, "optimizers": {"<b>": {"norms": [1.0, None, "x"]}}, "warnings": ["<i>", 4]},
        {"step": 3, "layers": {"<script>": {"grad": 1.0, "ratio": None}, "y": 4}},
        {"step": 4, "layers": {"<script>": {"grad": 2e200, "ratio": 0.0}}},
        {"step": "x"},
    ]
    text = "".join(json.dumps({"kind": "monitor", **line}) + "\n" for line in odd)
    (tmp_path / "metrics.jsonl").write_text(text)
    page = read(render(tmp_path))
    assert "<script>" in page.words
    assert "1 line of metrics.jsonl could not be read" in "".join(page.words)


def test_a_frozen_layer_is_no_warning_and_shared_weights_are_one_layer(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    class Tied(Regressor):
        def compute_forward(self, batch: Any, stage: Stage) -> Tensor:
            return self.modules.again(batch["x"])

    network = make().modules.net
    network[0].requires_grad_(False)
    options = {"device": "cpu", "progressbar": False, "monitor_every": 1}
    brain = Tied(
        {"net": network, "again": network}, partial(torch.optim.SGD, lr=0.01), {},
        {**options, "output_folder": str(tmp_path)},
    )  # fmt: skip
    with caplog.at_level(logging.WARNING, "trainer"):
        brain.fit([1], batches(5))
    assert not caplog.records
    assert all(list(line["layers"]) == ["net.2"] for line in lines(tmp_path))


def test_a_layer_whose_weight_is_parametrized_is_one_layer(tmp_path: Path) -> None:
    brain = make(Regressor, monitor_every=1, output_folder=str(tmp_path))
    for layer in (brain.modules.net[0], brain.modules.net[-1]):
        torch.nn.utils.parametrizations.weight_norm(layer)
    brain.fit([1], batches(3))
    assert [list(line["layers"]) for line in lines(tmp_path)] == [["net.0", "net.2"]] * 3
