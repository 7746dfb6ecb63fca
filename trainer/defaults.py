"""Registry of what every Brain has by default: callbacks, a tracer, and drivers of its `fit`.

`trainer/__init__.py` fills it, so that `trainer.brain` imports none of loggers, diagnostics, report
and tuner.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from trainer.brain import Brain, FitArguments
    from trainer.callbacks import Callback
    from trainer.optim.guard import Tracer

CallbackFactory = Callable[["Brain"], "Callback | None"]
TracerFactory = Callable[["Brain"], "Tracer | None"]
Driver = Callable[["Brain", "FitArguments"], Any]
DriverFactory = Callable[["Brain"], "Driver | None"]

# Each is called once for a Brain, when its first `fit` or `evaluate` begins; None means "not here".
callbacks: list[CallbackFactory] = []
tracers: list[TracerFactory] = []
drivers: list[DriverFactory] = []
