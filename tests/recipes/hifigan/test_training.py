"""Two players by `optimize`: who moves when, by what scores, and what a resumed run repeats."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import l1_loss

from recipes.hifigan.model import adversarial_loss, feature_loss
from recipes.hifigan.train import GRID, HiFiGAN
from tests.recipes.hifigan.tiny import HOP, PLAYERS, Waves, fit, make, weights
from tests.trainer.resuming import brain_state, differences, log
from trainer import Stage
from trainer.data.batch import collate


class Watched(HiFiGAN):
    """Notes which weights every judgement is made with, and who moves in which call."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.modules.discriminator.register_forward_pre_hook(self.asked)

    def asked(self, judge: Any, inputs: tuple[Tensor]) -> None:
        events.append(("judged", weights(self, "discriminator"), inputs[0].detach().clone()))

    def optimize(self, loss: Any, name: str | None = None, **options: Any) -> Any:
        before = {player: weights(self, player) for player in PLAYERS}
        report = super().optimize(loss, name, **options)
        moved = [p for p in PLAYERS if not torch.equal(before[p], weights(self, p))]
        events.append(("optimized", name, moved))
        return report


events: list[Any] = []


@pytest.fixture(autouse=True)
def _no_events() -> None:
    events.clear()


def test_the_discriminator_moves_first_and_judges_again(tmp_path: Path) -> None:
    brain = make(Watched, tmp_path)
    brain.fit([1], Waves(4), train_loader_kwargs={"batch_size": 4})
    kinds = [event[0] for event in events]
    assert kinds == ["judged", "judged", "optimized", "judged", "judged", "optimized"]
    first, second, step_d, third, fourth, step_g = events
    assert step_d[1:] == ("discriminator", ["discriminator"])
    assert step_g[1:] == ("generator", ["generator"])
    old, new = first[1], third[1]
    assert torch.equal(second[1], old)
    assert torch.equal(fourth[1], new)
    assert not torch.equal(old, new)
    assert torch.equal(new, weights(brain, "discriminator"))
    # The same signals before and after: real ones, and those that were generated once.
    real, fake = first[2], second[2]
    assert torch.equal(third[2], fake)
    assert torch.equal(fourth[2], real)
    assert not torch.equal(real, fake)


def test_the_generator_learns_from_scores_of_the_updated_discriminator(tmp_path: Path) -> None:
    losses: dict[str, Tensor] = {}

    class Kept(Watched):
        def fit_batch(self, batch: Any) -> dict[str, Tensor]:
            losses.update(super().fit_batch(batch))
            return losses

    brain = make(Kept, tmp_path, scales=0)  # Spectral norm would change with each judgement.
    brain.fit([1], Waves(4), train_loader_kwargs={"batch_size": 4})
    real, fake = events[0][2], events[1][2]
    judge = brain.modules.discriminator
    with torch.no_grad():
        now = adversarial_loss(judge(fake))
        features = feature_loss(judge(real), judge(fake))
        torch.nn.utils.vector_to_parameters(events[0][1], judge.parameters())
        before = adversarial_loss(judge(fake))
    losses = {name: loss.detach() for name, loss in losses.items()}
    torch.testing.assert_close(losses["adversarial"], now)
    torch.testing.assert_close(losses["features"], features)
    assert abs(float(before - now)) > 1e-4
    total = losses["adversarial"] + 2 * losses["features"] + 45 * losses["mel"]
    torch.testing.assert_close(losses["generator"], total)
    distances = [l1_loss(front(fake), front(real)) for front in fronts(brain)]
    torch.testing.assert_close(losses["mel"], distances[1])
    assert abs(float(distances[1] - distances[0])) > 1e-4


def fronts(brain: Any) -> list[Any]:
    """The mels that the generator takes, and those that it learns from."""
    return [brain.modules.mel, brain.modules.loss_mel]


def test_in_the_short_window_that_ends_an_epoch_the_order_is_the_same(tmp_path: Path) -> None:
    fit(make(Watched, tmp_path, grad_accumulation_factor=2), epochs=1, valid=False)
    first, _, step_d, again, _, step_g = events[12:]  # the last of three batches
    assert step_d[1:] == ("discriminator", ["discriminator"])
    assert step_g[1:] == ("generator", ["generator"])
    assert not torch.equal(first[1], again[1])


def test_the_discriminator_may_come_later(tmp_path: Path) -> None:
    brain = make(Watched, tmp_path, {"adversarial_from": 4})
    start = weights(brain, "discriminator")
    fit(brain, epochs=1)  # three batches
    assert [event[:2] for event in events] == [("optimized", "generator")] * 3
    assert torch.equal(weights(brain, "discriminator"), start)
    assert not brain.updates["discriminator"].optimizer.state
    events.clear()
    fit(make(Watched, tmp_path, {"adversarial_from": 4}))
    names = [event[1] for event in events if event[0] == "optimized"]
    assert names == ["generator", "discriminator", "generator", "discriminator", "generator"]


