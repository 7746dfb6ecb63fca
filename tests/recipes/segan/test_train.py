"""The recipe: what moves when, what is saved, and every YAML from a command line to a test line."""

import copy
import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from recipes.common.pairs import Pairs
from recipes.segan.model import adversarial_loss, emphasise
from recipes.segan.train import Enhancer, reference_pairs, train
from tests.recipes.common.speakers import RATE, noise, voice, write
from tests.recipes.segan.tiny import SAMPLES, Wave, clips, fit, make
from tests.trainer.resuming import brain_state, differences
from tests.trainer.shown import kinds_shown
from tests.trainer.small import same, snapshot
from trainer import cli
from trainer.config.hyperparameters import load_hparams

HPARAMS = Path(__file__).parents[3] / "hparams" / "segan"
PLAYERS = ("discriminator", "generator")
OTHER = dict(zip(PLAYERS, reversed(PLAYERS), strict=True))
needs_enhance = pytest.mark.skipif(
    not all(map(importlib.util.find_spec, ("pesq", "pystoi"))), reason="needs the extra enhance"
)


@pytest.fixture(autouse=True)
def _no_page(monkeypatch: pytest.MonkeyPatch) -> None:
    """Drawing the log of a run takes longer than the run."""
    monkeypatch.setattr("trainer.report.write_html", lambda folder: folder)


# --- who moves when ------------------------------------------------------------------------------


