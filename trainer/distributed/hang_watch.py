"""Hang watch: ends all ranks if one makes no progress, and logs its rank and place.

A thread of each rank publishes the place of its main thread in torch's store. If no rank makes
progress for too long, this tells the rank that computes or sleeps from those that wait for it.
"""

from __future__ import annotations

import json
import logging
import os
import sys
import threading
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from trainer.frames import is_library

logger = logging.getLogger("trainer")

EXIT_CODE = 1
DISTRIBUTED = Path(__file__).parent

paused = 0  # Depth of `distributed.pause` blocks.


class HangWatch:
    """Context manager in which a thread watches over all ranks. Every rank must enter it.

    Args:
        timeout: time without progress after which a rank counts as hung, in seconds.
        store: store that all ranks share.
        rank: rank of this process.
        world_size: number of processes.
        progress: returns a new value whenever this rank has made progress.
    """

    running = False

    def __init__(
        self, timeout: float, store: Any, rank: int, world_size: int, progress: Callable[[], object]
    ) -> None:
        self._timeout, self._store, self._progress = timeout, store, progress
        self._rank, self._ranks = rank, range(world_size)
        self._interval = max(0.1, min(10.0, timeout / 10))
        self._over, main = threading.Event(), threading.get_ident()
        self._thread = threading.Thread(
            target=self._watch, args=(main,), name="hang watch", daemon=True
        )

    def __enter__(self) -> None:
        HangWatch.running = True
        self._thread.start()

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()
        HangWatch.running = False

    def _watch(self, main: int) -> None:
        """Publish the place of the main thread, and end the process if a rank hangs."""
        progress, since, since_read, beat = object(), 0.0, 0.0, 0
        before: list[dict[str, Any]] | None = None  # Entries of all ranks when time was up.
        while not self._over.wait(self._interval):
            beat += 1
            now = self._progress()
            if paused or progress != now:
                progress, since, before = now, time.monotonic(), None
            waits, place = _standing(main)
            try:
                lasted = time.monotonic() - since
                own = {"beat": beat, "waits": waits, "place": place, "lasted": lasted}
                self._store.set(f"standing/{self._rank}", json.dumps(own))
                if before is None and lasted >= self._timeout:
                    before, since_read = self._read(), time.monotonic()
                elif before is not None and time.monotonic() - since_read >= 4 * self._interval:
                    verdict, before = self._describe(before, self._read()), None
                    if verdict:  # The verdict of the first rank to write one.
                        self._store.compare_set("hung", "", verdict)
                if not self._store.check(["hung"]):
                    continue
                verdict = self._store.get("hung").decode(errors="replace")
            except RuntimeError:
                return  # The store is gone, and the run with it.
            logger.error("%s", verdict)
            # Time for the others to log it, too, before their connections break.
            time.sleep(self._interval * (3 if self._rank == 0 else 2))
            sys.stderr.flush()
            os._exit(EXIT_CODE)

    def _describe(self, before: list[dict[str, Any]], now: list[dict[str, Any]]) -> str:
        """Describe the ranks that hang; return an empty text if some rank makes progress."""
        silent = [r for r in self._ranks if before[r].get("beat") == now[r].get("beat")]
        if any(now[r]["lasted"] < self._timeout for r in self._ranks if r not in silent):
            return ""  # A rank has made progress, or has entered `pause`.
        busy = [r for r in self._ranks if not now[r].get("waits")]
        hung = silent or busy or list(self._ranks)
        places = "; ".join(f"rank {r} at {now[r].get('place', 'an unknown place')}" for r in hung)
        why = " in a collective that others do not call" if not silent and not busy else ""
        return (
            f"no progress for {self._timeout:g} s (hang_timeout): {places} "
            f"{'stand' if len(hung) > 1 else 'stands'} still{why}. All ranks end; a restart goes "
            "on from the last checkpoint"
        )

    def _read(self) -> list[dict[str, Any]]:
        keys = [f"standing/{rank}" for rank in self._ranks]
        return [
            json.loads(self._store.get(key)) if self._store.check([key]) else {} for key in keys
        ]


def _standing(thread: int) -> tuple[bool, str]:
    """Return True if a thread waits for other ranks, and its place in the code."""
    stack = traceback.extract_stack(sys._current_frames().get(thread))
    if not stack:
        return False, "an unknown place"
    waits = any(
        file.parent == DISTRIBUTED
        or file.parts[-3:-1] == ("torch", "distributed")
        # Waits for a device, which waits for the other ranks.
        or (file.parts[-2:] == ("optim", "step.py") and name == "_fetch")
        for file, name in ((Path(frame.filename), frame.name) for frame in stack[-4:])
    )
    own = next((frame for frame in reversed(stack) if not is_library(frame.filename)), stack[-1])
    place = f"{own.filename}:{own.lineno} in {own.name}"
    last = stack[-1]
    if last is not own:
        place += f", {Path(last.filename).name}:{last.lineno} in {last.name}"
    return waits, place