def test_each_player_has_its_own_of_everything(tmp_path: Path) -> None:
    brain = fit(make(HiFiGAN, tmp_path, precision="fp16"), epochs=1)
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if line["kind"] == "step"]
    assert steps
    for line in steps:
        assert set(line["optimizers"]) == set(PLAYERS)
        assert set(line["loss"]) == {
            "mel", "adversarial", "features", "discriminator", "generator",
        }  # fmt: skip
    assert set(brain.updates) == set(PLAYERS)
    rates = [brain.updates[player].lr for player in PLAYERS]
    assert rates[0] != rates[1]
    assert [brain.updates[player].clip.limit for player in PLAYERS] == [0.1, 20.0]
    scalers = [brain.updates[player].scaler for player in PLAYERS]
    assert scalers[0] is not scalers[1]
    assert all(scaler.is_enabled() for scaler in scalers)


def test_every_weight_of_both_moves(tmp_path: Path) -> None:
    brain = make(HiFiGAN, tmp_path)
    before = {n: p.detach().clone() for n, p in brain.modules.named_parameters()}
    fit(brain, epochs=1, valid=False)
    still = [n for n, p in brain.modules.named_parameters() if torch.equal(before[n], p)]
    assert still == []


# ---------------------------------------------------------------------------------------- resuming


class Stopping(HiFiGAN):
    """Saves after some batches, under names of their own."""

    trace: list[Any]
    stops: tuple[int, ...] = ()

    def fit_batch(self, batch: Any) -> dict[str, Tensor]:
        losses = super().fit_batch(batch)
        trace = traces.setdefault(self.options.output_folder, [])
        trace.append((list(batch.id), {name: loss.item() for name, loss in losses.items()}))
        if len(trace) in STOPS and "straight" in str(self.options.output_folder):
            self.checkpointer.save_checkpoint(name=f"stop-{len(trace)}")
        return losses


STOPS = (1, 2, 3, 5)  # batches: within windows, within epochs, before D comes and after
traces: dict[str | None, list[Any]] = {}


@pytest.mark.parametrize("window", [1, 2])
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_a_stopped_run_goes_on_exactly(tmp_path: Path, precision: str, window: int) -> None:
    settings = {"precision": precision, "grad_accumulation_factor": window}
    # Weights with which some fp16 scales overflow, and others do not.
    hparams = {"adversarial_from": 1, "mel_weight": 1.0, "feature_weight": 0.05}
    epochs = 1 + window  # Of three batches each: enough for both to step after overflows.
    straight = fit(make(Stopping, tmp_path / "straight", hparams, **settings), epochs)
    expected = traces.pop(str(tmp_path / "straight"))
    assert len(expected) == 3 * epochs
    assert all(update.optimizer.state for update in straight.updates.values())  # Both stepped.
    for stop in STOPS:
        folder = tmp_path / f"after-{stop}"
        name = f"stop-{stop}"
        shutil.copytree(tmp_path / "straight" / "saved" / name, folder / "saved" / name)
        shutil.copy(tmp_path / "straight" / "metrics.jsonl", folder)
        resumed = fit(make(Stopping, folder, hparams, seed=99, **settings), epochs)
        found = list(differences(expected[stop:], traces.pop(str(folder)), "trace"))
        found += differences(brain_state(straight), brain_state(resumed))
        found += differences(log(straight), log(resumed), "log")
        assert not found, f"stopped after batch {stop}: " + "\n".join(found[:10])


# -------------------------------------------------------------------------------------- evaluation


def test_whole_clips_are_evaluated_one_by_one(tmp_path: Path) -> None:
    """A clip in a batch with a longer one has the distance that it has alone."""
    brain = make(HiFiGAN, tmp_path)
    torch.manual_seed(1)
    clips = [{"id": f"c{n}", "wav": 0.1 * torch.randn(n)} for n in (1000, 500, 40 * HOP)]
    with torch.no_grad():
        alone = [brain.evaluate_batch(collate([clip]), Stage.VALID) for clip in clips]
        together = brain.evaluate_batch(collate(clips), Stage.VALID)
    torch.testing.assert_close(together, torch.stack(alone).mean())
    assert alone[0] != alone[1]


def test_a_clip_is_evaluated_by_the_mels_that_the_generator_takes(tmp_path: Path) -> None:
    brain = make(HiFiGAN, tmp_path)
    torch.manual_seed(1)
    wav = 0.1 * torch.randn(GRID)
    with torch.no_grad():
        found = brain.evaluate_batch(collate([{"id": "c", "wav": wav}]), Stage.VALID)
        made = brain.modules.generator(brain.modules.mel(wav[None]))[0]
        own, other = (l1_loss(front(made), front(wav)) for front in fronts(brain))
    torch.testing.assert_close(found, own)
    assert abs(float(own - other)) > 1e-4
