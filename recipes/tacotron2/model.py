"""The synthesiser: torchaudio's Tacotron2, several frames to a step, and blind to padding.

The network is that of Shen et al. 2018 (arXiv 1712.05884). `Tacotron` adds around it what training
and synthesis need and torchaudio leaves to its users: batches in any order, mels brought to a mean
near 0, the padding silenced before every convolution, so that an utterance is encoded and refined
alike alone and in a batch, and free-running synthesis that says whether the gate ended it.

``n_frames_per_step`` (the reduction factor r of Tacotron, Wang et al. 2017) may be above 1: the
decoder then takes r frames as one input and gives r as one output, which makes sequences r times
shorter. torchaudio promises 1 alone; its decoder's code is general, and a test holds it to that.

Shapes: B utterances, L symbols of text, F frames of mel, M bands, T = ceil(F / r) decoder steps.
"""

from __future__ import annotations

import warnings
from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torchaudio.models import Tacotron2

from recipes.tacotron2.forcing import can_force, forced
from recipes.tacotron2.recurrence import encoded

GRID = 4  # decoder steps; spectrograms are padded to multiples of it


class Predictions(NamedTuple):
    """Output of teacher forcing. Beyond an utterance's end everything is undefined."""

    mel: Tensor  # (B, T * r, M), in the scale of the network, as are the next and `target`
    refined: Tensor  # (B, T * r, M), by the post-net
    target: Tensor  # (B, T * r, M), what both should be
    gate: Tensor  # (B, T), logits of "this step is the last one"
    attention: Tensor  # (B, T, L), each step's sums to 1


class Spoken(NamedTuple):
    """Output of free-running synthesis."""

    mel: Tensor  # (B, T * r, M), natural logarithm; zero beyond each utterance's end
    frames: Tensor  # (B,), of each utterance
    attention: Tensor  # (B, T, L)
    stopped: Tensor  # (B,), false where the limit ended it and not the gate


