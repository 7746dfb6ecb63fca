"""From a loss to a step: the one place that moves weights.

    scale → backward → (window full?) → unscale → measure → guard → clip → step → scaler update
    → schedule → zero → StepReport

Measuring comes before clipping: clipping first turns one infinity into zeros everywhere and one NaN
into NaN everywhere. Nothing moves before everything about the step is known, on every rank.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from trainer import distributed
from trainer.clipping import Gradients
from trainer.distributed.replicate import sum_gradients
from trainer.metrics import Outcome, StepReport
from trainer.optim.update import Update

# An fp16 scale this low cannot be what made a gradient overflow.
LOWEST_SCALE = 1.0


def optimize(
    updates: Sequence[Update],
    loss: Tensor,
    weight: float = 1.0,
    retain_graph: bool = False,
    last: bool = False,
) -> list[StepReport]:
    """Take a loss back through the graph and, where that fills the window, step.

    Args:
        updates: the optimizers that this loss trains, usually one. Several step together or not
            at all.
        loss: a scalar, the mean over what ``weight`` counts.
        weight: how many examples the mean is over: the share of this batch in its window. A batch
            of weight 0 gives nothing, whatever its loss.
        retain_graph: keep the graph for a second backward pass.
        last: close the window even if it is not full.
    """
    accumulate(updates, loss, weight, retain_graph)
    return finish(updates, weight, last)


def accumulate(
    updates: Sequence[Update], loss: Tensor, weight: float, retain_graph: bool = False
) -> None:
    """Take a loss back through the graph: its gradients join those of the window."""
    lead = updates[0]
    _check(loss, weight, lead.name)
    reference = lead.window.reference if lead.window.weight else weight
    share = weight / reference if weight else 0.0
    for update in updates:
        update.open()
    if weight:
        scaled = lead.scaler.scale(loss if share == 1.0 else loss * share)
        _differentiate(updates, scaled, retain_graph)
    loss = loss.detach()
    if loss.dtype.itemsize < 4:
        loss = loss.float()  # Half precision is for networks, not for sums.
    for update in updates:
        update.add(loss, weight, reference)


def finish(updates: Sequence[Update], weight: float, last: bool = False) -> list[StepReport]:
    """Step if the window is full."""
    lead = updates[0]
    if lead.window.count < lead.size and not last:
        return [update.report("accumulated", weight=weight) for update in updates]
    return close(updates)


def _differentiate(updates: Sequence[Update], scaled: Tensor, retain_graph: bool) -> None:
    """Backward into the parameters of these optimizers, and of no other."""
    name, inputs = updates[0].name, None
    if len(updates) > 1 or not updates[0].alone:
        inputs = [p for update in updates for p in update.params]
        if not inputs:
            raise ValueError(
                f"optimize({name!r}): no parameter of this optimizer requires a gradient; is it "
                "within frozen()?"
            )
    try:
        scaled.backward(retain_graph=retain_graph, inputs=inputs)
    except RuntimeError as error:
        if "modified by an inplace operation" not in str(error):
            raise
        raise ValueError(
            f"optimize({name!r}): the graph of this loss holds weights that another optimizer has "
            "moved since. Compute the loss after that step, or give both losses in one call, "
            f"optimize({{…: …, {name!r}: loss}}), which steps after both backward passes"
        ) from error


def close(updates: Sequence[Update]) -> list[StepReport]:
    """Step with what the window holds: measure, guard, clip, move. One host-device sync."""
    scaler = updates[0].scaler
    facts = _join_ranks(updates) if distributed.world_size() > 1 else None
    factor, unscaled = _unscale(updates)
    gradients = [Gradients(u.optimizer.param_groups, u.clip) for u in updates]
    loss, weight, scale = _read(updates, gradients, factor, facts)
    for update, grads in zip(updates, gradients, strict=True):
        update.seen = grads.params, grads.norms
    if not math.isfinite(loss) or weight <= 0:
        return _refuse(updates, "skipped", weight=weight, scale=scale)
    if not any(grads.tensors for grads in gradients):
        raise ValueError(
            f"the loss given to optimize({updates[0].name!r}) reaches none of this optimizer's "
            "parameters: is it another optimizer's loss, or was something detached?"
        )
    for update, grads in zip(updates, gradients, strict=True):
        if update.skip_nonfinite_grads and not grads.finite:
            grads.keep([math.isfinite(norm) for norm in grads.norms])
    nothing = not any(grads.tensors for grads in gradients)
    if nothing or not all(grads.finite for grads in gradients):
        overflow = scaler.is_enabled() and scale > LOWEST_SCALE
        outcome: Outcome = "overflowed" if overflow else "skipped"
        return _refuse(updates, outcome, loss=loss, weight=weight, scale=scale)
    reports = [u.step(g, loss, weight, scale) for u, g in zip(updates, gradients, strict=True)]
    if unscaled:
        scaler.update()
    return reports


def _unscale(updates: Sequence[Update]) -> tuple[list[Tensor], bool]:
    """Divide gradients by the fp16 scale; returns it (if any) and whether anything was divided."""
    scaler, unscaled = updates[0].scaler, False
    if not scaler.is_enabled():
        return [], False
    assert updates[0].window.loss is not None
    # Asked for first: a scaler that has not scaled yet does not have its scale either.
    scale = scaler.scale(torch.ones((), device=updates[0].window.loss.device))
    for update in updates:
        if any(p.grad is not None for p in update.params):
            scaler.unscale_(update.optimizer)
            unscaled = True
    return [scale], unscaled


def _join_ranks(updates: Sequence[Update]) -> Tensor:
    """Sum the gradients over ranks; returns (2 + P,): loss, weight, ranks with each gradient."""
    window = updates[0].window
    params = [p for update in updates for p in update.params]
    if window.loss is None:  # This rank has nothing to give, and says so by a weight of 0.
        window.loss = torch.zeros((), device=params[0].device)
    loss = window.loss * window.reference
    facts = torch.stack([loss, loss.new_full((), window.weight)])
    sparse = set[Tensor]().union(*(update.sparse for update in updates))
    return torch.cat(sum_gradients(params, window.reference, facts, sparse))


def _read(
    updates: Sequence[Update],
    gradients: list[Gradients],
    scale: list[Tensor],
    facts: Tensor | None,
) -> tuple[float, float, float]:
    """Fetch what the host must know in one sync: mean loss, weight of the window, fp16 scale."""
    window = updates[0].window
    assert window.loss is not None
    vectors = [window.loss.reshape(1), *(each.reshape(1) for each in scale)]
    takers: list[tuple[Callable[[list[float]], None], int]] = []
    weight, factor = window.weight, window.reference / (window.weight or 1.0)
    for grads in gradients:
        measured = grads.measure(factor if facts is None else 1.0 / facts[1])
        vectors += measured
        takers.append((grads.take, sum(map(len, measured))))
    for update in updates:
        if update.look is not None and update.look.waiting is not None:
            vectors.append(update.look.waiting)
            takers.append((update.look.take, len(update.look.waiting)))
    if facts is not None:
        vectors.append(facts)
    device = window.loss.device
    if any(vector.device != device for vector in vectors):
        vectors = [vector.to(device) for vector in vectors]
    values = torch.cat(vectors).tolist()  # The host-device sync of the step.
    start = 1 + len(scale)
    for take, count in takers:
        take(values[start : start + count])
        start += count
    loss = values[0] * factor
    if facts is not None:
        total, weight, *had = values[start:]
        factor = 1.0 / (weight or 1.0)
        loss = total * factor
        for grads in gradients:
            grads.keep([ranks > 0 for ranks in had[: len(grads.params)]])
            del had[: len(grads.params)]
    if factor != 1.0:
        for grads in gradients:
            grads.rescale(factor)
    return loss, weight, values[1] if scale else 1.0


def _refuse(updates: Sequence[Update], outcome: Outcome, **facts: Any) -> list[StepReport]:
    """Drop the window; nothing moves. An overflow lowers the scale, anything else leaves it."""
    scaler = updates[0].scaler
    if scaler.is_enabled():
        # Naming a scale also makes the scaler forget that these gradients were unscaled.
        scaler.update(None if outcome == "overflowed" else facts["scale"])
    for update in updates:
        update.drop()
    return [update.report(outcome, **facts) for update in updates]


def _check(loss: Tensor, weight: float, name: str) -> None:
    """Refuse what cannot be a loss.

    Raises ValueError for something else than a scalar tensor, for one without a graph, and for a
    weight that is negative or not finite.
    """
    if not isinstance(loss, Tensor):
        raise ValueError(
            f"optimize({name!r}) got a {type(loss).__name__} as its loss; allowed: a scalar tensor"
        )
    if loss.numel() != 1:
        raise ValueError(
            f"optimize({name!r}) got a loss of shape {tuple(loss.shape)}; allowed: a scalar "
            "(use loss.mean())"
        )
    if weight and not loss.requires_grad:
        raise ValueError(
            f"optimize({name!r}) got a loss without a graph: no parameter that requires a gradient "
            "led to it. Was it detached, computed under torch.no_grad(), or is every module frozen?"
        )
    if not 0.0 <= weight < math.inf:
        raise ValueError(
            f"optimize({name!r}) got the weight {weight!r}; allowed: a finite number, 0 or more"
        )
