"""Properties of every clip kind."""

import io
import math
import re
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.benchmarks.clipping_cost import KINDS as BENCHMARKED
from tests.benchmarks.clipping_cost import Bench
from trainer import clipping
from trainer.clipping import Gradients
from trainer.config.hyperparameters import Configuration, Text
from trainer.optim.step import Update
from trainer.options import RunOptions

from .clipping_kinds import ADAPTIVE, DENSE, KINDS, bind, clipped
from .small import Players, Regressor, batches, make, optimize, poison, same
from .test_syncs import syncs

every_kind = pytest.mark.parametrize("kind", KINDS)


def test_every_kind_is_in_the_list() -> None:
    kinds = {name for name, each in vars(clipping).items() if isinstance(each, type)}
    kinds -= {"Clip", "Clipper", "Gradients"}
    assert {type(make_one()).__name__ for make_one in KINDS.values()} == kinds
    assert (len(kinds), len(KINDS)) == (12, 18)


@pytest.mark.parametrize("kind", BENCHMARKED)
def test_the_benchmark_clips_with_its_tight_limits_alone(kind: str) -> None:
    tight, wide = BENCHMARKED[kind]
    bench = Bench([torch.Size([6, 4]), torch.Size([6])])
    before = [p.grad.clone() for p in bench.params]
    for clip, changes in ((wide(), False), (tight(), True)):
        bench.restore()
        assert bench.ours(clip)() > 0
        after = [p.grad for p in bench.params]
        assert any(not torch.equal(*pair) for pair in zip(before, after, strict=True)) == changes


def network(dtype: torch.dtype = torch.float32) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 2)).to(dtype)


def update(kind: str, net: nn.Module | None = None, **options: Any) -> tuple[Update, nn.Module]:
    """Return an update with this kind of clipping, and its network."""
    net = net or network()
    params = list(net.parameters())
    optimizer = torch.optim.Adam(params, lr=0.01)
    clip = KINDS[kind]()
    bind(clip, params, optimizer)
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    return Update("main", optimizer, scaler, clip, **options), net


def loss_of(net: nn.Module, number: int, examples: int = 8) -> Tensor:
    """Return the loss of batch ``number``; some have much larger gradients than others."""
    generator = torch.Generator().manual_seed(number)
    x, y = torch.randn(examples, 4, generator=generator), torch.randn(2, generator=generator)
    weight = next(net.parameters())
    scale = 10.0 if number % 7 == 3 else 1.0
    return (net(x.to(weight.dtype)).float() - y).square().mean() * scale


def train(updates: Update, net: nn.Module, numbers: Any) -> list[Any]:
    return [optimize([updates], loss_of(net, number))[0] for number in numbers]


@every_kind
def test_one_nan_and_fifty_clean_steps_are_fifty_clean_steps(kind: str) -> None:
    beside, without = update(kind), update(kind)
    train(*beside, range(6))
    for value in (math.nan, math.inf):
        (report,) = optimize([beside[0]], loss_of(beside[1], 0) * value)
        assert report.outcome == "skipped"
        bad = loss_of(beside[1], 0) + poison(next(beside[1].parameters()), value)
        assert optimize([beside[0]], bad)[0].outcome == "skipped"
    train(*beside, range(6, 56))
    reports = train(*without, range(56))
    assert sum(report.clipped for report in reports) > 5
    assert same(beside[0].state_dict(), without[0].state_dict())
    assert same(beside[1].state_dict(), without[1].state_dict())


@every_kind
def test_a_norm_that_is_not_finite_is_not_learnt_from(kind: str) -> None:
    params = [nn.Parameter(torch.ones(3, 2)), nn.Parameter(torch.ones(3))]
    optimizer = torch.optim.Adam(params)
    clip = KINDS[kind]()
    bind(clip, params, optimizer)
    if kind not in ADAPTIVE or kind == "value-auto":
        return
    for grads in (
        [torch.full((3, 2), math.nan), torch.ones(3)],
        [torch.zeros(3, 2), torch.zeros(3)],
    ):
        before = repr({**clip.state_dict(), "steps": 0})
        gradients, did = clipped(clip, optimizer, grads)
        assert not did
        assert repr({**clip.state_dict(), "steps": 0}) == before


