"""Registry of the defaults of every Brain: callbacks, tracer, drivers of `fit`, conventions.

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
    """Exit of a run once a driver, such as a search or a replay, has done its work.

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

# The constructor of a Brain calls these; they return None for a Brain without such an object.
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
    """Return the first tracer that a factory makes, or None."""
    return next((made for factory in tracers if (made := factory(brain)) is not None), None)


def make_driver(brain: Brain) -> Driver | None:
    """Return the first driver that a factory makes, or None."""
    return next((made for factory in drivers if (made := factory(brain)) is not None), None)


def initialise(modules: Module, source: str, names: Mapping[str, str | None] | None) -> None:
    """Load the weights that a new run starts from.

    Args:
        modules: modules of a Brain.
        source: the run option ``init_from``.
        names: the run option ``init_map``.

    Raises:
        ValueError: the source cannot be read, or does not fit the modules.
    """
    initialisers[0](modules, source, names)
