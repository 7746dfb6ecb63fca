"""Every clip kind against its paper's formula in float64 numpy, in 100 random cases."""

import math
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from trainer import clipping

from .clipping_kinds import bind, clipped

Array = np.ndarray[Any, Any]
Arrays = list[Array]
# Maps a step's gradients and weights to the clipped gradients.
Rule = Callable[[Arrays, Arrays], Arrays]
Case = tuple[Any, Rule]

CASES, STEPS = 100, 5


def size(grads: Arrays, p: float = 2.0) -> float:
    """Return the joint p-norm."""
    flat = np.concatenate([np.abs(g).reshape(-1) for g in grads])
    return float(flat.max()) if p == math.inf else float((flat**p).sum() ** (1 / p))


def down(grads: Arrays, c: float, p: float = 2.0, eps: float = 1e-6) -> Arrays:
    """Return g · min(1, c / (‖g‖ + ε))."""
    return [g * min(1.0, c / (size(grads, p) + eps)) for g in grads]


# --- one function for each kind: random hyperparameters, the clipper, and the formula -----


def norm(r: np.random.Generator) -> Case:
    c, p = float(r.uniform(0.5, 5)), float(r.choice([1.0, 2.0, 3.5, math.inf]))
    return clipping.NormClip(c, p), lambda grads, _: down(grads, c, p)


def value(r: np.random.Generator) -> Case:
    c = float(r.uniform(0.1, 2))
    return clipping.ValueClip(c), lambda grads, _: [np.clip(g, -c, c) for g in grads]


def layer(r: np.random.Generator) -> Case:
    c = float(r.uniform(0.5, 3))
    return clipping.LayerClip(c), lambda grads, _: [down([g], c)[0] for g in grads]


def pattern(r: np.random.Generator) -> Case:
    bias, rest = float(r.uniform(0.2, 2)), float(r.uniform(0.5, 5))

    def rule(grads: Arrays, _: Arrays) -> Arrays:
        out = list(grads)
        out[0::2], out[1::2] = down(grads[0::2], rest), down(grads[1::2], bias)
        return out

    return clipping.PatternClip({"*.bias": bias, "layer?.*": rest}), rule