@every_kind
def test_a_state_goes_on_bit_for_bit_from_every_step(kind: str) -> None:
    whole, net = update(kind)
    for number in range(12):
        saved = io.BytesIO()
        torch.save([whole.state_dict(), net.state_dict()], saved)
        saved.seek(0)
        states = torch.load(saved, weights_only=True)
        resumed, copy = update(kind)
        resumed.check_state_dict(states[0])
        resumed.load_state_dict(states[0])
        copy.load_state_dict(states[1])
        mine, theirs = train(resumed, copy, [number]), train(whole, net, [number])
        assert mine == theirs
        assert same(resumed.state_dict(), whole.state_dict())
        assert same(copy.state_dict(), net.state_dict())


@pytest.mark.parametrize("steps", [1, 15, 24, 25, 40])
@pytest.mark.parametrize("now", [1, 10, 25, 100])
def test_zclip_clips_spikes_in_a_run_that_resumes_with_another_warm_up(
    steps: int, now: int
) -> None:
    params = [nn.Parameter(torch.zeros(1))]
    optimizer = torch.optim.SGD(params, lr=0.1)

    def step(clip: clipping.ZClip, norm: float) -> bool:
        return clipped(clip, optimizer, [torch.tensor([norm])])[1]

    before, after = clipping.ZClip(warmup_steps=25), clipping.ZClip(warmup_steps=now)
    for number in range(steps):
        step(before, 1.0 + number % 2)
    after.load_state_dict(before.state_dict())
    for number in range(100):
        step(after, 1.0 + number % 2)
    assert step(after, 1000.0)
    assert 1.0 <= after.limit < 10.0


@every_kind
def test_layers_that_begin_at_zero_move(kind: str) -> None:
    zeroed = network()
    for p in zeroed[2].parameters():
        nn.init.zeros_(p)  # No gradient reaches the first layer in the first step.
    one, net = update(kind, zeroed)
    before = [p.detach().clone() for p in net.parameters()]
    reports = train(one, net, range(12))
    assert any(report.clipped for report in reports)
    for p, old in zip(net.parameters(), before, strict=True):
        assert float((p.detach() - old).norm()) > 0.01


class Fake(Gradients):
    """Gradients with given norms, which scaling leaves unchanged."""

    def scale_each(self, coefficients: Any) -> bool:
        self.factors = list(coefficients)
        return True


@pytest.mark.parametrize("kind", [*ADAPTIVE[1:], "gradual-linear"])
def test_the_memory_of_a_hundred_thousand_steps_is_bounded(kind: str) -> None:
    params = [nn.Parameter(torch.zeros(1)) for _ in range(3)]
    optimizer = torch.optim.Adam(params)
    clip = clipping.AutoClip() if kind == "auto" else KINDS[kind]()
    bind(clip, params, optimizer)
    for p in params:
        p.grad = torch.zeros(1)
    fake = Fake(optimizer.param_groups)
    sizes = []
    for number in range(100_000):
        norm = 1.0 + (number * 7919 % 1000) / 1000
        fake.norms, fake.norm, fake.factors = [norm, 1.0, 2.0], math.hypot(norm, 1.0, 2.0), None
        clip(fake)
        if number + 1 in (25_000, 100_000):
            sizes.append(len(repr(clip.state_dict())))
    assert sizes[1] <= 1.1 * sizes[0]
    assert sizes[1] < 250_000


@every_kind
def test_a_step_waits_for_the_device_once(kind: str) -> None:
    optimizer = partial(torch.optim.RMSprop, lr=1e-3)  # torch's Adam reads its steps on a CPU.
    found, taken = syncs(Regressor, 12, clip=KINDS[kind](), log_interval=1000, optimizer=optimizer)
    assert taken == 12
    # All gradients are finite and near 1. A value clip before another kind waits again.
    assert found == 12 if kind != "value-auto" else 12 < found <= 24


