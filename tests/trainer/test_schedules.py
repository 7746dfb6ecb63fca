"""Learning rates, resuming and validation of the schedules, and early stopping."""

import json
import math
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.optim.lr_scheduler import LRScheduler, SequentialLR

from trainer.schedules import EarlyStopping, NewBob, Noam, Plateau, Schedule, WarmupDecay

PEAKS = (0.1, 0.02)


def optimizer_of(*rates: float) -> torch.optim.Optimizer:
    groups = [{"params": [torch.nn.Parameter(torch.zeros(1))], "lr": rate} for rate in rates]
    return torch.optim.SGD(groups, lr=1.0)


def rates_of(optimizer: torch.optim.Optimizer) -> list[float]:
    return [float(group["lr"]) for group in optimizer.param_groups]


def steps(schedule: Schedule, count: int) -> list[list[float]]:
    """Return the rates of optimizer steps 1 … count."""
    rates = []
    for _ in range(count):
        rates.append(rates_of(schedule.optimizer))
        schedule.optimizer.step()
        schedule.step()
    return rates


MAKERS: dict[str, Callable[[torch.optim.Optimizer], Schedule]] = {
    "noam": lambda o: Noam(o, 4),
    "linear": lambda o: WarmupDecay(o, 3, 10, final=0.1),
    "cosine": lambda o: WarmupDecay(o, 3, 10, shape="cosine"),
    "newbob": lambda o: NewBob(o, patience=1, mode="max"),
    "plateau": lambda o: Plateau(o, patience=1, min_lr=0.001),
}


# --- by the step -------------------------------------------------------------------------------


@pytest.mark.parametrize("warmup", [1, 2, 7, 40])
def test_noam_is_the_papers_equation_with_the_optimizers_rate_as_its_peak(warmup: int) -> None:
    ours = steps(Noam(optimizer_of(*PEAKS), warmup), 60)
    for n, rates in enumerate(ours, start=1):
        paper = min(n**-0.5, n * warmup**-1.5) * warmup**0.5
        assert rates == pytest.approx([peak * paper for peak in PEAKS], rel=1e-12)
    assert ours[warmup - 1] == pytest.approx(PEAKS)
    assert max(rates[0] for rates in ours) == ours[warmup - 1][0]
    assert min(rates[0] for rates in ours[:warmup]) == ours[0][0]  # the first is the lowest
    assert ours[0][0] == pytest.approx(PEAKS[0] / warmup)


@given(
    warmup=st.integers(0, 30),
    decay=st.integers(1, 60),
    final=st.floats(0.0, 1.0),
    shape=st.sampled_from(["linear", "cosine"]),
)
@settings(max_examples=60, deadline=None)
def test_warmup_decay_climbs_to_the_peak_and_ends_at_final(
    warmup: int, decay: int, final: float, shape: str
) -> None:
    total = warmup + decay
    schedule = WarmupDecay(optimizer_of(*PEAKS), warmup, total, final, shape)  # type: ignore[arg-type]
    curve = [rates[0] / PEAKS[0] for rates in steps(schedule, total + 3)]
    climb, fall = curve[:warmup], curve[warmup:]
    assert climb == pytest.approx([n / warmup for n in range(1, warmup + 1)])
    assert all(a >= b - 1e-12 for a, b in zip(fall, fall[1:], strict=False))
    assert curve[total - 1 :] == pytest.approx([final] * 4, abs=1e-12)
    first, second = rates_of(schedule.optimizer)
    assert first == pytest.approx(5.0 * second)  # the groups keep their ratio


@pytest.mark.parametrize("total", [59, 60])
def test_a_decay_that_would_end_within_the_warmup_is_refused_by_both_names(total: int) -> None:
    with pytest.raises(ValueError, match=rf"total_steps .* warmup_steps, which is 60; got {total}"):
        WarmupDecay(optimizer_of(*PEAKS), 60, total)
    assert WarmupDecay(optimizer_of(*PEAKS), 60, 61).total_steps == 61


def test_the_decay_is_halfway_in_the_middle_for_both_shapes() -> None:
    for shape in ("linear", "cosine"):
        schedule = WarmupDecay(optimizer_of(1.0), 10, 30, final=0.2, shape=shape)  # type: ignore[arg-type]
        assert schedule.share(20) == pytest.approx(0.6)


def test_a_tensor_rate_stays_the_same_tensor() -> None:
    parameter = torch.nn.Parameter(torch.zeros(1))
    rate = torch.tensor(0.5)
    optimizer = torch.optim.Adam([parameter], lr=rate, foreach=False)
    Noam(optimizer, 5)
    assert optimizer.param_groups[0]["lr"] is rate
    assert rate.item() == pytest.approx(0.1)


