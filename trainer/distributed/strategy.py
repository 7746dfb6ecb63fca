"""Strategies that keep weights and gradients of several processes equal.

Gradients are summed over ranks during the last backward pass of an accumulation window.
DistributedDataParallel ties the sum to one forward and one backward pass of one module, which
adversarial recipes, several forward passes, unused parameters and accumulation break. `Replicate`
needs to know only the last backward pass of a window: a forward pass may run any number of times,
``self.modules.x`` stays the user's own module, and every rank sends the same messages regardless of
its graph.
"""

from __future__ import annotations

import hashlib
import json
import math
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from operator import is_
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from trainer import distributed
from trainer.distributed.announcements import NO_VOTES, Announcements, Votes, Windows, on_device
from trainer.distributed.buckets import GradientBuckets

_NOTHING: AbstractContextManager[None] = nullcontext()


class WindowSums(NamedTuple):
    """Sums over ranks of a closed accumulation window, on the device.

    Args:
        numbers: vector (5 + P,): sum of weighted losses, sum of weights, number of ranks for each
            of the three `Votes`, and number of ranks with a gradient of each of the P parameters in
            ``params``.
        params: parameters that may have had no gradient on any rank.
        reference: weight that the summed gradients are relative to.
        check: a vector on the device, and a function to call with its numbers on the host, which
            raises ValueError if ranks have closed different windows; None if already checked.
    """

    numbers: Tensor
    params: list[Tensor]
    reference: float
    check: tuple[Tensor, Callable[[list[float]], None]] | None = None


class BatchGivenUp(BaseException):
    """Raised in `Brain.optimize` on ranks that leave a batch which another rank has given up.

    It derives from BaseException, so that error handling in recipes lets it pass.
    """


class Strategy:
    """Strategy of a single process, and base class: nothing is communicated.

    A strategy stands between the optimizers, known by their names, and the process group. Every
    rank calls its methods in the same order and with the same names, except `give_up_batch`.
    Gradients are sums of w/reference · g over batches of weight w; each rank has its reference.

    Attributes:
        communicates: True if there are other processes.
        ballot: returns this rank's votes to stop and to save, which are sent with the gradients.
        votes: votes of all ranks, once a window of this batch is closed; None before.
    """

    communicates: ClassVar[bool] = False
    ballot: Callable[[], tuple[bool, bool]] = staticmethod(lambda: (False, False))
    votes: Votes | None = None

    def prepare(self, modules: nn.Module) -> None:
        """Make the weights of all ranks equal, before optimizers are built."""

    def register(
        self,
        optimizers: Mapping[str, Sequence[Tensor]],
        names: Mapping[Tensor, str],
        sparse: set[Tensor],
    ) -> None:
        """Register the parameters of each optimizer, and check that they are the same on all ranks.

        ``names`` are for messages; gradients of ``sparse`` may be in sparse layout.
        """

    def reference(self, name: str) -> float | None:
        """Return the reference that all ranks have agreed on; None if there is none yet."""
        return None

    def begin_batch(self) -> None:
        """Begin a batch, without closed windows yet."""
        self.votes = None

    def announce(self, windows: Windows) -> None:
        """Announce to the other ranks the windows that the next call of `optimize` closes."""

    def vote(self) -> Votes:
        """Return the votes at the end of a batch that closed no window."""
        stop, save = self.ballot()
        return Votes(stop, save) if stop or save else NO_VOTES

    def give_up_batch(
        self, joint: Callable[[], Sequence[str]], params: Callable[[str], Sequence[Tensor]]
    ) -> None:
        """Give up a batch that this rank cannot train on, and set ``votes``.

        Until the other ranks know, this one joins in their messages, whose sums are dropped.

        Args:
            joint: returns the names of the optimizers that step together.
            params: returns the parameters of an optimizer by its name.
        """
        self.votes = Votes(*self.ballot(), gave_up=True)

    def prepare_backward(self, name: str, params: Sequence[Tensor]) -> None:
        """Prepare for a backward pass of an optimizer over these parameters."""

    def backward(
        self, names: Sequence[str], reference: float, last: bool
    ) -> AbstractContextManager[None]:
        """Return the context manager for the backward pass of a loss of these optimizers.

        ``last`` is True if the window closes after it.
        """
        return _NOTHING

    def end_window(
        self, names: Sequence[str], loss: Tensor, weight: float | Tensor, reference: float
    ) -> WindowSums | None:
        """Sum the gradients of optimizers that step together over a window and all ranks.

        A parameter without a gradient on this rank counts as zeros and receives the sum.

        Args:
            names: the optimizers.
            loss: weighted sum of the window's losses over ``reference``, a scalar.
            weight: number of examples in the window on this rank, a number or a scalar.
            reference: this rank's reference.

        Returns:
            The sums, on the device of ``loss``, without waiting for it; None for a single process.
        """
        return None

    def average(self, name: str) -> None:
        """Replace gradients of an optimizer by their mean over ranks, before a step by hand."""

    def share_buffers(self, modules: nn.Module) -> None:
        """Make the buffers of all ranks equal, at the end of an epoch."""

    def state_dict(self) -> dict[str, Any]:
        """Return the state for a resumed run, equal on all ranks."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore a saved state."""


