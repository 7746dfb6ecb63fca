"""Searches find what is known to be best, and leave a Brain as if they had never been."""

import copy
import json
import math
import os
import signal
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import trainer
from tests.processes import TwoRanks
from tests.trainer.small import Players, Regressor, batches, everything, make, same
from tests.trainer.test_page import read
from trainer import Brain, Checkpointer, Stage, distributed, seed, signals
from trainer.clipping import AutoClip, LayerClip, MixedClip, NormClip, percentile
from trainer.options import RunOptions
from trainer.schedules import WarmupDecay
from trainer.tuner import SearchOver, search
from trainer.tuner.clip_limit import search_limits, suggest_limit
from trainer.tuner.learning_rate import exponential_rates, suggest_rate
from trainer.tuner.trial import TrialResult

SMALL = {"find_steps": 10, "find_trials": 4}


def found(brain: Any, data: Any, **options: Any) -> dict[str, Any]:
    """Return the findings of a search by these options."""
    for name, value in {**SMALL, **options}.items():
        setattr(brain.options, name, value)
    brain.driver = search
    with pytest.raises(SearchOver) as over:
        brain.fit([1], data)
    assert over.value.code == 0
    brain.options.find_clip = brain.options.find_lr = False
    brain.driver = None
    return over.value.findings


class Bowl(Brain):
    """½ · curvature · ‖w‖² from ‖w‖ = ``distance``: what gradient descent does there is known."""

    def init_optimizers(self) -> None:
        self.optimizer = torch.optim.SGD(self.modules.parameters(), lr=self.hparams.lr)

    def compute_forward(self, batch: Any, stage: Stage) -> Tensor:
        return self.modules.net(torch.ones(1, 1))

    def compute_objectives(self, predictions: Tensor, batch: Any, stage: Stage) -> Tensor:
        return 0.5 * self.hparams.curvature * predictions.square().sum() + batch.sum()


def bowl(lr: float, curvature: float = 10.0, distance: float = 10.0, **options: Any) -> Bowl:
    layer = nn.Linear(1, 4, bias=False)
    nn.init.constant_(layer.weight, distance / 2)
    hparams = {"lr": lr, "curvature": curvature}
    return Bowl({"net": layer}, None, hparams, {"device": "cpu", "progressbar": False, **options})


def nothing(number: int) -> list[Tensor]:
    """Batches that only shift the loss, each by another number."""
    return list(torch.linspace(-0.1, 0.1, number)[:, None])


# ---------------------------------------------------------------- what is found


@pytest.mark.parametrize("scale", [1.0, 1e-3])
def test_the_limit_of_a_bowl_that_is_too_steep_for_its_rate(scale: float) -> None:
    """Without clipping every step overshoots (lr · curvature = 2.5). Under a limit c a step is
    lr · c long: 40 steps must go the distance of 10, so c is above 10 / (40 · lr) = 1; then they
    swing by half a step, which above c = 8 costs more than a hundredth of what was won.
    """
    brain = bowl(lr=0.25 / scale, curvature=10.0 * scale)
    data = [scale * each for each in nothing(40)]
    advice = found(brain, data, find_clip=True, find_steps=40, find_trials=14)["find_clip"]
    best = 10 / (40 * 0.25) * scale
    assert advice["main"].needed
    assert all(best <= limit <= 8 * best for limit in advice["main"].as_good)
    assert best < advice["main"].limit < 5 * best
    assert len(advice["main"].trials) <= 14


def test_the_limit_of_elements_is_looked_for_where_elements_are_clipped() -> None:
    brain = bowl(lr=0.25, clip="value")
    advice = found(brain, nothing(40), find_clip=True, find_steps=40, find_trials=14)["find_clip"]
    assert advice["main"].kind == "ValueClip"
    # Of four equal elements, each has half of the norm.
    assert all(0.5 <= limit <= 4 for limit in advice["main"].as_good)
    assert advice["main"].percentiles[1] >= 50  # the first gradient: 10 · 5 an element


