"""A report of a skipped step says what was not finite; making it leaves no trace in the run."""

import json
import logging
import math
import random
import subprocess
import sys
import textwrap
import warnings
from collections import Counter, deque, namedtuple
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import ctc_loss

from tests.processes import ROOT, Forks
from tests.trainer.small import (
    Players,
    Regressor,
    batches,
    everything,
    make,
    same,
    spoilt,
)
from tests.trainer.test_guard import History
from tests.trainer.test_page import read
from trainer import Brain, NonFiniteError, Stage, defaults, seed
from trainer.checkpoint import Checkpointer
from trainer.cli.replay import command, replay
from trainer.data.batch import Batch, Padded
from trainer.diagnostics.nonfinite.serialize import (
    deserialize_batch,
    own_modules,
    serialize_batch,
)
from trainer.diagnostics.nonfinite.tracer import NonFiniteReport, NonFiniteTracer
from trainer.diagnostics.replay import Replayed, load, nearest
from trainer.report import render
from trainer.run_files import LAUNCH_HEADER

KINDS = [Regressor, Players]


def lines(folder: Path) -> list[dict[str, Any]]:
    """Return the records of a run without times."""
    records = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    times = ("seconds", "examples_per_second", "times", "memory", "padding")
    return [{name: each[name] for name in each if name not in times} for each in records]


def report(folder: Path, step: str = "3") -> dict[str, Any]:
    """Return the report of a step."""
    found = json.loads((folder / "nonfinite" / step / "report.json").read_text())
    assert isinstance(found, dict)
    return found


# ----------------------------------------------------------------------------------- harmlessness


