"""The network: padding, order, reduction, the gate, precision."""

import pytest
import torch
from torch import Tensor

from recipes.tacotron2.model import Tacotron
from tests.recipes.tacotron2.conftest import tacotron

Batch = tuple[Tensor, Tensor, Tensor, Tensor]


def batch_of(symbols: list[int], frames: list[int], bands: int = 6) -> Batch:
    """Tokens, their numbers, mels, their frames: zero beyond each utterance."""
    numbers = torch.Generator().manual_seed(1)
    tokens = torch.randint(1, 12, (len(symbols), max(symbols)), generator=numbers)
    mels = torch.randn(len(frames), max(frames), bands, generator=numbers)
    for n, (length, end) in enumerate(zip(symbols, frames, strict=True)):
        tokens[n, length:] = 0
        mels[n, end:] = 0
    return tokens, torch.tensor(symbols), mels, torch.tensor(frames)


def close(one: Tensor, other: Tensor) -> None:
    torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("reduction", [1, 3])
@pytest.mark.usefixtures("undropped")
def test_an_utterance_gets_the_same_alone_and_in_a_batch(reduction: int) -> None:
    torch.manual_seed(0)
    model = tacotron(reduction).eval()
    symbols, frames = [4, 9, 6], [20, 13, 7]
    tokens, counts, mels, ends = batch_of(symbols, frames)
    together = model(tokens, counts, mels, ends)
    for n, (length, end) in enumerate(zip(symbols, frames, strict=True)):
        own = slice(n, n + 1)
        alone = model(tokens[own, :length], counts[own], mels[own, :end], ends[own])
        steps = -(-end // reduction)
        close(together.mel[n, :end], alone.mel[0, :end])
        close(together.refined[n, :end], alone.refined[0, :end])
        close(together.gate[n, :steps], alone.gate[0, :steps])
        close(together.attention[n, :steps, :length], alone.attention[0, :steps])
        close(together.target[n, :end], (mels[n, :end] + 3) / 2)
        assert not together.attention[n, :steps, length:].any()


@pytest.mark.usefixtures("undropped")
def test_synthesis_gives_the_same_alone_and_in_a_batch() -> None:
    torch.manual_seed(0)
    model = tacotron(2).eval()
    tokens, counts, _, _ = batch_of([4, 9, 6], [5, 5, 5])
    model.net.decoder.gate_layer.weight.data.mul_(30)  # so that gates stop at unlike steps
    together = model.synthesise(tokens, counts, 40)
    for n, length in enumerate(counts.tolist()):
        alone = model.synthesise(tokens[n : n + 1, :length], counts[n : n + 1], 40)
        assert together.frames[n] == alone.frames[0]
        assert together.stopped[n] == alone.stopped[0]
        end = int(alone.frames[0])
        close(together.mel[n, :end], alone.mel[0, :end])
        assert not together.mel[n, end:].any()
        close(together.attention[n, : end // 2, :length], alone.attention[0, : end // 2])


@pytest.mark.parametrize("reduction", [1, 2, 5])
@pytest.mark.usefixtures("undropped")
def test_teacher_forcing_with_its_own_speech_is_synthesis(reduction: int) -> None:
    """With more than one frame a step both ways fold alike, which torchaudio does not promise."""
    torch.manual_seed(0)
    model = tacotron(reduction).eval()
    for convolution, norm in model.net.postnet.convolutions:
        convolution.weight.data.zero_()
        convolution.bias.data.zero_()
        norm.bias.data.zero_()
    model.net.decoder.gate_layer.bias.data.fill_(-20.0)
    tokens, counts, _, _ = batch_of([7, 5], [5, 5])
    spoken = model.synthesise(tokens, counts, 20)
    assert spoken.frames.tolist() == [20, 20]
    forced = model(tokens, counts, spoken.mel, spoken.frames)
    close(forced.mel[:, :20] * 2 - 3, spoken.mel)
    close(forced.attention[:, : 20 // reduction], spoken.attention)
    assert spoken.mel.std() > 1e-3


@pytest.mark.usefixtures("undropped")
def test_forgotten_frames_are_not_seen_in_training_alone() -> None:
    torch.manual_seed(0)
    model = tacotron(2)
    tokens, counts, mels, ends = batch_of([7, 5], [40, 40])
    target = (mels + 3) / 2
    model.forget = 0.5
    seen = model._remembered(target).unflatten(1, (20, 2))
    whole = target.unflatten(1, (20, 2))
    gone = (seen == 0).all(-1).all(-1)  # (B, T): the frames of a step go together
    assert 8 <= int(gone.sum()) <= 32
    assert torch.equal(seen[~gone], whole[~gone])
    model.eval()
    assert torch.equal(model._remembered(target), target)
    before = model(tokens, counts, mels, ends)
    model.forget = 0.0
    close(model(tokens, counts, mels, ends).mel, before.mel)
    with pytest.raises(ValueError, match="forget is 1.0; allowed: a share of steps, from 0 to"):
        Tacotron(model.net, forget=1.0)


@pytest.mark.usefixtures("undropped")
def test_blind_synthesis_is_teacher_forcing_with_mean_frames_and_nothing_else_is_blind() -> None:
    torch.manual_seed(0)
    model = tacotron(2).eval()
    model.net.decoder.gate_layer.bias.data.fill_(-20.0)
    tokens, counts, mels, ends = batch_of([7, 5], [20, 20])
    seeing, before = model.synthesise(tokens, counts, 20), model(tokens, counts, mels, ends)
    model.blind = True
    spoken = model.synthesise(tokens, counts, 20)
    assert not torch.allclose(spoken.mel, seeing.mel, atol=1e-3)
    forced = model(tokens, counts, torch.full_like(mels, model.mean), ends)
    close(forced.refined[:, :20] * model.deviation + model.mean, spoken.mel)
    close(forced.attention[:, :10], spoken.attention)
    close(model(tokens, counts, mels, ends).mel, before.mel)
    with pytest.raises(ValueError, match="blind is true and forget 0: no step would have learnt"):
        Tacotron(model.net, blind=True)


def test_where_dropout_rests_a_text_is_said_alike_whatever_is_drawn() -> None:
    torch.manual_seed(0)
    model = tacotron(2).eval()
    model.net.decoder.gate_layer.bias.data.fill_(-20.0)
    tokens, counts, mels, ends = batch_of([7, 5], [40, 40])

    def alike() -> tuple[bool, bool]:
        """In synthesis, and by teacher forcing."""
        said = [model.synthesise(tokens, counts, 20).mel for _ in range(2)]
        forced = [model(tokens, counts, mels, ends).mel for _ in range(2)]
        return torch.equal(*said), torch.equal(*forced)

    assert alike() == (False, False)
    model.rest = True
    assert alike() == (True, True)
    model.train()
    found = [model(tokens, counts, mels, ends).mel for _ in range(2)]
    assert not torch.equal(*found)


@pytest.mark.usefixtures("undropped")
def test_what_rests_is_the_dropout_alone() -> None:
    torch.manual_seed(0)
    model = tacotron(2).eval()
    tokens, counts, mels, ends = batch_of([7, 5], [40, 40])
    before = model(tokens, counts, mels, ends).mel
    model.rest = True
    assert torch.equal(model(tokens, counts, mels, ends).mel, before)


def test_the_gate_ends_synthesis_or_the_limit_does() -> None:
    torch.manual_seed(0)
    model = tacotron(3).eval()
    tokens, counts, _, _ = batch_of([7, 5], [5, 5])
    model.net.decoder.gate_layer.bias.data.fill_(20.0)
    spoken = model.synthesise(tokens, counts, 20)
    assert spoken.frames.tolist() == [3, 3]
    assert spoken.stopped.all()
    model.net.decoder.gate_layer.bias.data.fill_(-20.0)
    spoken = model.synthesise(tokens, counts, 20)  # and does not warn
    assert spoken.frames.tolist() == [21, 21]
    assert not spoken.stopped.any()
    assert spoken.mel.shape == (2, 21, 6)
    assert spoken.attention.shape == (2, 7, 7)


def test_every_parameter_learns() -> None:
    torch.manual_seed(0)
    model = tacotron(2)
    scale = model.net.postnet.convolutions[-1][1].weight
    assert not scale.any()  # the post-net begins as nothing,
    torch.nn.init.ones_(scale)  # but it learns
    found = model(*batch_of([7, 5], [12, 9]))
    parts = (found.mel, found.refined, found.gate, found.attention)
    sum(part.square().mean() for part in parts).backward()
    still = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    # Batch norm takes away whatever a convolution before it adds.
    assert [name for name in still if not name.endswith(".0.bias")] == []


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_stays_finite(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    model = tacotron(2)
    with torch.autocast("cpu", dtype):
        found = model(*batch_of([7, 5], [12, 9]))
        loss = sum(part.float().square().mean() for part in found)
    loss.backward()
    assert torch.isfinite(loss)
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)
    model.eval()
    with torch.autocast("cpu", dtype):
        spoken = model.synthesise(*batch_of([7, 5], [12, 9])[:2], 8)
    assert spoken.mel.dtype == torch.float32
    assert torch.isfinite(spoken.mel).all()


def test_few_shapes_reach_the_decoder() -> None:
    model: Tacotron = tacotron(2)
    shapes = {model(*batch_of([4], [frames])).mel.shape[1] for frames in range(1, 40)}
    assert shapes == {8, 16, 24, 32, 40}


@pytest.mark.parametrize("drop", [True, False])
def test_without_dropout_the_convolutions_still_learn_from_their_batch(drop: bool) -> None:
    torch.manual_seed(0)
    model = tacotron(2)
    model.drop = drop
    model.eval().train()
    assert model.net.decoder.prenet.training
    tokens, counts, mels, ends = batch_of([7, 5], [10, 8])
    norms = (model.net.encoder.convolutions[0][1], model.net.postnet.convolutions[0][1])
    model.net.postnet.convolutions[-1][1].weight.data.fill_(1.0)  # at first it adds nothing
    before = [norm.running_mean.clone() for norm in norms]
    read = [model._encode(tokens, counts) for _ in range(2)]
    refined = [model._refine(mels.transpose(1, 2), ends) for _ in range(2)]
    for norm, mean in zip(norms, before, strict=True):
        assert not norm.running_mean.equal(mean)
    assert read[0].equal(read[1]) is not drop
    assert refined[0].equal(refined[1]) is not drop
    model.eval()
    assert not any(each.training for each in model.modules())
