"""Objects that save themselves to a file are a part of a run's state, and unpickle nothing.

The methods are marked as SpeechBrain's decorators mark them, so that it need not be installed.
"""

from __future__ import annotations

import os
import pickle
from functools import partial
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from tests.trainer.small import same
from trainer import Brain, Checkpointer, Stage
from trainer.checkpoint import user_state as hooks
from trainer.inference.loading import put_weights


def marked(kind: str) -> Any:
    def mark(method: Any) -> Any:
        setattr(method, f"_speechbrain_{kind}", True)
        return method

    return mark


class Counting:
    """Schedule whose state is a number in a text file."""

    def __init__(self) -> None:
        self.count = 0

    @marked("saver")
    def save(self, path: Path) -> None:
        path.write_text(str(self.count))

    @marked("loader")
    def load(self, path: Path, end_of_epoch: bool) -> None:
        self.count = int(path.read_text())


class Normaliser(nn.Module):
    """Module with statistics that are neither parameters nor buffers."""

    def __init__(self) -> None:
        super().__init__()
        self.count, self.mean = 0, torch.empty(0)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.training:
            self.count += len(x)
            self.mean = (self.mean if self.mean.numel() else 0.0) + x.sum(0)
        return x - self.mean / self.count

    @marked("saver")
    def save(self, path: Path) -> None:
        torch.save({"count": self.count, "mean": self.mean}, path)

    @marked("loader")
    def load(self, path: Path, end_of_epoch: bool) -> None:
        state = torch.load(path, weights_only=True)
        self.count, self.mean = state["count"], state["mean"]


class Recipe(Brain):
    def compute_forward(self, batch: Any, stage: Stage) -> Any:
        return self.modules.parts(batch)

    def compute_objectives(self, predictions: Any, batch: Any, stage: Stage) -> Any:
        return predictions.square().mean()

    def on_fit_batch_end(self, *_: Any) -> None:
        self.hparams.counting.count += 1

    def on_stage_end(self, stage: Stage, stage_loss: Any, epoch: int | None = None) -> Any:
        return {"wer": [0.0, 2.0, 1.0, 3.0][epoch or 0]} if stage == Stage.VALID else None


def make(folder: Path, **options: Any) -> Recipe:
    torch.manual_seed(0)
    parts = nn.Sequential(Normaliser(), nn.Linear(3, 1))
    return Recipe(
        {"parts": parts}, partial(torch.optim.SGD, lr=0.01), {"counting": Counting()},
        {"device": "cpu", "progressbar": False, **options},
        Checkpointer(folder, keep_best={"wer": "min"}),
    )  # fmt: skip


def data(number: int) -> list[torch.Tensor]:
    torch.manual_seed(number)
    return [torch.randn(4, 3) + 5 for _ in range(number)]


def states(brain: Any) -> Any:
    return brain.modules.state_dict(), brain.hparams.counting.count


def test_a_resumed_run_has_their_states_and_goes_on_exactly(tmp_path: Path) -> None:
    whole = make(tmp_path / "whole")
    whole.fit(range(1, 4), data(5), data(2))
    make(tmp_path / "cut").fit(range(1, 3), data(5), data(2))
    again = make(tmp_path / "cut")
    again.fit(range(1, 4), data(5), data(2))
    assert again.hparams.counting.count == 15
    assert again.modules.parts[0].count == 60
    assert same(states(again), states(whole))


def test_a_run_that_stops_within_an_epoch_does_so_too(tmp_path: Path) -> None:
    whole = make(tmp_path / "whole")
    whole.fit(range(1, 3), data(5))
    cut = make(tmp_path / "cut", checkpoint_every_steps=7)
    cut.on_fit_batch_start = lambda *_: 1 / (cut.optimizer_step < 8)
    with pytest.raises(ZeroDivisionError):
        cut.fit([1, 2], data(5))
    again = make(tmp_path / "cut")
    again.fit(range(1, 3), data(5))
    assert same(states(again), states(whole))


def test_a_test_has_the_statistics_of_the_weights_it_uses(tmp_path: Path) -> None:
    brain = make(tmp_path)
    brain.fit(range(1, 4), data(5), data(2))
    loss = brain.evaluate(data(2), min_key="wer")  # The second epoch's.
    assert brain.modules.parts[0].count == 60
    other = make(tmp_path, test_only=True)
    assert other.evaluate(data(2), min_key="wer") == loss
    assert loss != brain.evaluate(data(2))


