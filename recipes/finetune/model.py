"""Pretrained speech encoders of transformers, on batches of waveforms.

    encoder = PretrainedEncoder("facebook/wav2vec2-base")
    features, frames = encoder(wavs, lengths)  # (B, T, D), (B,)

Shapes: B utterances, S samples, T frames, D the size of a feature.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from recipes.asr.model import padding_mask
from recipes.finetune.sources import described, keep, loaded, made
from trainer.evaluation import rng_kept

# Models of transformers that take waveforms through convolutions and give a frame per stride.
# Not data2vec-audio: its positional convolutions read each other's padding, and have no mask.
KINDS = ("hubert", "unispeech", "unispeech-sat", "wav2vec2", "wavlm")

EPSILON = 1e-7  # beside the variance of a waveform, as in the feature extractor


class PretrainedEncoder(nn.Module):
    """Encoder of waveforms: wav2vec 2.0, HuBERT, WavLM and their relatives.

    Waveforms are prepared as the model's own feature extractor says: its rate, mean 0 and deviation
    1 over the samples of each utterance (never over padding), and an attention mask where the
    extractor has one. Where it has none (wav2vec2-base, HuBERT-base), the model was trained on
    zeros behind each utterance, and gets these.

    Args:
        source: a local folder or a name on the hub, whose weights are in safetensors; or a mapping,
            the configuration of a model with random weights (``{"model_type": "wav2vec2", …}``).
        network: such a mapping, for a ``source`` of None.
        kept: folder of the run for the description of the model, which `keep` writes. Where it is
            there, the model is built from it alone, and without weights: these are in the
            checkpoints of the run, and neither the source nor the hub is needed.
        freeze_front: keep the weights of the convolutional front end.
        layer_drop: probability of leaving out a layer in training (Fan et al., 2020); None for the
            model's own. The authors of wav2vec 2.0 fine-tune with 0.1.
        time_masking: share of the frames that begin a masked span in training: p in Baevski et al.
            (2020), section 4.2, who take 0.05 for 100 hours and more, and 0.075 for one or less.
        time_span: frames of a masked span.
        channel_masking: share of the channels that begin a span of zeros in training; 0.004 to
            0.008 in the same paper.
        channel_span: channels of such a span.
        layers: "last" for the features of the last layer, "weighted" for a learned mean of all
            (Yang et al., 2021), which takes no ``layer_drop``.

    Attributes:
        size: D.
        rate: sample rate of the waveforms, in Hz.
        hop: samples from one frame to the next.
        shortest: samples of the first frame, which every utterance must have.
        model: the model of transformers.
        masked: the model gets attention masks.
        normalises_over_time: a group norm in the front end takes mean and deviation over the whole
            padded signal: features depend on the padding, whatever the mask.
        reads_padding: features depend on the padding, for that or for want of attention masks.

    Raises:
        ValueError: the source cannot be used; the message says why.
    """

    def __init__(
        self,
        source: str | Mapping[str, Any] | None,
        *,
        network: Mapping[str, Any] | None = None,
        kept: Path | None = None,
        freeze_front: bool = True,
        layer_drop: float | None = None,
        time_masking: float = 0.05,
        time_span: int = 10,
        channel_masking: float = 0.0,
        channel_span: int = 64,
        layers: Literal["last", "weighted"] = "last",
    ) -> None:
        super().__init__()
        if layers not in ("last", "weighted"):
            raise ValueError(f"layers is {layers!r}; allowed: last, weighted")
        for name, value in (("time_masking", time_masking), ("channel_masking", channel_masking)):
            if not 0 <= value < 1:
                raise ValueError(f"{name} is {value}; allowed: a share from 0 to 1")
        if min(time_span, channel_span) < 1:
            raise ValueError("time_span and channel_span must be at least 1")
        if layers == "weighted" and layer_drop:
            raise ValueError("a weighted mean of layers needs all of them: set layer_drop to 0")
        source = network if source is None else source
        if source is None:
            raise ValueError("source is null; allowed: a folder, a name on the hub, or a network")
        self.source, self.kept = source, kept
        config, extractor = described(source, kept, KINDS)
        if channel_masking and channel_span > config.hidden_size:
            raise ValueError(
                f"channel_span is {channel_span}; the model has {config.hidden_size} channels: "
                "take a shorter span, or set channel_masking to 0"
            )
        if min(*config.conv_kernel, *config.conv_stride) < 1:
            raise ValueError(
                f"the front end of the model has kernels {[*config.conv_kernel]} and strides "
                f"{[*config.conv_stride]}; allowed: at least 1"
            )
        if layers == "weighted":
            layer_drop = 0.0
        if layer_drop is not None:
            config.layerdrop = layer_drop
        # What is masked is drawn here; the model has the embedding of masked frames for it.
        config.mask_time_prob = max(config.mask_time_prob, time_masking)
        config.mask_feature_prob = channel_masking * channel_span
        config.mask_feature_length = channel_span
        config.mask_feature_min_masks = 0
        config.apply_spec_augment = True
        config.add_adapter = False  # It would shorten the frames without regard to the mask.
        self.model = self._built(config)
        self.freeze_front = freeze_front
        self.model.feature_extractor.requires_grad_(not freeze_front)
        self.train(self.training)
        self.extractor, self.config = extractor, config
        self.time_masking, self.time_span = time_masking, time_span
        self.size: int = config.hidden_size
        self.rate: int = extractor.sampling_rate
        self.masked = bool(extractor.return_attention_mask)
        self.normalises_over_time = getattr(config, "feat_extract_norm", "layer") == "group"
        self.reads_padding = self.normalises_over_time or not self.masked
        self.strides = list(zip(config.conv_kernel, config.conv_stride, strict=True))
        self.hop = math.prod(config.conv_stride)
        self.shortest = self._samples_of_a_frame()
        count = config.num_hidden_layers + 1
        self.weights = nn.Parameter(torch.zeros(count)) if layers == "weighted" else None

    @property
    def described_in_run(self) -> bool:
        """True if the run folder has the description, and its checkpoints the weights."""
        return self.kept is not None and (Path(self.kept) / "config.json").is_file()

    def keep(self) -> None:
        """Write the description of the model into the run folder."""
        if self.kept is not None:
            keep(Path(self.kept), self.config, self.extractor)

    def load_pretrained(self) -> None:
        """Load the weights of the source, for a training that has no checkpoint yet."""
        if isinstance(self.source, str):
            with rng_kept():
                self.model.load_state_dict(loaded(self.source, self.config)[0].state_dict())

    def _built(self, config: Any) -> Any:
        if not isinstance(self.source, str):
            return made(config)
        with rng_kept():  # What is drawn later is the same with and without the weights.
            return made(config) if self.described_in_run else loaded(self.source, config)[0]

    def _samples_of_a_frame(self) -> int:
        samples = 1
        for kernel, stride in reversed(self.strides):
            samples = (samples - 1) * stride + kernel
        return int(samples)

    def train(self, mode: bool = True) -> PretrainedEncoder:
        """Set the mode; a frozen front end stays in evaluation, and keeps no activations."""
        super().train(mode)
        if self.freeze_front:
            self.model.feature_extractor.eval()
        return self

    def frames(self, samples: Any) -> Any:
        """Return the number of frames of so many samples: of a number, or of a tensor."""
        for kernel, stride in self.strides:
            samples = (samples - kernel) // stride + 1
        return samples

    def forward(
        self, wavs: Tensor, lengths: Tensor, masked: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Return features of waveforms.

        Args:
            wavs: (B, S), zero-padded, at ``rate``.
            lengths: samples (B,).
            masked: frames (B, T) to mask; None for none, and in training for random spans.

        Returns:
            Features (B, T, D), zero beyond each utterance, and frames (B,).

        Raises:
            ValueError: an utterance is shorter than a frame. Of lengths on a GPU only the longest
                is looked at, as `check_lengths` of a dataset looks at all.
        """
        samples = int(lengths.min()) if lengths.device.type == "cpu" else wavs.shape[1]
        if samples < self.shortest:
            raise ValueError(
                f"an utterance has {samples} samples; a frame of the model takes {self.shortest} "
                f"({1000 * self.shortest / self.rate:g} ms): leave out what is shorter"
            )
        padding = padding_mask(lengths, wavs.shape[1])
        if self.extractor.do_normalize:
            wavs = normalised(wavs, lengths, padding)
        else:
            wavs = wavs.masked_fill(padding, 0.0)
        frames = self.frames(lengths)
        beyond = padding_mask(frames, self.frames(wavs.shape[1]))  # (B, T)
        if masked is None and self.training and self.time_masking > 0:
            masked = drawn_spans(frames, beyond, self.time_masking, self.time_span)
        found = self.model(
            wavs,
            attention_mask=padding.logical_not().long() if self.masked else None,
            mask_time_indices=masked,
            output_hidden_states=self.weights is not None,
        )
        features = found.last_hidden_state
        if self.weights is not None:
            every = torch.stack(list(found.hidden_states))  # (L, B, T, D)
            features = torch.einsum("l,lbtd->btd", self.weights.softmax(0), every)
        return features.masked_fill(beyond.unsqueeze(-1), 0.0), frames


