"""The judge: its size and its limits, and that padding and company change nothing."""

import pytest
import torch

from recipes.metricgan.discriminator import Discriminator


def test_the_published_size() -> None:
    assert sum(p.numel() for p in Discriminator().parameters()) == 19_010


def features(frames: int, seed: int) -> torch.Tensor:
    return torch.rand(1, frames, 257, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("compares", [False, True])
@pytest.mark.parametrize("frames", [1, 16, 17, 40])
def test_company_does_not_change_a_score(frames: int, compares: bool) -> None:
    torch.manual_seed(0)
    judge = Discriminator(channels=3, compares=compares)
    judge.eval()  # no power iteration between the two
    judged, clean = torch.zeros(2, 3, 60, 257)
    lengths = torch.tensor([60, frames, 25])
    for i, length in enumerate(lengths.tolist()):
        judged[i, :length], clean[i, :length] = features(length, i)[0], features(length, i + 9)[0]
    together = judge(judged, clean, lengths)
    alone = [judge(judged[i : i + 1, :n], clean[i : i + 1, :n]) for i, n in enumerate(lengths)]
    torch.testing.assert_close(together, torch.cat(alone), rtol=0, atol=1e-6)
    assert together.unique().numel() == 3


def test_a_score_depends_on_both_signals() -> None:
    torch.manual_seed(0)
    judge = Discriminator(channels=3)
    judge.eval()
    a, b = features(30, 0), features(30, 1)
    assert len({judge(*pair).item() for pair in ((a, a), (a, b), (b, a))}) == 3


def test_one_scale_for_all_shows_how_loud_a_side_is() -> None:
    """A norm of each utterance hides it."""
    a, b = features(30, 0), features(30, 1)
    for compares in (False, True):
        torch.manual_seed(0)
        judge = Discriminator(channels=3, compares=compares).eval()
        change = (judge(a + 0.5, b) - judge(a, b)).abs().item()
        assert (change > 1e-4) == compares
        assert compares or change < 1e-5


def test_convolutions_are_spectrally_normalised() -> None:
    torch.manual_seed(0)
    judge = Discriminator(channels=3)
    with torch.no_grad():
        for layer in judge.convolutions:
            layer.parametrizations.weight.original.mul_(7)
        for _ in range(60):  # power iterations
            judge(features(20, 0), features(20, 1))
    judge.eval()
    norms = [
        torch.linalg.matrix_norm(layer.weight.flatten(1), ord=2).item()
        for layer in judge.convolutions
    ]
    assert len(norms) == 4
    assert norms == pytest.approx([1.0] * 4, abs=2e-2)
