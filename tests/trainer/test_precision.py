"""Mixed precision where it belongs, on the CPU too, and compiled modules that train the same."""

import math
import shutil
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.trainer.small import Players, Regressor, batches, everything, make, net, same
from trainer import Brain, Stage
from trainer.optim.guard import NonFiniteGuard
from trainer.optim.precision import DTYPES, Precision
from trainer.progress import Progress

KINDS = [Regressor, Players]


class Typed(Regressor):
    """Keeps the dtype of what its network gives."""

    def compute_forward(self, batch: Any, stage: Stage) -> Tensor:
        outputs = super().compute_forward(batch, stage)
        self.dtypes = {**getattr(self, "dtypes", {}), stage: outputs.dtype}
        return outputs


@pytest.mark.parametrize("precision", list(DTYPES))
@pytest.mark.parametrize("evaluated", [None, *DTYPES])
def test_forward_passes_have_the_precision_of_their_stage(
    precision: str, evaluated: str | None
) -> None:
    brain = make(Typed, precision=precision, eval_precision=evaluated)
    brain.fit([1], batches(1), batches(1))
    brain.evaluate(batches(1))
    other = DTYPES[evaluated or precision]
    assert brain.dtypes == {
        Stage.TRAIN: DTYPES[precision],
        Stage.VALID: other,
        Stage.TEST: other,
    }
    assert all(p.dtype == torch.float32 for p in brain.modules.parameters())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_mixed_precision_learns_what_full_precision_learns(
    kind: type[Brain], precision: str
) -> None:
    gentle = partial(torch.optim.SGD, lr=0.05)
    data = batches(20, size=8)
    full = make(kind, optimizer=gentle)
    mixed = make(kind, optimizer=gentle, precision=precision)
    start = [p.detach().clone() for p in full.modules.parameters()]
    full.fit([1, 2, 3], data)
    mixed.fit([1, 2, 3], data)
    moved = math.hypot(*(float((p - q).norm()) for p, q in pairs(full, start)))
    apart = math.hypot(*(float((p - q).norm()) for p, q in pairs(full, mixed.modules.parameters())))
    assert apart < 0.05 * moved


def pairs(brain: Brain, others: Any) -> Any:
    return zip(
        (p.detach() for p in brain.modules.parameters()), map(Tensor.detach, others), strict=True
    )


def test_full_precision_is_the_one_that_does_nothing() -> None:
    full = Precision("fp32", torch.device("cpu"))
    loss = torch.tensor(3.0, requires_grad=True)
    assert full.scaler().scale(loss) is loss
    assert not full.scaler().is_enabled()
    assert not Precision("bf16", torch.device("cpu")).scaler().is_enabled()
    half = Precision("fp16", torch.device("cpu"))
    assert half.scaler().is_enabled()
    assert half.scaler() is not half.scaler()
    with full.autocast():
        assert not torch.is_autocast_enabled("cpu")
    for _ in range(2):  # The context can be entered again, and inside itself.
        with half.autocast(), half.autocast():
            assert torch.is_autocast_enabled("cpu")


def test_the_scale_of_fp16_falls_with_each_overflow_and_grows_again() -> None:
    class Reporting(Regressor):
        def optimize(self, *args: Any, **kwargs: Any) -> Any:
            reports.append(super().optimize(*args, **kwargs))
            self.updates["main"].scaler.set_growth_interval(3)
            return reports[-1]

    reports: list[Any] = []
    make(Reporting, precision="fp16").fit([1], batches(30))
    good = 0
    for before, after in zip(reports, reports[1:], strict=False):
        if before.outcome == "overflowed":
            good, factor = 0, 0.5
        else:
            good, factor = (good + 1) % 3, 2.0 if good == 2 else 1.0
        assert after.scale == before.scale * factor
    outcomes = [report.outcome for report in reports]
    assert outcomes[-10:].count("stepped") >= 6
    assert "overflowed" in outcomes[1:]


@pytest.mark.parametrize("limit", [None, 0, -1.0, math.inf, 0.05])
@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_the_limit_is_over_all_groups_and_none_of_its_negations_turns_descent_around(
    limit: float | None, decay: float
) -> None:
    def grouped(params: Any) -> torch.optim.Optimizer:
        params = list(params)
        vectors = [p for p in params if p.dim() < 2]
        matrices = [p for p in params if p.dim() >= 2]
        return torch.optim.SGD(
            [{"params": vectors, "weight_decay": 0.0}, {"params": matrices, "weight_decay": decay}],
            lr=0.1,
        )

    brain = make(optimizer=grouped, max_grad_norm=limit)
    hand = net()
    optimizer = grouped(hand.parameters())
    batch = batches(1)[0]
    for _ in range(3):
        optimizer.zero_grad()
        (hand(batch["x"]) - batch["y"]).square().mean().backward()
        if limit == 0.05:
            norm = torch.nn.utils.clip_grad_norm_(hand.parameters(), limit)
            assert norm > limit
        optimizer.step()
    brain.fit(range(3), [batch])
    for mine, theirs in zip(brain.modules.parameters(), hand.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-7)


