"""Averages weigh examples, take in only what is finite, and return from a state to the bit."""

import json
import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from tests.processes import TwoRanks
from trainer import distributed, metrics
from trainer.metrics import Mean
from trainer.optim.ema import WeightAverage

VALUES = st.floats(-1e6, 1e6) | st.sampled_from([math.nan, math.inf, -math.inf])
WEIGHTS = st.floats(0.0, 1e3)
PAIRS = st.lists(st.tuples(VALUES, WEIGHTS), max_size=25)


def truth(pairs: list[tuple[float, float]]) -> float | None:
    kept = [(v, w) for v, w in pairs if math.isfinite(v) and w > 0]
    total = math.fsum(w for _, w in kept)
    return math.fsum(v * w for v, w in kept) / total if total else None


# --- means ---------------------------------------------------------------------------------------


@given(pairs=PAIRS, as_tensor=st.booleans())
@settings(max_examples=200, deadline=None)
def test_the_mean_is_over_examples_and_takes_in_nothing_that_is_not_finite(
    pairs: list[tuple[float, float]], as_tensor: bool
) -> None:
    mean = Mean()
    for value, weight in pairs:
        mean.update(torch.tensor(value, dtype=torch.float64) if as_tensor else value, weight)
    expected = truth(pairs)
    if expected is None:
        assert mean.value() is None
    else:
        assert mean.value() == pytest.approx(expected, rel=1e-9, abs=1e-6)


@given(pairs=PAIRS, reads=st.sets(st.integers(0, 24)), named=st.booleans())
@settings(max_examples=100, deadline=None)
def test_when_tensors_are_read_changes_no_bit(
    pairs: list[tuple[float, float]], reads: set[int], named: bool
) -> None:
    floats, late, early = Mean(), Mean(), Mean()
    for number, (value, weight) in enumerate(pairs):
        tensor = torch.tensor([value], dtype=torch.float64)
        floats.update({"a": value, "b": 1.0} if named else value, weight)
        late.update({"a": tensor, "b": 1.0} if named else tensor, weight)
        early.update({"a": tensor, "b": 1.0} if named else tensor, weight)
        tensor.fill_(123.0)  # Whoever made the loss goes on computing with it.
        if number in reads:
            early.read()
    assert early.state_dict() == late.state_dict() == floats.state_dict()


def test_tensors_are_fetched_together_and_few_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    tolist = torch.Tensor.tolist
    monkeypatch.setattr(
        torch.Tensor,
        "tolist",
        lambda t: calls.append(t.numel()) or tolist(t),  # type: ignore[func-returns-value]
    )
    monkeypatch.setattr(torch.Tensor, "item", lambda t: pytest.fail("read at once"))
    monkeypatch.setattr(metrics, "MAX_PENDING", 50)
    mean = Mean()
    for number in range(40):
        mean.update({"d": torch.tensor(float(number)), "g": torch.tensor(1, dtype=torch.bfloat16)})
    assert calls == [50]
    assert mean.value() == {"d": 19.5, "g": 1.0}
    assert calls == [50, 30]


def test_named_losses_each_have_their_own_mean() -> None:
    mean = Mean()
    mean.update({"ctc": 2.0, "attention": torch.tensor(1.0)}, 2)
    mean.update({"ctc": math.nan, "attention": 4.0}, 1)
    mean.update({"ctc": 5.0, "late": math.inf}, 1)
    assert mean.value() == {"ctc": 3.0, "attention": 2.0, "late": None}
    assert mean.weight() == 3.0


def test_nothing_is_none_and_not_zero() -> None:
    mean = Mean()
    assert (mean.value(), mean.weight()) == (None, 0.0)
    mean.update(math.nan, 4.0)
    mean.update(7.0, 0.0)
    assert (mean.value(), mean.weight()) == (None, 0.0)


def test_a_loss_with_a_graph_is_only_read() -> None:
    parameter = torch.ones(3, requires_grad=True)
    loss = (parameter * 2).sum()
    mean = Mean()
    mean.update(loss, 3)
    loss.backward()
    assert mean.value() == 6.0
    assert parameter.grad is not None