@pytest.mark.parametrize(
    ("clip", "kind", "measure"),
    [
        (LayerClip(2.0), "LayerClip", "Largest norm of a layer"),
        (NormClip(2.0, math.inf), "NormClip", "Norm of the gradient"),
        (AutoClip(), "NormClip", "Norm of the gradient"),
        (MixedClip([LayerClip(1.0), NormClip(1.0)]), "NormClip", "Norm of the gradient"),
    ],
)
def test_a_kind_with_a_limit_keeps_it_and_others_make_room_for_a_joint_norm(
    clip: Any, kind: str, measure: str, capsys: pytest.CaptureFixture[str]
) -> None:
    brain, limit = make(Regressor, hparams={"clip": clip}), clip.limit
    advice = found(brain, batches(12), find_clip=True)["find_clip"]["main"]
    assert advice.kind == kind
    assert measure in capsys.readouterr().out
    assert brain.hparams.clip is clip
    assert clip.limit == limit
    largest = advice.percentiles[100]
    usual = found(make(Regressor), batches(12), find_clip=True)["find_clip"]["main"]
    if isinstance(clip, (LayerClip, NormClip)):
        assert largest < 0.95 * usual.percentiles[100]
    else:
        assert largest == usual.percentiles[100]


def test_where_clipping_is_not_needed_the_limit_is_a_guard() -> None:
    brain = bowl(lr=0.01)
    advice = found(brain, nothing(40), find_clip=True, find_steps=40)["find_clip"]["main"]
    assert not advice.needed
    assert advice.percentiles[50] <= advice.limit <= advice.percentiles[100] * 1.1
    assert "guard against spikes" in advice.sentence()


@pytest.mark.parametrize("curvature", [0.1, 10.0])
def test_the_rate_of_a_bowl_is_below_that_which_diverges(curvature: float) -> None:
    """Gradient descent diverges above 2 / curvature, and is quickest at half of that."""
    for noise in (0.0, 0.3):
        torch.manual_seed(0)
        data = [noise * curvature * torch.randn(1) for _ in range(200)]
        brain = bowl(lr=1e-3, curvature=curvature, max_grad_norm=None)
        suggestion = found(brain, data, find_lr=True, find_steps=100)["find_lr"]["main"]
        assert 0.01 / curvature < suggestion.lr < 1 / curvature
        assert suggestion.lr < suggestion.lowest
        if 2 / curvature < 5:
            assert suggestion.lowest < suggestion.diverged
            assert suggestion.diverged > 1.9 / curvature


def test_the_limit_is_looked_for_at_the_rate_that_was_found() -> None:
    brain = bowl(lr=1e-5)
    both = found(brain, nothing(80), find_lr=True, find_clip=True, find_steps=40)
    assert both["find_lr"]["main"].lr > 1e-3
    assert both["find_clip"]["main"].lr == pytest.approx(both["find_lr"]["main"].lr, rel=1e-3)
    alone = found(bowl(lr=1e-5), nothing(80), find_clip=True, find_steps=40)["find_clip"]["main"]
    assert alone.lr == pytest.approx(1e-5)
    ends = [
        min(trial.end_loss for trial in each.trials) for each in (both["find_clip"]["main"], alone)
    ]
    assert ends[0] < ends[1] / 2


def test_a_schedule_counts_from_the_rate_that_was_found() -> None:
    """The peak that a warm-up leads to is what is scaled, in trials alone."""

    class Recording(Regressor):
        def on_fit_batch_end(self, *args: Any) -> None:
            rates.append(self.optimizer.param_groups[0]["lr"])

    rates: list[float] = []
    hparams = {"schedule": partial(WarmupDecay, warmup_steps=5, total_steps=100)}
    brain = make(Recording, hparams=hparams)
    both = found(brain, batches(30), find_lr=True, find_clip=True, **SMALL)
    peak = both["find_lr"]["main"].lr
    assert peak not in (None, 0.01)
    assert max(rates[-SMALL["find_steps"] :]) == pytest.approx(peak, rel=0.05)
    brain.fit([1], batches(1))
    assert brain.optimizer.param_groups[0]["initial_lr"] == 0.01


def test_trials_that_differ_in_nothing_are_the_same() -> None:
    brain = make(Regressor, norm=True)
    trials = [found(brain, batches(20), find_clip=True)["find_clip"]["main"].trials for _ in "ab"]
    assert [each.losses for each in trials[0]] == [each.losses for each in trials[1]]
    assert len(trials[0]) >= 3
    assert len({each.losses[0] for each in trials[0]}) == 1


