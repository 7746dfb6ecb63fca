"""From a loss to a step: a window is one big batch, fp16 is true, what is lost moves nothing."""

import copy
import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from tests.trainer.small import optimize, poison, same, snapshot
from trainer.checkpoint.migrate import complete
from trainer.clipping import Clipper, Gradients, NormClip
from trainer.metrics import StepReport
from trainer.optim import step
from trainer.optim.build import connect
from trainer.optim.step import Update, WindowState


def scaler(precision: str) -> torch.amp.GradScaler:
    return torch.amp.GradScaler("cpu", enabled=precision == "fp16")


def net(seed: int = 0, dtype: torch.dtype = torch.float32) -> nn.Linear:
    torch.manual_seed(seed)
    return nn.Linear(4, 3).to(dtype)


class Watched(NormClip):
    """Clips as its parent does, and keeps the gradients that the optimizer then sees."""

    def __init__(self, limit: float | None = None) -> None:
        super().__init__(limit)
        self.seen: list[list[Tensor]] = []

    def __call__(self, gradients: Gradients) -> bool:
        clipped = super().__call__(gradients)
        self.seen.append([tensor.clone() for tensor in gradients.tensors])
        return clipped


def update(
    *modules: nn.Module, name: str = "main", precision: str = "fp32", window: int = 1,
    clip: Clipper | None = None, kind: Any = torch.optim.Adam, **options: Any
) -> Update:  # fmt: skip
    params = [p for module in modules for p in module.parameters()]
    optimizer = kind(params, lr=0.01)
    return Update(name, optimizer, scaler(precision), clip or Watched(), None, window, **options)


def test_poison_is_poison() -> None:
    parameter = nn.Parameter(torch.ones(2, 2))
    assert poison(parameter).item() == 0.0
    poison(parameter).backward()
    assert parameter.grad is not None
    assert parameter.grad.isnan().sum() == 1


# --- accumulation --------------------------------------------------------------------------------


@given(
    sizes=st.lists(st.integers(0, 7), min_size=1, max_size=6).filter(sum),
    wide=st.booleans(),
    precision=st.sampled_from(["fp32", "fp16"]),
)
@settings(max_examples=60, deadline=None)
def test_a_window_of_ragged_batches_is_one_big_batch(
    sizes: list[int], wide: bool, precision: str
) -> None:
    dtype, tolerance = (
        (torch.float64, 1e-12) if wide and precision == "fp32" else (torch.float32, 1e-6)
    )
    torch.manual_seed(sum(sizes))
    x, y = torch.randn(sum(sizes), 4, dtype=dtype), torch.randn(sum(sizes), 3, dtype=dtype)
    parted, whole = net(dtype=dtype), net(dtype=dtype)
    one = update(parted, window=len(sizes), precision=precision)
    two = update(whole)
    for a, b in zip(x.split(sizes), y.split(sizes), strict=True):
        # The mean over no example is NaN, of weight 0.
        report = optimize([one], (parted(a) - b).square().mean(), len(a))[0]
    expected = optimize([two], (whole(x) - y).square().mean(), len(x))[0]
    assert report.outcome == expected.outcome == "stepped"
    assert report.weight == sum(sizes)
    assert report.loss == pytest.approx(expected.loss, rel=tolerance)
    assert report.norm == pytest.approx(expected.norm, rel=max(tolerance, 1e-7))
    for mine, truth in zip(one.clip.seen[0], two.clip.seen[0], strict=True):
        torch.testing.assert_close(mine, truth, rtol=tolerance, atol=tolerance)


