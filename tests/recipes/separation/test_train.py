"""The whole recipe from a command line to decibels, for every YAML, and its three guards."""

import importlib.util
import json
import math
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from lhotse import CutSet
from torch import Tensor, nn

from recipes.separation.mixing import Drawn, Mixing
from recipes.separation.train import Separator, train
from tests.recipes.separation.conftest import (
    GENDERS,
    RATE,
    librispeech_part,
    mixture_folder,
    record,
)
from tests.trainer.shown import kinds_shown
from tests.trainer.small import training_average
from trainer import NonFiniteError, StepReport, cli
from trainer.checkpoint import Checkpointer
from trainer.config.hyperparameters import load_hparams
from trainer.data import Batch, Padded

HPARAMS = Path(__file__).parents[3] / "hparams" / "separation"
USUAL = ["--num_workers=0", "--device=cpu", "--no-progressbar", "--log_interval=1",
         "--batch_size=2", "--precision=fp32", "--threads=1"]  # fmt: skip
TINY = {
    "conv": [
        *USUAL, "--separator.enc_num_feats=8", "--separator.msk_num_feats=8",
        "--separator.msk_num_hidden_feats=8", "--separator.msk_num_layers=1",
        "--separator.msk_num_stacks=1", "--optimizer_step_limit=2", "--seconds=0.5",
    ],
    "dual": [
        *USUAL, "--separator.features=8", "--separator.layers=1", "--separator.heads=2",
        "--separator.feedforward=8", "--separator.chunk=20", "--optimizer_step_limit=2",
        "--seconds=0.25",
    ],
}  # fmt: skip


def run(name: str, folder: Path, *arguments: str) -> dict[str, float]:
    given = [str(HPARAMS / f"{name}.yaml"), "--output_folder", str(folder), *arguments]
    return cli.main(train, given)


def lines(folder: Path, kind: str) -> list[dict[str, Any]]:
    text = (folder / "metrics.jsonl").read_text()
    return [line for line in map(json.loads, text.splitlines()) if line["kind"] == kind]


def check(folder: Path, metrics: dict[str, float], printed: str, mixtures: int) -> None:
    assert set(metrics) == {"si_snri", "sdri"}
    assert all(map(math.isfinite, metrics.values()))
    assert printed.splitlines()[-1].startswith("test: si_snri=")
    *found, last = lines(folder, "stage")
    assert last == {"kind": "stage", "stage": "test", **metrics}
    assert sum(line["steps"] for line in found if line["stage"] == "train") == 2
    assert len((folder / "scores_test.csv").read_text().splitlines()) == 1 + mixtures
    assert (folder / "examples" / "worst1" / "estimate2.wav").is_file()
    assert (folder / "examples" / "best1" / "mixture.wav").is_file()
    sounds = ("mixture", "source1", "estimate1", "source2", "estimate2")
    kinds = {"id": "text", "si_snri": "number", "sdri": "number", **dict.fromkeys(sounds, "audio")}
    assert kinds.items() <= kinds_shown(folder).items()


def test_there_is_a_test_for_every_yaml() -> None:
    names = ["demo", "librimix", "long", "real", "sepformer", "wsj0mix"]
    assert sorted(path.stem for path in HPARAMS.glob("*.yaml")) == names


