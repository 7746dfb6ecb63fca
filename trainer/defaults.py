"""Registry of what every Brain has by default: callbacks, a tracer, drivers of its `fit`.

`trainer/__init__.py` fills it, so that `trainer.brain` imports none of loggers, diagnostics,
report, tuner and compat.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from trainer.conventions import Conventions

if TYPE_CHECKING:
    from torch.nn import Module

    from trainer.brain import Brain, FitArguments
    from trainer.callbacks import Callback
    from trainer.optim.guard import Tracer


class DriverFinished(SystemExit):
    """A driver has done its work in place of `fit`, and the run ends: a search, a replay.

    A script that does not catch it ends with exit code 0.
    """

    def __init__(self) -> None:
        super().__init__(0)


CallbackFactory = Callable[["Brain"], "Callback | None"]
TracerFactory = Callable[["Brain"], "Tracer | None"]
Driver = Callable[["Brain", "FitArguments"], Any]
DriverFactory = Callable[["Brain"], "Driver | None"]
Initialiser = Callable[["Module", str, "Mapping[str, str | None] | None"], None]
ConventionsFactory = Callable[["Brain"], Conventions]

# Each is called once for a Brain, when its first `fit` or `evaluate` begins; None means "not here".
callbacks: list[CallbackFactory] = []
tracers: list[TracerFactory] = []
drivers: list[DriverFactory] = []
# The first one loads the weights of the run option ``init_from``.
initialisers: list[Initialiser] = []
conventions: list[ConventionsFactory] = []  # The last one counts.


def make_callbacks(brain: Brain) -> list[Callback]:
    """Return the callbacks that a Brain has by default."""
    return [made for factory in callbacks if (made := factory(brain)) is not None]


def make_conventions(brain: Brain) -> Conventions:
    """Return the conventions of a recipe."""
    return conventions[-1](brain) if conventions else Conventions()


def make_tracer(brain: Brain) -> Tracer | None:
    """Return the first tracer that a factory makes."""
    return next((made for factory in tracers if (made := factory(brain)) is not None), None)


def make_driver(brain: Brain) -> Driver | None:
    """Return the first driver that a factory makes."""
    return next((made for factory in drivers if (made := factory(brain)) is not None), None)


def initialise(modules: Module, source: str, names: Mapping[str, str | None] | None) -> None:
    """Load weights that a new run starts from: the run options ``init_from`` and ``init_map``."""
    initialisers[0](modules, source, names)