class Drawing(nn.Module):
    """Changes a buffer, and draws from three generators."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network
        self.register_buffer("total", torch.zeros(()))

    def __getitem__(self, index: int) -> Any:
        return self.network[index]  # type: ignore[index]

    def forward(self, x: Tensor) -> Tensor:
        self.total = self.total + 1
        noise = random.random() + float(np.random.rand()) + torch.rand(())
        return self.network(nn.functional.dropout(x, 0.3)) + 0.01 * noise


def busy(kind: type[Brain]) -> Any:
    """Return such a Brain, whose hooks change everything that has state."""

    class Busy(kind):  # type: ignore[misc, valid-type]
        def __init__(self, modules: Any, *others: Any) -> None:
            super().__init__({name: Drawing(each) for name, each in modules.items()}, *others)
            self.batches, self.latest, self.pairs = [], None, deque(maxlen=2)

        def on_fit_start(self) -> None:
            self.history, self.order, self.seen = [], Counter(), {"number": 0}
            self.own = torch.Generator().manual_seed(3)
            self.dice = random.Random(4)

        def fit_batch(self, batch: Any) -> Any:
            self.seen["number"] += 1
            self.order[batch["id"][0]] += 1
            self.history.append([batch["id"][1], self.dice.random()])
            self.log("seen", self.seen["number"])
            self.latest = SimpleNamespace(number=self.seen["number"])  # No checkpoint holds it.
            self.batches.append(self.latest)
            self.pairs.append((torch.ones(2), self.latest))
            batch["x"] += torch.rand((), generator=self.own)
            self.modules.train()
            return super().fit_batch(batch)

    return Busy


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("how", "factor", "precision"), [
    ("input", 1, "fp32"), ("gradient", 1, "fp32"), ("nan", 3, "fp32"), ("inf", 1, "fp16"),
])  # fmt: skip
def test_a_report_changes_nothing(
    kind: type[Brain], how: str, factor: int, precision: str, tmp_path: Path
) -> None:
    """Weights, optimizers, clippers, generators, batches, attributes: the same to the bit."""
    ends = []
    for reports in (5, 0):
        data = batches(12)
        data[4], data[7] = spoilt(data[4], how), spoilt(data[7], how)
        clippers = {name: History() for name in ("main", "discriminator", "generator")}
        names = ["main"] if kind is Regressor else ["discriminator", "generator"]
        random.seed(1)
        np.random.seed(1)
        torch.manual_seed(1)
        brain = make(
            busy(kind), norm=True, precision=precision, grad_accumulation_factor=factor,
            nonfinite_reports=reports, ema_decay=0.9, output_folder=str(tmp_path / str(reports)),
            hparams={"clip": {name: clippers[name] for name in names}},
        )  # fmt: skip
        brain.fit([1], data)
        kept = [brain.history, brain.order, brain.seen, brain.dice.random(), brain.own.get_state()]
        kept += [[each.number for each in brain.batches], brain.latest is brain.batches[-1]]
        kept += [[pair[1].number for pair in brain.pairs]]
        kept += [[batch["x"].nan_to_num(99.0) for batch in data]]
        kept += [[p.grad is None for p in brain.modules.parameters()], brain.optimizer_step]
        kept += [vars(brain.progress) | {"seconds": 0}, lines(tmp_path / str(reports))]
        ends.append([everything(brain), seed.rng_state(), kept])
        folder = tmp_path / str(reports) / "nonfinite"
        assert folder.exists() == bool(reports)
    assert same(ends[0], ends[1])
    found = [json.loads(path.read_text()) for path in tmp_path.glob("5/nonfinite/*/report.json")]
    assert len(found) == 2
    if factor == 1:  # Each rerun saw what the run had seen, apart from the noise.
        assert all(each["replay"]["kind"] for each in found)
    assert not any(each["generators_known"] for each in found)
    hooks = nn.modules.module
    assert not hooks._global_forward_hooks
    assert not hooks._global_forward_pre_hooks
    assert not torch.is_anomaly_enabled()


def test_off_is_no_tracer_and_no_folder(tmp_path: Path) -> None:
    data = [spoilt(batch, "nan") for batch in batches(2)]
    brain = make(nonfinite_reports=0, output_folder=str(tmp_path))
    brain.fit([1], data)
    assert defaults.make_tracer(brain) is None
    assert type(defaults.make_tracer(make())) is NonFiniteTracer
    assert not (tmp_path / "nonfinite").exists()


@pytest.mark.parametrize("source", ["torch", "python", "numpy"])
def test_a_rerun_draws_the_same_numbers_or_says_that_it_cannot(source: str, tmp_path: Path) -> None:
    """Random failures repeat in the rerun; only torch's generators are read at every batch."""

    class Unlucky(Regressor):
        def compute_objectives(self, predictions: Tensor, batch: Any, stage: Stage) -> Tensor:
            draw = {
                "torch": lambda: float(torch.rand(())),
                "python": random.random,
                "numpy": np.random.rand,
            }[source]()
            self.draws.append(draw)
            loss = super().compute_objectives(predictions, batch, stage)
            return loss * math.nan if draw < 0.04 else loss

    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
    brain = make(Unlucky, output_folder=str(tmp_path), nonfinite_patience=100)
    brain.draws = []
    brain.fit([1], batches(110))
    bad = sum(draw < 0.04 for draw in brain.draws)
    assert len(brain.draws) == 110
    found = [json.loads(path.read_text()) for path in tmp_path.glob("nonfinite/*/report.json")]
    assert len(found) == min(bad, 5) > 1
    assert all(each["generators_known"] == (source == "torch") for each in found)
    assert source != "torch" or all(each["replay"]["kind"] == "loss" for each in found)
    for path in tmp_path.glob("nonfinite/*/report.txt"):
        assert ("a replay may draw other numbers" in path.read_text()) == (source != "torch")


# ------------------------------------------------------------------------------------- what is said


class Recogniser(Brain):
    """A linear layer over frames, and whatever loss a test wants of it."""

    def compute_forward(self, batch: Any, stage: Stage) -> Tensor:
        return self.modules.net(batch.sig.data if hasattr(batch.sig, "data") else batch.sig)

    def compute_objectives(self, predictions: Tensor, batch: Any, stage: Stage) -> Tensor:
        return self.hparams.loss(predictions, batch)


def speech(frames: tuple[int, ...], tokens: tuple[int, ...], bad: float | None = None) -> Batch:
    """Features (B, T, 3) and tokens, with ids and transcripts."""
    torch.manual_seed(0)
    data = torch.randn(len(frames), max(frames), 3)
    for row, length in enumerate(frames):
        data[row, length:] = 0
    if bad is not None:
        data[1, 0, 0] = bad
    targets = torch.ones(len(tokens), max(max(tokens), 1), dtype=torch.long)
    fields = {
        "id": [f"utt{number}" for number in range(len(frames))],
        "text": ["a " * length for length in tokens],
        "sig": Padded(data, torch.tensor(frames)),
        "tokens": Padded(targets, torch.tensor(tokens)),
    }
    return Batch(fields, len(frames))


