"""SepFormer: its size, its shapes, and who sees whom."""

import pytest
import torch
import torchaudio

from recipes.separation.model import (
    SepFormer,
    SineTasNet,
    Transformer,
    join,
    positions,
    split,
    windowed_sines,
)


@pytest.mark.parametrize(("filters", "samples"), [(64, 64), (128, 32), (512, 256)])
def test_sines_and_their_windows_are_the_identity(filters: int, samples: int) -> None:
    made = windowed_sines(filters, samples)[:, None]
    signal = torch.randn(1, 1, 10 * samples, generator=torch.Generator().manual_seed(0))
    bands = torch.nn.functional.conv1d(signal, made, stride=samples // 2)
    back = torch.nn.functional.conv_transpose1d(bands, made, stride=samples // 2)
    middle = slice(samples, -samples)
    torch.testing.assert_close(back[..., middle], signal[..., middle], atol=1e-5, rtol=0)


def test_a_network_of_sines_is_torchaudios_but_for_where_it_begins() -> None:
    given = {"num_sources": 3, "enc_kernel_size": 32, "enc_num_feats": 64, "msk_num_layers": 2}
    own, plain = SineTasNet(**given), torchaudio.models.ConvTasNet(**given)
    assert own(torch.randn(2, 1, 500)).shape == (2, 3, 500)
    plain.load_state_dict(own.state_dict())
    x = torch.randn(1, 1, 333)
    assert torch.equal(own(x), plain(x))
    assert own.encoder.weight.requires_grad
    with pytest.raises(ValueError, match="7 filters of 32 samples cannot be cosines and sines"):
        windowed_sines(7, 32)


def small(**more: int) -> SepFormer:
    torch.manual_seed(0)
    given = {
        "features": 16, "kernel": 8, "stride": 4, "chunk": 10, "layers": 1, "heads": 2,
        "feedforward": 32,
    }  # fmt: skip
    return SepFormer(**(given | more))


def test_the_published_size() -> None:
    with torch.device("meta"):
        model = SepFormer()
    assert sum(p.numel() for p in model.parameters()) == 25_677_313
    assert (len(model.within), len(model.across)) == (2, 2)
    assert {len(each.layers) for each in [*model.within, *model.across]} == {8}


@pytest.mark.parametrize("sources", [2, 3])
@pytest.mark.parametrize("samples", [1, 7, 8, 100, 1001])
def test_tracks_are_as_many_and_as_long_as_asked_for(sources: int, samples: int) -> None:
    found = small(num_sources=sources)(torch.randn(2, 1, samples))
    assert found.shape == (2, sources, samples)
    assert found.isfinite().all()


def test_a_mixture_is_separated_alike_alone_and_in_a_batch() -> None:
    model, mixtures = small().eval(), torch.randn(3, 1, 500)
    together = model(mixtures)
    for item in range(3):
        torch.testing.assert_close(model(mixtures[item : item + 1])[0], together[item])


def test_every_sample_of_the_mixture_reaches_every_sample_of_the_tracks() -> None:
    """Within pieces and across them: the far end, too."""
    mixture = torch.randn(1, 1, 600, requires_grad=True)
    small()(mixture)[0, :, 0].sum().backward()
    assert mixture.grad is not None
    assert (mixture.grad[0, 0].abs() > 0).float().mean() > 0.99


def test_every_weight_gets_a_gradient() -> None:
    model = small()
    model(torch.randn(2, 1, 200)).square().mean().backward()
    without = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    assert without == []


def test_layers_do_not_begin_alike() -> None:
    first, second = Transformer(16, 2, 2, 32).layers
    assert not torch.equal(first.linear1.weight, second.linear1.weight)


@pytest.mark.parametrize("frames", [1, 4, 5, 12, 25, 40])
def test_pieces_overlap_by_half_and_are_joined_again(frames: int) -> None:
    x = torch.randn(2, frames, 3)
    pieces = split(x, 10)
    assert pieces.shape[2:] == (10, 3)
    assert torch.equal(pieces[:, :-1, 5:], pieces[:, 1:, :5])
    torch.testing.assert_close(join(pieces)[:, :frames], 2 * x)


def test_positions_are_sines() -> None:
    found = positions(50, 6, torch.empty(0))
    assert found.shape == (50, 6)
    torch.testing.assert_close(found[:, 0], torch.arange(50.0).sin())
    torch.testing.assert_close(found[:, 1], torch.arange(50.0).cos())
    assert positions(3, 5, torch.empty(0, dtype=torch.bfloat16)).shape == (3, 5)


@pytest.mark.parametrize("chunk", [0, 7])
def test_a_chunk_without_a_half_is_refused(chunk: int) -> None:
    with pytest.raises(ValueError, match=f"chunk is {chunk}; allowed: an even number of frames"):
        small(chunk=chunk)