@given(
    weights=st.lists(st.tuples(st.integers(0, 3), st.booleans()), min_size=1, max_size=5),
    precision=st.sampled_from(["fp32", "fp16"]),
)
@settings(max_examples=60, deadline=None)
def test_a_weight_on_the_device_counts_as_its_number_does(
    weights: list[tuple[int, bool]], precision: str
) -> None:
    models = net(), net()
    known, read = (update(m, window=len(weights), precision=precision) for m in models)
    torch.manual_seed(sum(number for number, _ in weights))
    for number, on_device in weights:
        x = torch.randn(2, 4)
        expected = optimize([known], models[0](x).square().mean(), float(number))[0]
        weight: Any = torch.tensor(number) if on_device else float(number)
        found = optimize([read], models[1](x).square().mean(), weight)[0]
        if found.outcome == "accumulated" and on_device:
            assert math.isnan(found.weight)  # It is not known yet.
    assert (found.outcome, found.weight) == (expected.outcome, expected.weight)
    if found.outcome == "skipped":
        assert same(snapshot(models[1]), snapshot(net()))
        return
    assert found.loss == pytest.approx(expected.loss, rel=1e-6)
    assert found.norm == pytest.approx(expected.norm, rel=1e-6)
    for mine, truth in zip(read.clip.seen[0], known.clip.seen[0], strict=True):
        torch.testing.assert_close(mine, truth, rtol=1e-6, atol=1e-7)


def test_an_open_window_with_a_weight_on_the_device_is_saved() -> None:
    models = net(), net()
    one, two = (update(m, window=2) for m in models)
    x = torch.randn(2, 3, 4)
    weights = torch.tensor([1.0, 3.0])
    optimize([one], models[0](x[0]).square().mean(), weights[0])
    WindowState(two, {"main": two}).load_state_dict(
        copy.deepcopy(WindowState(one, {"main": one}).state_dict())
    )
    first, second = (
        optimize([each], model(x[1]).square().mean(), weights[1])[0]
        for each, model in zip((one, two), models, strict=True)
    )
    assert first == second
    assert same(snapshot(models[0]), snapshot(models[1]))


@pytest.mark.parametrize("bad", [torch.ones(2), torch.ones(0)])
def test_a_weight_of_several_numbers_is_refused(bad: Tensor) -> None:
    model = net()
    with pytest.raises(ValueError, match="got a weight of shape"):
        optimize([update(model)], model(torch.ones(1, 4)).sum(), bad)


@pytest.mark.parametrize("filled", [1, 2, 3, 4])
def test_a_short_last_window_steps_with_what_is_in_it(filled: int) -> None:
    model = net()
    x = torch.randn(filled, 5, 4)
    expected = net()
    expected(x.reshape(-1, 4)).square().mean().backward()
    short = update(model, window=5)
    for number in range(filled):
        reports = optimize([short], model(x[number]).square().mean(), 5)
        assert reports[0].outcome == "accumulated"
    report = step.close([short], step.settle([short]))[0]
    assert (report.outcome, report.weight) == ("stepped", 5.0 * filled)
    assert expected.weight.grad is not None
    torch.testing.assert_close(short.clip.seen[0][0], expected.weight.grad, rtol=1e-6, atol=1e-6)


def test_the_last_batch_closes_its_window_when_it_is_said_to_be_the_last() -> None:
    model = net()
    one = update(model, window=4)
    loss = [model(torch.randn(2, 4)).square().mean() for _ in range(2)]
    assert optimize([one], loss[0])[0].outcome == "accumulated"
    assert optimize([one], loss[1], last=True)[0].outcome == "stepped"
    assert one.window.count == 0
    assert all(p.grad is None for p in model.parameters())


def test_a_window_without_any_example_moves_nothing() -> None:
    model = net()
    one = update(model)
    before = snapshot(model, one)
    report = optimize([one], model(torch.zeros(0, 4)).mean(), 0)[0]
    assert (report.outcome, report.weight) == ("skipped", 0.0)
    assert same(snapshot(model, one), before)


def test_half_precision_losses_are_summed_in_full() -> None:
    model = net()
    one = update(model, window=8)
    losses = [1000.0 + number for number in range(8)]
    for number in losses:
        zero = (model.weight * 0).sum().to(torch.bfloat16)
        report = optimize([one], zero + torch.tensor(number, dtype=torch.bfloat16), 1)[0]
    held = [float(torch.tensor(number, dtype=torch.bfloat16)) for number in losses]
    assert report.loss == pytest.approx(sum(held) / 8, rel=1e-6)


# --- what is not finite --------------------------------------------------------------------------