def test_torch_can_chain_them() -> None:
    optimizer = optimizer_of(1.0)
    first = torch.optim.lr_scheduler.ConstantLR(optimizer, factor=0.25, total_iters=100)
    chain = SequentialLR(optimizer, [first, WarmupDecay(optimizer, 0, 4)], milestones=[2])
    seen = []
    for _ in range(5):
        seen.append(rates_of(optimizer)[0])
        optimizer.step()
        chain.step()
    assert seen == pytest.approx([0.25, 0.25, 0.75, 0.5, 0.25])


# --- by the epoch ------------------------------------------------------------------------------


def halvings(schedule: Schedule, values: list[float]) -> list[int]:
    """Return after which of the values, counted from 1, the rates were lowered."""
    lowered = []
    for number, value in enumerate(values, start=1):
        before = rates_of(schedule.optimizer)
        schedule.step(value)  # type: ignore[arg-type]
        if rates_of(schedule.optimizer) != before:
            lowered.append(number)
    return lowered


@given(
    values=st.lists(st.floats(-100, 100, width=32), min_size=1, max_size=12),
    kind=st.sampled_from([NewBob, Plateau]),
    patience=st.integers(0, 2),
)
@settings(max_examples=150, deadline=None)
def test_to_maximise_a_metric_is_to_minimise_its_negative(
    values: list[float], kind: type[NewBob] | type[Plateau], patience: int
) -> None:
    down = halvings(kind(optimizer_of(*PEAKS), patience=patience, mode="min"), values)
    up = halvings(kind(optimizer_of(*PEAKS), patience=patience, mode="max"), [-v for v in values])
    assert down == up


@given(
    start=st.floats(-50, 50),
    gains=st.lists(st.floats(0.01, 0.2), min_size=1, max_size=15),
    kind=st.sampled_from([NewBob, Plateau]),
    mode=st.sampled_from(["min", "max"]),
)
@settings(max_examples=150, deadline=None)
def test_a_metric_that_gets_better_never_lowers_the_rate_whatever_its_sign(
    start: float, gains: list[float], kind: type[NewBob] | type[Plateau], mode: str
) -> None:
    better = -1.0 if mode == "min" else 1.0
    values = [start]
    for gain in gains:  # by 1 to 20 % of its size, and a bit, through zero and on
        values.append(values[-1] + better * (gain * abs(values[-1]) + 1e-3))
    assert halvings(kind(optimizer_of(0.1), patience=0, mode=mode), values) == []  # type: ignore[arg-type]


@pytest.mark.parametrize("value", [-3.0, 0.0, 3.0])
@pytest.mark.parametrize("mode", ["min", "max"])
def test_a_metric_that_stands_still_lowers_the_rate_on_time(value: float, mode: str) -> None:
    still = [value] * 7
    assert halvings(NewBob(optimizer_of(0.1), mode=mode), still) == [2, 3, 4, 5, 6, 7]  # type: ignore[arg-type]
    assert halvings(NewBob(optimizer_of(0.1), mode=mode, patience=1), still) == [3, 5, 7]  # type: ignore[arg-type]
    assert halvings(Plateau(optimizer_of(0.1), mode=mode, patience=2), still) == [4, 7]  # type: ignore[arg-type]


def test_newbob_looks_at_the_previous_epoch_and_plateau_at_the_best() -> None:
    values = [10.0, 5.0, 8.0, 7.0, 6.0]
    assert halvings(NewBob(optimizer_of(0.1)), values) == [3]
    assert halvings(Plateau(optimizer_of(0.1), patience=0), values) == [3, 4, 5]


def test_every_group_is_lowered_and_none_below_or_up_to_the_floor() -> None:
    optimizer = optimizer_of(0.1, 0.02, 0.0005)
    plateau = Plateau(optimizer, factor=0.1, patience=0, min_lr=0.001)
    halvings(plateau, [1.0, 1.0])
    assert rates_of(optimizer) == pytest.approx([0.01, 0.002, 0.0005])
    halvings(plateau, [1.0, 1.0])
    assert rates_of(optimizer) == pytest.approx([0.001, 0.001, 0.0005])
    assert plateau.get_last_lr() == rates_of(optimizer)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("kind", [NewBob, Plateau])
def test_a_value_that_is_not_finite_is_ignored_with_a_warning(
    kind: type[NewBob] | type[Plateau], bad: float
) -> None:
    with_bad = kind(optimizer_of(0.1), patience=1, metric="wer")
    without = kind(optimizer_of(0.1), patience=1, metric="wer")
    for value in [4.0, 3.0, 3.5, 3.0, 3.0, 3.0]:
        sentence = rf"ignored epoch \d+, whose wer is {bad}: the learning rate stays"
        with pytest.warns(UserWarning, match=sentence):
            with_bad.step(bad)
        with_bad.step(value)
        without.step(value)
        assert rates_of(with_bad.optimizer) == rates_of(without.optimizer)
    assert rates_of(without.optimizer) != [0.1]