class Replicate(Strategy):
    """Strategy in which every rank holds all weights.

    Gradients have a process group of their own, apart from other collectives such as those of
    synchronised batch norm.
    """

    communicates = True

    def __init__(self) -> None:
        distributed.open_gradient_group()
        self._buckets: dict[str, GradientBuckets] = {}
        self._names: Mapping[Tensor, str] = {}
        self._sparse: set[Tensor] = set()
        self._references: dict[str, float] = {}
        self._saved: Mapping[str, Any] = {}
        self._announcements = Announcements([])
        self._open: list[list[str]] = []  # Announced windows that are not closed yet.
        self._flushed = 0  # Number of them whose gradients were sent.
        self._confirmed = True  # True if all ranks are known to have announced them.

    def prepare(self, modules: nn.Module) -> None:
        described = {n: _describe(t) for n, t in modules.state_dict(keep_vars=True).items()}
        _check_equal("modules", described)
        tensors = [*modules.parameters(), *modules.buffers()]
        distributed.broadcast_([tensor.detach() for tensor in tensors])

    def register(
        self,
        optimizers: Mapping[str, Sequence[Tensor]],
        names: Mapping[Tensor, str],
        sparse: set[Tensor],
    ) -> None:
        self._names, self._sparse = names, sparse
        described = {
            name: ", ".join(f"{names.get(p, '?')} {_describe(p)}" for p in params)
            for name, params in optimizers.items()
        }
        _check_equal("optimizers", described)
        self._announcements = Announcements(list(optimizers))
        for name, params in optimizers.items():
            self.prepare_backward(name, params)

    def reference(self, name: str) -> float | None:
        return self._references.get(name)

    def begin_batch(self) -> None:
        super().begin_batch()
        self._open = []

    def announce(self, windows: Windows) -> None:
        self._announcements.send(windows)
        self._open, self._flushed = [list(names) for names in windows], 0
        self._confirmed = False

    def vote(self) -> Votes:
        self._announcements.send((), *self.ballot())
        _, votes = self._announcements.read(list)
        return votes

    def give_up_batch(
        self, joint: Callable[[], Sequence[str]], params: Callable[[str], Sequence[Tensor]]
    ) -> None:
        if not self._open:
            self._announcements.send(None, *self.ballot())
            self._open, self.votes = self._announcements.read(joint)
            self._flushed = 0
        if not self._open:
            return
        for names in self._open[self._flushed :]:
            for name in names:
                self.prepare_backward(name, params(name))
            self._flush([self._buckets[name] for name in names], 1.0, None)
        names = self._open[0]
        reference = self._references.get(names[0], 1.0)
        nothing = torch.zeros((), device=params(names[0])[0].device)
        numbers = self.end_window(names, nothing, 0.0, reference, gave_up=True).numbers.tolist()
        self.votes = Votes(*(number > 0 for number in numbers[2:5]))

    def prepare_backward(self, name: str, params: Sequence[Tensor]) -> None:
        buckets = self._buckets.get(name)
        if buckets is None or not _same(buckets.params, params):  # The parameters have changed.
            named = [(self._names.get(p, f"parameter {i}"), p) for i, p in enumerate(params)]
            if buckets is not None:
                buckets.remove_hooks()
            buckets = self._buckets[name] = GradientBuckets(named, self._sparse, self._confirm)
            if name in self._saved:
                buckets.load_state_dict(self._saved[name])
        buckets.prepare()

    @contextmanager
    def backward(self, names: Sequence[str], reference: float, last: bool) -> Iterator[None]:
        trained = [self._buckets[name] for name in names]
        agreed = self._references.get(names[0])
        before = None
        for buckets in trained:
            # Gradients with another reference must be scaled first.
            buckets.listen(send=last and reference == agreed, after=before)
            before = buckets
        try:
            yield
        finally:
            for buckets in trained:
                buckets.stop_listening()
            if last:  # Also after an error, when ranks have sent different numbers of buckets.
                self._flush(trained, reference, agreed)
                self._flushed += 1

    def end_window(
        self,
        names: Sequence[str],
        loss: Tensor,
        weight: float | Tensor,
        reference: float,
        gave_up: bool = False,
    ) -> WindowSums:
        trained, agreed = [self._buckets[name] for name in names], self._references.get(names[0])
        if not all(buckets.learned for buckets in trained):
            self._confirm(wait=True)
        self._flush(trained, reference, agreed)
        known = 0.0 if isinstance(weight, Tensor) else weight
        weighed = reference if known or isinstance(weight, Tensor) else 0.0
        agreed = self._close_late(names, weighed, reference)
        early = [each for buckets in trained for each in buckets.early_gradients()]
        total = (loss.detach().double() * reference).reshape(1)
        flags = (known, *self.ballot(), gave_up, *(had for _, had in early))
        numbers = torch.cat([total, on_device(flags, torch.float64, loss.device)])
        if isinstance(weight, Tensor):
            numbers[1] += weight
        message = distributed.begin_sum(numbers)
        for buckets in trained:
            buckets.wait()
        message.wait()
        check = None
        if self._open:
            if not self._confirmed:
                check = self._announcements.disagreement(), self._announcements.check
            self._open.pop(0)
            self._flushed -= 1
        return WindowSums(numbers, [p for p, _ in early], agreed, check)

    def average(self, name: str) -> None:
        params = self._buckets[name].params
        self.announce([[name]])
        self.prepare_backward(name, params)
        nothing = torch.zeros((), device=params[0].device)
        sums = self.end_window([name], nothing, 1.0, 1.0)
        ranks = sums.numbers[1:].tolist()
        self.votes = Votes(*(number > 0 for number in ranks[1:4]))
        if self.votes.gave_up:
            raise BatchGivenUp
        if sums.check is not None:
            disagreement, check = sums.check
            check(disagreement.tolist())
        for p, had in zip(sums.params, ranks[4:], strict=True):
            p.grad = p.grad if had else None  # It must not move, as with one process.
        for p in params:
            if p.grad is not None:
                p.grad.mul_(sums.reference / ranks[0])

    def share_buffers(self, modules: nn.Module) -> None:
        distributed.broadcast_([buffer.detach() for buffer in modules.buffers()])

    def state_dict(self) -> dict[str, Any]:
        buckets = {name: each.state_dict() for name, each in self._buckets.items()}
        return {"references": dict(self._references), "buckets": buckets}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        # A run of one process saves none.
        self._references = dict(state.get("references", {}))
        self._saved = state.get("buckets", {})
        for name, saved in self._saved.items():
            if name in self._buckets:
                self._buckets[name].load_state_dict(saved)

    def _confirm(self, wait: bool = False) -> None:
        """Check an announcement before the announced gradients are sent.

        Different messages would raise an error of the backend, or be mixed up. Waits for a GPU only
        if ``wait``; later announcements are checked with the sums.
        """
        if not self._confirmed and (wait or distributed.device().type == "cpu"):
            self._announcements.confirm()
            self._confirmed = True

    def _flush(
        self, trained: Sequence[GradientBuckets], reference: float, agreed: float | None
    ) -> None:
        """Send the remaining buckets, relative to the weight ``agreed``."""
        for buckets in trained:
            buckets.flush(1.0 if agreed is None else reference / agreed)

    def _close_late(self, names: Sequence[str], weighed: float, reference: float) -> float:
        """Send gradients that have no place in a bucket, and learn which parameters get one.

        Ranks ask each other in the first window of the process, and when there are late parameters.
        The reference weight is the sum over ranks: gradients of equal weights then need no factor.
        ``weighed`` is ``reference``, or 0 if this rank's window has no examples.

        Returns:
            The weight that the summed gradients are relative to.
        """
        trained, ranks = [self._buckets[name] for name in names], distributed.world_size()
        late = [(buckets, i) for buckets in trained for i in buckets.late()]
        every = [(buckets, i) for buckets in trained for i in range(len(buckets.params))]
        first = not all(buckets.learned for buckets in trained)
        agreed = self._references.get(names[0])
        if not late and not first and agreed is not None:
            return agreed
        had = [float(buckets.params[i].grad is not None) for buckets, i in late]
        twice = [float(i in buckets.fired_twice) for buckets, i in every]
        question = torch.tensor([weighed, *had, *twice], dtype=torch.float64)
        question = question.to(distributed.device())
        distributed.begin_sum(question).wait()
        answer = question.tolist()
        if agreed is None:
            agreed = answer[0] or 1.0
        if answer[0]:
            for name in names:
                self._references.setdefault(name, agreed)
        # A first window: every rank has gradients of the same parameters, and none was sent.
        alike = len(late) == len(every) and {*answer[1 : 1 + len(late)]} <= {0.0, float(ranks)}
        own = _norms(trained) if first and alike else []
        wanted = [place for place, number in zip(late, answer[1:], strict=False) if number]
        repeated = [p for p, number in zip(every, answer[1 + len(late) :], strict=True) if number]
        for buckets in trained:
            buckets.send_late([i for b, i in wanted if b is buckets], reference / agreed)
            buckets.learn(
                [i for b, i in wanted if b is buckets], [i for b, i in repeated if b is buckets]
            )
        if any(own):
            for buckets in trained:
                buckets.wait()
            if all(map(partial(math.isclose, rel_tol=1e-6), own, _norms(trained))):
                warnings.warn(
                    f"the gradients of {', '.join(map(repr, names))} are equal on all {ranks} "
                    "ranks before they are summed. Either every rank got the same batch, and does "
                    "the work of one; or something else sums them, such as "
                    "DistributedDataParallel or an all_reduce in fit_batch: leave that out, the "
                    "Brain does it",
                    stacklevel=2,
                )
        return agreed