@pytest.mark.parametrize("window", [1, 4])
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("where", [0, -1])
def test_a_loss_that_is_not_finite_never_happened(
    bad: float, precision: str, window: int, where: int
) -> None:
    model = net()
    one = update(model, window=window, precision=precision, kind=torch.optim.AdamW)
    torch.manual_seed(1)
    batches = torch.randn(3, window, 5, 4)

    def run(batch: Tensor, factor: float) -> StepReport:
        return optimize([one], model(batch).square().mean() * factor, 5)[0]

    for batch in batches[0]:
        assert run(batch, 1.0).outcome in ("stepped", "accumulated")
    before = snapshot(model, one)
    factors = [1.0] * window
    factors[where] = bad
    for batch, factor in zip(batches[1], factors, strict=True):
        report = run(batch, factor)
    assert (report.outcome, report.loss, report.norm) == ("skipped", None, None)
    assert same(snapshot(model, one), before)
    assert one.window.count == 0
    assert all(p.grad is None for p in model.parameters())
    for batch in batches[2]:
        report = run(batch, 1.0)
    assert report.outcome == "stepped"


@pytest.mark.parametrize("window", [1, 4])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_one_bad_element_of_one_gradient_stops_the_step(bad: float, window: int) -> None:
    model = net()
    one = update(model, window=window)
    before = snapshot(model, one)
    for number in range(window):
        loss = model(torch.ones(2, 4)).mean()
        if number == 0:
            loss = loss + poison(model.bias, bad)
        report = optimize([one], loss)[0]
    assert report.outcome == "skipped"
    assert report.loss is not None
    assert math.isfinite(report.loss)
    assert report.norm is None
    assert same(snapshot(model, one), before)


def test_under_fp16_a_bad_gradient_is_an_overflow_until_the_scale_cannot_be_its_cause() -> None:
    model = net()
    one = update(model, precision="fp16")
    before = copy.deepcopy(model.state_dict())
    outcomes, scales = [], []
    for _ in range(19):
        report = optimize([one], model(torch.ones(2, 4)).mean() + poison(model.bias))[0]
        outcomes.append(report.outcome)
        scales.append(report.scale)
    assert outcomes == ["overflowed"] * 16 + ["skipped"] * 3
    assert scales == [65536.0 / 2**number for number in range(17)] + [1.0, 1.0]
    assert same(model.state_dict(), before)
    assert not one.optimizer.state


@pytest.mark.parametrize("window", [1, 4])
def test_skipping_gradients_freezes_exactly_the_parameters_that_are_not_finite(window: int) -> None:
    """The others move as if those had been frozen: the norm that is clipped is theirs alone."""
    poisoned, frozen = nn.Sequential(net(0), net(1)), nn.Sequential(net(0), net(1))
    frozen[1].weight.requires_grad_(False)
    options = {"window": window, "kind": torch.optim.AdamW}
    one = update(poisoned, clip=Watched(0.01), skip_nonfinite_grads=True, **options)
    two = update(frozen, clip=Watched(0.01), **options)
    for number in range(window):
        x = torch.randn(3, 4)
        for each, model in ((one, poisoned), (two, frozen)):
            loss = (model[0](x) + model[1](x)).square().mean()
            if model is poisoned and number == 0:
                loss = loss + poison(model[1].weight)
            report = optimize([each], loss, 3)[0]
            assert report.outcome == ("stepped" if number + 1 == window else "accumulated")
    assert same(poisoned.state_dict(), frozen.state_dict())
    assert one.clip.seen[0][0].shape == (3, 4)
    assert same(one.clip.seen, two.clip.seen)
    assert torch.equal(poisoned[1].weight, net(1).weight)


def test_skipping_gradients_where_none_is_finite_skips_the_step() -> None:
    model = net()
    one = update(model, skip_nonfinite_grads=True)
    before = snapshot(model, one)
    loss = model(torch.ones(1, 4)).mean() + poison(model.weight) + poison(model.bias)
    report = optimize([one], loss)[0]
    assert (report.outcome, report.norm) == ("skipped", None)
    assert same(snapshot(model, one), before)


