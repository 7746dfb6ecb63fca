"""Random seeds, and the states of all random number generators of a process."""

from __future__ import annotations

import ctypes
import hashlib
import random
import sys
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

import torch


def derive(seed: int, *parts: int | str) -> int:
    """Derive a seed for one purpose from the seed of the run.

    The result is the same in every process and on every machine, unlike Python's ``hash``.

    Args:
        seed: random seed of the run.
        parts: name of the purpose, such as ``"epoch", 2``.

    Returns:
        A seed of 63 bits, which fits `torch.Generator.manual_seed`.

    >>> derive(1, "epoch", 2) == derive(1, "epoch", 2) != derive(1, "epoch", 3)
    True
    """
    text = "\x1f".join(f"{type(part).__name__}:{part}" for part in (seed, *parts))
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") >> 1


def seed_everything(seed: int, rank: int = 0) -> None:
    """Seed Python, NumPy (if it is imported) and torch on all devices.

    Args:
        seed: random seed of the run, between 0 and 2**63 - 1.
        rank: this process's rank. Rank 0 is seeded by ``seed`` itself, other ranks by one derived
            from it, so that their dropout differs.
    """
    value = seed if rank == 0 else derive(seed, "rank", rank)
    torch.manual_seed(value)
    reseed(value)


def reseed(value: int) -> None:
    """Seed the generators of Python, NumPy (if it is imported) and torch's CPU, not CUDA's.

    NumPy takes the lowest 32 bits of a value between 0 and 2**63 - 1.
    """
    torch.default_generator.manual_seed(value)
    random.seed(value)
    if "numpy" in sys.modules:
        sys.modules["numpy"].random.seed(value % 2**32)


def is_generator(value: Any) -> bool:
    """Return True for a generator object of Python, NumPy or torch, which can be seeded."""
    kinds: tuple[type, ...] = (torch.Generator, random.Random)
    if (numpy := sys.modules.get("numpy")) is not None:
        kinds += (numpy.random.Generator, numpy.random.RandomState)
    return isinstance(value, kinds) and not isinstance(value, random.SystemRandom)


def seed_generator(generator: Any, value: int) -> None:
    """Seed a generator that `is_generator` accepts by a value between 0 and 2**63 - 1."""
    if isinstance(generator, torch.Generator):
        generator.manual_seed(value)
    elif hasattr(generator, "bit_generator"):
        bits = generator.bit_generator
        bits.state = type(bits)(value).state
    else:
        generator.seed(value if isinstance(generator, random.Random) else value % 2**32)


def rng_state() -> dict[str, Any]:
    """Return the states of all generators that a step may draw from.

    The keys are "torch", "python", "cuda" (if there are GPUs) and "numpy" (if it is imported);
    `torch.load` reads the values with ``weights_only=True``.
    """
    state: dict[str, Any] = {
        "torch": torch.get_rng_state(),
        "python": _pack_python_state(random.getstate()),
    }
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state_all()
    if "numpy" in sys.modules:
        name, keys, position, has_gauss, gauss = sys.modules["numpy"].random.get_state()
        # As a tensor: NumPy's own array would need pickle to be read back.
        keys = torch.from_numpy(keys.astype("int64"))
        state["numpy"] = [str(name), keys, int(position), int(has_gauss), float(gauss)]
    return state


def set_rng_state(state: dict[str, Any]) -> None:
    """Restore the result of `rng_state`; generators that are not in it keep their state."""
    torch.set_rng_state(state["torch"])
    random.setstate(_unpack_python_state(state["python"]))
    if "cuda" in state and torch.cuda.is_available():
        # This machine may have fewer GPUs than the one that saved.
        for device in range(min(len(state["cuda"]), torch.cuda.device_count())):
            torch.cuda.set_rng_state(state["cuda"][device], device)
    if "numpy" in state and "numpy" in sys.modules:
        name, keys, *rest = state["numpy"]
        sys.modules["numpy"].random.set_state((name, keys.numpy().astype("uint32"), *rest))
    _read.clear()


def _pack_python_state(state: tuple[Any, ...]) -> list[Any]:
    """Return a state of `random.Random` with its 625 numbers as a tensor, which is saved faster."""
    version, internal, gauss = state
    return [version, torch.tensor(internal), gauss]


def _unpack_python_state(state: list[Any]) -> tuple[Any, ...]:
    """Invert `_pack_python_state`."""
    version, internal, gauss = state
    return version, tuple(internal.tolist()), gauss


class RngState:
    """The random generators of this process, as a part of a run's state."""

    def state_dict(self) -> dict[str, Any]:
        return rng_state()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        set_rng_state(state)


