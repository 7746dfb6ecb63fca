"""Logger that keeps what `Brain.show` was given last in the folder `samples` of the run.

samples/test/samples.json        rows of cells, which name the files
samples/test/300-0-1.flac        optimizer step, row and column
"""

from __future__ import annotations

import contextlib
import json
import re
import shutil
import zlib
from functools import partial
from pathlib import Path

from trainer import json_files
from trainer.loggers.files import as_json, readable_errors, replace_file
from trainer.loggers.protocol import Logger
from trainer.samples import Samples, record_of

FOLDER, TABLE = "samples", "samples.json"
MAX_ROWS = 20  # of a set
MAX_SETS = 12  # Further sets are deleted, the oldest first.
OWN = re.compile(r"\d+-\d+-\d+\.(flac|wav|png)")


class SampleLogger(Logger):
    """Keep the latest samples of each title, at most `MAX_ROWS` rows of `MAX_SETS` titles.

    The files of a set are written before its table, which names them: a killed process leaves the
    earlier set or the new one.

    Args:
        folder: run folder.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder / FOLDER

    def samples(self, samples: Samples) -> None:
        """Write the first rows in place of those that had this title."""
        place = self.folder / slug(samples.title)
        written: set[str] = set()

        def write(at: str, suffix: str, content: bytes) -> str:
            path = place / f"{samples.step}-{at}{suffix}"
            path.write_bytes(content)
            written.add(path.name)
            return path.name

        with readable_errors(place, "samples"):
            place.mkdir(parents=True, exist_ok=True)
            rows = [
                {
                    str(name): record_of(cell, partial(write, f"{number}-{column}"))
                    for column, (name, cell) in enumerate(row.items())
                }
                for number, row in enumerate(samples.rows[:MAX_ROWS])
            ]
        table = {
            "title": samples.title, "note": samples.note, "step": samples.step,
            "epoch": samples.epoch, "rows": rows,
            "left_out": max(0, len(samples.rows) - MAX_ROWS),
        }  # fmt: skip
        text = json.dumps(as_json(table), ensure_ascii=True)
        replace_file(place / TABLE, [text.encode()], "samples")
        for path in place.iterdir():
            if OWN.fullmatch(path.name) and path.name not in written:
                path.unlink()
        old = sorted(self._tables(), key=lambda each: each.stat().st_mtime_ns)
        for each in old[: max(0, len(old) - MAX_SETS)]:
            self._remove(each)

    def resume(self, step: int) -> None:
        """Delete what was shown at later steps, since it will come again."""
        for path in self._tables():
            with contextlib.suppress(OSError, json_files.BadJson):
                table = json_files.read(path)
                shown = table.get("step") if isinstance(table, dict) else None
                if isinstance(shown, int) and shown > step:
                    self._remove(path)

    def _tables(self) -> list[Path]:
        return [each for each in self.folder.glob(f"*/{TABLE}") if not each.parent.is_symlink()]

    @staticmethod
    def _remove(table: Path) -> None:
        table.unlink()  # First, since the other files have no meaning without it.
        shutil.rmtree(table.parent, ignore_errors=True)


def slug(title: str) -> str:
    """Return the name of the folder of a title; different titles have different folders."""
    name = re.sub(r"[^A-Za-z0-9._-]+", "_", title).strip("._")[:60]
    check = zlib.crc32(title.encode(errors="backslashreplace"))
    return name if name and name == title else f"{name or FOLDER}-{check:08x}"
