"""The cells of all experiments, done by a few processes; what is finished is never done again."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from recipes.clipping_study.cells import Cell, finish
from recipes.clipping_study.experiments import Experiment, Setting
from trainer import json_files
from trainer.loggers.files import replace_file
from trainer.processes import serve

logger = logging.getLogger("recipes")

Result = dict[str, Any]
Chosen = dict[tuple[str, str], Setting]


class Results:
    """The finished cells, a line of a JSON lines file each; a line that broke off is done again."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._known: dict[str, Result] = {}
        whole: list[bytes] = []
        if path.exists():
            with path.open("rb") as file:
                for line in json_files.lines(file):
                    result = _result(line)
                    if result is None:
                        logger.warning("%s: a line that is not whole is left out", path)
                        continue
                    whole.append(line.rstrip(b"\n") + b"\n")
                    self._known[_key(result["cell"])] = result
        replace_file(path, whole, "results")

    def of(self, cell: Cell) -> Result | None:
        """Return the result of a cell, or None if it is not finished."""
        return self._known.get(_key(asdict(cell)))

    def add(self, result: Result) -> None:
        """Keep what a cell gave."""
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(result) + "\n")
        self._known[_key(result["cell"])] = result

    def seconds(self) -> float:
        """CPU seconds of all cells."""
        return sum(float(result["seconds"]) for result in self._known.values())

    def __len__(self) -> int:
        return len(self._known)


def _result(line: bytes) -> Result | None:
    """Return the result of a cell from its line; None if it is not whole."""
    try:
        result = json_files.parse(line, allow_nan=True)  # A training that diverged has them.
    except json_files.BadJson:
        return None
    whole = isinstance(result, dict) and isinstance(result.get("cell"), dict)
    return result if whole and isinstance(result.get("seconds"), (int, float)) else None


def _key(cell: Mapping[str, Any]) -> str:
    return json.dumps(cell, sort_keys=True)


def do(cells: Sequence[Cell], results: Results, workers: int) -> None:
    """Do those of the cells that are not finished; ``workers`` 0 does them in this process."""
    waiting = [cell for cell in cells if results.of(cell) is None]
    for number, result in enumerate(_finished(waiting, workers), 1):
        results.add(result)
        if number % 50 == 0 or number == len(waiting):
            logger.info("%d of %d trainings", number, len(waiting))


def _finished(cells: Sequence[Cell], workers: int) -> Iterator[Result]:
    if not workers:
        yield from map(finish, cells)
        return
    # A forked process would hold on to the lock of the run folder.
    context = get_context("spawn")
    with ProcessPoolExecutor(workers, context, initializer=serve) as pool:
        futures = [pool.submit(finish, cell) for cell in cells]
        try:
            for future in as_completed(futures):
                yield future.result()
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def choose(experiment: Experiment, result_of: Callable[[Cell], Result | None]) -> Chosen:
    """The setting of each arm and kind that was best in tuning; the first of equal ones."""
    best: dict[tuple[str, str], tuple[float, Setting]] = {}
    for cell in experiment.cells(None, 0):
        result = result_of(cell)
        if result is None:
            raise ValueError(f"a training of tuning is not finished: {cell.key}")
        cost, place = experiment.cost(result), (cell.arm, cell.kind)
        if place not in best or cost < best[place][0]:
            best[place] = cost, dict(cell.setting)
    return {place: setting for place, (_, setting) in best.items()}


def run(experiments: Sequence[Experiment], results: Results, workers: int, seeds: int) -> Chosen:
    """Tune, choose and measure; gives the chosen settings by (experiment and arm, kind)."""
    logger.info("tuning")
    do([cell for each in experiments for cell in each.cells(None, 0)], results, workers)
    chosen = {each.name: choose(each, results.of) for each in experiments}
    logger.info("measuring")
    cells = [cell for each in experiments for cell in each.cells(chosen[each.name], seeds)]
    do(cells, results, workers)
    return {
        (f"{name}/{arm}", kind): setting
        for name, found in chosen.items()
        for (arm, kind), setting in found.items()
    }
