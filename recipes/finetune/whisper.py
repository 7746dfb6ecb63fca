"""Whisper: log-mel features of 30 s to text, token by token (Radford et al., 2022)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    AutoModelForSpeechSeq2Seq,
    GenerationConfig,
    GenerationMixin,
    WhisperFeatureExtractor,
)

from recipes.finetune.sources import described, keep, loaded, made, tokenizer_of
from trainer.evaluation import rng_kept

TASKS = ("transcribe", "translate")
GENERATION = "generation_config.json"


class Whisper(nn.Module):
    """Whisper, as it was trained: its own features, tokens and prompt.

    Args:
        source: a local folder or a name on the hub, whose weights are in safetensors.
        kept: folder of the run for the description of the model, as in `PretrainedEncoder`.
        language: code of the language, such as "en"; None for models of English alone.
        task: "transcribe", or "translate" to English; not used without a language.
        freeze_encoder: keep the weights of the encoder.
        longest: tokens of a text that is generated, at most.
        beams: size of the beam; 1 for the likeliest token each time.

    Attributes:
        rate: sample rate, in Hz.
        samples: samples that the model takes, to which shorter utterances are padded.
        prompt: tokens before each text: its start, the language, the task, no time stamps.

    Raises:
        ValueError: the source cannot be used, or its parts do not fit together.
    """

    def __init__(
        self,
        source: str,
        *,
        kept: Path | None = None,
        language: str | None = "en",
        task: str = "transcribe",
        freeze_encoder: bool = False,
        longest: int = 200,
        beams: int = 1,
    ) -> None:
        super().__init__()
        if not isinstance(source, str):
            raise ValueError("source of Whisper must be a folder or a name on the hub")
        self.source, self.kept = source, kept
        self.config, self.extractor = described(source, kept, ("whisper",), WhisperFeatureExtractor)
        _check_frames(source, self.config, self.extractor)
        place = kept if self.described_in_run else None
        self.tokenizer = tokenizer_of(source, place)
        self.prompt = _prompt(source, self.tokenizer, language, task)
        self.model: Any
        with rng_kept():  # What is drawn later is the same with and without the weights.
            if not self.described_in_run:
                self.model = loaded(source, self.config, AutoModelForSpeechSeq2Seq)[0]
            else:
                self.model = made(self.config, AutoModelForSpeechSeq2Seq)
                if place is not None and (Path(place) / GENERATION).is_file():
                    self.model.generation_config = GenerationConfig.from_pretrained(place)
        room = self.config.max_target_positions - len(self.prompt)
        if not 1 <= longest <= room:
            raise ValueError(f"longest is {longest}; the model has room for 1 to {room} tokens")
        self.longest, self.beams = longest, beams
        self.rate: int = self.extractor.sampling_rate
        self.samples: int = self.extractor.n_samples
        self.end: int = self.tokenizer.eos_token_id
        self.model.model.encoder.requires_grad_(not freeze_encoder)
        self.model.model.encoder.embed_positions.requires_grad_(False)  # Sinusoids, as published.

    @property
    def described_in_run(self) -> bool:
        """True if the run folder has the description, and its checkpoints the weights."""
        return self.kept is not None and (Path(self.kept) / "config.json").is_file()

    def keep(self) -> None:
        """Write the description of the model into the run folder."""
        if self.kept is not None:
            self.tokenizer.save_pretrained(self.kept)
            self.model.generation_config.save_pretrained(self.kept)
            keep(Path(self.kept), self.config, self.extractor)

    def load_pretrained(self) -> None:
        """Load the weights of the source, for a training that has no checkpoint yet."""
        with rng_kept():
            model, _ = loaded(self.source, self.config, AutoModelForSpeechSeq2Seq)
        self.model.load_state_dict(model.state_dict())

    def features(self, signal: Tensor) -> Tensor:
        """Return log-mel energies (M, F) of samples (S,), padded to what the model takes.

        Raises:
            ValueError: there are none, or more than the model takes, of which it would hear a part.
        """
        if not 0 < len(signal) <= self.samples + self.rate // 100:  # 10 ms are rounding.
            raise ValueError(
                f"{len(signal)} samples were given; the model takes 1 to {self.samples} "
                f"({self.samples / self.rate:g} s)"
            )
        found = self.extractor(signal.numpy(), sampling_rate=self.rate, return_tensors="pt")
        features: Tensor = found["input_features"][0]
        return features

    def encode(self, text: str) -> list[int]:
        """Return the tokens of a text, with the one that ends it."""
        return [*self.tokenizer.encode(text, add_special_tokens=False), self.end]

    def decode(self, tokens: Sequence[int]) -> str:
        """Return the text of tokens; special ones are left out."""
        return str(self.tokenizer.decode(tokens, skip_special_tokens=True)).strip()

    def forward(self, features: Tensor, tokens: Tensor) -> Tensor:
        """Return scores of each token by those before it (teacher forcing).

        Args:
            features: (B, M, F).
            tokens: (B, L), padded.

        Returns:
            Logits (B, L, V) of ``tokens``.
        """
        prompt = torch.tensor(self.prompt, device=tokens.device).expand(len(tokens), -1)
        given = torch.cat([prompt, tokens[:, :-1]], dim=1)
        logits: Tensor = self.model(input_features=features, decoder_input_ids=given).logits
        return logits[:, len(self.prompt) - 1 :]

    def generate(self, features: Tensor) -> list[list[int]]:
        """Return the tokens of each utterance (B, M, F) behind the prompt, at most ``longest``."""
        tokens: list[list[int]] = (
            self._generated(features).sequences[:, len(self.prompt) :].tolist()
        )
        return tokens

    def recognise(self, features: Tensor) -> list[tuple[list[int], list[float]]]:
        """Return the tokens of each utterance without the end, and the probability of each."""
        found = self._generated(features, output_scores=True)
        log_probs = self.model.compute_transition_scores(
            found.sequences,
            found.scores,
            getattr(found, "beam_indices", None),
            normalize_logits=True,
        )
        rows = found.sequences[:, len(self.prompt) :].tolist()
        heard = []
        for row, scores in zip(rows, log_probs.float().exp().tolist(), strict=True):
            count = row.index(self.end) if self.end in row else len(row)
            heard.append((row[:count], scores[:count]))
        return heard

    @torch.no_grad()
    def _generated(self, features: Tensor, **more: Any) -> Any:
        prompt = torch.tensor(self.prompt, device=features.device).expand(len(features), -1)
        # Not Whisper's own `generate`, which chooses prompts and goes on behind 30 s.
        return GenerationMixin.generate(
            self.model,
            inputs=features,
            attention_mask=torch.ones_like(features[:, 0], dtype=torch.long),  # All of the 30 s.
            decoder_input_ids=prompt,
            max_new_tokens=self.longest,
            do_sample=False,
            num_beams=self.beams,
            eos_token_id=self.end,
            pad_token_id=self.end,
            return_dict_in_generate=True,
            **more,
        )


def _check_frames(source: str, config: Any, extractor: Any) -> None:
    """Raise ValueError if the features do not fit the model in size or number."""
    frames, bands = 2 * config.max_source_positions, config.num_mel_bins
    found, size = extractor.nb_max_frames, extractor.feature_size
    if (frames, bands) != (found, size):
        raise ValueError(
            f"source {source} does not fit together: the model takes {frames} frames of {bands} "
            f"mel bands, and its feature extractor gives {found} of {size}"
        )


def _prompt(source: str, tokenizer: Any, language: str | None, task: str) -> list[int]:
    if task not in TASKS:
        raise ValueError(f"task is {task!r}; allowed: {', '.join(TASKS)}")
    names = ["<|startoftranscript|>"]
    names += [] if language is None else [f"<|{language}|>", f"<|{task}|>"]
    names.append("<|notimestamps|>")
    known = tokenizer.get_vocab()
    if missing := [name for name in names if name not in known]:
        raise ValueError(
            f"the tokenizer of source {source} has no {missing[0]}; language must be a code that "
            "the model knows, such as en, or null for a model of English alone"
        )
    return [known[name] for name in names]
