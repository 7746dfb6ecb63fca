"""Losses and their order, against fast_bss_eval and against what can be said in words."""

import math

import fast_bss_eval
import pytest
import torch
from torch import Tensor

from recipes.separation.objectives import best_order, keep, pairwise_si_snr


def signals(people: int, batch: int = 3, samples: int = 400) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(people)
    sources = torch.randn(batch, people, samples, generator=generator)
    noise = torch.randn(batch, people, samples, generator=generator)
    return 0.3 * sources.roll(1, 1) + sources + 0.2 * noise + 0.1, sources - 0.05


@pytest.mark.parametrize("people", [2, 3])
def test_si_snr_is_that_of_fast_bss_eval(people: int) -> None:
    estimates, sources = signals(people)
    losses = fast_bss_eval.si_sdr_loss(estimates, sources, zero_mean=True, pairwise=True)
    torch.testing.assert_close(
        pairwise_si_snr(estimates, sources), -losses.transpose(1, 2), atol=1e-3, rtol=0
    )


@pytest.mark.parametrize("people", [2, 3])
def test_the_best_order_is_that_of_fast_bss_eval(people: int) -> None:
    estimates, sources = signals(people)
    shuffled = estimates[:, torch.randperm(people, generator=torch.Generator().manual_seed(3))]
    found = best_order(pairwise_si_snr(shuffled, sources))
    each, order = fast_bss_eval.si_sdr(sources, shuffled, zero_mean=True, return_perm=True)
    torch.testing.assert_close(found.score, each.mean(1), atol=1e-3, rtol=0)
    assert torch.equal(found.order, order)
    back = shuffled[torch.arange(3)[:, None], found.order]
    assert torch.equal(back, estimates)


def test_scale_and_offset_do_not_matter_and_the_order_of_sources_neither() -> None:
    estimates, sources = signals(3)
    scores = pairwise_si_snr(estimates, sources)
    torch.testing.assert_close(
        pairwise_si_snr(7 * estimates - 1, sources), scores, atol=1e-3, rtol=0
    )
    torch.testing.assert_close(pairwise_si_snr(estimates, 0.1 * sources), scores, atol=1e-3, rtol=0)
    torch.testing.assert_close(
        best_order(pairwise_si_snr(estimates.flip(1), sources)).score, best_order(scores).score
    )


def test_what_is_padded_does_not_count() -> None:
    estimates, sources = signals(2)
    lengths = torch.tensor([400, 250, 31])
    found = pairwise_si_snr(estimates, sources, lengths)
    for item, length in enumerate(lengths):
        alone = pairwise_si_snr(
            estimates[item : item + 1, :, :length], sources[item : item + 1, :, :length]
        )
        torch.testing.assert_close(found[item], alone[0], atol=1e-4, rtol=0)


def test_silence_and_perfection_are_finite_and_have_gradients() -> None:
    _, sources = signals(2)
    for estimates in (torch.zeros_like(sources), sources.clone()):
        estimates.requires_grad_()
        loss = -best_order(pairwise_si_snr(estimates, sources)).score.mean()
        loss.backward()
        assert loss.isfinite()
        assert estimates.grad is not None
        assert estimates.grad.isfinite().all()
    assert loss < -60


def test_half_precision_is_summed_in_single() -> None:
    estimates, sources = signals(2)
    found = pairwise_si_snr(estimates.bfloat16(), sources)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, pairwise_si_snr(estimates, sources), atol=0.1, rtol=0)
    with torch.autocast("cpu", torch.bfloat16):
        found = pairwise_si_snr(estimates, sources)
    assert torch.equal(found, pairwise_si_snr(estimates, sources))


NAN, INF = math.nan, math.inf


@pytest.mark.parametrize(
    ("losses", "mean", "weight"),
    [
        ([-10.0, -20.0], -15.0, 2),
        ([-10.0, -40.0], -10.0, 1),  # too easy: it is left out
        ([-30.0, -30.1], -30.0, 1),  # the threshold itself is kept
        ([-31.0, -50.0], 0.0, 0),  # nothing is left, and nothing is given
        ([-10.0, NAN], NAN, 2),
        ([-10.0, INF], INF, 2),
        ([-10.0, -INF], -INF, 2),  # not easy, but wrong
        ([-40.0, -INF], -INF, 1),
        ([90.0, 120.0], INF, 2),  # above the limit of 100
        ([100.0, 100.0], 100.0, 2),
    ],
)
def test_what_is_kept_of_a_batch(losses: list[float], mean: float, weight: float) -> None:
    given = torch.tensor(losses, requires_grad=True)
    found = keep(given, -30.0, 100.0)
    assert found.weight == weight
    torch.testing.assert_close(found.loss.detach(), torch.tensor(mean), equal_nan=True)
    assert found.loss.requires_grad


def test_without_a_threshold_all_is_kept() -> None:
    found = keep(torch.tensor([-40.0, -20.0], requires_grad=True), None, 100.0)
    assert (found.loss.item(), found.weight) == (-30.0, 2)
