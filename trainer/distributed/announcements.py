"""Announcements: short messages about the gradients that ranks are about to send.

Before a rank sends gradients, it announces the accumulation windows that it closes; after a batch
in which no optimizer has stepped, it announces that it closes no more. All announcements have one
form, so that a rank that has given up a batch can wait for the next one and learn how to answer. If
announcements differ, ranks call `Brain.optimize` in different orders.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from trainer import distributed

Windows = Sequence[Sequence[str]]  # Optimizers of each window that a call of `optimize` closes.

LIMIT = 2**62  # Above all codes of windows.


class Votes(NamedTuple):
    """Flags that are True for all ranks if they are for any.

    They mean that the run was asked to stop, that it is time to save, and that a rank has given up
    this batch.
    """

    stop: bool
    save: bool
    gave_up: bool = False


NO_VOTES = Votes(stop=False, save=False)


class Announcements:
    """Announcements of one rank, in the order in which it sends them.

    Args:
        names: all optimizers, in the same order on all ranks.
    """

    def __init__(self, names: Sequence[str]) -> None:
        self._names = list(names)
        self._joint: list[str] = []
        self._answer = torch.zeros(0)
        self._message: Any = None

    def send(self, windows: Windows | None, stop: bool = False, save: bool = False) -> None:
        """Announce the windows that this rank closes now, and its votes.

        Args:
            windows: the windows in the order of closing; empty if the batch closes no more; None if
                this rank has given up the batch.
            stop: this rank's vote to stop.
            save: this rank's vote to save.
        """
        for names in windows or ():
            if len(names) > 1:
                self._joint = list(names)
        code = 0 if windows is None else self._encode(windows)
        # The maxima of a number and its negative are opposite only if all ranks sent the same.
        digest = _digest(windows or ())
        numbers = (-LIMIT,) * 4 if windows is None else (code, digest, -code, -digest)
        sent = (*numbers, stop, save, windows is None)
        self._answer = on_device(sent, torch.int64, distributed.device()).clone()
        self._message = distributed.begin_max(self._answer)

    def confirm(self) -> None:
        """Wait for the announcements of all ranks, before the announced messages."""
        self.check(self.disagreement().tolist())

    def disagreement(self) -> Tensor:
        """Return, without reading it, a vector (2,) that is 0 if all ranks announced the same."""
        self._message.wait()
        return (self._answer[:2] + self._answer[2:4]).double()

    def read(self, joint: Callable[[], Sequence[str]]) -> tuple[list[list[str]], Votes]:
        """Return the windows that the other ranks close, and the votes of all.

        Args:
            joint: returns the names of the optimizers that step together.
        """
        self._message.wait()
        most, digest, least, opposite, *flags = self._answer.tolist()
        if most == -LIMIT:  # All ranks have given up the batch.
            return [], Votes(*map(bool, flags))
        self.check([most + least, digest + opposite])
        if any(names is self._joint for names in self._decode(most)):
            self._joint = list(joint())  # Others may have stepped together in an earlier window.
        windows = self._decode(most)
        self.check([0, digest - _digest(windows)])
        return windows, Votes(*map(bool, flags))

    def check(self, disagreement: Sequence[float]) -> None:
        """Raise ValueError if the values of `disagreement` are not 0."""
        if not any(disagreement):
            return
        if not disagreement[0]:
            raise ValueError(
                "optimize without a name steps with other optimizers on one rank than on another "
                f"({', '.join(map(repr, self._joint))} on this one): freeze_optimizers must return "
                "the same ones, in the same order, on every rank"
            )
        most, _, least, *_ = self._answer.tolist()
        one, other = (
            " and ".join(repr("+".join(names)) for names in self._decode(code)) or "none"
            for code in (most, -least)
        )
        raise ValueError(
            f"ranks call optimize in different orders: one rank closes the window of {one} next, "
            f"and another rank that of {other}. Every rank must call optimize for the same "
            "optimizers in the same order; where it has no examples, with weight=0"
        )

    def _encode(self, windows: Windows) -> int:
        """Encode windows as digits: 0 ends the row, 1 … N is an optimizer, N + 1 the joint ones."""
        code, base = 0, len(self._names) + 2
        for names in reversed(windows):
            digit = self._names.index(names[0]) + 1 if len(names) == 1 else base - 1
            code = code * base + digit
        if code >= LIMIT:
            raise ValueError(
                f"one call of optimize closes {len(windows)} accumulation windows of "
                f"{len(self._names)} optimizers; with several processes that is too many: split it"
            )
        return code

    def _decode(self, code: int) -> list[list[str]]:
        windows, base = [], len(self._names) + 2
        while code:
            code, digit = divmod(code, base)
            windows.append(self._joint if digit == base - 1 else [self._names[digit - 1]])
        return windows


def _digest(windows: Windows) -> int:
    """Return a hash of the names of all windows, also of joint ones."""
    return zlib.crc32(repr([list(names) for names in windows]).encode())


@lru_cache(maxsize=16)
def on_device(numbers: tuple[float, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return numbers as a vector on the device, cached by value; do not write to it."""
    return torch.tensor(numbers, dtype=dtype, device=device)