def test_skipping_gradients_is_ignored_under_a_scaler_with_a_warning() -> None:
    model = net()
    with pytest.warns(UserWarning, match="skip_nonfinite_grads is ignored under precision fp16"):
        one = update(model, precision="fp16", skip_nonfinite_grads=True)
    before = copy.deepcopy(model.state_dict())
    loss = model(torch.ones(1, 4)).mean() + poison(model.weight)
    assert optimize([one], loss)[0].outcome == "overflowed"
    assert same(model.state_dict(), before)


# --- fp16 with two optimizers --------------------------------------------------------------------


class Two:
    """Two networks with an optimizer each, and the same in full precision beside them."""

    def __init__(self, window: int = 1) -> None:
        self.nets = {"a": net(0), "b": net(1)}
        self.truth = {"a": net(0), "b": net(1)}
        self.updates = {
            name: update(each, name=name, precision="fp16", window=window)
            for name, each in self.nets.items()
        }
        connect(list(self.updates.values()), {})

    def losses(self, x: Tensor, nets: dict[str, nn.Linear]) -> dict[str, Tensor]:
        """Each network learns, and "b" is judged by "a"."""
        a = nets["a"](x).square().mean()
        return {"a": a, "b": nets["a"](nets["b"](x).tanh() @ torch.ones(3, 4)).square().mean()}

    def check(self, batches: list[Tensor], name: str) -> None:
        """Check that what the optimizer saw last is the true gradient of the window, to 1e-6."""
        params = list(self.truth[name].parameters())
        for x in batches:
            loss = self.losses(x, self.truth)[name] / len(batches)
            for p, grad in zip(params, torch.autograd.grad(loss, params), strict=True):
                p.grad = grad if p.grad is None else p.grad + grad
        for mine, p in zip(self.updates[name].clip.seen[-1], params, strict=True):
            assert p.grad is not None
            torch.testing.assert_close(mine, p.grad, rtol=1e-6, atol=1e-6)
            p.grad = None
        self.truth[name].load_state_dict(self.nets[name].state_dict())

    def steps(self, name: str) -> int:
        """Return how often this scaler has been told of a good step (it doubles after 2000)."""
        return int(self.updates[name].scaler.state_dict()["_growth_tracker"])


@pytest.mark.parametrize("window", [1, 4])
def test_both_backward_then_both_step_sees_true_gradients(window: int) -> None:
    two = Two(window)
    for _ in range(3):
        torch.manual_seed(2)
        batches = list(torch.randn(window, 5, 4))
        for number, x in enumerate(batches):
            losses = two.losses(x, two.nets)
            step.accumulate([two.updates["a"]], losses["a"], 5, retain_graph=True)
            step.accumulate([two.updates["b"]], losses["b"], 5)
            for each in two.updates.values():
                report = step.finish([each], 5)[0]
                assert report.stepped == (number + 1 == window)
        for name in ("b", "a"):  # "b" is judged by "a" as it was before the step.
            two.check(batches, name)
    assert [two.steps(name) for name in "ab"] == [3, 3]


@pytest.mark.parametrize("window", [1, 4])
def test_an_overflow_of_one_leaves_the_other_alone(window: int) -> None:
    two = Two(window)
    before = snapshot(two.nets["a"], two.updates["a"].optimizer)
    batches = list(torch.randn(window, 5, 4))
    for x in batches:
        losses = two.losses(x, two.nets)
        bad = losses["a"] + poison(two.nets["a"].bias, math.inf)
        first = optimize([two.updates["a"]], bad, 5)[0]
        second = optimize([two.updates["b"]], two.losses(x, two.nets)["b"], 5)[0]
    assert (first.outcome, second.outcome) == ("overflowed", "stepped")
    assert same(snapshot(two.nets["a"], two.updates["a"].optimizer), before)
    two.check(batches, "b")
    scales = [two.updates[name].scaler.get_scale() for name in "ab"]
    assert scales == [65536.0 / 2, 65536.0]
    assert [two.steps(name) for name in "ab"] == [0, 1]