def gradual(r: np.random.Generator) -> Case:
    start, stop = float(r.uniform(2, 5)), float(r.uniform(0.5, 1.5))
    first, last = int(r.integers(0, 3)), int(r.integers(3, 6))
    shape = str(r.choice(["linear", "cosine", "stepwise"]))
    t = iter(range(STEPS))

    def rule(grads: Arrays, _: Arrays) -> Arrays:
        x = min(max((next(t) - first) / (last - first), 0.0), 1.0)
        mixed = {"linear": x, "cosine": 0.5 - 0.5 * math.cos(math.pi * x), "stepwise": x // 1}
        return down(grads, start + (stop - start) * mixed[shape])

    return clipping.GradualClip({first: start, last: stop}, shape), rule


def mixed(r: np.random.Generator) -> Case:
    c, v = float(r.uniform(0.5, 3)), float(r.uniform(0.1, 1))
    kinds = [clipping.LayerClip(c), clipping.ValueClip(v), clipping.NormClip(c, math.inf)]
    order = r.permutation(3)
    rules: list[Callable[[Arrays], Arrays]] = [
        lambda grads: [down([g], c)[0] for g in grads],
        lambda grads: [np.clip(g, -v, v) for g in grads],
        lambda grads: down(grads, c, math.inf),
    ]

    def rule(grads: Arrays, _: Arrays) -> Arrays:
        for i in order:
            grads = rules[i](grads)
        return grads

    return clipping.MixedClip([kinds[i] for i in order]), rule


def auto(r: np.random.Generator) -> Case:
    """Percentile of all norms, the current one included (arXiv 2007.14469, section 3)."""
    p, room, history = float(r.uniform(0, 100)), int(r.integers(2, 12)), []

    def rule(grads: Arrays, _: Arrays) -> Arrays:
        history.append(size(grads))
        return down(grads, float(np.percentile(history[-room:], p)), eps=0.0)

    return clipping.AutoClip(p, room), rule


def median(r: np.random.Generator) -> Case:
    scale, room, history = float(r.uniform(0.5, 2)), int(r.integers(2, 12)), []

    def rule(grads: Arrays, _: Arrays) -> Arrays:
        history.append(size(grads))
        return down(grads, scale * float(np.median(history[-room:])), eps=0.0)

    return clipping.MedianClip(scale, room), rule


def z(r: np.random.Generator) -> Case:
    """Reciprocal clipping (arXiv 2504.02507, algorithm 1)."""
    alpha, threshold, warm = float(r.uniform(0.5, 0.99)), float(r.uniform(0.2, 2)), 3
    first: list[float] = []
    state = [0.0, 0.0]

    def rule(grads: Arrays, _: Arrays) -> Arrays:
        n = size(grads)
        if len(first) < warm:
            first.append(n)
            state[:] = [float(np.mean(first)), float(np.var(first))]
            return grads
        mean, deviation = state[0], math.sqrt(state[1])
        score = (n - mean) / (deviation + 1e-6)
        if score > threshold:
            n = mean + threshold * deviation / (score / threshold)
        state[0] = alpha * mean + (1 - alpha) * n
        state[1] = alpha * state[1] + (1 - alpha) * (n - state[0]) ** 2
        return down(grads, n, eps=0.0)

    return clipping.ZClip(threshold, alpha, warm), rule


def adagc(r: np.random.Generator) -> Case:
    """Moving average of each tensor's norm (arXiv 2502.11034, algorithm 1)."""
    beta, relative = float(r.uniform(0.5, 0.99)), float(r.uniform(0.8, 1.2))
    absolute, warm = float(r.uniform(0.5, 3)), int(r.integers(1, 4))
    seen: list[int] = []
    gamma: list[float] = []

    def rule(grads: Arrays, _: Arrays) -> Arrays:
        seen.append(1)
        if len(seen) <= warm:
            out = down(grads, absolute, eps=0.0)
            gamma[:] = [
                min(a, size([g])) for a, g in zip(gamma or [math.inf] * 9, out, strict=False)
            ]
            return out
        out = [down([g], relative * a, eps=0.0)[0] for g, a in zip(grads, gamma, strict=True)]
        gamma[:] = [beta * a + (1 - beta) * size([g]) for a, g in zip(gamma, out, strict=True)]
        return out

    return clipping.AdaGC(beta, relative, absolute, warm), rule


def agc(r: np.random.Generator) -> Case:
    """Ratio of gradient to weight norm of each unit (arXiv 2102.06171, equation 3)."""
    share, eps = float(10 ** r.uniform(-2, 1)), float(10 ** r.uniform(-3, 0))

    def rule(grads: Arrays, weights: Arrays) -> Arrays:
        out = []
        for g, w in zip(grads, weights, strict=True):
            rows, weight_rows = (g, w) if g.ndim > 1 else (g.reshape(1, -1), w.reshape(1, -1))
            found = []
            for row, weight in zip(rows, weight_rows, strict=True):
                length, least = size([row]), max(size([weight]), eps)
                clips = length / least > share
                found.append(row * share * least / max(length, 1e-6) if clips else row)
            out.append(np.stack(found).reshape(g.shape))
        return out

    return clipping.AGC(share, eps), rule


def spam(r: np.random.Generator) -> Case:
    """Second moment of Adam with β₂ = 0.9 (arXiv 2501.06842, equation 2)."""
    theta, warm = float(r.uniform(0.5, 10)), int(r.integers(0, 3))
    moments: Arrays = []
    seen: list[int] = []

    def rule(grads: Arrays, _: Arrays) -> Arrays:
        seen.append(1)
        known = moments or [np.zeros_like(g) for g in grads]
        out = [
            np.where((g**2 > theta * v) & (v > 0), np.sign(g) * np.sqrt(theta * v), g)
            if len(seen) > warm
            else g
            for g, v in zip(grads, known, strict=True)
        ]
        moments[:] = [0.9 * v + 0.1 * g**2 for g, v in zip(out, known, strict=True)]
        return out

    return clipping.SPAM(theta, warm), rule


GOLDEN = [norm, value, layer, pattern, gradual, mixed, auto, median, z, adagc, agc, spam]


def test_every_kind_has_a_formula_here() -> None:
    made = {type(kind(np.random.default_rng(0))[0]).__name__ for kind in GOLDEN}
    kinds = {name for name, each in vars(clipping).items() if isinstance(each, type)}
    assert made == kinds - {"Clip", "Clipper", "Gradients"}
    assert len(made) == 12


def steps(r: np.random.Generator) -> Iterator[Arrays]:
    """Yield gradients of a few tensors for a few steps, whose scale changes between steps."""
    shapes = [(5, 3), (5,), (2, 3, 2), (), (20, 60), (7,)][: int(r.integers(2, 7))]
    for _ in range(STEPS):
        scale = np.exp(r.normal(0, 1))
        yield [
            np.asarray(r.normal(0, 1, shape) * scale * np.exp(r.normal(0, 1)), np.float32)
            for shape in shapes
        ]


@pytest.mark.parametrize("kind", GOLDEN)
def test_a_hundred_random_cases_are_as_the_formula_says(
    kind: Callable[[np.random.Generator], Case],
) -> None:
    changed = compared = 0
    for number in range(CASES):
        r = np.random.default_rng(number)
        clip, rule = kind(r)
        data = list(steps(r))
        params = [nn.Parameter(torch.from_numpy(np.array(g * r.uniform()))) for g in data[-1]]
        optimizer = torch.optim.Adam(params, lr=0.0, betas=(0.9, 0.9))
        bind(clip, params, optimizer)
        weights = [p.detach().double().numpy() for p in params]
        for grads in data:
            truth = rule([np.asarray(g, np.float64) for g in grads], weights)
            gradients, told = clipped(clip, optimizer, [torch.from_numpy(g) for g in grads])
            for tensor, expected, before in zip(gradients.tensors, truth, grads, strict=True):
                mine = tensor.double().numpy()
                room = 1e-6 * (np.abs(expected) + np.abs(expected).max())
                assert (np.abs(mine - expected) <= room).all()
                changed += not np.array_equal(mine, before)
                compared += 1
            assert told == any(
                not np.array_equal(t.numpy(), g)
                for t, g in zip(gradients.tensors, grads, strict=True)
            )
            assert gradients.norm == pytest.approx(size([g.astype(float) for g in grads]), rel=1e-6)
            if gradients.norm_after is not None:
                assert gradients.norm_after == pytest.approx(size(truth), rel=1e-5)
            optimizer.step()
    assert compared > 100 * STEPS * 3
    assert 0.1 * compared < changed < 0.98 * compared  # Both sides of each rule are covered.
