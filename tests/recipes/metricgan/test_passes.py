"""Work of each pass of a training: to whom, in which order, with which scores."""

import copy
import math
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from recipes.common.streaming import Chunks
from recipes.metricgan.enhancer import MetricGAN
from recipes.metricgan.history import History, waveform
from recipes.metricgan.model import STEEPEST, enhance
from recipes.metricgan.phases import Phase
from recipes.metricgan.train import Enhancer
from trainer import Stage

from .small import METRIC, PHASES, Tones, fit, make


def state(module: torch.nn.Module) -> list[Tensor]:
    return [p.detach().clone() for p in module.parameters()]


def equal(a: list[Tensor], b: list[Tensor]) -> bool:
    return all(map(torch.equal, a, b))


class Watched(Enhancer):
    """Notes for each batch what it was for, who moved, and what the judge was when it was asked."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.notes = Notes()
        self.modules.discriminator.register_forward_pre_hook(self.on_judging)

    def on_judging(self, module: Any, inputs: Any) -> None:
        self.notes.asked = state(module)

    def fit_batch(self, batch: Any) -> Any:
        players = {name: self.modules[name] for name in ("discriminator", "generator")}
        before = {name: state(each) for name, each in players.items()}
        self.notes.asked = None
        losses = super().fit_batch(batch)
        moved = [name for name, each in players.items() if not equal(before[name], state(each))]
        self.notes.all.append(
            (self.epoch, batch.what[0], moved, self.notes.asked, before["discriminator"])
        )
        return losses


class Notes:
    """Not a part of the Brain's state."""

    def __init__(self) -> None:
        self.all: list[Any] = []
        self.asked: list[Tensor] | None = None


@pytest.mark.parametrize("factor", [1, 2])
def test_who_moves_in_which_order(factor: int) -> None:
    brain: Any = fit(make(brain=Watched, grad_accumulation_factor=factor))
    moves = {"spectral": "generator", "generator": "generator", "enhance": None}
    epochs: dict[int, list[str]] = {}
    for epoch, what, moved, *_ in brain.notes.all:
        epochs.setdefault(epoch, []).append(what)
        player = moves.get(what, "discriminator")
        assert moved in ([[player], []] if factor > 1 and player else [[player] if player else []])
    three = ["enhance"] * 3 + ["current"] * 3
    end = ["current"] * 3 + ["generator"] * 3
    assert epochs[1] == ["spectral"] * 3
    assert epochs[2] == three + end  # no past yet
    assert epochs[3] == three + ["history"] * 2 + end  # half of 6
    assert epochs[4] == three + ["history"] * 3 + end  # half of 10, which is all it holds
    steps = {name: update.optimizer.state for name, update in brain.updates.items()}
    counts = {name: max(int(s["step"]) for s in states.values()) for name, states in steps.items()}
    if factor == 1:
        assert counts == {"discriminator": 3 * 6 + 2 + 3, "generator": 3 + 3 * 3}
    else:  # A window of two batches ends with its pass.
        assert counts == {"discriminator": 3 * 4 + 1 + 2, "generator": 2 + 3 * 2}


@pytest.mark.parametrize("factor", [1, 2])
def test_the_generator_is_judged_by_the_discriminator_that_has_moved(factor: int) -> None:
    brain: Any = fit(make(brain=Watched, grad_accumulation_factor=factor))
    checked = 0
    for epoch in (2, 3, 4):
        notes = [note for note in brain.notes.all if note[0] == epoch]
        start = notes[0][4]
        judging = [note for note in notes if note[1] == "generator"]
        for _, _, _, asked, before in judging:
            assert equal(asked, before)
            assert equal(asked, judging[0][3])
            assert not equal(asked, start)
            checked += 1
    assert checked == 9


def test_each_player_sees_magnitudes_of_its_own_gain() -> None:
    brain = make()
    seen: dict[str, list[Tensor]] = {"generator": [], "discriminator": []}
    for name, kept in seen.items():
        brain.modules[name].register_forward_pre_hook(
            lambda _, inputs, kept=kept: kept.append(inputs[0].detach().clone())
        )
    fit(brain)
    for name, spectrum in (("generator", brain.spectrum), ("discriminator", brain.hearing)):
        assert {round(float(each.max()), 1) > 3 for each in seen[name]} == {spectrum.gain > 1}


def batches(brain: Enhancer, epoch: int) -> list[Any]:
    """Batches that the loader gives in an epoch."""
    from recipes.metricgan.phases import Drawn, Passes
    from trainer.data import make_loader

    passes = Passes(brain.phases, 8, brain.history, 5)
    loader = make_loader(Drawn(Tones()), train=True, seed=5, batch_sampler=passes)
    loader.set_epoch(epoch)
    return list(loader)


