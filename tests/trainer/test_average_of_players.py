"""The average of the weights of several optimizers: each counts its own steps."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.trainer.small import Players, batches, ema_of, make
from trainer import Stage
from trainer.checkpoint import Checkpointer

PLAYERS = ("discriminator", "generator")


class Critics(Players):
    """The discriminator moves with each batch, the generator with every third."""

    def fit_batch(self, batch: Any) -> Tensor:
        fake = self.modules.generator(batch["x"])
        loss = self.loss_d(batch, fake.detach())
        self.optimize(loss, "discriminator")
        if self.step % 3 == 0:
            self.optimize(self.loss_g(batch, fake), "generator")
        for name in PLAYERS:
            now = weights(self, name)
            if not torch.equal(self.history[name][-1], now):
                self.history[name].append(now)
        return loss


def weights(brain: Any, player: str) -> Tensor:
    return torch.cat([p.detach().flatten() for p in brain.modules[player].parameters()])


def trained(decay: Any, **options: Any) -> Any:
    brain = make(Critics, ema_decay=decay, **options)
    brain.history = {name: [weights(brain, name)] for name in PLAYERS}
    brain.fit([1, 2], batches(9))
    return brain


@pytest.mark.parametrize(
    "each",
    [
        {"discriminator": 0.8, "generator": 0.8},
        {"discriminator": 0.9, "generator": 0.5},
        {"discriminator": None, "generator": 0.5},
    ],
)
def test_the_average_of_a_player_is_over_its_own_steps(each: dict[str, float | None]) -> None:
    one = set(each.values()) == {0.8}
    brain = trained(0.8 if one else each)
    assert [len(brain.history[name]) for name in PLAYERS] == [19, 7]
    kept = ema_of(brain).state_dict()["average"]
    for player, decay in each.items():
        names = [f"{player}.{name}" for name, _ in brain.modules[player].named_parameters()]
        if decay is None:
            assert kept.keys().isdisjoint(names)
            continue
        first, *others = brain.history[player]
        expected = first.double()
        for now in others:
            expected = decay * expected + (1 - decay) * now
        found = torch.cat([kept[name].flatten() for name in names]).double()
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-7)


def test_a_player_without_an_average_is_tested_by_its_own_weights(tmp_path: Path) -> None:
    used: dict[str, Tensor] = {}

    class Looking(Critics):
        def evaluate_batch(self, batch: Any, stage: Stage) -> Tensor:
            used.update({name: weights(self, name) for name in PLAYERS})
            return super().evaluate_batch(batch, stage)

    brain = make(Looking, ema_decay={"generator": 0.5}, checkpointer=Checkpointer(tmp_path))
    brain.history = {name: [weights(brain, name)] for name in PLAYERS}
    brain.fit([1, 2], batches(9))
    brain.evaluate(batches(1))
    assert torch.equal(used["discriminator"], weights(brain, "discriminator"))
    assert not torch.equal(used["generator"], weights(brain, "generator"))


def test_an_unknown_player_and_a_wrong_decay_are_refused() -> None:
    with pytest.raises(ValueError, match="ema_decay names the optimizer 'critic', which does not"):
        trained({"critic": 0.5})
    with pytest.raises(ValueError, match="ema_decay must be a number from 0 to 1"):
        make(Critics, ema_decay={"generator": 1.5})
