"""Small recipes of the kinds that SpeechBrain's integration tests have, each with either Brain.

They are written here. A recipe is a class made from a Brain; the import decides which one.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from tests.compat.theirs import sb
from tests.trainer.small import same
from trainer import Brain, Checkpointer

SIZES = [40, 60, 80, 100]  # Samples of each recording.
Make = Callable[[type], Any]


def recordings(*keys: str, number: int = 4) -> Any:
    """Tones of different lengths, with labels of different numbers."""
    data = {
        f"utt{n}": {"size": SIZES[n % 4], "pitch": 1 + n % 3, "words": "abcd"[: 1 + n % 3]}
        for n in range(number)
    }
    dataset = sb.dataio.dataset.DynamicItemDataset(data)

    @sb.utils.data_pipeline.takes("size", "pitch")
    @sb.utils.data_pipeline.provides("sig", "noisy")
    def audio(size: int, pitch: int) -> Any:
        sig = torch.sin(torch.arange(size) * 0.1 * pitch)
        yield sig
        yield sig + 0.1 * torch.cos(torch.arange(size) * 0.7)

    @sb.utils.data_pipeline.takes("words")
    @sb.utils.data_pipeline.provides("tokens", "label", "tokens_bos", "tokens_eos")
    def text(words: str) -> Any:
        tokens = torch.tensor(["abcd".index(letter) + 1 for letter in words])
        yield tokens
        yield tokens[:1]
        yield torch.cat([torch.tensor([0]), tokens])
        yield torch.cat([tokens, torch.tensor([0])])

    dataset.add_dynamic_item(audio)
    dataset.add_dynamic_item(text)
    dataset.set_output_keys(["id", *keys])
    return dataset


def frames(sig: torch.Tensor) -> torch.Tensor:
    """Frames of ten samples, (B, T, 10)."""
    return sig[:, : sig.shape[1] // 10 * 10].unflatten(1, (-1, 10))


def recogniser(base: Any) -> Any:
    class Recogniser(base):  # type: ignore[misc]
        keys = ("sig", "tokens")

        def modules_of(self) -> dict[str, Any]:
            return {
                "norm": sb.processing.features.InputNormalization(),
                "rnn": nn.GRU(10, 8, batch_first=True), "lin": nn.Linear(8, 5),
            }  # fmt: skip

        def compute_forward(self, batch: Any, stage: Any) -> Any:
            batch = batch.to(self.device)
            sig, lengths = batch.sig
            hidden, _ = self.modules.rnn(self.modules.norm(frames(sig), lengths))
            return self.modules.lin(hidden).log_softmax(-1), lengths

        def compute_objectives(self, predictions: Any, batch: Any, stage: Any) -> Any:
            scores, lengths = predictions
            tokens, sizes = batch.tokens
            if stage != sb.Stage.TRAIN:
                found = sb.decoders.ctc_greedy_decode(scores, lengths, blank_id=0)
                self.errors.append(batch.id, found, tokens, target_len=sizes)
            return sb.nnet.losses.ctc_loss(scores, tokens, lengths, sizes, blank_index=0)

        def on_stage_start(self, stage: Any, epoch: int | None = None) -> None:
            if stage != sb.Stage.TRAIN:
                self.errors = sb.utils.metric_stats.ErrorRateStats()

        def metric(self) -> float:
            return float(self.errors.summarize("error_rate"))

    return Recogniser


def language_model(base: Any) -> Any:
    class LanguageModel(base):  # type: ignore[misc]
        keys = ("tokens_bos", "tokens_eos")

        def modules_of(self) -> dict[str, Any]:
            return {"embed": nn.Embedding(5, 8), "lin": nn.Linear(8, 5)}

        def compute_forward(self, batch: Any, stage: Any) -> Any:
            tokens, _ = batch.to(self.device).tokens_bos
            return self.modules.lin(self.modules.embed(tokens)).log_softmax(-1)

        def compute_objectives(self, predictions: Any, batch: Any, stage: Any) -> Any:
            tokens, lengths = batch.tokens_eos
            return sb.nnet.losses.nll_loss(predictions, tokens, length=lengths)

    return LanguageModel


def speaker(base: Any) -> Any:
    class Speaker(base):  # type: ignore[misc]
        keys = ("sig", "label")

        def modules_of(self) -> dict[str, Any]:
            return {"net": nn.Sequential(nn.Linear(10, 8), nn.Tanh()), "lin": nn.Linear(8, 5)}

        def compute_forward(self, batch: Any, stage: Any) -> Any:
            sig, lengths = batch.to(self.device).sig
            parts = self.modules.net(frames(sig))
            mask = sb.dataio.dataio.length_to_mask(lengths * parts.shape[1], parts.shape[1])
            mean = (parts * mask.unsqueeze(-1)).sum(1, keepdim=True) / mask.sum(1)[:, None, None]
            return self.modules.lin(mean).log_softmax(-1)

        def compute_objectives(self, predictions: Any, batch: Any, stage: Any) -> Any:
            label, sizes = batch.label
            return sb.nnet.losses.nll_loss(predictions, label, length=sizes)

    return Speaker


def separator(base: Any) -> Any:
    class Separator(base):  # type: ignore[misc]
        """Steps by hand, skips batches by their loss, with the precision's helpers."""

        keys = ("noisy", "sig")

        def modules_of(self) -> dict[str, Any]:
            return {"net": nn.Sequential(nn.Linear(10, 16), nn.ReLU(), nn.Linear(16, 10))}

        def compute_forward(self, mixture: Any, stage: Any) -> Any:
            return self.modules.net(frames(mixture.to(self.device)))

        def compute_objectives(self, predictions: Any, targets: Any) -> Any:
            return (predictions - frames(targets)).square().mean()

        def fit_batch(self, batch: Any) -> Any:
            with self.training_ctx:
                predictions = self.compute_forward(batch.noisy.data, sb.Stage.TRAIN)
                loss = self.compute_objectives(predictions, batch.sig.data)
            if loss < 999:
                self.scaler.scale(loss).backward()
                self.scaler.unscale_(self.optimizer)
                torch.nn.utils.clip_grad_norm_(self.modules.parameters(), self.max_grad_norm)
                self.scaler.step(self.optimizer)
                self.scaler.update()
            else:
                self.nonfinite_count += 1
            self.optimizer.zero_grad()
            return loss.detach().cpu()

        def evaluate_batch(self, batch: Any, stage: Any) -> Any:
            with torch.no_grad():
                predictions = self.compute_forward(batch.noisy.data, stage)
                return self.compute_objectives(predictions, batch.sig.data).detach()

    return Separator