def test_one_that_is_left_out_keeps_its_scaler() -> None:
    two = Two()
    for number in range(4):
        x = torch.randn(5, 4)
        optimize([two.updates["b"]], two.losses(x, two.nets)["b"], 5)
        two.check([x], "b")
        if number == 2:
            optimize([two.updates["a"]], two.losses(x, two.nets)["a"], 5)
            two.check([x], "a")
    assert [two.steps(name) for name in "ab"] == [1, 4]


@pytest.mark.parametrize("window", [1, 4])
def test_a_joint_step_of_two_optimizers_sees_true_gradients(window: int) -> None:
    two = Two(window)
    both = list(two.updates.values())
    for _ in range(2):
        batches = list(torch.randn(window, 5, 4))
        for x in batches:
            loss = sum(two.losses(x, two.nets).values())
            reports = optimize(both, loss, 5)
        assert [report.outcome for report in reports] == ["stepped", "stepped"]
        truth = {name: [torch.zeros_like(p) for p in two.truth[name].parameters()] for name in "ab"}
        for x in batches:
            joint = sum(two.losses(x, two.truth).values()) / window
            params = [p for name in "ab" for p in two.truth[name].parameters()]
            flat = [grad for name in "ab" for grad in truth[name]]
            for total, grad in zip(flat, torch.autograd.grad(joint, params), strict=True):
                total += grad
        for name in "ab":
            for mine, grad in zip(two.updates[name].clip.seen[-1], truth[name], strict=True):
                torch.testing.assert_close(mine, grad, rtol=1e-6, atol=1e-6)
            two.truth[name].load_state_dict(two.nets[name].state_dict())
    # The loss has one scale: the first one's, updated once a step.
    assert [two.steps(name) for name in "ab"] == [2, 0]


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_a_joint_step_moves_all_or_nothing(precision: str) -> None:
    nets = [net(0), net(1)]
    both = [update(each, precision=precision) for each in nets]
    before = snapshot(*nets, *(each.optimizer for each in both))
    loss = sum(each(torch.ones(2, 4)).mean() for each in nets) + poison(nets[1].bias)
    reports = optimize(both, loss)
    outcome = "overflowed" if precision == "fp16" else "skipped"
    assert [report.outcome for report in reports] == [outcome] * 2
    assert same(snapshot(*nets, *(each.optimizer for each in both)), before)
    loss = sum(each(torch.ones(2, 4)).mean() for each in nets)
    assert [report.outcome for report in optimize(both, loss)] == ["stepped"] * 2


def test_a_joint_step_may_leave_one_without_gradients() -> None:
    nets = [net(0), net(1)]
    both = [update(each, precision="fp16") for each in nets]
    report = optimize(both, nets[1](torch.ones(2, 4)).mean())
    assert [each.outcome for each in report] == ["stepped"] * 2
    assert torch.equal(nets[0].weight, net(0).weight)
    assert not torch.equal(nets[1].weight, net(1).weight)


@pytest.mark.parametrize(("factor", "named"), [(0.5, True), (2.0, True), (1.0, False)])
def test_a_joint_window_goes_on_under_another_scale(factor: float, named: bool) -> None:
    """All its gradients have the scale of the first optimizer; the others have scales, too."""
    two = Two(window=2)
    both = list(two.updates.values())
    batches = list(torch.randn(2, 5, 4))
    step.accumulate(both, sum(two.losses(batches[0], two.nets).values()), 5)
    states = [WindowState(each, two.updates) for each in both]
    saved = [copy.deepcopy(each.state_dict()) for each in states]
    for state in saved if not named else ():
        del state["lead"]  # As in a checkpoint of an earlier version.
    for each in both:
        each.drop_window()
    both[0].scaler.update(both[0].scaler.get_scale() * factor)
    for each, state in zip(states, saved, strict=True):
        each.load_state_dict(complete({"windows.a": state})["windows.a"])
    step.accumulate(both, sum(two.losses(batches[1], two.nets).values()), 5)
    assert [report.outcome for report in step.finish(both, 5)] == ["stepped"] * 2
    joint = sum(sum(two.losses(x, two.truth).values()) for x in batches) / 2
    for name in "ab":
        params = list(two.truth[name].parameters())
        truth = torch.autograd.grad(joint, params, retain_graph=True)
        for mine, grad in zip(two.updates[name].clip.seen[-1], truth, strict=True):
            torch.testing.assert_close(mine, grad, rtol=1e-6, atol=1e-6)


