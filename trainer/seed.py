"""One seed for a whole run, and the state of every random generator for exact resuming."""

from __future__ import annotations

import hashlib
import random
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch


def derive(seed: int, *parts: int | str) -> int:
    """A seed for one purpose, from the run's seed and what names the purpose.

    The same in every process and on every machine (unlike Python's ``hash``), and 63 bits wide, so
    that it fits ``torch.Generator.manual_seed``.

    >>> derive(1, "epoch", 2) == derive(1, "epoch", 2) != derive(1, "epoch", 3)
    True
    """
    text = "\x1f".join(f"{type(part).__name__}:{part}" for part in (seed, *parts))
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") >> 1


def seed_everything(seed: int, rank: int = 0) -> None:
    """Seed Python, NumPy (where it is loaded) and torch on every device.

    Rank 0 gets ``seed`` itself, other ranks one derived from it, so that their dropout differs.
    """
    value = seed if rank == 0 else derive(seed, "rank", rank)
    random.seed(value)
    torch.manual_seed(value)
    if "numpy" in sys.modules:
        sys.modules["numpy"].random.seed(value % 2**32)


def rng_state() -> dict[str, Any]:
    """The state of every generator that a step may draw from, as tensors and plain values."""
    state: dict[str, Any] = {"torch": torch.get_rng_state(), "python": _packed(random.getstate())}
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state_all()
    if "numpy" in sys.modules:
        name, keys, position, has_gauss, gauss = sys.modules["numpy"].random.get_state()
        # As a tensor: NumPy's own array would need pickle to be read back.
        keys = torch.from_numpy(keys.astype("int64"))
        state["numpy"] = [str(name), keys, int(position), int(has_gauss), float(gauss)]
    return state


def set_rng_state(state: dict[str, Any]) -> None:
    """Restore what `rng_state` gave. Generators absent from ``state`` are left alone."""
    torch.set_rng_state(state["torch"])
    random.setstate(_unpacked(state["python"]))
    if "cuda" in state and torch.cuda.is_available():
        # A machine with fewer GPUs than the one that saved restores those it has.
        for device in range(min(len(state["cuda"]), torch.cuda.device_count())):
            torch.cuda.set_rng_state(state["cuda"][device], device)
    if "numpy" in state and "numpy" in sys.modules:
        name, keys, *rest = state["numpy"]
        sys.modules["numpy"].random.set_state((name, keys.numpy().astype("uint32"), *rest))


def _packed(state: tuple[Any, ...]) -> list[Any]:
    """A state of Python's generator with its 625 numbers as a tensor, quicker to save."""
    version, internal, gauss = state
    return [version, torch.tensor(internal), gauss]


def _unpacked(state: list[Any]) -> tuple[Any, ...]:
    version, internal, gauss = state
    return version, tuple(internal.tolist()), gauss


class RngState:
    """The random generators of this process, as a part of a run's state."""

    def state_dict(self) -> dict[str, Any]:
        """Return the state of every generator."""
        return rng_state()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore a saved state."""
        set_rng_state(state)


class _Saved:
    """A generator of random numbers with the protocol of everything else that is saved."""

    def __init__(self, get: Callable[[], Any], put: Callable[[Any], Any]) -> None:
        self._get, self._put = get, put

    def state_dict(self) -> dict[str, Any]:
        return {"state": self._get()}

    def load_state_dict(self, saved: dict[str, Any]) -> None:
        self._put(saved["state"])


def as_stateful(value: Any) -> Any:
    """A random generator of torch, Python or NumPy with ``state_dict`` and ``load_state_dict``.

    None for anything else, and for generators of NumPy whose state is not made of plain numbers.
    """
    if isinstance(value, torch.Generator):
        return _Saved(value.get_state, value.set_state)
    if isinstance(value, random.Random):
        return _Saved(lambda: _packed(value.getstate()), lambda s: value.setstate(_unpacked(s)))
    bits = getattr(value, "bit_generator", None)  # NumPy's Generator; PCG64 unless chosen.
    if bits is not None and type(bits).__name__.startswith("PCG64"):
        return _Saved(lambda: bits.state, lambda state: setattr(bits, "state", state))
    return None


def reseed(value: int) -> None:
    """Seed the generators of Python, NumPy (where it is loaded) and torch's CPU; not CUDA's."""
    torch.default_generator.manual_seed(value)
    random.seed(value)
    if "numpy" in sys.modules:
        sys.modules["numpy"].random.seed(value % 2**32)


@contextmanager
def shielded(generators: Sequence[torch.Generator] = ()) -> Iterator[None]:
    """A block after which every CPU generator is as if the block had never run."""
    outside = _states(generators)
    try:
        yield
    finally:
        _restore(outside, generators)


class Private:
    """A shielded block with random numbers of its own; entered again, it goes on where it left off.

    ``generators`` are shielded, and seeded, as well.
    """

    def __init__(self, seed: int, generators: Iterable[torch.Generator] = ()) -> None:
        self._generators = tuple(generators)
        self._seed = seed
        self._inside: list[Any] | None = None

    def __enter__(self) -> None:
        self._outside = _states(self._generators)
        if self._inside is not None:
            _restore(self._inside, self._generators)
            return
        reseed(self._seed)
        for generator in self._generators:
            generator.manual_seed(self._seed)

    def __exit__(self, *_: object) -> None:
        self._inside = _states(self._generators)
        _restore(self._outside, self._generators)


def _states(generators: Iterable[torch.Generator]) -> list[Any]:
    numpy = sys.modules.get("numpy")
    return [
        random.getstate(),
        numpy.random.get_state(legacy=False) if numpy else None,
        *(generator.get_state() for generator in (torch.default_generator, *generators)),
    ]


def _restore(states: list[Any], generators: Iterable[torch.Generator]) -> None:
    python, numpy, *rest = states
    random.setstate(python)
    if numpy is not None:  # None: it was imported inside the block.
        sys.modules["numpy"].random.set_state(numpy)
    for generator, state in zip((torch.default_generator, *generators), rest, strict=True):
        generator.set_state(state)
