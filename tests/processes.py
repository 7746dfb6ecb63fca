"""Two processes that a test starts, which find each other on this machine and train together.

    launch(folder, "-m", "tests.recipes.segan.two_processes")

What they find they write into the folder, and the test reads it.
"""

import os
import socket
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]


def launch(folder: Path, *program: str, seconds: float = 240) -> None:
    """Run ``python *program folder`` as ranks 0 and 1, and wait for both.

    What they say on stderr lies in ``stderr-0.txt`` and ``stderr-1.txt``. Raises RuntimeError with
    the end of it where one of them fails, and where they take longer; none of them is left behind.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    where = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2"}
    processes = []
    for rank in range(2):
        own = {"RANK": str(rank), "LOCAL_RANK": str(rank), "OMP_NUM_THREADS": "1"}
        with (folder / f"stderr-{rank}.txt").open("w") as stderr:
            command = [sys.executable, *program, str(folder)]
            env = {**os.environ, **where, **own}
            processes.append(subprocess.Popen(command, cwd=ROOT, env=env, stderr=stderr))
    end = time.monotonic() + seconds
    try:
        # One that fails leaves the other waiting for it.
        while None in (codes := [each.poll() for each in processes]):
            if any(codes) or time.monotonic() > end:
                break
            time.sleep(0.05)
    finally:
        for process in processes:
            process.kill()
            process.wait()
    if codes != [0, 0]:
        said = [(folder / f"stderr-{rank}.txt").read_text()[-3000:] for rank in range(2)]
        told = "\n".join(f"rank {rank}: {text}" for rank, text in enumerate(said))
        raise RuntimeError(f"exit codes {codes} (None: not ready within {seconds} s)\n{told}")