def normalised(wavs: Tensor, lengths: Tensor, padding: Tensor) -> Tensor:
    """Waveforms (B, S) with mean 0 and deviation 1 over their samples; zero where padded."""
    count = lengths.unsqueeze(1)
    wavs = wavs.masked_fill(padding, 0.0)
    centred = (wavs - wavs.sum(1, keepdim=True) / count).masked_fill(padding, 0.0)
    variance = centred.square().sum(1, keepdim=True) / count
    return centred / (variance + EPSILON).sqrt()


def drawn_spans(frames: Tensor, beyond: Tensor, share: float, span: int) -> Tensor:
    """Draw which frames (B, T) are masked: spans that begin at a share of each utterance's frames.

    The number of spans is rounded at random. They may overlap, and lie whole within the utterance,
    unless that is shorter. Nothing waits for the device.
    """
    count = (share * frames + torch.rand(frames.shape, device=frames.device)).floor().unsqueeze(1)
    ends = padding_mask((frames - span + 1).clamp(min=1), beyond.shape[1])
    draws = torch.rand(beyond.shape, device=beyond.device).masked_fill(ends, 2.0)
    begins = (draws.argsort(1).argsort(1) < count) & ends.logical_not()
    reach = nn.functional.pad(begins.float().unsqueeze(1), (span - 1, 0))
    masked: Tensor = nn.functional.max_pool1d(reach, span, stride=1).squeeze(1) > 0
    return masked & beyond.logical_not()