@given(pairs=PAIRS, stop=st.integers(0, 25), named=st.booleans())
@settings(max_examples=100, deadline=None)
def test_a_mean_goes_on_from_its_saved_state_to_the_bit(
    pairs: list[tuple[float, float]], stop: int, named: bool
) -> None:
    wrap: Callable[[float], float | dict[str, float]] = (lambda v: {"a": v}) if named else float
    whole, first, second = Mean(), Mean(), Mean()
    for value, weight in pairs:
        whole.update(wrap(value), weight)
    for value, weight in pairs[:stop]:
        first.update(wrap(value), weight)
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    for value, weight in pairs[stop:]:
        second.update(wrap(value), weight)
    assert second.state_dict() == whole.state_dict()
    assert second.value() == whole.value()


def test_what_cannot_be_averaged_is_refused_with_a_sentence() -> None:
    mean = Mean()
    with pytest.raises(ValueError, match=r"a tensor of 'ctc' of shape \[2\]"):
        mean.update({"ctc": torch.zeros(2)})
    with pytest.raises(ValueError, match="an average is of numbers; got a str of 'ctc'"):
        mean.update({"ctc": "1.0"})  # type: ignore[dict-item]
    with pytest.raises(ValueError, match="of mappings; got a plain value after the other"):
        mean.update(1.0)
    for weight in (-1.0, math.nan, math.inf):
        with pytest.raises(
            ValueError, match="an average got the weight .*; allowed: a finite number, 0 or"
        ):
            mean.update({"ctc": 1.0}, weight)
    with pytest.raises(ValueError, match=r"does not fit Mean: missing \['named', 'sums'\]"):
        mean.load_state_dict({})


def reduced() -> list[object]:
    rank = distributed.rank()
    plain, named, uneven = Mean(), Mean(), Mean()
    for value in [0.1, 0.7] if rank == 0 else [0.3]:
        plain.update(value, 1 + rank)
    named.update({"both": float(rank), f"only{rank}": 1.0 + rank}, 2)
    if rank == 1:
        uneven.update(5.0, 3)
    before = plain.value()
    means = [mean.reduce() for mean in (plain, named, uneven, Mean())]
    return [before, *(mean.value() for mean in means), means[0].weight()]


def test_over_ranks_every_example_counts_once_and_a_rank_may_have_seen_nothing(
    two_ranks: TwoRanks,
) -> None:
    outputs = two_ranks(reduced)
    assert [output[0] for output in outputs] == pytest.approx([0.4, 0.3])
    assert outputs[0][1:] == outputs[1][1:]
    plain, named, uneven, empty, weight = outputs[0][1:]
    assert plain == pytest.approx((0.1 + 0.7 + 2 * 0.3) / 4)
    assert weight == 4.0
    assert named == {"both": 0.5, "only0": 1.0, "only1": 2.0}
    assert (uneven, empty) == (5.0, None)


def test_alone_reducing_changes_nothing() -> None:
    mean = Mean()
    mean.update(2.0, 3.0)
    assert mean.reduce() is mean
    assert mean.value() == 2.0


# --- averages of weights -------------------------------------------------------------------------