def test_complex_weights_are_refused_in_fp16_alone() -> None:
    class Waves(Regressor):
        def compute_forward(self, batch: Any, stage: Stage) -> Tensor:
            wave = batch["x"].to(torch.complex64) @ self.modules.net.wave
            return self.modules.net.layer(batch["x"]) + wave.abs()

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 2)
            self.wave = nn.Parameter(torch.ones(4, 2, dtype=torch.complex64))

    def brain(precision: str) -> Brain:
        options = {"device": "cpu", "progressbar": False, "precision": precision}
        return Waves({"net": Net()}, torch.optim.Adam, {}, options)

    for precision in ("fp32", "bf16"):
        waves = brain(precision)
        waves.fit([1], batches(4))
        assert waves.optimizer_step == 4
        assert not torch.equal(waves.modules.net.wave, Net().wave)
    with pytest.raises(ValueError, match="'main' has complex weights; .* fp16 .*use fp32 or bf16"):
        brain("fp16").fit([1], batches(1))


# --- buffers -------------------------------------------------------------------------------------


class Exchanging(nn.Module):
    """Gives its buffers new tensors in each forward pass, one of them longer ones."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(4))
        self.register_buffer("seen", torch.zeros(0))
        self.register_buffer("table", torch.arange(3.0))
        self.register_buffer("nothing", None)

    def forward(self, x: Tensor) -> Tensor:
        self.mean = 0.9 * self.mean + 0.1 * x.detach().mean(0)
        self.seen = torch.cat([self.seen, x.detach()[:, 0]])
        return x


def guard_of(module: nn.Module) -> NonFiniteGuard:
    """A guard whose accumulation window is open."""
    return NonFiniteGuard(module, 3, Progress(), lambda: True)


@pytest.mark.parametrize(
    "module",
    [nn.BatchNorm1d(4), nn.InstanceNorm1d(4, track_running_stats=True), Exchanging()],
)
def test_buffers_return_to_what_was_kept(module: nn.Module) -> None:
    guard = guard_of(module)
    x = torch.randn(5, 4) if not isinstance(module, nn.InstanceNorm1d) else torch.randn(5, 4, 3)
    for _ in range(2):
        module(x)
        guard.begin_window()
        kept = {name: buffer.clone() for name, buffer in module.named_buffers()}
        module(x * math.nan)
        assert not same(dict(module.named_buffers()), kept)
        guard.roll_back()
        assert same(dict(module.named_buffers()), kept)
        module(x * math.nan)
        module(x * math.nan)
        guard.roll_back()
        assert same(dict(module.named_buffers()), kept)


def test_a_buffer_that_comes_and_goes_returns_to_what_it_was() -> None:
    module = nn.Module()
    module.register_buffer("cache", torch.ones(2))
    buffer = module.cache
    guard = guard_of(module)
    module.cache = None
    guard.roll_back()
    assert module.cache is buffer
    module.cache = None
    guard.begin_window()
    assert guard.state_dict()["buffers"] == {}
    module.cache = torch.full((3,), math.nan)
    guard.roll_back()
    assert module.cache is None
    module.cache = torch.zeros(3, dtype=torch.int64)
    guard.begin_window()
    module.cache += 1
    guard.roll_back()
    assert module.cache.tolist() == [0, 0, 0]


def test_what_was_kept_is_saved_in_the_middle_of_a_window() -> None:
    one, two = nn.BatchNorm1d(4), nn.BatchNorm1d(4)
    first = guard_of(one)
    one(torch.randn(5, 4))
    two.load_state_dict(one.state_dict())
    second = guard_of(two)
    second.load_state_dict(first.state_dict())
    for guard, module in ((first, one), (second, two)):
        module(torch.full((5, 4), math.nan))
        guard.roll_back()
    assert same(one.state_dict(), nn.BatchNorm1d(4).state_dict())
    assert same(two.state_dict(), one.state_dict())


# --- compiled modules ----------------------------------------------------------------------------


@pytest.mark.long
@pytest.mark.skipif(shutil.which("c++") is None, reason="torch.compile needs a C++ compiler")
@pytest.mark.filterwarnings("ignore")  # The compiler's own.
@pytest.mark.parametrize("kind", KINDS)
def test_compiled_modules_train_the_same(kind: type[Brain]) -> None:
    descent = partial(torch.optim.SGD, lr=0.05)  # Adam makes much of gradients that should be 0.
    plain = make(kind, norm=True, optimizer=descent)
    compiled = make(kind, norm=True, optimizer=descent, compile=True, ema_decay=0.9)
    for brain in (plain, compiled):
        brain.fit([1], batches(4), batches(1))
        brain.evaluate(batches(1))
    for mine, theirs in zip(compiled.modules.parameters(), plain.modules.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)
    assert list(compiled.modules.state_dict()) == list(plain.modules.state_dict())


def test_only_the_modules_that_are_named_are_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[tuple[int, str | None]] = []
    monkeypatch.setattr(nn.Module, "compile", lambda self, mode=None: told.append((id(self), mode)))
    brain = make(Players, compile=True)
    assert [each for each, _ in told] == [id(module) for module in brain.modules.values()]
    told.clear()
    brain = make(Players, compile_modules=["generator"], compile_mode="max-autotune")
    assert told == [(id(brain.modules["generator"]), "max-autotune")]
    told.clear()
    make(Players)
    assert not told
    assert len(everything(brain)) == 1