def test_a_tensor_is_a_metric_too() -> None:
    assert halvings(NewBob(optimizer_of(0.1)), [torch.tensor(2.0), torch.tensor(2.0)]) == [2]  # type: ignore[list-item]


# --- all of them -------------------------------------------------------------------------------


def drive(schedule: Schedule, values: list[float]) -> list[list[float]]:
    rates = []
    for value in values:
        schedule.optimizer.step()
        schedule.step(*([value] if schedule.needs_metric else []))
        rates.append(rates_of(schedule.optimizer))
    return rates


@pytest.mark.parametrize("name", MAKERS)
@pytest.mark.parametrize("order", ["optimizer first", "schedule first", "made last"])
def test_a_run_that_was_stopped_anywhere_goes_on_with_the_same_rates(name: str, order: str) -> None:
    values = [5.0, 4.0, 4.0, 4.5, 4.0, 6.0, 3.0, 3.0, 3.0, 3.0, 3.0, 3.0]
    whole = drive(MAKERS[name](optimizer_of(*PEAKS)), values)
    for stop in range(len(values)):
        first = MAKERS[name](optimizer_of(*PEAKS))
        head = drive(first, values[:stop])
        saved = json.loads(json.dumps(first.state_dict()))
        saved_optimizer = first.optimizer.state_dict()
        optimizer = optimizer_of(*PEAKS)
        if order == "made last":
            optimizer.load_state_dict(saved_optimizer)
        second = MAKERS[name](optimizer)
        if order == "optimizer first":
            optimizer.load_state_dict(saved_optimizer)
        second.load_state_dict(saved)
        if order == "schedule first":
            optimizer.load_state_dict(saved_optimizer)
        assert rates_of(optimizer) == rates_of(first.optimizer)
        assert head + drive(second, values[stop:]) == whole


@pytest.mark.parametrize("name", ["noam", "linear", "cosine"])
def test_by_the_step_the_schedules_own_state_is_enough(name: str) -> None:
    first = MAKERS[name](optimizer_of(*PEAKS))
    steps(first, 5)
    second = MAKERS[name](optimizer_of(0.7, 0.7))
    second.load_state_dict(first.state_dict())
    assert rates_of(second.optimizer) == rates_of(first.optimizer) == second.get_last_lr()


@pytest.mark.parametrize("name", MAKERS)
def test_states_are_plain_numbers_that_later_steps_do_not_change(name: str) -> None:
    schedule = MAKERS[name](optimizer_of(*PEAKS))
    drive(schedule, [3.0, 3.0])
    state = schedule.state_dict()
    before = json.dumps(state)
    drive(schedule, [3.0, 2.0, 3.0, 3.0])
    assert json.dumps(state) == before != json.dumps(schedule.state_dict())


@pytest.mark.parametrize("name", MAKERS)
def test_they_are_torchs_schedulers_and_never_warn_about_the_order_of_calls(name: str) -> None:
    optimizer = optimizer_of(*PEAKS)
    plain = optimizer.step
    schedule = MAKERS[name](optimizer)
    assert isinstance(schedule, LRScheduler)
    assert optimizer.step == plain  # not wrapped
    assert schedule.every == ("epoch" if schedule.needs_metric else "step")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(3):  # a step that overflowed was not taken
            schedule.step(*([1.0] if schedule.needs_metric else []))


def test_a_changed_yaml_counts_from_the_step_where_it_takes_over() -> None:
    short = WarmupDecay(optimizer_of(1.0), 0, 10)
    steps(short, 5)
    long = WarmupDecay(optimizer_of(1.0), 0, 20)
    long.load_state_dict(short.state_dict())
    assert long.get_last_lr() == pytest.approx([1 - 6 / 20])


def test_another_schedules_state_and_another_number_of_groups_are_refused() -> None:
    noam = Noam(optimizer_of(0.1), 5)
    with pytest.raises(ValueError, match=r"does not fit Noam: missing \['base_lrs'\], unexpected"):
        noam.load_state_dict(Plateau(optimizer_of(0.1)).state_dict())
    with pytest.raises(ValueError, match="Noam was made for 2 parameter groups, the optimizer has"):
        noam.load_state_dict(Noam(optimizer_of(*PEAKS), 5).state_dict())