class Tacotron(nn.Module):
    """Texts as symbols to log-mel spectrograms.

    Args:
        net: torchaudio's network.
        mean, deviation: of a log-mel value, roughly; the network sees (mel - mean) / deviation.
        forget: the share of steps, in training, that do not see the true frames before them but
            mean ones. The decoder must then read the text, where it could guess a frame from the
            one before (Liu et al. 2019, arXiv 1909.01145, section 2.2).
        blind: in free-running synthesis no step sees the frames before it, but mean ones. What it
            says is then never off for what it said before; it needs a training that forgets.
        rest: outside of training the dropout of the pre-net rests, which in torchaudio, as in the
            paper, it never does.
        drop: the dropout of the encoder's convolutions and of the post-net is at work in training.
            That of the post-net's output, by half, lets it add no more than half of what is
            missing: with x * 2 or 0 in place of x, the squared error to t is least at x = t / 2.
    """

    def __init__(
        self,
        net: Tacotron2,
        mean: float = 0.0,
        deviation: float = 1.0,
        forget: float = 0.0,
        blind: bool = False,
        rest: bool = False,
        drop: bool = True,
    ) -> None:
        super().__init__()
        if not 0.0 <= forget < 1.0:
            raise ValueError(f"forget is {forget}; allowed: a share of steps, from 0 to below 1")
        if blind and not forget:
            raise ValueError("blind is true and forget 0: no step would have learnt to see nothing")
        self.net, self.mean, self.deviation, self.forget = net, mean, deviation, forget
        self.blind, self.rest, self.drop = blind, rest, drop
        self.bands, self.reduction = net.n_mels, net.n_frames_per_step
        self.train()
        net.decoder.prenet.register_forward_hook(self._rested)
        # The post-net begins by adding nothing, not noise (Goyal et al. 2017, arXiv 1706.02677,
        # section 5.1, of residual blocks): that takes it hundreds of steps to unlearn.
        nn.init.zeros_(net.postnet.convolutions[-1][1].weight)
        for layer in net.encoder.convolutions:
            layer[0].register_forward_pre_hook(self._silence_text)
        for layer in net.postnet.convolutions:
            layer[0].register_forward_pre_hook(self._silence_frames)

    def train(self, mode: bool = True) -> Tacotron:
        """Begin or end training."""
        super().train(mode)
        if not self.drop:
            # They ask this of themselves for their dropout; their batch norms ask it of themselves.
            self.net.encoder.training = self.net.postnet.training = False
        return self

    def _rested(self, prenet: nn.Module, inputs: tuple[Tensor], drawn: Tensor) -> Tensor:
        """Return the pre-net's output without dropout where its dropout rests; else ``drawn``."""
        if self.training or not self.rest:
            return drawn
        seen = inputs[0]
        for layer in prenet.layers:
            seen = layer(seen).relu()
        return seen

    def _silence_text(self, _: nn.Module, inputs: tuple[Tensor]) -> Tensor:
        return inputs[0].masked_fill(self._beyond_text, 0.0)  # (B, C, L)

    def _silence_frames(self, _: nn.Module, inputs: tuple[Tensor]) -> Tensor:
        return inputs[0].masked_fill(self._beyond_frames, 0.0)  # (B, C, T * r)

    def steps(self, frames: Tensor) -> Tensor:
        """Return the number of decoder steps of so many frames."""
        return (frames + self.reduction - 1) // self.reduction

    def forward(
        self,
        tokens: Tensor,
        symbols: Tensor,
        mel: Tensor,
        frames: Tensor,
        known: Tensor | None = None,
    ) -> Predictions:
        """Teacher forcing: each step sees the true frames before it.

        Args:
            tokens: (B, L), padded.
            symbols: their number (B,).
            mel: log-mels (B, F, M), padded.
            frames: their number (B,).
            known: ``symbols`` on the host, if they are elsewhere: torch needs them there, and would
                wait for them.
        """
        # Few different lengths: a CPU prepares its kernels anew for each.
        mel = nn.functional.pad(mel, (0, 0, 0, -mel.shape[1] % (GRID * self.reduction)))
        target = (mel - self.mean) / self.deviation
        order = symbols.argsort(descending=True, stable=True)  # as torchaudio's packing wants it
        memory = self._encode(tokens[order], symbols[order], known)
        # The decoder folds r frames into one by a view, for which frames must lie before bands.
        teacher = self._remembered(target[order]).contiguous().transpose(1, 2)
        force = forced if can_force(self.net.decoder) else type(self.net.decoder).forward
        coarse, gate, attention = force(self.net.decoder, memory, teacher, symbols[order])
        refined = self._refine(coarse, frames[order])
        back = order.argsort()
        found = (coarse.transpose(1, 2), refined.transpose(1, 2), target[order], gate, attention)
        return Predictions(*(each[back] for each in found))

    def _remembered(self, target: Tensor) -> Tensor:
        """Return the decoder's inputs (B, T * r, M); training blanks the frames of some steps."""
        if not (self.training and self.forget):
            return target
        steps = target.shape[1] // self.reduction
        kept = torch.rand(len(target), steps, 1, device=target.device) >= self.forget
        return target * kept.repeat_interleave(self.reduction, 1)

    @torch.no_grad()
    def synthesise(self, tokens: Tensor, symbols: Tensor, limit: int) -> Spoken:
        """Synthesise freely: each step sees the output of the last one, until the gate opens.

        At most ``limit`` frames are made. The dropout, which never rests, draws from the global
        generator.
        """
        decoder = self.net.decoder
        decoder.decoder_max_step = -(-limit // self.reduction)
        order = symbols.argsort(descending=True, stable=True)
        memory = self._encode(tokens[order], symbols[order])
        with self._blindfold(), warnings.catch_warnings():  # `stopped` tells it.
            warnings.filterwarnings("ignore", message="Reached max decoder steps")
            coarse, steps, gate, attention = decoder.infer(memory, symbols[order])
        # As torchaudio's own `infer` undoes how the decoder flattens it: (L, T * B) to (B, T, L).
        attention = attention.unflatten(1, (-1, len(order))).permute(2, 1, 0)
        steps = steps.long()
        last = gate.gather(1, steps.unsqueeze(1) - 1).squeeze(1)
        stopped = last.float().sigmoid() > decoder.gate_threshold
        frames = steps * self.reduction
        refined = self._refine(coarse, frames).float().masked_fill(self._beyond_frames, 0.0)
        mel = refined * self.deviation + self.mean
        mel = mel.masked_fill(self._beyond_frames, 0.0).transpose(1, 2)
        back = order.argsort()
        return Spoken(*(each[back] for each in (mel, frames, attention.float(), stopped)))

    def _blindfold(self) -> AbstractContextManager[object]:
        """While this lasts, with `blind`, the pre-net sees mean frames."""
        if not self.blind:
            return nullcontext()
        prenet = self.net.decoder.prenet
        return prenet.register_forward_pre_hook(lambda _, seen: (torch.zeros_like(seen[0]),))

    def _encode(self, tokens: Tensor, symbols: Tensor, known: Tensor | None = None) -> Tensor:
        """(B, L), the longest first, to the memory (B, L, C) that the attention reads.

        ``known`` are the ``symbols`` on the host, in any order.
        """
        self._beyond_text = padding_mask(symbols, tokens.shape[1]).unsqueeze(1)
        embedded = self.net.embedding(tokens).transpose(1, 2)
        if tokens.device.type == "cpu":
            return encoded(self.net.encoder, embedded, symbols)
        lengths = symbols if known is None else known.sort(descending=True).values
        read: Tensor = self.net.encoder(embedded, lengths)
        return read

    def _refine(self, coarse: Tensor, frames: Tensor) -> Tensor:
        """(B, M, T * r) with what the post-net adds."""
        self._beyond_frames = padding_mask(frames, coarse.shape[2]).unsqueeze(1)
        return coarse + self.net.postnet(coarse)


def padding_mask(lengths: Tensor, longest: int) -> Tensor:
    """(B,) to (B, longest), true beyond each length."""
    return torch.arange(longest, device=lengths.device) >= lengths.unsqueeze(1)