def test_a_search_tries_1_then_percentiles_then_bisects() -> None:
    def trial(limit: float) -> TrialResult:
        loss = abs(math.log10(min(limit, 1e9)) - 1.5)  # best at 32
        return TrialResult(losses=[10.0] * 2 + [loss] * 18, norms=[float(n) for n in range(1, 101)])

    trials = search_limits(trial, 10)
    limits = [each.limit for each in trials]
    assert limits[:2] == [math.inf, 1.0]
    assert limits[2] == pytest.approx(percentile(range(1, 101), 50), abs=1)
    assert limits[2] < limits[3] < 100
    assert len(limits) == len(set(limits)) <= 10
    advice = suggest_limit("NormClip", trials, 0.1)
    assert 20 < advice.limit < 50
    assert advice.needed


def test_failing_trials_are_worse_than_any_other() -> None:
    def trial(limit: float) -> TrialResult:
        if limit > 3:
            return TrialResult(losses=[1.0] * 5, norms=[1e6] * 5, skipped=4, failed=True)
        return TrialResult(losses=[5.0] * 2 + [4.0 - limit / 10] * 18, norms=[50.0] * 20)

    advice = suggest_limit("NormClip", search_limits(trial, 9), 0.1)
    assert advice.needed
    assert advice.limit <= 3
    assert "training without clipping failed" in advice.reason


def test_nothing_is_recommended_where_nothing_was_learned() -> None:
    flat = TrialResult(losses=[1.0] * 20, norms=[1.0] * 20)
    trials = search_limits(lambda limit: TrialResult(losses=[1.0] * 20, norms=[1.0] * 20), 5)
    advice = suggest_limit("NormClip", trials, 0.1)
    assert advice.limit is None
    assert "--find_steps" in advice.sentence()
    suggestion = suggest_rate(exponential_rates(20), flat.losses, flat, 0.1, math.inf)
    assert suggestion.lr is None
    assert suggestion.ratio == 1.0


# ---------------------------------------------------------------- what is left as it was

SETTINGS = [
    {},
    {"grad_accumulation_factor": 3},
    {"precision": "fp16", "norm": True},
    {"ema_decay": 0.9, "norm": True},
    {"hparams": {"clip": AutoClip()}},
    {"clip": "value", "hparams": {"schedule": partial(WarmupDecay, warmup_steps=5, total_steps=9)}},
]


class Drawing(Regressor):
    """Draws random numbers in training, and keeps a number and a generator of its own."""

    def on_fit_start(self) -> None:
        self.seen, self.own = 0, torch.Generator().manual_seed(3)

    def on_fit_batch_start(self, batch: Any, should_step: bool) -> None:
        self.seen += 1
        batch["x"] = batch["x"] + 0.1 * torch.randn(3, 4) + torch.rand(3, 4, generator=self.own)


@pytest.mark.parametrize("kind", [Drawing, Players])
@pytest.mark.parametrize("settings", SETTINGS)
def test_a_brain_that_searched_trains_to_the_same_bits(
    kind: type[Brain], settings: dict[str, Any]
) -> None:
    torch.manual_seed(5)
    searched, plain = (make(kind, **copy.deepcopy(settings)) for _ in range(2))
    factor = settings.get("grad_accumulation_factor", 1)
    data = batches(20 * factor)
    torch.manual_seed(6)
    found(searched, [dict(each) for each in data], find_lr=True, find_clip=True)
    assert searched.optimizer_step == searched.step == 0
    states = []
    for brain in (searched, plain):
        torch.manual_seed(6)
        brain.fit([1, 2], [dict(each) for each in data])
        states.append([everything(brain), brain.optimizer_step, getattr(brain, "seen", None)])
    assert same(*states)


@pytest.mark.parametrize("kind", [Drawing, Players])
def test_a_search_leaves_every_generator_and_tensor_where_it_was(kind: type[Brain]) -> None:
    brain = make(kind, norm=True)
    found(brain, batches(30), find_clip=True)
    before = everything(brain), seed.rng_state(), [b.clone() for b in brain.modules.buffers()]
    found(brain, batches(30), find_clip=True, find_lr=True)
    after = everything(brain), seed.rng_state(), list(brain.modules.buffers())
    assert same(before, after)


def test_each_player_has_a_recommendation_of_its_own() -> None:
    brain = make(Players, max_grad_norm={"generator": 3.0, "discriminator": None})
    findings = found(brain, batches(30), find_clip=True, find_lr=True)
    for each in findings.values():
        assert sorted(each) == ["discriminator", "generator"]
    brain.fit([1], batches(1))
    for update, limit in (("generator", 3.0), ("discriminator", math.inf)):
        assert brain.updates[update].clip.limit == limit
        assert findings["find_lr"][update].limit == limit
    norms = [findings["find_clip"][name].percentiles[50] for name in brain.updates]
    assert norms[0] != norms[1]