def test_recoverables_and_their_own_hooks(tmp_path: Path) -> None:
    def save(obj: list[int], path: Path) -> None:
        path.write_text(" ".join(map(str, obj)))

    def load(obj: list[int], path: Path, end_of_epoch: bool) -> None:
        obj[:] = map(int, path.read_text().split())

    counting, normaliser, numbers = Counting(), Normaliser(), [1, 2]
    checkpointer = Checkpointer(tmp_path, {"counting": counting, "normaliser": normaliser})
    checkpointer.add_recoverable("numbers", numbers, load, save)
    counting.count, normaliser.count = 3, 4
    checkpointer.save_checkpoint()
    counting.count, normaliser.count, numbers[0] = 0, 0, 0
    assert checkpointer.recover_if_possible() is not None
    assert (counting.count, normaliser.count, numbers) == (3, 4, [1, 2])


def test_the_state_of_a_module_itself_stays_what_it_was() -> None:
    module = Normaliser()
    brain = Brain({"norm": module, "net": nn.Linear(1, 1)}, run_opts={"device": "cpu"})
    assert not module.state_dict()
    assert list(brain.modules.state_dict()) == [
        "net.weight", "net.bias", f"norm.{hooks.KEY}",
    ]  # fmt: skip
    brain.modules.load_state_dict({"net.weight": torch.ones(1, 1), "net.bias": torch.ones(1)})


def test_weights_of_a_run_are_put_into_a_module_with_its_statistics(tmp_path: Path) -> None:
    brain = make(tmp_path)
    brain.fit([1], data(5))
    parts = nn.Sequential(Normaliser(), nn.Linear(3, 1))
    put_weights(parts, brain.checkpointer, brain.options, prefix="parts.")
    assert parts[0].count == 20
    assert same(parts[0].mean, brain.modules.parts[0].mean)


def resumed_on_two_ranks(folder: str) -> Any:
    for epochs in (1, 2):
        brain = make(Path(folder))
        brain.fit(range(1, epochs + 1), data(4))
    return brain.modules.parts[0].count, brain.hparams.counting.count, brain.optimizer_step


def test_two_ranks_save_and_restore_them(two_ranks: Any, tmp_path: Path) -> None:
    assert two_ranks(resumed_on_two_ranks, tmp_path) == [(16, 4, 4)] * 2


class Evil:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.path),)


def unpickle(path: Path) -> Any:
    with path.open("rb") as file:
        file.readline()
        return pickle.load(file)


@pytest.mark.parametrize(
    "read",
    [
        lambda path: pickle.loads(path.read_bytes()),
        lambda path: torch.load(path, weights_only=False),
        unpickle,
        lambda path: pickle._Unpickler(BytesIO(path.read_bytes())).load(),
    ],
)
def test_a_loader_that_unpickles_is_refused_before_code_runs(read: Any, tmp_path: Path) -> None:
    made = tmp_path / "made"

    class Careless(Counting):
        @marked("saver")
        def save(self, path: Path) -> None:
            if read is unpickle:
                path.write_bytes(b"header\n" + pickle.dumps(Evil(made)))
            elif "weights_only" in read.__code__.co_names or read.__code__.co_names[0] == "torch":
                torch.save(Evil(made), path)
            else:
                path.write_bytes(pickle.dumps(Evil(made)))

        @marked("loader")
        def load(self, path: Path, end_of_epoch: bool) -> None:
            read(path)

    part = hooks.as_stateful(Careless())
    assert part is not None
    with pytest.raises(ValueError, match="state of a Careless is refused: .* unpickles .*mkdir"):
        part.load_state_dict(part.state_dict())
    assert not made.exists()
    with hooks.no_unpickling("the state of an outer object"):
        with hooks.no_unpickling("that of an object in it"):
            pass
        with pytest.raises(ValueError, match="state of an outer object is refused"):
            pickle.loads(pickle.dumps(Evil(made)))
    assert pickle.loads(pickle.dumps(Counting())).count == 0  # Elsewhere it is nobody's business.


def test_a_loader_that_runs_a_command_is_refused(tmp_path: Path) -> None:
    class Shell(Counting):
        @marked("loader")
        def load(self, path: Path, end_of_epoch: bool) -> None:
            os.system(f"mkdir {tmp_path / 'made'}")

    part = hooks.as_stateful(Shell())
    assert part is not None
    with pytest.raises(ValueError, match="state of a Shell is refused: .* calls os.system"):
        part.load_state_dict(part.state_dict())
    assert not (tmp_path / "made").exists()


def test_a_class_that_saves_and_cannot_load_is_told_of(caplog: Any) -> None:
    class Forgetful:
        @marked("saver")
        def save(self, path: Path) -> None: ...

    assert hooks.as_stateful(Forgetful()) is None
    assert hooks.as_stateful(Forgetful()) is None
    assert caplog.text.count("a Forgetful has a method that saves its state and none that") == 1
