"""The README's program, as a reader would run it."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import trainer

ROOT = Path(__file__).parent.parent
PROGRAM = re.search(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)


@pytest.mark.skipif(not hasattr(trainer, "launch"), reason="trainer.launch is not there yet")
def test_the_program_of_the_readme_runs_and_runs_again(tmp_path: Path) -> None:
    assert PROGRAM is not None
    (tmp_path / "program.py").write_text(PROGRAM[1])
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""}
    lines = []
    for _ in range(2):
        done = subprocess.run(
            [sys.executable, "program.py"],
            cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        lines.append(re.findall(r"^test: loss=[\d.]+$", done.stdout, re.MULTILINE))
    assert lines[0] == lines[1] != []  # the second run only tests, and finds the same
    assert (tmp_path / "runs" / "x" / "report.html").is_file()