def adversary(base: Any) -> Any:
    class Adversary(base):  # type: ignore[misc]
        """Two players, with zero_grad and init_optimizers of their own."""

        keys = ("noisy", "sig")

        def modules_of(self) -> dict[str, Any]:
            return {"generator": nn.Linear(10, 10), "discriminator": nn.Linear(10, 1)}

        def init_optimizers(self) -> None:
            self.g_optimizer = self.opt_class(self.modules.generator.parameters())
            self.d_optimizer = self.opt_class(self.modules.discriminator.parameters())
            if self.checkpointer is not None:
                self.checkpointer.add_recoverable("g_opt", self.g_optimizer)
                self.checkpointer.add_recoverable("d_opt", self.d_optimizer)

        def zero_grad(self, set_to_none: bool = False) -> None:
            self.g_optimizer.zero_grad(set_to_none)
            self.d_optimizer.zero_grad(set_to_none)

        def compute_forward(self, batch: Any, stage: Any) -> Any:
            batch = batch.to(self.device)
            return self.modules.generator(frames(batch.noisy.data))

        def compute_objectives(self, fake: Any, batch: Any, stage: Any, who: str = "") -> Any:
            clean = frames(batch.sig.data)
            judged = self.modules.discriminator(fake)
            if who == "d":
                real = self.modules.discriminator(clean)
                return (real - 1).square().mean() + judged.square().mean()
            return (judged - 1).square().mean() + (fake - clean).square().mean()

        def fit_batch(self, batch: Any) -> Any:
            fake = self.compute_forward(batch, sb.Stage.TRAIN)
            self.d_optimizer.zero_grad()
            d_loss = self.compute_objectives(fake.detach(), batch, sb.Stage.TRAIN, "d")
            d_loss.backward()
            self.d_optimizer.step()
            self.g_optimizer.zero_grad()
            g_loss = self.compute_objectives(fake, batch, sb.Stage.TRAIN, "g")
            g_loss.backward()
            self.g_optimizer.step()
            self.last_batch = batch.id
            return d_loss.detach() + g_loss.detach()

    return Adversary