# --- what is refused -----------------------------------------------------------------------------


def refused(sentence: str, loss: Any, one: Update, weight: float = 1.0) -> None:
    with pytest.raises(ValueError, match=sentence):
        optimize([one], loss, weight)


def test_what_is_no_loss_is_refused_with_a_sentence() -> None:
    model = net()
    one = update(model)
    loss = model(torch.ones(2, 4))
    refused(
        r"optimize\('main'\) got a dict as its loss; allowed: a scalar tensor", {"a": loss}, one
    )
    refused(r"optimize\('main'\) got a float as its loss", 1.0, one)
    refused(r"got a loss of shape \(2, 3\); allowed: a scalar \(use loss.mean\(\)\)", loss, one)
    refused(
        "got a loss without a graph: no parameter that requires a gr", loss.mean().detach(), one
    )
    for weight in (-1.0, math.nan, math.inf):
        refused("got the weight .*; allowed: a finite number, 0 or more", loss.mean(), one, weight)
    assert all(p.grad is None for p in model.parameters())


def test_a_loss_that_reaches_none_of_the_optimizers_parameters_is_refused() -> None:
    model, other = net(0), net(1)
    for window in (1, 4):
        one = update(model, window=window)
        connect([one, update(other, name="other")], {})
        for _ in range(window - 1):
            optimize([one], other(torch.ones(2, 4)).mean())
        refused("reaches none of this optimizer's parameters", other(torch.ones(2, 4)).mean(), one)
    assert all(p.grad is None for p in other.parameters())


def test_optimizers_step_together_only_with_one_window() -> None:
    nets = [net(0), net(1)]
    x = torch.ones(2, 4)

    def joint() -> Tensor:
        return nets[0](x).mean() + nets[1](x).mean()

    for first, held in ((0, "'a' has 1 with 'a', 'b' has 0"), (1, "'a' has 0, 'b' has 1 with 'b'")):
        both = [update(each, name=name, window=2) for each, name in zip(nets, "ab", strict=True)]
        step.accumulate([both[first]], nets[first](x).mean(), 2)
        sentence = rf"got a loss for 'a', 'b', whose open .* have other losses \({held}\): until"
        with pytest.raises(ValueError, match=sentence):
            step.accumulate(both, joint(), 2)
        both[first].drop_window()
    both = [update(each, name=name, window=2) for each, name in zip(nets, "ab", strict=True)]
    step.accumulate(both, joint(), 2)
    with pytest.raises(ValueError, match=r"a loss for 'b', .* other losses \('b' has 1 with 'a'\)"):
        step.accumulate(both[1:], nets[1](x).mean(), 2)


def test_optimizers_that_share_a_parameter_do_not_step_together() -> None:
    model, other = net(0), net(1)
    both = [update(model, name="a"), update(model, other, name="b")]
    connect(both, {})
    with pytest.raises(
        ValueError, match="'a', 'b' step together, and 'a' and 'b' share a parameter"
    ):
        step.accumulate(both, model(torch.ones(2, 4)).mean(), 2)


def test_an_optimizer_whose_parameters_are_all_frozen_is_refused() -> None:
    model, other = net(0), net(1)
    one = update(model)
    connect([one, update(other, name="other")], {})
    model.requires_grad_(False)
    refused(
        "no parameter of this optimizer requires a gradient", other(torch.ones(1, 4)).mean(), one
    )


def test_weights_that_moved_under_a_loss_are_named() -> None:
    first, second = net(0), net(1)
    one, two = update(first, name="one"), update(second, name="two")
    x = torch.ones(2, 4)
    judged = first(second(x) @ torch.ones(3, 4)).square().mean()
    optimize([one], first(x).square().mean())
    refused(
        r"optimize\('two'\): the graph of this loss holds weights that another opt", judged, two
    )


