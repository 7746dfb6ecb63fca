"""Time and modules that `import trainer` takes beyond `import torch`.

    python tests/benchmarks/import_cost.py

Fresh processes import either in turn. Printed are the median times, the median ratio of an import
of `trainer` to its two neighbours, and the packages of the modules that it adds.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import time
from collections import Counter


def seconds(module: str) -> float:
    """Return the time of a new process that imports a module, less that of one that does not."""
    times = []
    for code in ("pass", f"import {module}"):
        start = time.perf_counter()
        subprocess.run([sys.executable, "-c", code], check=True)
        times.append(time.perf_counter() - start)
    return times[1] - times[0]


def modules(module: str) -> set[str]:
    """Return the names of all modules that a new process has after an import."""
    code = f"import sys, {module}; print(*sys.modules)"
    found = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    return set(found.stdout.split())


def main(rounds: int = 9) -> None:
    """Print the comparison."""
    seconds("trainer")  # Compiles what was changed, and fills the file cache.
    own, bare, ratios = [], [seconds("torch")], []
    for _ in range(rounds):
        own.append(seconds("trainer"))
        bare.append(seconds("torch"))
        ratios.append(2 * own[-1] / (bare[-2] + bare[-1]))
    added = Counter(name.partition(".")[0] for name in modules("trainer") - modules("torch"))
    print(
        f"import torch {statistics.median(bare):.2f} s, import trainer "
        f"{statistics.median(own):.2f} s, x{statistics.median(ratios):.3f}"
    )
    print("modules beyond torch's:", *(f"{package} {count}" for package, count in added.items()))


if __name__ == "__main__":
    main()
