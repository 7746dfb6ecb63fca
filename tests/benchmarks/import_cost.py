"""Time and modules that imports of `trainer` take, beside `import torch`.

    python tests/benchmarks/import_cost.py

Fresh processes run the imports in turn. Printed are the median times, the median ratio of a Brain's
import to its two neighbours of `torch`, and the packages of the modules that a Brain adds.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import time
from collections import Counter

TORCH, BRAIN = "import torch", "from trainer import Brain"


def seconds(code: str) -> float:
    """Return the time of a new process that runs code, less that of one that does not."""
    times = []
    for each in ("pass", code):
        start = time.perf_counter()
        subprocess.run([sys.executable, "-c", each], check=True)
        times.append(time.perf_counter() - start)
    return times[1] - times[0]


def steps(*parts: str) -> list[set[str]]:
    """Return the names of all modules that a new process has after each part of a program."""
    code = "; ".join(["import sys", *(f"{part}; print(*sys.modules)" for part in parts)])
    found = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    return [set(line.split()) for line in found.stdout.splitlines()]


def modules(code: str) -> set[str]:
    """Return the names of all modules that a new process has after it has run code."""
    return steps(code)[0]


def main(rounds: int = 9) -> None:
    """Print the comparison."""
    seconds(BRAIN)  # Compiles what was changed, and fills the file cache.
    names, own, bare, ratios = [], [], [seconds(TORCH)], []
    for _ in range(rounds):
        names.append(seconds("import trainer"))
        own.append(seconds(BRAIN))
        bare.append(seconds(TORCH))
        ratios.append(2 * own[-1] / (bare[-2] + bare[-1]))
    added = Counter(name.partition(".")[0] for name in modules(BRAIN) - modules(TORCH))
    print(
        f"{TORCH} {statistics.median(bare):.2f} s, "
        f"import trainer {statistics.median(names):.3f} s, {BRAIN} "
        f"{statistics.median(own):.2f} s, x{statistics.median(ratios):.3f}"
    )
    print("modules beyond torch's:", *(f"{package} {count}" for package, count in added.items()))


if __name__ == "__main__":
    main()
