"""Tasks and networks of the study are what the study says of them."""

import math

import pytest
import torch
from torch import nn

from recipes.clipping_study import tasks
from recipes.clipping_study.models import Classifier, Recaller, Recurrent, Writer, _Unrolled
from tests.trainer.small import same


@pytest.mark.parametrize(
    "make",
    [lambda n, s: tasks.recall(9, n, s), lambda n, s: tasks.language(9, n, s), tasks.groups],
)
def test_batches_are_the_same_for_the_same_seed_alone(make: object) -> None:
    assert same(make(3, 1), make(3, 1))
    assert not same(make(3, 1), make(3, 2))
    assert len(make(3, 1)) == 3


def test_only_the_first_symbol_tells_the_class() -> None:
    for inputs, targets in tasks.recall(12, 2, 0):
        assert torch.equal(inputs[:, 0].argmax(1), targets)
        assert inputs[:, 1:].abs().max() < 6 * tasks.NOISE


def test_the_grammar_decides_nine_words_in_ten() -> None:
    follower: dict[tuple[int, int], list[int]] = {}
    for inputs, targets in tasks.language(32, 60, 3):
        words = torch.cat([inputs, targets[:, -1:]], 1)
        for row in words.tolist():
            for place in range(2, len(row)):
                follower.setdefault((row[place - 2], row[place - 1]), []).append(row[place])
    usual = sum(max(map(each.count, set(each))) for each in follower.values())
    assert usual / sum(map(len, follower.values())) == pytest.approx(0.9 + 0.1 / 12, abs=0.02)
    right = 0.9 + 0.1 / tasks.WORDS
    loss = -right * math.log(right) - 11 / 120 * math.log(1 / 120)
    assert loss == pytest.approx(0.53, abs=0.01)


def test_a_spoilt_batch_leaves_the_others_as_they_were() -> None:
    clean = tasks.groups(5, 0)
    found = tasks.spoilt(clean, [2], 30.0, 0)
    for step in (0, 1, 3, 4):
        assert same(found[step], clean[step])
    assert torch.equal(found[2][0], 30 * clean[2][0])
    assert sorted(found[2][1].tolist()) == sorted(clean[2][1].tolist())
    assert not torch.equal(found[2][1], clean[2][1])


def test_the_recurrent_layer_is_that_of_torch() -> None:
    torch.manual_seed(0)
    own, torchs = Recurrent(3, 5), nn.RNN(3, 5, batch_first=True)
    with torch.no_grad():
        torchs.weight_ih_l0.copy_(own.inner.weight)
        torchs.weight_hh_l0.copy_(own.recurrent)
        torchs.bias_ih_l0.copy_(own.inner.bias)
        torchs.bias_hh_l0.zero_()
    inputs = torch.randn(4, 7, 3)
    expected = torchs(inputs)[0]
    torch.testing.assert_close(own(inputs), expected)
    for states in (own(inputs), expected):
        (states * torch.linspace(-1, 1, 7)[:, None]).square().sum().backward()
    torch.testing.assert_close(own.recurrent.grad, torchs.weight_hh_l0.grad)
    torch.testing.assert_close(own.inner.weight.grad, torchs.weight_ih_l0.grad)
    numbers = [torch.randn(6, 2, 4, dtype=torch.double), torch.randn(4, 4, dtype=torch.double)]
    assert torch.autograd.gradcheck(_Unrolled.apply, [each.requires_grad_() for each in numbers])
    size = torch.linalg.matrix_norm(own.recurrent.detach(), 2)
    assert float(size) == pytest.approx(1.0, abs=1e-4)


def test_a_scale_changes_gradients_and_not_what_is_computed() -> None:
    gradients = []
    for scales in ((1.0, 1.0, 1.0), (1.0, 100.0, 1.0)):
        torch.manual_seed(0)
        model = Classifier(tasks.INPUTS, tasks.GROUPS, scales=scales)
        points, _ = tasks.groups(1, 0)[0]
        outputs = model(points)
        outputs.square().sum().backward()
        gradients.append(([layer.weight.grad for layer in model.layers], outputs.detach()))
    (usual, before), (wide, after) = gradients
    torch.testing.assert_close(after, before)
    for place, factor in ((0, 1.0), (1, 100.0), (2, 1.0)):
        torch.testing.assert_close(wide[place], factor * usual[place])


def test_the_transformer_sees_no_word_that_comes_later() -> None:
    torch.manual_seed(0)
    model = Writer(tasks.WORDS, 8, layers=2)
    inputs, _ = tasks.language(8, 1, 0)[0]
    changed = inputs.clone()
    changed[:, 5:] = (changed[:, 5:] + 1) % tasks.WORDS
    a, b = model(inputs), model(changed)
    torch.testing.assert_close(a[:, :5], b[:, :5])
    assert not torch.allclose(a[:, 5:], b[:, 5:])
    weights = [layer.linear1.weight for layer in model.layers.layers]
    assert not torch.equal(weights[0], weights[1])
    assert Recaller(4, 4)(torch.zeros(2, 3, 4)).shape == (2, 4)