@pytest.mark.skipif(
    importlib.util.find_spec("espeakng_loader") is None, reason="needs the extra demo"
)
@pytest.mark.parametrize("name", ["demo", "long"])
def test_embedded_speech(
    name: str,
    tmp_path_factory: pytest.TempPathFactory,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    base = tmp_path_factory.getbasetemp()
    monkeypatch.setenv("CORTEX_CACHE", str(base / "cache"))
    counts = ["--corpus.train", "8", "--corpus.valid", "4", "--corpus.test", "4",
              "--mixtures", "{train: 4, valid: 2, test: 3}"]  # fmt: skip
    arguments = ["--steps=2", "--schedule.warmup_steps=1", *TINY["conv"], *counts]
    metrics = run(name, base / name, *arguments)
    check(base / name, metrics, capsys.readouterr().out, 3)


def test_real(voices: CutSet, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = ["id|split|speaker|gender"]
    people = {"ann": "train", "bob": "train", "eve": "test", "dan": "test"}
    for name, split in people.items():
        rows += [f"{name}-{take}|{split}|{name}|{GENDERS[name]}" for take in range(3)]
    rows += [row.replace("ann", "amy").replace("bob", "ben") for row in rows if "|train|" in row]
    record(tmp_path / "audio")
    for name, twin in (("ann", "amy"), ("bob", "ben")):
        for take in range(3):
            source = tmp_path / "audio" / f"{name}-{take}.wav"
            (tmp_path / "audio" / f"{twin}-{take}.wav").write_bytes(source.read_bytes())
    (tmp_path / "utterances.csv").write_text("\n".join(rows))
    arguments = ["--steps=2", "--schedule.warmup_steps=1", "--data_folder", str(tmp_path),
                 "--mixtures", "{train: 4, valid: 2, test: 3}", "--noise",
                 "!name:recipes.separation.speech.coloured {}", *TINY["conv"]]  # fmt: skip
    metrics = run("real", tmp_path / "run", *arguments)
    check(tmp_path / "run", metrics, capsys.readouterr().out, 3)


def test_real_in_the_layout_of_librispeech(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, people in (("train-clean-100", range(10, 13)), ("dev-clean", range(20, 22)),
                         ("test-clean", range(30, 32))):  # fmt: skip
        librispeech_part(tmp_path / "data", name, people, seconds=0.6)
    arguments = ["--steps=2", "--schedule.warmup_steps=1", "--data_folder", str(tmp_path / "data"),
                 "--mixtures", "{train: 4, valid: 2, test: 3}", *TINY["conv"]]  # fmt: skip
    metrics = run("real", tmp_path / "run", *arguments)
    check(tmp_path / "run", metrics, capsys.readouterr().out, 3)
    tested = (tmp_path / "run" / "scores_test.csv").read_text().splitlines()[1:]
    assert all(re.match(r"\d+_3[01]-1-\S+_3[01]-1-", line) for line in tested)


@pytest.mark.parametrize("speakers", [2, 3])
def test_librimix(speakers: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("train-360", "dev", "test"):
        mixture_folder(tmp_path / "wav8k" / "min" / name, "mix_clean", speakers)
    arguments = ["--speakers", str(speakers), "--data_folder", str(tmp_path), *TINY["conv"]]
    metrics = run("librimix", tmp_path / "run", *arguments)
    check(tmp_path / "run", metrics, capsys.readouterr().out, 4)


@pytest.mark.parametrize(("name", "network"), [("wsj0mix", "conv"), ("sepformer", "dual")])
def test_wsj0mix(
    name: str, network: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for part in ("tr", "cv", "tt"):
        mixture_folder(tmp_path / "2speakers" / "wav8k" / "min" / part, "mix")
    metrics = run(name, tmp_path / "run", "--data_folder", str(tmp_path), *TINY[network])
    check(tmp_path / "run", metrics, capsys.readouterr().out, 4)


def test_the_published_sizes() -> None:
    def parameters(name: str) -> int:
        hparams = load_hparams(HPARAMS / f"{name}.yaml", {"data_folder": "anywhere"})
        assert hparams["max_grad_norm"] == hparams["clip_grad_norm"] == 5.0
        assert (hparams["threshold"], hparams["loss_upper_lim"]) == (-30.0, 999999.0)
        assert hparams["opt_class"].keywords == {"lr": 1.5e-4}
        return sum(p.numel() for p in hparams["separator"].parameters())

    assert parameters("sepformer") == 25_677_313
    assert parameters("wsj0mix") == parameters("librimix") == 4_984_881


# ---------------------------------------------------------------------------------- the guards


class Given(Separator):
    """Has losses that are given, one for each mixture, of weights that move with them."""

    def __init__(self, *arguments: Any, **named: Any) -> None:
        super().__init__(*arguments, **named)
        self.reports: list[StepReport] = []

    def fit_batch(self, batch: Any) -> StepReport:
        self.reports.append(super().fit_batch(batch))
        return self.reports[-1]

    def losses(self, estimates: Tensor, batch: Any) -> Tensor:
        return batch["loss"].to(estimates.dtype) + 0.01 * estimates.square().mean()


class Scale(nn.Module):
    """A network of one weight, which gives two tracks."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([0.5]))

    def forward(self, mixture: Tensor) -> Tensor:
        return (self.weight * mixture).expand(-1, 2, -1)


def batch_of(losses: list[float]) -> Batch:
    signals = Padded(torch.ones(len(losses), 8), torch.full((len(losses),), 8))
    names = [f"m{loss}" for loss in losses]
    return Batch({"id": names, "mixture": signals, "loss": torch.tensor(losses)}, len(losses))


def guarded(**more: Any) -> Given:
    hparams = {
        "threshold_byloss": True, "threshold": -30.0, "loss_upper_lim": 999999.0,
        "sample_rate": RATE, "progressbar": False, "device": "cpu",
    }  # fmt: skip
    return Given({"separator": Scale()}, lambda p: torch.optim.Adam(p, 0.1), hparams | more)


def reports(brain: Given, batches: list[Batch]) -> list[StepReport]:
    brain.fit([1], batches)
    return brain.reports


BAD = {
    "nothing left": [-40.0, -50.0],
    "above the limit": [2e6, 0.0],
    "nan": [math.nan, -10.0],
    "+inf": [math.inf, -10.0],
    "-inf": [-math.inf, -10.0],
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_batch_is_a_skipped_step_that_is_counted_and_not_in_the_average(name: str) -> None:
    good = [batch_of([-5.0, -7.0]), batch_of([-9.0, -11.0])]
    spoilt, clean = guarded(), guarded()
    found = reports(spoilt, [good[0], batch_of(BAD[name]), good[1]])
    expected = reports(clean, good)
    assert [report.outcome for report in found] == ["stepped", "skipped", "stepped"]
    assert spoilt.stateful()["metrics"].part.counts["skipped"] == 1
    assert torch.equal(spoilt.modules.separator.weight, clean.modules.separator.weight)
    assert spoilt.optimizer_step == clean.optimizer_step == 2
    for one, other in zip((found[0], found[2]), expected, strict=True):
        assert (one.loss, one.norm, one.lr) == (other.loss, other.norm, other.lr)
    assert training_average(spoilt).state_dict() == training_average(clean).state_dict()


@pytest.mark.parametrize("name", BAD)
def test_too_easy_is_no_fault_and_all_else_uses_up_patience(name: str) -> None:
    batches = [batch_of([-5.0, -7.0])] + [batch_of(BAD[name])] * 4
    brain = guarded(nonfinite_patience=3)
    if name == "nothing left":
        reports(brain, batches)
        return
    with pytest.raises(NonFiniteError, match="4 times in epoch 1"):
        reports(brain, batches)


def test_a_loss_above_the_limit_is_told(caplog: pytest.LogCaptureFixture) -> None:
    reports(guarded(), [batch_of([0.0]), batch_of([2e6])])
    assert "a loss of 2e+06 is above loss_upper_lim, 999999" in caplog.text


def test_easy_mixtures_are_left_out_of_the_mean_and_its_weight() -> None:
    found = reports(guarded(), [batch_of([-10.0, -40.0, -20.0])])[0]
    assert found.loss == pytest.approx(-15.0, abs=0.01)
    assert found.weight == 2
    found = reports(guarded(threshold_byloss=False), [batch_of([-10.0, -40.0, -20.0])])[0]
    assert found.loss == pytest.approx(-70 / 3, abs=0.01)
    assert found.weight == 3


@pytest.mark.parametrize(
    ("limit", "clips"), [(5.0, True), (1e9, False), (0.0, False), (-1.0, False)]
)
def test_the_limit_of_the_gradient_is_off_below_zero(limit: float, clips: bool) -> None:
    """By the YAMLs: ``max_grad_norm: !ref <clip_grad_norm>``."""
    brain = guarded(max_grad_norm=limit)
    brain.modules.separator.weight.data.fill_(1e3)  # a gradient of 0.02 times that
    found = reports(brain, [batch_of([0.0])])[0]
    assert found.norm == pytest.approx(20.0, rel=1e-3)
    assert found.clipped is clips
    assert found.norm_after == pytest.approx(5.0 if clips else 20.0, rel=1e-3)


def test_every_yaml_maps_its_limit() -> None:
    for limit in (-1.0, 3.0):
        for path in sorted(HPARAMS.glob("*.yaml")):
            given = [str(path), f"--clip_grad_norm={limit}"]
            wanted = "data_folder" in path.read_text() or path.stem == "sepformer"
            _, options = cli.configure([*given, *(["--data_folder=x"] if wanted else [])])
            assert options.max_grad_norm == limit


def test_a_loss_is_that_of_the_best_order_over_the_valid_samples() -> None:
    generator = torch.Generator().manual_seed(0)
    sources = torch.randn(3, 2, 400, generator=generator)
    estimates = sources + torch.randn(3, 2, 400, generator=generator)
    lengths = torch.tensor([400, 300, 200])
    batch = Batch({"sources": Padded(sources.transpose(1, 2), lengths)}, 3)
    losses = Separator.losses(guarded(), estimates, batch)
    torch.testing.assert_close(Separator.losses(guarded(), estimates.flip(1), batch), losses)
    assert losses.abs().max() < 3  # as much noise as there is of each source
    for item, length in enumerate(lengths):
        cut = Padded(sources[item : item + 1, :, :length].transpose(1, 2), length[None])
        alone = Separator.losses(
            guarded(), estimates[item : item + 1, :, :length], Batch({"sources": cut}, 1)
        )
        torch.testing.assert_close(alone[0], losses[item])


def test_another_number_of_tracks_than_sources_is_told() -> None:
    brain = guarded()
    sources = Padded(torch.ones(1, 8, 3), torch.tensor([8]))
    with pytest.raises(ValueError, match="the network gives 2 tracks, the mixtures have 3 sources"):
        Separator.losses(brain, torch.ones(1, 2, 8), Batch({"sources": sources}, 1))


# -------------------------------------------------------------------- learning, resuming, ranks


def small(folder: Path | None, **more: Any) -> Separator:
    """A tiny Conv-TasNet; with a folder it saves after each step."""
    import torchaudio

    torch.manual_seed(0)
    hparams = {
        "threshold_byloss": True, "threshold": -30.0, "loss_upper_lim": 999999.0,
        "sample_rate": RATE, "progressbar": False, "device": "cpu", "seed": 3,
        "output_folder": str(folder), "checkpoint_every_steps": 1,
    }  # fmt: skip
    model = torchaudio.models.ConvTasNet(2, 32, 32, 3, 16, 32, 2, 1, "relu")
    checkpointer = Checkpointer(folder / "checkpoints", keep_last=99) if folder else None
    options = {"lr": 3e-3}
    return Separator(
        {"separator": model}, lambda p: torch.optim.Adam(p, **options), hparams | more,
        checkpointer=checkpointer,
    )  # fmt: skip


def data(voices: CutSet, size: int = 8) -> tuple[Drawn, Drawn]:
    mixing = Mixing(RATE, seconds=0.25, pairs="unlike", speeds=(0.95, 1.0, 1.05))
    return Drawn(voices, mixing, size, train=True), Drawn(voices, mixing, 4)


def test_a_run_that_was_stopped_goes_on_exactly(voices: CutSet, tmp_path: Path) -> None:
    def fit(brain: Separator) -> dict[str, Tensor]:
        sets = data(voices)
        loading = {"batch_size": 2}
        brain.fit(
            range(1, 3), *sets, train_loader_kwargs=loading, valid_loader_kwargs={"batch_size": 4}
        )
        return brain.modules.state_dict()

    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    whole = fit(small(tmp_path / "a"))
    stopped = "step-00000003"  # within the first epoch: the only one that is left
    shutil.copytree(tmp_path / "a/checkpoints" / stopped, tmp_path / "b/checkpoints" / stopped)
    (goes_on := small(tmp_path / "b")).modules.separator.encoder.weight.data.zero_()
    resumed = fit(goes_on)
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    scores = [(tmp_path / name / "scores_valid.csv").read_text() for name in "ab"]
    assert scores[0] == scores[1]
    assert goes_on.optimizer_step == 8


@pytest.mark.long
def test_buzzes_are_separated(voices: CutSet, tmp_path: Path) -> None:
    brain = small(None, output_folder=str(tmp_path))
    train_set, valid_set = data(voices, 800)
    brain.fit([1], train_set, train_loader_kwargs={"batch_size": 8})
    brain.evaluate(valid_set, test_loader_kwargs={"batch_size": 4})
    assert brain.test_metrics["si_snri"] > 5