def test_what_the_discriminator_learns() -> None:
    """The loss of a batch: clean is 1, the others are what was measured; of the past as well."""
    brain = fit(make(phases=[Phase("metric", 1, items=6, batch_size=2)]), Tones())
    before = {record.id: record for record in (brain.history[i] for i in range(6))}
    brain.phases = type(brain.phases)([METRIC])
    brain.targets.start()
    losses = {}
    for batch in batches(brain, 2):
        if batch.what[0] not in ("enhance", "current", "history"):
            continue
        judge = copy.deepcopy(brain.modules.discriminator)
        found = brain.train_batch(batch)
        if found is None:
            continue
        clean, frames = brain.features(batch.clean.data), brain.frames(batch)
        if batch.what[0] == "current":
            waves = [waveform(brain.history.current[i, 0]) for i in batch.index.tolist()]
            wanted = [
                (clean, [1.0] * len(waves)),
                (waves, [brain.history.current[i, 0].score for i in batch.index.tolist()]),
                (
                    brain.features(batch.noisy.data),
                    brain.targets.get(f"{n} (noisy)" for n in batch.id),
                ),
            ]
        else:
            waves = [waveform(before[name]) for name in batch.id]
            wanted = [(waves, [before[name].score for name in batch.id])]
        expected = 0.0
        for heard, scores in wanted:
            if isinstance(heard, list):
                padded = torch.zeros_like(batch.clean.data)
                for row, wave in zip(padded, heard, strict=True):
                    row[: len(wave)] = wave
                heard = brain.features(padded)
            with torch.no_grad():
                predicted = judge(heard, clean, frames)
            assert all(0 < score <= 1 for score in scores)
            expected += (predicted - torch.tensor(scores)).square().mean().item() / len(wanted)
        (name,) = found
        assert found[name].item() == pytest.approx(expected, rel=1e-5)
        losses.setdefault(name, []).append(expected)
    assert {name: len(values) for name, values in losses.items()} == {"current": 6, "history": 2}


def test_what_was_scored_is_what_is_kept() -> None:
    brain = make()  # of unlike lengths
    heard = {}
    submit = brain.targets.judges.submit

    def listen(name: str, clean: Tensor, signal: Tensor, measures: Any = None) -> None:
        heard[brain.epoch, name] = signal.clone()
        submit(name, clean, signal, measures)

    brain.targets.judges.submit = listen  # type: ignore[method-assign]
    fit(brain, Tones())
    assert len(brain.history) == 10
    for place in range(10):
        record = brain.history[place]
        assert torch.equal(waveform(record), heard[record.epoch, record.id])
        assert f"tone{record.index}" == record.id


def test_the_discriminator_learns_of_varied_masks_too() -> None:
    """Each has a score and a place in the history of its own, and comes again as it was."""
    phases = [Phase("metric", 2, items=6, batch_size=2)]
    ends = [
        fit(make(phases=phases, hparams={"variations": 2, "history": History(100, 0.5)}))
        for _ in range(2)
    ]
    asked = ends[0].targets.judges.submitted
    assert len(asked) == len(set(asked[:24])) * 2 == 2 * 6 * 4  # three of each, and the noisy one
    assert sum("(varied 2)" in name for name in asked) == 2 * 6
    kept = [[brain.history[i] for i in range(36)] for brain in ends]
    by_version = {
        version: {(r.epoch, r.index): r for r in kept[0] if r.version == version}
        for version in range(3)
    }
    assert all(len(records) == 12 for records in by_version.values())
    for place, own in by_version[0].items():
        first, second = (by_version[version][place] for version in (1, 2))
        assert not torch.equal(own.wave, first.wave)
        assert not torch.equal(first.wave, second.wave)
        assert len({own.score, first.score, second.score}) == 3
    assert all(torch.equal(a.wave, b.wave) for a, b in zip(*kept, strict=True))


def test_what_the_discriminator_teaches_may_move_some_layers_alone() -> None:
    """By an optimizer that begins with the first of these steps."""
    optimizer = {"opt_metric": partial(torch.optim.Adam, lr=0.01), "metric_layers": ["sigmoid"]}
    brain: Any = make(brain=Watched, hparams=optimizer)
    layers, before, moved = brain.modules.generator, {}, []
    fit_batch = brain.fit_batch

    def watch(batch: Any) -> Any:
        before.update((name, state(part)) for name, part in layers.named_children())
        found = fit_batch(batch)
        parts = [n for n, part in layers.named_children() if not equal(before[n], state(part))]
        moved.append((batch.what[0], parts))
        return found

    brain.fit_batch = watch
    fit(brain)
    everything = ["blstm", "linear", "sigmoid"]
    assert [parts for what, parts in moved if what == "spectral"] == [everything] * 3
    assert [parts for what, parts in moved if what == "generator"] == [["sigmoid"]] * 9
    assert not any(parts for what, parts in moved if what not in ("spectral", "generator"))
    steps = {
        name: {int(each["step"]) for each in update.optimizer.state.values()}
        for name, update in brain.updates.items()
    }
    assert (steps["generator"], steps["metric"]) == ({3}, {9})