def test_a_search_writes_no_checkpoint_and_a_run_goes_on_as_without_it(tmp_path: Path) -> None:
    class Saving(Regressor):
        def on_fit_batch_end(self, *args: Any) -> None:
            if self.step == 2:
                self.checkpointer.save_checkpoint()

    def brain(name: str, **options: Any) -> Any:
        folder = tmp_path / name
        keeper = Checkpointer(folder / "checkpoints", keep_last=100)
        return make(Saving, checkpointer=keeper, output_folder=str(folder), **options)

    data = batches(12)
    found(brain("searched"), data, find_clip=True)
    assert not (tmp_path / "searched" / "checkpoints").exists()
    states = []
    for name in ("searched", "plain"):
        brain(name, optimizer_step_limit=7, checkpoint_every_steps=5).fit([1, 2], data)
        files = sorted(path for path in (tmp_path / name / "checkpoints").rglob("*"))
        log = (tmp_path / name / "metrics.jsonl").read_text()
        if name == "searched":
            found(brain(name), data, find_clip=True, find_lr=True)
        assert sorted(path for path in (tmp_path / name / "checkpoints").rglob("*")) == files
        assert (tmp_path / name / "metrics.jsonl").read_text() == log
        resumed = brain(name)
        resumed.fit([1, 2], data)
        assert resumed.optimizer_step == 7 + 12
        states.append(everything(resumed))
    assert same(*states)


