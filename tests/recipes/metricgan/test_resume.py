"""A training that is stopped in any of its passes ends as if it had never been: to the bit."""

import os
import shutil
import signal
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from recipes.metricgan.phases import Phase
from recipes.metricgan.train import Enhancer
from tests.trainer.resuming import differences
from tests.trainer.resuming import log as lines
from trainer import signals

from .small import Tones, final_state, fit, make

PHASES = (
    Phase("warm_up", 1, items=3, batch_size=2, passes=["spectral"]),
    Phase("metric", 2, items=3, batch_size=2),
)
VARIED = {
    "variations": 1, "within_weight": 20.0, "metric_layers": ["linear"],
    "opt_metric": partial(torch.optim.Adam, lr=0.01),
}  # fmt: skip
PAIRS, VALID = Tones(8, 800), Tones(2, 800, fixed=True)  # few shapes, which a CPU prepares for


@pytest.fixture(autouse=True)
def _no_page(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("trainer.report.write_html", lambda folder: folder)


class Stopped(Enhancer):
    """Saves after each batch, and notes what it was for."""

    def fit_batch(self, batch: Any) -> Any:
        losses = super().fit_batch(batch)
        seen = PASSES.setdefault(str(self.options.output_folder), [])
        seen.append((self.epoch, batch.what[0], batch.index.tolist()))
        if self.checkpointer is not None and "straight" in str(self.options.output_folder):
            self.checkpointer.save_checkpoint(name=f"stop-{len(seen)}")
        return losses


PASSES: dict[str, list[Any]] = {}  # by folder


@pytest.mark.parametrize(
    ("options", "stops"),
    [
        ({"grad_accumulation_factor": 2, "hparams": VARIED}, (1, 3, 6, 9, 15, 18)),
        ({"precision": "fp16", "grad_accumulation_factor": 2}, (6, 15)),
        ({"precision": "fp16", "grad_accumulation_factor": 2, "hparams": VARIED}, (9, 18)),
    ],
)
def test_after_a_stop_in_any_pass(
    tmp_path: Path, options: dict[str, Any], stops: tuple[int, ...]
) -> None:
    folder = tmp_path / "straight"
    straight = fit(make(folder, PHASES, brain=Stopped, **options), PAIRS, VALID)
    passes = PASSES[str(folder)]
    past = 2 if "hparams" in options else 1  # batches of the history, a half of all versions
    assert [what for _, what, _ in passes] == [
        "spectral", "spectral",
        *(each for each in ("enhance", "current", "current", "generator") for _ in "ab"),
        "enhance", "enhance", "current", "current", *["history"] * past, "current", "current",
        "generator", "generator",
    ]  # fmt: skip
    for stop in stops:
        into = tmp_path / f"after-{stop}"
        shutil.copytree(folder / "saved" / f"stop-{stop}", into / "saved" / f"stop-{stop}")
        shutil.copy(folder / "metrics.jsonl", into)
        resumed = make(into, PHASES, seed=9, brain=Stopped, **options)
        fit(resumed, PAIRS, VALID)
        assert PASSES.get(str(into), []) == passes[stop:]
        found = list(differences(final_state(straight), final_state(resumed)))
        assert not found, f"stopped after batch {stop}: " + "\n".join(found[:20])
        shutil.rmtree(into)


def test_two_players_each_have_everything(tmp_path: Path) -> None:
    """Optimizer, schedule, clip limit, scaler and report of each, and all of it is saved."""
    brain = make(
        tmp_path,
        [Phase("metric", 2, items=4, batch_size=2)],
        precision="fp16",
        max_grad_norm={"discriminator": 0.5, "generator": 0.25},
        hparams={
            "schedule": {
                "discriminator": lambda opt: torch.optim.lr_scheduler.StepLR(opt, 1, 0.5),
                "generator": lambda opt: torch.optim.lr_scheduler.StepLR(opt, 1, 0.1),
            }
        },
    )
    fit(brain, PAIRS)
    limits = {name: update.clip.limit for name, update in brain.updates.items()}
    assert limits == {"discriminator": 0.5, "generator": 0.25}
    rates = {name: update.lr for name, update in brain.updates.items()}
    assert rates == pytest.approx({"discriminator": 0.01 * 0.25, "generator": 0.01 * 0.01})
    scalers = {update.scaler for update in brain.updates.values()}
    assert len(scalers) == 2
    saved = brain.checkpointer.read(brain.checkpointer.find()[0])["brain"]
    for name, update in brain.updates.items():
        assert saved[f"optimizers.{name}"]["scaler"] == update.scaler.state_dict() != {}
        assert saved[f"optimizers.{name}"]["schedule"]["last_epoch"] == 2
        assert saved[f"optimizers.{name}"]["optimizer"]["state"]
    reported = {name for line in lines(brain) for name in line.get("optimizers", {})}
    assert reported == {"discriminator", "generator"}


@pytest.fixture
def _signals() -> None:
    """Signals are noted while the test runs."""
    signals.install()


@pytest.mark.usefixtures("_signals")
def test_a_stop_that_is_asked_for(tmp_path: Path) -> None:
    """SIGTERM while scores are being measured: what has no score yet is measured again."""

    class Asked(Stopped):
        def ask_for_scores(self, batch: Any) -> None:
            super().ask_for_scores(batch)
            if self.options.output_folder == str(tmp_path / "asked"):
                os.kill(os.getpid(), signal.SIGTERM)

    straight = fit(make(tmp_path / "whole", PHASES, brain=Asked), PAIRS)
    with pytest.raises(SystemExit) as stop:
        fit(make(tmp_path / "asked", PHASES, brain=Asked), PAIRS)
    assert stop.value.code == 143
    signals.reset()
    shutil.copytree(tmp_path / "asked", tmp_path / "again")
    resumed = fit(make(tmp_path / "again", PHASES, seed=3, brain=Asked), PAIRS)
    assert not list(differences(final_state(straight), final_state(resumed)))