def by_ctc(predictions: Tensor, batch: Any) -> Tensor:
    tokens, lengths = batch.tokens
    log_probs = predictions.log_softmax(-1).transpose(0, 1)
    return ctc_loss(log_probs, tokens, batch.sig.lengths, lengths)


def by_length(predictions: Tensor, batch: Any) -> Tensor:
    return (predictions.square().sum((1, 2)) / batch.tokens.lengths).mean()


def by_attention(predictions: Tensor, batch: Any) -> Tensor:
    valid = torch.arange(predictions.shape[1]) < batch.sig.lengths[:, None]
    weights = predictions[..., 0].masked_fill(~valid, -math.inf).softmax(1)
    return (weights[..., None] * predictions).sum(1).square().mean()


def squares(predictions: Tensor, batch: Any) -> Tensor:
    return predictions.square().mean()


Loss = Callable[[Tensor, Any], Tensor]
FINE = speech((6, 5), (2, 1))
CAUSES: dict[str, tuple[Loss, Batch, str, str]] = {
    "input": (squares, speech((6, 5), (2, 1), math.nan), "the batch itself is not finite: 1 of 36 "
              "values of 'sig' (utt1)", "loss"),
    "ctc": (by_ctc, speech((6, 5), (4, 1)), "a CTC target is longer than its input: utt0 (the "
            "first has 4 tokens and 3 repeats in 6 frames", "loss"),
    "empty target": (by_length, speech((6, 5), (2, 0)), "'tokens' is empty in utt1", "loss"),
    "no text": (by_length, speech((6, 5), (2, 0)), "an empty target: 'text' of utt1 has no text",
                "loss"),
    "padding": (by_attention, speech((6, 0), (2, 1)), "an all-padding row: every position that a "
                "softmax looks at is masked (utt1 has length 0)", "loss"),
    "log": (lambda y, _: -y.relu().log().mean(), FINE, "the log of zero: ", "loss"),
    "negative log": (lambda y, _: y.log().mean(), FINE, "the logarithm of a negative", "loss"),
    "division": (lambda y, _: (y / (y - y)).mean(), FINE, "a division by zero (48 of", "loss"),
    "exp": (lambda y, _: (y * 1e4).exp().mean(), FINE, "overflows: bound its argument", "loss"),
    "square": (lambda y, _: -(y * 1e30).square().mean(), FINE, " overflows: bound", "loss"),
    "mean": (lambda y, _: y[:0].mean(), FINE, "the mean of an empty tensor", "loss"),
    "sqrt": (lambda y, _: (y.sum() * 0).sqrt() + y.mean(), FINE, "the derivative of a square root",
             "gradient"),
    "norm of 0": (lambda y, _: (y * 0).norm().square().sqrt(), FINE, "derivative of a square root",
                  "gradient"),
    "garbage beside": (lambda y, _: torch.where(y > 99, (y - y).reciprocal(), y).mean()
                       + (y.sum() - y.sum()).log(), FINE, "the log of zero: 1 of 1", "loss"),
    "masked log": (lambda y, _: torch.where(y > 99, (y * 0).log(), y).mean(), FINE,
                   "the derivative of a logarithm at 0 is infinite", "gradient"),
}  # fmt: skip