@every_kind
@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_each_of_two_players_has_its_own(kind: str, precision: str) -> None:
    """Use half precision, accumulation, and one clipper object for both."""
    clip = KINDS[kind]()
    brain = make(Players, clip=clip, precision=precision, grad_accumulation_factor=2)
    brain.fit([1], batches(40, seed=3))
    first, second = (each.clip for each in brain.updates.values())
    assert first is clip
    assert second is not clip
    if kind in ADAPTIVE:
        assert not same(first.state_dict(), second.state_dict())
    if hasattr(clip, "state_dict"):
        assert first.state_dict().keys() == second.state_dict().keys()
    assert all(bool(p.isfinite().all()) for p in brain.modules.parameters())


@every_kind
def test_a_window_is_clipped_as_one_big_batch(kind: str) -> None:
    whole, parts = update(kind), update(kind, window=4)
    for number in range(8):
        optimize([whole[0]], loss_of(whole[1], number), weight=8)
        generator = torch.Generator().manual_seed(number)
        x, y = torch.randn(8, 4, generator=generator), torch.randn(2, generator=generator)
        scale = 10.0 if number % 7 == 3 else 1.0
        for start in range(0, 8, 2):
            loss = (parts[1](x[start : start + 2]) - y).square().mean() * scale
            optimize([parts[0]], loss, weight=2)
    for one, other in zip(whole[1].parameters(), parts[1].parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


@every_kind
def test_parameters_that_are_left_out_do_not_disturb_the_others(kind: str) -> None:
    """With skip_nonfinite_grads, the step is that of a network in which they are frozen."""
    skipping, net = update(kind, skip_nonfinite_grads=True)
    frozen, other = update(kind)
    for number in range(12):
        bad = number % 3 == 2
        loss = loss_of(net, number)
        optimize([skipping], loss + poison(net[0].weight) if bad else loss)
        other[0].weight.requires_grad_(not bad)
        optimize([frozen], loss_of(other, number))
    for one, two in zip(net.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-5)


@every_kind
def test_an_optimizer_without_gradients_steps_with_others_and_learns_nothing(kind: str) -> None:
    idle, active = update(kind), update(kind)
    both = [idle[0], active[0]]
    before = repr(idle[0].state_dict())
    for number in range(6):
        reports = optimize(both, loss_of(active[1], number))
        assert [report.outcome for report in reports] == ["stepped", "stepped"]
        assert not reports[0].clipped
    idle[0].last_norm = None
    assert repr(idle[0].state_dict()) == before


def embeddings(sparse: bool) -> tuple[nn.ModuleList, torch.optim.Optimizer]:
    torch.manual_seed(0)
    tables = nn.ModuleList(nn.Embedding(7, 3, sparse=sparse) for _ in range(2))
    return tables, torch.optim.SGD(tables.parameters(), lr=0.1)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind not in DENSE])