class Watching(Enhancer):
    """Notes what each player is before and after each call of `optimize`."""

    def on_fit_start(self) -> None:
        self.seen: Any = ()  # a tuple is no state
        for name in PLAYERS:
            self.modules[name].register_forward_hook(self.note(name))

    def note(self, name: str) -> Any:
        def hook(module: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            if self.modules.training:
                facts = snapshot(module), inputs[0].detach(), output.detach().clone()
                self.seen += ((f"{name} forward", *facts),)

        return hook

    def optimize(self, loss: Any, name: str | None = None, **options: Any) -> Any:
        before = {each: self.weights(each) for each in PLAYERS}
        gradients = self.gradients(OTHER[name])
        report = super().optimize(loss, name, **options)
        after = {each: self.weights(each) for each in PLAYERS}
        assert same(self.gradients(OTHER[name]), gradients)
        moved = [each for each in PLAYERS if not same(before[each], after[each])]
        self.seen += ((name, report.outcome, moved, options, loss.detach()),)
        return report

    def weights(self, name: str) -> list[Tensor]:
        return [p.detach().clone() for p in self.modules[name].parameters()]

    def gradients(self, name: str) -> list[Tensor]:
        """Those of an overflow in fp16 are NaN, which equals nothing."""
        grads = [p.grad for p in self.modules[name].parameters()]
        return [torch.zeros(()) if grad is None else grad.nan_to_num() for grad in grads]


def test_d_moves_first_and_g_trains_on_the_scores_of_the_moved_d(tmp_path: Path) -> None:
    brain = fit(make(Watching, tmp_path), epochs=1, valid=False)
    assert len(brain.seen) == 3 * 6
    for start in range(0, 18, 6):
        fake, real_pass, fake_pass, d, again, g = brain.seen[start : start + 6]
        assert [each[0] for each in (fake, real_pass, fake_pass, d, again, g)] == [
            "generator forward", "discriminator forward", "discriminator forward",
            "discriminator", "discriminator forward", "generator",
        ]  # fmt: skip
        # The order of changes; the first step of a warm-up has a learning rate above 0.
        assert (d[1], d[2]) == ("stepped", ["discriminator"])
        assert (g[1], g[2]) == ("stepped", ["generator"])
        last = start == 12  # of the three batches; a window that is open there closes for both
        assert d[3] == g[3] == {"last": last}
        # Real, then fake; both scores are those of the weights before the step …
        assert same(real_pass[1], fake_pass[1])
        noisy = real_pass[2][:, 1]
        assert torch.equal(noisy, fake_pass[2][:, 1])
        assert torch.equal(fake_pass[2][:, 0], fake[3])
        # … and the one that the generator trains on that of the weights after it, on the same fake.
        assert not same(again[1], fake_pass[1])
        assert torch.equal(again[2], fake_pass[2])
        distance = (fake[3] - real_pass[2][:, 0]).abs().mean()
        torch.testing.assert_close(g[4], adversarial_loss(again[3]) + 100 * distance)
        assert not torch.equal(again[3], fake_pass[3])


def test_in_the_short_window_that_ends_an_epoch_d_moves_before_g_is_judged(tmp_path: Path) -> None:
    brain = fit(make(Watching, tmp_path, grad_accumulation_factor=2), epochs=1, valid=False)
    _, _, fake_pass, d, again, g = brain.seen[12:]  # the third of three batches
    assert (d[1], d[2]) == ("stepped", ["discriminator"])
    assert (g[1], g[2]) == ("stepped", ["generator"])
    assert not same(again[1], fake_pass[1])


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_with_accumulation_each_moves_once_a_window_and_neither_in_the_others_step(
    tmp_path: Path, precision: str
) -> None:
    options = {"grad_accumulation_factor": 2, "precision": precision}
    brain = fit(make(Watching, tmp_path, **options), 1, batch_size=3, valid=False)
    calls = [each for each in brain.seen if each[0] in PLAYERS]
    assert [each[0] for each in calls] == [*PLAYERS] * 4
    waiting, closing = calls[0:2] + calls[4:6], calls[2:4] + calls[6:8]
    assert {each[1] for each in waiting} == {"accumulated"}
    # An fp16 scale is found by going too far with it.
    assert {each[1] for each in closing} <= {"stepped", "overflowed"}
    assert precision == "fp16" or {each[1] for each in closing} == {"stepped"}
    for name, outcome, moved, *_ in calls:
        assert moved == ([name] if outcome == "stepped" else [])


def test_the_generators_loss_leaves_nothing_in_the_discriminator_and_the_reverse(
    tmp_path: Path,
) -> None:
    """The gradients of each are those of its own loss alone, though the passes share a graph."""
    brain = make(Enhancer, tmp_path, grad_accumulation_factor=9, max_grad_norm=None)
    found: dict[str, list[Tensor]] = {}

    def optimize(loss: Tensor, name: str, **options: Any) -> Any:
        params = list(brain.modules[name].parameters())
        found[name] = list(torch.autograd.grad(loss, params, retain_graph=True))
        options["last"] = False  # The window stays open: its gradients are looked at.
        report = Enhancer.optimize(brain, loss, name, **options)
        for p, truth in zip(params, found[name], strict=True):
            torch.testing.assert_close(p.grad, truth)
        return report

    brain.optimize = optimize
    brain.options.debug_batches = 1
    fit(brain, 1, batch_size=12, valid=False)
    assert set(found) == set(PLAYERS)


# --- resuming ------------------------------------------------------------------------------------


class Saving(Enhancer):
    """Saves a checkpoint in the batches that it is told."""

    def fit_batch(self, batch: Any) -> Any:
        losses = super().fit_batch(batch)
        total = (self.epoch - 1) * 3 + self.step
        if total in self.hparams.stops:
            self.checkpointer.save_checkpoint(name=f"stop-{total}")
        return losses


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
@pytest.mark.parametrize("window", [1, 2])
def test_a_stopped_run_goes_on_to_the_bit(tmp_path: Path, precision: str, window: int) -> None:
    """Both players: weights, optimizers, schedules, scalers, windows, and z."""
    import shutil

    options = {"precision": precision, "grad_accumulation_factor": window}
    stops = {"stops": (1, 3, 4)}
    straight = fit(make(Saving, tmp_path / "straight", stops, **options))
    assert straight.optimizer_step > 2
    for stop in stops["stops"]:
        into = tmp_path / f"after-{stop}"
        shutil.copytree(tmp_path / "straight" / "saved" / f"stop-{stop}", into / "saved" / "stop")
        shutil.copy(tmp_path / "straight" / "metrics.jsonl", into)
        resumed = fit(make(Saving, into, stops, seed=9, **options))
        found = list(differences(brain_state(straight), brain_state(resumed)))
        assert not found, f"stopped after batch {stop}: " + "\n".join(found[:10])
    updates = brain_state(straight)["updates"]
    assert set(updates) == set(PLAYERS)
    assert not same(*(updates[name]["schedule"] for name in PLAYERS))


def test_each_player_has_its_own_limit_schedule_and_report(tmp_path: Path) -> None:
    reports: dict[str, Any] = {}

    class Reporting(Enhancer):
        def optimize(self, *arguments: Any, **options: Any) -> Any:
            report = super().optimize(*arguments, **options)
            reports[report.name] = report
            return report

    fit(make(Reporting, tmp_path), epochs=1)
    assert {name: report.limit for name, report in reports.items()} == {
        "generator": 2.0, "discriminator": 0.1,
    }  # fmt: skip
    assert len({report.lr for report in reports.values()}) == 2
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    text = json.dumps(lines)
    assert all(name in text for name in PLAYERS)


# --- what it computes ----------------------------------------------------------------------------


def test_z_is_drawn_by_seed_epoch_and_clip(tmp_path: Path) -> None:
    brain = make(Enhancer, tmp_path)
    brain.epoch = 1
    first = brain.latents(["a", "b"])
    assert torch.equal(brain.latents(["b"])[0], first[1])
    assert not torch.equal(first[0], first[1])
    brain.epoch = 2
    assert not torch.equal(brain.latents(["a"])[0], first[0])


def test_the_reference_batch_is_the_same_in_every_run() -> None:
    found = reference_pairs(clips(), 3, 0.95)
    assert found.shape == (3, 2, SAMPLES)
    assert torch.equal(found, reference_pairs(clips(), 3, 0.95))
    item = Pairs(clips().sources, RATE, SAMPLES, fixed=True)[1]
    torch.testing.assert_close(found[1, 0], emphasise(item["clean"], 0.95))
    with pytest.raises(ValueError, match="reference batch takes 13 clips, and there are 12 to tra"):
        reference_pairs(clips(), 13, 0.95)


def test_it_learns(tmp_path: Path) -> None:
    """The tones are told from the noise, and validation says so."""
    brain = make(Enhancer, tmp_path, {"schedule": None}, seed=1)
    start = copy.deepcopy(brain.modules.generator.state_dict())
    fit(brain, epochs=15)
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    scores = [line["si_snr"] for line in lines if line.get("stage") == "valid"]
    assert len(scores) == 15
    assert scores[-1] > scores[0] + 3
    assert not same(start, brain.modules.generator.state_dict())


def test_evaluation_is_the_same_twice_and_changes_nothing(tmp_path: Path) -> None:
    brain = fit(make(Enhancer, tmp_path), epochs=1)
    test = Pairs([Wave(str(n)) for n in range(30, 33)], RATE, fixed=True)
    before = snapshot(brain.modules)
    brain.evaluate(test)
    first = brain.test_metrics
    brain.evaluate(test)
    assert brain.test_metrics == first
    assert set(first) == {"si_snr", "si_snr_noisy"}
    assert same(snapshot(brain.modules), before)


# --- every YAML ----------------------------------------------------------------------------------

TINY = [
    "--channels=[4,6]", "--discriminator_channels=[4,6]", "--kernel=5", "--stride=2",
    "--discriminator.references=2",
    "--samples=8192", "--chunks.overlap=2048", "--batch_size=2", "--grad_accumulation_factor=1",
    "--steps=2", "--num_workers=0", "--judges=0", "--device=cpu", "--no-progressbar",
    "--log_interval=1", "--extremes=1", "--precision=fp32",
]  # fmt: skip
WARM = ["--schedule.generator.warmup_steps=1", "--schedule.discriminator.warmup_steps=1"]
KEYS = ["pesq", "pesq_noisy", "stoi", "stoi_noisy", "si_snr", "si_snr_noisy"]


def run(name: str, folder: Path, *arguments: str) -> dict[str, float]:
    given = [str(HPARAMS / f"{name}.yaml"), "--output_folder", str(folder), *TINY, *arguments]
    return cli.main(train, given)


def check(folder: Path, metrics: dict[str, float], printed: str) -> None:
    assert list(metrics) == KEYS
    last = printed.splitlines()[-1]
    assert [part.split("=")[0] for part in last.removeprefix("test: ").split()] == KEYS
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert sum(line.get("steps", 0) for line in lines if line.get("stage") == "train") == 2
    header = (folder / "scores_test.csv").read_text().splitlines()[0].split(",")
    assert header[1:7] == KEYS
    assert {"csig", "cbak_noisy", "covl"} <= set(header)
    assert len(list((folder / "audio_test").iterdir())) == 6
    sounds = dict.fromkeys(("noisy", "enhanced", "clean"), "audio")
    shown = kinds_shown(folder)
    assert {"pesq": "number", "stoi noisy": "number", **sounds}.items() <= shown.items()
    assert sounds.items() <= kinds_shown(folder, "valid").items()
    assert not (folder / "audio_valid").exists()


@pytest.fixture
def spoken(tmp_path: Path) -> Path:
    """Speech in LibriSpeech's layout and a folder of noises."""
    for part in ("train-clean-100", "dev-clean", "test-clean"):
        for number in range(4 if part.startswith("train") else 2):
            path = tmp_path / "speech" / part / part[0] / "1" / f"{part[0]}-1-{number:04d}.flac"
            write(path, voice(1.0 + 0.1 * number, number))
    for number in range(3):
        write(tmp_path / "noise" / f"n{number}_L.wav", 0.1 * noise(RATE, number))
    return tmp_path


def test_there_is_a_test_for_every_yaml() -> None:
    assert sorted(path.stem for path in HPARAMS.glob("*.yaml")) == ["demo", "real", "voicebank"]


@needs_enhance
@pytest.mark.usefixtures("empty_speech_cache")
def test_demo(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    counts = ["--corpus.train", "4", "--corpus.valid", "2", "--corpus.test", "2"]
    metrics = run("demo", tmp_path / "run", *WARM, *counts)
    check(tmp_path / "run", metrics, capsys.readouterr().out)


@needs_enhance
def test_real(spoken: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folders = ["--data_folder", str(spoken / "speech"), "--noise_folder", str(spoken / "noise")]
    metrics = run("real", spoken / "run", *WARM, *folders)
    check(spoken / "run", metrics, capsys.readouterr().out)


@needs_enhance
def test_voicebank(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("p226_001", "p225_001", "p225_002", "p225_003", "p225_004"):
        clean = voice(1.0, int(name[-1]), 48000)
        for side, signal in (("clean", clean), ("noisy", clean + 0.02 * noise(len(clean)))):
            for part in ("trainset_28spk", "testset"):
                if part.startswith("train") or name > "p225_002":
                    write(tmp_path / f"{side}_{part}_wav" / f"{name}.wav", signal, 48000)
    metrics = run("voicebank", tmp_path / "run", "--data_folder", str(tmp_path), "--times", "1")
    check(tmp_path / "run", metrics, capsys.readouterr().out)


def test_the_published_setting(uninitialised: None) -> None:
    changes = {"data_folder": "VBD", "discriminator": {"references": 1}}
    hparams = load_hparams(HPARAMS / "voicebank.yaml", changes)
    sizes = [sum(p.numel() for p in hparams[name].parameters()) for name in PLAYERS]
    assert sizes == [24_373_082, 73_100_049]
    assert hparams["batch_size"] * hparams["grad_accumulation_factor"] == 400
    for name in ("opt_g", "opt_d"):
        optimizer = hparams[name]([torch.zeros(1, requires_grad=True)])
        assert type(optimizer) is torch.optim.RMSprop
        assert optimizer.param_groups[0]["lr"] == 0.0002
    assert (hparams["samples"], hparams["pre_emphasis"], hparams["level"]) == (16384, 0.95, None)
    assert hparams["l1_weight"] == 100
