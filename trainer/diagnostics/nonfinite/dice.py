"""The random generators at the start of each batch, remembered for next to nothing."""

from __future__ import annotations

import random
import sys
from typing import Any

import torch

from trainer import seed

EVERY = 50  # batches between two looks at generators that training does not seem to use


class Dice:
    """What a batch was trained with, so that it can be trained with the same once more.

    torch's generators are read at every batch. To read Python's and NumPy's takes longer than a
    small step, and hardly any network draws from them: as long as they stand still they are read
    now and then, and what they were is known from what they still are.
    """

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self._in_use = True
        self._count = 0
        self._others: Any = None

    def read(self) -> tuple[Any, ...]:
        """The generators as they are now; `state` makes something to save of it."""
        if self._in_use or self._count % EVERY == 0:
            others = _others()
            if self._count % EVERY == 0:
                self._in_use = self._others is None or not _equal(others, self._others)
            self._others = others
        self._count += 1
        cuda = torch.cuda.get_rng_state_all() if self._cuda else None
        return torch.default_generator.get_state(), cuda, self._others

    def state(self, read: tuple[Any, ...]) -> dict[str, Any]:
        """What `read` gave, for `seed.set_rng_state`; ``exact`` where all of it is known."""
        torch_state, cuda, others = read
        exact = self._in_use or _equal(_others(), others)
        self._in_use |= not exact
        now = seed.rng_state()
        python, numpy = others
        found: dict[str, Any] = {"torch": torch_state, "python": seed.pack_python_state(python)}
        if cuda is not None:
            found["cuda"] = cuda
        if numpy is not None and "numpy" in now:
            keys = torch.from_numpy(numpy[1].astype("int64"))
            found["numpy"] = [str(numpy[0]), keys, *now["numpy"][2:]]
            found["numpy"][2:] = [int(numpy[2]), int(numpy[3]), float(numpy[4])]
        return {"generators": found, "exact": exact}


def _others() -> tuple[Any, Any]:
    numpy = sys.modules.get("numpy")
    return random.getstate(), None if numpy is None else numpy.random.get_state()


def _equal(a: tuple[Any, Any], b: tuple[Any, Any]) -> bool:
    if a[0] != b[0] or (a[1] is None) != (b[1] is None):
        return False
    return a[1] is None or (a[1][2:] == b[1][2:] and bool((a[1][1] == b[1][1]).all()))
