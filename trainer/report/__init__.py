"""The report of a run: `report.html` beside `metrics.jsonl`, complete in one file.

It needs no network, follows the reader's light or dark setting, and is written anew after stages,
so that it can be read while the run goes on. `write_html` writes that of a run, `compare` one of
several runs.

`history` reads the records, `plots` selects the charts, `chart` draws them with `axis`, `samples`
shows what `Brain.show` was given, `page` and `comparison` compose pages from the parts in `html`.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from trainer.loggers.files import replace_file
from trainer.loggers.protocol import Logger
from trainer.report.page import render
from trainer.samples import Samples

__all__ = ["ReportLogger", "compare", "render", "write_html"]

logger = logging.getLogger("trainer")


def write_html(folder: Path | str) -> Path:
    """Write `report.html` from what has been logged so far; on an error the old one stays.

    Args:
        folder: run folder.

    Returns:
        The path of the report.

    Raises:
        OSError: if it cannot be written.
    """
    folder = Path(folder)
    path = folder / "report.html"
    replace_file(path, [render(folder).encode(errors="backslashreplace")], "report")
    return path


def compare(folders: Iterable[Path | str], out: Path | str) -> Path:
    """Write a page that compares runs: results, settings, curves, and samples side by side.

    Runs whose settings differ in the seed alone have mean and standard deviation. Runs of different
    tasks may be compared; what only some have is a dash in the others.

    Args:
        folders: run folders.
        out: the page to write.

    Returns:
        The path of the page.

    Raises:
        ValueError: if there is no run, a folder does not exist, or there are more than 24 runs.
        OSError: if the page cannot be written.
    """
    from trainer.report.comparison import render_comparison  # It reads YAML, which a run need not.

    page = render_comparison(list(dict.fromkeys(Path(folder) for folder in folders)))
    replace_file(Path(out), [page.encode(errors="backslashreplace")], "comparison")
    return Path(out)


class ReportLogger(Logger):
    """Keep `report.html` up to date, at about 1 % of the run's time.

    Reading a long log takes seconds, and a stage may be short. So the report is written after a
    stage only if a hundred times the duration of the last writing has passed since, and again when
    the logger is closed. It reads the file of the `JsonlLogger`, and must come after it in the list
    of loggers. The first failure to write it is a warning.

    Args:
        folder: run folder.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._stale = self._warned = False
        self._written, self._duration = -math.inf, 0.0

    def scalars(self, kind: str, values: Mapping[str, Any], step: int) -> None:
        """Write the report after a stage if that is cheap."""
        if kind == "stage":
            self._refresh()

    def artifact(self, name: str, path: Path) -> None:
        """Write the report if that is cheap: it lists the reports of skipped steps."""
        self._refresh()

    def samples(self, samples: Samples) -> None:
        """Write the report before the logger is closed."""
        self._stale = True

    def close(self) -> None:
        """Write the report unless it is up to date."""
        if not self._stale:
            return
        started = time.perf_counter()
        try:
            write_html(self.folder)
        except Exception as error:  # A failed report must not end the run.
            if not self._warned:
                self._warned = True
                logger.warning(
                    "the report of the run is not up to date (%s: %s)", type(error).__name__, error
                )
        self._written = time.perf_counter()
        self._duration, self._stale = self._written - started, False

    def _refresh(self) -> None:
        self._stale = True
        if time.perf_counter() - self._written >= 100 * self._duration:
            self.close()