# --- gradients that are not one's own ------------------------------------------------------------


def test_a_loss_leaves_gradients_in_its_own_optimizer_alone() -> None:
    first, second = net(0), net(1)
    one = update(first, window=2)
    connect([one, update(second, name="two")], {})
    loss = (first(torch.ones(2, 4)) * second(torch.ones(2, 4))).mean()
    assert optimize([one], loss, retain_graph=True)[0].outcome == "accumulated"
    assert all(p.grad is None for p in second.parameters())
    assert all(p.requires_grad for p in second.parameters())
    assert all(p.grad is not None for p in first.parameters())
    assert optimize([one], loss)[0].outcome == "stepped"
    assert all(p.grad is None for p in (*first.parameters(), *second.parameters()))


def test_parameters_that_no_optimizer_has_are_named_once_and_keep_their_gradients() -> None:
    first, second = net(0), net(1)
    one = update(first)
    connect([one], {p: f"second.{name}" for name, p in second.named_parameters()})
    second.weight.grad = held = torch.ones_like(second.weight)
    x = torch.ones(2, 4)
    with pytest.warns(
        UserWarning, match=r"reaches 2 parameters that no optimizer has .* not train"
    ):
        optimize([one], (first(x) * second(x)).mean())
    optimize([one], (first(x) * second(x)).mean())  # Warns no more.
    assert second.weight.grad is held
    assert torch.equal(held, torch.ones_like(held))
    assert second.bias.grad is None


@pytest.mark.parametrize("reentrant", [True, False])
def test_a_checkpointed_player_trains_and_reaches_no_other(reentrant: bool) -> None:
    """Of both kinds of torch's checkpointing, with the other player's loss through it."""
    nets = {"g": net(0), "d": nn.Linear(3, 1)}
    updates = {name: update(each, name=name) for name, each in nets.items()}
    connect(list(updates.values()), {})
    x = torch.randn(5, 4, generator=torch.Generator().manual_seed(0), requires_grad=True)
    fake = checkpoint(nets["g"], x, use_reentrant=reentrant)
    judged = nets["d"](fake).square().mean()
    expected = torch.autograd.grad(nets["d"](nets["g"](x)).square().mean(), nets["g"].weight)[0]
    optimize([updates["g"]], judged)
    seen = updates["g"].clip.seen[-1][0]  # type: ignore[attr-defined]
    torch.testing.assert_close(seen, expected, rtol=1e-6, atol=1e-6)
    assert all(
        p.grad is None and p.requires_grad for each in nets.values() for p in each.parameters()
    )


def test_a_checkpointed_judge_is_frozen_or_refused_in_words() -> None:
    nets = {"g": net(0), "d": nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 1))}
    updates = {name: update(each, name=name) for name, each in nets.items()}
    connect(list(updates.values()), {})

    def loss() -> Tensor:
        return checkpoint(nets["d"], nets["g"](torch.ones(5, 4)), use_reentrant=False).mean()

    with pytest.raises(ValueError, match=r"optimize\('g'\): a checkpointed part .* within frozen"):
        optimize([updates["g"]], loss())
    assert all(p.requires_grad for p in nets["d"].parameters())
    updates["g"].drop_window()
    nets["d"].requires_grad_(False)  # As within frozen("d").
    judged = loss()
    nets["d"].requires_grad_(True)
    assert optimize([updates["g"]], judged)[0].outcome == "stepped"


def test_a_report_says_what_was_measured() -> None:
    model = net()
    one = update(model, clip=Watched(0.5))
    loss = model(torch.ones(2, 4)).square().sum() * 10
    model_norm = torch.cat(
        [
            grad.reshape(-1)
            for grad in torch.autograd.grad(loss, list(model.parameters()), retain_graph=True)
        ]
    ).norm()
    report = optimize([one], loss, 2)[0]
    assert report == StepReport(
        "main", "stepped", pytest.approx(loss.item()), 2, pytest.approx(float(model_norm)),
        pytest.approx(0.5, rel=1e-5), 0.5, True, 1.0, 0.01,
    )  # fmt: skip
    assert one.last_norm == report.norm
