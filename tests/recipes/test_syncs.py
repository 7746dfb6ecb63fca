"""A training step of a recipe waits for the device once, where it reads what it must know."""

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torchaudio
from torch import Tensor, nn

from recipes.asr.text import Characters
from recipes.asr.train import Recogniser
from recipes.common.mel import LogMel
from recipes.hifigan.train import HiFiGAN
from recipes.metricgan.phases import METRIC, Drawn, Passes, Phase
from recipes.segan.train import Enhancer
from recipes.separation.train import Separator
from recipes.tacotron2.losses import Objective
from recipes.tacotron2.train import Synthesiser
from tests.host_reads import HostReads
from tests.recipes.asr import test_model as asr
from tests.recipes.hifigan import tiny as hifigan
from tests.recipes.metricgan import small as metricgan
from tests.recipes.segan import tiny as segan
from tests.recipes.tacotron2.conftest import tacotron
from trainer import Brain, Stage, StepReport
from trainer.brain import FitArguments
from trainer.data import collate

Made = tuple[Brain, Any, dict[str, Any]]
SETTINGS: dict[str, Any] = {
    "device": "cpu", "progressbar": False, "log_interval": 1000, "max_grad_norm": 1.0,
}  # fmt: skip
ADAM = partial(torch.optim.Adam, lr=1e-3)


def items(number: int, **fields: Callable[[int], Tensor]) -> list[dict[str, Any]]:
    """So many items, each field of unlike lengths."""
    torch.manual_seed(0)
    made = [{name: field(i) for name, field in fields.items()} for i in range(number)]
    return [{"id": f"item{i}", **each} for i, each in enumerate(made)]


def recogniser(folder: Path) -> Made:
    augment = torchaudio.transforms.SpecAugment(1, 10, 1, 5, zero_masking=True)
    hparams = {"codec": Characters(), "decoder": "greedy", "beam_size": 1, "lexicon": None}
    brain = Recogniser({"model": asr.small(augment=augment)}, ADAM, hparams, SETTINGS)
    made = items(
        6,
        sig=lambda i: torch.randn(4000 + 500 * i),
        tokens=lambda i: torch.randint(1, 7, (2 + i % 3,)),
    )
    return brain, [collate(made[:3]), collate(made[3:])], {}


def separator(folder: Path, **more: Any) -> Made:
    hparams = {
        "threshold_byloss": True, "threshold": -30.0, "loss_upper_lim": 1e6, "sample_rate": 8000,
    }  # fmt: skip
    model = torchaudio.models.ConvTasNet(2, 16, 8, 3, 8, 8, 1, 1, "relu")
    brain = Separator({"separator": model}, ADAM, hparams | more, SETTINGS)
    made = items(
        6,
        mixture=lambda i: torch.randn(400 + 10 * i),
        sources=lambda i: torch.randn(400 + 10 * i, 2),
    )
    return brain, [collate(made[:3]), collate(made[3:])], {}


def vocoder(folder: Path) -> Made:
    brain = hifigan.make(HiFiGAN, folder, log_interval=1000)
    return brain, hifigan.Waves(8), {"batch_size": 4}


def segan_enhancer(folder: Path) -> Made:
    return segan.make(Enhancer, folder, log_interval=1000), segan.clips(8), {"batch_size": 4}


def metricgan_enhancer(folder: Path) -> Made:
    phases = [Phase("all", 2, items=6, batch_size=3, passes=("spectral", *METRIC, "generator"))]
    brain = metricgan.make(
        phases=phases, hparams={"spectral_weight": 0.5, "variations": 1}, log_interval=1000
    )
    pairs = metricgan.Tones(8)
    batches = Passes(brain.phases, len(pairs), brain.history, brain.options.seed)
    return brain, Drawn(pairs), {"batch_sampler": batches}


def synthesiser(folder: Path) -> Made:
    hparams = {
        "objective": Objective(last_step=5.0, attention=5.0), "longest": 1.0, "pictures": 0,
        "mel": LogMel(16000, 6, 512, 128),
    }  # fmt: skip
    hparams["objective"].durations = torch.rand(12)
    brain = Synthesiser({"model": tacotron(2)}, ADAM, hparams, SETTINGS)
    made = items(
        6,
        tokens=lambda i: torch.randint(1, 12, (4 + i % 4,)),
        mel=lambda i: torch.randn(8 + i, 6),
    )
    return brain, [collate(made[:3]), collate(made[3:])], {}


RECIPES: dict[str, Callable[[Path], Made]] = {
    "asr": recogniser,
    "separation": separator,
    "separation without a threshold": partial(separator, threshold_byloss=False),
    "hifigan": vocoder,
    "segan": segan_enhancer,
    "metricgan": metricgan_enhancer,
    "tacotron2": synthesiser,
}


def steps(made: Made) -> Iterator[tuple[Any, list[str], int]]:
    """Train two epochs on a device; of the second, yield each batch, its reads, and its steps."""
    brain, source, loading = made
    feed = brain.start_training(FitArguments([1, 2], source, train_loader_kwargs=loading))
    reports: list[StepReport] = []
    optimize = brain.optimize

    def reported(*arguments: Any, **options: Any) -> StepReport:
        reports.append(optimize(*arguments, **options))
        return reports[-1]

    brain.optimize = reported  # type: ignore[method-assign]
    for number in (1, 2):
        reads = HostReads()
        for part in vars(brain).values():  # A Brain may have more networks than its modules.
            if isinstance(part, nn.Module):
                reads.place([*part.parameters(), *part.buffers()])
        for update in brain.updates.values():
            states = update.optimizer.state.values()
            reads.place(t for each in states for n, t in each.items() if n != "step")
        brain.progress.epoch = number
        for batch, last in feed.from_batch(number, 0):
            reports.clear()
            reads.calls.clear()
            with reads.counted():
                brain.train_batch(reads.moved(batch), last)
            if number == 2:
                yield batch, list(reads.calls), sum(r.outcome == "stepped" for r in reports)
        brain.on_stage_end(Stage.TRAIN, 0.0, number)


@pytest.mark.parametrize("name", RECIPES)
def test_a_step_of_a_recipe_reads_once(name: str, tmp_path: Path) -> None:
    found = 0
    for batch, reads, stepped in steps(RECIPES[name](tmp_path)):
        found += stepped
        what = getattr(batch, "what", [""])[0]
        # Signals that are scored must come to the host: those of a batch and version together.
        if what == "enhance":
            assert reads == ["cpu"] * 2
        else:
            assert reads == ["tolist"] * stepped, what
            assert stepped
    assert found >= 2