def network(seed: int = 0, dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(seed)
    tied = nn.Linear(3, 3)
    return nn.ModuleDict(
        {"encoder": nn.Sequential(tied, nn.BatchNorm1d(3), tied), "head": nn.Linear(3, 2)}
    ).to(dtype)


def stir(modules: nn.Module, seed: int) -> None:
    """Move every parameter and buffer, as training would."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in modules.parameters():
            parameter.add_(torch.randn_like(parameter))
        for buffer in modules.buffers():
            buffer.add_(1)


def bits(modules: nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in modules.state_dict().items()}


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(one[name], other[name]) for name in one | other)


def test_the_average_follows_its_formula_and_buffers_are_copied() -> None:
    modules = network().double()
    average = WeightAverage(modules, 0.9)
    expected = {name: p.detach().clone() for name, p in modules.named_parameters()}
    for n in range(20):
        stir(modules, n)
        average.update(modules)
        for name, parameter in modules.named_parameters():
            expected[name] = 0.9 * expected[name] + 0.1 * parameter.detach()
    buffers = {name: buffer.clone() for name, buffer in modules.named_buffers()}
    assert len(expected) == 6
    assert len(buffers) == 3
    with average.applied(modules):
        for name, parameter in modules.named_parameters():
            torch.testing.assert_close(parameter.detach(), expected[name], rtol=1e-12, atol=1e-12)
        for name, buffer in modules.named_buffers():
            assert torch.equal(buffer, buffers[name])


@pytest.mark.parametrize("fails", [False, True])
def test_the_weights_come_back_to_the_bit_whatever_happens_within(fails: bool) -> None:
    modules = network()
    average = WeightAverage(modules, 0.5)
    stir(modules, 1)
    average.update(modules)
    with torch.no_grad():
        modules["head"].weight[0, 0] = math.nan  # type: ignore[index]
        modules["head"].bias[0] = -0.0  # type: ignore[index]
    before, moments = bits(modules), dict(modules.named_parameters())
    raw = {name: value.numpy().tobytes() for name, value in before.items()}

    def evaluate() -> None:
        with average.applied(modules):
            assert not torch.isnan(modules["head"].weight).any()  # type: ignore[index]
            modules.train()(torch.zeros(1)) if fails else stir(modules, 5)

    if fails:
        with pytest.raises(NotImplementedError):
            evaluate()
    else:
        evaluate()
    assert {name: value.numpy().tobytes() for name, value in bits(modules).items()} == raw
    assert all(moments[name] is p for name, p in modules.named_parameters())


def test_half_precision_is_averaged_in_float32() -> None:
    modules = nn.Linear(1, 1, bias=False).bfloat16()
    nn.init.ones_(modules.weight)
    average = WeightAverage(modules, 0.999)
    nn.init.constant_(modules.weight, 2.0)
    for _ in range(700):
        average.update(modules)
    with average.applied(modules):
        assert modules.weight.dtype is torch.bfloat16
        assert modules.weight.item() == pytest.approx(2 - 0.999**700, rel=0.01)


@pytest.mark.parametrize("stop", [0, 3, 6])
def test_an_average_goes_on_from_its_saved_state_to_the_bit(stop: int) -> None:
    whole = first = WeightAverage(network(), 0.9)
    modules = network()
    for n in range(stop):
        stir(modules, n)
        first.update(modules)
    state = first.state_dict()
    saved = {
        "count": state["count"],
        "average": {k: v.clone() for k, v in state["average"].items()},
    }
    second = WeightAverage(network(seed=9), 0.9)
    second.load_state_dict(saved)
    for n in range(stop, 6):
        stir(modules, n)
        whole.update(modules)
        second.update(modules)
    assert second.state_dict()["count"] == whole.state_dict()["count"] == 6
    assert same(second.state_dict()["average"], whole.state_dict()["average"])


def test_an_average_of_something_else_is_refused_with_a_sentence() -> None:
    average = WeightAverage(nn.Linear(2, 1), 0.9)
    with pytest.raises(ValueError, match=r"missing \['bias', 'weight'\], unexpected \['0.bias'"):
        average.update(nn.Sequential(nn.Linear(2, 1)))
    with pytest.raises(
        ValueError, match=r"of 'weight' has shape \[1, 3\]; the model's has \[1, 2\]"
    ):
        average.load_state_dict(WeightAverage(nn.Linear(3, 1), 0.9).state_dict())
    for decay in (0.0, 1.0, -0.1, math.nan, "0.9"):
        with pytest.raises(ValueError, match=r"WeightAverage: decay must be a number in \(0, 1\)"):
            WeightAverage(nn.Linear(1, 1), decay)  # type: ignore[arg-type]
    WeightAverage(nn.Identity(), 0.9).update(nn.Identity())  # nothing to average is no error
