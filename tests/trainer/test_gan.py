"""Two players with an optimizer each: neither leaves anything in the other, frozen or not."""

import copy
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.trainer.small import Players, batches, everything, make, net, same, snapshot
from trainer import Brain, Stage
from trainer.clipping import Gradients, NormClip

ADAM = partial(torch.optim.AdamW, lr=0.01)
OTHER = {"discriminator": "generator", "generator": "discriminator"}


class Careless(Players):
    """A fit_batch that freezes and detaches nothing, and looks at what each update leaves."""

    def fit_batch(self, batch: Any) -> dict[str, Tensor]:
        with self.autocast():
            fake = self.modules.generator(batch["x"])
            loss_d = self.loss_d(batch, fake)
        self.watched(loss_d, "discriminator", retain_graph=True)
        with self.autocast():
            loss_g = self.loss_g(batch, self.modules.generator(batch["x"]))
        self.watched(loss_g, "generator")
        return {"d": loss_d, "g": loss_g}

    def watched(self, loss: Tensor, name: str, **options: Any) -> None:
        other = self.updates[OTHER[name]]
        before = self.weights_and_gradients(other)
        report = self.optimize(loss, name, **options)
        assert same(self.weights_and_gradients(other), before)
        self.closed = [*getattr(self, "closed", []), report.outcome]

    def weights_and_gradients(self, update: Any) -> list[Any]:
        params = [p for group in update.optimizer.param_groups for p in group["params"]]
        grads = [None if p.grad is None else p.grad.clone() for p in params]
        return [copy.deepcopy([p.detach() for p in params]), grads, snapshot(update)]


@pytest.mark.parametrize("factor", [1, 4])
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_an_update_leaves_the_other_player_bit_identical(factor: int, precision: str) -> None:
    brain = make(Careless, norm=False, grad_accumulation_factor=factor, precision=precision)
    brain.fit([1, 2], batches(2 * factor))
    assert len(brain.closed) == 8 * factor
    assert brain.closed.count("accumulated") == 8 * (factor - 1)
    assert brain.closed.count("stepped") >= 2


@pytest.mark.parametrize("factor", [1, 4])
def test_forgetting_to_freeze_and_to_detach_changes_nothing(factor: int) -> None:
    careful, careless = (
        make(kind, grad_accumulation_factor=factor) for kind in (Players, Careless)
    )
    for brain in (careful, careless):
        brain.fit([1, 2], batches(2 * factor + 1))
    assert same(everything(careful), everything(careless))


@pytest.mark.parametrize("factor", [1, 3])
def test_it_is_the_loop_that_one_would_write_by_hand(factor: int) -> None:
    data = batches(2 * factor)
    brain = make(
        Players,
        grad_accumulation_factor=factor,
        max_grad_norm={"generator": 0.05, "discriminator": None},
    )
    brain.fit([1], data)
    d, g = net(0), net(1)
    hand = make(Players)
    hand.modules.update({"discriminator": d, "generator": g})
    opt_d, opt_g = ADAM(d.parameters()), ADAM(g.parameters())
    for window in (data[:factor], data[factor:]):
        # Within a window each loss sees the weights of its start, but for its last batch: there the
        # generator meets the discriminator that has just moved.
        for number, batch in enumerate(window):
            fake = g(batch["x"])
            grads = torch.autograd.grad(
                hand.loss_d(batch, fake.detach()) / factor, list(d.parameters())
            )
            add(d, grads)
            if number + 1 == factor:
                opt_d.step()
                opt_d.zero_grad()
            grads = torch.autograd.grad(hand.loss_g(batch, fake) / factor, list(g.parameters()))
            add(g, grads)
        torch.nn.utils.clip_grad_norm_(g.parameters(), 0.05)
        opt_g.step()
        opt_g.zero_grad()
    for name, truth in (("discriminator", d), ("generator", g)):
        for mine, theirs in zip(brain.modules[name].parameters(), truth.parameters(), strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-6)


def add(module: torch.nn.Module, grads: tuple[Tensor, ...]) -> None:
    for p, grad in zip(module.parameters(), grads, strict=True):
        p.grad = grad if p.grad is None else p.grad + grad


# --- frozen --------------------------------------------------------------------------------------


