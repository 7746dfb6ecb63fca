"""Gradients of one optimizer in flat buckets, which are summed over ranks during backward.

All ranks send the same buckets in the same order, regardless of their graphs. A bucket is sent as
soon as the last backward pass of a window has filled it and those before it. The others are sent
after that pass, with missing gradients as zeros or as earlier passes left them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from trainer import distributed

# The first message is small, to be sent early; later ones are large, for throughput.
FIRST_BUCKET_BYTES = 2**20
BUCKET_BYTES = 25 * 2**20


class Bucket:
    """Flat tensor that holds the gradients of some parameters, one after another.

    Attributes:
        params: the parameters, of one dtype and device.
        slots: for each parameter a view of the flat tensor, of its shape and strides.
        had_gradient: for each parameter, True if this rank has its gradient; known once the bucket
            is filled.
    """

    def __init__(self, params: Sequence[Tensor]) -> None:
        self.params = params
        self.flat = params[0].detach().new_empty(sum(p.numel() for p in params))
        parts = self.flat.split([p.numel() for p in params])
        self.slots = [
            part.as_strided(p.shape, torch.empty_like(p, device="meta").stride())
            for p, part in zip(params, parts, strict=True)
        ]
        self.had_gradient: list[bool] = []

    def fill(self, factor: float = 1.0) -> None:
        """Collect the gradients, with zeros for missing ones, and multiply by a factor."""
        self.had_gradient = [p.grad is not None for p in self.params]
        for p, slot in zip(self.params, self.slots, strict=True):
            if p.grad is None:
                slot.zero_()
            elif p.grad is not slot:
                slot.copy_(p.grad)
            p.grad = slot
        if factor != 1.0:
            self.flat.mul_(factor)


class GradientBuckets:
    """Buckets of one optimizer.

    A parameter gets a place in a bucket once it is known to get gradients, and its hook to fire
    once a backward pass. All others are late: they are sent at the end of a window.

    Args:
        params: name and parameter, for all parameters of the optimizer.
        sparse: parameters whose gradients may be in sparse layout; always late.
        before_send: called before each message.

    Attributes:
        learned: True once a window in this process has shown the hooks that fire twice.
        fired_twice: indices of parameters whose hook has since fired twice in a backward pass.
    """

    def __init__(
        self,
        params: Iterable[tuple[str, Tensor]],
        sparse: set[Tensor],
        before_send: Callable[[], None] = lambda: None,
    ) -> None:
        self._before_send = before_send
        self.names, self.params = zip(*params, strict=True)
        self._rows = {i for i, p in enumerate(self.params) if p in sparse}
        self.learned = False
        self.fired_twice: set[int] = set()
        self._early: set[int] = set()
        self._fires_twice: set[int] = set()
        self._buckets: list[Bucket] = []
        self._place: dict[int, tuple[int, Tensor]] = {}  # Bucket and slot of a parameter.
        self._stale = False
        self._listening = self._sending = False
        self._fired: set[int] = set()
        self._left: list[int] = []  # Number of parameters that each bucket waits for.
        self._sent = 0
        self._after: GradientBuckets | None = None
        self._messages: list[Any] = []
        self._hooks: list[Any] = []
        for i, p in enumerate(self.params):
            frozen = not p.requires_grad
            p.requires_grad_(True)  # torch registers no hook on a frozen parameter.
            hook = partial(self._take_gradient, i)
            self._hooks.append(p.register_post_accumulate_grad_hook(hook))
            p.requires_grad_(not frozen)

    def remove_hooks(self) -> None:
        """Remove the hooks from the parameters, for other buckets."""
        self.wait()
        for hook in self._hooks:
            hook.remove()

    def prepare(self) -> None:
        """Prepare for the next backward pass of a window."""
        self.wait()  # An error may have ended the last window.
        if self._stale:
            self._lay_out()

    @property
    def all_sent(self) -> bool:
        """True if every bucket of the window is on its way."""
        return self._sent == len(self._buckets)

    def listen(self, send: bool, after: GradientBuckets | None = None) -> None:
        """Take the gradients of the following backward pass.

        Args:
            send: send each bucket as soon as it is full, and all of ``after`` before these.
            after: other buckets.
        """
        self._listening, self._sending = True, send and self.learned
        self._after = after
        self._fired.clear()
        if self._sending:
            self._left = [len(bucket.params) for bucket in self._buckets]
            self._sent = 0

    def stop_listening(self) -> None:
        """Ignore the gradients of the following backward passes."""
        self._listening = self._sending = False

    def flush(self, factor: float) -> None:
        """Send the remaining buckets, with gradients times a factor."""
        while not self.all_sent:
            self._send(self._buckets[self._sent], factor)
            self._sent += 1

    def late(self) -> list[int]:
        """Return the indices of the late parameters."""
        return [i for i in range(len(self.params)) if i not in self._place]

    def send_late(self, indices: Iterable[int], factor: float) -> None:
        """Send gradients of late parameters that some rank has, those in sparse layout last."""
        chosen = set(indices)
        dense = sorted(chosen - self._rows, reverse=True)
        for i in dense:
            grad = self.params[i].grad
            if grad is not None and grad.is_sparse:
                raise ValueError(
                    "with several processes, a sparse gradient must be that of a module with "
                    f"sparse=True, such as nn.Embedding; {self.names[i]!r}, a parameter of shape "
                    f"{tuple(self.params[i].shape)}, is not"
                )
        for group in self._group_neighbours(dense):
            self._send(Bucket([self.params[i] for i in group]), factor)
        for i in sorted(chosen & self._rows):
            self._sum_rows(self.params[i], factor)

    def wait(self) -> None:
        """Wait for all messages; on a GPU the stream waits, not the host."""
        for message in self._messages:
            message.wait()
        self._messages.clear()
        self._sent = 0

    def learn(self, have: Iterable[int], twice: Iterable[int]) -> None:
        """Give places to late parameters that have a gradient on some rank.

        ``twice`` are parameters whose hook fires twice on some rank.
        """
        before = self._early.copy()
        self._fires_twice |= set(twice)
        self._early |= set(have)
        self._early -= self._fires_twice | self._rows
        self._stale |= self._early != before
        self.fired_twice.clear()
        self.learned = True

    def early_gradients(self) -> Iterator[tuple[Tensor, bool]]:
        """Yield each parameter with a place, and True if this rank has its gradient."""
        for bucket in self._buckets:
            yield from zip(bucket.params, bucket.had_gradient, strict=True)

    def state_dict(self) -> dict[str, Any]:
        """Return the layout of the buckets, which sets the order of floating-point sums."""
        return {"early": sorted(self._early), "twice": sorted(self._fires_twice)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the layout of a saved run; hooks that fire twice are learned again."""
        self._early, self._fires_twice = set(state["early"]), set(state["twice"])
        self.learned = False
        self._lay_out()  # At once, since a restored window may be open.

    def _lay_out(self) -> None:
        """Make the buckets in reverse order, which is about that of the backward pass."""
        self._stale, self._place, self._buckets = False, {}, []
        for group in self._group_neighbours(sorted(self._early, reverse=True)):
            bucket = Bucket([self.params[i] for i in group])
            for i, slot in zip(group, bucket.slots, strict=True):
                self._place[i] = len(self._buckets), slot
            self._buckets.append(bucket)

    def _group_neighbours(self, indices: Iterable[int]) -> list[list[int]]:
        """Split parameters into groups of one dtype and device, of about a bucket's size."""
        groups: list[list[int]] = []
        kind, size, limit = None, 0, FIRST_BUCKET_BYTES
        for i in indices:
            p = self.params[i]
            if kind != (p.dtype, p.device) or size >= limit:
                limit = BUCKET_BYTES if groups else FIRST_BUCKET_BYTES
                kind, size = (p.dtype, p.device), 0
                groups.append([])
            groups[-1].append(i)
            size += p.nbytes
        return groups

    def _take_gradient(self, i: int, p: Tensor) -> None:
        """Move a gradient to its place; called after each accumulation into the parameter."""
        if not self._listening or p.grad is None:
            return
        if i in self._fired:
            if self._sending and i in self._place:
                raise ValueError(
                    f"the parameter {self.names[i]!r} got its gradient in two parts, unlike in the "
                    "first step of this process, and the first part is on its way to the others. "
                    "torch.utils.checkpoint with use_reentrant=True does so to weights that are "
                    "used twice; allowed: use_reentrant=False, or the same use in every step"
                )
            self.fired_twice.add(i)
        self._fired.add(i)
        if i not in self._place:
            return
        number, slot = self._place[i]
        if p.grad is not slot:
            slot.copy_(p.grad)
            p.grad = slot
        if self._sending:
            # Send only buckets that were full before this parameter: a hook of the user on this
            # parameter may run after this one and change its gradient.
            if self._after is None or self._after.all_sent:
                while not self.all_sent and not self._left[self._sent]:
                    self._send(self._buckets[self._sent])
                    self._sent += 1
            self._left[number] -= 1

    def _send(self, bucket: Bucket, factor: float = 1.0) -> None:
        self._before_send()
        bucket.fill(factor)
        self._messages.append(distributed.begin_sum(bucket.flat))

    def _sum_rows(self, param: Tensor, factor: float) -> None:
        """Sum a gradient in sparse layout over ranks, by the rows that any rank has."""
        grad = param.grad
        if grad is None:
            rows, values = torch.zeros(0, dtype=torch.long, device=param.device), param.detach()[:0]
        else:
            own = (grad if grad.is_sparse else grad.to_sparse(1)).coalesce()
            rows, values = own.indices()[0], own.values() * factor
        rows, values = distributed.all_gather_rows(rows), distributed.all_gather_rows(values)
        total = torch.sparse_coo_tensor(rows[None], values, param.shape, check_invariants=False)
        # An embedding that is also used as a plain matrix has a dense gradient.
        param.grad = total.coalesce() if grad is None or grad.is_sparse else total.to_dense()