def test_nobody_waits_for_scores_while_enhancing() -> None:
    brain = make()
    calls: list[str] = []
    ask, collect = brain.ask_for_scores, brain.targets.judges.collect
    brain.ask_for_scores = lambda batch: (calls.append("enhance"), ask(batch))[1]  # type: ignore
    brain.targets.judges.collect = lambda **of: (calls.append("wait"), collect(**of))[1]
    fit(brain)
    assert calls[:4] == ["enhance"] * 3 + ["wait"]
    assert len(brain.targets.judges.submitted) == 3 * 2 * 6  # each signal once, clean never


@pytest.mark.parametrize("side", ["", " (noisy)"])
def test_what_cannot_be_measured_is_left_out(side: str) -> None:
    """Neither of an utterance's sides is learned from; the others are, and the generator's turn
    needs no scores."""
    name = "tone3"
    brain = fit(make(bad=[name + side], phases=[Phase("metric", 2, items=8, batch_size=3)]))
    kept = {brain.history[i].id for i in range(len(brain.history))}
    assert len(kept) >= 6
    assert (name in kept) == (side != "")
    assert all(math.isfinite(brain.history[i].score) for i in range(len(brain.history)))
    for module in brain.modules.values():
        assert all(p.isfinite().all() for p in module.parameters())


def test_an_epoch_without_any_score_moves_the_generator_alone() -> None:
    phases = [Phase("metric", 1, items=2, batch_size=1)]
    brain: Any = make(bad=[f"tone{i}" for i in range(8)], phases=phases, brain=Watched)
    fit(brain)
    assert [moved for _, what, moved, *_ in brain.notes.all if what == "current"] == [[]] * 4
    assert [moved for _, what, moved, *_ in brain.notes.all if what == "generator"] == [
        ["generator"]
    ] * 2
    assert len(brain.history) == 0


def test_a_poisoned_slope_is_mended_by_the_next_step() -> None:
    """NaN makes a loss NaN: that step is skipped, and the slope is 3.5 after it."""
    brain = make(phases=[Phase("warm_up", 1, items=4, batch_size=1, passes=["spectral"])])
    slope = brain.modules.generator.sigmoid.slope
    seen = []

    def poison(batch: Any, original: Any = brain.fit_spectral) -> Any:
        if len(seen) == 1:
            with torch.no_grad():
                slope[2], slope[4] = math.nan, 8.0
        found = original(batch)
        seen.append(slope.detach().clone())
        return found

    brain.fit_spectral = poison  # type: ignore[method-assign]
    fit(brain)
    assert seen[1][2] == seen[1][4] == STEEPEST
    assert seen[3].isfinite().all()
    assert not torch.equal(seen[3], seen[1])
    assert brain.optimizer_step == 3
    assert all(p.isfinite().all() for p in brain.modules.parameters())


def test_slopes_are_limited_after_each_step_of_the_generator() -> None:
    brain = make(phases=[Phase("metric", 1, items=4, batch_size=2)])
    with torch.no_grad():
        brain.modules.generator.sigmoid.slope.fill_(STEEPEST)
    fit(brain)
    slope = brain.modules.generator.sigmoid.slope
    assert slope.max() <= STEEPEST
    assert slope.min() < STEEPEST


def test_phases_have_metrics_of_their_own() -> None:
    brain = make(phases=PHASES)
    found = []
    end = brain.on_stage_end

    def note(stage: Stage, loss: Any, epoch: int | None = None) -> Any:
        metrics = end(stage, loss, epoch)
        if stage is Stage.VALID:
            found.append(metrics)
        return metrics

    brain.on_stage_end = note  # type: ignore[method-assign]
    brain.board._write = lambda rows, means: None  # type: ignore[method-assign]
    fit(brain, valid=Tones(3, 800, fixed=True))
    assert [set(each) for each in found] == [{"pesq", "pesq_noisy", "pesq_warm_up"}] + 3 * [
        {"pesq", "pesq_noisy", "pesq_metric"}
    ]
    assert brain.best == "pesq_metric"


def test_inference_is_what_was_evaluated() -> None:
    """A sound that ends in digital silence, as a padded chunk does, is enhanced as without it."""
    brain = make()
    model = MetricGAN(
        {"generator": brain.modules.generator},
        {**vars(brain.hparams), "sample_rate": 16000, "chunks": Chunks(2000, 500)},
        brain.options,
    )
    wav = Tones(1, 1500)[0]["noisy"]
    expected = enhance(brain.spectrum, brain.modules.generator, wav[None], torch.tensor([len(wav)]))
    padded = torch.nn.functional.pad(torch.stack([wav, wav * 0]), (0, 400))
    found = model.network(padded)
    torch.testing.assert_close(found[:1, :1500], expected, rtol=0, atol=1e-6)
    assert not found[0, 1500:].any()
    assert not found[1].any()