def make_strategy() -> Strategy:
    """Return the strategy for the processes of this run."""
    return Replicate() if distributed.world_size() > 1 else Strategy()


def _same(some: Sequence[Tensor], others: Sequence[Tensor]) -> bool:
    return len(some) == len(others) and all(map(is_, some, others))


def _norms(trained: Sequence[GradientBuckets]) -> list[float]:
    """Return the norms of all dense gradients; syncs."""
    grads = [p.grad for buckets in trained for p in buckets.params]
    return [float(grad.norm()) for grad in grads if grad is not None and not grad.is_sparse]


def _describe(tensor: Any) -> str:
    if not isinstance(tensor, Tensor):  # Extra state of a module.
        return type(tensor).__name__
    return f"{str(tensor.dtype).removeprefix('torch.')} {tuple(tensor.shape)}"


def _check_equal(kind: str, described: Mapping[str, str]) -> None:
    """Raise ValueError on all ranks if the parts of one differ from those of rank 0."""
    digest = hashlib.sha256(json.dumps(list(described.items())).encode()).hexdigest()
    if len(set(distributed.all_gather_json(digest))) == 1:
        return
    ranks = [dict(each) for each in distributed.all_gather_json(list(described.items()))]
    for rank, found in enumerate(ranks):
        for name in [*ranks[0], *found]:
            ours, theirs = ranks[0].get(name, "missing"), found.get(name, "missing")
            if ours != theirs:
                raise ValueError(
                    f"all ranks must have the same {kind}, and {name!r} is {ours} on rank 0 and "
                    f"{theirs} on rank {rank}"
                )
    raise ValueError(f"all ranks must have the same {kind} in the same order")