BAD: list[tuple[Callable[[], Any], str]] = [
    (lambda: Noam(optimizer_of(1.0), 0), "Noam: warmup_steps must be a whole number, 1 or more"),
    (lambda: Noam(optimizer_of(1.0), 2.5), "warmup_steps must be a whole number, 1 or more; got 2"),
    (lambda: Noam(optimizer_of(1.0), "9"), "must be a whole number, 1 or more; got '9'"),
    (lambda: Noam(optimizer_of(1.0), True), "must be a whole number, 1 or more; got True"),
    (lambda: Noam(optimizer_of(1.0), math.nan), "must be a whole number, 1 or more; got nan"),
    (lambda: WarmupDecay(optimizer_of(1.0), 5, 5), "must be above warmup_steps, which is 5"),
    (lambda: WarmupDecay(optimizer_of(1.0), 0, 0), "total_steps must be a whole number, 1 or more"),
    (lambda: WarmupDecay(optimizer_of(1.0), -1, 5), "warmup_steps must be a whole number, 0 or"),
    (lambda: WarmupDecay(optimizer_of(1.0), 1, 5, 1.5), r"final must be a number in \[0, 1\]; got"),
    (lambda: WarmupDecay(optimizer_of(1.0), 1, 5, 0, "x"), "must be linear or cosine; got 'x'"),
    (lambda: NewBob(optimizer_of(1.0), factor=1.0), r"NewBob: factor must be a number in \(0, 1\)"),
    (lambda: NewBob(optimizer_of(1.0), threshold=-1), r"threshold must be a number in \[0, inf\)"),
    (lambda: NewBob(optimizer_of(1.0), mode="up"), "NewBob: mode must be min or max; got 'up'"),
    (lambda: Plateau(optimizer_of(1.0), patience=-1), "Plateau: patience must be a whole number"),
    (lambda: Plateau(optimizer_of(1.0), min_lr=math.nan), "Plateau: min_lr must be a number in"),
    (lambda: EarlyStopping(mode="down"), "EarlyStopping: mode must be min or max; got 'down'"),
    (lambda: EarlyStopping(patience=0), "EarlyStopping: patience must be a whole number, 1 or"),
    (lambda: EarlyStopping(min_delta=-0.1), r"min_delta must be a number in \[0, inf\); got -0.1"),
]


@pytest.mark.parametrize(("make", "sentence"), BAD)
def test_what_cannot_be_is_refused_with_a_sentence(make: Callable[[], Any], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        make()


def test_a_yaml_may_write_a_count_as_25e1() -> None:
    assert Noam(optimizer_of(1.0), 25e1).warmup_steps == 250  # type: ignore[arg-type]


# --- early stopping ----------------------------------------------------------------------------


def stops_at(stopping: EarlyStopping, values: list[float]) -> int | None:
    for number, value in enumerate(values, start=1):
        if stopping.update(value):
            return number
    return None


@pytest.mark.parametrize("offset", [-10.0, 0.0, 10.0])
@pytest.mark.parametrize("mode", ["min", "max"])
def test_a_plateau_ends_the_run_after_patience_and_progress_never_does(
    mode: str, offset: float
) -> None:
    better = -1.0 if mode == "min" else 1.0
    progress = [offset + better * n for n in range(10)]
    stopping = EarlyStopping("wer", mode, patience=3)  # type: ignore[arg-type]
    assert stops_at(stopping, progress) is None
    assert stops_at(stopping, [progress[-1]] * 10) == 3
    assert stopping.best == progress[-1]


@given(
    values=st.lists(st.floats(allow_infinity=True, allow_nan=True, width=32), max_size=20),
    patience=st.integers(1, 4),
    margin=st.sampled_from([0.0, 0.5]),
    mode=st.sampled_from(["min", "max"]),
)
@settings(max_examples=200, deadline=None)
def test_it_stops_exactly_when_the_last_patience_values_did_not_beat_the_best(
    values: list[float], patience: int, margin: float, mode: str
) -> None:
    expected, best, since = None, None, 0
    for number, value in enumerate(values, start=1):
        gain = 0.0 if best is None else (best - value if mode == "min" else value - best)
        if math.isfinite(value) and (best is None or gain > margin):
            best, since = value, 0
        else:
            since += 1
        if since == patience:
            expected = number
            break
    stopping = EarlyStopping("loss", mode, patience, margin)  # type: ignore[arg-type]
    assert stops_at(stopping, values) == expected


@pytest.mark.parametrize("stop", range(6))
def test_early_stopping_goes_on_where_it_was(stop: int) -> None:
    values = [3.0, 2.0, math.nan, 2.5, 2.0, 2.0]
    whole = EarlyStopping(patience=4)
    expected = [whole.update(value) for value in values]
    first = EarlyStopping(patience=4)
    head = [first.update(value) for value in values[:stop]]
    second = EarlyStopping(patience=4)
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    assert head + [second.update(value) for value in values[stop:]] == expected
    assert expected == [False] * 5 + [True]
    with pytest.raises(ValueError, match=r"does not fit EarlyStopping: missing \['waited'\]"):
        second.load_state_dict({"best": 1.0})
