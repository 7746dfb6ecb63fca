"""Synthetic tasks whose difficulty is known: each a list of batches, the same for the same seed."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import one_hot

Batches = list[tuple[Tensor, Tensor]]

CLASSES = 4  # of `recall`: a guess is right one time in four
NOISE = 0.03  # of its inputs after the first
WORDS = 12  # of `language`
INPUTS, GROUPS = 16, 8  # of `groups`


def recall(length: int, number: int, seed: int, size: int = 32) -> Batches:
    """Recall task: name the first of four symbols after ``length`` − 1 steps of noise.

    Inputs (B, T, 4), targets (B,). The gradient must come through all steps, as in the latching
    problems of Bengio et al. 1994 and Pascanu et al. 2013 (arXiv 1211.5063).
    """
    generator = torch.Generator().manual_seed(seed)
    batches = []
    for _ in range(number):
        targets = torch.randint(CLASSES, (size,), generator=generator)
        inputs = NOISE * torch.randn(size, length, CLASSES, generator=generator)
        inputs[:, 0] = 2.0 * one_hot(targets, CLASSES)
        batches.append((inputs, targets))
    return batches


def language(length: int, number: int, seed: int, size: int = 16) -> Batches:
    """Sentences in which two words decide the next one, nine times in ten.

    Inputs and targets (B, T), the targets one word later. The grammar is the same for all seeds.
    A model that knows it has a loss of about 0.53 nats a word, one that knows nothing 2.48.
    """
    grammar = torch.Generator().manual_seed(0)
    rule = torch.randint(WORDS, (WORDS, WORDS), generator=grammar)
    generator = torch.Generator().manual_seed(seed)
    sentences = torch.randint(WORDS, (number * size, length + 1), generator=generator)
    lawful = torch.rand(number * size, length + 1, generator=generator) < 0.9
    for place in range(2, length + 1):
        told = rule[sentences[:, place - 2], sentences[:, place - 1]]
        sentences[:, place] = torch.where(lawful[:, place], told, sentences[:, place])
    return [(part[:, :-1], part[:, 1:]) for part in sentences.split(size)]


def groups(number: int, seed: int, size: int = 32) -> Batches:
    """Points (B, 16) of eight classes, told apart by a fixed random network; targets (B,)."""
    teacher = torch.Generator().manual_seed(0)
    first = torch.randn(INPUTS, 32, generator=teacher)
    second = torch.randn(32, GROUPS, generator=teacher)
    generator = torch.Generator().manual_seed(seed)
    batches = []
    for _ in range(number):
        points = torch.randn(size, INPUTS, generator=generator)
        batches.append((points, (torch.tanh(points @ first / 2) @ second).argmax(1)))
    return batches


def spoilt(batches: Batches, steps: list[int], factor: float, seed: int) -> Batches:
    """Return the batches with inputs ``factor`` times as large and wrong targets at these steps.

    A broken file does as much to a batch.
    """
    generator = torch.Generator().manual_seed(seed)
    found = list(batches)
    for step in steps:
        inputs, targets = found[step]
        found[step] = (
            inputs * factor,
            targets[torch.randperm(len(targets), generator=generator)],
        )
    return found
