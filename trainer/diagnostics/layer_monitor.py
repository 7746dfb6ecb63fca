"""How healthy the gradients of a run are: measured step by step, written down, and warned of.

A look at an optimizer every ``monitor_every`` of its steps writes a line of kind "monitor" into
`metrics.jsonl`: the norms of all steps since the last one, and of each layer the norms of its
gradient, weights and update. `layers` measures them, `health` knows what the numbers mean.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from functools import partial
from typing import Any

from trainer import distributed
from trainer.diagnostics.health import Health, Step
from trainer.diagnostics.layer_norms import Layers
from trainer.metrics import StepReport

logger = logging.getLogger("trainer")


class Off:
    """A monitor that does nothing."""

    def watch(self) -> None:
        """The optimizers are there now."""

    def take(self, report: StepReport) -> None:
        """One more step is over."""

    def flush(self) -> None:
        """A stage ends, or the state is about to be saved: nothing may wait any longer."""

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs to go on with the same lines."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a saved state."""


class Monitor(Off):
    """Looks at each optimizer of a Brain every so many of its steps.

    A step in between costs an entry in a list, a look one copy of the weights for the time of a
    step. What it measured comes to the host in the transfer of the step after it.
    """

    def __init__(self, brain: Any) -> None:
        self.brain = brain
        self.every: int = brain.options.monitor_every
        self._layers: dict[str, Layers] = {}
        self._health: dict[str, Health] = {}
        self._steps: dict[str, list[Step]] = {}
        self._due: dict[str, dict[str, int]] = {}  # Where a look was that has not been written.
        self._idle: str | None = None

    def watch(self) -> None:
        """Follow the steps of the optimizers that there are."""
        names: dict[int, str] = {}
        for name, p in self.brain.modules.named_parameters():
            names.setdefault(id(p), name)
        for name, update in self.brain.updates.items():
            self._layers[name] = Layers(update, names, partial(self._take_measured, name))
            self._health[name] = Health(name)
            self._steps[name] = []
            update.look = self._layers[name]
            self._arm(name)
        self._idle = self._without_optimizer()

    def _without_optimizer(self) -> str | None:
        """A warning about parameters that want gradients and that nothing will ever move."""
        owned = {
            id(p)
            for update in self.brain.updates.values()
            for group in update.optimizer.param_groups
            for p in group["params"]
        }
        idle = [
            name
            for name, p in self.brain.modules.named_parameters()
            if p.requires_grad and id(p) not in owned
        ]
        if not idle:
            return None
        more = f" and {len(idle) - 3} more" if len(idle) > 3 else ""
        return (
            f"no optimizer has {', '.join(idle[:3])}{more}: they never move. Give them to an "
            "optimizer, or say requires_grad_(False), which saves their gradients"
        )

    def _arm(self, name: str) -> None:
        if len(self._steps[name]) + 1 >= self.every:
            self._layers[name].arm(histograms=self.brain.journal.log.draws)

    def take(self, report: StepReport) -> None:
        """A step that moved weights joins those since the last look."""
        name = report.name
        if report.outcome == "stepped" and report.norm is not None:
            steps = self._steps[name]
            steps.append(
                Step(report.norm, report.norm_after, report.limit, report.clipped, report.lr)
            )
            if len(steps) >= self.every:
                # The step of this batch is counted at its end.
                place = {"step": self.brain.optimizer_step + 1, "epoch": self.brain.epoch}
                self._due[name] = place
            else:
                self._arm(name)

    def flush(self) -> None:
        """Write what was measured last, without waiting for another step."""
        for layers in self._layers.values():
            layers.fetch()

    def _take_measured(self, name: str, norm_after: float | None) -> None:
        """What was measured at the last step is here."""
        steps = self._steps[name]
        if norm_after is not None:
            steps[-1] = steps[-1]._replace(norm_after=norm_after)
        if name in self._due:
            self._look(name)

    def _look(self, name: str) -> None:
        """Write the line of what was measured, and say what is worth a warning."""
        steps, self._steps[name] = self._steps[name], []
        place, layers = self._due.pop(name), self._layers[name]
        self._arm(name)
        facts, warnings = self._health[name].look(steps, layers.measured)
        if self._idle:
            warnings, self._idle = [*warnings, self._idle], None
        for warning in warnings:
            logger.warning("step %d: %s", place["step"], warning)
        record = {**place, "optimizers": {name: facts}, "layers": layers.measured}
        log = self.brain.journal.log
        log.monitor({**record, **({"warnings": warnings} if warnings else {})})
        log.histograms(layers.samples(), place["step"])

    def state_dict(self) -> dict[str, Any]:
        """Steps since the last look, and what health remembers."""
        self.flush()
        return {
            name: {"steps": [list(step) for step in steps], "health": health.state_dict()}
            for (name, steps), health in zip(
                self._steps.items(), self._health.values(), strict=True
            )
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a saved state; optimizers that were not monitored then start anew."""
        self._due.clear()
        for layers in self._layers.values():
            layers.forget()
        for name, saved in state.items():
            if name in self._steps:
                self._steps[name] = [Step(*step) for step in saved["steps"]]
                self._health[name].load_state_dict(saved["health"])
                self._arm(name)
                self._idle = None


def make_monitor(brain: Any) -> Off:
    """The monitor of a Brain; gradients are the same on all ranks, so the main one looks."""
    wanted = brain.options.monitor_every and not brain.options.searching
    return Monitor(brain) if wanted and distributed.is_main() else Off()