def test_frozen_players_are_constants_through_which_gradients_flow() -> None:
    class Curious(Players):
        def fit_batch(self, batch: Any) -> Tensor:
            d, g = self.modules.discriminator, self.modules.generator
            d[2].bias.requires_grad_(False)  # What the recipe has frozen for good stays so.
            with self.frozen("discriminator"):
                assert not any(p.requires_grad for p in d.parameters())
                loss = self.loss_g(batch, g(batch["x"]))
                with self.frozen("discriminator", "generator"):
                    assert not any(p.requires_grad for p in self.modules.parameters())
                assert not any(p.requires_grad for p in d.parameters())
                assert all(p.requires_grad for p in g.parameters())
            with pytest.raises(KeyError), self.frozen("discriminator"):
                raise KeyError
            assert [p.requires_grad for p in d.parameters()] == [True, True, True, False]
            loss.backward(inputs=list(g.parameters()), retain_graph=True)
            assert all(p.grad is not None and p.grad.any() for p in g.parameters())
            self.zero_grad()
            self.optimize(loss, "generator")
            return loss

    make(Curious).fit([1], batches(1))


# --- freeze_optimizers ---------------------------------------------------------------------------


class Alternating(Players):
    """One loss for both; freeze_optimizers says who learns from it, by the step."""

    def fit_batch(self, batch: Any) -> Any:
        fake = self.modules.generator(batch["x"])
        report = self.optimize(self.loss_g(batch, fake) + self.loss_d(batch, fake))
        for name, update in self.updates.items():
            frozen = name not in self.turns[-1]
            if frozen:
                assert all(p.grad is None for p in self.modules[name].parameters())
                assert update.window.count == 0
        return report

    def freeze_optimizers(self, optimizers: dict[str, Any]) -> dict[str, Any]:
        self.turns = getattr(self, "turns", [])
        self.turns.append(["generator"] if len(self.turns) % 3 else list(optimizers))
        return {name: optimizers[name] for name in self.turns[-1]}


@pytest.mark.parametrize("factor", [1, 4])
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_frozen_optimizers_collect_nothing_and_are_asked_once_a_window(
    factor: int, precision: str
) -> None:
    brain = make(Alternating, grad_accumulation_factor=factor, precision=precision)
    brain.fit([1, 2], batches(6 * factor))
    both = ["discriminator", "generator"]
    assert brain.turns == [both, ["generator"], ["generator"]] * 4
    if precision == "fp32":
        steps = {
            name: int(next(iter(update.optimizer.state.values()))["step"])
            for name, update in brain.updates.items()
        }
        assert steps == {"discriminator": 4, "generator": 12}


def test_who_is_frozen_is_asked_anew_as_long_as_no_window_is_open() -> None:
    class Looking(Alternating):
        def fit_batch(self, batch: Any) -> Any:
            assert self.closes_window()
            if self.step == 3:
                return super().fit_batch(batch)
            return None

    brain = make(Looking)
    brain.fit([1], batches(3))
    assert len(brain.turns) == 3
    assert not brain.updates["discriminator"].optimizer.state  # Its turn was the first.


def test_the_default_fit_batch_trains_those_that_are_not_frozen() -> None:
    class Default(Players):
        fit_batch = Brain.fit_batch

        def compute_forward(self, batch: Any, stage: Stage) -> Tensor:
            return self.modules.generator(batch["x"])

        def compute_objectives(self, predictions: Tensor, batch: Any, stage: Stage) -> Tensor:
            return self.loss_g(batch, predictions)

        def freeze_optimizers(self, optimizers: dict[str, Any]) -> dict[str, Any]:
            return {"generator": optimizers["generator"]} if self.epoch == 1 else optimizers

    brain = make(Default)
    start = copy.deepcopy(brain.modules.discriminator.state_dict())
    brain.fit([1], batches(3))
    assert same(brain.modules.discriminator.state_dict(), start)
    assert not brain.updates["discriminator"].optimizer.state
    brain.fit([2], batches(3))
    assert not same(brain.modules.discriminator.state_dict(), start)


# --- losses that share a graph -------------------------------------------------------------------