class StatefulGenerator:
    """A random generator with ``state_dict`` and ``load_state_dict``."""

    def __init__(self, generator: Any) -> None:
        self._generator = generator
        self._packs = isinstance(generator, random.Random)

    def state_dict(self) -> dict[str, Any]:
        state = _state(self._generator)
        return {"state": _pack_python_state(state) if self._packs else state}

    def load_state_dict(self, saved: dict[str, Any]) -> None:
        state = saved["state"]
        _set_state(self._generator, _unpack_python_state(state) if self._packs else state)


def as_stateful(value: Any) -> Any:
    """Wrap a random generator so that it has ``state_dict`` and ``load_state_dict``.

    Returns None for anything that `is_generator` refuses. The state of most NumPy bit generators
    consists of arrays.
    """
    return StatefulGenerator(value) if is_generator(value) else None


class fork_rng:
    """Context manager that seeds the CPU generators of Python, NumPy and torch, and restores them.

    The same object may be entered again: its random numbers then continue. Entering and leaving it
    takes about 0.2 ms.

    Args:
        seed: seed of the generators within the block.
        generators: further generators to seed and restore; see `is_generator`.
    """

    def __init__(self, seed: int, generators: Iterable[Any] = ()) -> None:
        self._seed, self._generators = seed, (torch.default_generator, *generators)
        self._inner: tuple[Any, ...] | None = None

    def __enter__(self) -> None:
        self._outer = _cpu_states(self._generators)
        if self._inner is not None:
            _set_cpu_states(self._generators, self._inner)
        else:
            reseed(self._seed)
            for generator in self._generators:
                seed_generator(generator, self._seed)

    def __exit__(self, *_: object) -> None:
        self._inner = _cpu_states(self._generators)
        self.undo()

    def undo(self) -> None:
        """Restore the generators to their states at the last entry."""
        _set_cpu_states(self._generators, self._outer)


class DrawsUndone:
    """Snapshot of the CPU generators of Python, NumPy and torch; taking it costs some 2 µs."""

    def __init__(self) -> None:
        self._states: tuple[Any, ...] | None = None

    def remember(self) -> None:
        """Take the snapshot."""
        self._states = _cpu_states([torch.default_generator])

    def undo(self) -> None:
        """Restore the snapshot."""
        if self._states is not None:
            _set_cpu_states([torch.default_generator], self._states)


def _address_of_python() -> int | None:
    """Return the address of the 625 words of Python's generator; None if unknown."""
    kind, head = random.Random.__base__, object.__basicsize__
    known = sys.implementation.name == "cpython" and kind is not None
    fits = known and 0 <= kind.__basicsize__ - head - 625 * 4 < 8  # type: ignore[union-attr]
    return id(random._inst) + head if fits else None


_PYTHON_ADDRESS = _address_of_python()
_read: dict[int, tuple[bytes, Any]] = {}  # Last memory and state of generators by address.


def _cpu_states(generators: Sequence[Any]) -> tuple[Any, ...]:
    # A normal number kept for the next draw is not in that memory.
    kept = random._inst.gauss_next is not None  # type: ignore[attr-defined]
    python = _read_if_changed(None if kept else _PYTHON_ADDRESS, random.getstate)
    state = None
    if (numpy := sys.modules.get("numpy")) is not None:
        read = partial(numpy.random.get_state, legacy=False)
        bits = numpy.random.get_bit_generator()
        default = type(bits).__name__ == "MT19937"  # Another kind has another memory.
        state = _read_if_changed(bits.ctypes.state_address if default else None, read)
        if state.get("has_gauss"):
            state = read()
    return python, state, [_state(generator) for generator in generators]


def _read_if_changed(address: int | None, read: Callable[[], Any]) -> Any:
    """Return the state of a generator, read again only if its memory has changed.

    Reading takes 7 µs for Python and 24 µs for NumPy. An ``address`` of None always reads.
    """
    if address is None:
        return read()
    memory = ctypes.string_at(address, 625 * 4)
    seen, state = _read.get(address, (b"", None))
    if memory != seen:
        state = read()
        _read[address] = memory, state
    return state


def _set_cpu_states(generators: Sequence[Any], states: tuple[Any, ...]) -> None:
    python, numpy, held = states
    random.setstate(python)
    if numpy is not None:  # None if it was not imported when the states were read.
        sys.modules["numpy"].random.set_state(numpy)
    _read.clear()
    for generator, state in zip(generators, held, strict=True):
        _set_state(generator, state)


def _state(generator: Any) -> Any:
    if hasattr(generator, "bit_generator"):
        return generator.bit_generator.state
    if isinstance(generator, random.Random):
        return generator.getstate()
    numpy = not isinstance(generator, torch.Generator)
    return generator.get_state(legacy=False) if numpy else generator.get_state()


def _set_state(generator: Any, state: Any) -> None:
    if hasattr(generator, "bit_generator"):
        generator.bit_generator.state = state
        return
    python = isinstance(generator, random.Random)
    (generator.setstate if python else generator.set_state)(state)