KINDS = [recogniser, language_model, speaker, separator, adversary]
BY_HAND = pytest.mark.filterwarnings("ignore:.*calls backward.. and the step")


def train(make: Any, base: Any, checkpointer: Any, epochs: int) -> tuple[Any, list[float]]:
    losses: list[float] = []

    class Recipe(make(base)):  # type: ignore[misc]
        def on_stage_end(self, stage: Any, stage_loss: Any, epoch: int | None = None) -> None:
            losses.append(float(stage_loss))
            if stage == sb.Stage.VALID and self.checkpointer is not None:
                metric = self.metric() if hasattr(self, "metric") else stage_loss
                self.hparams.annealing(metric)
                self.checkpointer.save_and_keep_only({"metric": metric}, min_keys=["metric"])

    torch.manual_seed(0)
    kind: Any = make(base)
    modules = kind.modules_of(None)
    counter = sb.utils.epoch_loop.EpochCounter(epochs)
    annealing = sb.nnet.schedulers.NewBobScheduler(1.0)
    recoverables = {**modules, "counter": counter, "annealing": annealing}
    hparams = {"epoch_counter": counter, "annealing": annealing}
    brain = Recipe(
        modules, partial(torch.optim.Adam, lr=0.01), hparams,
        {"device": "cpu", "noprogressbar": True} if base is sb.Brain else {"device": "cpu"},
        checkpointer and sb.utils.checkpoints.Checkpointer(checkpointer, recoverables),
    )  # fmt: skip
    loader = {"batch_size": 2}
    data = recordings(*kind.keys), recordings(*kind.keys)
    brain.fit(counter, *data, False, dict(loader), dict(loader))
    key = "metric" if checkpointer else None
    brain.evaluate(data[1], min_key=key, progressbar=False, test_loader_kwargs=dict(loader))
    return brain, losses


@BY_HAND
@pytest.mark.parametrize("kind", KINDS)
def test_both_brains_train_alike(kind: Any) -> None:
    ours, our_losses = train(kind, Brain, None, 3)
    theirs, their_losses = train(kind, sb.Brain, None, 3)
    assert our_losses == pytest.approx(their_losses, abs=2e-6)
    assert all(map(math.isfinite, our_losses))
    assert len(our_losses) == 7
    for name, weight in ours.modules.named_parameters():
        assert torch.allclose(weight, dict(theirs.modules.named_parameters())[name], atol=1e-5)


@BY_HAND
@pytest.mark.parametrize("kind", KINDS)
def test_a_recipe_resumes_exactly(kind: Any, tmp_path: Path) -> None:
    whole, losses = train(kind, Brain, tmp_path / "whole", 4)
    train(kind, Brain, tmp_path / "cut", 2)
    again, rest = train(kind, Brain, tmp_path / "cut", 4)
    assert type(again.checkpointer) is Checkpointer
    assert rest == losses[4:]
    assert same(again.modules.state_dict(), whole.modules.state_dict())
    assert again.hparams.annealing.metric_values == whole.hparams.annealing.metric_values
    assert again.hparams.epoch_counter.current == 4
