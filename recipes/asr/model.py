"""The recogniser: log-mel features, a small convolutional front end, torchaudio's Conformer, CTC.

An utterance gets the same result alone and in a batch: every layer sees zeros where a batch is
padded, as it would beyond the end of the utterance itself. torchaudio's Conformer does not offer
that (its convolutions read the padding, its batch norm mixes utterances), so `ConformerCTC`
silences the padding before each depthwise convolution, and normalises each frame alone.

Shapes: B utterances, S samples, F frames of 10 ms, M mel bands, T frames after subsampling,
D the width of the encoder, V the size of the vocabulary.
"""

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torchaudio
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel


class LogMel(nn.Module):
    """Waveforms to log-mel energies, each band with mean 0 and deviation 1 over its utterance.

    Windows of 25 ms every `hop_ms`, centred, so that S samples give `S // hop + 1` frames. Computed
    in fp32 whatever autocast says: power spectra span more than fp16 can hold.
    """

    def __init__(self, sample_rate: int, bands: int = 80, hop_ms: float = 10.0):
        super().__init__()
        window = round(0.025 * sample_rate)
        self.hop = round(hop_ms / 1000 * sample_rate)
        self.mel = torchaudio.transforms.MelSpectrogram(
            sample_rate,
            n_fft=1 << (window - 1).bit_length(),
            win_length=window,
            hop_length=self.hop,
            n_mels=bands,
            f_min=20.0,
            pad_mode="constant",  # zeros at the edges, as in the padding of a batch
        )

    def forward(self, wav: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        """(B, S) and samples (B,) to (B, F, M), zero beyond each utterance, and frames (B,)."""
        with torch.autocast(wav.device.type, enabled=False):
            energies = (self.mel(wav.float()) + 1e-6).log().transpose(1, 2)  # (B, F, M)
        frames = lengths // self.hop + 1
        valid = padding_mask(frames, energies.shape[1]).logical_not().unsqueeze(-1)  # (B, F, 1)
        count = frames.view(-1, 1, 1)
        mean = (energies * valid).sum(1, keepdim=True) / count
        centred = (energies - mean) * valid
        deviation = (centred.square().sum(1, keepdim=True) / count).sqrt()
        return centred / (deviation + 1e-2), frames


class Subsampling(nn.Module):
    """Convolutions of stride 2 in time and frequency: each halves the frames, rounded up."""

    def __init__(self, bands: int, width: int, channels: int = 32, halvings: int = 2):
        super().__init__()
        ins = [1] + [channels] * (halvings - 1)
        self.convs = nn.ModuleList(nn.Conv2d(i, channels, 3, stride=2, padding=1) for i in ins)
        for _ in range(halvings):
            bands = (bands + 1) // 2
        self.project = nn.Linear(channels * bands, width)

    def forward(self, features: Tensor, frames: Tensor) -> tuple[Tensor, Tensor]:
        """(B, F, M) and frames (B,) to (B, T, D) and the frames (B,) that are left."""
        x = features.unsqueeze(1)  # (B, 1, F, M)
        for conv in self.convs:
            x = nn.functional.silu(conv(x))
            frames = (frames + 1) // 2
            x = x.masked_fill(padding_mask(frames, x.shape[2])[:, None, :, None], 0.0)
        return self.project(x.transpose(1, 2).flatten(2)), frames


class FrameNorm(nn.LayerNorm):
    """Layer norm over the channels of (B, D, T): each frame for itself."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.transpose(1, 2)).transpose(1, 2)


class ConformerCTC(nn.Module):
    """Waveforms to log probabilities of CTC over `vocabulary` tokens, token 0 being the blank.

    `encoder` is a Conformer (Gulati et al., 2020) with `input_dim` equal to the width that `front`
    gives; its batch norm is replaced, and its convolutions stop seeing the padding. `augment`
    changes the features in training, (B, M, F) as torchaudio's SpecAugment wants them.
    """

    def __init__(
        self,
        features: LogMel,
        front: Subsampling,
        encoder: torchaudio.models.Conformer,
        vocabulary: int,
        augment: nn.Module | None = None,
    ):
        super().__init__()
        width = front.project.out_features
        self.features = features
        self.augment = augment or nn.Identity()
        self.front = front
        self.encoder = encoder
        self.classify = nn.Linear(width, vocabulary)
        self.grid = features.mel.sample_rate // 2  # waveforms are padded to multiples of it
        for layer in encoder.conformer_layers:
            _, _, depthwise, _, *_ = convolution = layer.conv_module.sequential
            depthwise.register_forward_pre_hook(self._silence)
            convolution[3] = FrameNorm(width)

    def _silence(self, depthwise: nn.Module, inputs: tuple[Tensor]) -> Tensor:
        return inputs[0].masked_fill(self._padding[:, None, :], 0.0)  # (B, D, T)

    def frames(self, samples: Any) -> Any:
        """Return the number of output frames of so many samples: of a number, or of a tensor."""
        frames = samples // self.features.hop + 1
        for _ in self.front.convs:
            frames = (frames + 1) // 2
        return frames

    def frame_times(self) -> tuple[float, float]:
        """Return the middle of the first output frame, and the time to the next, in seconds."""
        features = self.features
        return 0.0, features.hop * 2 ** len(self.front.convs) / features.mel.sample_rate

    def forward(self, wav: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        """(B, S), zero-padded, and samples (B,) to log probabilities (B, T, V) and frames (B,)."""
        # Few different shapes: a CPU prepares its kernels anew for each, a third of a small step.
        wav = nn.functional.pad(wav, (0, -wav.shape[1] % self.grid))
        features, frames = self.features(wav, lengths)
        if self.training:
            features = self.augment(features.transpose(1, 2)).transpose(1, 2)
        x, frames = self.front(features, frames)
        self._padding = padding_mask(frames, x.shape[1])  # (B, T), read by _silence
        x = x.transpose(0, 1)  # (T, B, D)
        with _attention(x.device):
            for layer in self.encoder.conformer_layers:  # not encoder(x): its mask costs a sync
                x = layer(x, self._padding)
        return self.classify(x.transpose(0, 1)).float().log_softmax(-1), frames


def _attention(device: torch.device) -> AbstractContextManager[None]:
    """The fastest attention: on a CPU the plain one, whose backward pass takes half the time."""
    return sdpa_kernel(SDPBackend.MATH) if device.type == "cpu" else nullcontext()


def ctc_loss(log_probs: Tensor, frames: Tensor, tokens: Tensor, lengths: Tensor) -> Tensor:
    """CTC's negative log likelihood (Graves et al., 2006), the mean over utterances.

    An utterance with more tokens than its frames can hold has no path, and an infinite loss: it is
    left out of the mean. None is in training, from which `recipes.asr.data.datasets` leaves them
    out, but valid and test may have some. A loss that is not finite for another reason stays so.

    Args:
        log_probs: log probabilities (B, T, V), on any device.
        frames: valid frames (B,). These and the next are best on the host, where torch needs
            lengths: it would wait for those on a GPU.
        tokens: (B, L), padded.
        lengths: number of tokens (B,).
    """
    targets = tokens.to(log_probs.device, non_blocking=True)
    losses = nn.functional.ctc_loss(
        log_probs.transpose(0, 1), targets, frames, lengths, reduction="none", zero_infinity=True
    )
    repeats = tokens[:, 1:].eq(tokens[:, :-1])
    repeats &= padding_mask(lengths - 1, repeats.shape[1]).logical_not()
    possible = lengths + repeats.sum(1) <= frames
    return losses.sum() / int(possible.sum().clamp(min=1))


def padding_mask(lengths: Tensor, longest: int) -> Tensor:
    """(B,) to (B, longest), true beyond each length."""
    return torch.arange(longest, device=lengths.device) >= lengths.unsqueeze(1)
