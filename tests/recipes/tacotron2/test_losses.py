"""The losses, against the formulas written out."""

import math

import pytest
import torch
from torch import Tensor

from recipes.tacotron2.losses import (
    Objective,
    diagonal,
    gate_loss,
    guided_attention,
    mean_of_means,
    spectral_error,
    usual_durations,
)
from recipes.tacotron2.model import Predictions


def written_out(attention: Tensor, symbols: int, steps: int, spread: float) -> float:
    """Tachibana et al. 2017, equations 3 and 4, N times."""
    total = 0.0
    for t in range(steps):
        for n in range(symbols):
            weight = 1 - math.exp(-((n / symbols - t / steps) ** 2) / (2 * spread**2))
            total += float(attention[t, n]) * weight
    return total / steps


def test_guided_attention_is_the_papers() -> None:
    torch.manual_seed(0)
    attention = torch.rand(2, 7, 5)
    attention[1, :, 3:] = -torch.inf  # the network looks at no padding
    attention = attention.softmax(-1)
    symbols, steps = torch.tensor([5, 3]), torch.tensor([7, 4])
    each = [
        written_out(one, int(n), int(t), 0.2)
        for one, n, t in zip(attention, symbols, steps, strict=True)
    ]
    places = diagonal(torch.ones(2, 5, dtype=torch.long), symbols)
    found = guided_attention(attention, places, steps, 0.2)
    assert found.item() == pytest.approx(sum(each) / 2, abs=1e-6)


def test_guided_attention_knows_a_diagonal() -> None:
    diagonal = torch.eye(20).unsqueeze(0)
    lengths = torch.tensor([20])
    places = torch.arange(20).unsqueeze(0) / 20
    cost = {
        name: guided_attention(each, places, lengths).item()
        for name, each in (
            ("straight", diagonal),
            ("even", torch.full((1, 20, 20), 0.05)),
            ("backwards", diagonal.flip(2)),
        )
    }
    assert cost["straight"] == 0
    assert 0.3 < cost["even"] < cost["backwards"] < 1


def test_the_diagonal_is_one_of_time_where_durations_are_known() -> None:
    tokens = torch.tensor([[1, 2, 1, 3], [2, 3, 0, 0]])
    symbols = torch.tensor([4, 2])
    even = diagonal(tokens, symbols)
    assert even.tolist() == [[0, 0.25, 0.5, 0.75], [0, 0.5, 1, 1.5]]
    durations = torch.tensor([9.0, 1.0, 4.0, 2.0])  # the first is padding's, and does not count
    found = diagonal(tokens, symbols, durations)
    # 1 + 4 + 1 + 2 = 8: the first symbol's middle is at 0.5 of 8, the second's at 3 of 8 …
    torch.testing.assert_close(found[0], torch.tensor([0.5, 3.0, 5.5, 7.0]) / 8)
    torch.testing.assert_close(found[1, :2], torch.tensor([2.0, 5.0]) / 6)


def test_durations_are_found_from_the_lengths_of_utterances() -> None:
    numbers = torch.Generator().manual_seed(0)
    true = torch.tensor([0.0, 0.30, 0.10, 0.05, 0.20, 0.0])
    texts = [torch.randint(1, 5, (20 + n % 9,), generator=numbers).tolist() for n in range(2000)]
    noise = 0.05 * torch.randn(2000, generator=numbers)
    lengths = [float(true[text].sum() + off) for text, off in zip(texts, noise, strict=True)]
    found = usual_durations(texts, lengths, 6)
    torch.testing.assert_close(found[1:5], true[1:5], atol=0.01, rtol=0)
    mean = sum(lengths) / sum(map(len, texts))
    assert found[5].item() == pytest.approx(mean)  # never seen
    # One that no utterance is longer for still lasts a little.
    shorter = [length - 0.1 * text.count(2) for text, length in zip(texts, lengths, strict=True)]
    mean = sum(shorter) / sum(map(len, texts))
    assert usual_durations(texts, shorter, 6)[2].item() == pytest.approx(mean / 10, rel=1e-5)


def test_the_gates_loss() -> None:
    logits = torch.tensor([[-1.0, 2.0, 9.0], [0.5, -3.0, 1.0]])
    steps = torch.tensor([2, 3])  # the last logit of the first is padding

    def cross(logit: float, last: bool) -> float:
        return -math.log(1 / (1 + math.exp(-logit if last else logit)))

    one = (cross(-1, False) + 4 * cross(2, True)) / 2
    other = (cross(0.5, False) + cross(-3, False) + 4 * cross(1, True)) / 3
    assert gate_loss(logits, steps, 4.0).item() == pytest.approx((one + other) / 2, rel=1e-5)


def test_padding_does_not_count_and_utterances_weigh_alike() -> None:
    torch.manual_seed(0)
    found, target = torch.randn(2, 6, 3), torch.randn(2, 6, 3)
    frames = torch.tensor([6, 2])
    spoilt = found.clone()
    spoilt[1, 2:] = math.nan
    apart = [found[n, :f] - target[n, :f] for n, f in enumerate((6, 2))]
    for absolute in (0.0, 0.7):
        each = [(a.square() + absolute * a.abs()).mean() for a in apart]
        error = spectral_error(spoilt, target, frames, absolute)
        torch.testing.assert_close(error, (each[0] + each[1]) / 2)


def predictions(
    batch: int = 2, steps: int = 4, symbols: int = 5, reduction: int = 3
) -> Predictions:
    shape = (batch, steps * reduction, 2)
    mel, refined, target = (torch.randn(shape) for _ in range(3))
    attention = torch.rand(batch, steps, symbols).softmax(-1)
    return Predictions(mel, refined, target, torch.randn(batch, steps), attention)


def test_a_batch_costs_the_mean_of_its_utterances() -> None:
    """So several processes, weighted by their utterances, compute what one does."""
    torch.manual_seed(0)
    found = predictions()
    symbols, frames = torch.tensor([5, 3]), torch.tensor([11, 7])
    objective = Objective(gate=2.0, last_step=3.0, attention=4.0)
    tokens = torch.tensor([[1, 2, 3, 1, 2], [2, 1, 3, 0, 0]])
    objective.durations = torch.tensor([1.0, 2.0, 3.0, 5.0])
    both = objective(found, tokens, symbols, frames)
    assert list(both) == ["mel", "refined", "gate", "attention"]
    for name, value in both.items():
        alone = [
            objective(
                Predictions(*(each[n : n + 1] for each in found)),
                tokens[n : n + 1],
                symbols[n : n + 1],
                frames[n : n + 1],
            )[name]
            for n in range(2)
        ]
        torch.testing.assert_close(value, (alone[0] + alone[1]) / 2)


def test_the_guide_lets_go() -> None:
    torch.manual_seed(0)
    found, symbols, frames = predictions(), torch.tensor([5, 3]), torch.tensor([12, 7])
    objective = Objective(attention=4.0, half_life=100)
    tokens = torch.ones(2, 5, dtype=torch.long)
    now, later = (objective(found, tokens, symbols, frames, step) for step in (0, 200))
    torch.testing.assert_close(later["attention"], now["attention"] / 4)
    torch.testing.assert_close(later["gate"], now["gate"])


def test_mean_of_means() -> None:
    values = torch.tensor([[1.0, 3.0, 7.0], [5.0, 0.0, 0.0]])
    assert mean_of_means(values, torch.tensor([2, 1])).item() == 3.5