@pytest.mark.parametrize("cause", CAUSES)
def test_known_causes_are_said_in_words(
    cause: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    loss, batch, words, kind = CAUSES[cause]
    options = {"device": "cpu", "progressbar": False, "output_folder": str(tmp_path)}
    torch.manual_seed(1)
    brain = Recogniser(
        {"net": nn.Linear(3, 4)}, partial(torch.optim.SGD, lr=0.0),
        {"loss": lambda y, b: loss(y, b) if b is batch or b.id[0] == "utt0" else squares(y, b)},
        options,
    )  # fmt: skip
    with caplog.at_level(logging.WARNING, "trainer"):
        brain.fit([1], [batch])
    found = report(tmp_path, "1")
    assert found["replay"]["kind"] == kind
    assert any(words in each for each in found["causes"]), (found["causes"], found["first"])
    if cause not in ("no text", "empty target"):
        assert words in found["causes"][0]
    said = [record.getMessage() for record in caplog.records]
    assert len(said) == 3  # What happened, what made it so, and where it is kept.
    assert said[1].startswith(f"first not finite: the {kind}")
    assert "test_nonfinite_reports.py" in said[1]
    text = (tmp_path / "nonfinite" / "1" / "report.txt").read_text()
    assert found["causes"][0] in text
    assert found["ids"] == ["utt0", "utt1"]
    assert found["batch_fields"]["sig"]["lengths"] == batch.sig.lengths.tolist()
    assert found["batch_fields"]["text"] == {"texts": batch.text}


@dataclass
class Recording:
    signal: Any


NAN = math.nan
NESTED: dict[str, tuple[Any, str]] = {
    "dataclass": (Recording(torch.tensor([[1.0], [NAN]])), "1 of 2 values of 'x' (b)"),
    "array": ({"deep": np.array([[NAN, NAN], [1.0, 2.0]])}, "2 of 4 values of 'x' (a)"),
    "ragged": ([torch.zeros(3), torch.tensor([1, 2, 3, NAN])], "1 of 4 values of 'x' (b)"),
    "numbers": ([NAN, math.inf], "2 of 2 values of 'x' (a, b)"),
    "complex": (torch.tensor([1j, complex(0, NAN)]), "1 of 2 values of 'x' (b)"),
    "of no example": (torch.tensor(NAN), "1 of 1 values of 'x'. Look"),
}


@pytest.mark.parametrize("name", NESTED)
def test_bad_values_are_found_in_fields_of_any_kind_and_of_the_right_example(
    name: str, tmp_path: Path
) -> None:
    value, words = NESTED[name]
    options = {"device": "cpu", "progressbar": False, "output_folder": str(tmp_path)}
    hparams = {"loss": lambda y, _: y.mean() * math.nan}
    brain = Recogniser({"net": nn.Linear(3, 4)}, torch.optim.SGD, hparams, options)
    sparse = torch.eye(2).to_sparse()
    brain.fit([1], [Batch({"id": ["a", "b"], "sig": torch.ones(2, 3), "x": value, "s": sparse}, 2)])
    (cause,) = report(tmp_path, "1")["causes"]
    assert words in cause


def test_an_overflow_of_half_precision_is_told_from_what_fails_in_any(tmp_path: Path) -> None:
    def run(name: str, loss: Loss) -> dict[str, Any]:
        options = {"device": "cpu", "progressbar": False, "precision": "fp16"}
        brain = Recogniser(
            {"net": nn.Linear(3, 4)}, partial(torch.optim.SGD, lr=0.0), {"loss": loss},
            {**options, "output_folder": str(tmp_path / name)},
        )  # fmt: skip
        brain.fit([1], [FINE])
        return report(tmp_path / name, "1")

    overflow = run("a", lambda y, _: (y.abs() + 1).mul(300).square().mean().float())
    assert overflow["causes"][0].startswith("fp16 overflow: the result of pow is above 65504")
    assert overflow["precision"] == "fp16"
    assert overflow["scale"] > 1
    real = run("b", lambda y, _: (y - y).float().log().mean())
    assert "fp16" not in " ".join(real["causes"])
    assert "the log of zero" in real["causes"][0]


@pytest.mark.parametrize("kind", KINDS)
def test_an_overflow_while_the_scale_adapts_is_no_case(kind: type[Brain], tmp_path: Path) -> None:
    class Large(kind):  # type: ignore[misc, valid-type]
        def optimize(self, loss: Any, *names: Any, **options: Any) -> Any:
            return super().optimize(loss * 1e36, *names, **options)

    brain = make(Large, precision="fp16", output_folder=str(tmp_path))
    brain.fit([1], batches(8))
    assert brain.stateful()["metrics"].part.counts["overflowed"] > 0
    assert not (tmp_path / "nonfinite").exists()


@pytest.mark.parametrize("kind", KINDS)
def test_a_case_has_its_facts(kind: type[Brain], tmp_path: Path) -> None:
    data = batches(6)
    data[2], data[4] = spoilt(data[2], "gradient"), spoilt(data[4], "input")
    brain = make(kind, output_folder=str(tmp_path), max_grad_norm=1.0)
    brain.fit([7], data)
    name, network = ("main", "net") if kind is Regressor else ("generator", "generator")
    first = report(tmp_path)
    assert (first["step"], first["epoch"], first["batch"]) == (3, 7, 3)
    assert (first["optimizer"], first["not_finite"]) == (name, "gradients")
    assert (first["precision"], first["lr"], first["limit"]) == ("fp32", 0.01, 1.0)
    assert first["replay"]["parameters"] == [f"{network}.0.bias"]
    assert {n for n, norm in first["gradient_norms"].items() if norm == "nan"} == {
        f"{network}.0.bias"
    }
    assert first["ids"] == [f"utt2-{item}" for item in range(3)]
    assert len(first["recent_norms"]) == 2
    assert first["last_norm"] == first["recent_norms"][-1] > 0
    assert first["stepped_in_the_same_batch"] == ([] if kind is Regressor else ["discriminator"])
    second = report(tmp_path, "4" if kind is Regressor else "5")
    assert second["not_finite"] == "loss"
    assert second["replay"]["module"].startswith(f"{network}.0 (Linear)")
    assert second["replay"]["first"]["module"] == f"{network}.0 (Linear)"


def test_the_batch_of_a_window_that_was_bad_is_the_one_kept(tmp_path: Path) -> None:
    data = batches(8)
    data[1], data[6] = spoilt(data[1], "input"), spoilt(data[6], "gradient")
    make(grad_accumulation_factor=4, output_folder=str(tmp_path)).fit([1], data)
    assert [report(tmp_path, name)["ids"][0] for name in ("1", "1-2")] == ["utt1-0", "utt6-0"]
    kept = deserialize_batch(load(tmp_path / "nonfinite" / "1-2")["batch"])
    assert same(kept, data[6])


def test_only_the_first_few_of_a_run_are_kept(tmp_path: Path) -> None:
    data = [spoilt(batch, "nan") for batch in batches(6)]
    options = {"nonfinite_reports": 3, "nonfinite_patience": 20, "output_folder": str(tmp_path)}
    for _ in range(2):  # The second is the same run, started again.
        make(**options).fit([1], data)
        names = sorted(each.name for each in (tmp_path / "nonfinite").iterdir())
        assert names == ["1", "1-2", "1-3"]


def test_the_page_lists_what_was_found(tmp_path: Path) -> None:
    data = batches(3)
    data[1] = {**spoilt(data[1], "input"), "id": ["<b>", "b", "c"]}
    make(output_folder=str(tmp_path)).fit([1], data)
    for odd in ("[]", '{"step": "x"}', "{", '{"step": 4, "causes": 3}'):
        case = tmp_path / "nonfinite" / f"odd{len(odd)}"
        case.mkdir()
        (case / "report.json").write_text(odd)
    page = read(render(tmp_path))
    text = "".join(page.words)
    assert "Not finite" in page.headings
    assert "by addmm in net.0 (Linear) at " in text
    assert "1 of 12 values of 'x' (<b>)" in text
    assert "Step 4" in text


def test_patience_says_where_to_look_and_the_case_is_there(tmp_path: Path) -> None:
    data = [spoilt(batch, "input") for batch in batches(2)]
    brain = make(nonfinite_patience=1, output_folder=str(tmp_path))
    with pytest.raises(NonFiniteError) as error:
        brain.fit([1], data)
    folder = tmp_path / "nonfinite" / "1-2"
    assert f"The report is in {folder}; to replay the batch: " in str(error.value)
    assert f"cortex replay {tmp_path} 1-2. Where no cause" in str(error.value)
    assert (folder / "report.txt").exists()
    assert (folder / "batch.pt").exists()


@pytest.mark.parametrize(
    ("yaml", "program", "again"),
    [
        ("a: 1", "my/train.py", "cortex replay {} 1 --script my/train.py"),
        ("a: 1", "recipes/asr/train.py", "cortex replay {} 1"),
        ("a: 1", "cortex", "cortex replay {} 1"),
        (LAUNCH_HEADER, "a.py", "trainer.launch with the hyperparameter replay='{}/nonfinite/1'"),
    ],
)
def test_the_command_that_is_named_is_that_of_the_program(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, yaml: str, program: str, again: str
) -> None:
    monkeypatch.setattr(sys, "argv", [program])
    (tmp_path / "hyperparams.yaml").write_text(f"{yaml}\n")
    make(output_folder=str(tmp_path)).fit([1], [spoilt(batches(1)[0], "input")])
    text = (tmp_path / "nonfinite" / "1" / "report.txt").read_text()
    assert text.endswith(f"To replay it: {again.format(tmp_path)}\n")


# ---------------------------------------------------------------------------------- what may happen


def test_a_full_disk_and_a_hostile_batch_are_one_warning_and_no_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(NonFiniteReport, "write", full)
    data = batches(6)
    data[1], data[3] = spoilt(data[1], "nan"), spoilt(data[3], "nan")
    brain = make(output_folder=str(tmp_path))
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        brain.fit([1], data)
    (only,) = [each for each in told if "could not be made" in str(each.message)]
    assert "No space left on device" in str(only.message)
    assert brain.optimizer_step == 4


def test_a_fit_batch_that_fails_the_second_time_is_told(tmp_path: Path) -> None:
    class Once(Regressor):
        def compute_forward(self, batch: Any, stage: Stage) -> Tensor:
            if outside.append(1) or len(outside) > 1:
                raise RuntimeError("only once")
            return super().compute_forward(batch, stage)

    outside: list[int] = []
    make(Once, output_folder=str(tmp_path)).fit([1], [spoilt(batches(1)[0], "nan")])
    assert report(tmp_path, "1")["replay_problem"] == "RuntimeError: only once"


def test_without_a_folder_the_log_says_what_was_found(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "trainer"):
        make().fit([1], [spoilt(batches(1)[0], "input")])
    assert len(caplog.records) == 2
    assert "the batch itself is not finite" in caplog.records[1].getMessage()


def test_a_forward_pass_that_needs_other_processes_is_left_alone(tmp_path: Path) -> None:
    """A collective of one process would wait for the others for ever."""

    class Together(Regressor):
        def compute_forward(self, batch: Any, stage: Stage) -> Tensor:
            torch.distributed.all_reduce(torch.ones(1))
            return super().compute_forward(batch, stage)

    store = torch.distributed.FileStore(str(tmp_path / "store"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    make(Together, output_folder=str(tmp_path)).fit([1], [spoilt(batches(1)[0], "nan")])
    torch.distributed.destroy_process_group()
    problem = "its forward pass communicates between processes"
    assert report(tmp_path, "1")["replay_problem"] == problem


Pair = namedtuple("Pair", "x y")


@dataclass
class Record:
    x: Tensor
    names: list[str]


class Plain:
    """No dataclass: its methods may do anything with attributes that come from a file."""


class OwnBrain(Regressor):
    pass


@dataclass
class Bomb:
    def __del__(self) -> None:
        raise AssertionError("made from a file")


def test_batches_of_any_kind_are_kept_safely_and_come_back(tmp_path: Path) -> None:
    array = np.arange(3, dtype=np.float32)
    many: list[Any] = [
        torch.randn(2, 3), [torch.ones(2), "text", 3.5, None, True], (torch.zeros(1), {"a": [1]}),
        {"x": torch.randn(2).half(), 7: array}, Pair(torch.ones(1), [2]), speech((3, 2), (1, 1)),
        Record(torch.ones(2), ["a"]),
    ]  # fmt: skip
    for value in many:
        torch.save(serialize_batch(value), tmp_path / "batch.pt")
        kept = torch.load(tmp_path / "batch.pt", weights_only=True)
        back = deserialize_batch(kept, own_modules(OwnBrain))
        assert type(back) is type(value)
        assert same(serialize_batch(back), serialize_batch(value))
    with pytest.raises(ValueError, match="a part of the batch could not be kept: <_io.TextIO"):
        deserialize_batch(serialize_batch({"file": sys.__stdout__}))
    with pytest.raises(ValueError, match="nowhere:Thing, which this recipe does not know"):
        deserialize_batch({"kind": "object", "class": "nowhere:Thing", "parts": {}})
    with pytest.raises(ValueError, match="could not be kept: <.*Plain .*; kept are tensors, arr"):
        deserialize_batch(serialize_batch([Plain()]), own_modules(OwnBrain))
    for name in ("Bomb", "Plain"):  # The one has a finaliser.
        made = {"kind": "object", "class": f"{__name__}:{name}", "parts": {}}
        with pytest.raises(ValueError, match="which this recipe does not know"):
            deserialize_batch(made, own_modules(OwnBrain))


# --------------------------------------------------------------------------------- the same again


def test_the_nearest_checkpoint_is_the_last_one_before_the_step() -> None:
    found = [SimpleNamespace(step=step, number=n) for n, step in enumerate((2, 9, 5, 5, None))]
    assert nearest(found, 6).number == 3
    assert nearest(found, 9).step == 9
    assert nearest(found, 1).step == 2  # None is before it: the first one after.
    assert nearest([], 1) is None


@pytest.mark.parametrize("kept_checkpoint", [True, False])
def test_a_batch_of_the_second_fit_is_replayed_when_its_turn_comes(
    kept_checkpoint: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    data = batches(6)
    bad = [*data[:2], spoilt(data[2], "input"), *data[3:]]

    def fits(brain: Any) -> None:
        brain.fit([1], data)
        brain.fit([1, 2], bad)

    def saver() -> Checkpointer | None:
        return Checkpointer(tmp_path / "checkpoints") if kept_checkpoint else None

    run = make(output_folder=str(tmp_path), checkpointer=saver())
    fits(run)
    assert sorted(each.name for each in (tmp_path / "nonfinite").iterdir()) == ["14", "9"]
    files = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    replaying = make(
        output_folder=str(tmp_path), checkpointer=saver(),
        replay=str(tmp_path / "nonfinite" / "14"),
    )  # fmt: skip
    start = everything(replaying)
    with caplog.at_level(logging.INFO, "trainer"), pytest.raises(Replayed) as ended:
        fits(replaying)
    assert ended.value.code == 0
    said = [record.getMessage() for record in caplog.records]
    of = "those of step 16 (no checkpoint from before it is left)" if kept_checkpoint else "untrain"
    assert any(f"replaying step 14, epoch 2; the weights are {of}" in text for text in said)
    assert any("the batch itself is not finite: 1 of 12 values of 'x'" in text for text in said)
    assert same(everything(replaying)[:1], start[:1])
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == files


TRAIN = """
    import torch, trainer
    from trainer import Brain, Stage

    class Toy(Brain):
        def compute_forward(self, batch, stage):
            return self.modules.net(torch.nn.functional.dropout(batch["x"], 0.5))

        def compute_objectives(self, predictions, batch, stage):
            return (predictions.sum() * batch["one"]).log() + predictions.square().mean()

        def on_stage_start(self, stage, epoch=None):
            self.seen = 0

    def train(run):
        h = run.hparams
        torch.manual_seed(0)
        net = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Softmax(1))
        brain = Toy({"net": net}, torch.optim.SGD, h, run.options, h["checkpointer"])
        data = [{"id": [str(n)], "x": torch.randn(2, 4), "one": n != 6} for n in range(8)]
        brain.fit(range(1, 4), data)
        return {"loss": 1.0}

    if __name__ == "__main__":
        trainer.main(train)
"""
YAML = """
    seed: 5
    lr: 0.1
    checkpointer: !new:trainer.checkpoint.checkpointer.Checkpointer
      folder: !ref <output_folder>/checkpoints
    nonfinite_patience: 9
    progressbar: false
"""


def test_a_kept_batch_is_run_again_by_one_command_that_changes_nothing(
    tmp_path: Path, forks: Forks
) -> None:
    environment = {"PYTHONPATH": str(ROOT), "PATH": "", "OMP_NUM_THREADS": "1"}

    def shell(*words: str) -> subprocess.CompletedProcess[str]:
        return forks.program(words, tmp_path, environment)

    (tmp_path / "train.py").write_text(textwrap.dedent(TRAIN))
    (tmp_path / "toy.yaml").write_text(textwrap.dedent(YAML))
    done = shell("train.py", "toy.yaml", "--output_folder", "run")
    assert done.returncode == 0, done.stderr
    run = tmp_path / "run"
    assert sorted(each.name for each in (run / "nonfinite").iterdir()) == ["14", "21", "7"]
    files = [path for path in run.rglob("*") if path.is_file() and path.name != ".lock"]
    before = {path: path.read_bytes() for path in files}
    done = shell("-m", "trainer", "replay", "run", "21")
    assert done.returncode == 2
    assert done.stderr == (
        "error: the run was not started by an installed recipe, but by "
        f"{sys.executable} train.py toy.yaml --output_folder run: name the script with --script if "
        "you trust it and the run folder\n"
    )
    done = shell("-m", "trainer", "replay", "run", "21", "--script", "train.py")
    assert done.returncode == 0, done.stderr
    assert (
        "replaying step 21, epoch 3; the weights are those of step 21 (no checkpoint" in done.stderr
    )
    assert "first not finite: the loss of 'main', by log at train.py:" in done.stderr
    assert "the log of zero" in done.stderr
    assert {path: path.read_bytes() for path in before} == before
    with pytest.raises(ValueError, match=r"run has no skipped step 9: there are 14, 21, 7$"):
        replay([str(run), "9"])


def test_a_folder_from_elsewhere_cannot_choose_what_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    case = tmp_path / "run" / "nonfinite" / "7"
    case.mkdir(parents=True)
    (case / "batch.pt").write_bytes(b"no zip")
    (tmp_path / "run" / "hyperparams.yaml").write_text("seed: 1\n")
    recorded = tmp_path / "run" / "command.txt"
    elsewhere = tmp_path.parent / "train.py"
    in_the_way = tmp_path / "recipes" / "asr" / "train.sh"
    in_the_way.parent.mkdir(parents=True)
    beside = tmp_path / "train.py"
    for script in (elsewhere, beside, tmp_path / "run" / "train.py", in_the_way):
        script.write_text("open('ran', 'w')")
        recorded.write_text(f"2026-01-01 10:00:00 python {script} toy.yaml\n")
        with pytest.raises(ValueError, match="not started by an installed recipe, but by .*--scri"):
            replay(["run", "7"])
    assert not (tmp_path / "ran").exists()
    # Changes of hyperparameters stand behind the command that made them.
    with recorded.open("a") as file:
        file.write("# from optimizer step 5 on: lr: 0.1 -> 0.2\n\n")
    with pytest.raises(ValueError, match=r"but by python \S+train\.sh toy\.yaml: name the script"):
        replay(["run", "7"])
    elsewhere.unlink()
    named = command(["run", "7", "--script", str(tmp_path / "run" / "train.py"), "--seed", "2"])
    assert named[1:2] == [str(tmp_path / "run" / "train.py")]
    assert named[-4:] == ["--replay", str(Path("run/nonfinite/7")), "--seed", "2"]
    with pytest.raises(ValueError, match="is no kept batch"):
        load(case)
    for argv in ([], ["run"], ["--script"], ["run", "--script", "x"]):
        with pytest.raises(ValueError, match="usage: cortex replay RUN STEP"):
            replay(argv)


@pytest.mark.parametrize("window", [1, 3])
def test_a_report_is_of_the_batch_and_not_of_one_that_a_hook_trained_on(
    window: int, tmp_path: Path
) -> None:
    class Nesting(Regressor):
        def on_fit_batch_start(self, batch: Any, should_step: bool) -> None:
            if self.step == 2 and self.epoch == 1:
                self.fit([9], batches(2, size=4, seed=5))

    data = batches(4)
    data[1] = spoilt(data[1], "nan")
    brain = make(Nesting, grad_accumulation_factor=window, output_folder=str(tmp_path))
    brain.fit([1], data)
    (folder,) = (tmp_path / "nonfinite").iterdir()
    text = (folder / "report.txt").read_text(encoding="utf-8")
    assert "Batch: utt1-0, utt1-1, utt1-2\n" in text
    assert "finite when the batch was replayed" not in text
