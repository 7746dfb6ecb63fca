"""The recogniser for other programs: from samples to log probabilities."""

from __future__ import annotations

from types import SimpleNamespace

import torch
from torch import Tensor, nn

from trainer.inference.graphs import Graph, Port

# Of the first utterance, CTC's best path: the blank is token 0.
GREEDY = """
import json

with open("export.json", encoding="utf-8") as file:
    tokens = json.load(file)["settings"]["tokens"]
best = [0, *log_probabilities[0].argmax(-1).tolist()]
print("".join(tokens[now] for before, now in zip(best, best[1:]) if now and now != before))
"""


def graph(modules: nn.ModuleDict, hparams: SimpleNamespace) -> Graph:
    """Return the network of a run: mel features, encoder and log probabilities of CTC."""
    model, rate = modules["model"], hparams.sample_rate

    def example(batch: int, length: int) -> tuple[Tensor, Tensor]:
        generator = torch.Generator().manual_seed(length)
        wav = 0.1 * torch.randn(batch, length, generator=generator)
        lengths = torch.linspace(length, 0.6 * length, batch).long()
        return wav * (torch.arange(length) < lengths[:, None]), lengths

    return Graph(
        module=model,
        inputs=[
            Port("wav", ("batch", "samples"), f"sound at {rate} Hz, -1 to 1, zero beyond its end"),
            Port("lengths", ("batch",), "number of samples of each utterance"),
        ],
        outputs=[
            Port("log_probabilities", ("batch", "frames", len(hparams.codec.tokens)),
                 "natural logarithm of the probability of each token in each frame"),
            Port("frames", ("batch",), "number of frames of each utterance"),
        ],
        example=example,
        lengths=(rate, round(1.7 * rate) + 11),
        about="Sound to log probabilities of CTC's tokens; the mel features are part of it.",
        settings={"sample_rate": rate, "tokens": list(hparams.codec.tokens), "blank": 0},
        after=GREEDY,
    )  # fmt: skip
