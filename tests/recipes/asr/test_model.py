"""The recogniser's network: shapes, lengths, and that a batch does not change what it hears."""

import pytest
import torch
import torchaudio

from recipes.asr.model import ConformerCTC, LogMel, Subsampling, ctc_loss

RATE = 8000


def small(halvings: int = 2, **more: object) -> ConformerCTC:
    torch.manual_seed(0)
    return ConformerCTC(
        vocabulary=7,
        features=LogMel(RATE, bands=32),
        front=Subsampling(32, width=16, channels=4, halvings=halvings),
        encoder=torchaudio.models.Conformer(16, 2, 32, 2, depthwise_conv_kernel_size=5),
        **more,  # type: ignore[arg-type]
    )


def padded(*lengths: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    wavs = [0.1 * torch.randn(length, generator=generator) for length in lengths]
    return torch.nn.utils.rnn.pad_sequence(wavs, batch_first=True), torch.tensor(lengths)


@pytest.mark.parametrize("halvings", [1, 2, 3])
def test_frames_are_as_many_as_foretold(halvings: int) -> None:
    model = small(halvings).eval()
    lengths = (8000, 7999, 79, 80, 1, 4321)
    log_probs, frames = model(*padded(*lengths))
    assert frames.tolist() == [model.frames(length) for length in lengths]
    assert log_probs.shape[0::2] == (6, 7)
    assert log_probs.shape[1] >= max(frames)
    torch.testing.assert_close(log_probs.exp().sum(-1), torch.ones(log_probs.shape[:2]))


@pytest.mark.parametrize("training", [False, True])
def test_an_utterance_is_heard_alike_alone_and_in_a_batch(training: bool) -> None:
    model = small().train(training)
    wav, lengths = padded(9000, 16000, 3210, 400)
    together, frames = model(wav, lengths)
    for item in range(4):
        alone, _ = model(wav[item : item + 1, : lengths[item]], lengths[item : item + 1])
        torch.testing.assert_close(
            alone[0, : frames[item]], together[item, : frames[item]], atol=1e-5, rtol=0
        )


def test_features_are_centred_over_each_utterance_and_zero_beyond_it() -> None:
    wav, lengths = padded(16000, 8000)
    features, frames = LogMel(RATE, bands=32)(wav, lengths)
    assert features.shape == (2, 201, 32)
    assert frames.tolist() == [201, 101]
    for item, count in enumerate(frames):
        valid = features[item, :count]
        assert valid.mean(0).abs().max() < 1e-4
        assert ((valid.square().mean(0) - 1).abs() < 0.05).all()
        assert not features[item, count:].any()


def test_loudness_does_not_matter() -> None:
    wav, lengths = padded(16000)
    features = LogMel(RATE, bands=32)
    torch.testing.assert_close(
        features(wav, lengths)[0], features(0.1 * wav, lengths)[0], atol=0.05, rtol=0
    )


def test_silence_gives_finite_numbers() -> None:
    log_probs, _ = small()(torch.zeros(2, 4000), torch.tensor([4000, 1]))
    assert log_probs.isfinite().all()
    log_probs.sum().backward()


def test_features_are_changed_in_training_alone() -> None:
    mask = torchaudio.transforms.SpecAugment(1, 20, 1, 10, zero_masking=True)
    model = small(augment=mask)
    with torch.no_grad():
        for dropout in (m for m in model.modules() if isinstance(m, torch.nn.Dropout)):
            dropout.p = 0.0
        batch = padded(16000)
        trained = [model.train()(*batch)[0] for _ in range(2)]
        tested = [model.eval()(*batch)[0] for _ in range(2)]
    assert not torch.equal(*trained)
    assert torch.equal(*tested)


def test_the_loss_is_the_mean_over_utterances_that_have_a_path() -> None:
    torch.manual_seed(0)
    log_probs = torch.randn(3, 5, 4).log_softmax(-1).requires_grad_()
    tokens = torch.tensor([[1, 2, 0, 0], [1, 1, 2, 0], [1, 1, 2, 2]])
    lengths = torch.tensor([2, 3, 4])
    frames = torch.tensor([5, 4, 5])  # the last needs six: two blanks between equal ones
    each = [
        torch.nn.functional.ctc_loss(
            log_probs[i, : frames[i]], tokens[i, : lengths[i]], frames[i], lengths[i],
            reduction="none",
        )
        for i in range(3)
    ]  # fmt: skip
    assert each[2].isinf()
    loss = ctc_loss(log_probs, frames, tokens, lengths)
    torch.testing.assert_close(loss, (each[0] + each[1]) / 2)
    loss.backward()
    assert log_probs.grad is not None
    assert log_probs.grad.isfinite().all()
    assert log_probs.grad[0].any()
    assert not log_probs.grad[2].any()


def test_a_loss_that_is_not_finite_stays_so() -> None:
    log_probs = torch.full((1, 3, 4), float("nan"))
    args = (torch.tensor([3]), torch.tensor([[1]]), torch.tensor([1]))
    assert ctc_loss(log_probs, *args).isnan()


def test_utterances_without_words_have_a_loss() -> None:
    log_probs = torch.zeros(2, 3, 4).log_softmax(-1)
    lengths = torch.tensor([0, 0])
    loss = ctc_loss(log_probs, torch.tensor([3, 2]), torch.empty(2, 0, dtype=torch.long), lengths)
    torch.testing.assert_close(loss, -log_probs[0, 0, 0] * 2.5)
