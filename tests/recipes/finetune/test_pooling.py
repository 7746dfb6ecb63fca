"""Pooling over frames, and heads over classes."""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from recipes.finetune.pooling import (
    AttentiveStatistics,
    CosineHead,
    Embedding,
    LinearHead,
    MeanPooling,
    StatisticsPooling,
)

POOLING: dict[str, Callable[[], nn.Module]] = {
    "mean": lambda: MeanPooling(6),
    "statistics": lambda: StatisticsPooling(6),
    "attention of each frame": lambda: AttentiveStatistics(6, 5, per_feature=False, context=False),
    "attention of each feature": lambda: AttentiveStatistics(6, 5),
    "embedding": lambda: Embedding(AttentiveStatistics(6, 5), 4).eval(),
}


@pytest.mark.parametrize("kind", POOLING)
@pytest.mark.parametrize("padding", [0.0, 1e9, math.nan, math.inf])
def test_padding_never_counts(kind: str, padding: float) -> None:
    torch.manual_seed(1)
    pool = POOLING[kind]()
    lengths = torch.tensor([9, 1, 4, 7])
    frames = torch.randn(4, 9, 6)
    alone = torch.cat([pool(frames[n : n + 1, :size], lengths[n : n + 1])
                       for n, size in enumerate(lengths.tolist())])  # fmt: skip
    for n, size in enumerate(lengths.tolist()):
        frames[n, size:] = padding
    together = pool(frames.requires_grad_(), lengths)
    assert together.shape == (4, pool.size)
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=0)
    together.sum().backward()
    assert frames.grad is not None
    for n, size in enumerate(lengths.tolist()):
        assert frames.grad[n, :size].isfinite().all()
        assert not frames.grad[n, size:].any()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in pool.parameters())


def test_statistics_are_those_of_each_utterance() -> None:
    frames, lengths = torch.randn(3, 8, 4), torch.tensor([8, 5, 2])
    found = StatisticsPooling(4)(frames, lengths)
    for vector, each, size in zip(found, frames, lengths.tolist(), strict=True):
        torch.testing.assert_close(vector[:4], each[:size].mean(0))
        torch.testing.assert_close(vector[4:], each[:size].std(0, correction=0))
    torch.testing.assert_close(MeanPooling(4)(frames, lengths), found[:, :4])


def test_attention_without_preference_gives_the_plain_statistics() -> None:
    pool = AttentiveStatistics(4, 3)
    nn.init.zeros_(pool.outer.weight)
    frames, lengths = torch.randn(3, 8, 4), torch.tensor([8, 5, 2])
    expected = StatisticsPooling(4)(frames, lengths)
    torch.testing.assert_close(pool(frames, lengths), expected)


def test_attention_can_choose_one_frame() -> None:
    pool = AttentiveStatistics(1, 1, per_feature=False, context=False)
    with torch.no_grad():
        pool.inner.weight.fill_(1.0), pool.inner.bias.fill_(-2.5)
        pool.outer.weight.fill_(100.0)
    frames = torch.tensor([[[0.0], [3.0], [1.0], [2.0], [9.0]]])
    mean, deviation = pool(frames, torch.tensor([4])).squeeze(0).tolist()
    assert mean == pytest.approx(3.0, abs=1e-3)
    assert deviation < 1e-2


# ------------------------------------------------------------------------------------------- heads


def margin_by_angles(cosine: float, margin: float) -> float:
    angle = math.acos(max(-1.0, min(1.0, cosine)))
    if angle + margin > math.pi:
        return cosine - margin * math.sin(margin)
    return math.cos(angle + margin)


def test_the_margin_is_added_to_the_angle_of_the_own_class_alone() -> None:
    torch.manual_seed(2)
    head = CosineHead(5, 7, margin=0.3, scale=20.0).requires_grad_(False)
    embeddings = torch.cat([torch.randn(40, 5), -head.weight[:3], head.weight[:3]])
    labels = torch.cat([torch.arange(40) % 7, torch.arange(3), torch.arange(3)])
    plain, moved = head(embeddings).detach(), head(embeddings, labels).detach()
    assert plain.abs().max() <= 20.0 + 1e-4
    for row, (one, two, label) in enumerate(zip(plain, moved, labels.tolist(), strict=True)):
        others = torch.arange(7) != label
        assert torch.equal(one[others], two[others])
        expected = 20.0 * margin_by_angles(float(one[label]) / 20.0, 0.3)
        assert float(two[label]) == pytest.approx(expected, abs=0.02), row
    torch.testing.assert_close(head(3.0 * embeddings).detach(), plain)


def test_the_margin_makes_the_loss_larger_and_its_gradient_is_finite() -> None:
    head = CosineHead(4, 3, margin=0.2, scale=5.0)
    embeddings = head.weight.detach().clone().requires_grad_()  # exactly on their directions
    labels = torch.arange(3)
    loss = nn.functional.cross_entropy(head(embeddings, labels), labels)
    assert loss.item() > nn.functional.cross_entropy(head(embeddings), labels).item()
    loss.backward()
    assert embeddings.grad is not None
    assert embeddings.grad.isfinite().all()


def test_without_a_margin_labels_change_nothing() -> None:
    head, embeddings = CosineHead(4, 3, margin=0.0), torch.randn(5, 4)
    assert torch.equal(head(embeddings), head(embeddings, torch.tensor([0, 1, 2, 0, 1])))


@pytest.mark.parametrize(("margin", "scale"), [(-0.1, 30.0), (1.6, 30.0), (0.2, 0.0)])
def test_a_margin_or_scale_out_of_range_is_a_sentence(margin: float, scale: float) -> None:
    with pytest.raises(ValueError, match="; allowed: "):
        CosineHead(4, 3, margin, scale)


@pytest.mark.parametrize("kind", [LinearHead, CosineHead])
def test_classes_may_be_told_later(kind: type[LinearHead] | type[CosineHead]) -> None:
    def logits(head: LinearHead | CosineHead) -> Tensor:
        return head(torch.ones(2, 4))

    late = kind(4)
    torch.manual_seed(5)
    late.resize(3)
    torch.manual_seed(5)
    assert torch.equal(logits(late), logits(kind(4, 3)))
    assert logits(late).shape == (2, 3)