class AtOnce(Players):
    """Both losses come from one forward pass, and both backward passes before any step."""

    def fit_batch(self, batch: Any) -> Any:
        with self.autocast():
            fake = self.modules.generator(batch["x"])
            losses = {
                "discriminator": self.loss_d(batch, fake),
                "generator": self.loss_g(batch, fake),
            }
        report = self.optimize(losses)
        assert report.name == "discriminator"
        return losses


class Keeping(NormClip):
    """Keeps the gradients that the optimizer gets."""

    def __init__(self) -> None:
        super().__init__(None)
        self.seen: list[Tensor] = []

    def __call__(self, gradients: Gradients) -> bool:
        self.seen = [tensor.clone() for tensor in gradients.tensors]
        return super().__call__(gradients)


@pytest.mark.parametrize("factor", [1, 4])
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_losses_of_one_call_go_backward_before_any_step(factor: int, precision: str) -> None:
    clips = {name: Keeping() for name in OTHER}
    brain = make(
        AtOnce, hparams={"clip": clips}, grad_accumulation_factor=factor, precision=precision
    )
    brain.autocast = torch.enable_grad  # The scaler alone: its gradients are exact.
    data = batches(factor)
    truth = {
        name: [torch.zeros_like(p) for p in brain.modules[name].parameters()] for name in OTHER
    }
    for batch in data:
        fake = brain.modules.generator(batch["x"])
        for name, loss in (
            ("discriminator", brain.loss_d(batch, fake)),
            ("generator", brain.loss_g(batch, fake)),
        ):
            params = list(brain.modules[name].parameters())
            for total, grad in zip(
                truth[name], torch.autograd.grad(loss, params, retain_graph=True), strict=True
            ):
                total += grad / factor
    brain.fit([1], data)
    for name in OTHER:
        for mine, grad in zip(clips[name].seen, truth[name], strict=True):
            torch.testing.assert_close(mine, grad, rtol=1e-6, atol=1e-6)
        state = brain.updates[name].scaler.state_dict()
        assert state.get("_growth_tracker", 1) == 1
    assert brain.optimizer_step == 1


def test_a_loss_that_holds_weights_which_have_moved_is_explained() -> None:
    class Late(Players):
        def fit_batch(self, batch: Any) -> Any:
            fake = self.modules.generator(batch["x"])
            loss_d, loss_g = self.loss_d(batch, fake.detach()), self.loss_g(batch, fake)
            self.optimize(loss_d, "discriminator")
            self.optimize(loss_g, "generator")

    with pytest.raises(ValueError, match=r"optimize\('generator'\): the graph of this loss holds"):
        make(Late).fit([1], batches(1))


def test_optimizers_that_share_a_parameter_cannot_accumulate_at_once() -> None:
    class Shared(Players):
        def init_optimizers(self) -> None:
            super().init_optimizers()
            self.optimizers_dict["generator"].add_param_group(
                {"params": [self.modules.discriminator[0].weight]}
            )

    make(Shared).fit([1], batches(2))
    sentence = "'discriminator' and 'generator' share the parameter discriminator.0.weight, and"
    with pytest.raises(ValueError, match=sentence):
        make(Shared, grad_accumulation_factor=2).fit([1], batches(2))


# --- limits --------------------------------------------------------------------------------------


def test_each_player_has_its_own_limit_and_report() -> None:
    class Reporting(Players):
        def optimize(self, *args: Any, **kwargs: Any) -> Any:
            report = super().optimize(*args, **kwargs)
            reports[report.name] = report
            return report

    reports: dict[str, Any] = {}
    limits = {"discriminator": 0.01, "generator": None}
    make(Reporting, max_grad_norm=limits).fit([1], batches(1))
    assert reports["discriminator"].clipped
    assert reports["discriminator"].limit == 0.01
    assert reports["discriminator"].norm_after == pytest.approx(0.01, rel=1e-3)
    assert not reports["generator"].clipped
    assert reports["generator"].limit == float("inf")
    make(Reporting, max_grad_norm={"discriminator": 0.01}).fit([1], batches(1))
    assert reports["generator"].limit == 5.0  # What is not named has the default.
    make(Reporting, max_grad_norm=0.02, clip="value").fit([1], batches(1))
    assert {report.limit for report in reports.values()} == {0.02}
    assert all(report.clipped and report.norm_after is None for report in reports.values())