def test_sparse_gradients_stay_sparse_and_are_clipped_as_dense_ones(kind: str) -> None:
    ends = []
    for sparse in (True, False):
        tables, optimizer = embeddings(sparse)
        clip = KINDS[kind]()
        bind(clip, list(tables.parameters()), optimizer)
        one = Update("main", optimizer, torch.amp.GradScaler("cpu", enabled=False), clip)
        seen: set[torch.layout] = set()
        optimizer.register_step_pre_hook(
            lambda o, *_, seen=seen: seen.update(p.grad.layout for p in o.param_groups[0]["params"])
        )
        for number in range(10):
            rows = torch.tensor([number % 7, 3, 3])  # One row twice.
            loss = torch.stack([(t(rows) - number).square().mean() for t in tables]).sum()
            assert optimize([one], loss * (1 + number % 3))[0].outcome == "stepped"
        assert seen == {torch.sparse_coo if sparse else torch.strided}
        ends.append([p.detach() for p in tables.parameters()])
    torch.testing.assert_close(ends[0], ends[1], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", DENSE)
def test_a_kind_that_needs_the_shape_refuses_sparse_gradients_before_anything_moves(
    kind: str,
) -> None:
    table = nn.Embedding(7, 3, sparse=True)
    optimizer = torch.optim.RMSprop(table.parameters())
    clip = KINDS[kind]()
    clip.bind("main", {table.weight: "table.weight"}, optimizer)
    one = Update("main", optimizer, torch.amp.GradScaler("cpu", enabled=False), clip)
    before = table.weight.detach().clone()
    sentence = rf"{kind.upper()} cannot take the sparse gradient of table.weight: it looks at whole"
    with pytest.raises(ValueError, match=sentence):
        optimize([one], table(torch.tensor([1, 2])).sum())
    assert torch.equal(table.weight, before)


@every_kind
@pytest.mark.parametrize("scale", [1e-30, 1e-20, 1e20, 1e30])
def test_gradients_of_any_scale_are_neither_lost_nor_turned(kind: str, scale: float) -> None:
    net = network()
    params = list(net.parameters())
    for p in params:
        p.data = p.data.abs() + 0.1
    optimizer = torch.optim.Adam(params, lr=0.0)
    clip = KINDS[kind]()
    bind(clip, params, optimizer)
    torch.manual_seed(1)
    for number in range(6):
        grads = [(1 + torch.rand_like(p)) * scale * (1 + number) for p in params]
        gradients, _ = clipped(clip, optimizer, grads)
        assert gradients.finite
        for tensor, grad in zip(gradients.tensors, grads, strict=True):
            assert bool(tensor.isfinite().all())
            assert bool((tensor > 0).all())
            assert bool((tensor <= grad).all())
        optimizer.step()


@every_kind
def test_a_report_tells_threshold_and_norms(kind: str) -> None:
    one, net = update(kind)
    reports = train(one, net, range(20))
    assert sum(report.clipped for report in reports) > 1
    for report in reports:
        assert report.limit > 0
        if not report.clipped:
            assert report.norm_after == report.norm
        elif kind not in ("value", "layer-value"):
            assert report.norm_after is not None
            assert report.norm_after < report.norm
        if report.clipped and kind in ("norm", "auto", "median", "z"):
            assert report.norm_after == pytest.approx(report.limit, rel=1e-4)
        if kind in ("pattern", "adagc", "agc", "spam"):
            assert report.norm_after is not None
            assert report.norm_after <= report.limit * (1 + 1e-6)
    if kind in (*ADAPTIVE, "gradual-linear", "agc", "spam"):
        assert len({report.limit for report in reports}) > 4


TABLE = Path(__file__).parents[2] / "docs" / "clipping.md"


def test_each_line_of_the_table_is_a_kind_from_a_yaml(tmp_path: Path) -> None:
    lines = re.findall(r"^\|[^|]*\| `(!new:trainer\.clipping\.[^`]*)` \|", TABLE.read_text(), re.M)
    kinds = set()
    for line in lines:
        file = tmp_path / "clip.yaml"
        line = line.replace("encoder.*", "net.0.*").replace("*.head.*", "net.2.*")
        file.write_text(f"clip: {line}\nmax_grad_norm: 5.0\n")
        configuration = Configuration(file)
        options = RunOptions.build(configuration.options(), {"device": "cpu", "progressbar": False})
        hparams = configuration.build()
        brain = Regressor({"net": network()}, torch.optim.Adam, hparams, options)
        brain.fit([1], batches(3))
        assert brain.updates["main"].clip is hparams["clip"]
        kinds.add(type(hparams["clip"]).__name__)
    assert len(lines) == len(kinds) == 12


def test_the_command_line_has_the_words(tmp_path: Path) -> None:
    file = tmp_path / "clip.yaml"
    file.write_text("clip: !new:trainer.clipping.AutoClip {percentile: 10}\n")
    configuration = Configuration(file)
    configuration.override({"clip": Text("value")})
    assert configuration.options() == configuration.build() == {"clip": "value"}
    with pytest.raises(ValueError, match="clip must be one of norm, value, not 'median'"):
        configuration.override({"clip": Text("median")})
    file.write_text("clip: {main: !new:trainer.clipping.ZClip {}}\n")
    hparams = Configuration(file).build()
    brain = Regressor({"net": network()}, torch.optim.Adam, hparams, {"progressbar": False})
    brain.fit([1], batches(1))
    assert brain.updates["main"].clip is hparams["clip"]["main"]