def test_a_failing_rate_ends_the_trial_and_not_the_program(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    class Exploding(Regressor):
        def compute_objectives(self, predictions: Tensor, batch: Any, stage: Stage) -> Tensor:
            return (predictions - batch["y"]).square().mean().exp()

    sgd = partial(torch.optim.SGD, lr=0.01)
    options = {"max_grad_norm": None, "output_folder": str(tmp_path), "find_lr": True}
    brain = make(Exploding, optimizer=sgd, **options)
    suggestion = found(brain, batches(60), find_lr=True, find_steps=30)["find_lr"]["main"]
    assert suggestion.diverged is not None
    assert suggestion.lr < suggestion.diverged
    assert len(suggestion.losses) < 60
    assert brain.nonfinite_count == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["find_lr.html", "find_lr.json"]
    assert "not finite" not in caplog.text


# ---------------------------------------------------------------- on two ranks


def on_two_ranks(folder: str) -> dict[str, Any]:
    """Search, then search and be interrupted on rank 1 alone; return what came of it."""
    rank = distributed.rank()
    brain = make(output_folder=folder, find_lr=True, find_clip=True)
    findings = found(brain, batches(40), find_lr=True, find_clip=True)
    before = everything(brain), seed.rng_state()
    again = found(brain, batches(40), find_lr=True, find_clip=True)
    result = {
        "findings": [each["main"].record() for each in (*findings.values(), *again.values())],
        "kept": same(before, (everything(brain), seed.rng_state())),
        "weights": brain.modules.state_dict(),
    }
    signals.install()
    trained: list[dict[str, Any]] = []

    class Interrupted(Regressor):
        def on_fit_batch_start(self, batch: Any, should_step: bool) -> None:
            trained.append(batch)
            if rank == 1 and len(trained) == 5:
                os.kill(os.getpid(), signal.SIGTERM)

    interrupted = make(Interrupted, find_clip=True)
    try:
        interrupted.fit([1], batches(40))
    except signals.Interrupted as stop:
        result["exit"] = stop.code, len(trained)
    return result


def test_two_ranks_find_what_one_finds_and_stop_together(
    tmp_path: Path, two_ranks: TwoRanks
) -> None:
    ranks = two_ranks(on_two_ranks, tmp_path / "run")
    assert same(*ranks)
    assert ranks[0]["kept"]
    assert ranks[0]["exit"] == (128 + signal.SIGTERM, 5)
    assert len(list((tmp_path / "run").iterdir())) == 4
    rate, limit, *again = ranks[0]["findings"]
    assert again == [rate, limit]
    parts = batches(40)
    pairs = [
        {"x": torch.cat([a["x"], b["x"]]), "y": torch.cat([a["y"], b["y"]])}
        for a, b in zip(parts[::2], parts[1::2], strict=True)
    ]
    alone = found(make(), pairs, find_lr=True, find_clip=True)
    assert limit["limit"] == alone["find_clip"]["main"].limit
    assert rate["lr"] == alone["find_lr"]["main"].lr
    assert rate["losses"] == pytest.approx(alone["find_lr"]["main"].losses, rel=1e-4)
    assert same(ranks[0]["weights"], make().modules.state_dict())


# ---------------------------------------------------------------- what cannot be searched


def test_too_few_batches_are_a_sentence() -> None:
    with pytest.raises(
        ValueError, match="at least 10 steps of 'main' in an epoch, and this one has 4"
    ):
        found(make(Regressor), batches(4), find_clip=True)
    with pytest.raises(ValueError, match="this one has 7: lower batch_size"):
        found(make(Regressor, grad_accumulation_factor=3), batches(21), find_lr=True)


def test_steps_by_hand_cannot_be_seen() -> None:
    class ByHand(Regressor):
        def fit_batch(self, batch: Any) -> Tensor:
            loss = self.compute_objectives(self.compute_forward(batch, Stage.TRAIN), batch, None)
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()
            return loss.detach()

    brain = make(ByHand)
    with (
        pytest.warns(UserWarning, match="calls backward"),
        pytest.raises(
            ValueError, match=r"ByHand.fit_batch never called self.optimize\(loss, name\)"
        ),
    ):
        found(brain, batches(20), find_clip=True)


def test_a_search_trains() -> None:
    with pytest.raises(ValueError, match="leave out test_only"):
        RunOptions(find_clip=True, test_only=True)
    with pytest.raises(ValueError, match="find_steps must be a whole number of at least 10, not 3"):
        RunOptions(find_steps=3)


# ---------------------------------------------------------------- from the command line

RECIPE = """\
# python train.py {path}
output_folder: {folder}
lr: 0.02
max_grad_norm: 5.0
"""


def train(run: Any) -> dict[str, float]:
    keeper = Checkpointer(run.folder / "checkpoints")
    optimizer = partial(torch.optim.SGD, lr=run.hparams["lr"])
    brain = Players(make(Players).modules, optimizer, run.hparams, run.options, checkpointer=keeper)
    brain.fit([1], batches(20), batches(2))
    brain.evaluate(batches(2))
    return {"wer": 1.0}


def test_a_recipe_needs_no_line_for_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, folder = tmp_path / "demo.yaml", tmp_path / "run"
    path.write_text(RECIPE.format(path=path, folder=folder))
    small = ["--find_steps", "12", "--find_trials", "5", "--device", "cpu", "--no-progressbar"]
    assert trainer.main(train, [str(path), "--find_clip", "--find_lr", *small]) == {}
    said = capsys.readouterr().out
    assert "test:" not in said
    assert "find_clip: --max_grad_norm '{discriminator: " in said
    assert said.count("find_lr: ") == 2
    assert "each was searched at the other's present value" in said
    assert not (folder / "checkpoints").exists()
    assert not (folder / "metrics.jsonl").exists()
    for kind, headings in (("find_clip", "Clip limit of"), ("find_lr", "Learning rate of")):
        record = json.loads((folder / f"{kind}.json").read_text())
        assert sorted(record["optimizers"]) == ["discriminator", "generator"]
        assert record["steps"] == 12
        page = read((folder / f"{kind}.html").read_text())
        assert page.headings[0].startswith(headings)
        assert {"discriminator", "generator"} <= set(page.headings)
        assert page.count["figure"] >= 4
    trials = json.loads((folder / "find_clip.json").read_text())["optimizers"]["generator"]
    assert 3 <= len(trials["trials"]) <= 5
    assert trainer.main(train, [str(path), "--device", "cpu", "--no-progressbar"]) == {"wer": 1.0}


def test_a_search_leaves_the_settings_of_a_run_and_its_files(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, folder = tmp_path / "demo.yaml", tmp_path / "run"
    path.write_text(RECIPE.format(path=path, folder=folder))
    common = ["--device", "cpu", "--no-progressbar"]
    trainer.main(train, [str(path), *common])
    kept = ("hyperparams.yaml", "metrics.jsonl", "environment.json")
    before = [(folder / name).read_bytes() for name in kept]
    saved = sorted(folder.glob("checkpoints/*"))
    assert saved
    trainer.main(
        train,
        [str(path), "--find_clip", "--lr", "0.5", "--overwrite", "--find_trials", "4", *common],
    )
    assert [(folder / name).read_bytes() for name in kept] == before
    assert sorted(folder.glob("checkpoints/*")) == saved
    assert "--find_clip" in (folder / "command.txt").read_text()
